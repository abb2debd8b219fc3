"""paired_divergence: the divergence of two rows of logits, and its gradient with respect to those of P.

Passes over (T, V): forward one read of each stream from memory for the two log-sum-exps, with two
exponentials per element; backward one read of each and one write. A KL comes out of the first pass:

    KL(P || Q) = sum e_p (d_p - d_q) / (T S_p) - log(S_p / S_q),   d = u - max u

The difference has an absolute error of about 3e-7. If this KL is at least CLOSE, it is the result of
the two KLs. The other kinds take a second pass, with three exponentials or logarithms per element. It
reads L2 if L2 holds the rows of all resident programs (2 x 297 KiB each at bf16, V = 151936), else
memory. With `big` the larger of p and q, delta = log2 p - log2 q, and b and b' the weights of the
smaller and the larger one in the mixture:

    r = 2^-|delta| = small / big,   t = b r + b' = mix / big,   log2(big / mix) = -log2 t

Closer rows, and rows with an excluded entry, take another second pass. It forms delta from u_p - u_q,
so that close logits subtract exactly, and with m1 = r - 1 as expm1(-|delta|):

    small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log1p(b m1)

These keep their relative precision if P and Q are close, and are exactly 0 if the rows are equal.
KL(a || b) is summed as a log(a / b) + (b - a). Each such term is >= 0, and an error of the
log-sum-exps cancels in the sum to first order.

Legend: T tokens (packed), V vocabulary. State per row, for the backward: live, max u_p, max u_q,
log2 S_p, log2 S_q, sum p s with s the slope of `_slope`. KINDS holds the codes of KIND.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.tile import (
    LN_2,
    LOG2_E,
    MIN_EXPONENT,
    log1p,
    log2_near_1,
    log_split,
    maximum,
    power_split,
    reciprocal,
    store,
)

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = {"jsd": 0, "kl_forward": 1, "kl_reverse": 2, "skew_forward": 3, "skew_reverse": 4, "tvd": 5}
JSD = tl.constexpr(0)
FORWARD_KL = tl.constexpr(1)
REVERSE_KL = tl.constexpr(2)
SKEW_FORWARD = tl.constexpr(3)
SKEW_REVERSE = tl.constexpr(4)
TVD = tl.constexpr(5)
STATE = tl.constexpr(6)
# Rows with a smaller KL are compared by the careful pass: here the first one is exact to 0.3%.
CLOSE = tl.constexpr(1e-4)
# |log2(p / q)| below which q - p is a polynomial.
NEAR = tl.constexpr(0.03125)


@triton.jit
def _weights(mix_weight, KIND: tl.constexpr):
    """Return (weight of P, weight of Q) in the mixture."""
    if KIND == SKEW_REVERSE:
        p_weight, q_weight = mix_weight, 1.0 - mix_weight
    else:
        p_weight, q_weight = 1.0 - mix_weight, mix_weight
    return p_weight, q_weight


@triton.jit
def _careful(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, mix_weight, KIND: tl.constexpr):
    """Return (p s, term of the divergence) of an element; s is the slope of `_slope`."""
    p_weight, q_weight = _weights(mix_weight, KIND)
    # Two excluded logits would give inf - inf.
    apart = tl.where(u_p == u_q, 0.0, u_p - u_q) - (p_max - q_max)
    delta = apart * c - (p_log2s - q_log2s)
    p_is_big = delta >= 0.0
    away = maximum(tl.where(p_is_big, -delta, delta), MIN_EXPONENT)
    log_p = (u_p - p_max) * c - p_log2s
    log_q = (u_q - q_max) * c - q_log2s
    big = tl.exp2(tl.where(p_is_big, log_p, log_q))
    r, m1 = power_split(away)
    gap = big * m1
    # A KL needs an exact 0 for an excluded entry, a mixture the digits of the smaller probability.
    small = big + gap if KIND == FORWARD_KL or KIND == REVERSE_KL else big * r
    p = tl.where(p_is_big, big, small)
    q = tl.where(p_is_big, small, big)
    q_minus_p = tl.where(p_is_big, gap, -gap)
    if KIND == FORWARD_KL or KIND == REVERSE_KL:
        # If the weight is 0 the term is 0 and not 0 * inf; the gap carries the NaN of the row.
        slope = tl.where(p > 0.0, delta * LN_2, 0.0)
        if KIND == REVERSE_KL:
            term = p * slope + q_minus_p
        else:
            term = tl.where(q > 0.0, -q * (delta * LN_2), 0.0) - q_minus_p
    else:
        b = tl.where(p_is_big, q_weight, p_weight)
        big_weight = tl.where(p_is_big, p_weight, q_weight)
        t = big_weight + b * r  # mix / big
        of_big = -log_split(t, b * m1)
        of_small = of_big + away * LN_2
        of_p = tl.where(p_is_big, of_big, of_small)
        apart_by_mix = tl.where(p_is_big, m1, -m1) * reciprocal(t)
        if KIND == SKEW_FORWARD:
            term = q * tl.where(p_is_big, of_small, of_big) - p_weight * q_minus_p
            slope = -p_weight * p_weight * apart_by_mix
        elif KIND == SKEW_REVERSE:
            term = p * of_p + q_weight * q_minus_p
            slope = of_p + p_weight * q_weight * apart_by_mix
        else:
            term = big_weight * big * of_big + b * small * of_small
            slope = p_weight * of_p
    return p * slope, term


@triton.jit
def _of_mixture(delta, p_weight, q_weight):
    """Return (r, b r, t, log2 t, p is big), as the module's docstring defines them."""
    p_is_big = delta >= 0.0
    r = tl.exp2(-tl.abs(delta))
    b = tl.where(p_is_big, q_weight, p_weight)
    t = tl.where(p_is_big, p_weight, q_weight) + b * r
    return r, b * r, t, log2_near_1(t), p_is_big


@triton.jit
def _slope(delta, p_weight, q_weight, r, t, log2_t, p_is_big, KIND: tl.constexpr):
    """Return s / `_slope_unit` of the gradient p (s - sum p s), up to a constant of the row; no KL."""
    if KIND == TVD:
        s = tl.where(delta > 0.0, 0.5, tl.where(delta < 0.0, -0.5, delta))  # NaN stays
    elif KIND == JSD:
        s = log2_t + maximum(-delta, 0.0)  # log2(mix / p)
    else:
        rest = (r - 1.0) * reciprocal(t)
        s = tl.where(p_is_big, rest, -rest)  # (q - p) / mix
        if KIND == SKEW_REVERSE:
            s = (p_weight * q_weight) * s - LN_2 * (log2_t + maximum(-delta, 0.0))
    return s


@triton.jit
def _slope_unit(p_weight, KIND: tl.constexpr):
    """Return the factor of the row that `_slope` leaves out."""
    unit = 1.0
    if KIND == JSD:
        unit = -LN_2 * p_weight
    elif KIND == SKEW_FORWARD:
        unit = -p_weight * p_weight
    return unit


@triton.jit
def _plain(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, apart_log2s, p_weight, q_weight, KIND: tl.constexpr):
    """Return (p s / `_slope_unit`, term / -LN_2) for a row with a finite KL of at least CLOSE; TVD: any row."""
    # delta stays finite if one is the lowest float32 or excluded, and is no NaN if both are.
    d_p = maximum(u_p - p_max, rows.FARTHEST)
    d_q = maximum(u_q - q_max, rows.FARTHEST)
    log_p = d_p * c - p_log2s
    log_q = d_q * c - q_log2s
    delta = (d_p - d_q) * c - apart_log2s
    if KIND == TVD:
        p = tl.exp2(log_p)
        slope = _slope(delta, p_weight, q_weight, 0.0, 0.0, 0.0, False, KIND)
        term = (-0.5 / LN_2) * tl.abs(p - tl.exp2(log_q))
    else:
        r, weighted, t, log2_t, p_is_big = _of_mixture(delta, p_weight, q_weight)
        slope = _slope(delta, p_weight, q_weight, r, t, log2_t, p_is_big, KIND)
        if KIND == JSD:
            big = tl.exp2(tl.maximum(log_p, log_q))
            p = tl.where(p_is_big, big, big * r)
            term = big * (t * log2_t + weighted * tl.abs(delta))
        elif KIND == SKEW_FORWARD:
            p = tl.exp2(log_p)
            term = tl.exp2(log_q) * (log2_t + maximum(delta, 0.0))
        else:
            p = tl.exp2(log_p)
            term = p * (log2_t + maximum(-delta, 0.0))
    return p * slope, term


@triton.jit
def _log_ratio(a, b):
    """Return ln(a / b) of positive numbers; relative error <= 3e-7."""
    more = log1p(tl.where(a < b, b / a, a / b) - 1.0)
    return tl.where(a < b, -more, more)


@triton.jit
def _fold(u_p, u_q, inside, c, mp, sp, mq, sq, cross, KIND: tl.constexpr):
    """Fold a tile into the lanes' maxima, sums of exponentials, and the sum of e_p (d_p - d_q).

    That is the sum of e_q (d_q - d_p) for FORWARD_KL. An excluded entry makes it NaN or infinite.
    """
    new_p = tl.maximum(mp, tl.max(tl.max(u_p, axis=2), axis=0))
    new_q = tl.maximum(mq, tl.max(tl.max(u_q, axis=2), axis=0))
    d_p = u_p - new_p[None, :, None]
    d_q = u_q - new_q[None, :, None]
    e_p = tl.exp2(d_p * c)
    e_q = tl.exp2(d_q * c)
    sp, sq, cross = _lowered(mp, sp, mq, sq, cross, c, new_p, new_q, KIND)
    if KIND != TVD:
        terms = e_q * (d_q - d_p) if KIND == FORWARD_KL else e_p * (d_p - d_q)
        if inside is not None:
            terms = tl.where(inside, terms, 0.0)
        cross += rows.lane_sum(terms)
    return new_p, sp + rows.lane_sum(e_p), new_q, sq + rows.lane_sum(e_q), cross


@triton.jit
def _lowered(mp, sp, mq, sq, cross, c, new_p, new_q, KIND: tl.constexpr):
    """Express the sums relative to larger maxima."""
    step_p = tl.maximum(mp - new_p, rows.FARTHEST)
    step_q = tl.maximum(mq - new_q, rows.FARTHEST)
    decay_p = tl.exp2(step_p * c)
    decay_q = tl.exp2(step_q * c)
    if KIND == FORWARD_KL:
        cross = decay_q * (cross + (step_q - step_p) * sq)
    elif KIND != TVD:
        cross = decay_p * (cross + (step_p - step_q) * sp)
    return decay_p * sp, decay_q * sq, cross


@triton.jit
def _merge(c, mp, sp, mq, sq, cross, KIND: tl.constexpr):
    """Merge the statistics of the lanes into those of the row."""
    p_max = tl.max(mp, axis=0)
    q_max = tl.max(mq, axis=0)
    sp, sq, cross = _lowered(mp, sp, mq, sq, cross, c, p_max, q_max, KIND)
    return p_max, tl.sum(sp, axis=0), q_max, tl.sum(sq, axis=0), tl.sum(cross, axis=0)


@triton.jit
def _read(row_ptr, at, inside, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    return rows.read(row_ptr, None, at, inside, softcap, logit_scale, 0.0, HAS_SOFTCAP)[0]


@triton.jit
def _read_whole(row_ptr, start, offs_v, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    return rows.read_whole(row_ptr, None, start, offs_v, softcap, logit_scale, 0.0, HAS_SOFTCAP)[0]


@triton.jit
def paired_divergence_fwd_kernel(
    p_ptr,  # (T, V)
    q_ptr,  # (T, V)
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    given_ptr,  # (T, STATE) float32 or None
    divergence_ptr,  # (T,) float32
    state_ptr,  # (T, STATE) float32
    stride_p_t,
    stride_q_t,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    mix_weight,
    bound,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    row = tl.program_id(0).to(tl.int64)
    counts = row >= 0  # every row
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
    c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP)
    # A masked row has no elements: nothing of it is read.
    vocab = tl.where(counts, vocab_size, 0)
    whole = vocab // TILE * TILE
    p_row = rows.fixed_start(p_ptr, row, stride_p_t, ITEMS)
    q_row = rows.fixed_start(q_ptr, row, stride_q_t, ITEMS)
    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)

    if given_ptr is not None:
        # These are columns of longer rows, and the log-sum-exps are those of the whole rows.
        given = given_ptr + row * STATE
        empty = (tl.load(given) == 0.0) | (counts == 0)
        p_max = tl.load(given + 1)
        q_max = tl.load(given + 2)
        p_log2s = tl.load(given + 3)
        q_log2s = tl.load(given + 4)
        kl = tl.load(given + 5)
        log_ratio = (p_log2s - q_log2s) * LN_2
    else:
        mp = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
        mq = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
        sp = tl.zeros((LANES,), tl.float32)
        sq = tl.zeros((LANES,), tl.float32)
        cross = tl.zeros((LANES,), tl.float32)
        if whole < vocab:
            at = whole + offs_v
            inside = at < vocab
            u_p = _read(p_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
            u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
            mp, sp, mq, sq, cross = _fold(u_p, u_q, inside, c, mp, sp, mq, sq, cross, KIND)
        for start in range(0, whole, TILE):
            u_p = _read_whole(p_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
            u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
            mp, sp, mq, sq, cross = _fold(u_p, u_q, None, c, mp, sp, mq, sq, cross, KIND)
        p_max, p_sum, q_max, q_sum, row_cross = _merge(c, mp, sp, mq, sq, cross, KIND)
        # Masked rows, and a row of only -inf in either stream, have nothing to compare.
        empty = (p_sum == 0.0) | (q_sum == 0.0) | (counts == 0)
        p_log2s = tl.log2(p_sum)
        q_log2s = tl.log2(q_sum)
        log_ratio = _log_ratio(p_sum, q_sum)
        if KIND == FORWARD_KL:
            kl = row_cross / q_sum * nats + log_ratio
        else:
            kl = row_cross / p_sum * nats - log_ratio
    out = kl
    mean = kl
    # An infinite KL is the result of a KL, but no result for a mixture.
    careful = (kl < CLOSE) | (kl != kl)
    if KIND == TVD:
        careful = counts == 2  # no row
    elif KIND != FORWARD_KL and KIND != REVERSE_KL:
        careful = careful | (kl == float("inf"))

    total_sum = tl.zeros((LANES,), tl.float32)
    mean_sum = tl.zeros((LANES,), tl.float32)
    if KIND != FORWARD_KL and KIND != REVERSE_KL:
        if careful == 0:
            p_weight, q_weight = _weights(mix_weight, KIND)
            apart_log2s = p_log2s - q_log2s if KIND == TVD else log_ratio * LOG2_E
            if whole < vocab:
                at = whole + offs_v
                inside = at < vocab
                u_p = _read(p_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
                u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
                ps, term = _plain(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, apart_log2s, p_weight, q_weight, KIND)
                total_sum += rows.lane_sum(tl.where(inside, term, 0.0))
                mean_sum += rows.lane_sum(tl.where(inside, ps, 0.0))
            for start in range(0, whole, TILE):
                u_p = _read_whole(p_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
                u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
                ps, term = _plain(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, apart_log2s, p_weight, q_weight, KIND)
                total_sum += rows.lane_sum(term)
                mean_sum += rows.lane_sum(ps)
            out = -LN_2 * tl.sum(total_sum, axis=0)
            mean = _slope_unit(p_weight, KIND) * tl.sum(mean_sum, axis=0)
    if KIND != TVD:
        if careful:
            for start in range(0, vocab, TILE):
                at = start + offs_v
                inside = at < vocab
                u_p = _read(p_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
                u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
                ps, term = _careful(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, mix_weight, KIND)
                total_sum += rows.lane_sum(term)
                mean_sum += rows.lane_sum(ps)
            out = tl.sum(total_sum, axis=0)
            mean = tl.sum(mean_sum, axis=0)
    if given_ptr is None:
        out = tl.where(out < 0.0, 0.0, out)  # rounding
        out = tl.where(out > bound, bound, out)
    out = tl.where(empty, 0.0, out)
    live = tl.where(empty | (out == float("inf")), 0.0, 1.0)
    tl.store(divergence_ptr + row, out)
    state = state_ptr + row * STATE
    tl.store(state, live)
    tl.store(state + 1, p_max)
    tl.store(state + 2, q_max)
    tl.store(state + 3, p_log2s)
    tl.store(state + 4, q_log2s)
    tl.store(state + 5, mean)


@triton.jit
def _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, p_weight, q_weight, mean, scale, KIND: tl.constexpr):
    """The gradient of an element; `mean` is in units of `_slope_unit`, which is in `scale`."""
    # No NaN if both are excluded.
    d_p = maximum(u_p - p_max, rows.FARTHEST)
    d_q = maximum(u_q - q_max, rows.FARTHEST)
    delta = (d_p - d_q) * c - (p_log2s - q_log2s)
    p = tl.exp2(d_p * c - p_log2s)
    if KIND == FORWARD_KL:
        q = tl.exp2(d_q * c - q_log2s)
        x = delta * LN_2
        near = q * (x * (1.0 + x * (0.5 + x * (1.0 / 6.0))))  # q expm1(x)
        g = tl.where(tl.abs(delta) < NEAR, near, p - q)
    elif KIND == REVERSE_KL:
        g = p * (delta * LN_2 - mean)
    elif KIND == TVD:
        g = p * (_slope(delta, p_weight, q_weight, 0.0, 0.0, 0.0, False, KIND) - mean)
    else:
        r, weighted, t, log2_t, p_is_big = _of_mixture(delta, p_weight, q_weight)
        g = p * (_slope(delta, p_weight, q_weight, r, t, log2_t, p_is_big, KIND) - mean)
    return g * scale * slope


@triton.jit
def paired_divergence_bwd_kernel(
    p_ptr,  # (T, V)
    q_ptr,  # (T, V)
    temperature_ptr,  # (T,) float32 or None
    state_ptr,  # (T, STATE) float32
    grad_ptr,  # (T,) float32
    grad_p_ptr,  # (T, V)
    stride_p_t,
    stride_q_t,
    stride_grad_t,
    vocab_size,
    parts,
    temperature,
    softcap,
    logit_scale,
    mix_weight,
    KIND: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAME_LEAD: tl.constexpr,
    SAME_GRAD_LEAD: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    row = tl.program_id(0).to(tl.int64) // parts
    begin = row * stride_p_t
    lead = (begin % ITEMS).to(tl.int32)
    start_at, part_lead, size = rows.part_of_row(tl.program_id(0) % parts, parts, lead, vocab_size, TILE)
    p_row = rows.row_start(p_ptr, begin, lead, ITEMS, True) + start_at
    q_row = rows.row_start(q_ptr, row * stride_q_t, lead, ITEMS, SAME_LEAD) + start_at
    out_row = rows.row_start(grad_p_ptr, row * stride_grad_t, lead, ITEMS, SAME_GRAD_LEAD)
    out_row += start_at
    whole = size // TILE * TILE
    first, last = rows.edges(part_lead, whole, size)
    first_whole = tl.where(part_lead > 0, TILE, 0)
    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)
    state = state_ptr + row * STATE
    grad = tl.load(grad_ptr + row)
    if (tl.load(state) == 0.0) | (grad == 0.0):  # unread
        none = tl.zeros((VECTORS, LANES, ITEMS), tl.float32)
        for edge in range(first, last):
            at = edge * whole + offs_v
            store(out_row + at, none, mask=(at >= part_lead) & (at < size))
        for start in range(first_whole, whole, TILE):
            store(out_row + start + offs_v, none)
    else:
        c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP)
        p_max = tl.load(state + 1)
        q_max = tl.load(state + 2)
        p_log2s = tl.load(state + 3)
        q_log2s = tl.load(state + 4)
        p_weight, q_weight = _weights(mix_weight, KIND)
        unit = _slope_unit(p_weight, KIND)
        mean = tl.load(state + 5) / unit
        scale = grad * nats * unit
        for edge in range(first, last):
            at = edge * whole + offs_v
            inside = (at >= part_lead) & (at < size)
            u_p, slope = rows.read(p_row, None, at, inside, softcap, logit_scale, 0.0, HAS_SOFTCAP)
            u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
            out = _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, p_weight, q_weight, mean, scale, KIND)
            store(out_row + at, out, mask=inside)
        for start in range(first_whole, whole, TILE):
            u_p, slope = rows.read_whole(p_row, None, start, offs_v, softcap, logit_scale, 0.0, HAS_SOFTCAP)
            u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
            out = _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, p_weight, q_weight, mean, scale, KIND)
            store(out_row + start + offs_v, out)


# -------------------------------------------------------------------------------------- launchers


# float32 JSD with two vectors per lane spills on sm_80.
launch.declare(
    "paired_divergence_fwd",
    {80: launch.LaunchConfig(block_v=1024, num_warps=8), 90: launch.LaunchConfig(block_v=4096, num_warps=8)},
)
# With two, skewed divergences take 147 registers.
launch.declare("paired_divergence_fwd_skew", {80: launch.LaunchConfig(block_v=1024, num_warps=8)})
launch.declare("paired_divergence_bwd", {80: launch.LaunchConfig(block_v=2048, num_warps=8)})


def paired_divergence_fwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    bound: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence (tokens,), state (tokens, STATE)); `bound` is the largest value of the divergence.

    given: (tokens, STATE), the log-sum-exps of longer rows of which the logits are some columns, with
        KL(P || Q) in the last place. The results are then sums over these columns. Not for the KLs.
    """
    tokens, vocab = logits_p.shape
    p, q = rows.unit_stride(logits_p), rows.unit_stride(logits_q)
    out = torch.empty(tokens, dtype=torch.float32, device=p.device)
    state = torch.empty((tokens, STATE.value), dtype=torch.float32, device=p.device)
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("paired_divergence_fwd_skew" if kind.startswith("skew") else "paired_divergence_fwd", p)
        paired_divergence_fwd_kernel[(tokens,)](
            p,
            q,
            rows.contiguous(mask),
            vector,
            given,
            out,
            state,
            p.stride(0),
            q.stride(0),
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            mix_weight,
            bound,
            KIND=KINDS[kind],
            HAS_SOFTCAP=softcap is not None,
            **rows.tile_shape(config, p, rows.rows_aligned(p, q)),
            **config.options,
        )
    return out, state


def paired_divergence_bwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of logits_p, into `out` if given, which may be logits_p; masked rows are known by their state."""
    tokens, vocab = logits_p.shape
    if out is None:
        out = torch.empty((tokens, vocab), dtype=logits_p.dtype, device=logits_p.device)
    p, q = rows.unit_stride(logits_p), rows.unit_stride(logits_q)
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("paired_divergence_bwd", p)
        parts = rows.parts(tokens, vocab, config)
        paired_divergence_bwd_kernel[(tokens * parts,)](
            p,
            q,
            vector,
            state,
            rows.as_float(grad),
            out,
            p.stride(0),
            q.stride(0),
            out.stride(0),
            vocab,
            parts,
            scalar,
            softcap or 1.0,
            logit_scale,
            mix_weight,
            KIND=KINDS[kind],
            HAS_SOFTCAP=softcap is not None,
            SAME_LEAD=rows.same_lead(p, q),
            SAME_GRAD_LEAD=rows.same_lead(p, out),
            **rows.tile_shape(config, p, rows.base_aligned(p, q, out)),
            **config.options,
        )
    return out


# ---------------------------------------------------------------------------------- compile cases


OPTIONS = {"mix_weight": 0.5, "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}


def _compile(kind: str) -> None:
    # A KL has one hot loop, the others two. That of close rows is longer, and is not counted.
    hot = {"visits": 1 if kind.startswith("kl") else 2, "rare": int(kind != "tvd"), "traffic": 2}

    @compile_case(f"paired_divergence_fwd/{kind}", dtypes=FLOAT_DTYPES, streams=2, **hot)
    def _(dtype: torch.dtype) -> None:
        x = meta(4096, 151936, dtype=dtype)
        paired_divergence_fwd(x, x, kind=kind, bound=0.7, **OPTIONS)

    @compile_case(f"paired_divergence_bwd/{kind}", dtypes=FLOAT_DTYPES, streams=2, traffic=3)
    def _(dtype: torch.dtype) -> None:
        x, row = meta(4096, 151936, dtype=dtype), meta(4096)
        paired_divergence_bwd(x, x, meta(4096, 6), row, kind=kind, **OPTIONS)


for _kind in KINDS:
    _compile(_kind)
