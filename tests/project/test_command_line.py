"""Test the command line: what a newcomer sees, an example per command, exit codes, completion and progress bars."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import io
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from bench_rows import our_row

import tokfuse
from tokfuse import __main__ as entry
from tokfuse.inspection import doctor, progress, tables

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


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("doctor --markdown {0}/none/page.md", "none/page.md: No such file or directory. Check the path."),
        ("algorithms --gallery {0}", ": Is a directory. Check the path."),
        ("bench numbers {0}/none.jsonl", "none.jsonl: No such file or directory. Check the path."),
        ("bench numbers {0}/text", "must contain rows of `bench --json`; got 'no row'. Pass another file."),
        ("bench targets {0}/other", """must contain rows of `bench --json`; got '{{"a": 1}}'."""),
        ("bench numbers {0}/part", """must contain rows of `bench --json`; got '{{"provider": "x"}}'."""),
        ("bench token_stats --png {0}/none/x.png", "--png must be a file in an existing folder; got "),
        ("bench token_stats --json {0}", "--json must be a file in an existing folder; got "),
        ("bench token_stats --dtype int8", "--dtype: must name some of float32, bfloat16, float16; got 'int8'"),
        ("bench token_stats --rounds 0", "--rounds: must be an integer >= 1; got '0'"),
        ("bench token_stats --threads 1.5", "--threads: must be an integer >= 1; got '1.5'"),
        ("bench token_stats --budget nan", "--budget: must be a number of seconds >= 0; got 'nan'"),
        ("kernels none", "no case begins with none. The cases are "),
    ],
)
def test_a_wrong_file_or_number_is_one_sentence(words: str, text: str, tmp_path: Path, capsys) -> None:
    (tmp_path / "text").write_text("no row\n")
    (tmp_path / "other").write_text('{"a": 1}\n')
    (tmp_path / "part").write_text('{"provider": "x"}\n')
    try:
        status = entry.main([word.format(tmp_path) for word in words.split()])
    except SystemExit as stopped:
        status = stopped.code
    shown = capsys.readouterr().err
    assert status == 2 and text.format() in shown and "Traceback" not in shown


def test_an_interrupt_exits_with_130_and_without_traceback(monkeypatch, capsys) -> None:
    def interrupted(argv: list[str]) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "main", interrupted)
    assert entry.main(["doctor"]) == 130
    assert capsys.readouterr().err == "tokfuse: interrupted\n"


def test_version(capsys) -> None:
    with pytest.raises(SystemExit) as exit:
        entry.main(["--version"])
    assert exit.value.code == 0 and capsys.readouterr().out == f"tokfuse {tokfuse.__version__}\n"


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


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("stream", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
@pytest.mark.parametrize("environment", [{}, {"NO_COLOR": "1"}, {"TERM": "dumb"}], ids=str)
def test_tables_are_drawn_on_a_colour_terminal_only(stream, environment: dict[str, str], monkeypatch) -> None:
    pytest.importorskip("rich")
    for name, value in {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "100", **environment}.items():
        monkeypatch.setenv(name, value)
    stream.truncate(0)
    stream.seek(0)
    monkeypatch.setattr(sys, "stdout", stream)
    tables.show("plain", "before", tables.Table(["op", "ms"], [["[1] halve", "2.5"], ["yes", "10"]], "title", ["ms"]))
    if stream.isatty() and not environment:
        lines = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()).splitlines()
        cells = [line.split() for line in lines if line.strip(" \u2500")]
        assert cells == [["before"], ["title"], ["op", "ms"], ["[1]", "halve", "2.5"], ["yes", "10"]]
        (first,) = [line.rstrip() for line in lines if "2.5" in line]
        (second,) = [line.rstrip() for line in lines if "yes" in line]
        assert len(first) == len(second), "numbers are aligned to the right"
    else:
        assert stream.getvalue() == "plain\n"


def test_a_narrow_terminal_shortens_no_cell(monkeypatch) -> None:
    pytest.importorskip("rich")
    for name, value in {"TERM": "xterm", "NO_COLOR": "", "COLUMNS": "50"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "stdout", Terminal())
    names = ["linear_token_stats", "linear_token_stats_at"]
    tables.show("plain", tables.Table(["op", "a", "b"], [[name, "x" * 30, "y" * 25] for name in names]))
    shown = re.sub(r"\x1b\[[0-9;]*m", "", sys.stdout.getvalue())
    assert [word for word in shown.split() if word.startswith("linear")] == names
    assert (shown.count("x"), shown.count("y"), shown.count("\u2026")) == (60, 50, 0)


def test_tables_without_rich_are_plain(monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    tables.show("plain", "before")
    assert sys.stdout.getvalue() == "plain\n"


@pytest.mark.parametrize(
    "command", [["algorithms", "--kind", "preference"], ["doctor"], ["bench", "compare", "R", "R"]]
)
def test_commands_show_the_same_cells_on_a_terminal(command: list[str], tmp_path: Path, monkeypatch) -> None:
    pytest.importorskip("rich")
    rows = tmp_path / "rows.jsonl"
    rows.write_text(our_row("policy_step", "step", "v", "4x8", median_ms=2.0, limit="copy", limit_share=0.5).to_json())
    words = [str(rows) if word == "R" else word for word in command]
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    shown = []
    for stream in (io.StringIO(), Terminal()):
        monkeypatch.setattr(sys, "stdout", stream)
        assert entry.main(words) == 0
        shown.append(re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue()))
    plain, drawn = shown
    assert "\u2500" in drawn and "\u2500" not in plain
    assert set(plain.split()) <= set(drawn.split())
