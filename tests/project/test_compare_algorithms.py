"""Test `examples/compare_algorithms.py`: its task, its bookkeeping, a short run of every method."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_algorithms as compare

from tokfuse import algorithms

SHORT = compare.Settings(steps=10, prompts=4, group_size=4, epochs=2)


def answers(*rows: tuple[int, ...]) -> compare.Rollout:
    """Return rollouts that ask for 7. Short rows are padded with digits after their end."""
    tokens = torch.tensor([(*row, *[3] * (compare.LENGTH - len(row))) for row in rows])
    return compare.Rollout(torch.full((len(rows),), 7), tokens, torch.tensor(list(map(len, rows))))


def test_the_score():
    stop, junk = compare.STOP, compare.VOCAB - 1
    right = answers((7, stop), (9, 8, stop), (0, 0, 3, 4, stop))
    assert compare.score(right).tolist() == [1, 1, 1]
    wrong = answers((stop,), (6, stop), (7, junk, stop), (3, 4, 0, 0, 0), (junk, stop))
    assert compare.score(wrong).tolist() == [0, 0, 0, 0, 0]


def test_packed_logits_are_those_that_were_sampled():
    """Teacher forcing sees the same states as sampling, so the greedy continuation is the same."""
    torch.manual_seed(0)
    policy = compare.Policy()
    generator = torch.Generator().manual_seed(0)
    rollout = compare.sample(policy, torch.arange(10).repeat(20), generator)
    logits = policy.packed_logits(rollout)
    assert len(logits) == int(rollout.length.sum()) == len(rollout.target)
    total = torch.zeros_like(rollout.prompt)
    for position in range(compare.LENGTH):
        rows = rollout.kept[:, position]
        expected = policy(rollout.prompt, total, torch.full_like(total, position))[rows]
        place = rollout.kept.flatten().cumsum(0).view_as(rollout.kept)[:, position][rows] - 1
        torch.testing.assert_close(logits[place], expected)
        token = rollout.tokens[:, position]
        total = (total + torch.where(token < compare.DIGITS, token, 0)) % compare.DIGITS
    ends = rollout.tokens.gather(1, (rollout.length - 1)[:, None]).flatten()
    assert bool(((ends == compare.STOP) | (rollout.length == compare.LENGTH)).all())


@pytest.mark.parametrize("label", compare.METHODS)
def test_every_method_runs(label: str):
    rows = list(compare.train(label, 0, SHORT))
    assert [row["step"] for row in rows] == list(range(10))
    for row in rows:
        assert 0 <= row["reward"] <= 1 and row["entropy"] > 0
        assert 0 <= row["backward_tokens"] <= row["tokens"] + 1e-6 or label == "pipo"
    assert any(row["backward_tokens"] > 0 for row in rows)
    again = list(compare.train(label, 0, SHORT))
    for row in (*rows, *again):
        row.pop("loss_ms")
    assert rows == again


def test_grpo_learns_the_task():
    """From one correct answer in forty to most of them, with each of two seeds."""
    for seed in range(2):
        rows = list(compare.train("grpo", seed, compare.Settings()))
        assert rows[0]["reward"] < 0.2 < 0.8 < rows[-1]["reward"]


def test_the_command_writes_rows_and_a_table(tmp_path: Path, capsys):
    argv = ["--methods", "grpo", "pipo", "--seeds", "2", "--steps", "3", "--prompts", "2"]
    assert compare.main([*argv, "--out", str(tmp_path)]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["method"], row["seed"], row["step"]) for row in rows] == [
        (m, s, t) for m in ("grpo", "pipo") for s in range(2) for t in range(3)
    ]
    text = (tmp_path / "summary.md").read_text()
    assert text.strip() in capsys.readouterr().out
    mean = sum(row["reward"] for row in rows if row["method"] == "grpo") / 6
    assert f"| grpo | {mean:.3f} |" in text


def test_every_named_method_exists():
    assert {name for name, _ in compare.METHODS.values()} <= set(algorithms.list())
