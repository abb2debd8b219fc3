"""whiten: (x - mean) / sqrt(var + eps) over the rows with mask true.

The first launch stores count, mean and squared deviations of at most 256 fixed shares of the rows.
Every program of the second launch merges these records in a fixed order and writes its block. So no
atomics, no third launch and no synchronisation are needed. If mean and var are given, there is only
the second launch.

Bytes per row at float32: 8 read, 4 written (1 more per read with a mask). Legend: T rows.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import is_valid, joined, merged_moments, pair, partial_moments


@triton.jit
def whiten_kernel(
    x_ptr,  # (T,) float
    mask_ptr,  # (T,) bool, or None
    partial_ptr,  # (3, programs) float64 of partial_moments; None: mean and var are given
    mean_ptr,  # () float64, or None
    var_ptr,  # () float64, or None
    out_ptr,  # (T,) float
    num_rows,
    num_partials,
    eps,  # split by `pair`
    SHIFT_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    if partial_ptr is not None:
        count, mean, square = merged_moments(partial_ptr, num_partials)
        var = square / tl.maximum(count - 1.0, 1.0)
    else:
        mean = tl.load(mean_ptr)
        var = tl.load(var_ptr)
    spread = var + joined(eps)
    # Equal values with eps = 0 have deviations of 0, and 0 * inf would be NaN.
    scale = tl.where(spread == 0.0, 0.0, 1.0 / tl.sqrt(spread))
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_rows
    valid = is_valid(mask_ptr, offs, inside)
    y = (tl.load(x_ptr + offs, mask=valid, other=0.0).to(tl.float64) - mean) * scale
    if not SHIFT_MEAN:
        y += mean
    tl.store(out_ptr + offs, tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


declare("whiten", {80: LaunchConfig(block_t=1024, num_warps=4)})


def whiten(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    shift_mean: bool,
    eps: float,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
) -> torch.Tensor:
    """Return (tokens,) in the dtype of `x`. The caller has checked all arguments."""
    out = torch.empty_like(x)
    if x.shape[0]:
        config = choose("whiten", x)
        partial = partial_moments(x, mask) if mean is None else None
        whiten_kernel[(triton.cdiv(x.shape[0], config.block_t),)](
            x,
            mask,
            partial,
            mean,
            var,
            out,
            x.shape[0],
            0 if partial is None else partial.shape[1],
            pair(eps),
            SHIFT_MEAN=shift_mean,
            BLOCK=config.block_t,
            **config.options,
        )
    return out


@compile_case("whiten", dtypes=(torch.float32, torch.float64))
def _(dtype: torch.dtype) -> None:
    x, mask = meta(1 << 20, dtype=dtype), meta(1 << 20, dtype=torch.bool)
    whiten(x, mask=mask, shift_mean=True, eps=1e-8, mean=None, var=None)


@compile_case("whiten/given", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    x, one = meta(1 << 20, dtype=dtype), meta(dtype=torch.float64)
    whiten(x, mask=None, shift_mean=False, eps=1e-8, mean=one, var=one)
