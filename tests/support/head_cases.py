"""Hidden states and lm_heads for the ops that include the head, and their float64 gradients."""

import os
import subprocess
import sys
from typing import Any, NamedTuple

import torch
from logit_cases import Truth, truth
from torch import Tensor

# Vocabularies of one 4096-column tile, and of several. The logits are stored inside dW, and at every size
# fewer rows fit there than there are tokens.
SIZES = {"one_tile": (37, 24, 700), "tiles": (37, 24, 9001), "more_tokens": (70, 16, 4100)}


class HeadCase(NamedTuple):
    """CPU tensors of one batch."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    target: Tensor


def head_case(size: str = "tiles", dtype: torch.dtype = torch.float32) -> HeadCase:
    """Return logits of a few nats, the same values in each call."""
    tokens, hidden, vocab = SIZES[size]
    gen = torch.Generator().manual_seed(vocab)
    return HeadCase(
        torch.randn(tokens, hidden, generator=gen).to(dtype),
        torch.randn(vocab, hidden, generator=gen).mul(0.5).to(dtype),
        torch.randn(vocab, generator=gen).to(dtype),
        torch.randint(0, vocab, (tokens,), generator=gen),
    )


class HeadTruth(NamedTuple):
    """float64 statistics and gradients, and the size of the terms in the sum of each gradient."""

    stats: Truth
    grads: dict[str, Tensor]
    scales: dict[str, Tensor]


def head_truth(case: HeadCase, ga: Tensor, gh: Tensor, bias: bool = True, **options: Any) -> HeadTruth:
    """Compute the formulas of `token_stats` on hidden @ weight.T + bias, and the chain rule."""
    h, w = case.hidden.double(), case.weight.double()
    logits = h @ w.t() + (case.bias.double() if bias else 0.0)
    stats = truth(logits, case.target, ga, gh, **options)
    dz, size = stats.grad, stats.grad.abs() + 1e-3 * stats.term
    grads = {"hidden": dz @ w, "weight": dz.t() @ h, "bias": dz.sum(0)}
    scales = {"hidden": size @ w.abs(), "weight": size.t() @ h.abs(), "bias": size.sum(0)}
    return HeadTruth(stats, grads, scales)


PEAK = """
import resource, sys, torch, tokfuse
torch.set_num_threads(1)
def peak(tokens, vocab=30_000, hidden=32):
    h = torch.randn(tokens, hidden, requires_grad=True)
    w = torch.randn(vocab, hidden, requires_grad=True)
    exec(sys.argv[1], globals() | locals())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
print(peak(64), peak(1024))
"""


def peak_growth(code: str) -> int:
    """Return the MiB that 1024 tokens need more than 64, in a process that runs `code` (vocab 30000).

    `code` may use `h`, `w` and `tokens`.
    """
    environment = {**os.environ, "TOKFUSE_BACKEND": "cpu"}
    command = [sys.executable, "-P", "-c", PEAK, code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    few, many = map(int, done.stdout.split())
    return many - few
