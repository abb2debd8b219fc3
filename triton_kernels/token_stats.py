"""token_stats: five statistics of each row of logits, and the gradient of logp, entropy, lse
and logit_sum.

rows.py has the formulas. The forward reads (T, V) once. The backward reads and writes it once; a
row without gradient is filled with zeros and not read. Bytes per token at bf16: 2V forward, 4V
backward. One exponential per element in each; a second temperature adds one, the moments add two
multiplications.

Legend: T tokens (packed), V vocabulary. Arithmetic is float32; exponents are in base 2. The grid
has one dimension: one program per row (forward) or per part of a row (backward). A target outside
[0, V) gives NaN in logp and in the gradient of the row: an error would need a synchronisation with
the device. Only the backward accepts the target ELSEWHERE: it belongs to another shard of the
vocabulary.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.tile import LOG2_E, MIN_EXPONENT, NEG_INF, maximum, store

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _fold_extras(step, decay, c2, d, e, ss, s2, ssd, ssdd, SECOND: tl.constexpr, MOMENTS: tl.constexpr):
    """Add a tile to the optional sums of the lanes. `ss` is the value before the tile was added."""
    if SECOND:
        s2 = tl.exp2(step * c2) * s2 + rows.lane_sum(tl.exp2(d * c2))
    if MOMENTS:
        # Expand (d + step)^2 for the sums so far, then add the tile.
        ssdd = decay * decay * (ssdd + step * (2.0 * ssd + step * ss))
        ssdd += rows.lane_sum(d * e * (d * e))
        ssd = decay * decay * (ssd + step * ss) + rows.lane_sum(d * e * e)
    return s2, ssd, ssdd


@triton.jit
def _weighted(x, class_weight_ptr, at, inside):
    """Return x times the weights of the columns `at`; 0 for columns that are not inside."""
    if class_weight_ptr is not None:
        x = x * tl.load(class_weight_ptr + at, mask=inside)
    if inside is not None:
        x = tl.where(inside, x, 0.0)
    return x


@triton.jit
def token_stats_fwd_kernel(
    logits_ptr,  # (T, V)
    bias_ptr,  # (T, V) or None
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    logp_ptr,  # (T,) float32; the same for all that follow
    entropy_ptr,
    lse_ptr,
    sum_sq_ptr,
    top1_ptr,
    row_max_ptr,
    inv_sum_ptr,
    second_logp_ptr,  # or None
    sum_p2_logp_ptr,  # or None
    sum_p2_logp2_ptr,  # or None
    class_weight_ptr,  # (V,) float32, or None: 1 for every class
    logit_sum_ptr,  # or None
    stride_logits_t,
    stride_bias_t,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    bias_scale,
    second_temperature,
    HAS_SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    row = tl.program_id(0).to(tl.int64)  # T * V can exceed 2^31
    SECOND: tl.constexpr = second_logp_ptr is not None
    MOMENTS: tl.constexpr = sum_p2_logp_ptr is not None
    SUM: tl.constexpr = logit_sum_ptr is not None
    counts = row >= 0  # every row
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
    c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)
    c2, nats2 = rows.base2_scale(None, row, second_temperature, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)

    # A masked row is treated as a row without elements, so it is not read. Its outputs are set to 0.
    vocab = tl.where(counts, vocab_size, 0)
    whole = vocab // TILE * TILE
    row_ptr = rows.fixed_start(logits_ptr, row, stride_logits_t, ITEMS)
    bias_row_ptr = None
    if bias_ptr is not None:
        bias_row_ptr = rows.fixed_start(bias_ptr, row, stride_bias_t, ITEMS)
    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)
    m = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
    # Sums over all elements except the target.
    s = tl.zeros((LANES,), tl.float32)  # sum e
    sd = tl.zeros((LANES,), tl.float32)  # sum d e
    ss = tl.zeros((LANES,), tl.float32)  # sum e^2
    s2 = tl.zeros((LANES,), tl.float32)  # sum 2^(c2 d)
    ssd = tl.zeros((LANES,), tl.float32)  # sum d e^2
    ssdd = tl.zeros((LANES,), tl.float32)  # sum d^2 e^2
    wu = tl.zeros((LANES,), tl.float32)  # sum class_weight u, with the target

    y = tl.load(target_ptr + row)
    at_y = rows.target_place(y, 0, vocab_size, counts)
    _, _, _, of_target = rows.masked_tiles(at_y, 0, whole, vocab, TILE)
    begin = 0
    # i = 0: whole tiles without a mask, then the target's tile. i = 1: the other whole tiles, then
    # the incomplete last tile if it is not the target's.
    for i in tl.static_range(2):
        masked = whole if i else of_target
        for start in range(begin, masked, TILE):
            u, slope = rows.read_whole(
                row_ptr, bias_row_ptr, start, offs_v, softcap, logit_scale, bias_scale, HAS_SOFTCAP
            )
            if SUM:
                wu += rows.lane_sum(_weighted(u, class_weight_ptr, start + offs_v, None))
            old_ss = ss
            m, s, sd, ss, step, decay, d, e = rows.fold(u, c, m, s, sd, ss)
            s2, ssd, ssdd = _fold_extras(step, decay, c2, d, e, old_ss, s2, ssd, ssdd, SECOND, MOMENTS)
        if (begin <= masked) & (masked < vocab):
            at = masked + offs_v
            u, slope = rows.read(row_ptr, bias_row_ptr, at, at < vocab, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
            if SUM:
                wu += rows.lane_sum(_weighted(u, class_weight_ptr, at, at < vocab))
            u = tl.where(at == at_y, NEG_INF, u)
            old_ss = ss
            m, s, sd, ss, step, decay, d, e = rows.fold(u, c, m, s, sd, ss)
            s2, ssd, ssdd = _fold_extras(step, decay, c2, d, e, old_ss, s2, ssd, ssdd, SECOND, MOMENTS)
        begin = of_target + TILE

    m, s, sd, row_ss, step, decay = rows.merge(c, m, s, sd, ss)
    has_target = at_y >= 0
    u_y, slope_y = rows.read(row_ptr, bias_row_ptr, y, has_target, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
    m, rest, sd, all_ss, d_y, row_step, row_decay = rows.with_target(u_y, c, m, s, sd, row_ss)
    logp, entropy, lse, sum_sq, top1, row_m, inv_sum = rows.finish(m, rest, sd, all_ss, d_y, has_target, counts, nats)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse)
    tl.store(sum_sq_ptr + row, sum_sq)
    tl.store(top1_ptr + row, top1)
    tl.store(row_max_ptr + row, row_m)
    tl.store(inv_sum_ptr + row, inv_sum)
    if SUM:
        tl.store(logit_sum_ptr + row, tl.where(counts, nats * tl.sum(wu, axis=0), 0.0))
    dead = rest == -1.0
    d = maximum(d_y, rows.FARTHEST)
    if SECOND:
        rest2 = tl.exp2(row_step * c2) * tl.sum(tl.exp2(step * c2) * s2, axis=0) + (tl.exp2(d * c2) - 1.0)
        second = tl.where(has_target, d_y * nats2 - rows.log_sum(rest2), float("nan"))
        tl.store(second_logp_ptr + row, tl.where(counts, tl.where(dead & has_target, NEG_INF, second), 0.0))
    if MOMENTS:
        # Rescale the sums of the lanes to one maximum, then to that of the row with the target; the
        # formulas are those of _fold_extras.
        two, row_two = decay * decay, row_decay * row_decay
        row_ssd = tl.sum(two * (ssd + step * ss), axis=0)
        row_ssdd = tl.sum(two * (ssdd + step * (2.0 * ssd + step * ss)), axis=0)
        de = d * tl.exp2(d * c)
        p_dd = row_two * (row_ssdd + row_step * (2.0 * row_ssd + row_step * row_ss)) + de * de
        p_dd = p_dd * (nats * inv_sum) * (nats * inv_sum)
        p_d = (row_two * (row_ssd + row_step * row_ss) + de * tl.exp2(d * c)) * nats * inv_sum * inv_sum
        log_s = rows.log_sum(rest)
        zero = inv_sum == 0.0
        tl.store(sum_p2_logp_ptr + row, tl.where(zero, 0.0, p_d - log_s * sum_sq))
        p2_logp2 = p_dd - log_s * (2.0 * p_d - log_s * sum_sq)
        tl.store(sum_p2_logp2_ptr + row, tl.where(zero, 0.0, p2_logp2))


@triton.jit
def token_stats_bwd_kernel(
    logits_ptr,  # (T, V)
    bias_ptr,  # (T, V) or None
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    row_max_ptr,  # (T,) float32; the same for the next three
    inv_sum_ptr,
    logp_ptr,
    entropy_ptr,
    grad_logp_ptr,  # (T,) float32 or None
    grad_entropy_ptr,  # (T,) float32 or None
    grad_lse_ptr,  # (T,) float32 or None
    grad_logit_sum_ptr,  # (T,) float32 or None
    class_weight_ptr,  # (V,) float32, or None: 1 for every class
    grad_logits_ptr,  # (T, V), may be logits: each element is read before it is written
    stride_logits_t,
    stride_bias_t,
    stride_grad_t,
    vocab_size,
    parts,
    temperature,
    softcap,
    logit_scale,
    bias_scale,
    HAS_SOFTCAP: tl.constexpr,
    SAME_LEAD: tl.constexpr,
    SAME_GRAD_LEAD: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    row = tl.program_id(0).to(tl.int64) // parts
    SUM: tl.constexpr = grad_logit_sum_ptr is not None
    ga, gh, gl, gu = 0.0, 0.0, 0.0, 0.0
    if grad_logp_ptr is not None:
        ga = tl.load(grad_logp_ptr + row)
    if grad_entropy_ptr is not None:
        gh = tl.load(grad_entropy_ptr + row)
    if grad_lse_ptr is not None:
        gl = tl.load(grad_lse_ptr + row)
    if SUM:
        gu = tl.load(grad_logit_sum_ptr + row)
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
        ga, gh = tl.where(counts, ga, 0.0), tl.where(counts, gh, 0.0)
        gl, gu = tl.where(counts, gl, 0.0), tl.where(counts, gu, 0.0)
    inv_sum = tl.load(inv_sum_ptr + row)

    begin = row * stride_logits_t
    lead = (begin % ITEMS).to(tl.int32)
    row_ptr = rows.row_start(logits_ptr, begin, lead, ITEMS, True)
    bias_row_ptr = None
    if bias_ptr is not None:
        bias_row_ptr = rows.row_start(bias_ptr, row * stride_bias_t, lead, ITEMS, SAME_LEAD)
    grad_row_ptr = rows.row_start(grad_logits_ptr, row * stride_grad_t, lead, ITEMS, SAME_GRAD_LEAD)
    part_start, part_lead, size = rows.part_of_row(tl.program_id(0) % parts, parts, lead, vocab_size, TILE)
    whole = size // TILE * TILE
    first, last = rows.edges(part_lead, whole, size)
    first_whole = tl.where(part_lead > 0, TILE, 0)
    row_ptr += part_start
    grad_row_ptr += part_start
    if bias_ptr is not None:
        bias_row_ptr += part_start
    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)

    # The gradient is zero for clipped, zero-advantage and masked tokens, and for a row of only -inf.
    # Such rows are not read.
    if ((ga == 0.0) & (gh == 0.0) & (gl == 0.0) & (gu == 0.0)) | (inv_sum == 0.0):
        none = tl.zeros((VECTORS, LANES, ITEMS), tl.float32)
        for edge in range(first, last):
            at = edge * whole + offs_v
            store(grad_row_ptr + at, none, mask=(at >= part_lead) & (at < size))
        for start in range(first_whole, whole, TILE):
            store(grad_row_ptr + start + offs_v, none)
    else:
        c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)
        m = tl.load(row_max_ptr + row)
        y = tl.load(target_ptr + row)
        known = ((y >= 0) & (y < vocab_size)) | (y == rows.ELSEWHERE)
        ga = tl.where((ga == 0.0) | known, ga, float("nan"))
        entropy = tl.load(entropy_ptr + row)
        a0, a1 = rows.gradient_constants(nats, inv_sum, entropy, ga, gh)
        if grad_lse_ptr is not None:
            a0 += nats * inv_sum * gl
        first_column = part_start - lead  # column of the element at offset 0 of the part
        # The target's entry is stored separately, so that no other element needs a comparison. Its
        # slope is computed before the tiles are written, because they may overwrite the logits.
        at_y = lead + y - part_start
        has_y = (at_y >= part_lead) & (at_y < size)
        u_y, slope_y = rows.read(row_ptr, bias_row_ptr, at_y, has_y, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
        if HAS_SOFTCAP:
            tl.debug_barrier()
        for edge in range(first, last):
            at = edge * whole + offs_v
            inside = (at >= part_lead) & (at < size)
            u, slope = rows.read(row_ptr, bias_row_ptr, at, inside, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
            dz = rows.gradient(u, slope, m, c, a0, a1)
            if SUM:
                dz += _weighted(nats * gu * slope, class_weight_ptr, at + first_column, inside)
            store(grad_row_ptr + at, dz, mask=inside)
        for start in range(first_whole, whole, TILE):
            u, slope = rows.read_whole(
                row_ptr, bias_row_ptr, start, offs_v, softcap, logit_scale, bias_scale, HAS_SOFTCAP
            )
            dz = rows.gradient(u, slope, m, c, a0, a1)
            if SUM:
                dz += _weighted(nats * gu * slope, class_weight_ptr, start + offs_v + first_column, None)
            store(grad_row_ptr + start + offs_v, dz)
        tl.debug_barrier()
        logp = tl.load(logp_ptr + row)
        grad_y = rows.target_gradient(slope_y, nats, logp, entropy, ga, gh)
        if grad_lse_ptr is not None:
            grad_y += slope_y * nats * gl * tl.exp2(maximum(logp * LOG2_E, MIN_EXPONENT))
        if SUM:
            grad_y += _weighted(nats * gu * slope_y, class_weight_ptr, y, has_y)
        store(grad_row_ptr + at_y, grad_y, mask=has_y)


# -------------------------------------------------------------------------------------- launchers


launch.declare("token_stats_fwd", {80: launch.LaunchConfig(block_v=4096, num_warps=8)})
launch.declare("token_stats_bwd", {80: launch.LaunchConfig(block_v=2048, num_warps=8)})


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
    second_temperature: float | None = None,
    moments: bool = False,
    logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1, row_max and inv_sum, each (tokens,) float32.

    With second_temperature or moments, also second_logp, sum_p2_logp and sum_p2_logp2; those that
    were not requested are empty. sum_j class_weight_j u_j is written to `logit_sum`, (tokens,)
    float32, if it is given; class_weight is (vocab,) float32. The caller has checked shapes, dtypes and devices.
    """
    tokens, vocab = logits.shape
    logits, bias_logits = rows.unit_stride(logits), rows.unit_stride(bias_logits)
    extended = second_temperature is not None or moments
    sizes = [tokens] * 7
    if extended:
        sizes += [0 if second_temperature is None else tokens] + [tokens if moments else 0] * 2
    out = [torch.empty(n, dtype=torch.float32, device=logits.device) for n in sizes]
    second_logp, sum_p2_logp, sum_p2_logp2 = out[7:] or [None] * 3
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("token_stats_fwd", logits)
        token_stats_fwd_kernel[(tokens,)](
            logits,
            bias_logits,
            target.contiguous(),
            rows.contiguous(mask),
            vector,
            *out[:7],
            None if second_temperature is None else second_logp,
            sum_p2_logp if moments else None,
            sum_p2_logp2 if moments else None,
            class_weight,
            logit_sum,
            logits.stride(0),
            0 if bias_logits is None else bias_logits.stride(0),
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            bias_scale,
            second_temperature or 1.0,
            HAS_SOFTCAP=softcap is not None,
            **rows.tile_shape(config, logits, rows.rows_aligned(logits, bias_logits)),
            **config.options,
        )
    return tuple(out)


def token_stats_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
    *,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> torch.Tensor:
    """Return the gradient of the logits, written to `out` if given.

    `out` may be `logits` itself. `row_max` and `inv_sum` are outputs of `token_stats_fwd`.
    """
    tokens, vocab = logits.shape
    if out is None:
        out = torch.empty((tokens, vocab), dtype=logits.dtype, device=logits.device)
    logits, bias_logits = rows.unit_stride(logits), rows.unit_stride(bias_logits)
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("token_stats_bwd", logits)
        parts = rows.parts(tokens, vocab, config)
        token_stats_bwd_kernel[(tokens * parts,)](
            logits,
            bias_logits,
            target.contiguous(),
            rows.contiguous(mask),
            vector,
            row_max,
            inv_sum,
            logp,
            entropy,
            rows.as_float(grad_logp),
            rows.as_float(grad_entropy),
            rows.as_float(grad_lse),
            rows.as_float(grad_logit_sum),
            class_weight,
            out,
            logits.stride(0),
            0 if bias_logits is None else bias_logits.stride(0),
            out.stride(0),
            vocab,
            parts,
            scalar,
            softcap or 1.0,
            logit_scale,
            bias_scale,
            HAS_SOFTCAP=softcap is not None,
            SAME_LEAD=rows.same_lead(logits, bias_logits),
            SAME_GRAD_LEAD=rows.same_lead(logits, out),
            **rows.tile_shape(config, logits, rows.base_aligned(logits, bias_logits, out)),
            **config.options,
        )
    return out


# ---------------------------------------------------------------------------------- compile cases


def _arguments(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return meta(4096, 151936, dtype=dtype), meta(4096, dtype=torch.int64)


PLAIN = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}


@compile_case("token_stats_fwd", dtypes=FLOAT_DTYPES, traffic=1)
def _(dtype: torch.dtype) -> None:
    token_stats_fwd(*_arguments(dtype), **PLAIN)


@compile_case("token_stats_bwd", dtypes=FLOAT_DTYPES, traffic=2)
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    token_stats_bwd(*_arguments(dtype), row, row, row, row, row, row, **PLAIN)


@compile_case("token_stats_fwd/options", dtypes=(torch.bfloat16,))
def _(dtype: torch.dtype) -> None:
    logits, target = _arguments(dtype)
    token_stats_fwd(
        logits,
        target,
        temperature=meta(4096),
        softcap=30.0,
        logit_scale=1.0,
        mask=meta(4096, dtype=torch.bool),
        bias_logits=logits,
        second_temperature=0.7,
        moments=True,
    )


@compile_case("token_stats_bwd/options", dtypes=(torch.bfloat16,))
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    token_stats_bwd(
        *_arguments(dtype),
        row,
        row,
        row,
        row,
        row,
        row,
        temperature=row,
        softcap=30.0,
        logit_scale=1.0,
        mask=meta(4096, dtype=torch.bool),
        bias_logits=_arguments(dtype)[0],
    )


@compile_case("token_stats_fwd/logit_sum", dtypes=(torch.bfloat16,), traffic=1)
def _(dtype: torch.dtype) -> None:
    token_stats_fwd(*_arguments(dtype), **PLAIN, logit_sum=meta(4096))


@compile_case("token_stats_bwd/logit_sum", dtypes=(torch.bfloat16,), traffic=2)
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    given = {"grad_lse": row, "grad_logit_sum": row}
    token_stats_bwd(*_arguments(dtype), row, row, row, row, row, None, **PLAIN, **given)


@compile_case("token_stats_fwd/class_weight", dtypes=(torch.bfloat16,))
def _(dtype: torch.dtype) -> None:
    given = {"logit_sum": meta(4096), "class_weight": meta(151936)}
    token_stats_fwd(*_arguments(dtype), **{**PLAIN, "softcap": 30.0}, **given)


@compile_case("token_stats_bwd/class_weight", dtypes=(torch.bfloat16,))
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    given = {"grad_lse": row, "grad_logit_sum": row, "class_weight": meta(151936)}
    token_stats_bwd(*_arguments(dtype), row, row, row, row, row, None, **{**PLAIN, "softcap": 30.0}, **given)


@compile_case("token_stats_fwd/odd_vocabulary", dtypes=(torch.bfloat16,), traffic=1)
def _(dtype: torch.dtype) -> None:
    token_stats_fwd(meta(4096, 49155, dtype=dtype), meta(4096, dtype=torch.int64), **PLAIN)


@compile_case("token_stats_fwd/multiple_of_8", dtypes=(torch.bfloat16,), traffic=1)
def _(dtype: torch.dtype) -> None:
    token_stats_fwd(meta(4096, 50264, dtype=dtype), meta(4096, dtype=torch.int64), **PLAIN)


@compile_case("token_stats_bwd/odd_vocabulary", dtypes=(torch.bfloat16,), traffic=2)
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    logits, target = meta(4096, 49155, dtype=dtype), meta(4096, dtype=torch.int64)
    token_stats_bwd(logits, target, row, row, row, row, row, row, **PLAIN)
