"""Advantage estimators of the standard family, by name. None has a gradient.

Group estimators return one number per response, the others one per token.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.selection import informative
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.ops.group_advantage import KINDS, group_advantage
from tokfuse.runtime.ops.influence import squared_gradient_norm
from tokfuse.runtime.ops.whiten import whiten
from tokfuse.runtime.reference.segments import groups_of, segment_sum


class Advantage(NamedTuple):
    """Advantages: (tokens,) with level "token", (seqs,) with level "sequence"."""

    value: torch.Tensor
    level: str


# estimator -> (required fields of the Batch, besides the rewards; options that it reads)
_SCALED = ("eps", "std", "scale", "singleton")
ESTIMATORS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **{kind: (("group_ids",), _SCALED) for kind in KINDS},
    "remax": (("greedy_reward",), ("eps", "std", "scale")),
    "reinforce": ((), ("eps", "std", "scale")),
    "gpg": (("group_ids",), ("singleton",)),
    "gpg_verl": (("group_ids",), ("singleton",)),
    "reinforce_pp_baseline": (("group_ids",), ("singleton",)),
    "reinforce_pp": ((), ("gamma", "reward_kl")),
    "gae": (("value",), ("gamma", "lam", "length_adaptive_alpha", "reward_kl")),
    "otb": (("group_ids", "sum_sq"), ("gamma",)),
}
WHITENED = frozenset({"gae", "reinforce_pp", "reinforce_pp_baseline"})


def estimate(name: str, batch: Batch, reward: torch.Tensor, options: Mapping[str, Any], whitened: bool) -> Advantage:
    """Return the advantages of a batch.

        grpo ... reinforce     the presets of `tokfuse.group_advantage`
        gpg                    (R - mean) / F, F = responses in groups with unequal rewards / responses
        gpg_verl               (R - mean) B / #(R != 0), B = responses
        reinforce_pp_baseline  R - mean, on every token, whitened over tokens
        reinforce_pp           reward to go of (token rewards - reward_kl k1), whitened
        gae                    `tokfuse.gae` of the same token rewards, whitened
        otb                    G_t - sum_j G_jt W_jt / sum_j W_jt over the group at position t, with
                               G = reward to go, W_t = running sum of 1 - 2 p + sum of p^2; G_t in a group of
                               one response

    Args:
        name: an estimator of the table.
        batch: the rollout batch.
        reward: (seqs,). Replaces batch.reward, for example with a length penalty added.
        options: values of the options in `ESTIMATORS[name]` that are set.
        whitened: subtract the mean and divide by the standard deviation over all tokens of all ranks.
    """
    value = _TOKEN[name](batch, reward, options) if name in _TOKEN else _per_group(name, batch, reward, options)
    if not whitened:
        return value
    x = value.value if value.level == "token" else batch.spread(value.value)
    return Advantage(whiten_over_ranks(batch, x), "token")


def _per_group(name: str, batch: Batch, reward: torch.Tensor, options: Mapping[str, Any]) -> Advantage:
    if name in ("gpg", "gpg_verl"):
        gain = group_advantage(reward, batch.group_ids, "dr_grpo", **options)
        assert batch.group_ids is not None
        useful = informative(reward, batch.group_ids) if name == "gpg" else reward != 0
        counts = torch.stack([torch.ones_like(useful).sum(), useful.sum()]).double()
        total, some = batch.world.sum(counts)
        return Advantage(gain * (total / some.clamp(min=1)).to(gain.dtype), "sequence")
    if name == "reinforce_pp_baseline":
        gain = group_advantage(reward, batch.group_ids, "dr_grpo", **options)
        return Advantage(gain, "sequence")
    kind: dict[str, Any] = {"lengths": batch.lengths} if name == "opo" else {}
    if name == "remax":
        kind["greedy_reward"] = batch.greedy_reward
    groups = None if name in ("remax", "reinforce") else batch.group_ids
    if options.get("scale") == "batch_std" and batch.world.gather is not None:
        return Advantage(_over_ranks(name, batch, reward, kind, options), "sequence")
    return Advantage(group_advantage(reward, groups, name, **kind, **options), "sequence")


def _over_ranks(
    name: str, batch: Batch, reward: torch.Tensor, kind: Mapping[str, torch.Tensor], options: Mapping[str, Any]
) -> torch.Tensor:
    """Return advantages scaled by the deviation of all ranks' rewards. Baselines stay local to each group."""
    grouped = name not in ("remax", "reinforce")
    ids = torch.zeros_like(reward, dtype=torch.int64)
    if grouped and batch.group_ids is not None:
        ids = groups_of(batch.group_ids).member + (batch.world.rank << 32)

    def run(r: torch.Tensor, g: torch.Tensor, *extra: torch.Tensor) -> torch.Tensor:
        given = dict(zip(kind, extra, strict=True))
        return group_advantage(r, g if grouped else None, name, **given, **options)  # type: ignore[arg-type]

    return batch.world.together(run, reward, ids, *kind.values())


def token_rewards(batch: Batch, reward: torch.Tensor, reward_kl: float | None) -> torch.Tensor:
    """Return the token rewards, (tokens,).

    They are batch.token_reward, or `reward` on the last counting token. On every token,
    reward_kl (old_logp - ref_logp) is subtracted.
    """
    if batch.token_reward is not None:
        rewards = batch.token_reward
    else:
        rewards = torch.where(last_token(batch), batch.spread(reward), 0.0)
    if reward_kl:
        batch.require("reward_kl", "ref_logp")
        assert batch.ref_logp is not None
        rewards = rewards - reward_kl * (batch.old_logp - batch.ref_logp)
    return torch.where(batch.valid, rewards, 0.0)


def last_token(batch: Batch) -> torch.Tensor:
    """Return True at the last counting token of each sequence, (tokens,) bool."""
    sequence, valid = batch.sequence, batch.valid
    place = torch.where(valid, torch.arange(batch.num_tokens, device=valid.device), -1)
    last = torch.full((batch.num_seqs,), -1, device=valid.device)
    last = last.scatter_reduce(0, sequence, place, "amax")
    return valid & (place == last[sequence])


def _reward_to_go(batch: Batch, reward: torch.Tensor, options: Mapping[str, Any]) -> Advantage:
    rewards = token_rewards(batch, reward, options.get("reward_kl"))
    advantage, _ = gae(
        rewards, torch.zeros_like(rewards), batch.cu_seqlens, gamma=options.get("gamma", 1.0), mask=batch.mask
    )
    return Advantage(advantage, "token")


def _gae(batch: Batch, reward: torch.Tensor, options: Mapping[str, Any]) -> Advantage:
    advantage, _ = gae_and_returns(batch, reward, options)
    return Advantage(advantage, "token")


def gae_and_returns(
    batch: Batch, reward: torch.Tensor, options: Mapping[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `tokfuse.gae` of the token rewards of a batch: (advantages, returns)."""
    assert batch.value is not None
    given = {k: v for k, v in options.items() if k != "reward_kl"}
    rewards = token_rewards(batch, reward, options.get("reward_kl"))
    return gae(rewards, batch.value, batch.cu_seqlens, mask=batch.mask, finished=batch.finished, **given)


def _optimal_token_baseline(batch: Batch, reward: torch.Tensor, options: Mapping[str, Any]) -> Advantage:
    to_go = _reward_to_go(batch, reward, options).value
    assert batch.sum_sq is not None and batch.group_ids is not None
    energy = squared_gradient_norm(batch.old_logp.double(), batch.sum_sq.double())
    gain = token_baseline_advantage(to_go, energy, batch.cu_seqlens, batch.group_ids, batch.valid)
    return Advantage(gain.to(batch.old_logp.dtype), "token")


def token_baseline_advantage(
    to_go: torch.Tensor, energy: torch.Tensor, cu_seqlens: torch.Tensor, group_ids: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Return G_t - sum_j G_jt W_jt / sum_j W_jt over the group at position t, (tokens,) float64; 0 where not valid.

    Args:
        to_go: (tokens,), G.
        energy: (tokens,), the steps of the running sum W of a response.
        cu_seqlens: (seqs + 1,) int32 offsets of the responses. The position of a token is its place in its response.
        group_ids: (seqs,). A response without others in its group has no baseline: its own return would cancel it.
        valid: (tokens,) bool.
    """
    tokens, start = to_go.shape[0], cu_seqlens[:-1].long()
    lengths = (cu_seqlens[1:] - cu_seqlens[:-1]).long()
    sequence = torch.arange(len(lengths), device=valid.device).repeat_interleave(lengths, output_size=tokens)
    to_go, total = to_go.double(), torch.where(valid, energy.double(), 0.0).cumsum(0)
    before = torch.nn.functional.pad(total, (1, 0))[start]
    weight = torch.where(valid, total - before[sequence], 0.0)
    # One cell per position of every group.
    position = torch.arange(tokens, device=valid.device) - start[sequence]
    member = groups_of(group_ids).member
    cell = (member[sequence] * max(tokens, 1) + position).unique(return_inverse=True)[1]
    top, bottom = (segment_sum(x, cell, tokens)[cell] for x in (to_go * weight, weight))
    alone = (torch.bincount(member, minlength=1)[member] == 1)[sequence]
    baseline = torch.where(alone, 0.0, top / torch.where(bottom != 0, bottom, 1.0))
    return torch.where(valid & ((bottom != 0) | alone), to_go - baseline, 0.0)


_TOKEN = {"reinforce_pp": _reward_to_go, "gae": _gae, "otb": _optimal_token_baseline}
PER_TOKEN = frozenset(_TOKEN)


def whiten_over_ranks(batch: Batch, x: torch.Tensor) -> torch.Tensor:
    """Return `tokfuse.whiten` with the moments of all ranks."""
    if batch.world.gather is None:
        return whiten(x, batch.mask)
    valid, wide = batch.valid, x.double()
    mean = batch.global_mean(wide)
    square = torch.where(valid, (wide - mean) ** 2, 0.0).sum()
    total, count = batch.world.sum(torch.stack([square, valid.sum().double()]))
    return whiten(x, batch.mask, mean=mean, var=total / (count - 1).clamp(min=1))


def check_options(op: str, name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options that are set. Raise an error if the estimator does not read one of them."""
    if name not in ESTIMATORS:
        known = ", ".join(ESTIMATORS)
        raise refuse(op, "advantage", f"one of {known}", repr(name), "Choose a listed name.")
    used = {k: v for k, v in given.items() if v is not None}
    for option in used:
        if option not in ESTIMATORS[name][1]:
            readers = [n for n, (_, options) in ESTIMATORS.items() if option in options]
            raise refuse(
                op,
                option,
                f"left out with advantage {name!r}",
                repr(used[option]),
                f"Only {', '.join(readers)} use it.",
            )
    return used
