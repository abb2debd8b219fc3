"""The CUDA row kernels, run on the CPU (tests/cuda_host): parity with float64 and the reference.

The same sources that nvcc compiles. Bounds as in the tests of the ops; both ways of policy_step, rows
in a cluster and the second visit through L2.
"""

import dataclasses

import pytest
import torch
from cuda_host import needs_host
from harness import FLOAT_DTYPES, bits, compare, half_ulp
from logit_cases import CASES, FORWARD_ATOL, GRADIENT_RTOL, INF, Case, truth

pytestmark = needs_host

# Long rows once; the emulator takes 0.1 us an element and thread.
SMALL = [c for c in CASES if c.vocab <= 7000]


def coefficients(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Incoming gradients of logp and entropy: both signs, and rows with none."""
    i = torch.arange(tokens)
    ga, gh = torch.cos(1.7 * i + 0.3), torch.sin(2.3 * i + 0.2)
    return torch.where(i % 5 == 3, 0.0, ga), torch.where(i % 3 == 2, 0.0, gh)


def check_stats(stats, expected) -> None:
    for name, got in zip(("logp", "entropy", "lse"), stats, strict=False):
        compare(got, getattr(expected, name), atol=FORWARD_ATOL, what=name)
    compare(stats[3], expected.sum_sq, rtol=1e-5, what="sum_sq")
    compare(stats[4], expected.top1, what="top1")


def check_gradient(grad, expected) -> None:
    atol = GRADIENT_RTOL * expected.term
    if grad.dtype != torch.float32:
        atol = atol + half_ulp(expected.grad, grad.dtype)
    compare(grad, expected.grad, atol=atol, what="gradient")


def check(logits, target, **options) -> None:
    import cuda_rows

    ga, gh = coefficients(len(logits))
    expected = truth(logits, target, ga, gh, **options)
    stats = cuda_rows.token_stats_fwd(logits, target, **options)
    check_stats(stats, expected)
    check_gradient(
        cuda_rows.token_stats_bwd(logits, target, stats, ga, gh, **options), expected
    )


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_token_stats(case: Case, dtype: torch.dtype):
    logits, target, options = case.make(dtype)
    check(logits, target, **options)
