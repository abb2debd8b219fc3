"""Statistics of one row of logits in one read with one exponential per element, and its gradient.

With u = f(z) the transformed logit, c = log2(e) / T, m = max u and d = u - m (with a softcap, u is
the hyperbolic tangent itself, and c and 1 / T include the cap):

    e = 2^(c d),   S = sum e,   SD = sum d e,   S2 = sum e^2
    lse = m / T + log S,   logp = d_y / T - log S
    entropy = log S - SD / (S T),   sum_sq = S2 / S^2

The gradient of ga * logp + gh * entropy is, with log p = d / T - log S,

    dz = f'(z) / T ( ga [j = y] - p (ga + gh (log p + entropy)) )
       = f'(z) ( ga / T [j = y] + e (a0 + a1 d) )

so an element needs only two constants per row, a0 and a1. The target's entry uses 1 - p =
-expm1(logp), which keeps its digits as p approaches 1. The backward reads (m, 1 / S) instead of
lse: a float32 lse near 100 has a rounding error of 4e-6, which would be the relative error of every
p.

The sums exclude the target. Let `rest` be the sum over all other elements. If the target is the
maximum (a confident token), logp = -log(1 + rest). A float32 sum S = 1 + rest would lose the digits
of a small rest; the sum without the target keeps them. So the gradient of a confident token is as
accurate as that of any other. The target's tile is processed with a mask, apart from the other
whole tiles, so no other element needs a comparison.

A thread ("lane") keeps the statistics of the elements that it loads itself, in 16-byte vectors. The
threads merge their statistics once per row. Reducing every tile to a scalar would need shuffles,
barriers and selects: 33 instructions per element on sm_90.

The kernels compute d = u - m instead of fma(u, c, -c m): the rounding error of c m would change e
by a factor of up to 2^(1e-7 m), which is infinite for logits near 1e30. And the terms of sum d e
have one sign, so they do not cancel as those of sum u e do.

A row may begin at an address that is not a multiple of 16 bytes, for example with a vocabulary of
49155. The tiles of a backward then begin before the row, at the last multiple; the first `lead`
elements of the first tile do not belong to the row. The tiles of a forward begin with the row: the
elements that a lane adds must not depend on the address, or the result of a row would depend on its
batch. There a vector is a single element (`tile_shape`).
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.launch import LaunchConfig
from tokfuse.triton_kernels.tile import (
    LN_2,
    LOG2_E,
    MIN_EXPONENT,
    NEG_INF,
    NO_HINT,
    expm1_2,
    load,
    log1p,
    maximum,
    reciprocal,
)

# Initial value of every running maximum: the lowest float32. With -inf, (-inf) - (-inf) gives NaN.
LOWEST_MAX = tl.constexpr(-3.4028234663852886e38)
# Lower bound of d, used for an excluded logit. There e is 0, and d e must be 0 too, but -inf * 0
# would be NaN. Its square is finite, as the second moment needs.
FARTHEST = tl.constexpr(-1.0e18)
# Value of a target that belongs to another shard of the vocabulary: no one-hot term is added here.
ELSEWHERE = tl.constexpr(-(2**31))


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr):
    """Return offsets (VECTORS, LANES, ITEMS): a lane loads VECTORS vectors of ITEMS neighbours."""
    vector = tl.arange(0, VECTORS)[:, None, None] * (LANES * ITEMS)
    return vector + tl.arange(0, LANES)[None, :, None] * ITEMS + tl.arange(0, ITEMS)[None, None, :]


@triton.jit
def base2_scale(
    temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr = False
):
    """Return (c, nats), the factors of u from `transform`: exp2(c u) = exp(nats u); NaN if T <= 0."""
    t = temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row)
    return scaled_by_temperature(t, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)


@triton.jit
def scaled_by_temperature(t, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """Return `base2_scale` for temperatures that are already loaded."""
    nats = tl.where(t > 0, 1.0 / t, float("nan"))
    if HAS_SOFTCAP:
        nats *= softcap
    elif not HAS_BIAS:
        nats *= logit_scale
    return nats * LOG2_E, nats


@triton.jit
def capped(z, softcap, logit_scale):
    """Return tanh(logit_scale z / softcap) with one exponential and one reciprocal; NaN stays NaN.

    With E = e^2|x| it is 1 - 2 / (E + 1). Near 0 this has the rounding error of 1, so there
    (E - 1) / (E + 1) is used: E - 1 is exact there.
    """
    exponent = tl.abs(z) * (2.0 * LOG2_E * (logit_scale / softcap))
    e = tl.exp2(exponent)
    r = reciprocal(e + 1.0)
    t = tl.where(exponent < 1.6, (e - 1.0) * r, 1.0 - 2.0 * r)
    sign = z.to(tl.int32, bitcast=True) & -2147483648
    return (t.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def capped_by_fours(z, softcap, logit_scale):
    """Return `capped` of a tile (VECTORS, LANES, ITEMS). Four neighbours share one reciprocal.

    The limit is the special-function units, which need eight issue slots for a reciprocal. With E = e^2x the tangent
    is 1 - 2 / (E + 1). The residual of the reciprocal corrects its rounding errors and that of E + 1. The last bit
    depends on the neighbours, so equal logits may differ. The statistics need `capped`, because they compare logits.
    """
    if z.shape[2] % 4 == 0:
        VECTORS: tl.constexpr = z.shape[0]
        LANES: tl.constexpr = z.shape[1]
        ITEMS: tl.constexpr = z.shape[2]
        exponent = z * (2.0 * LOG2_E * (logit_scale / softcap)) - 1.0
        # The tangent is 1 at the limit, and the product of four numbers is finite.
        half = tl.exp2(tl.minimum(exponent, 29.0, propagate_nan=tl.PropagateNan.ALL))  # E / 2
        x = -0.5 - half
        a, b = tl.split(x.reshape(VECTORS, LANES, ITEMS // 2, 2))
        p, q = tl.split((a * b).reshape(VECTORS, LANES, ITEMS // 4, 2))
        r = reciprocal(p * q)
        of_pair = tl.join(r * q, r * p).reshape(VECTORS, LANES, ITEMS // 2)
        r = tl.join(of_pair * b, of_pair * a).reshape(VECTORS, LANES, ITEMS)  # -2 / (E + 1)
        t = tl.fma(r, tl.fma(half, r, tl.fma(r, 0.5, 1.0)), r + 1.0)
    else:
        t = capped(z, softcap, logit_scale)
    return t


@triton.jit
def row_start(pointer, begin, lead, ITEMS: tl.constexpr, SAME_LEAD: tl.constexpr):
    """Return the start of a row's tiles, `lead` elements before the row.

    It is a multiple of 16 bytes; with SAME_LEAD the compiler knows it.
    """
    start = begin - lead
    if SAME_LEAD:
        start = begin // ITEMS * ITEMS
    return pointer + start


@triton.jit
def fixed_start(pointer, row, stride, ITEMS: tl.constexpr):
    """Return the start of a row. `stride` and the result are multiples of ITEMS for the compiler."""
    return pointer + row * (stride // ITEMS) * ITEMS


@triton.jit
def edges(lead, whole, total):
    """Return the range (first, last) of the tiles that need a mask; edge i begins at i * whole.

    Edge 0 is the first tile if the row begins inside it. Edge 1 is the incomplete last tile, if it
    is not the first one. The tiles between them need no mask.
    """
    first = tl.where(lead > 0, 0, 1)
    last = tl.where((whole < total) & ((whole > 0) | (lead == 0)), 2, 1)
    return first, last


@triton.jit
def target_place(y, lead, vocab_size, counts):
    """Return the position of the target relative to the first tile; -1 without a target."""
    return tl.where((y >= 0) & (y < vocab_size) & counts, lead + y, -1).to(tl.int32)


@triton.jit
def masked_tiles(at_y, lead, whole, total, TILE: tl.constexpr):
    """Return (first, edges, last, start of the target's tile) for a forward.

    range(first, last) are the tiles with a mask: those of `edges`, then the target's tile if it is
    not one of them. The start is `whole` if the target is in an edge, or if there is no target.
    """
    first, end = edges(lead, whole, total)
    between = (at_y >= tl.where(lead > 0, TILE, 0)) & (at_y < whole)
    return first, end, end + between.to(tl.int32), tl.where(between, at_y // TILE * TILE, whole)


@triton.jit
def part_of_row(part, parts, lead, vocab_size, TILE: tl.constexpr):
    """Return (start, lead, size) of one of `parts` equal parts of whole tiles; the last may be empty."""
    total = lead + vocab_size
    piece = (total + TILE * parts - 1) // (TILE * parts) * TILE
    start = part * piece
    return start, tl.where(part == 0, lead, 0), tl.maximum(tl.minimum(piece, total - start), 0)


@triton.jit
def load_whole(row_ptr, start, offs_v, EVICTION: tl.constexpr = NO_HINT):
    """Load the whole tile that begins at `start` as float32, without a mask.

    bfloat16 is read as pairs in 32-bit words. A shift and an `and` make two float32 of a word; casts
    would take three instructions.
    """
    VECTORS: tl.constexpr = offs_v.shape[0]
    LANES: tl.constexpr = offs_v.shape[1]
    ITEMS: tl.constexpr = offs_v.shape[2]
    if row_ptr.dtype.element_ty == tl.bfloat16 and ITEMS > 1:
        words_ptr = row_ptr.to(tl.pointer_type(tl.int32), bitcast=True)
        offs_w = tile_offsets(VECTORS, LANES, ITEMS // 2)
        word = tl.load(words_ptr + start // ITEMS * (ITEMS // 2) + offs_w, eviction_policy=EVICTION)
        low = (word << 16).to(tl.float32, bitcast=True)
        high = (word & -65536).to(tl.float32, bitcast=True)
        z = tl.join(low, high).reshape(VECTORS, LANES, ITEMS)
    else:
        z = tl.load(row_ptr + start + offs_v, eviction_policy=EVICTION).to(tl.float32)
    return z


@triton.jit
def transform(z, bias_row_ptr, at, inside, softcap, logit_scale, bias_scale, HAS_SOFTCAP: tl.constexpr):
    """Return (u, d u / d z) of the logits `z` at offsets `at`; -inf stays -inf.

    With a softcap, the slope of -inf is 0. Both results exclude the factor that `base2_scale`
    includes: the softcap, or the scale of logits without a bias. So with a softcap u is the
    hyperbolic tangent itself, and the difference of two tangents near 1 is exact.
    """
    u, slope = z, 1.0
    if HAS_SOFTCAP:
        u = capped(z, softcap, logit_scale)
        # An excluded logit has the tangent -1, so its slope is 0.
        slope = (1.0 - u * u) * (logit_scale / softcap)
        if bias_row_ptr is not None:
            bias_scale /= softcap
    elif bias_row_ptr is not None:
        u, slope = z * logit_scale, logit_scale
    if bias_row_ptr is not None:
        u -= bias_scale * load(bias_row_ptr + at, mask=inside, other=0.0)
    if HAS_SOFTCAP or bias_row_ptr is not None:
        u = tl.where(z == NEG_INF, NEG_INF, u)
    return u, slope


@triton.jit
def read(
    row_ptr,
    bias_row_ptr,
    at,
    inside,
    softcap,
    logit_scale,
    bias_scale,
    HAS_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr = NO_HINT,
):
    """Load the logits at offsets `at` and return their `transform`; not inside: -inf."""
    z = load(row_ptr + at, inside, NEG_INF, EVICTION)
    return transform(z, bias_row_ptr, at, inside, softcap, logit_scale, bias_scale, HAS_SOFTCAP)


@triton.jit
def read_whole(
    row_ptr,
    bias_row_ptr,
    start,
    offs_v,
    softcap,
    logit_scale,
    bias_scale,
    HAS_SOFTCAP: tl.constexpr,
    EVICTION: tl.constexpr = NO_HINT,
):
    """Load the whole tile that begins at `start` and return its `transform`, without a mask."""
    z = load_whole(row_ptr, start, offs_v, EVICTION)
    return transform(z, bias_row_ptr, start + offs_v, None, softcap, logit_scale, bias_scale, HAS_SOFTCAP)


@triton.jit
def whole_gradient(row_ptr, start, offs_v, softcap, logit_scale, m, c, a0, a1, HAS_SOFTCAP: tl.constexpr):
    """Load the whole tile that begins at `start` for the last time and return its `gradient`."""
    z = load_whole(row_ptr, start, offs_v, "evict_first")
    if HAS_SOFTCAP:
        # An excluded logit needs no test: its tangent is -1, so its slope is 0.
        t = capped_by_fours(z, softcap, logit_scale)
        d, scale = t - m, logit_scale / softcap
        g = tl.exp2(d * c) * (a0 * scale + a1 * scale * d) * (1.0 - t * t)
    else:
        g = gradient(z, 1.0, m, c, a0, a1)
    return g


@triton.jit
def lane_sum(x):
    """Return (LANES,): the sum of each lane over its elements of a tile."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def fold(u, c, m, s, sd, ss):
    """Add a tile (VECTORS, LANES, ITEMS) to the statistics (m, s, sd, ss) of the lanes.

    Also returns (step, decay, d, e), which the optional sums need.
    """
    new_m = tl.maximum(m, tl.max(tl.max(u, axis=2), axis=0))
    step = tl.maximum(m - new_m, FARTHEST)
    decay = tl.exp2(step * c)
    d = maximum(u - new_m[None, :, None], FARTHEST)
    e = tl.exp2(d * c)
    sd = decay * (sd + step * s) + lane_sum(d * e)
    s = decay * s + lane_sum(e)
    ss = decay * decay * ss + lane_sum(e * e)
    return new_m, s, sd, ss, step, decay, d, e


@triton.jit
def merge(c, m, s, sd, ss):
    """Return (m, S, SD, S2) of the row from those of its lanes, and (step, decay) of each lane."""
    row_m = tl.max(m, axis=0)
    step = tl.maximum(m - row_m, FARTHEST)
    decay = tl.exp2(step * c)
    row_sd = tl.sum(decay * (sd + step * s), axis=0)
    row_ss = tl.sum(decay * decay * ss, axis=0)
    return row_m, tl.sum(decay * s, axis=0), row_sd, row_ss, step, decay


@triton.jit
def with_target(u_y, c, m, s, sd, ss):
    """Add the target to the sums over all other elements: (m, S - 1, SD, S2, d_y, step, decay).

    If the target is the maximum, S - 1 keeps the digits of the other elements. u_y is the target's
    logit, or -inf without a target. S - 1 is -1 if all logits are -inf. (step, decay) rescale the
    sums over the other elements.
    """
    row_m = tl.maximum(m, u_y)
    step = tl.maximum(m - row_m, FARTHEST)
    decay = tl.exp2(step * c)
    d_y = u_y - row_m
    d = maximum(d_y, FARTHEST)
    e = tl.exp2(d * c)
    row_sd = decay * (sd + step * s) + d * e
    return row_m, decay * s + (e - 1.0), row_sd, decay * decay * ss + e * e, d_y, step, decay


@triton.jit
def log_sum(rest):
    """Return log S from S - 1; NaN stays NaN."""
    return tl.where(rest == rest, log1p(rest), rest)


@triton.jit
def finish(m, rest, sd, ss, d_y, has_target, keep, nats):
    """Return (logp, entropy, lse, sum_sq, top1, m, 1 / S) from `with_target`; 0 if not keep."""
    dead = rest == -1.0  # all logits are -inf: there is no distribution
    zero = dead | (keep == 0)
    log_s = log_sum(rest)
    inv_sum = tl.where(zero, 0.0, 1.0 / (1.0 + rest))
    logp = tl.where(dead & has_target, NEG_INF, tl.where(has_target, d_y * nats - log_s, float("nan")))
    lse = tl.where(dead, NEG_INF, m * nats + log_s)
    return (
        tl.where(keep, logp, 0.0),
        tl.where(zero, 0.0, log_s - sd * inv_sum * nats),
        tl.where(keep, lse, 0.0),
        tl.where(zero, 0.0, ss * inv_sum * inv_sum),
        tl.where((d_y >= 0.0) & (zero == 0), 1.0, 0.0),
        tl.where(zero, 0.0, m),
        inv_sum,
    )


@triton.jit
def gradient_constants(nats, inv_sum, entropy, ga, gh):
    """Return (a0, a1) of the module docstring; `gradient` multiplies by the slope of `transform`."""
    p_scale = nats * inv_sum
    log_s = -tl.log2(inv_sum) * LN_2
    return -p_scale * (ga + gh * (entropy - log_s)), -p_scale * gh * nats


@triton.jit
def gradient(u, slope, m, c, a0, a1):
    """Return the gradient of each element; the target's entry is `target_gradient`."""
    d = maximum(u - m, FARTHEST)
    return tl.exp2(d * c) * (a0 + a1 * d) * slope


@triton.jit
def target_gradient(slope, nats, logp, entropy, ga, gh):
    """Return the target's entry. `gradient` plus nats * ga would cancel near p = 1."""
    log2_p = maximum(logp * LOG2_E, MIN_EXPONENT)
    rest = -expm1_2(log2_p)  # 1 - p
    log_term = tl.where(logp == NEG_INF, 0.0, tl.exp2(log2_p) * (logp + entropy))
    return slope * nats * (ga * rest - gh * log_term)


# ------------------------------------------------------------------------------------- on the host


# Programs that fill any GPU several times. A batch of fewer rows is split into parts of rows.
ENOUGH_PROGRAMS = 4096


def tile_shape(config: LaunchConfig, logits: torch.Tensor, aligned: bool) -> dict[str, int]:
    """Return VECTORS, LANES and ITEMS of `tile_offsets`: one lane per thread, 16 bytes per vector.

    If the vectors are not known to be aligned, a vector is a single element. Otherwise the compiler
    would choose a layout in which every tile exchanges data between lanes: 44 instructions per
    element.
    """
    items = 16 // logits.element_size()
    lanes = 32 * config.num_warps
    vectors = max(1, config.block_v // (lanes * items))
    if not aligned:
        vectors, items = vectors * items, 1
    return {"VECTORS": vectors, "LANES": lanes, "ITEMS": items}


def parts(tokens: int, vocab: int, config: LaunchConfig) -> int:
    """Return the number of parts that a row is split into, so that there are enough programs."""
    return max(1, min(triton.cdiv(ENOUGH_PROGRAMS, tokens), triton.cdiv(vocab, config.block_v)))


def unit_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return `x`, or a copy if its vocabulary axis is not contiguous."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def base_aligned(*tensors: torch.Tensor | None) -> bool:
    """Return True if each tensor begins at a multiple of 16 bytes."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def rows_aligned(*tensors: torch.Tensor | None) -> bool:
    """Return True if every row of each tensor begins at a multiple of 16 bytes."""
    apart = (0 if x is None else x.stride(0) * x.element_size() for x in tensors)
    return base_aligned(*tensors) and all(n % 16 == 0 for n in apart)


def same_lead(x: torch.Tensor, other: torch.Tensor | None) -> bool:
    """Return True if the rows of `other` have the same offset within a vector as those of `x`.

    A vector is 16 bytes of `x`. If `other` has another dtype, all rows of both must begin at the
    first element of a vector.
    """
    if other is None:
        return False
    items = 16 // x.element_size()
    if other.dtype != x.dtype:
        return x.stride(0) % items == 0 and other.stride(0) % items == 0
    return (x.stride(0) - other.stride(0)) % items == 0


def per_row(value: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Split an option into (contiguous float32 vector or None, number)."""
    if isinstance(value, torch.Tensor):
        return value.float().contiguous(), 1.0
    return None, value


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return `x`, or a contiguous copy of it; None stays None."""
    return None if x is None else x.contiguous()


def as_float(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return `x` in float32 and contiguous; None stays None."""
    return None if x is None else x.float().contiguous()
