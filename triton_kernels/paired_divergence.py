"""paired_divergence: KL or Jensen-Shannon of two rows of logits, and its gradient to the first.

KL(Q || P), KL(P || Q), or JSD with a weight. Passes over (T, V): forward one read of each stream
from memory for the two log-sum-exps, then a second visit of the row, which is in the L2 cache by
then (2 x 297 KiB at bf16, V = 151936); backward one read of each and one write. Exponentials per
element: 2, then 2, then 2.

With delta = log p - log q, formed from u_p - u_q so that close logits subtract exactly, `big` the
larger of p and q, a = |delta| and m1 = e^-a - 1:

    small = big (1 + m1),   q - p = +-big m1,   log(big / mix) = -log(1 + b m1)

with b the weight of the smaller one in the mixture. These keep their relative precision when P and
Q are close, and are exactly 0 when the rows are equal. KL terms are summed as p delta + (q - p),
which is non-negative and does not feel the rounding of the two sums.

Legend: T tokens (packed), V vocabulary. State per row, for the backward: live, max u_p, max u_q,
log2 S_p, log2 S_q, mean of p d with d = delta or log(p / mix). KINDS holds the codes of KIND.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.tile import LN_2, MIN_EXPONENT, expm1_2, log1p, maximum, store

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
KINDS = {"jsd": 0, "kl_forward": 1, "kl_reverse": 2}
JSD = tl.constexpr(0)
REVERSE_KL = tl.constexpr(2)
STATE = tl.constexpr(6)


@triton.jit
def _element(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, beta, KIND: tl.constexpr):
    """(p, q - p, d, term of the divergence); d = log(p / mix) for JSD, else log p - log q."""
    # Two excluded logits would give inf - inf.
    apart = tl.where(u_p == u_q, 0.0, u_p - u_q) - (p_max - q_max)
    delta = apart * c - (p_log2s - q_log2s)
    p_is_big = delta >= 0.0
    away = maximum(tl.where(p_is_big, -delta, delta), MIN_EXPONENT)
    log_p = (u_p - p_max) * c - p_log2s
    log_q = (u_q - q_max) * c - q_log2s
    big = tl.exp2(tl.where(p_is_big, log_p, log_q))
    m1 = expm1_2(away)
    gap = big * m1
    small = big + gap
    p = tl.where(p_is_big, big, small)
    q_minus_p = tl.where(p_is_big, gap, -gap)
    if KIND == JSD:
        b = tl.where(p_is_big, beta, 1.0 - beta)
        of_big = -log1p(b * m1)
        of_small = of_big + away * LN_2
        d = tl.where(p_is_big, of_big, of_small)
        term = (1.0 - b) * big * of_big + b * small * of_small
    else:
        d = delta * LN_2
        # Where the weight is 0 the term is 0 and not 0 * inf; the gap has the NaN of the row.
        if KIND == REVERSE_KL:
            term = tl.where(p > 0.0, p * d, 0.0) + q_minus_p
        else:
            q = tl.where(p_is_big, small, big)
            term = tl.where(q > 0.0, -q * d, 0.0) - q_minus_p
    return p, q_minus_p, d, term


@triton.jit
def _lane_max_sum(u, c, m, s):
    out = rows.fold(u, c, m, s, s, s)
    return out[0], out[1]


@triton.jit
def _row_max_sum(c, m, s):
    out = rows.merge(c, m, s, s, s)
    return out[0], out[1]


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
    divergence_ptr,  # (T,) float32
    state_ptr,  # (T, STATE) float32
    stride_p_t,
    stride_q_t,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    beta,
    jsd_bound,
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

    mp = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
    mq = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
    sp = tl.zeros((LANES,), tl.float32)
    sq = tl.zeros((LANES,), tl.float32)
    if whole < vocab:
        at = whole + offs_v
        inside = at < vocab
        u_p = _read(p_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
        u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
        mp, sp = _lane_max_sum(u_p, c, mp, sp)
        mq, sq = _lane_max_sum(u_q, c, mq, sq)
    for start in range(0, whole, TILE):
        u_p = _read_whole(p_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
        u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
        mp, sp = _lane_max_sum(u_p, c, mp, sp)
        mq, sq = _lane_max_sum(u_q, c, mq, sq)
    p_max, p_sum = _row_max_sum(c, mp, sp)
    q_max, q_sum = _row_max_sum(c, mq, sq)
    # Masked rows, and a row of only -inf in either stream, have nothing to compare.
    empty = (p_sum == 0.0) | (q_sum == 0.0) | (counts == 0)
    p_log2s = tl.log2(p_sum)
    q_log2s = tl.log2(q_sum)

    total_sum = tl.zeros((LANES,), tl.float32)
    mean = tl.zeros((LANES,), tl.float32)
    if whole < vocab:
        at = whole + offs_v
        inside = at < vocab
        u_p = _read(p_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
        u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
        p, gap, d, term = _element(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, beta, KIND)
        total_sum += rows.lane_sum(term)
        mean += rows.lane_sum(tl.where(p > 0.0, p * d, 0.0))
    for start in range(0, whole, TILE):
        u_p = _read_whole(p_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
        u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
        p, gap, d, term = _element(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, beta, KIND)
        total_sum += rows.lane_sum(term)
        mean += rows.lane_sum(tl.where(p > 0.0, p * d, 0.0))
    out = tl.sum(total_sum, axis=0)
    out = tl.where(out < 0.0, 0.0, out)  # rounding
    if KIND == JSD:
        out = tl.where(out > jsd_bound, jsd_bound, out)
    out = tl.where(empty, 0.0, out)
    live = tl.where(empty | (out == float("inf")), 0.0, 1.0)
    tl.store(divergence_ptr + row, out)
    state = state_ptr + row * STATE
    tl.store(state, live)
    tl.store(state + 1, p_max)
    tl.store(state + 2, q_max)
    tl.store(state + 3, p_log2s)
    tl.store(state + 4, q_log2s)
    tl.store(state + 5, tl.sum(mean, axis=0))


@triton.jit
def _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, beta, mean, scale, KIND: tl.constexpr):
    p, q_minus_p, d, term = _element(u_p, u_q, c, p_max, q_max, p_log2s, q_log2s, beta, KIND)
    if KIND == JSD:
        g = (1.0 - beta) * p * (d - mean)
    elif KIND == REVERSE_KL:
        g = tl.where(p > 0.0, p * (d - mean), 0.0 * q_minus_p)
    else:
        g = -q_minus_p
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
    beta,
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
        mean = tl.load(state + 5)
        scale = grad * nats
        for edge in range(first, last):
            at = edge * whole + offs_v
            inside = (at >= part_lead) & (at < size)
            u_p, slope = rows.read(p_row, None, at, inside, softcap, logit_scale, 0.0, HAS_SOFTCAP)
            u_q = _read(q_row, at, inside, softcap, logit_scale, HAS_SOFTCAP)
            out = _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, beta, mean, scale, KIND)
            store(out_row + at, out, mask=inside)
        for start in range(first_whole, whole, TILE):
            u_p, slope = rows.read_whole(p_row, None, start, offs_v, softcap, logit_scale, 0.0, HAS_SOFTCAP)
            u_q = _read_whole(q_row, start, offs_v, softcap, logit_scale, HAS_SOFTCAP)
            out = _gradient(u_p, u_q, slope, c, p_max, q_max, p_log2s, q_log2s, beta, mean, scale, KIND)
            store(out_row + start + offs_v, out)


# -------------------------------------------------------------------------------------- launchers


# float32 JSD with two vectors per lane spills on sm_80.
launch.declare("paired_divergence_fwd", {80: launch.LaunchConfig(block_v=1024, num_warps=8)})
launch.declare("paired_divergence_bwd", {80: launch.LaunchConfig(block_v=2048, num_warps=8)})


def paired_divergence_fwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    beta: float,
    jsd_bound: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence (tokens,), state (tokens, STATE)); `jsd_bound` is the largest JSD there is."""
    tokens, vocab = logits_p.shape
    p, q = rows.unit_stride(logits_p), rows.unit_stride(logits_q)
    out = torch.empty(tokens, dtype=torch.float32, device=p.device)
    state = torch.empty((tokens, STATE.value), dtype=torch.float32, device=p.device)
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("paired_divergence_fwd", p)
        paired_divergence_fwd_kernel[(tokens,)](
            p,
            q,
            rows.contiguous(mask),
            vector,
            out,
            state,
            p.stride(0),
            q.stride(0),
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            beta,
            jsd_bound,
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
    beta: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """The gradient of logits_p; masked rows are known by their state."""
    tokens, vocab = logits_p.shape
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
            beta,
            KIND=KINDS[kind],
            HAS_SOFTCAP=softcap is not None,
            SAME_LEAD=rows.same_lead(p, q),
            SAME_GRAD_LEAD=rows.same_lead(p, out),
            **rows.tile_shape(config, p, rows.base_aligned(p, q, out)),
            **config.options,
        )
    return out


# ---------------------------------------------------------------------------------- compile cases


OPTIONS = {"beta": 0.5, "temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}


def _compile(kind: str) -> None:
    @compile_case(f"paired_divergence_fwd/{kind}", dtypes=FLOAT_DTYPES, streams=2)
    def _(dtype: torch.dtype) -> None:
        x = meta(4096, 151936, dtype=dtype)
        paired_divergence_fwd(x, x, kind=kind, jsd_bound=0.7, **OPTIONS)

    @compile_case(f"paired_divergence_bwd/{kind}", dtypes=FLOAT_DTYPES, streams=2, traffic=3)
    def _(dtype: torch.dtype) -> None:
        x, row = meta(4096, 151936, dtype=dtype), meta(4096)
        paired_divergence_bwd(x, x, meta(4096, 6), row, kind=kind, **OPTIONS)


for _kind in KINDS:
    _compile(_kind)
