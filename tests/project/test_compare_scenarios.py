"""Test `examples/compare_scenarios.py`: the properties of each scenario, and a short run of each."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import compare_algorithms as compare
import compare_scenarios as scenarios

from tokfuse.algorithms import make

SHORT = compare.Settings(steps=3, prompts=4, group_size=4)


def test_a_hint_is_right_nine_times_in_ten_and_the_pair_decides():
    bias = scenarios.HintedPolicy()
    trainer = scenarios.HintedTrainer(make("cdpo"), 0, compare.Settings(prompts=4000), bias)
    prompt = trainer.prompts()
    agrees = (scenarios.asked(prompt) == prompt % 10).float().mean()
    # A random wrong hint is correct by chance one time in ten.
    assert abs(float(agrees) - 0.91) < 0.02
    assert scenarios.asked(torch.tensor([370, 993, 1004])).tolist() == [0, 8, 4]


def test_the_bias_model_sees_hints_alone_and_is_the_reference():
    stage_1 = scenarios.HintedTrainer(make("cdpo", kl=None), 0, SHORT, None)
    assert bool((stage_1.prompts() >= 1000).all())
    bias = scenarios.HintedPolicy()
    trainer = scenarios.HintedTrainer(make("cdpo"), 0, SHORT, bias)
    rollout, batch = trainer.collect()
    want = bias.packed_logits(rollout).log_softmax(1).gather(1, rollout.target[:, None])[:, 0]
    torch.testing.assert_close(batch.ref_logp, want.detach())
    before = [p.clone() for p in bias.parameters()]
    trainer.step()
    assert all(torch.equal(a, b) for a, b in zip(before, bias.parameters(), strict=True))


def test_the_gradient_of_cdpo_is_clipped(monkeypatch):
    limits = []
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", lambda parameters, limit: limits.append(limit))
    scenarios.HintedTrainer(make("cdpo", kl=None), 0, SHORT, None).step()
    assert limits == [20.0] * SHORT.minibatches


def test_replayed_batches_are_eight_steps_old():
    start = compare.Policy().state_dict()
    trainer = scenarios.ReplayTrainer(make("bapo", advantage="reinforce"), 0, SHORT, start)
    seen = [trainer.collect()[0] for _ in range(12)]
    assert [a is seen[0] for a in seen[:9]] == [True] * 9
    assert all(a is not b for a, b in zip(seen[8:], seen[9:], strict=False))
    assert len(trainer.waiting) == scenarios.LAG
    assert set(trainer.score(seen[0]).tolist()) <= {-1.0, 1.0}


def test_the_positive_share_is_that_of_the_clipped_products():
    start = compare.Policy().state_dict()
    trainer = scenarios.ReplayTrainer(make("bapo", advantage="reinforce", **scenarios.FIXED), 0, SHORT, start)
    rollout, batch = trainer.collect()
    batch = trainer.prepared(batch)
    drift = torch.linspace(-1.0, 1.0, len(rollout.target))
    batch = batch.with_policy(batch.old_logp + drift, batch.entropy)
    (plan,) = trainer.algorithm.plans(batch, trainer.state)
    up = down = 0.0
    seq = torch.repeat_interleave(torch.arange(len(batch.reward)), batch.lengths)
    for t in range(len(drift)):
        ratio, reward = float(drift[t].exp()), float(batch.reward[seq[t]])
        up += min(ratio, 1.2) * max(reward, 0.0)
        down += max(ratio, 0.6) * max(-reward, 0.0)
    assert scenarios.positive_share(plan) == pytest.approx(up / max(up + down, 1e-12), abs=1e-6)


def test_harmful_batches_reward_what_is_wrong():
    trainer = scenarios.HarmedTrainer(make("grpo", kl=None), 0, SHORT)
    _, batch = trainer.collect()
    for step in range(16):
        got = trainer.prepared(batch)
        if scenarios.is_harmful(step):
            assert got.advantage_level == "sequence"
            assert torch.equal(got.advantage, 1 - 2 * batch.reward)
        else:
            assert not torch.equal(got.advantage, 1 - 2 * batch.reward)
    assert [t for t in range(24) if scenarios.is_harmful(t)] == [10, 15, 20]


def test_what_followed_the_harm():
    rows = [
        {"method": "m", "seed": 0, "step": t, "reward": float(reward)}
        for t, reward in enumerate([0.5] * 10 + [0.8, 0.5, 0.6, 0.7, 0.7, 0.4, 0.4, 0.4, 0.8])
    ]
    assert scenarios.after_harm(rows, 1) == pytest.approx((-0.3 + 0.0) / 2)
    assert scenarios.after_harm(rows, 3) == pytest.approx((-0.1 + 0.4) / 2)


@pytest.mark.parametrize("name", scenarios.SCENARIOS)
def test_the_command(name: str, tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr(scenarios, "WARM_REWARD", 0.0)
    steps = 14 if name == "harm" else 3
    argv = [name, "--seeds", "1", "--steps", str(steps), "--out", str(tmp_path)]
    assert scenarios.main(argv) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    assert len(rows) == steps * len(methods) and {row["scenario"] for row in rows} == {name}
    text = (tmp_path / "summary.md").read_text()
    assert all(f"| {method} |" in text for method in methods)
    assert (tmp_path / "curves.png").stat().st_size > 10_000


def test_an_unknown_scenario_lists_the_known(capsys):
    with pytest.raises(SystemExit):
        scenarios.main(["chess"])
    assert "must be one of shortcut, replay, harm; got 'chess'" in capsys.readouterr().err
