"""vtrace: V-trace value targets and advantages over packed sequences, in one launch.

    w_t = exp(clamp(log_ratio_t, +-20)),   rho_t = min(rho_bar, w_t),   c_t = lam min(c_bar, w_t)
    trace_t        = rho_t (r_t + gamma V_next - V_t) + gamma c_t trace_next
    value_target_t = V_t + trace_t
    advantage_t    = r_t + gamma (V_next + trace_next) - V_t

A token needs its own trace and the trace of the next token. So lane t scans the step of token t +
1: the result is trace_next, and one more step gives trace_t. The rest is as in gae.py: one program
per sequence, steps of BLOCK tokens from its end, and a masked token is the identity of the scan.

Bytes per token at float32: 12 read (1 more with a mask; neighbours are read from L1), 12 written.
Legend: T tokens, S sequences.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import first_lane, is_valid, joined, pair, reverse_minimum, reverse_recurrence

LOG_RATIO_CLAMP = tl.constexpr(20.0)


@triton.jit
def _value_behind(value_ptr, finished_ptr, ends, v, valid, following, stop):
    """Return V of the next valid token; after the last one 0, or its own V if not finished."""
    has_next = following < stop
    behind = tl.load(value_ptr + following, mask=valid & has_next, other=0.0).to(tl.float64)
    if finished_ptr is not None:
        behind = tl.where(has_next | ends, behind, v)
    return behind


@triton.jit
def _ratio(log_ratio_ptr, offs, valid):
    d = tl.load(log_ratio_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    # Comparisons instead of tl.minimum and tl.maximum, which ignore a NaN.
    d = tl.where(d < -LOG_RATIO_CLAMP, -LOG_RATIO_CLAMP, d)
    return tl.exp(tl.where(d > LOG_RATIO_CLAMP, LOG_RATIO_CLAMP, d))


@triton.jit
def _bounded(ratio, bound):
    return tl.where(ratio > bound, bound, ratio)


@triton.jit
def vtrace_kernel(
    log_ratio_ptr,  # (T,) float
    reward_ptr,  # (T,) float
    value_ptr,  # (T,) float
    cu_seqlens_ptr,  # (S + 1,) int32
    mask_ptr,  # (T,) bool; None: all tokens count
    finished_ptr,  # (S,) bool; None: all sequences are finished
    target_ptr,  # (T,) float, value_target
    advantage_ptr,  # (T,) float
    rho_ptr,  # (T,) float
    gamma,  # split by `pair`; the same for the next three
    lam,
    rho_bar,  # inf: no bound
    c_bar,
    BLOCK: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64)
    first = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    stop = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    gamma = joined(gamma)
    factor = gamma * joined(lam)
    rho_bar = joined(rho_bar)
    c_bar = joined(c_bar)
    ends = True
    if finished_ptr is not None:
        ends = tl.load(finished_ptr + seq) != 0

    lanes = tl.arange(0, BLOCK)
    nearest = stop  # first valid position after token t + 1 of the lane that is processed last
    carried = tl.zeros((), tl.float64)
    for step in range(0, tl.cdiv(stop - first, BLOCK)):
        offs = stop - (step + 1) * BLOCK + lanes
        inside = offs >= first

        # The step of token t + 1: trace = inject + coef * trace_next.
        after = offs + 1
        after_inside = inside & (after < stop)
        after_valid = is_valid(mask_ptr, after, after_inside)
        following = after + 1
        if mask_ptr is not None:
            later = is_valid(mask_ptr, following, inside & (following < stop))
            following = reverse_minimum(tl.where(later, following, stop), nearest)
            nearest = first_lane(following, lanes)
        r = tl.load(reward_ptr + after, mask=after_valid, other=0.0).to(tl.float64)
        v = tl.load(value_ptr + after, mask=after_valid, other=0.0).to(tl.float64)
        w = _ratio(log_ratio_ptr, after, after_valid)
        behind = _value_behind(value_ptr, finished_ptr, ends, v, after_valid, following, stop)
        inject = _bounded(w, rho_bar) * (r + gamma * behind - v)  # 0 if not valid
        coef = tl.where(after_valid, factor * _bounded(w, c_bar), 1.0)
        trace_next = reverse_recurrence(coef, inject, carried)
        carried = first_lane(trace_next, lanes)

        # Token t.
        valid = is_valid(mask_ptr, offs, inside)
        following = tl.where(after_valid, after, following)
        r = tl.load(reward_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        v = tl.load(value_ptr + offs, mask=valid, other=0.0).to(tl.float64)
        w = _ratio(log_ratio_ptr, offs, valid)
        behind = _value_behind(value_ptr, finished_ptr, ends, v, valid, following, stop)
        rho = _bounded(w, rho_bar)
        ahead = r + gamma * behind - v
        target = v + rho * ahead + factor * _bounded(w, c_bar) * trace_next
        advantage = ahead + gamma * trace_next
        dtype = target_ptr.dtype.element_ty
        tl.store(target_ptr + offs, tl.where(valid, target, 0.0).to(dtype), mask=inside)
        tl.store(advantage_ptr + offs, tl.where(valid, advantage, 0.0).to(dtype), mask=inside)
        tl.store(rho_ptr + offs, tl.where(valid, rho, 0.0).to(dtype), mask=inside)


declare("vtrace", {80: LaunchConfig(block_t=512, num_warps=4)})


def vtrace(
    log_ratio: torch.Tensor,
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    rho_bar: float | None,
    c_bar: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (value_target, advantage, rho), each (tokens,) in the dtype of `reward`.

    The caller has checked all arguments.
    """
    value_target, advantage, rho = (torch.empty_like(reward) for _ in range(3))
    num_seqs = cu_seqlens.shape[0] - 1
    config = choose("vtrace", reward)
    if reward.shape[0] and num_seqs:
        vtrace_kernel[(num_seqs,)](
            log_ratio,
            reward,
            value,
            cu_seqlens,
            mask,
            finished,
            value_target,
            advantage,
            rho,
            pair(gamma),
            pair(lam),
            pair(rho_bar, missing=float("inf")),
            pair(c_bar, missing=float("inf")),
            BLOCK=config.block_t,
            **config.options,
        )
    return value_target, advantage, rho


@compile_case("vtrace", dtypes=(torch.float32,), streams=8)  # each input twice, value two more times
def _(dtype: torch.dtype) -> None:
    x, cu = meta(1 << 20, dtype=dtype), borders(1024, 1 << 20)
    options = {"rho_bar": 1.0, "c_bar": 1.0, "mask": None, "finished": None}
    vtrace(x, x, x, cu, gamma=0.99, lam=0.95, **options)


@compile_case("vtrace/masked", dtypes=(torch.float32, torch.float64), streams=8)
def _(dtype: torch.dtype) -> None:
    x, cu = meta(1 << 20, dtype=dtype), borders(1024, 1 << 20)
    flags = meta(1 << 20, dtype=torch.bool)
    options = {"rho_bar": None, "c_bar": 1.0, "mask": flags, "finished": flags[:1024]}
    vtrace(x, x, x, cu, gamma=0.99, lam=0.95, **options)
