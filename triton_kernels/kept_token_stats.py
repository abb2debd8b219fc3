"""kept_token_stats: log-probability, entropy and log-sum-exp over the kept ids of each row.

The formulas are those of rows.py, with sums over j in ids[offsets[t] : offsets[t + 1]] (the support
of token t). Both passes gather the kept logits only: 8 bytes of id and one 32-byte sector each. The
backward writes the dense gradient: one launch sets it to zero, one writes the kept entries. With k
kept ids it moves 2V + 40k bytes per token at bf16.

Legend: T tokens (packed), V vocabulary, K kept ids of all rows. The launchers do not check values.
An id outside [0, V) gives NaN in its row; a target outside [0, V) gives NaN in logp. An id that
occurs twice in a row counts twice, but the target counts once. Offsets are clamped to [0, K], so no
other memory is read.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.tile import NEG_INF, store

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _support(offsets_ptr, row, num_kept, mask_ptr):
    """Return (begin, end) of a row's kept ids. A masked row has none, so it is not read."""
    begin = tl.maximum(tl.load(offsets_ptr + row), 0)
    end = tl.minimum(tl.load(offsets_ptr + row + 1), num_kept)
    if mask_ptr is not None:
        end = tl.where(tl.load(mask_ptr + row), end, begin)
    return begin, end


@triton.jit
def _read_kept(row_ptr, ids, inside, vocab_size, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Return (u, slope) of the kept ids; u is NaN for an id outside [0, V)."""
    column = (ids >= 0) & (ids < vocab_size)
    u, slope = rows.read(row_ptr, None, ids, inside & column, softcap, logit_scale, 0.0, HAS_SOFTCAP)
    return tl.where(inside & (column == 0), float("nan"), u), slope


@triton.jit
def kept_token_stats_fwd_kernel(
    logits_ptr,  # (T, V)
    target_ptr,  # (T,) int64
    ids_ptr,  # (K,) int64
    offsets_ptr,  # (T + 1,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    logp_ptr,  # (T,) float32; the same for all that follow
    entropy_ptr,
    lse_ptr,
    row_max_ptr,
    inv_sum_ptr,
    stride_logits_t,
    num_kept,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_t
    begin, end = _support(offsets_ptr, row, num_kept, mask_ptr)
    c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP)
    y = tl.load(target_ptr + row)
    offs_k = rows.tile_offsets(VECTORS, LANES, 1)
    m = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    sd = tl.zeros((LANES,), tl.float32)
    ss = tl.zeros((LANES,), tl.float32)
    u_y = tl.zeros((LANES,), tl.float32)  # of the target, in the lane that finds it
    found = tl.zeros((LANES,), tl.int32)
    for start in range(begin, end, TILE):
        inside = start + offs_k < end
        ids = tl.load(ids_ptr + start + offs_k, mask=inside, other=0)
        u, slope = _read_kept(row_ptr, ids, inside, vocab_size, softcap, logit_scale, HAS_SOFTCAP)
        hit = inside & (ids == y)
        found += tl.sum(tl.sum(hit.to(tl.int32), axis=2), axis=0)
        u_y += rows.lane_sum(tl.where(hit, u, 0.0))
        m, s, sd, ss, step, decay, d, e = rows.fold(tl.where(hit, NEG_INF, u), c, m, s, sd, ss)

    m, s, sd, ss, step, decay = rows.merge(c, m, s, sd, ss)
    times = tl.sum(found, axis=0)
    row_u_y = tl.where(times > 0, tl.sum(u_y, axis=0) / tl.maximum(times, 1), NEG_INF)
    m, rest, sd, ss, d_y, _, _ = rows.with_target(row_u_y, c, m, s, sd, ss)
    counts = row >= 0
    if mask_ptr is not None:
        counts = tl.load(mask_ptr + row)
    has_target = (y >= 0) & (y < vocab_size)
    logp, entropy, lse, _, _, row_m, inv_sum = rows.finish(m, rest, sd, ss, d_y, has_target, counts, nats)
    tl.store(logp_ptr + row, logp)
    tl.store(entropy_ptr + row, entropy)
    tl.store(lse_ptr + row, lse)
    tl.store(row_max_ptr + row, row_m)
    tl.store(inv_sum_ptr + row, inv_sum)


@triton.jit
def kept_token_stats_bwd_kernel(
    logits_ptr,  # (T, V)
    target_ptr,  # (T,) int64
    ids_ptr,  # (K,) int64
    offsets_ptr,  # (T + 1,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    row_max_ptr,  # (T,) float32; the same for the next three
    inv_sum_ptr,
    logp_ptr,
    entropy_ptr,
    grad_logp_ptr,  # (T,) float32 or None
    grad_entropy_ptr,  # (T,) float32 or None
    grad_lse_ptr,  # (T,) float32 or None
    grad_logits_ptr,  # (T, V), initially 0; only kept entries are written
    stride_logits_t,
    stride_grad_t,
    num_kept,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride_logits_t
    grad_row_ptr = grad_logits_ptr + row * stride_grad_t
    ga, gh, gl = 0.0, 0.0, 0.0
    if grad_logp_ptr is not None:
        ga = tl.load(grad_logp_ptr + row)
    if grad_entropy_ptr is not None:
        gh = tl.load(grad_entropy_ptr + row)
    if grad_lse_ptr is not None:
        gl = tl.load(grad_lse_ptr + row)
    inv_sum = tl.load(inv_sum_ptr + row)
    begin, end = _support(offsets_ptr, row, num_kept, mask_ptr)
    # Rows without gradient or without a distribution keep their zeros. They are not read.
    end = tl.where(((ga == 0.0) & (gh == 0.0) & (gl == 0.0)) | (inv_sum == 0.0), begin, end)
    y = tl.load(target_ptr + row)
    offs_k = rows.tile_offsets(VECTORS, LANES, 1)
    # A target outside the support has logp = -inf, which has no gradient. So find it first.
    found = tl.zeros((LANES,), tl.int32)
    for start in range(begin, end, TILE):
        inside = start + offs_k < end
        hit = inside & (tl.load(ids_ptr + start + offs_k, mask=inside, other=0) == y)
        found += tl.sum(tl.sum(hit.to(tl.int32), axis=2), axis=0)
    in_row = (y >= 0) & (y < vocab_size)
    ga = tl.where(tl.sum(found, axis=0) > 0, ga, tl.where(in_row | (ga == 0.0), 0.0, float("nan")))

    c, nats = rows.base2_scale(temperature_ptr, row, temperature, softcap, logit_scale, HAS_SOFTCAP)
    m = tl.load(row_max_ptr + row)
    logp, entropy = tl.load(logp_ptr + row), tl.load(entropy_ptr + row)
    a0, a1 = rows.gradient_constants(nats, inv_sum, entropy, ga, gh)
    of_lse = nats * inv_sum * gl  # times exp2(d c): the term of the log-sum-exp
    if grad_lse_ptr is not None:
        a0 += of_lse
    for start in range(begin, end, TILE):
        inside = start + offs_k < end
        ids = tl.load(ids_ptr + start + offs_k, mask=inside, other=0)
        u, slope = _read_kept(row_ptr, ids, inside, vocab_size, softcap, logit_scale, HAS_SOFTCAP)
        at_target = rows.target_gradient(slope, nats, logp, entropy, ga, gh)
        if grad_lse_ptr is not None:
            at_target += rows.gradient(u, slope, m, c, of_lse, 0.0)
        grad = tl.where(ids == y, at_target, rows.gradient(u, slope, m, c, a0, a1))
        store(grad_row_ptr + ids, grad, mask=inside & (ids >= 0) & (ids < vocab_size))


# -------------------------------------------------------------------------------------- launchers


launch.declare("kept_token_stats_fwd", {80: launch.LaunchConfig(block_v=256, num_warps=4)})
launch.declare("kept_token_stats_bwd", {80: launch.LaunchConfig(block_v=256, num_warps=4)})


def _tile(config: launch.LaunchConfig) -> dict[str, int]:
    lanes = 32 * config.num_warps
    return {"VECTORS": config.block_v // lanes, "LANES": lanes}


def kept_token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, row_max and inv_sum over the support, each (tokens,) float32."""
    tokens, vocab = logits.shape
    logits = rows.unit_stride(logits)
    out = [torch.empty(tokens, dtype=torch.float32, device=logits.device) for _ in range(5)]
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("kept_token_stats_fwd", logits)
        kept_token_stats_fwd_kernel[(tokens,)](
            logits,
            target.contiguous(),
            ids,
            offsets,
            rows.contiguous(mask),
            vector,
            *out,
            logits.stride(0),
            ids.shape[0],
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            HAS_SOFTCAP=softcap is not None,
            **_tile(config),
            **config.options,
        )
    return tuple(out)


def kept_token_stats_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """Return the dense gradient of the logits; it is exactly 0 outside the support."""
    tokens, vocab = logits.shape
    logits = rows.unit_stride(logits)
    out = torch.zeros((tokens, vocab), dtype=logits.dtype, device=logits.device)
    vector, scalar = rows.per_row(temperature)
    if tokens:
        config = launch.choose("kept_token_stats_bwd", logits)
        kept_token_stats_bwd_kernel[(tokens,)](
            logits,
            target.contiguous(),
            ids,
            offsets,
            rows.contiguous(mask),
            vector,
            row_max,
            inv_sum,
            logp,
            entropy,
            rows.as_float(grad_logp),
            rows.as_float(grad_entropy),
            rows.as_float(grad_lse),
            out,
            logits.stride(0),
            out.stride(0),
            ids.shape[0],
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            HAS_SOFTCAP=softcap is not None,
            **_tile(config),
            **config.options,
        )
    return out


# ---------------------------------------------------------------------------------- compile cases


OPTIONS = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}


def _arguments(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    offsets = borders(4096, 1 << 18, torch.int64)
    tokens = meta(4096, dtype=torch.int64)
    return meta(4096, 151936, dtype=dtype), tokens, meta(1 << 18, dtype=torch.int64), offsets


@compile_case("kept_token_stats_fwd", dtypes=FLOAT_DTYPES, streams=0)
def _(dtype: torch.dtype) -> None:
    kept_token_stats_fwd(*_arguments(dtype), **OPTIONS)


@compile_case("kept_token_stats_bwd", dtypes=FLOAT_DTYPES, streams=0)
def _(dtype: torch.dtype) -> None:
    row = meta(4096)
    kept_token_stats_bwd(*_arguments(dtype), *(row,) * 7, **OPTIONS)
