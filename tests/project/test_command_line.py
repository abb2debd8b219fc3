"""Test the command line: what a newcomer sees, an example per command, exit codes, completion and progress bars."""

import contextlib
import importlib
import importlib.metadata
import io
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tokfuse import __main__ as entry
from tokfuse.inspection import doctor, progress

PARSERS = {
    name: (entry.parser if name == "completion" else importlib.import_module(module).parser)
    for name, (module, _) in entry.COMMANDS.items()
}


def test_without_a_command_it_shows_what_to_try_first(capsys) -> None:
    assert entry.main([]) == 0
    shown = capsys.readouterr().out
    for first in ("python -m tokfuse doctor", "trl.install()", "python -m tokfuse bench policy_step --quick", "--help"):
        assert first in shown


def test_help_lists_every_command_and_the_exit_codes(capsys) -> None:
    with pytest.raises(SystemExit) as raised:
        entry.main(["--help"])
    shown = capsys.readouterr().out
    assert raised.value.code == 0 and all(name in shown for name in entry.COMMANDS)
    assert [line.split()[0] for line in shown.split("exit codes:\n")[1].splitlines()] == ["0", "1", "2", "130", "141"]


@pytest.mark.parametrize("command", PARSERS)
def test_every_command_has_a_valid_example(command: str) -> None:
    example = (PARSERS[command]().epilog or "").removeprefix("example: ")
    start, end = {"completion": ('eval "$(tokfuse completion ', ')", in ~/.bashrc')}.get(
        command, (f"python -m tokfuse {command} ", " > ")
    )
    assert example.startswith(start), f"{command} --help has no example"
    PARSERS[command]().parse_args(shlex.split(example.removeprefix(start).split(end)[0]))


def test_wrong_command_lines_exit_with_2() -> None:
    for words in (["doktor"], ["doctor", "--no-such-option"], ["completion", "fish"]):
        with pytest.raises(SystemExit) as raised, contextlib.redirect_stderr(io.StringIO()):
            entry.main(words)
        assert raised.value.code == 2


def test_an_interrupt_exits_with_130_and_without_traceback(monkeypatch, capsys) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert entry.main(["doctor"]) == 130
    assert capsys.readouterr().err == "tokfuse: interrupted\n"


def test_the_welcome_and_the_help_import_no_torch() -> None:
    code = "import sys; from tokfuse import __main__ as m; m.main([]); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def test_the_console_script_is_the_module() -> None:
    (script,) = importlib.metadata.entry_points(group="console_scripts", name="tokfuse")
    assert script.load() is entry.main


def test_completion_knows_commands_options_and_files(tmp_path: Path, capsys) -> None:
    pytest.importorskip("shtab")
    assert entry.main(["completion", "bash"]) == 0
    script = tmp_path / "completion.bash"
    script.write_text(capsys.readouterr().out)
    asked = "\n".join(
        f'COMP_WORDS=({line}); COMP_CWORD={line.count(" ")}; _shtab_tokfuse; echo "${{COMPREPLY[@]}}"'
        for line in ("tokfuse do", "tokfuse bench --js", "tokfuse algorithms --kind pref")
    )
    done = subprocess.run(["bash", "-c", f"source {script}\n{asked}"], capture_output=True, text=True)
    assert done.stdout.split() == ["doctor", "--json", "preference"], done.stderr


def test_completion_names_the_missing_package(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "shtab", None)
    assert entry.main(["completion", "zsh"]) == 1
    assert "pip install 'tokfuse[cli]'" in capsys.readouterr().err


def test_a_bar_is_shown_on_a_terminal_only(monkeypatch, capsys) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    pytest.importorskip("tqdm")
    shown = {}
    for name, stream, quiet in (
        ("terminal", Terminal(), False),
        ("quiet", Terminal(), True),
        ("file", io.StringIO(), 0),
    ):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress.bar(2, "kernel", bool(quiet)) as bar:
            bar.update()
            bar.set_postfix_str("x")
            bar.update()
        shown[name] = stream.getvalue()
    assert "2/2" in shown["terminal"] and shown["quiet"] == shown["file"] == ""


def test_a_bar_without_tqdm_does_nothing(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress.bar(1, "case") as bar:
        bar.update()
        bar.clear()
        bar.set_postfix_str("x")
    assert capsys.readouterr().err == ""
