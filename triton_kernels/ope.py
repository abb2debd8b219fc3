"""ope: five off-policy estimates of a mean reward and their standard errors, from logged rows.

With w = weight, r = reward, q = q_pi and e = w (r - q_a):

    ips = mean w r    snips = sum w r / sum w    dm = mean q    dr = dm + mean e
    sndr = dm + sum e / sum w

The standard error of an estimate is that of the mean of its first-order influences per row:

    w r - ips      w (r - snips) / mean w      q - dm      q + e - dr
    q - dm + (e - w sum e / sum w) / mean w

There are three launches: (1) sums over fixed pieces of the rows; (2) squared deviations, where
every program first adds the sums in a fixed order; (3) one program that writes the results. Rows
are read twice; up to a few million rows the second read is from L2. There are no atomics, so
results are bitwise repeatable. Bytes per row at float32: 16 (1 more with a mask) for each read. All
arithmetic is float64.

Legend: N rows, P programs of a launch.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import MAX_PARTIALS, is_valid

NUM_ESTIMATES = tl.constexpr(5)  # there are also five sums: rows, w, w r, q, e


@triton.jit
def _load_rows(weight_ptr, reward_ptr, q_pi_ptr, q_a_ptr, mask_ptr, offs, num_rows):
    """Return (valid, w, r, q, e) of the rows `offs`; 0 if not valid, or without q_pi or q_a."""
    valid = is_valid(mask_ptr, offs, offs < num_rows)
    w = tl.load(weight_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    r = tl.load(reward_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    q = tl.zeros_like(w)
    e = tl.zeros_like(w)
    if q_pi_ptr is not None:
        q = tl.load(q_pi_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    if q_a_ptr is not None:
        e = w * (r - tl.load(q_a_ptr + offs, mask=valid, other=0.0).to(tl.float64))
    return valid, w, r, q, e


@triton.jit
def _store_sums(partial_ptr, a, b, c, d, e):
    """Store the sums of five vectors in the column of this program in (5, P)."""
    place = partial_ptr + tl.program_id(0)
    programs = tl.num_programs(0)
    tl.store(place, tl.sum(a, axis=0))
    tl.store(place + programs, tl.sum(b, axis=0))
    tl.store(place + 2 * programs, tl.sum(c, axis=0))
    tl.store(place + 3 * programs, tl.sum(d, axis=0))
    tl.store(place + 4 * programs, tl.sum(e, axis=0))


@triton.jit
def _all_of(partial_ptr, which: tl.constexpr, programs):
    """Add sum number `which` of all programs in a fixed order."""
    offs = tl.arange(0, MAX_PARTIALS)
    part = tl.load(partial_ptr + which * programs + offs, mask=offs < programs, other=0.0)
    return tl.sum(part, axis=0)


@triton.jit
def _estimates(partial_ptr, programs):
    """Return (rows, mean w, sum e / sum w, ips, snips, dm, dr); NaN without rows or weights."""
    n = _all_of(partial_ptr, 0, programs)
    w = _all_of(partial_ptr, 1, programs)
    wr = _all_of(partial_ptr, 2, programs)
    e = _all_of(partial_ptr, 4, programs)
    dm = _all_of(partial_ptr, 3, programs) / n
    return n, w / n, e / w, wr / n, wr / w, dm, dm + e / n


@triton.jit
def ope_sums_kernel(
    weight_ptr,  # (N,) float; the same for the next three, of which q_pi and q_a may be None
    reward_ptr,
    q_pi_ptr,
    q_a_ptr,
    mask_ptr,  # (N,) bool, or None
    sums_ptr,  # (5, P) float64: rows, w, w r, q, e
    num_rows,
    BLOCK: tl.constexpr,
):
    rows = tl.zeros((BLOCK,), tl.float64)
    ws = tl.zeros((BLOCK,), tl.float64)
    wrs = tl.zeros((BLOCK,), tl.float64)
    qs = tl.zeros((BLOCK,), tl.float64)
    es = tl.zeros((BLOCK,), tl.float64)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, num_rows, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid, w, r, q, e = _load_rows(weight_ptr, reward_ptr, q_pi_ptr, q_a_ptr, mask_ptr, offs, num_rows)
        rows += valid.to(tl.float64)
        ws += w
        wrs += w * r
        qs += q
        es += e
    _store_sums(sums_ptr, rows, ws, wrs, qs, es)


@triton.jit
def ope_deviations_kernel(
    weight_ptr,  # (N,) float; the same for the next three, of which q_pi and q_a may be None
    reward_ptr,
    q_pi_ptr,
    q_a_ptr,
    mask_ptr,  # (N,) bool, or None
    sums_ptr,  # (5, P) float64 of ope_sums_kernel
    squares_ptr,  # (5, P) float64, squared influences of ips, snips, dm, dr, sndr
    num_rows,
    BLOCK: tl.constexpr,
):
    _, mean_w, correction, ips, snips, dm, dr = _estimates(sums_ptr, tl.num_programs(0))
    a = tl.zeros((BLOCK,), tl.float64)
    b = tl.zeros((BLOCK,), tl.float64)
    c = tl.zeros((BLOCK,), tl.float64)
    d = tl.zeros((BLOCK,), tl.float64)
    f = tl.zeros((BLOCK,), tl.float64)
    inverse = 1.0 / mean_w
    first = tl.program_id(0).to(tl.int64) * BLOCK
    for start in range(first, num_rows, tl.num_programs(0) * BLOCK):
        offs = start + tl.arange(0, BLOCK)
        valid, w, r, q, e = _load_rows(weight_ptr, reward_ptr, q_pi_ptr, q_a_ptr, mask_ptr, offs, num_rows)
        x = tl.where(valid, w * r - ips, 0.0)
        a += x * x
        x = tl.where(valid, w * (r - snips) * inverse, 0.0)
        b += x * x
        x = tl.where(valid, q - dm, 0.0)
        c += x * x
        x = tl.where(valid, q + e - dr, 0.0)
        d += x * x
        x = tl.where(valid, q - dm + (e - correction * w) * inverse, 0.0)
        f += x * x
    _store_sums(squares_ptr, a, b, c, d, f)


@triton.jit
def ope_results_kernel(
    sums_ptr,  # (5, P) float64
    squares_ptr,  # (5, P) float64
    out_ptr,  # (5, 2) float: ips, snips, dm, dr, sndr, each with its standard error
    programs,
):
    n, _, correction, ips, snips, dm, dr = _estimates(sums_ptr, programs)
    element: tl.constexpr = out_ptr.dtype.element_ty
    tl.store(out_ptr, ips.to(element))
    tl.store(out_ptr + 2, snips.to(element))
    tl.store(out_ptr + 4, dm.to(element))
    tl.store(out_ptr + 6, dr.to(element))
    tl.store(out_ptr + 8, (dm + correction).to(element))
    for i in tl.static_range(NUM_ESTIMATES):
        variance = _all_of(squares_ptr, i, programs) / (n - 1.0) / n
        tl.store(out_ptr + 2 * i + 1, tl.sqrt(variance).to(element))


declare("ope", {80: LaunchConfig(block_t=512, num_warps=4)})


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return (5, 2) in the dtype of `reward`: estimate and standard error of each estimator.

    The order is ips, snips, dm, dr, sndr. Without q_pi, dm, dr and sndr are undefined; without q_a,
    dr and sndr are. The caller has checked all arguments.
    """
    num_rows, device = reward.shape[0], reward.device
    config = choose("ope", reward)
    programs = max(1, min(triton.cdiv(num_rows, config.block_t), MAX_PARTIALS.value))
    sums, squares = torch.empty(2, NUM_ESTIMATES.value, programs, dtype=torch.float64, device=device)
    out = torch.empty(NUM_ESTIMATES.value, 2, dtype=reward.dtype, device=device)
    rows = (weight, reward, q_pi, q_a, mask)
    ope_sums_kernel[(programs,)](*rows, sums, num_rows, BLOCK=config.block_t, **config.options)
    ope_deviations_kernel[(programs,)](*rows, sums, squares, num_rows, BLOCK=config.block_t, **config.options)
    ope_results_kernel[(1,)](sums, squares, out, programs, num_warps=1)
    return out


@compile_case("ope", dtypes=(torch.float32, torch.float64), streams=4)
def _(dtype: torch.dtype) -> None:
    x = meta(1 << 20, dtype=dtype)
    ope(x, x, x, x, meta(1 << 20, dtype=torch.bool))
