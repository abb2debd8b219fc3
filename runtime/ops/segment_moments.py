"""`tokfuse.segment_moments`: count, sum, sum of squares, minimum and maximum per segment."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.backends.value_checks import check_segment_ids
from tokfuse.runtime.core.checks import (
    BOOL,
    INTS,
    Rows,
    Runs,
    check_cu_seqlens,
    check_optional,
    check_vector,
    is_integer,
    may_read,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.segment_moments import segment_moments as reference
from tokfuse.runtime.reference.segments import sequence_index

OP = "segment_moments"


class SegmentMoments(NamedTuple):
    """Result of `segment_moments`. Every field is (segments,)."""

    count: torch.Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs here
    sum: torch.Tensor
    sum_sq: torch.Tensor
    min: torch.Tensor
    max: torch.Tensor


@ranged("segment_moments.fwd")
def segment_moments(
    values: torch.Tensor,
    segment_ids: torch.Tensor | None = None,
    *,
    cu_seqlens: torch.Tensor | None = None,
    num_segments: int | None = None,
    mask: torch.Tensor | None = None,
) -> SegmentMoments:
    """Return count, sum, sum of squares, minimum and maximum of each segment, in one read of the values.

    Args:
        values: (rows,), float. The values to reduce.
        segment_ids: (rows,), int32 or int64. Segment of each row, in [0, num_segments), in any order.
            The id of a masked row is not read.
        cu_seqlens: (segments + 1,), int32. Offsets of contiguous segments, instead of segment_ids.
        num_segments: number of segments. Required with segment_ids, because the shape of the result
            must not depend on the values of a tensor.
        mask: (rows,), bool. True = counts. None: all rows count.

    Returns:
        SegmentMoments(count int64, sum, sum_sq, min, max), each (segments,), float32 (float64 for
        float64 values). An empty segment has count 0, sums 0, min +inf, max -inf.

    Numerics:
        Sums accumulate in float64 and are rounded once. Results are bitwise repeatable for any number of
        threads. A NaN affects only its own segment. The variance sum_sq / n - mean^2 loses as many digits
        as (mean / deviation)^2 has. If the mean is large, subtract it first, or pass float64.

    Gradients and memory:
        `sum` and `sum_sq` are differentiable; count, min and max are not. Saved: the values. With
        segment_ids and at least 64 rows per segment, the workspace is 8 tables of 40 bytes per segment.

    Examples:
        >>> cu_seqlens = torch.tensor([0, 2, 3], dtype=torch.int32)
        >>> tokfuse.segment_moments(torch.tensor([1.0, 2.0, 5.0]), cu_seqlens=cu_seqlens).sum
        tensor([3., 5.])

    Raises:
        ValueError: wrong shape or dtype; both or neither of segment_ids and cu_seqlens; num_segments
            missing with segment_ids or given with cu_seqlens; an id outside [0, num_segments). Ids are
            checked on the CPU, and on other devices only with TOKFUSE_CHECK=1. Without the check, `cuda`
            and `triton` ignore the row.
    """
    num_rows = check_vector(OP, "values", values).shape[0]
    rows = Rows(num_rows, "values", values.device)
    if (segment_ids is None) == (cu_seqlens is None):
        actual = "none" if segment_ids is None else "both"
        raise refuse(OP, "segment_ids or cu_seqlens", "given, exactly one of them", actual, "Pass one of the two.")
    check_optional(OP, "mask", mask, rows, BOOL)
    if cu_seqlens is not None:
        if num_segments is not None:
            want = "left out with cu_seqlens"
            raise refuse(OP, "num_segments", want, num_segments, "Remove it: cu_seqlens defines it.")
        num_segments = check_cu_seqlens(OP, cu_seqlens, num_rows, values.device)
    else:
        check_vector(OP, "segment_ids", segment_ids, rows, INTS)
        if num_segments is None or not is_integer(num_segments) or num_segments < 0:
            want = "an int >= 0, given with segment_ids"
            raise refuse(OP, "num_segments", want, num_segments, "Pass the number of segments.")
    if not isinstance(num_segments, int):
        num_segments = int(num_segments)
    dtype = working_dtype(values)
    run = _RUNS[backend_of(OP, values.device.type, dtype)]
    x = values.to(dtype).contiguous()
    return SegmentMoments(*run(x, plain(segment_ids, torch.int64), plain(cu_seqlens), num_segments, plain(mask)))


def _reference(
    values: torch.Tensor,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_segments: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    if segment_ids is None:
        assert cu_seqlens is not None
        segment_ids = sequence_index(cu_seqlens, values.shape[0])
    elif may_read(segment_ids):
        check_segment_ids(segment_ids, num_segments, mask)
    return reference(values, segment_ids, num_segments, mask=mask)


class _Moments(torch.autograd.Function):
    """The forward of a kernel with a backward for the two sums: a gather."""

    @staticmethod
    def forward(
        ctx: Any,
        kernel: Callable[..., tuple[torch.Tensor, ...]],
        values: torch.Tensor,
        segment_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        num_segments: int,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        count, total, square, low, high = kernel(values, segment_ids, cu_seqlens, num_segments, mask)
        ctx.save_for_backward(values, segment_ids, cu_seqlens, mask)
        ctx.mark_non_differentiable(count, low, high)
        return count, total, square, low, high

    @staticmethod
    @ranged("segment_moments.bwd")
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        values, ids, cu_seqlens, mask = ctx.saved_tensors
        _, grad_sum, grad_square, _, _ = grads
        if ids is None:
            ids = sequence_index(cu_seqlens, values.shape[0])
        if mask is not None:
            ids = torch.where(mask, ids, 0)
        if ids.shape[0] == 0:
            return None, torch.zeros_like(values), None, None, None, None
        grad = grad_sum[ids] + 2.0 * values * grad_square[ids]
        if mask is not None:
            grad = torch.where(mask, grad, torch.zeros_like(grad))
        return None, grad, None, None, None, None


def _differentiable(
    backend: str, kernel: Callable[..., tuple[torch.Tensor, ...]]
) -> Callable[..., tuple[torch.Tensor, ...]]:
    forward = traceable(OP, backend, kernel, _FORM)

    def run(values: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
        needs = values.requires_grad and torch.is_grad_enabled()
        if torch.compiler.is_compiling() or not needs:
            found: tuple[torch.Tensor, ...] = forward(values, *rest)
            return found
        out: tuple[torch.Tensor, ...] = _Moments.apply(kernel, values, *rest)
        return out

    return run


def _fake(values: torch.Tensor, ids: Any, cu_seqlens: Any, num_segments: int, mask: Any) -> tuple[torch.Tensor, ...]:
    sums = (values.new_empty(num_segments) for _ in range(4))
    return values.new_empty(num_segments, dtype=torch.int64), *sums


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    values, ids, cu_seqlens, _, mask = inputs
    ctx.save_for_backward(values, ids, cu_seqlens, mask)
    count, _, _, low, high = output
    ctx.mark_non_differentiable(count, low, high)


def _op_backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    return _Moments.backward(ctx, *grads)[1:]


_FORM = GraphForm(
    "(Tensor values, Tensor? segment_ids, Tensor? cu_seqlens, SymInt num_segments, Tensor? mask)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
    differentiate=(_setup_context, _op_backward),
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
_RUNS: Runs = {
    "cuda": _differentiable("cuda", cuda_packed.segment_moments),
    "triton": _differentiable("triton", triton_packed.segment_moments),
    "cpu": _differentiable("cpu", cpu_packed.segment_moments),
    "reference": _reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32, torch.float64}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32, torch.float64}))
register_reference(OP, _RUNS["reference"])
