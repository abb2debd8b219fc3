"""Test the reference: it is the specification, computed in float64 for every dtype and rounded once.

Its error must not depend on the CPU. It must work under autograd, torch.compile, autocast and inference mode.
"""

import math

import pytest
import torch
from harness import FLOAT_DTYPES, ROUNDED_ONCE, compare, half_ulp

import tokfuse
from tokfuse.runtime.reference import linear_token_stats as linear
from tokfuse.runtime.reference import token_stats as reference

TOKENS, HIDDEN, VOCAB = 9, 16, 301


@pytest.fixture(autouse=True)
def _forced():
    with tokfuse.backend("reference"):
        yield


def drawn(*size, seed=0, scale=1.0):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)) * scale


def doubled(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


# ------------------------------------------------------------------------------------------ rounding


@pytest.mark.parametrize("vocab", [151_937, 49_155])
def test_entropy_of_a_wide_row_is_rounded_once(vocab):
    """A float32 sum had an error of 9.5e-5 on a CPU without vectors."""
    logits, target = drawn(2, vocab, scale=4.0), torch.tensor([3, vocab - 1])
    for dtype in FLOAT_DTYPES:
        z = logits.to(dtype)
        stats = tokfuse.token_stats(z, target)
        shifted = z.double() - z.double().amax(1, keepdim=True)
        total = [math.fsum(row.exp().tolist()) for row in shifted]
        mixed = [math.fsum((row.exp() * row).tolist()) for row in shifted]
        entropy = torch.tensor([math.log(s) - x / s for s, x in zip(total, mixed, strict=True)], dtype=torch.float64)
        compare(stats.entropy, entropy, **ROUNDED_ONCE)


def test_a_step_rounds_loss_and_statistics_once():
    """float64 is kept from the logits to the loss. The log-probs between them are not rounded."""
    objective = tokfuse.Objective(kl=tokfuse.KL(coef=0.1), entropy_coef=0.02)
    keywords = {
        "target": torch.arange(TOKENS) * 7,
        "old_logp": drawn(TOKENS, seed=1) - 6,
        "ref_logp": drawn(TOKENS, seed=2) - 6,
        "advantage": drawn(TOKENS, seed=3),
        "objective": objective,
        "normalizer": 3.0,
    }
    wide = {k: doubled(v) for k, v in keywords.items()}
    head = {"hidden": drawn(TOKENS, HIDDEN, seed=4), "weight": drawn(VOCAB, HIDDEN, seed=5, scale=0.4)}
    for given in ({"logits": drawn(TOKENS, VOCAB, seed=6, scale=3.0)}, head):
        leaves = {k: v.requires_grad_() for k, v in given.items()}
        exact = {k: v.detach().double().requires_grad_() for k, v in given.items()}
        step, want = tokfuse.policy_step(**leaves, **keywords), tokfuse.policy_step(**exact, **wide)
        results = ((x.loss, x.token_loss, *x.stats) for x in (step, want))
        for mine, truth in zip(*results, strict=True):
            assert mine.dtype == torch.float32
            compare(mine, truth, **ROUNDED_ONCE)
        compare(step.metrics.sums, want.metrics.sums, rtol=1e-13, atol=1e-13)
        step.loss.backward()
        want.loss.backward()
        for name, leaf in leaves.items():
            compare(leaf.grad, exact[name].grad, **ROUNDED_ONCE)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_head_rounds_its_gradients_once(dtype):
    leaves = [drawn(TOKENS, HIDDEN).to(dtype).requires_grad_(), drawn(VOCAB, HIDDEN, seed=1).to(dtype).requires_grad_()]
    wide = [x.detach().double().requires_grad_() for x in leaves]
    target = torch.arange(TOKENS) * 11
    for given in (leaves, wide):
        stats = tokfuse.linear_token_stats(*given, target)
        (stats.logp.sum() + stats.entropy.sum()).backward()
    for mine, exact in zip(leaves, wide, strict=True):
        assert mine.grad.dtype == dtype
        # torch rounds float64 to 16 bits through float32.
        bound = half_ulp(exact.grad, dtype) + half_ulp(exact.grad, torch.float32) + 1e-13
        compare(mine.grad, exact.grad, atol=bound)


# ---------------------------------------------------------------------------------- confident tokens


@pytest.mark.parametrize("k", range(1, 15))
@pytest.mark.parametrize("op", ["token_stats", "kept_token_stats", "linear_token_stats"])
def test_a_confident_token_keeps_its_gradient(op, k):
    """p = 1 - 10^-k: the target's entry, 1 - p, and log p have float64's relative accuracy, not 1e-16 absolute."""
    gap = math.log(10.0**k - 1)  # p = 1 / (1 + e^-gap)
    rest = 1 / (1 + math.exp(gap))
    logits = torch.tensor([[1.0, 1.0 - gap]], dtype=torch.float64)
    target = torch.tensor([0])
    if op == "linear_token_stats":
        hidden = torch.ones(1, 1, dtype=torch.float64)
        leaf = logits.t().clone().requires_grad_()
        stats = tokfuse.linear_token_stats(hidden, leaf, target)
    else:
        leaf = logits.requires_grad_()
        if op == "token_stats":
            stats = tokfuse.token_stats(leaf, target)
        else:
            stats = tokfuse.kept_token_stats(leaf, target, torch.tensor([1, 0]), torch.tensor([0, 2]))
    (of_logp,) = torch.autograd.grad(stats.logp.sum(), leaf, retain_graph=True)
    (of_entropy,) = torch.autograd.grad(stats.entropy.sum(), leaf)
    # 1 - gap has a rounding error of 1e-15, which is the relative error of 1 - p.
    bound = {"rtol": 1e-13}
    want = torch.tensor([[rest, -rest]], dtype=torch.float64)
    compare(of_logp.reshape(1, 2), want, **bound, what="d logp")
    compare(stats.logp, torch.tensor([math.log1p(-rest)], dtype=torch.float64), **bound, what="logp")
    p, log_p, log_q = 1 - rest, math.log1p(-rest), math.log(rest)
    entropy = -(p * log_p + rest * log_q)
    compare(stats.entropy, torch.tensor([entropy], dtype=torch.float64), **bound, what="entropy")
    # dH = -p (log p + H) for the target. The other entry is its negative.
    slope = -p * rest * (log_p - log_q)
    compare(of_entropy.reshape(1, 2), torch.tensor([[slope, -slope]], dtype=torch.float64), rtol=1e-12, what="d H")


@pytest.mark.parametrize("at", [0, 5, VOCAB - 1])
def test_ties_at_the_largest_logit_share_the_gradient(at):
    logits = drawn(1, VOCAB).double()
    logits[0, [0, 5, VOCAB - 1]] = 9.0
    z = logits.requires_grad_()
    (grad,) = torch.autograd.grad(reference.exact(z, torch.tensor([at]))[0].sum(), z)
    p = z.detach().softmax(1)
    onehot = torch.zeros_like(p)
    onehot[0, at] = 1.0
    compare(grad, onehot - p, atol=1e-15)


# -------------------------------------------------------------------------------- modes of execution


def test_autocast_and_inference_mode_change_nothing():
    given = drawn(TOKENS, HIDDEN), drawn(VOCAB, HIDDEN, seed=1), torch.arange(TOKENS)
    plain = tokfuse.linear_token_stats(*given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = tokfuse.linear_token_stats(*given)
    with torch.inference_mode():
        inferred = tokfuse.linear_token_stats(*given)
    assert linear.logits_of(*given[:2], None).dtype == torch.float64
    for other in (cast, inferred):
        assert all(torch.equal(a, b) for a, b in zip(plain, other, strict=True))


def test_compiled_in_one_graph_it_rounds_the_same():
    target = torch.arange(TOKENS)

    def loss(z):
        stats = tokfuse.token_stats(z, target, temperature=0.7)
        return (stats.logp + 0.1 * stats.entropy).sum()

    torch.compiler.reset()
    grads = []
    for function in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        z = drawn(TOKENS, VOCAB, scale=4.0).requires_grad_()
        function(z).backward()
        grads.append(z.grad)
    assert torch.equal(*grads)


def test_a_second_derivative_of_float32_logits():
    """Through the float64 computation: the Hessian of logp, p p^T - diag(p), rounded once."""
    z = drawn(1, 7).requires_grad_()
    (first,) = torch.autograd.grad(tokfuse.token_stats(z, torch.tensor([2])).logp.sum(), z, create_graph=True)
    rows = [torch.autograd.grad(first[0, j], z, retain_graph=True)[0][0] for j in range(7)]
    p = z.detach().double().softmax(1)[0]
    compare(torch.stack(rows), p[:, None] * p - p.diag(), **ROUNDED_ONCE)
