"""offpolicy_weights: importance weights, kept rows and effective sample size.

Let d = clamp(logp - behavior_logp, +-20) and w = exp(d), or exp of the sum or mean of d over the
sequence. Then weight = f(w) for a kept row, else 0, where f is the transform of the mode.

Launches:
    1. One program per sequence, or per BLOCK rows without cu_seqlens, writes weight, kept and the
       sums over its units.
    2. With normalize="group", the ids are sorted on the device. Then one program per unit is
       launched; the program of the first unit of a group adds the group.
    3. One program adds the sums in order and computes the effective sample size.
    4. With normalisation, one launch divides the weights.

If the weight or a rule needs a statistic of the whole sequence, the sequence is read twice, the
second time from L1 or L2.

Bytes per row at float32: 8 read, 5 written (1 more read with a mask, 4 with an advantage). The
division reads 5 and writes 4 more. All arithmetic is float64. Legend: T rows, S sequences, U units
(sequences or rows).
"""

from typing import Any

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.offpolicy_normalize import normalize_weights, span
from tokfuse.triton_kernels.packed import is_valid, joined, pair

CLAMP = tl.constexpr(20.0)  # nats
INFINITY = float("inf")
STATISTICS = ("ratio", "k1", "k2", "k3")
OVER = ("token", "sum", "mean", "max")


@triton.jit
def _clamped(x):
    # Comparisons instead of tl.minimum and tl.maximum, which ignore a NaN.
    x = tl.where(x < -CLAMP, -CLAMP, x)
    return tl.where(x > CLAMP, CLAMP, x)


@triton.jit
def _k3(d):
    return tl.exp(d) - 1.0 - d


@triton.jit
def _outside(x, low, high):
    """Return True if x is outside [low, high]; False for NaN, which must stay visible."""
    return (x < low) | (x > high)


@triton.jit
def _log_ratio(logp_ptr, behavior_ptr, offs, valid):
    """Return the clamped log-ratio; 0 if not valid."""
    d = -tl.load(behavior_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    if logp_ptr is not None:
        d += tl.load(logp_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    return _clamped(d)


@triton.jit
def _row_statistic(d, STATISTIC: tl.constexpr):
    x = d
    if STATISTIC == 0:
        x = tl.exp(d)
    elif STATISTIC == 1:
        x = -d
    elif STATISTIC == 2:
        x = 0.5 * d * d
    else:
        x = _k3(d)
    return x


@triton.jit
def _larger(a, b):
    return tl.where(a > b, a, b)


@triton.jit
def _sequence_statistic(count, total, square, k3, low, high, STATISTIC: tl.constexpr, OVER: tl.constexpr):
    """Return the statistic of a sequence-level rule.

    k2 and k3 are convex with their minimum at 0, so their maximum is at an extreme log-ratio.
    """
    share = 1.0 / tl.maximum(count, 1.0) if OVER == 2 else 1.0
    x = total
    if STATISTIC == 0:
        x = tl.exp(_clamped(high if OVER == 3 else total * share))
    elif STATISTIC == 1:
        x = -low if OVER == 3 else -total * share
    elif STATISTIC == 2:
        x = 0.5 * (_larger(low * low, high * high) if OVER == 3 else square * share)
    else:
        x = _larger(_k3(low), _k3(high)) if OVER == 3 else k3 * share
    return x


@triton.jit
def _transform(w, d, low, high, param, MODE: tl.constexpr):
    """Return the weight of a kept row from its ratio w = exp(d)."""
    f = w
    if MODE == "truncate":
        f = tl.where(w < low, low, w)
        f = tl.where(f > high, high, f)
    elif MODE == "switch":
        f = tl.where(w > high, 0.0, w)
    elif MODE == "shrink":
        f = param * w / (w * w + param)
    elif MODE == "subgaussian":
        f = w / (1.0 - param + param * w)
    elif MODE == "tempered":
        f = tl.exp(param * d)
    elif MODE == "keep":
        f = tl.full(w.shape, 1.0, tl.float64)
    return f


@triton.jit
def offpolicy_weights_kernel(
    logp_ptr,  # (T,) float; None: 0
    behavior_ptr,  # (T,) float, behavior_logp
    cu_seqlens_ptr,  # (S + 1,) int32; None: BLOCK rows per program
    mask_ptr,  # (T,) bool, or None
    advantage_ptr,  # (T,) float; None: no rule reads it
    weight_ptr,  # (T,) float
    kept_ptr,  # (T,) bool
    partial_ptr,  # (3, programs) float64: units, sum of their weights, sum of squares
    num_rows,
    low,  # split by `pair`; the same for the next two
    high,
    param,
    bounds,  # (low, high) of each rule, each split by `pair`; None: no rules
    SEQUENCE: tl.constexpr,  # one weight per sequence
    MEAN: tl.constexpr,  # from the mean log-ratio instead of the sum
    MODE: tl.constexpr,
    RULES: tl.constexpr,  # statistic + 4 over + 16 negative_only
    SHARED: tl.constexpr,  # the weight or a rule needs a statistic of the whole sequence
    K3: tl.constexpr,  # a rule needs the sum of k3
    BLOCK: tl.constexpr,
):
    first, stop = span(cu_seqlens_ptr, num_rows, BLOCK)
    low = joined(low)
    high = joined(high)
    param = joined(param)
    passes = True  # result of the sequence-level rules for all rows
    passes_negative = True  # result of those for rows with a negative advantage only
    ratio = tl.zeros((), tl.float64)
    weight = tl.zeros((), tl.float64)
    if SHARED:
        counts = tl.zeros((BLOCK,), tl.float64)
        sums = tl.zeros((BLOCK,), tl.float64)
        squares = tl.zeros((BLOCK,), tl.float64)
        k3s = tl.zeros((BLOCK,), tl.float64)
        lowest = tl.full((BLOCK,), float("inf"), tl.float64)
        highest = tl.full((BLOCK,), float("-inf"), tl.float64)
        for start in range(first, stop, BLOCK):
            offs = start + tl.arange(0, BLOCK)
            valid = is_valid(mask_ptr, offs, offs < stop)
            d = _log_ratio(logp_ptr, behavior_ptr, offs, valid)
            counts += valid.to(tl.float64)
            sums += d
            squares += d * d
            if K3:
                k3s += _k3(d)  # 0 for d = 0, so masked rows add nothing
            lowest = tl.minimum(lowest, tl.where(valid, d, float("inf")))
            highest = tl.maximum(highest, tl.where(valid, d, float("-inf")))
        count = tl.sum(counts, axis=0)
        total = tl.sum(sums, axis=0)
        square = tl.sum(squares, axis=0)
        k3 = tl.sum(k3s, axis=0)
        d_low = tl.where(total == total, tl.min(lowest, axis=0), total)
        d_high = tl.where(total == total, tl.max(highest, axis=0), total)
        for i in tl.static_range(len(RULES)):
            if RULES[i] // 4 % 4 > 0:
                x = _sequence_statistic(count, total, square, k3, d_low, d_high, RULES[i] % 4, RULES[i] // 4 % 4)
                rule_low = joined((bounds[4 * i], bounds[4 * i + 1]))
                rule_high = joined((bounds[4 * i + 2], bounds[4 * i + 3]))
                dropped = _outside(x, rule_low, rule_high)
                if RULES[i] >= 16:
                    passes_negative = passes_negative & (dropped == 0)
                else:
                    passes = passes & (dropped == 0)
        if SEQUENCE:
            log_weight = total / tl.maximum(count, 1.0) if MEAN else total
            log_weight = _clamped(log_weight)
            ratio = tl.exp(log_weight)
            weight = _transform(ratio, log_weight, low, high, param, MODE)

    units = tl.zeros((BLOCK,), tl.float64)
    unit_sums = tl.zeros((BLOCK,), tl.float64)
    unit_squares = tl.zeros((BLOCK,), tl.float64)
    for start in range(first, stop, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        inside = offs < stop
        valid = is_valid(mask_ptr, offs, inside)
        d = _log_ratio(logp_ptr, behavior_ptr, offs, valid)
        w = ratio + tl.zeros((BLOCK,), tl.float64)
        f = weight + tl.zeros((BLOCK,), tl.float64)
        if not SEQUENCE:
            w = tl.exp(d)
            f = _transform(w, d, low, high, param, MODE)
        kept = valid & passes
        if MODE == "mask":
            kept = kept & (_outside(w, low, high) == 0)
        spared = inside
        if advantage_ptr is not None:
            spared = tl.load(advantage_ptr + offs, mask=valid, other=0.0) >= 0.0
            kept = kept & (spared | passes_negative)
        for i in tl.static_range(len(RULES)):
            if RULES[i] // 4 % 4 == 0:
                rule_low = joined((bounds[4 * i], bounds[4 * i + 1]))
                rule_high = joined((bounds[4 * i + 2], bounds[4 * i + 3]))
                keeps = _outside(_row_statistic(d, RULES[i] % 4), rule_low, rule_high) == 0
                if RULES[i] >= 16:
                    keeps = keeps | spared
                kept = kept & keeps
        f = tl.where(kept, f, 0.0)
        tl.store(weight_ptr + offs, f.to(weight_ptr.dtype.element_ty), mask=inside)
        tl.store(kept_ptr + offs, kept, mask=inside)
        if SEQUENCE:
            units = tl.maximum(units, kept.to(tl.float64))
        else:
            units += kept.to(tl.float64)
            unit_sums += f
            unit_squares += f * f
    all_units = tl.sum(units, axis=0)
    unit_sum = tl.sum(unit_sums, axis=0)
    unit_square = tl.sum(unit_squares, axis=0)
    if SEQUENCE:  # a sequence with at least one kept row is one unit
        all_units = tl.max(units, axis=0)
        unit_sum = tl.where(all_units > 0, weight, 0.0)
        unit_square = unit_sum * unit_sum
    program = tl.program_id(0).to(tl.int64)
    programs = tl.num_programs(0).to(tl.int64)
    tl.store(partial_ptr + program, all_units)
    tl.store(partial_ptr + programs + program, unit_sum)
    tl.store(partial_ptr + 2 * programs + program, unit_square)


declare("offpolicy_weights", {80: LaunchConfig(block_t=512, num_warps=4)})


def offpolicy_weights(
    behavior_logp: torch.Tensor,
    logp: torch.Tensor | None,
    *,
    level: str,
    mode: str,
    low: float | None,
    high: float | None,
    param: float | None,
    normalize: str,
    rules: tuple[tuple[str, str, float | None, float | None, bool], ...],
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    advantage: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (weight, ess, kept). The caller has checked all arguments.

    Args:
        behavior_logp: (tokens,) logp of the policy that drew the tokens, or log propensities.
        logp: (tokens,) logp of the current policy. None: 0.
        level: "token", "sequence", "geometric" or "external".
        mode: name of the transform of the ratio.
        low, high: bounds of the mode. None: no bound.
        param: lam or power of the mode.
        normalize: "none", "batch" or "group".
        rules: (statistic, over, low, high, negative_only) of each keep rule.
        cu_seqlens: (seqs + 1,) int32. None: every row is a unit.
        mask: (tokens,) bool. None: every row counts.
        group_ids: (seqs,), or (tokens,) without cu_seqlens; for "group".
        advantage: (tokens,), if a rule is negative_only.

    Returns:
        weight: (tokens,) in the dtype of `behavior_logp`; 0 if not kept.
        ess: (), effective sample size, in the same dtype.
        kept: (tokens,) bool.
    """
    num_rows = behavior_logp.shape[0]
    weight = torch.empty_like(behavior_logp)
    kept = torch.empty(num_rows, dtype=torch.bool, device=behavior_logp.device)
    if num_rows == 0:
        return weight, behavior_logp.new_zeros(()), kept
    ess = behavior_logp.new_empty(())
    config = choose("offpolicy_weights", behavior_logp)
    blocks = triton.cdiv(num_rows, config.block_t)
    programs = blocks if cu_seqlens is None else cu_seqlens.shape[0] - 1
    partial = torch.empty(3, programs, dtype=torch.float64, device=behavior_logp.device)
    codes, bounds, over = [], [], {rule[1] for rule in rules}
    for statistic, reduced, rule_low, rule_high, negative_only in rules:
        codes.append(STATISTICS.index(statistic) + 4 * OVER.index(reduced) + 16 * negative_only)
        bounds += [*pair(rule_low, -INFINITY), *pair(rule_high, INFINITY)]
    sequence = level in ("sequence", "geometric")
    offpolicy_weights_kernel[(programs,)](
        logp,
        behavior_logp,
        cu_seqlens,
        mask,
        advantage,
        weight,
        kept,
        partial,
        num_rows,
        pair(low, -INFINITY),
        pair(high, INFINITY),
        pair(param),
        tuple(bounds) or None,
        SEQUENCE=sequence,
        MEAN=level == "geometric",
        MODE=mode,
        RULES=tuple(codes),
        SHARED=sequence or bool(over - {"token"}),
        K3=any(rule[0] == "k3" and rule[1] in ("sum", "mean") for rule in rules),
        BLOCK=config.block_t,
        **config.options,
    )
    normalize_weights(weight, kept, ess, partial, normalize, cu_seqlens, group_ids)
    return weight, ess, kept


def _case(dtype: torch.dtype, *, packed: bool, **options: Any) -> None:
    x, flags = meta(1 << 20, dtype=dtype), meta(1 << 20, dtype=torch.bool)
    plain = {
        "level": "token",
        "mode": "ips",
        "low": None,
        "high": None,
        "param": None,
        "normalize": "none",
        "rules": (),
        "mask": None,
        "group_ids": None,
        "advantage": None,
        "cu_seqlens": borders(1024, 1 << 20) if packed else None,
    }
    options = {name: flags if value == "flags" else value for name, value in options.items()}
    offpolicy_weights(x, x, **{**plain, **options})


@compile_case("offpolicy_weights/token_truncate", dtypes=(torch.float32, torch.float64), streams=2)
def _(dtype: torch.dtype) -> None:
    _case(dtype, packed=False, mode="truncate", high=2.0)


@compile_case("offpolicy_weights/sequence_mask", dtypes=(torch.float32,), streams=2)
def _(dtype: torch.dtype) -> None:
    _case(dtype, packed=True, level="sequence", mode="mask", low=0.5, high=3.0, mask="flags")


@compile_case("offpolicy_weights/snips_group", dtypes=(torch.float32,), streams=2)
def _(dtype: torch.dtype) -> None:
    ids = meta(1024, dtype=torch.int64)
    _case(dtype, packed=True, normalize="group", group_ids=ids)


@compile_case("offpolicy_weights/external_group", dtypes=(torch.float32,), streams=2)
def _(dtype: torch.dtype) -> None:
    ids = meta(1 << 20, dtype=torch.int64)
    _case(dtype, packed=False, level="external", normalize="group", group_ids=ids)


@compile_case("offpolicy_weights/rules", dtypes=(torch.float32,), streams=2)
def _(dtype: torch.dtype) -> None:
    rules = (
        ("ratio", "mean", 0.99, 1.01, False),
        ("k3", "mean", None, 1.0, False),
        ("k2", "max", None, 2.0, False),
        ("k1", "mean", None, 0.1, True),
        ("ratio", "token", 0.1, None, True),
    )
    advantage = meta(1 << 20, dtype=dtype)
    _case(
        dtype,
        packed=True,
        level="geometric",
        mode="tempered",
        param=0.5,
        normalize="batch",
        rules=rules,
        mask="flags",
        advantage=advantage,
    )
