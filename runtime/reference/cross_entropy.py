"""Reference of the statistics of `tokfuse.cross_entropy` with label smoothing, in float64."""

from typing import Any

import torch

from tokfuse.runtime.core.logit_options import check_values
from tokfuse.runtime.reference.linear_token_stats import logits_of
from tokfuse.runtime.reference.token_stats import rounded, rows_of, stats_of


def forward(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, op: str, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, logit_sum, sum_sq, top1) of `exact`, rounded once."""
    return rounded(exact(logits, target, class_weight, op, **options), logits.dtype)


def exact(
    logits: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, op: str, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, logit_sum, sum_sq, top1) in float64, differentiable in the logits.

    logit_sum is sum_j class_weight_j u_j of the scaled logits u.
    """
    if not torch.compiler.is_compiling():
        check_values(op, target, logits.shape[1], options.get("mask"), options.get("temperature", 1.0))
    rows = rows_of(logits, **options)
    logp, entropy, lse, sum_sq, top1 = stats_of(rows, target)
    weighted = rows.u if class_weight is None else rows.u * class_weight.double()
    logit_sum = rows.final(weighted.sum(-1), float("-inf"))
    return logp, entropy, lse, logit_sum, sum_sq, top1


def head_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    dtype: torch.dtype,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return `forward` of the logits of a head. dtype: that of the head problem, which decides that of the results."""
    logits = logits_of(hidden, weight, bias)
    out = forward(logits, target, class_weight, "linear_cross_entropy", **options)
    return tuple(x.to(torch.float64 if dtype == torch.float64 else torch.float32) for x in out)
