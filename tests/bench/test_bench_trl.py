"""Test bench/trl_step.py: its measurements, and that it detects arms with different losses."""

import argparse

import pytest

from tokfuse.bench import trl_step

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo  # noqa: F401  (sets HF_HUB_OFFLINE)

OPTIONS = argparse.Namespace(arm="fused", model=None, steps=3, prompts=1, generations=4, length=5, rounds=1)
FACTS = {"trl": "1.16.0", "cpu_model": "a CPU", "threads": 2, "torch": "2.13", "load_average": 0.5}


def row(arm="stock", **more):
    figures = {"step_s": 2.0, "generation_s": 0.5, "loss_side_s": 1.0, "peak_mib": 100.0}
    return {
        "arm": arm,
        "model": "tiny",
        "sequences": 4,
        "length": 5,
        "losses": [0.5, 0.25],
        "grad_norms": [1.0, 2.0],
        **figures,
        **FACTS,
        **more,
    }


def test_an_arm_measures_its_steps():
    # Runs in a separate process. A process that earlier tests have filled may train without more memory.
    found = trl_step._child("fused", OPTIONS)
    assert 0.0 < found["loss_side_s"] < found["step_s"]
    assert 0.0 < found["generation_s"] < found["step_s"]
    assert found["peak_mib"] > 0.0
    assert len(found["losses"]) == len(found["grad_norms"]) == OPTIONS.steps


def test_the_table_gives_medians_and_multiples():
    rows = [row(), row("install", loss_side_s=0.5), row("fused", step_s=1.5, peak_mib=50.0)]
    text = trl_step.markdown(rows)
    assert "| install | 2.000 s (1.00x) | 0.500 s (1.00x) | 0.500 s (0.50x) | 25%" in text
    assert "| fused | 1.500 s (0.75x)" in text and "50 MiB (0.50x)" in text
    assert "4 sequences of 5 tokens" in text


@pytest.mark.parametrize("name", ["losses", "grad_norms"])
def test_arms_that_learn_differently_fail(name, capsys):
    assert trl_step._compare([row(), row("fused")]) == 0
    assert trl_step._compare([row(), row("fused", **{name: [0.5, 0.3]})]) == 1
    assert f"{name} of fused differ" in capsys.readouterr().out
