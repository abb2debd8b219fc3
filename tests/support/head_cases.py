"""Hidden states and lm_heads for the ops that go through the head, and their float64 gradients."""

from typing import Any, NamedTuple

import torch
from logit_cases import Truth, truth
from torch import Tensor

# A 4096-column tile of the logits that are laid out inside dW, and more; fewer rows than that fit.
SIZES = {"one_tile": (37, 24, 700), "tiles": (37, 24, 9001), "more_tokens": (70, 16, 4100)}


class HeadCase(NamedTuple):
    """CPU tensors of one batch."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor


def head_case(size: str = "tiles", dtype: torch.dtype = torch.float32) -> HeadCase:
    """Logits of a few nats; the same values at each call."""
    tokens, hidden, vocab = SIZES[size]
    gen = torch.Generator().manual_seed(vocab)
    return HeadCase(
        torch.randn(tokens, hidden, generator=gen).to(dtype),
        torch.randn(vocab, hidden, generator=gen).mul(0.5).to(dtype),
        torch.randn(vocab, generator=gen).to(dtype),
        torch.randint(0, vocab, (tokens,), generator=gen),
    )


class HeadTruth(NamedTuple):
    """float64 statistics, gradients, and the size of the terms that each gradient sums."""

    stats: Truth
    grads: dict[str, Tensor]
    scales: dict[str, Tensor]


def head_truth(case: HeadCase, ga: Tensor, gh: Tensor, bias: bool = True, **options: Any) -> HeadTruth:
    """Formulas of `token_stats` over hidden @ weight.T + bias, and the chain rule."""
    h, w = case.hidden.double(), case.weight.double()
    logits = h @ w.t() + (case.bias.double() if bias else 0.0)
    stats = truth(logits, case.target, ga, gh, **options)
    dz, size = stats.grad, stats.grad.abs() + 1e-3 * stats.term
    grads = {"hidden": dz @ w, "weight": dz.t() @ h, "bias": dz.sum(0)}
    scales = {"hidden": size @ w.abs(), "weight": size.t() @ h.abs(), "bias": size.sum(0)}
    return HeadTruth(stats, grads, scales)
