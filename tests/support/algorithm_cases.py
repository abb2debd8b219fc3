"""A random rollout batch for the algorithms, parts of the papers' formulas, and the comparison.

Everything is float64 with loops over sequences, so that you can compare the formulas with the paper.
"""

import dataclasses
import threading
from collections.abc import Callable
from typing import Any

import torch
from harness import Backend, compare
from torch import Tensor

from tokfuse import algorithms
from tokfuse.algorithms import Algorithm, Batch, Plan, State, World

GROUPS = (0, 0, 0, 0, 7, 7, 7, 7, 3, 3, 3, 3)
LENGTHS = (3, 1, 5, 2, 4, 4, 1, 6, 2, 3, 5, 1)
CORRECT = (1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0)


def rollout(seed: int = 0, binary: bool = True, **replaced: Any) -> Batch:
    """Return three prompts with four answers each, a few masked tokens, and every optional field.

    Values are exact in float32, so backends with float32 and float64 see the same numbers.
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
        "group_ids": torch.tensor(GROUPS),
        "correct": correct,
        "mask": mask,
        "old_logp": old,
        "logp": old + normal(0.35),
        "ref_logp": old + normal(0.4),
        "sampler_logp": old + normal(0.2),
        "second_logp": old + normal(0.1),
        "entropy": uniform(0.05, 4.0),
        "sum_sq": p * p + (1 - p) ** 2 * uniform(0.1, 0.9),
        "value": normal(0.5, 0.3),
        "median_value": normal(0.5, 0.3),
        "causal_weight": uniform(0.0, 2.0),
        "greedy_reward": normal(0.5, 0.0, len(LENGTHS)),
        "window": uniform(0, 1) > 0.3,
        "finished": torch.tensor([i % 3 != 1 for i in range(len(LENGTHS))]),
        "turn": torch.tensor([i % 4 for i in range(len(LENGTHS))]),
        "demonstration": torch.tensor([i in (3, 6, 11) for i in range(len(LENGTHS))]),
    }
    rounded = {k: v.float().double() if v.is_floating_point() else v for k, v in fields.items()}
    return Batch(**{**rounded, **replaced})


def cast(batch: Batch, dtype: torch.dtype, device: str = "cpu") -> Batch:
    """Move the batch to a device, with its float fields in a dtype."""
    changed = {
        f.name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **changed)


# ------------------------------------------------------------------------------- parts of formulas


def spans(b: Batch) -> list[list[int]]:
    """Return the valid tokens of every sequence."""
    keep, cu = b.valid.tolist(), b.cu_seqlens.tolist()
    return [[t for t in range(i, j) if keep[t]] for i, j in zip(cu, cu[1:], strict=False)]


def mates(b: Batch, i: int) -> list[int]:
    """Return the sequences of i's group, including i."""
    return [j for j, g in enumerate(b.group_ids.tolist()) if g == b.group_ids[i]]


def per_group(b: Batch, rule: Callable[[float, Tensor, int], float]) -> Tensor:
    """Return (tokens,): rule(own reward, rewards of the group, position in it) of each token's sequence."""
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


def grpo_a(b: Batch) -> Tensor:
    return per_group(b, z_score)


def reward_to_go(b: Batch, r: Tensor) -> Tensor:
    out = torch.zeros_like(r)
    for span in spans(b):
        for k, t in enumerate(span):
            out[t] = r[span[k:]].sum()
    return out


def outcome(b: Batch) -> Tensor:
    """Return the reward, placed on the last valid token."""
    r = torch.zeros_like(b.old_logp)
    for i, span in enumerate(spans(b)):
        if span:
            r[span[-1]] = b.reward[i]
    return r


def gae(b: Batch, lam: float | list[float] = 1.0, gamma: float = 1.0) -> Tensor:
    """Compute GAE. After an unfinished response it uses the value of its last token, after a finished one 0."""
    r, out = outcome(b), torch.zeros_like(b.old_logp)
    for i, span in enumerate(spans(b)):
        decay = lam[i] if isinstance(lam, list) else lam
        carry = 0.0
        for k in reversed(range(len(span))):
            behind = 0.0 if b.finished[i] else b.value[span[-1]]
            after = b.value[span[k + 1]] if k + 1 < len(span) else behind
            carry = r[span[k]] + gamma * after - b.value[span[k]] + gamma * decay * carry
            out[span[k]] = carry
    return out


# -------------------------------------------------------------------------------------- comparison

Formula = Callable[[Batch, Tensor, Tensor], Tensor]  # of a batch, logp and entropy

OPTIONS = {
    "a2pr_nll": {"mu": 0.1},
    "cip_entropy": {"entropy_coef": 0.01},
    "dr_grpo": {"max_length": 8},
    "d3s": {"rollouts": (2, 4), "tokens": (0.3, 0.6), "total_steps": 10},
    "epo": {"max_turns": 4},
    "mirror_descent": {"eta": 0.5},
    "reinforce_pp": {"reward_kl": 0.01},
    "r2vpo": {"delta": 0.1, "step_size": 1.0, "penalty": 0.04},
    "tppo": {"gamma": 1.0, "lam": 0.95},
}
METHODS = [name for name in algorithms.list("policy") if name != "grpo_guard"]


def example(name: str, **options) -> algorithms.Algorithm:
    return algorithms.make(name, **{**OPTIONS.get(name, {}), **options})


def planned(algorithm: Algorithm, batch: Batch, state: State | None = None) -> Plan:
    state = algorithm.initial_state() if state is None else state
    return algorithm.objective(algorithm.prepare(batch, state), state)


def gradient_of(plan: Plan, logp: Tensor, entropy: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return (loss with the plan's constant, d loss / d logp, d loss / d entropy)."""
    x = logp.detach().clone().requires_grad_()
    h = None if entropy is None else entropy.detach().clone().requires_grad_()
    out = plan.loss(x, h).loss
    leaves = [x] if h is None else [x, h]
    grads = torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)
    return out.detach() + plan.offset(), *grads


def check(backend: Backend, algorithm: Algorithm, formula: Formula, batch: Batch, state: State | None = None) -> None:
    """Check the plan's loss and gradients against formula(batch, logp, entropy)."""
    x = batch.logp.clone().requires_grad_()
    h = batch.entropy.clone().requires_grad_()
    expected = formula(batch, x, h)
    grad_x, grad_h = torch.autograd.grad(expected, [x, h], allow_unused=True, materialize_grads=True)
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    bound = 1e-12 if backend.name == "reference" else 3e-6
    here = cast(batch, dtype, backend.device)
    plan = planned(algorithm, here, state)
    uses_entropy = plan.objective.entropy_coef != 0.0
    loss, *grads = gradient_of(plan, here.logp, here.entropy if uses_entropy else None)
    size = max(1.0, float(expected.detach().abs()))
    compare(loss, expected, atol=bound * size, what="loss")
    compare(grads[0], grad_x, atol=bound * float(grad_x.abs().max()), what="d logp")
    assert uses_entropy or not grad_h.any()
    if uses_entropy:
        compare(grads[1], grad_h, atol=bound * float(grad_h.abs().max()), what="d entropy")


def same_gradient(left: Algorithm, right: Algorithm, batch: Batch, rtol: float = 1e-12) -> None:
    """Check that two methods have equal gradients on a batch."""
    _, a, *_ = gradient_of(planned(left, batch), batch.logp)
    _, b, *_ = gradient_of(planned(right, batch), batch.logp)
    compare(a, b, atol=rtol * float(b.abs().max()) + 1e-15)


# ------------------------------------------------------------------------------------------- ranks


def spread_over(ranks: int, work: Callable[[World], Any]) -> list[Any]:
    """Run work(world) on `ranks` threads that exchange tensors. Return the results in rank order."""
    barrier, slots, results = threading.Barrier(ranks), [None] * ranks, [None] * ranks

    def run(rank: int) -> None:
        def gather(x: torch.Tensor) -> torch.Tensor:
            slots[rank] = x
            barrier.wait(timeout=60)
            out = torch.stack(list(slots))
            barrier.wait(timeout=60)
            return out

        results[rank] = work(World(gather, rank))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(result is not None for result in results), "a rank failed"
    return results
