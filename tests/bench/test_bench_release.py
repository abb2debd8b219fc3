"""Test `make bench-release`: its command lines are valid, and an interrupted run keeps the old rows."""

import importlib.util
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tokfuse.bench import cli, numbers, plan, predict, targets

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def release() -> Any:
    """Return tools/bench_release.py, which is a script and not a module of the package."""
    spec = importlib.util.spec_from_file_location("bench_release", ROOT / "tools/bench_release.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_release"] = module  # dataclasses look up their module
    spec.loader.exec_module(module)
    return module


def test_every_step_is_a_valid_command_line(release: Any) -> None:
    for step in release.STEPS:
        for quick in (False, True):
            words = release.command(step, Path("r.jsonl"), quick)[4:]
            options = cli.parser().parse_args(words)
            if options.names == ["growth"]:
                assert plan.make_growth_plan(options)
            elif options.names != ["predict"]:
                assert plan.make_plan(options)


def test_every_peer_that_runs_on_a_cpu_is_measured(release: Any) -> None:
    from tokfuse.bench import peers

    measured = {
        name
        for step in release.STEPS
        if step.kind != "predicted"
        for name in cli.parser().parse_args(step.arguments.split()).peers.split(",")
    }
    assert {n for n, peer in peers.KNOWN.items() if not peer.needs_cuda} <= measured


def test_rows_are_replaced_only_when_all_their_steps_ran(
    release: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    def run(line: list[str], **_: Any) -> Any:
        Path(line[-1]).write_text("new\n")
        return SimpleNamespace(returncode=int("growth" in line))

    for name in release.VENVS.values():
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin" / "python").touch()
    monkeypatch.setattr(release, "ROOT", tmp_path)
    monkeypatch.setattr(release.subprocess, "run", run)
    out = tmp_path / "out"
    out.mkdir()
    (out / "growth.jsonl").write_text("old\n")
    assert release.main(["--out", str(out)]) == 1
    assert (out / "growth.jsonl").read_text() == "old\n"
    assert (out / "logits.jsonl").read_text() == (out / "peers.jsonl").read_text() == "new\n"
    assert "exit status 1: growth --axes tokens" in capsys.readouterr().out
    (out / "logits.jsonl").write_text("old\n")
    assert release.main(["--out", str(out), "--minutes", "-1"]) == 1
    said = capsys.readouterr().out
    assert said.count("skipped, no time left") == len(release.STEPS)
    assert (out / "logits.jsonl").read_text() == "old\n"


def test_a_missing_environment_is_said(release: Any, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(release, "ROOT", tmp_path)
    said = release.attempt(release.STEPS[0], tmp_path / "r", False, time.monotonic() + 60)
    assert ".venv-peers is missing, `make bench-release` creates it" in said


def test_predicted_rows_are_in_the_readme_as_predicted_and_nowhere_else() -> None:
    rows = list(predict.rows())
    text = numbers.section(rows)
    assert "**Predicted, nothing ran**" in text and "H100, predicted" in text
    assert "Machine:" not in text and "in place" not in text
    assert targets.judge(rows) == []
    slow = numbers.section([replace(rows[0], dtype="bfloat16", limit_share=0.5, median_ms=2.0)])
    assert "2.00 (issue)" in slow
