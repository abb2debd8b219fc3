"""Test every advantage estimator that has a counterpart in verl, on the same batch."""

import numpy as np
import pytest
import torch
from host_parity import assert_no_farther

pytest.importorskip("verl")

from verl.trainer.config import AlgoConfig
from verl.trainer.ppo import core_algos

ROWS, LENGTH = 10, 7


def batch(seed=0, singles=True):
    gen = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([[7], [5], [3], [7], [1], [6], [2], [4], [7], [3]])
    mask = (torch.arange(LENGTH) < lengths).long()
    mask[0, 2] = 0  # an observation between two turns
    score = torch.randn(ROWS, generator=gen).round(decimals=1)
    score[3] = 0.0
    rewards = torch.zeros(ROWS, LENGTH)
    rewards[torch.arange(ROWS), lengths.squeeze(1) - 1] = score
    uids = ["b", "a", "b", "c", "a", "b", "single" if singles else "a", "c", "c", "a"]
    old = -torch.rand(ROWS, LENGTH, generator=gen) * 2
    p = old.exp()
    return {
        "token_level_rewards": rewards,
        "response_mask": mask,
        "index": np.array(uids, dtype=object),
        "config": AlgoConfig(gamma=0.95),
    }, {
        "values": torch.randn(ROWS, LENGTH, generator=gen),
        "reward_baselines": torch.randn(ROWS, generator=gen),
        "old_log_probs": old,
        "sum_pi_squared": p * p + (1 - p) ** 2 * torch.rand(ROWS, LENGTH, generator=gen),
    }


CASES = {
    "grpo": (),
    "rloo": (),
    "opo": (),
    "gpg": (),
    "reinforce_plus_plus": (),
    "reinforce_plus_plus_baseline": (),
    "grpo_passk": (),
    "remax": ("reward_baselines",),
    "gdpo": (),
    "optimal_token_baseline": ("old_log_probs", "sum_pi_squared"),
    "tir_optimal_token_baseline": ("old_log_probs", "sum_pi_squared"),
}


def doubled(given):
    return {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in given.items()}


def three(name, given, **more):
    """Return (tokfuse's, verl's, verl's in float64), each (advantages, returns)."""
    fresh = [{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in given.items()} for _ in range(3)]
    theirs = core_algos.get_adv_estimator_fn(name)
    return (
        core_algos.get_adv_estimator_fn(f"tokfuse_{name}")(**fresh[0], **more),
        theirs(**fresh[1], **more),
        theirs(**doubled(fresh[2]), **doubled(more)),
    )


def same(runs, mask):
    """Check that tokfuse is no farther from verl in float64 than verl in float32, for valid tokens."""
    for what, *figures in zip(("advantages", "returns"), *runs, strict=True):
        assert_no_farther(*(x * mask for x in figures), what=what)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_advantages_are_those_of_verl(name, seed):
    given, extra = batch(seed, singles=name != "grpo_passk")
    same(three(name, given, **{k: extra[k] for k in CASES[name]}), given["response_mask"])


def test_gae_is_that_of_verl_where_tokens_count():
    given, extra = batch()
    given["response_mask"][0, 2] = 1  # verl propagates values over observations differently
    call = {k: given[k] for k in ("token_level_rewards", "response_mask")}
    call |= {"values": extra["values"], "gamma": 0.95, "lam": 0.9}
    same(three("gae", call), given["response_mask"])


@pytest.mark.parametrize("name", ["grpo", "grpo_passk"])
def test_the_deviation_can_be_left_out(name):
    given, _ = batch(singles=False)
    given["config"] = AlgoConfig(norm_adv_by_std_in_grpo=False)
    more = {"norm_adv_by_std_in_grpo": False} if name == "grpo" else {}
    ours, *verls = three(name, given, **more)
    same((ours, *verls), given["response_mask"])
    assert not torch.allclose(ours[0], three(name, batch(singles=False)[0])[0][0])
    same((core_algos.get_adv_estimator_fn(f"tokfuse_{name}")(**given), *verls), given["response_mask"])


BASELINES = ("optimal_token_baseline", "tir_optimal_token_baseline")


@pytest.mark.parametrize("name", BASELINES)
def test_options_of_the_token_baselines(name):
    """The tail, the importance weights, and responses of several turns, some without a token of the policy."""
    given, extra = batch()
    call = {k: extra[k] for k in ("old_log_probs", "sum_pi_squared")}
    same(three(name, given, handle_zero_tail=False, **call), given["response_mask"])
    given["response_mask"][8, 3:5] = given["response_mask"][3, :2] = 0
    weights = torch.linspace(0.2, 2.0, ROWS * LENGTH).view(ROWS, LENGTH)
    same(three(name, given, rollout_is_weights=weights, **call), given["response_mask"])
    if name == "tir_optimal_token_baseline":
        given["response_mask"][[1, 7]] = 0  # "a" keeps two responses, "c" two
        given["response_mask"][3] = 0  # "c" keeps one, which has no baseline then
        runs = three(name, given, **call)
        same(runs, given["response_mask"])
        assert torch.equal(runs[0][0][8], runs[0][1][8] * given["response_mask"][8])
        given["response_mask"][:] = 0
        assert not three(name, given, **call)[0][0].any()


def test_turns_change_the_positions_of_a_baseline():
    given, extra = batch()
    given["response_mask"][0, 2] = 0
    call = {k: extra[k] for k in ("old_log_probs", "sum_pi_squared")}
    plain, turns = (three(name, given, **call)[0][0] for name in BASELINES)
    assert not torch.allclose(plain, turns)


@pytest.mark.parametrize("weights", [None, [1.0, 0.3]])
@pytest.mark.parametrize("scaled", [True, False])
def test_gdpo_normalises_every_reward(weights, scaled):
    given, _ = batch()
    gen = np.random.default_rng(3)
    given["config"] = AlgoConfig(gdpo_reward_keys=["format", "accuracy"], gdpo_reward_weights=weights)
    width = given["response_mask"].shape[1]
    more = {
        "norm_adv_by_std_in_grpo": scaled,
        "non_tensor_batch": {
            "format": gen.integers(0, 2, ROWS).astype(object),
            "accuracy": (10 * gen.standard_normal(ROWS)).astype(np.float32),
        },
        "batch": {
            "prompts": torch.zeros(ROWS, 3),
            "attention_mask": torch.nn.functional.pad(torch.ones(ROWS, width, dtype=torch.long), (3, 0)),
        },
    }
    same(three("gdpo", given, **more), given["response_mask"])
    ours = core_algos.get_adv_estimator_fn("tokfuse_gdpo")
    assert not torch.allclose(ours(**given, **more)[0], ours(**given | {"config": None})[0])
    with pytest.raises(ValueError, match="non_tensor_batch must be given"):
        ours(**given)
    del more["non_tensor_batch"]["format"]
    with pytest.raises(ValueError, match=r"columns of the batch \(accuracy\); got format"):
        ours(**given, **more)
    given["config"] = AlgoConfig(gdpo_reward_keys=["accuracy"], gdpo_reward_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="gdpo_reward_weights must be 1 numbers, one per key; got 2"):
        ours(**given, **more)
    given["config"] = AlgoConfig()
    with pytest.raises(ValueError, match="config.gdpo_reward_keys must be"):
        ours(**given, **more)


def test_inputs_that_the_trainer_gives_to_its_own_names_only():
    given, _ = batch()
    for name, word in (
        ("gae", "values"),
        ("remax", "reward_baselines"),
        *((name, "old_log_probs") for name in BASELINES),
    ):
        with pytest.raises(ValueError, match=word):
            core_algos.get_adv_estimator_fn(f"tokfuse_{name}")(**given)
    with pytest.raises(ValueError, match="at least 2"):
        core_algos.get_adv_estimator_fn("tokfuse_grpo_passk")(**given)
