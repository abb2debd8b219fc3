"""A random rollout batch for the algorithms, and the pieces of which the papers' formulas are made.

Everything here is float64 and loops over sequences: the formulas are to be read beside the paper.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokfuse.algorithms import Batch

GROUPS = (0, 0, 0, 0, 7, 7, 7, 7, 3, 3, 3, 3)
LENGTHS = (3, 1, 5, 2, 4, 4, 1, 6, 2, 3, 5, 1)
CORRECT = (1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0)


def rollout(seed: int = 0, binary: bool = True, **replaced: Any) -> Batch:
    """Three prompts with four answers each; a few masked tokens; every optional field is there.

    Values are exact in float32, so that backends of either width see the same numbers.
    """
    gen = torch.Generator().manual_seed(seed)
    tokens, lengths = sum(LENGTHS), torch.tensor(LENGTHS)

    def normal(scale: float, shift: float = 0.0, size: int = tokens) -> Tensor:
        return (torch.randn(size, generator=gen) * scale + shift).double()

    def uniform(low: float, high: float) -> Tensor:
        return (torch.rand(tokens, generator=gen) * (high - low) + low).double()

    old = uniform(-3.0, -0.1)
    mask = torch.ones(tokens, dtype=torch.bool)
    mask[[4, 12, 20]] = False
    correct = torch.tensor(CORRECT, dtype=torch.bool)
    p = old.exp()
    fields = {
        "reward": correct.double() if binary else normal(1.0, 0.0, len(LENGTHS)),
        "cu_seqlens": torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32),
        "group_ids": torch.tensor(GROUPS), "correct": correct, "mask": mask, "old_logp": old,
        "logp": old + normal(0.35), "ref_logp": old + normal(0.4), "sampler_logp": old + normal(0.2),
        "second_logp": old + normal(0.1), "entropy": uniform(0.05, 4.0),
        "sum_sq": p * p + (1 - p) ** 2 * uniform(0.1, 0.9), "value": normal(0.5, 0.3),
        "median_value": normal(0.5, 0.3), "causal_weight": uniform(0.0, 2.0),
        "greedy_reward": normal(0.5, 0.0, len(LENGTHS)), "window": uniform(0, 1) > 0.3,
        "finished": torch.tensor([i % 3 != 1 for i in range(len(LENGTHS))]),
        "turn": torch.tensor([i % 4 for i in range(len(LENGTHS))]),
        "demonstration": torch.tensor([i in (3, 6, 11) for i in range(len(LENGTHS))]),
    }  # fmt: skip
    rounded = {k: v.float().double() if v.is_floating_point() else v for k, v in fields.items()}
    return Batch(**{**rounded, **replaced})


def cast(batch: Batch, dtype: torch.dtype) -> Batch:
    """The floating fields in another dtype."""
    changed = {
        f.name: value.to(dtype)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor) and value.is_floating_point()
    }
    return dataclasses.replace(batch, **changed)


# ------------------------------------------------------------------------------ pieces of formulas


def spans(b: Batch) -> list[list[int]]:
    """Valid tokens of every sequence."""
    keep, cu = b.valid.tolist(), b.cu_seqlens.tolist()
    return [[t for t in range(i, j) if keep[t]] for i, j in zip(cu, cu[1:], strict=False)]


def mates(b: Batch, i: int) -> list[int]:
    """Sequences of i's group, itself included."""
    return [j for j, g in enumerate(b.group_ids.tolist()) if g == b.group_ids[i]]


def per_group(b: Batch, rule: Callable[[float, Tensor, int], float]) -> Tensor:
    """(tokens,): rule(own reward, rewards of the group, place in it) of each token's sequence."""
    out = torch.zeros_like(b.old_logp)
    cu = b.cu_seqlens.tolist()
    for i in range(b.num_seqs):
        group = mates(b, i)
        out[cu[i] : cu[i + 1]] = float(rule(b.reward[i], b.reward[group], group.index(i)))
    return out


def z_score(r: float, group: Tensor, _: int, eps: float = 1e-6) -> float:
    return (r - group.mean()) / (group.std() + eps)


def centred(r: float, group: Tensor, _: int) -> float:
    return r - group.mean()


def token_mean(b: Batch, loss: Tensor) -> Tensor:
    return loss[b.valid].sum() / b.valid.sum()


def seq_mean(b: Batch, loss: Tensor) -> Tensor:
    means = [loss[span].mean() for span in spans(b) if span]
    return torch.stack(means).mean()


def whitened(b: Batch, x: Tensor) -> Tensor:
    v = x[b.valid]
    return (x - v.mean()) / (v.var() + 1e-8).sqrt()


def ppo(x: Tensor, old: Tensor, a: Tensor, low: float = 0.2, high: float = 0.2) -> Tensor:
    r = (x - old).exp()
    return torch.maximum(-a * r, -a * r.clamp(1 - low, 1 + high))


def k3(x: Tensor, ref: Tensor) -> Tensor:
    return (ref - x).exp() - (ref - x) - 1
