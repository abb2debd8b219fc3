"""Test bench/trl_distillation.py: it measures both arms of every case, and it detects a different loss."""

import json
import os

import pytest

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
pytest.importorskip("trl", reason="needs the group `hosts`")

import trl.trainer.distillation_trainer as stable

from tokfuse.bench import trl_distillation as bench


def test_quick_measures_every_case(tmp_path, capsys):
    stock = stable._chunked_divergence_loss
    assert bench.main(["--quick", "--md", "--json", str(tmp_path / "rows")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert [(r["trainer"], r["beta"], r["arm"]) for r in rows] == [
        (*case, arm) for case in bench.CASES for arm in ("trl", "tokfuse")
    ]
    assert all(r["wall_ms"] > 0 and r["cpu_ms"] > 0 for r in rows)
    # How large a peak is depends on the memory that earlier tests of this process left free: test_bench.py has a bound.
    assert all(r["peak_bytes"] >= 0 and r["peak_source"] == "VmHWM reset before the call" for r in rows)
    assert "| gkd | 0.5 |" in capsys.readouterr().out
    assert stable._chunked_divergence_loss is stock


def test_a_different_gradient_fails(capsys):
    arms = {name: (lambda x=x: {"loss": bench.torch.tensor([1.0, x])}) for name, x in (("trl", 2.0), ("tokfuse", 2.01))}
    assert not bench._equal("a case", arms)
    assert "loss of a case is" in capsys.readouterr().out
