"""Reference of `tokfuse.linear_token_stats`: all logits at once, then token_stats."""

from typing import Any

import torch

from tokfuse.runtime.core.checks import head_dtype
from tokfuse.runtime.reference import token_stats


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """Return the logits hidden @ weight.T + bias, (tokens, vocab), in float64. Autocast does not affect float64."""
    logits = hidden.double() @ weight.double().t()
    return logits if bias is None else logits + bias.double()


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1) of the rows of hidden @ weight.T + bias, rounded once."""
    logits = logits_of(hidden, weight, bias)
    stats = token_stats.exact(logits, target, op="linear_token_stats", **options)
    return token_stats.rounded(stats, head_dtype(hidden, weight, bias))
