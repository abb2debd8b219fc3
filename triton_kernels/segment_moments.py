"""segment_moments: count, sum, sum of squares, minimum and maximum per segment, in one read.

The kernel is launched with one program per segment. If segments are long on average, each is split
into up to 64 parts, and a second launch merges their records. The number of parts depends on the
sizes only, and part p reads strips p, p + parts, ... So the result does not depend on the device.

Ids are first sorted on the device (torch.sort, stable); a binary search finds the borders of the
segments. So no atomics and no table per program are needed, and the rows of a segment keep their
order.

Bytes per row at float32: 4 read (1 more with a mask). Ids add 8 for the row numbers, and the sort.
Legend: N rows, K segments, P parts.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import as_int64, is_valid

MAX_PARTS = 64
# With fewer strips per part, the merge takes longer than the split saves.
STRIPS_PER_PART = 4


@triton.jit
def _store_cell(count_ptr, sum_ptr, sum_sq_ptr, min_ptr, max_ptr, place, count, total, square, low, high):
    poisoned = square != square  # tl.minimum and tl.maximum ignore a NaN, the squares keep it
    dtype = sum_ptr.dtype.element_ty
    tl.store(count_ptr + place, count.to(count_ptr.dtype.element_ty))
    tl.store(sum_ptr + place, total.to(dtype))
    tl.store(sum_sq_ptr + place, square.to(dtype))
    tl.store(min_ptr + place, tl.where(poisoned, square, low).to(dtype))
    tl.store(max_ptr + place, tl.where(poisoned, square, high).to(dtype))


@triton.jit
def segment_moments_kernel(
    values_ptr,  # (N,) float
    order_ptr,  # (N,) int64, row of each position; None: positions are rows
    borders_ptr,  # (K + 1,) int32 or int64
    mask_ptr,  # (N,) bool, or None
    count_ptr,  # (K,) int64; with parts, this and the next four are (K, P) float64
    sum_ptr,  # (K,) float
    sum_sq_ptr,
    min_ptr,
    max_ptr,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)
    segment = program // PARTS
    first = tl.load(borders_ptr + segment).to(tl.int64) + program % PARTS * BLOCK
    stop = tl.load(borders_ptr + segment + 1).to(tl.int64)
    count = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.float64)
    square = tl.zeros((BLOCK,), tl.float64)
    low = tl.full((BLOCK,), float("inf"), tl.float64)
    high = tl.full((BLOCK,), float("-inf"), tl.float64)
    for start in range(first, stop, PARTS * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = offs < stop
        if order_ptr is not None:
            offs = tl.load(order_ptr + offs, mask=valid, other=0)
        valid = is_valid(mask_ptr, offs, valid)
        x = tl.load(values_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        count += valid.to(tl.int64)
        total += x
        square += x * x
        low = tl.minimum(low, tl.where(valid, x, float("inf")))
        high = tl.maximum(high, tl.where(valid, x, float("-inf")))
    _store_cell(
        count_ptr,
        sum_ptr,
        sum_sq_ptr,
        min_ptr,
        max_ptr,
        program,
        tl.sum(count, axis=0),
        tl.sum(total, axis=0),
        tl.sum(square, axis=0),
        tl.min(low, axis=0),
        tl.max(high, axis=0),
    )


@triton.jit
def segment_moments_merge_kernel(
    table_ptr,  # (5, K, P) float64
    count_ptr,  # (K,) int64
    sum_ptr,  # (K,) float; the same for the next three
    sum_sq_ptr,
    min_ptr,
    max_ptr,
    num_segments,
    PARTS: tl.constexpr,
):
    segment = tl.program_id(0).to(tl.int64)
    cell = table_ptr + segment * PARTS + tl.arange(0, PARTS)
    field = as_int64(num_segments) * PARTS
    _store_cell(
        count_ptr,
        sum_ptr,
        sum_sq_ptr,
        min_ptr,
        max_ptr,
        segment,
        tl.sum(tl.load(cell), axis=0),
        tl.sum(tl.load(cell + field), axis=0),
        tl.sum(tl.load(cell + 2 * field), axis=0),
        tl.min(tl.load(cell + 3 * field), axis=0),
        tl.max(tl.load(cell + 4 * field), axis=0),
    )


declare("segment_moments", {80: LaunchConfig(block_t=512, num_warps=4)})


def segment_moments(
    values: torch.Tensor,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_segments: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return (count, sum, sum_sq, min, max), each (segments,). The caller has checked all arguments.

    A row whose id is outside [0, num_segments) is ignored.
    """
    count = torch.empty(num_segments, dtype=torch.int64, device=values.device)
    outputs = [count, *(values.new_empty(num_segments) for _ in range(4))]
    if num_segments == 0:
        return tuple(outputs)
    order, borders = None, cu_seqlens
    if segment_ids is not None:
        if mask is not None:  # a masked row gets an id after the last segment, so it is ignored
            segment_ids, mask = torch.where(mask, segment_ids, num_segments), None
        ids, order = torch.sort(segment_ids, stable=True)
        places = torch.arange(num_segments + 1, device=ids.device)
        borders = torch.searchsorted(ids, places)
    config = choose("segment_moments", values)
    parts = parts_of(values.shape[0], num_segments, config.block_t)
    table = outputs
    if parts > 1:
        whole = torch.empty(5, num_segments, parts, dtype=torch.float64, device=values.device)
        table = list(whole.unbind(0))
    segment_moments_kernel[(num_segments * parts,)](
        values, order, borders, mask, *table, PARTS=parts, BLOCK=config.block_t, **config.options
    )
    if parts > 1:
        segment_moments_merge_kernel[(num_segments,)](whole, *outputs, num_segments, PARTS=parts, num_warps=1)
    return tuple(outputs)


def parts_of(num_rows: int, num_segments: int, block: int) -> int:
    """Return the parts of each segment: a power of two; 1 if the mean segment has few strips."""
    strips = num_rows // (num_segments * block * STRIPS_PER_PART)
    return min(1 << max(strips - 1, 0).bit_length(), MAX_PARTS)


@compile_case("segment_moments/borders", dtypes=(torch.float32, torch.float64))
def _(dtype: torch.dtype) -> None:
    mask, cu = meta(1 << 20, dtype=torch.bool), borders(1024, 1 << 20)
    segment_moments(meta(1 << 20, dtype=dtype), None, cu, 1024, mask)


@compile_case("segment_moments/ids", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    segment_moments(meta(1 << 20, dtype=dtype), meta(1 << 20, dtype=torch.int64), None, 8, None)
