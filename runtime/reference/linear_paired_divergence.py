"""linear_paired_divergence in plain torch: the logits of both sides in full, then the simple ops."""

from typing import Any

import torch

from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.reference import paired_divergence, token_stats


def exact(
    logits: torch.Tensor,
    teacher_logits: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    teacher_options: LogitOptions,
    op: str,
    **divergence: Any,
) -> tuple[torch.Tensor, ...]:
    """divergence, entropy, logp, teacher_logp, top1_agreement: (tokens,) float64.

    Differentiable in float64 `logits`. The mask of `options` counts for both sides.
    """
    teacher_options = teacher_options._replace(mask=options.mask)
    teacher_logits = teacher_logits.detach().double()
    value = paired_divergence.forward(
        logits.double(), teacher_logits, q_options=teacher_options, **divergence, **options.without_bias()
    )
    stats = token_stats.exact(logits, target, op=op, **options.without_bias())
    teacher = token_stats.exact(teacher_logits, target, op=op, **teacher_options.without_bias())
    meet = (_at_maximum(logits.detach(), options) & _at_maximum(teacher_logits, teacher_options)).any(-1)
    if options.mask is not None:
        meet = meet & options.mask
    return value, stats[1], stats[0], teacher[0].detach(), meet.double()


def _at_maximum(logits: torch.Tensor, o: LogitOptions) -> torch.Tensor:
    """Columns that attain their row's maximum; none of a row of only -inf."""
    u = token_stats.transformed_logits(logits, 1.0, o.softcap, o.logit_scale)
    highest = u.amax(-1, keepdim=True)
    return (u == highest) & (highest > float("-inf"))
