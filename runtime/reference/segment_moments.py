"""Reference of `tokfuse.segment_moments`: moments of segments in plain torch."""

import torch

from tokfuse.runtime.reference.segments import segment_sum


def segment_moments(
    values: torch.Tensor, segment_ids: torch.Tensor, num_segments: int, *, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (count, sum, sum_sq, min, max), each (num_segments,). Sums accumulate in float64."""
    ids = segment_ids.to(torch.int64)
    keep = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
    ids = torch.where(keep, ids, 0)  # the id of a masked row is not read
    x = torch.where(keep, values.double(), torch.zeros((), dtype=torch.float64, device=ids.device))
    dtype = values.dtype
    flat = values.detach()
    infinity = torch.full((num_segments,), float("inf"), dtype=dtype, device=ids.device)
    low = torch.where(keep, flat, infinity.new_full((), float("inf")))
    high = torch.where(keep, flat, infinity.new_full((), -float("inf")))
    if num_segments == 0:
        empty = values.new_zeros(0)
        return ids.new_zeros(0), empty, empty, empty, empty
    return (
        segment_sum(keep.to(torch.int64), ids, num_segments),
        segment_sum(x, ids, num_segments).to(dtype),
        segment_sum(x * x, ids, num_segments).to(dtype),
        infinity.scatter_reduce(0, ids, low, "amin"),
        (-infinity).scatter_reduce(0, ids, high, "amax"),
    )
