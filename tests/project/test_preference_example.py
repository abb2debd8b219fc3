"""Test `examples/train_preference.py`: loss and reward margin improve on held-out pairs."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_algorithms as task
import train_preference as example

SHORT = example.Settings(steps=60, answers=1000, lr=6e-3)


@pytest.mark.parametrize("name", example.LOSSES)
def test_losses_learn_from_pairs(name: str):
    rows = list(example.train(name, example.LOSSES[name], SHORT))
    first, last = rows[0], rows[-1]
    assert [row["step"] for row in rows] == list(range(0, 61, 6))
    assert last["loss"] < 0.85 * first["loss"]
    assert last["margin"] > first["margin"] + 0.5 and last["accuracy"] > 0.7
    assert last["right"] > 2 * first["right"], "answers that it never saw sampled"
    if name != "simpo":  # the policy starts equal to the reference
        assert abs(first["margin"]) < 1e-5


def test_pairs_are_right_and_wrong_answers_to_one_digit():
    torch.manual_seed(0)
    pairs = example.make_pairs(task.Policy(), SHORT, torch.Generator().manual_seed(0))
    part = pairs.take(torch.arange(8))
    reward = task.score(part.rollout)
    assert bool(reward[part.chosen].all()) and not reward[part.rejected].any()
    prompt = part.rollout.prompt
    assert torch.equal(prompt[part.chosen], prompt[part.rejected])


def test_the_command_writes_rows(tmp_path: Path, capsys):
    arguments = [
        "--losses",
        "dpo",
        "bco_pair",
        "--steps",
        "2",
        "--answers",
        "300",
        "--pairs",
        "8",
        "--out",
        str(tmp_path),
    ]
    assert example.main(arguments) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["loss_name"] == "dpo"] == [0, 1, 2]
    assert capsys.readouterr().out.startswith("dpo ")
