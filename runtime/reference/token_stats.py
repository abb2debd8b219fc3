"""Reference of `tokfuse.token_stats` in float64, differentiable by autograd."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.logit_options import check_values


def result_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of results: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rounded(results: Iterable[torch.Tensor], dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return float64 results, rounded to the result dtype of inputs of `dtype`."""
    return tuple(x.to(result_dtype(dtype)) for x in results)


def transformed_logits(
    logits: torch.Tensor,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> torch.Tensor:
    """Return (softcap(logit_scale z) - bias_scale b) / temperature in float64. -inf stays -inf."""
    z = logits.double() * logit_scale
    excluded = z == float("-inf")
    if softcap is not None:
        capped = softcap * torch.tanh(torch.where(excluded, 0.0, z) / softcap)
        z = torch.where(excluded, float("-inf"), capped)
    if bias_logits is not None:
        bias = bias_scale * bias_logits.detach().double()
        z = torch.where(excluded, float("-inf"), z - torch.where(excluded, 0.0, bias))
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(-1)
    return z / temperature


def log_softmax(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (log p, log-sum-exp) of each row. A log p near 0 and its gradient keep their digits.

    The sum leaves out the largest logit m: log-sum-exp = m + log1p(sum over the others of e^(u - m)).
    With log(sum over all) instead, a log p at p = 1 - 1e-12 keeps only four digits, and so does its
    gradient, 1 - p. +inf or NaN makes its whole row NaN.
    """
    largest = u.detach().argmax(-1, keepdim=True)
    m = u.gather(-1, largest)
    # At m itself x is the constant 0: u - m would give it a gradient of rounding noise.
    alone = torch.zeros_like(u, dtype=torch.bool).scatter(-1, largest, m.isfinite())
    x = torch.where(alone, 0.0, u - m)
    rest = torch.where(alone, 0.0, x.exp()).sum(-1, keepdim=True).log1p()
    return x - rest, (m + rest).squeeze(-1)


def forward(logits: torch.Tensor, target: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1) of `exact`, rounded once."""
    return rounded(exact(logits, target, **options), logits.dtype)


class Rows(NamedTuple):
    """What the outputs of a batch of rows are made of, in float64."""

    u: torch.Tensor
    """(tokens, vocab) transformed logits over the temperature; 0 in rows without a distribution."""
    log_p: torch.Tensor
    """(tokens, vocab)."""
    lse: torch.Tensor
    """(tokens,)."""
    keep: torch.Tensor
    """(tokens,) bool: the mask."""
    dead: torch.Tensor
    """(tokens,) bool: only -inf, no distribution; treated as uniform."""

    def final(self, x: torch.Tensor, dead_value: float) -> torch.Tensor:
        """(tokens,) `x`, with the documented values of masked and dead rows."""
        return torch.where(self.keep, torch.where(self.dead, dead_value, x), 0.0)


def rows_of(
    logits: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> Rows:
    """The distribution of each row."""
    keep = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device) if mask is None else mask
    if mask is not None:  # before any arithmetic: 0 * NaN in a masked row would reach the gradient
        logits = torch.where(keep.unsqueeze(-1), logits, 0.0)
        if bias_logits is not None:
            bias_logits = torch.where(keep.unsqueeze(-1), bias_logits, 0.0)
        if isinstance(temperature, torch.Tensor):
            temperature = torch.where(keep, temperature, 1.0)
    u = transformed_logits(logits, temperature, softcap, logit_scale, bias_logits, bias_scale)
    dead = (u == float("-inf")).all(-1)
    u = torch.where(dead.unsqueeze(-1), 0.0, u)
    log_p, lse = log_softmax(u)
    return Rows(u, log_p, lse, keep, dead)


def exact(
    logits: torch.Tensor, target: torch.Tensor, *, op: str = "token_stats", **options: Any
) -> tuple[torch.Tensor, ...]:
    """The outputs in float64; see `tokfuse.token_stats`. `op` is named in errors."""
    if not torch.compiler.is_compiling():
        check_values(op, target, logits.shape[1], options.get("mask"), options.get("temperature", 1.0))
    return stats_of(rows_of(logits, **options), target)


def stats_of(rows: Rows, target: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """(logp, entropy, lse, sum_sq, top1) in float64."""
    y = torch.where(rows.keep, target, 0).unsqueeze(-1)
    p = rows.log_p.exp()
    u_y = rows.u.gather(-1, y).squeeze(-1)
    logp = rows.log_p.gather(-1, y).squeeze(-1)
    # 0 * -inf is NaN, forward and backward: an excluded logit gets log p = 0 before the product.
    finite = torch.where(rows.log_p == float("-inf"), 0.0, rows.log_p)
    entropy = -(p * finite).sum(-1)
    sum_sq = (p * p).sum(-1)
    top1 = (u_y == rows.u.amax(-1)).to(rows.u.dtype)
    minus_inf = float("-inf")
    return (
        rows.final(logp, minus_inf),
        rows.final(entropy, 0.0),
        rows.final(rows.lse, minus_inf),
        rows.final(sum_sq, 0.0).detach(),
        rows.final(top1, 0.0).detach(),
    )
