"""Test that a token with p = 1 - 10^-k keeps the digits of 1 - p, on every backend and in every op.

Vocabulary shards are tested in tests/distributed/test_vocab_parallel.py.
"""

from typing import Any

import pytest
import torch
from confident_cases import COEFFICIENTS, OPTIONS, Truth, check, check_statistics, problem, rtol_of, truth
from harness import FLOAT_DTYPES, backends, compare
from torch import Tensor

import tokfuse
import tokfuse.runtime.ops.kept_token_stats
import tokfuse.runtime.ops.token_stats  # noqa: F401  (imports register the implementations)

# Two logits; one tile of every backend; the target's tile with tiles before and after it; and a tail.
VOCABS = (2, 300, 6157)


@pytest.mark.parametrize("backend", backends("token_stats"))
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_token_stats(backend, vocab, dtype, option):
    options = OPTIONS[option]
    z, target = problem(vocab, dtype, **options)
    for ga, gh in COEFFICIENTS.values():
        leaf = backend.put(z).clone().requires_grad_()
        with backend.forced():
            stats = tokfuse.token_stats(leaf, backend.put(target), **options)
            (ga * stats.logp + gh * stats.entropy).sum().backward()
        want = truth(z, target, ga, gh, **options)
        check_statistics(stats.logp, stats.entropy, want, rtol_of(options, backend.name))
        check(leaf.grad, want, dtype, rtol=rtol_of(options, backend.name))


@pytest.mark.parametrize("backend", backends("token_stats"))
def test_an_unlikely_target(backend):
    """With p = 10^-k, p keeps its digits in the gradient entry of the entropy."""
    z, target = problem(300, torch.float32, unlikely=True)
    leaf = backend.put(z).clone().requires_grad_()
    with backend.forced():
        tokfuse.token_stats(leaf, backend.put(target)).entropy.sum().backward()
    want = truth(z, target, 0.0, 1.0)
    of_target = (target[:, None] == torch.arange(300)).nonzero(as_tuple=True)
    compare(leaf.grad.cpu()[of_target], want.grad[of_target], rtol=4e-6, what="target")
    check(leaf.grad, want, torch.float32)


@pytest.mark.parametrize("backend", backends("token_stats"))
def test_logits_far_from_zero(backend):
    """Float32 logits near 5e6 are multiples of 0.5. p follows from these rounded logits."""
    z, target = problem(300, torch.float32, shift=5e6)
    leaf = backend.put(z).clone().requires_grad_()
    with backend.forced():
        stats = tokfuse.token_stats(leaf, backend.put(target))
        stats.logp.sum().backward()
    want = truth(z, target, 1.0, 0.0)
    check_statistics(stats.logp, stats.entropy, want)
    check(leaf.grad, want, torch.float32)


@pytest.mark.parametrize("backend", backends("token_stats"))
def test_extended_statistics(backend):
    z, target = problem(6157, torch.float32)
    with backend.forced():
        stats = tokfuse.token_stats(backend.put(z), backend.put(target), second_temperature=0.75, moments=True)
    second = truth(z, target, 1.0, 0.0, temperature=0.75)
    compare(stats.second_logp, second.logp, rtol=3e-6, what="second_logp")
    log_p = torch.log_softmax(z.double(), 1)
    compare(stats.sum_p2_logp, (log_p * (2 * log_p).exp()).sum(1), atol=2e-7, rtol=4e-6, what="sum_p2_logp")


@pytest.mark.parametrize("backend", backends("linear_token_stats"))
@pytest.mark.parametrize("vocab", (2, 300))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_linear_token_stats(backend, vocab, dtype):
    """Hidden states are unit vectors, so the logits are the weight and have its gradient."""
    z, target = problem(vocab, dtype)
    for ga, gh in COEFFICIENTS.values():
        hidden = backend.put(torch.eye(len(z)).to(dtype))
        weight = backend.put(z.t().contiguous()).requires_grad_()
        with backend.forced():
            stats = tokfuse.linear_token_stats(hidden, weight, backend.put(target))
            (ga * stats.logp + gh * stats.entropy).sum().backward()
        want = truth(z, target, ga, gh)
        check_statistics(stats.logp, stats.entropy, want)
        check(weight.grad.t(), want, dtype)


def step_inputs(backend, want: Truth, target: Tensor, entropy_coef: float) -> dict[str, Any]:
    """Return a policy step whose loss is -logp - entropy_coef * entropy to first order."""
    return {
        "target": backend.put(target),
        "old_logp": backend.put(want.logp.float()),
        "advantage": backend.put(torch.ones(len(target))),
        "objective": tokfuse.Objective(entropy_coef=entropy_coef),
        "normalizer": 1.0,
    }


@pytest.mark.parametrize("backend", backends("policy_step"))
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("entropy_coef", (0.0, 0.1))
def test_policy_step(backend, vocab, dtype, entropy_coef):
    z, target = problem(vocab, dtype)
    want = truth(z, target, -1.0, -entropy_coef)
    given = step_inputs(backend, want, target, entropy_coef)
    leaf = backend.put(z).clone().requires_grad_()
    over = backend.put(z).clone()
    with backend.forced():
        step = tokfuse.policy_step(logits=leaf, **given)
        step.loss.backward()
        in_place = tokfuse.policy_step_(over, **given)
    for stats in (step.stats, in_place.stats):
        check_statistics(stats.logp, stats.entropy, want)
    check(leaf.grad, want, dtype)
    check(over, want, dtype, "in place")


@pytest.mark.parametrize("backend", backends("policy_step"))
@pytest.mark.parametrize("vocab", (2, 300))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("level", ("token", "sequence"))
def test_policy_step_from_hidden(backend, vocab, dtype, level):
    """The ratio of a one-token sequence is the token's ratio, but the call uses three launches."""
    z, target = problem(vocab, dtype)
    want = truth(z, target, -1.0, 0.0)
    given = step_inputs(backend, want, target, 0.0)
    if level == "sequence":
        given["objective"] = tokfuse.Objective(level="sequence")
        given["cu_seqlens"] = backend.put(torch.arange(len(z) + 1, dtype=torch.int32))
    weight = backend.put(z.t().contiguous()).requires_grad_()
    with backend.forced():
        step = tokfuse.policy_step(hidden=backend.put(torch.eye(len(z)).to(dtype)), weight=weight, **given)
        step.loss.backward()
    check_statistics(step.stats.logp, step.stats.entropy, want)
    check(weight.grad.t(), want, dtype)


@pytest.mark.parametrize("backend", backends("kept_token_stats"))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("option", OPTIONS)
def test_kept_token_stats(backend, dtype, option):
    """Ids that are not kept are more likely than the target, and have no effect."""
    options = OPTIONS[option]
    z, target = problem(300, dtype, **options)
    wide = torch.full((len(z), 400), 40.0).to(dtype)
    ids = torch.stack([torch.randperm(400, generator=torch.Generator().manual_seed(r))[:300] for r in range(len(z))])
    wide.scatter_(1, ids, z)
    place = ids.gather(1, target[:, None]).squeeze(1)
    offsets = torch.arange(len(z) + 1) * 300
    for ga, gh in COEFFICIENTS.values():
        leaf = backend.put(wide).clone().requires_grad_()
        with backend.forced():
            stats = tokfuse.kept_token_stats(
                leaf, backend.put(place), backend.put(ids.flatten()), backend.put(offsets), **options
            )
            (ga * stats.logp + gh * stats.entropy).sum().backward()
        want = truth(z, target, ga, gh, **options)
        check_statistics(stats.logp, stats.entropy, want, rtol_of(options, backend.name))
        check(leaf.grad.cpu().gather(1, ids), want, dtype, rtol=rtol_of(options, backend.name))
