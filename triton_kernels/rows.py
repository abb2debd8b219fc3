"""Statistics of one row of logits in one read with one exp per element, and its gradient.

With u = f(z) the transformed logit, c = log2(e) / T, m = max u and d = u - m (under a softcap u is
the tangent, and the cap is in c and in 1 / T):

    e = 2^(c d),   S = sum e,   SD = sum d e,   S2 = sum e^2
    lse = m / T + log S,   logp = d_y / T - log S
    entropy = log S - SD / (S T),   sum_sq = S2 / S^2

The gradient of ga * logp + gh * entropy is, with log p = d / T - log S,

    dz = f'(z) / T ( ga [j = y] - p (ga + gh (log p + entropy)) )
       = f'(z) ( ga / T [j = y] + e (a0 + a1 d) )

so two constants per row are all that an element needs; the target itself has 1 - p = -expm1(logp).
(m, 1 / S) are kept for it and not lse: lse near 100 has 4e-6 of float32 rounding, which would be the
relative error of every p.

Why the sums leave the target out: in float32, S = 1 + 1e-7 says nothing about the rest. Without the
target they hold the rest to all its digits, and where the target is the maximum, as a confident one
is, logp = -log(1 + rest): the gradient of a confident token is as exact as that of any other. Tiles
that need no mask do without the one that the target lies in, so no element pays for it.

Why lanes: reducing every tile to a scalar costs shuffles, barriers and selects, 33 instructions per
element on sm_90. Here a thread keeps the statistics of the elements that it loads itself, in
16-byte vectors, and threads meet once per row. Why d = u - m and not fma(u, c, -c m): the rounding
of c m is an error of 2^(1e-7 m) in e, infinite for logits near 1e30. Sums of d e do not cancel as
those of u e do.

Rows that begin at no multiple of 16 bytes (a vocabulary of 49155): a backward's tiles begin before
the row, at the multiple that is; `lead` elements of the first tile are not its own. A forward's
begin with the row, because which lane adds which elements must not depend on where a row lies, or
its bits would depend on the batch that it is in; there a vector is one element (`tile_shape`).
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

# Every running maximum starts here, the lowest float32: -inf would make (-inf) - (-inf).
LOWEST_MAX = tl.constexpr(-3.4028234663852886e38)
# Stands for d of an excluded logit: e is 0 there and d e must be, too, where -inf * 0 is NaN.
# Its square is finite, for the second moment.
FARTHEST = tl.constexpr(-1.0e18)
# A target that lies in another shard of the vocabulary: the gradient has no one-hot term here.
ELSEWHERE = tl.constexpr(-(2**31))


@triton.jit
def tile_offsets(VECTORS: tl.constexpr, LANES: tl.constexpr, ITEMS: tl.constexpr):
    """(VECTORS, LANES, ITEMS): a thread is a lane, and loads VECTORS times ITEMS neighbours."""
    vector = tl.arange(0, VECTORS)[:, None, None] * (LANES * ITEMS)
    return vector + tl.arange(0, LANES)[None, :, None] * ITEMS + tl.arange(0, ITEMS)[None, None, :]


@triton.jit
def base2_scale(
    temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr = False
):
    """(c, c in nats): what u of `transform` is multiplied by; NaN where T <= 0."""
    t = temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + row)
    return scaled_by_temperature(t, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)


@triton.jit
def scaled_by_temperature(t, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr, HAS_BIAS: tl.constexpr):
    """`base2_scale` of temperatures that are loaded."""
    nats = tl.where(t > 0, 1.0 / t, float("nan"))
    if HAS_SOFTCAP:
        nats *= softcap
    elif not HAS_BIAS:
        nats *= logit_scale
    return nats * LOG2_E, nats


@triton.jit
def capped(z, softcap, logit_scale):
    """tanh(logit_scale z / softcap), with one exponential and one reciprocal; NaN stays NaN.

    With E = e^2|x| it is 1 - 2 / (E + 1), whose rounding is that of 1, so that near 0 the quotient
    (E - 1) / (E + 1) takes its place: E - 1 is exact there.
    """
    exponent = tl.abs(z) * (2.0 * LOG2_E * (logit_scale / softcap))
    e = tl.exp2(exponent)
    r = reciprocal(e + 1.0)
    t = tl.where(exponent < 1.6, (e - 1.0) * r, 1.0 - 2.0 * r)
    sign = z.to(tl.int32, bitcast=True) & -2147483648
    return (t.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)


@triton.jit
def row_start(pointer, begin, lead, ITEMS: tl.constexpr, SAME_LEAD: tl.constexpr):
    """Where the tiles of a row begin, `lead` before it: on 16 bytes, known so if SAME_LEAD."""
    start = begin - lead
    if SAME_LEAD:
        start = begin // ITEMS * ITEMS
    return pointer + start


@triton.jit
def fixed_start(pointer, row, stride, ITEMS: tl.constexpr):
    """Where a row begins, known to be a multiple of ITEMS, as `stride` is."""
    return pointer + row * (stride // ITEMS) * ITEMS


@triton.jit
def edges(lead, whole, total):
    """range(first, last) of edges; edge i begins at i * whole.

    Edge 0 is the first tile where the row begins inside it, edge 1 a tail that is not the first
    tile. The tiles between need no mask.
    """
    first = tl.where(lead > 0, 0, 1)
    last = tl.where((whole < total) & ((whole > 0) | (lead == 0)), 2, 1)
    return first, last


@triton.jit
def target_place(y, lead, vocab_size, counts):
    """Where the target lies, counted as the tiles are; -1 where there is none."""
    return tl.where((y >= 0) & (y < vocab_size) & counts, lead + y, -1).to(tl.int32)


@triton.jit
def masked_tiles(at_y, lead, whole, total, TILE: tl.constexpr):
    """(first, edges, last, target's tile) of a forward: range(first, last) of the tiles it masks.

    They are those of `edges`, and where the target lies between these its tile as a last one. That
    begins at `whole` where the target is in an edge, or nowhere.
    """
    first, end = edges(lead, whole, total)
    between = (at_y >= tl.where(lead > 0, TILE, 0)) & (at_y < whole)
    return first, end, end + between.to(tl.int32), tl.where(between, at_y // TILE * TILE, whole)


@triton.jit
def part_of_row(part, parts, lead, vocab_size, TILE: tl.constexpr):
    """(start, lead, size) of one of `parts` equal pieces of whole tiles; the last may be empty."""
    total = lead + vocab_size
    piece = (total + TILE * parts - 1) // (TILE * parts) * TILE
    start = part * piece
    return start, tl.where(part == 0, lead, 0), tl.maximum(tl.minimum(piece, total - start), 0)


@triton.jit
def load_whole(row_ptr, start, offs_v, EVICTION: tl.constexpr = NO_HINT):
    """float32 of the tile that begins at `start`, none of it masked.

    bfloat16 is read as pairs in a word, of which a shift and an and make two float32; a cast takes
    three instructions for the two.
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
    """(u, d u / d z) of logits at offsets `at`; -inf stays -inf, without slope under a softcap.

    Both leave out what `base2_scale` holds: the softcap, or the scale of logits without bias. So u
    is the hyperbolic tangent itself, and logits that it brings close subtract exactly.
    """
    u, slope = z, 1.0
    if HAS_SOFTCAP:
        u = capped(z, softcap, logit_scale)
        # Of an excluded logit it is 0: the tangent is 1.
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
    """`transform` of the logits at offsets `at`; outside of the row they are -inf."""
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
    """`transform` of the tile that begins at `start`, none of it masked."""
    z = load_whole(row_ptr, start, offs_v, EVICTION)
    return transform(z, bias_row_ptr, start + offs_v, None, softcap, logit_scale, bias_scale, HAS_SOFTCAP)


@triton.jit
def lane_sum(x):
    """(LANES,): each lane's sum over its elements of a tile."""
    return tl.sum(tl.sum(x, axis=2), axis=0)


@triton.jit
def fold(u, c, m, s, sd, ss):
    """Fold a tile (VECTORS, LANES, ITEMS) into the lanes' statistics; also (step, decay, d, e)."""
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
    """(m, S, SD, S2) of the row from those of its lanes; also (step, decay) of each lane."""
    row_m = tl.max(m, axis=0)
    step = tl.maximum(m - row_m, FARTHEST)
    decay = tl.exp2(step * c)
    row_sd = tl.sum(decay * (sd + step * s), axis=0)
    row_ss = tl.sum(decay * decay * ss, axis=0)
    return row_m, tl.sum(decay * s, axis=0), row_sd, row_ss, step, decay


@triton.jit
def with_target(u_y, c, m, s, sd, ss):
    """(m, S - 1, SD, S2, d_y) of the row from those of all others; also (step, decay) of these.

    S - 1 keeps the digits of the others where the target is the maximum. u_y is -inf where there is
    no target; S - 1 is -1 where there is nothing at all.
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
    """log S of S - 1; NaN stays NaN."""
    return tl.where(rest == rest, log1p(rest), rest)


@triton.jit
def finish(m, rest, sd, ss, d_y, has_target, keep, nats):
    """(logp, entropy, lse, sum_sq, top1, m, 1 / S) of `with_target`; 0 where not keep."""
    dead = rest == -1.0  # only -inf: no distribution
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
    """(a0, a1) of the module's docstring; multiply by the slope f'(z) / scale of `base2_scale`."""
    p_scale = nats * inv_sum
    log_s = -tl.log2(inv_sum) * LN_2
    return -p_scale * (ga + gh * (entropy - log_s)), -p_scale * gh * nats


@triton.jit
def gradient(u, slope, m, c, a0, a1):
    """What every element of a row gets but the target."""
    d = maximum(u - m, FARTHEST)
    return tl.exp2(d * c) * (a0 + a1 * d) * slope


@triton.jit
def target_gradient(slope, nats, logp, entropy, ga, gh):
    """What the target gets; `gradient` and nats * ga would cancel near p = 1."""
    log2_p = maximum(logp * LOG2_E, MIN_EXPONENT)
    rest = -expm1_2(log2_p)  # 1 - p
    log_term = tl.where(logp == NEG_INF, 0.0, tl.exp2(log2_p) * (logp + entropy))
    return slope * nats * (ga * rest - gh * log_term)


# ------------------------------------------------------------------------------------- on the host


# Programs that fill every GPU a few times over; a batch of fewer rows is cut into parts of rows.
ENOUGH_PROGRAMS = 4096


def tile_shape(config: LaunchConfig, logits: torch.Tensor, aligned: bool) -> dict[str, int]:
    """VECTORS, LANES and ITEMS of `tile_offsets`: one lane per thread, 16 bytes per vector.

    Vectors that the compiler cannot know to be aligned would be loaded in a layout in which lanes
    meet in every tile, 44 instructions per element; they are single elements instead.
    """
    items = 16 // logits.element_size()
    lanes = 32 * config.num_warps
    vectors = max(1, config.block_v // (lanes * items))
    if not aligned:
        vectors, items = vectors * items, 1
    return {"VECTORS": vectors, "LANES": lanes, "ITEMS": items}


def parts(tokens: int, vocab: int, config: LaunchConfig) -> int:
    """Into how many pieces a row is cut, so that there are enough programs."""
    return max(1, min(triton.cdiv(ENOUGH_PROGRAMS, tokens), triton.cdiv(vocab, config.block_v)))


def unit_stride(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x`, copied where its vocabulary is not contiguous."""
    return x if x is None or x.stride(1) == 1 else x.contiguous()


def base_aligned(*tensors: torch.Tensor | None) -> bool:
    """True where each begins at a multiple of 16 bytes."""
    return all(x is None or x.data_ptr() % 16 == 0 for x in tensors)


def rows_aligned(*tensors: torch.Tensor | None) -> bool:
    """True where every row of each does."""
    apart = (0 if x is None else x.stride(0) * x.element_size() for x in tensors)
    return base_aligned(*tensors) and all(n % 16 == 0 for n in apart)


def same_lead(x: torch.Tensor, other: torch.Tensor | None) -> bool:
    """True where rows of `other` begin at the same place within a vector as those of `x`.

    A vector is what `x` has in 16 bytes; `other` may have another dtype where all rows begin on
    one.
    """
    if other is None:
        return False
    items = 16 // x.element_size()
    if other.dtype != x.dtype:
        return x.stride(0) % items == 0 and other.stride(0) % items == 0
    return (x.stride(0) - other.stride(0)) % items == 0


def per_row(value: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """(contiguous float32 vector or None, number) of an option that may be either."""
    if isinstance(value, torch.Tensor):
        return value.float().contiguous(), 1.0
    return None, value


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` without strides."""
    return None if x is None else x.contiguous()


def as_float(x: torch.Tensor | None) -> torch.Tensor | None:
    """`x` in float32, contiguous."""
    return None if x is None else x.float().contiguous()
