"""Reference of `tokfuse.linear_token_stats`: all logits at once, then token_stats."""

from typing import Any

import torch

from tokfuse.runtime.core.checks import head_dtype
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.reference import kept_token_stats, token_stats


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
    kept: TokenIds | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1) of the rows of hidden @ weight.T + bias, rounded once.

    kept: the distribution is over these ids of each row. None: over the whole vocabulary.
    """
    logits = kept_token_stats.restricted(logits_of(hidden, weight, bias), kept, options.get("mask"))
    logp, *stats = token_stats.exact(logits, target, op="linear_token_stats", **options)
    logp = kept_token_stats.constant_if_excluded(kept, logp)
    return token_stats.rounded((logp, *stats), head_dtype(hidden, weight, bias))
