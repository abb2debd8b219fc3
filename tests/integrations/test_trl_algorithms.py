"""Test methods of tokfuse.algorithms inside TRL's GRPO loop, on the tiny model.

If TRL has the same method, both trainers must agree. The other methods must train, and their loss must equal the
loss that the method defines for the rollout.
"""

import dataclasses

import pytest
import torch

pytest.importorskip("trl", reason="needs the group `hosts`")

import tiny_grpo
from host_parity import assert_no_farther, trl_in_float64
from trl import GRPOTrainer

import tokfuse
from tokfuse import algorithms
from tokfuse.integrations.trl import FusedGRPOTrainer

SGD = {"optim": "sgd", "learning_rate": 0.3, "max_grad_norm": 0.0, "num_iterations": 2, "max_steps": 3}
# Without the clip ratios: a reward at its group's mean has advantage 0 in TRL and 3e-8 in tokfuse.
SAME = ("loss", "grad_norm", "entropy", "kl")


def method(name, **options):
    return algorithms.make(name, **options)


def fused(tmp_path, algorithm, **options):
    return tiny_grpo.trainer(
        FusedGRPOTrainer, tmp_path, **{**SGD, **options}, extra={"algorithm": algorithm, "solved_above": 0.45}
    )


# The method in TRL's options, and the tokfuse method with TRL's constants.
TWINS = {
    "grpo over tokens": ({}, method("grpo", kl=None, aggregation="token_mean", eps=1e-4)),
    "dr_grpo": (
        {"loss_type": "dapo", "scale_rewards": "none"},
        method("dr_grpo", aggregation="token_mean", max_length=None),
    ),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 5.0}, method("cispo", eps=1e-4)),
    "kl": (
        {"beta": 0.1, "use_bias_correction_kl": False},
        method("grpo", kl=tokfuse.KL(coef=0.1), aggregation="token_mean", eps=1e-4),
    ),
}


@pytest.mark.parametrize("name", TWINS)
def test_equals_trl_where_trl_has_the_method(name, tmp_path):
    options, algorithm = TWINS[name]
    stock = tiny_grpo.trainer(GRPOTrainer, tmp_path, **{**SGD, **options})
    stock.train()  # before the next one is created, which seeds the sampler again
    exact = tiny_grpo.trainer(GRPOTrainer, tmp_path, **{**SGD, **options})
    with trl_in_float64():
        exact.train()
    ours = fused(tmp_path, algorithm, beta=options.get("beta", 0.0))
    ours.train()
    runs = [x.state.log_history[:-1] for x in (ours, stock, exact)]
    for key in SAME:
        if key != "kl" or "beta" in options:
            figures = [[row[key] for row in run] for run in runs]
            assert_no_farther(*figures, size=max(1.0, *map(abs, figures[2])), what=key)


# One method of every kind: state, selection, signals, token weights, token advantages, dependence on the policy,
# a bias model.
NAMES = {
    "rloo": {},
    "opo": {},
    "gspo": {},
    "gmpo": {},
    "nft": {},
    "gbpo": {},
    "adora": {},
    "high_entropy": {},
    "clip_cov": {},
    "kl_cov": {},
    "ar": {},
    "reinforce_pp": {"reward_kl": 0.0},
    "d3s": {"rollouts": (2, 4), "tokens": (0.5, 1.0), "total_steps": 4},
    "r2vpo": {"delta": 0.05, "step_size": 1.0, "penalty": 0.04},
    "cdpo": {},
    "bapo": {},
    "dapo": {"overlong": None},
}


@pytest.mark.parametrize("name", NAMES)
def test_a_method_trains(name, tmp_path):
    algorithm = method(name, **NAMES[name])
    kl = getattr(algorithm, "kl", None)
    trainer = fused(tmp_path, algorithm, beta=0.0 if kl is None else kl.coef)
    before = {k: x.clone() for k, x in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    assert any(not torch.equal(after[k], x) for k, x in before.items())
    for row in trainer.state.log_history[:-1]:
        assert torch.isfinite(torch.tensor([row["loss"], row["grad_norm"], row["entropy"]])).all()
    assert f"algorithm {name}" in trainer.describe()


def test_the_loss_is_the_one_that_the_method_states(tmp_path):
    """One micro-batch of a rollout. The method alone computes the loss from TRL's padded tensors."""
    algorithm = method("gbpo")
    trainer = fused(tmp_path, algorithm, gradient_accumulation_steps=1)
    seen = []
    real = trainer._compute_loss

    def watched(model, inputs):
        loss = real(model, inputs)
        seen.append((loss.item(), {k: v.clone() for k, v in inputs.items() if isinstance(v, torch.Tensor)}))
        return loss

    trainer._compute_loss = watched
    trainer.train()
    loss, inputs = seen[0]
    rows = inputs["completion_mask"].bool()
    lengths = rows.sum(1)
    old = inputs["old_per_token_logps"][rows]
    batch = algorithms.Batch(
        reward=inputs["tokfuse/reward"],
        group_ids=torch.zeros(4, dtype=torch.int64),
        old_logp=old,
        cu_seqlens=torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int(),
    )
    plan = algorithm.objective(algorithm.prepare(batch, {}), {})
    assert loss == pytest.approx(plan.loss(old).loss.item(), rel=1e-5, abs=1e-6)


def test_state_follows_updates_and_checkpoints(tmp_path):
    control = algorithms.EntropyControl(target=9.0, step=0.01)
    algorithm = method("grpo", kl=None, entropy_control=control)
    trainer = fused(tmp_path, algorithm, save_strategy="steps", save_steps=2)
    trainer.train()
    state = trainer._method.state
    assert state["entropy_coef"] == pytest.approx(0.03)
    assert 2.0 < state["entropy"] < 4.0
    again = fused(tmp_path, algorithm, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again._method.state["entropy_coef"] == pytest.approx(0.04)


REFUSED = {
    "loss_type": {"loss_type": "grpo"},
    "epsilon": {"epsilon": 0.1},
    "delta": {"delta": 1.5},
    "importance_sampling_level": {"importance_sampling_level": "sequence"},
    "scale_rewards": {"scale_rewards": "none"},
    "entropy_coef": {"entropy_coef": 0.1},
    "top_entropy_quantile": {"top_entropy_quantile": 0.5},
    "beta": {"beta": 0.1},
    "off_policy_mask_threshold": {"off_policy_mask_threshold": 0.1},
}


@pytest.mark.parametrize("option", REFUSED)
def test_an_option_that_the_method_replaces_is_refused(option, tmp_path):
    with pytest.raises(ValueError, match=f"FusedGRPOTrainer: {option} must be "):
        fused(tmp_path, "rloo", **REFUSED[option])


@pytest.mark.parametrize("name", ["lopti", "pipo", "grpo_guard"])
def test_a_method_that_is_no_single_loss_is_refused(name, tmp_path):
    cls = algorithms.registry.entry(name).cls
    required = {o for o, v in algorithms.registry.entry(name).options().items() if v is dataclasses.MISSING}
    algorithm = method(name, **{o: 1 for o in required}) if required else method(name)
    assert isinstance(algorithm, cls)
    with pytest.raises(ValueError, match="FusedGRPOTrainer: algorithm must be"):
        fused(tmp_path, algorithm)


def test_what_trl_does_not_have_is_named(tmp_path):
    trainer = fused(tmp_path, "ppo")
    with pytest.raises(ValueError, match=r"algorithms.ppo: batch.value must be given"):
        trainer.train()


def test_groups_split_over_ranks_are_refused(tmp_path):
    trainer = fused(tmp_path, "rloo")
    trainer._method._rewards = torch.zeros(3, 1)
    batch = {"completion_mask": torch.ones(3, 2)}
    from tokfuse.integrations.trl_algorithm import padding_of

    padding, mask = padding_of(batch)
    with pytest.raises(ValueError, match="whole groups of 4"):
        trainer._method._batch(trainer, batch, padding, mask, mask.float(), mask.float())
