"""The second half of offpolicy_weights: effective sample size, and division by a mean weight.

The weights kernel stores one record per sequence or block of rows: its number of units, and the
sums of their weights and squared weights. One program adds these records in order. To normalise by
group, the ids are first sorted on the device; the program of the first unit of a group adds the
whole group. There are no atomics, so the order of the sums is fixed. Legend: T rows, S sequences, U
units (sequences, or rows without cu_seqlens).
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.group_advantage import group_size, sorted_groups
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import as_int64, is_valid


@triton.jit
def span(cu_seqlens_ptr, num_rows, BLOCK: tl.constexpr):
    """Return the rows [first, stop) of this program: its sequence, or its block without borders."""
    program = tl.program_id(0).to(tl.int64)
    first = program * BLOCK
    stop = tl.minimum(first + BLOCK, as_int64(num_rows))
    if cu_seqlens_ptr is not None:
        first = tl.load(cu_seqlens_ptr + program).to(tl.int64)
        stop = tl.load(cu_seqlens_ptr + program + 1).to(tl.int64)
    return first, stop


@triton.jit
def offpolicy_ess_kernel(
    partial_ptr,  # (3, U) float64
    ess_ptr,  # () float
    factor_ptr,  # () float64, 1 / mean over the units; or None
    num_partials,
    BLOCK: tl.constexpr,
):
    num_partials = as_int64(num_partials)
    units = tl.zeros((BLOCK,), tl.float64)
    sums = tl.zeros((BLOCK,), tl.float64)
    squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, num_partials, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < num_partials
        cell = partial_ptr + offs
        units += tl.load(cell, mask=inside, other=0.0)
        sums += tl.load(cell + num_partials, mask=inside, other=0.0)
        squares += tl.load(cell + 2 * num_partials, mask=inside, other=0.0)
    total = tl.sum(sums, axis=0)
    square = tl.sum(squares, axis=0)
    # Weights are not negative. A sum of 0 means that all of them are 0.
    ess = tl.where(square == 0.0, 0.0, total * total / tl.where(square == 0.0, 1.0, square))
    tl.store(ess_ptr, ess.to(ess_ptr.dtype.element_ty))
    if factor_ptr is not None:
        count = tl.sum(units, axis=0)
        tl.store(factor_ptr, tl.where(total == 0.0, 0.0, count / tl.where(total == 0.0, 1.0, total)))


@triton.jit
def offpolicy_group_kernel(
    ids_ptr,  # (U,) int64, ascending
    order_ptr,  # (U,) int64, unit of each sorted id
    partial_ptr,  # (3, U) float64; None: units are rows
    weight_ptr,  # (U,) float, read only if units are rows
    kept_ptr,  # (U,) bool, read only if units are rows
    factor_ptr,  # (U,) float64, 1 / mean of the unit's group
    scaled_ptr,  # (3, U) float64, sums of the divided group at its first position, else 0
    num_units,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    num_units = as_int64(num_units)
    units = tl.zeros((), tl.float64)
    scaled_sum = tl.zeros((), tl.float64)
    scaled_square = tl.zeros((), tl.float64)
    before = tl.maximum(start - 1, 0)
    if (start == 0) | (tl.load(ids_ptr + start) != tl.load(ids_ptr + before)):
        size = group_size(ids_ptr, start, num_units, BLOCK)
        counts = tl.zeros((BLOCK,), tl.float64)
        sums = tl.zeros((BLOCK,), tl.float64)
        squares = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            inside = offs < size
            unit = tl.load(order_ptr + start + offs, mask=inside, other=0)
            if partial_ptr is not None:
                counts += tl.load(partial_ptr + unit, mask=inside, other=0.0)
                sums += tl.load(partial_ptr + num_units + unit, mask=inside, other=0.0)
                squares += tl.load(partial_ptr + 2 * num_units + unit, mask=inside, other=0.0)
            else:
                w = tl.load(weight_ptr + unit, mask=inside, other=0.0).to(tl.float64)
                kept = tl.load(kept_ptr + unit, mask=inside, other=0)
                counts += tl.where(inside & (kept != 0), 1.0, 0.0)
                sums += w  # 0 where not kept
                squares += w * w
        units = tl.sum(counts, axis=0)
        total = tl.sum(sums, axis=0)
        # Weights are not negative. A mean of 0 means that all of them are 0.
        factor = tl.where(total == 0.0, 0.0, units / tl.where(total == 0.0, 1.0, total))
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            inside = offs < size
            unit = tl.load(order_ptr + start + offs, mask=inside, other=0)
            tl.store(factor_ptr + unit, factor + tl.zeros((BLOCK,), tl.float64), mask=inside)
        scaled_sum = total * factor
        scaled_square = tl.sum(squares, axis=0) * factor * factor
    tl.store(scaled_ptr + start, units)
    tl.store(scaled_ptr + num_units + start, scaled_sum)
    tl.store(scaled_ptr + 2 * num_units + start, scaled_square)


@triton.jit
def offpolicy_scale_kernel(
    weight_ptr,  # (T,) float, scaled in place
    kept_ptr,  # (T,) bool
    factor_ptr,  # () float64; (S,) with borders; (T,) with PER_ROW
    cu_seqlens_ptr,  # (S + 1,) int32, or None
    num_rows,
    PER_ROW: tl.constexpr,
    BLOCK: tl.constexpr,
):
    first, stop = span(cu_seqlens_ptr, num_rows, BLOCK)
    for start in range(first, stop, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < stop
        kept = is_valid(kept_ptr, offs, inside)
        if PER_ROW:
            factor = tl.load(factor_ptr + offs, mask=kept, other=0.0)
        elif cu_seqlens_ptr is not None:
            factor = tl.load(factor_ptr + tl.program_id(0))
        else:
            factor = tl.load(factor_ptr)
        w = tl.load(weight_ptr + offs, mask=kept, other=0.0).to(tl.float64)
        w = tl.where(kept, w * factor, 0.0)
        tl.store(weight_ptr + offs, w.to(weight_ptr.dtype.element_ty), mask=inside)


declare("offpolicy_scale", {80: LaunchConfig(block_t=512, num_warps=4)})
declare("offpolicy_ess", {80: LaunchConfig(block_t=1024, num_warps=8)})
declare("offpolicy_group", {80: LaunchConfig(block_t=64, num_warps=1)})


def normalize_weights(
    weight: torch.Tensor,
    kept: torch.Tensor,
    ess: torch.Tensor,
    partial: torch.Tensor,
    normalize: str,
    cu_seqlens: torch.Tensor | None,
    group_ids: torch.Tensor | None,
) -> None:
    """Write `ess`, and divide `weight` in place by the mean over the batch or over each group.

    Args:
        weight: (tokens,), divided in place.
        kept: (tokens,) bool, rows that passed all rules.
        ess: (), written with the effective sample size.
        partial: (3, programs of the weights kernel) float64: units, sum of weights, sum of squares.
        normalize: "none", "batch" or "group".
        cu_seqlens: (seqs + 1,) int32. None: units are rows.
        group_ids: (seqs,), or (tokens,) without `cu_seqlens`; for "group".
    """
    factor = None
    per_row = normalize == "group" and cu_seqlens is None
    if normalize == "group":
        assert group_ids is not None
        partial, factor = _groups(group_ids, None if per_row else partial, weight, kept)
    elif normalize == "batch":
        factor = torch.empty((), dtype=torch.float64, device=weight.device)
    one = choose("offpolicy_ess", weight)
    offpolicy_ess_kernel[(1,)](
        partial, ess, factor if normalize == "batch" else None, partial.shape[1], BLOCK=one.block_t, **one.options
    )
    if factor is None:
        return
    config = choose("offpolicy_scale", weight)
    borders = cu_seqlens if normalize == "group" else None
    blocks = triton.cdiv(weight.shape[0], config.block_t)
    offpolicy_scale_kernel[(blocks if borders is None else borders.shape[0] - 1,)](
        weight, kept, factor, borders, weight.shape[0], PER_ROW=per_row, BLOCK=config.block_t, **config.options
    )


def _groups(
    group_ids: torch.Tensor, partial: torch.Tensor | None, weight: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sums over the divided units of each group, factor of each unit)."""
    ids, order = sorted_groups(group_ids)
    num_units = ids.shape[0]
    factor = torch.empty(num_units, dtype=torch.float64, device=ids.device)
    scaled = torch.empty(3, num_units, dtype=torch.float64, device=ids.device)
    config = choose("offpolicy_group", ids)
    offpolicy_group_kernel[(num_units,)](
        ids, order, partial, weight, kept, factor, scaled, num_units, BLOCK=config.block_t, **config.options
    )
    return scaled, factor
