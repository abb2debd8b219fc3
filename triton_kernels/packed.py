"""Device helpers of the kernels over packed vectors: numbers, scans, mean and variance.

These kernels move 8 to 20 bytes per token, a logits kernel about 300,000. So float64 arithmetic
costs little; the CPU kernels use it too. A result is rounded once, and a scan over 100,000 tokens
loses no digits.
"""

import math
import struct

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare

MAX_FLOAT32 = 3.4028234e38
# Limit for the programs of `partial_moments`. Every program of the next kernel merges all records.
MAX_PARTIALS = tl.constexpr(256)


def pair(x: float | None, missing: float = 0.0) -> tuple[float, float]:
    """Split a number into (high, low) with high + low = x to 48 bits.

    Triton passes a Python float to a kernel as float32. 0.99 in float32 has an error of 1e-8, which
    a scan over 100 tokens increases to 1e-6.
    """
    value = missing if x is None else float(x)
    if MAX_FLOAT32 < abs(value) < math.inf:
        raise ValueError(f"Triton kernels accept finite numbers up to {MAX_FLOAT32:g}; got {value:g}.")
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high if math.isfinite(value) else 0.0


@triton.jit
def joined(number):
    """Return the float64 number that `pair` has split."""
    return tl.full((), 0.0, tl.float64) + number[0] + number[1]  # each sum is float64


@triton.jit
def as_int64(size):
    """Return a size as int64. The compiler passes an argument of 1 as a Python constant."""
    return tl.full((), 0, tl.int64) + size


@triton.jit
def _compose(coef_late, inject_late, coef, inject):
    return coef * coef_late, inject + coef * inject_late


@triton.jit
def _lesser(late, early):
    return tl.minimum(late, early)


@triton.jit
def reverse_recurrence(coef, inject, carry):
    """Return y[t] = inject[t] + coef[t] y[t + 1] along the block; y after its end is `carry`."""
    coef, inject = tl.associative_scan((coef, inject), 0, _compose, reverse=True)
    return inject + coef * carry


@triton.jit
def reverse_minimum(x, carry):
    """Return min(x[t], x[t + 1], ..., carry) for each t of the block."""
    return tl.minimum(tl.associative_scan(x, 0, _lesser, reverse=True), carry)


@triton.jit
def first_lane(x, lanes):
    """Return x[0] as a scalar."""
    return tl.sum(tl.where(lanes == 0, x, tl.zeros_like(x)), axis=0)


@triton.jit
def is_valid(mask_ptr, offs, inside):
    """Return `inside`, and also the mask if there is one."""
    valid = inside
    if mask_ptr is not None:
        valid = tl.load(mask_ptr + offs, mask=inside, other=0) != 0
    return valid


@triton.jit
def partial_moments_kernel(
    x_ptr,  # (N,) float
    mask_ptr,  # (N,) bool, or None
    partial_ptr,  # (3, programs) float64: count, mean, sum of squared deviations
    num_rows,
    BLOCK: tl.constexpr,
):
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    count = tl.zeros((), tl.float64)
    mean = tl.zeros((), tl.float64)
    square = tl.zeros((), tl.float64)
    for start in range(program.to(tl.int64) * BLOCK, num_rows, programs * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid = is_valid(mask_ptr, offs, offs < num_rows)
        x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        n = tl.sum(valid.to(tl.float64), axis=0)
        # Relative to a value of the block, so equal values have deviations of exactly 0.
        origin = tl.where(n > 0, tl.max(tl.where(valid, x, float("-inf")), axis=0), 0.0)
        own_mean = origin + tl.sum(tl.where(valid, x - origin, 0.0), axis=0) / tl.maximum(n, 1.0)
        d = tl.where(valid, x - own_mean, 0.0)
        # Chan's formula: a large mean costs no digits.
        apart = own_mean - mean
        share = n / tl.maximum(count + n, 1.0)
        square += tl.sum(d * d, axis=0) + apart * apart * count * share
        mean += apart * share
        count += n
    tl.store(partial_ptr + program, count)
    tl.store(partial_ptr + programs + program, mean)
    tl.store(partial_ptr + 2 * programs + program, square)


@triton.jit
def merged_moments(partial_ptr, num_partials):
    """Return (count, mean, sum of squared deviations) of all rows, merged in a fixed order."""
    offs = tl.arange(0, MAX_PARTIALS)
    inside = offs < num_partials
    count = tl.load(partial_ptr + offs, mask=inside, other=0.0)
    mean = tl.load(partial_ptr + num_partials + offs, mask=inside, other=0.0)
    square = tl.load(partial_ptr + 2 * num_partials + offs, mask=inside, other=0.0)
    total = tl.sum(count, axis=0)
    filled = count > 0
    origin = tl.where(total > 0, tl.max(tl.where(filled, mean, float("-inf")), axis=0), 0.0)
    shift = tl.sum(tl.where(filled, count * (mean - origin), 0.0), axis=0)
    all_mean = origin + shift / tl.maximum(total, 1.0)
    apart = tl.where(filled, mean - all_mean, 0.0)
    return total, all_mean, tl.sum(square + count * apart * apart, axis=0)


declare("partial_moments", {80: LaunchConfig(block_t=1024, num_warps=4)})


def partial_moments(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Return (3, programs) float64 for `merged_moments`. Only the number of rows decides programs."""
    config = choose("partial_moments", x)
    programs = min(triton.cdiv(x.shape[0], config.block_t), MAX_PARTIALS.value)
    partial = torch.empty(3, programs, dtype=torch.float64, device=x.device)
    partial_moments_kernel[(programs,)](x, mask, partial, x.shape[0], BLOCK=config.block_t, **config.options)
    return partial


@compile_case("partial_moments", dtypes=(torch.float32, torch.float64))
def _(dtype: torch.dtype) -> None:
    partial_moments(meta(1 << 20, dtype=dtype), meta(1 << 20, dtype=torch.bool))
