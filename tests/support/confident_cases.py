"""Rows whose target has p = 1 - 10^-k, with their float64 values.

The largest gradient entry of such a row is the target's entry, 1 - p. A difference of float32 numbers has an
absolute error of 6e-8. At k = 4 this is a relative error of 6e-4, and at k = 7 most digits are wrong.
"""

import math
from typing import Any, NamedTuple

import torch
from harness import compare, half_ulp
from logit_cases import GRADIENT_RTOL, transformed
from torch import Tensor

STEPS = range(1, 8)
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scaled": {"temperature": 0.75, "logit_scale": 0.5},
    "softcap": {"softcap": 30.0},
}
COEFFICIENTS = {"logp": (1.0, 0.0), "entropy": (0.0, 1.0), "both": (-2.0, 0.1)}


class Truth(NamedTuple):
    """float64 values, with 1 - p as a sum over the other tokens. `term` is the largest term of each row."""

    logp: Tensor
    entropy: Tensor
    grad: Tensor
    term: Tensor


def problem(
    vocab: int, dtype: torch.dtype, shift: float = 0.0, unlikely: bool = False, **options: Any
) -> tuple[Tensor, Tensor]:
    """Return (logits, target). Row k - 1 has p = 1 - 10^-k, up to the rounding of its logits to `dtype`.

    unlikely: p = 10^-k.
    """
    gen = torch.Generator().manual_seed(vocab)
    z = torch.randn(len(STEPS), vocab, generator=gen, dtype=torch.float64) * 2 - 3
    target = torch.randint(0, vocab, (len(STEPS),), generator=gen)
    target[0], target[-1] = 0, vocab - 1
    temperature, cap = options.get("temperature", 1.0), options.get("softcap")
    u = transformed(z, **options)[0].scatter(1, target[:, None], -math.inf)
    odds = torch.tensor([10.0**k - 1 for k in STEPS], dtype=torch.float64)
    odds = 1 / odds if unlikely else odds
    u_y = (torch.logsumexp(u, 1) + odds.log()) * temperature
    z_y = (u_y if cap is None else cap * torch.atanh(u_y / cap)) / options.get("logit_scale", 1.0)
    return (z.scatter(1, target[:, None], z_y[:, None]) + shift).to(dtype), target


def truth(z: Tensor, target: Tensor, ga: float, gh: float, **options: Any) -> Truth:
    u, slope = transformed(z, **options)
    hit = torch.zeros_like(u, dtype=torch.bool).scatter_(1, target[:, None], True)
    p = torch.softmax(u, 1)
    rest = p.masked_fill(hit, 0.0).sum(1, keepdim=True)
    logp = -torch.log1p(rest / p.gather(1, target[:, None]))
    log_p = torch.where(hit, logp, torch.log_softmax(u, 1))
    entropy = -(p * log_p).sum(1, keepdim=True)
    grad = slope * (ga * torch.where(hit, rest, -p) - gh * p * (log_p + entropy))
    term = slope * (abs(ga) * torch.where(hit, rest, p) + abs(gh) * p * (log_p.abs() + entropy))
    return Truth(logp.squeeze(1), entropy.squeeze(1), grad, term.amax(1, keepdim=True))


def check(grad: Tensor, want: Truth, dtype: torch.dtype, what: str = "gradient", rtol: float = GRADIENT_RTOL) -> None:
    bound = rtol * want.term.expand(want.grad.shape)
    if dtype != torch.float32:  # the interpreter truncates in a matrix product; hardware rounds
        bound = bound + 2 * half_ulp(want.grad, dtype)
    compare(grad, want.grad, atol=bound, what=what)


def check_statistics(logp: Tensor, entropy: Tensor, want: Truth, rtol: float = GRADIENT_RTOL) -> None:
    """Check relative errors. Near 0 an absolute bound in nats would accept any value."""
    compare(logp, want.logp, rtol=rtol, what="logp")
    compare(entropy, want.entropy, rtol=rtol, what="entropy")


def cap_error(options: dict[str, Any], backend: str) -> float:
    """Return the additional error that the tanh of a softcap has, in nats: a multiple of the cap."""
    return (2e-7 if backend in ("cuda", "triton") else 1e-7) * options.get("softcap", 0.0)


def rtol_of(options: dict[str, Any], backend: str) -> float:
    """Return the relative bound."""
    return GRADIENT_RTOL + cap_error(options, backend)
