"""linear_token_stats in plain torch: the logits in full, then token_stats."""

from typing import Any

import torch

from tokfuse.runtime.reference import token_stats
from tokfuse.runtime.reference.token_stats import accumulation_dtype


def logits_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """(tokens, vocab) logits in float32 (float64 for float64 inputs)."""
    dtype = accumulation_dtype(hidden.dtype)
    with torch.autocast(hidden.device.type, enabled=False):
        logits = hidden.to(dtype) @ weight.to(dtype).t()
    return logits if bias is None else logits + bias.to(dtype)


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """(logp, entropy, lse, sum_sq, top1) of the rows of hidden @ weight.T + bias."""
    logits = logits_of(hidden, weight, bias)
    return token_stats.forward(logits, target, op="linear_token_stats", **options)
