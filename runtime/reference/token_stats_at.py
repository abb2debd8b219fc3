"""token_stats with log-probs of a few ids per row, in plain torch, differentiable."""

from typing import Any

import torch

from tokfuse.runtime.core.checks import head_dtype
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import check_values as check_targets
from tokfuse.runtime.reference import token_stats as reference
from tokfuse.runtime.reference.kept_token_stats import row_of_each
from tokfuse.runtime.reference.linear_token_stats import logits_of


def forward(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1, logp_at) of `exact`, rounded once."""
    return reference.rounded(exact("token_stats", logits, target, ids, offsets, **options), logits.dtype)


def linear_forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return `forward` of the logits hidden @ weight.T + bias."""
    logits = logits_of(hidden, weight, bias)
    out = exact("linear_token_stats", logits, target, ids, offsets, **options)
    return reference.rounded(out, head_dtype(hidden, weight, bias))


def exact(
    op: str, logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return the outputs in float64; an id of -1 is padding."""
    if not torch.compiler.is_compiling():
        check_values(op, target, ids, offsets, logits.shape[1], options.get("mask"), options.get("temperature", 1.0))
    rows = reference.rows_of(logits, **options)
    of = row_of_each(ids, offsets)
    counts = rows.keep[of] & (ids >= 0)
    logp_at = rows.log_p[of, torch.where(counts, ids, 0)]
    logp_at = torch.where(counts, torch.where(rows.dead[of], float("-inf"), logp_at), 0.0)
    return *reference.stats_of(rows, target), logp_at


def check_values(
    op: str,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    vocab: int,
    mask: torch.Tensor | None,
    temperature: float | torch.Tensor,
) -> None:
    """Check the range of targets, temperatures and ids in rows whose mask is True."""
    check_targets(op, target, vocab, mask, temperature)
    bad = (ids < -1) | (ids >= vocab)
    if mask is not None:
        bad = bad & mask[row_of_each(ids, offsets)]
    if bool(bad.any()):
        at = int(bad.to(torch.uint8).argmax())
        raise refuse(
            op,
            "ids",
            f"in [0, {vocab}), or -1 for padding, in every row where mask is True",
            f"{int(ids[at])} in row {int(row_of_each(ids, offsets)[at])}",
            "Pass vocabulary ids.",
        )
