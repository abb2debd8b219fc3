"""token_stats_at: log-probs at a few ids of each row, under the log-sum-exp of token_stats.

Forward: token_stats, then one launch that gathers the ids' logits. The sums of token_stats hold the
rest of a confident target to its digits, not that of another confident id (rows.py). A row with
such an id, p > 3/4, is summed once more without it.

Backward: with g_j the sum of what arrives at column j, grad_logp at the target included, and
total = sum_i g_i - grad_lse,

    dz_j = f'(z) / T ( g_j (1 - p_j) - p_j (total - g_j) - gh p_j (log p_j + entropy) )

A column without g is written by the backward of token_stats, whose coefficient of logp is `total`.
The others are computed before it, because it may write over the logits, and stored after it, so
that each is rounded once: three launches.

Legend: R rows of logits, T tokens, V vocabulary, K ids of all tokens. Bytes per id: 44 forward, 96
backward with the sectors; duplicates are found by comparing the ids of a row with each other. An id
outside [0, V) that is not -1 gives NaN, and where a gradient arrives there its row's gradient is
NaN. Offsets outside [0, K] are cut to it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.tile import LN_2, LOG2_E, MIN_EXPONENT, NEG_INF, expm1_2, maximum, store
from tokfuse.triton_kernels.token_stats import token_stats_bwd, token_stats_fwd

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
CONFIDENT = tl.constexpr(-0.28768207)  # ln 3/4


@triton.jit
def _token_of(index_ptr):
    """(row of the logits, its token)."""
    row = tl.program_id(0).to(tl.int64)
    token = row
    if index_ptr is not None:
        token = tl.load(index_ptr + row)
    return row, token


@triton.jit
def _row_ids(offsets_ptr, token, num_ids):
    """(begin, end) in ids."""
    return tl.maximum(tl.load(offsets_ptr + token), 0), tl.minimum(tl.load(offsets_ptr + token + 1), num_ids)


@triton.jit
def _is_kept(mask_ptr, token):
    keep = token >= 0  # every row
    if mask_ptr is not None:
        keep = tl.load(mask_ptr + token)
    return keep


@triton.jit
def log_probs_at_kernel(
    logits_ptr,  # (R, V)
    bias_ptr,  # (R, V) or None
    index_ptr,  # (R,) int64 or None: row i is token i
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    ids_ptr,  # (K,) int64
    offsets_ptr,  # (T + 1,) int64
    row_max_ptr,  # (T,) float32, and so are the next two
    inv_sum_ptr,
    logp_ptr,
    logp_at_ptr,  # (K,) float32
    stride_logits_t,
    stride_bias_t,
    num_ids,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    bias_scale,
    HAS_SOFTCAP: tl.constexpr,
    IDS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    row, token = _token_of(index_ptr)
    row_ptr = logits_ptr + row * stride_logits_t
    bias_row_ptr = None
    if bias_ptr is not None:
        bias_row_ptr = bias_ptr + row * stride_bias_t
    begin, end = _row_ids(offsets_ptr, token, num_ids)
    keep = _is_kept(mask_ptr, token)
    c, nats = rows.base2_scale(temperature_ptr, token, temperature, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)
    y = tl.load(target_ptr + token)
    m, inv_sum = tl.load(row_max_ptr + token), tl.load(inv_sum_ptr + token)
    log_s = -tl.log2(inv_sum) * LN_2
    logp_y = tl.load(logp_ptr + token)
    offs_i = tl.arange(0, IDS)
    sure = tl.full((IDS,), -1, tl.int64)
    for start in range(begin, end, IDS):
        inside = start + offs_i < end
        ids = tl.load(ids_ptr + start + offs_i, mask=inside, other=-1)
        column = (ids >= 0) & (ids < vocab_size)
        u, slope = rows.read(
            row_ptr, bias_row_ptr, ids, inside & column & keep, softcap, logit_scale, bias_scale, HAS_SOFTCAP
        )
        logp = tl.where(inv_sum == 0.0, NEG_INF, (u - m) * nats - log_s)
        logp = tl.where(ids == y, logp_y, logp)
        logp = tl.where(column, logp, float("nan"))
        logp = tl.where((ids == -1) | (keep == 0), 0.0, logp)
        other = column & keep & (ids != y)
        sure = tl.where(other & (logp > CONFIDENT), ids, sure)
        tl.store(logp_at_ptr + start + offs_i, logp, mask=inside)

    # At most one column has p > 3/4.
    likeliest = tl.max(sure, axis=0)
    if likeliest >= 0:
        u_id, slope_id = rows.read(
            row_ptr, bias_row_ptr, likeliest, likeliest >= 0, softcap, logit_scale, bias_scale, HAS_SOFTCAP
        )
        offs_v = tl.arange(0, COLUMNS)
        rest = tl.zeros((COLUMNS,), tl.float32)
        for start in range(0, vocab_size, COLUMNS):
            at = start + offs_v
            others = (at < vocab_size) & (at != likeliest)
            u, slope = rows.read(row_ptr, bias_row_ptr, at, others, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
            rest += tl.where(others, tl.exp2((u - u_id) * c), 0.0)
        logp = -rows.log_sum(tl.sum(rest, axis=0))
        tl.debug_barrier()
        for start in range(begin, end, IDS):
            inside = start + offs_i < end
            ids = tl.load(ids_ptr + start + offs_i, mask=inside, other=-1)
            tl.store(logp_at_ptr + start + offs_i, tl.zeros((IDS,), tl.float32) + logp, mask=ids == likeliest)


@triton.jit
def _incoming(ids_ptr, grad_ptr, at, inside, vocab_size):
    """(ids, what arrives at them): 0 at padding, NaN where something arrives at no column."""
    ids = tl.load(ids_ptr + at, mask=inside, other=-1)
    g = tl.load(grad_ptr + at, mask=inside, other=0.0)
    g = tl.where(ids == -1, 0.0, g)
    column = (ids >= 0) & (ids < vocab_size)
    return ids, tl.where(column | (g == 0.0), g, float("nan"))


@triton.jit
def _gradient_of_column(own, others, logp, entropy, gh, nats, slope):
    """The gradient of a column at which `own` arrives, and `others` at all others."""
    log2_p = maximum(logp * LOG2_E, MIN_EXPONENT)
    p = tl.where(logp == NEG_INF, 0.0, tl.exp2(log2_p))
    log_term = tl.where(logp == NEG_INF, 0.0, p * (logp + entropy))
    return slope * nats * (own * -expm1_2(log2_p) - p * others - gh * log_term)


@triton.jit
def gradient_at_kernel(
    logits_ptr,  # (R, V)
    bias_ptr,  # (R, V) or None
    index_ptr,  # (R,) int64 or None
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    ids_ptr,  # (K,) int64
    offsets_ptr,  # (T + 1,) int64
    inv_sum_ptr,  # (T,) float32, and so are the next two
    logp_ptr,
    entropy_ptr,
    logp_at_ptr,  # (K,) float32
    grad_logp_ptr,  # (T,) float32 or None
    grad_entropy_ptr,  # (T,) float32 or None
    grad_lse_ptr,  # (T,) float32 or None
    grad_logp_at_ptr,  # (K,) float32
    grad_at_ptr,  # (K,) float32
    grad_at_target_ptr,  # (T,) float32
    grad_total_ptr,  # (T,) float32
    stride_logits_t,
    stride_bias_t,
    num_ids,
    vocab_size,
    temperature,
    softcap,
    logit_scale,
    bias_scale,
    HAS_SOFTCAP: tl.constexpr,
    IDS: tl.constexpr,
    OTHERS: tl.constexpr,
):
    HAS_BIAS: tl.constexpr = bias_ptr is not None
    row, token = _token_of(index_ptr)
    row_ptr = logits_ptr + row * stride_logits_t
    bias_row_ptr = None
    if bias_ptr is not None:
        bias_row_ptr = bias_ptr + row * stride_bias_t
    begin, end = _row_ids(offsets_ptr, token, num_ids)
    keep = _is_kept(mask_ptr, token) & (tl.load(inv_sum_ptr + token) != 0.0)
    ga, gh, gl = tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32), tl.full((), 0.0, tl.float32)
    if grad_logp_ptr is not None:
        ga = tl.where(keep, tl.load(grad_logp_ptr + token), 0.0)
    if grad_entropy_ptr is not None:
        gh = tl.where(keep, tl.load(grad_entropy_ptr + token), 0.0)
    if grad_lse_ptr is not None:
        gl = tl.where(keep, tl.load(grad_lse_ptr + token), 0.0)
    y = tl.load(target_ptr + token)
    has_y = (y >= 0) & (y < vocab_size)
    offs_i = tl.arange(0, IDS)
    offs_o = tl.arange(0, OTHERS)

    # What arrives at the target and at all others, and whether anything does.
    own_y, others_y = ga, -gl
    arrives = ((ga != 0.0) | (gh != 0.0) | (gl != 0.0)).to(tl.int32)
    for start in range(begin, end, IDS):
        at = start + offs_i
        ids, g = _incoming(ids_ptr, grad_logp_at_ptr, at, at < end, vocab_size)
        own_y += tl.sum(tl.where(ids == y, g, 0.0), axis=0)
        others_y += tl.sum(tl.where(ids == y, 0.0, g), axis=0)
        arrives = tl.maximum(arrives, tl.max((g != 0.0).to(tl.int32), axis=0))
    active = (arrives > 0) & keep
    total = tl.where(has_y | (ga == 0.0), own_y + others_y, float("nan"))

    c, nats = rows.base2_scale(temperature_ptr, token, temperature, softcap, logit_scale, HAS_SOFTCAP, HAS_BIAS)
    logp_y, entropy = tl.load(logp_ptr + token), tl.load(entropy_ptr + token)
    u_y, slope_y = rows.read(row_ptr, bias_row_ptr, y, has_y & active, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
    value_y = _gradient_of_column(own_y, others_y, logp_y, entropy, gh, nats, slope_y)
    tl.store(grad_at_target_ptr + token, tl.where(active, value_y, 0.0))
    tl.store(grad_total_ptr + token, tl.where(active, total, 0.0))

    for start in range(begin, end, IDS):
        at = start + offs_i
        ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
        inside = (ids >= 0) & (ids < vocab_size) & active
        own = tl.where(ids == y, ga, 0.0)
        others = tl.where(ids == y, 0.0, ga) - gl
        for other in range(begin, end, OTHERS):
            other_at = other + offs_o
            other_ids, g = _incoming(ids_ptr, grad_logp_at_ptr, other_at, other_at < end, vocab_size)
            same = ids[:, None] == other_ids[None, :]
            own += tl.sum(tl.where(same, g[None, :], 0.0), axis=1)
            others += tl.sum(tl.where(same, 0.0, g[None, :]), axis=1)
        logp = tl.load(logp_at_ptr + at, mask=at < end, other=0.0)
        u, slope = rows.read(row_ptr, bias_row_ptr, ids, inside, softcap, logit_scale, bias_scale, HAS_SOFTCAP)
        value = _gradient_of_column(own, others, logp, entropy, gh, nats, slope)
        tl.store(grad_at_ptr + at, tl.where(inside, value, 0.0), mask=at < end)


@triton.jit
def store_at_kernel(
    grad_logits_ptr,  # (R, V)
    index_ptr,  # (R,) int64 or None
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    ids_ptr,  # (K,) int64
    offsets_ptr,  # (T + 1,) int64
    grad_at_ptr,  # (K,) float32
    grad_at_target_ptr,  # (T,) float32
    stride_grad_t,
    num_ids,
    vocab_size,
    IDS: tl.constexpr,
):
    row, token = _token_of(index_ptr)
    grad_row_ptr = grad_logits_ptr + row * stride_grad_t
    begin, end = _row_ids(offsets_ptr, token, num_ids)
    keep = _is_kept(mask_ptr, token)
    y = tl.load(target_ptr + token)
    offs_i = tl.arange(0, IDS)
    for start in range(begin, end, IDS):
        at = start + offs_i
        ids = tl.load(ids_ptr + at, mask=at < end, other=-1)
        value = tl.load(grad_at_ptr + at, mask=at < end, other=0.0)
        # An id that is the target is left to the target; duplicates hold the same value.
        store(grad_row_ptr + ids, value, mask=(ids >= 0) & (ids < vocab_size) & (ids != y) & keep)
    store(grad_row_ptr + y, tl.load(grad_at_target_ptr + token), mask=(y >= 0) & (y < vocab_size) & keep)


# -------------------------------------------------------------------------------------- launchers


launch.declare("log_probs_at", {80: launch.LaunchConfig(block_t=128, block_v=1024, num_warps=4)})
launch.declare("gradient_at", {80: launch.LaunchConfig(block_t=128, block_v=32, num_warps=4)})
launch.declare("store_at", {80: launch.LaunchConfig(block_t=128, num_warps=4)})


def _of_rows(x: Any, index: torch.Tensor | None) -> Any:
    """Of a tensor of all tokens those of the rows; anything else as it is."""
    return x[index] if index is not None and isinstance(x, torch.Tensor) else x


def _options_of_rows(
    index: torch.Tensor | None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None,
    bias_scale: float,
) -> dict[str, Any]:
    """Keywords of token_stats, whose kernels know no index."""
    return {
        "temperature": _of_rows(temperature, index),
        "softcap": softcap,
        "logit_scale": logit_scale,
        "mask": _of_rows(mask, index),
        "bias_logits": bias_logits,
        "bias_scale": bias_scale,
    }


def token_stats_at_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
    index: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
) -> tuple[torch.Tensor, ...]:
    """The seven outputs of token_stats_fwd, and logp_at (ids,) float32; into `out` if given.

    With `index`, row i of the logits is token index[i]; all other tensors are those of all tokens.
    """
    vocab = logits.shape[1]
    logits, bias_logits = rows.unit_stride(logits), rows.unit_stride(bias_logits)
    options = _options_of_rows(index, temperature, softcap, logit_scale, mask, bias_logits, bias_scale)
    stats = token_stats_fwd(logits, _of_rows(target, index), **options)
    if out is None:
        out = (*stats, torch.empty(ids.shape, dtype=torch.float32, device=logits.device))
    else:
        for whole, part in zip(out, stats, strict=False):
            whole[index] = part
    vector, scalar = rows.per_row(temperature)
    if logits.shape[0] and ids.shape[0]:
        config = launch.choose("log_probs_at", logits)
        log_probs_at_kernel[(logits.shape[0],)](
            logits,
            bias_logits,
            index,
            target.contiguous(),
            rows.contiguous(mask),
            vector,
            ids,
            offsets,
            out[5],
            out[6],
            out[0],
            out[7],
            logits.stride(0),
            0 if bias_logits is None else bias_logits.stride(0),
            ids.shape[0],
            vocab,
            scalar,
            softcap or 1.0,
            logit_scale,
            bias_scale,
            HAS_SOFTCAP=softcap is not None,
            IDS=config.block_t,
            COLUMNS=config.block_v,
            **config.options,
        )
    return out


def token_stats_at_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    logp_at: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_logp_at: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
    index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of the logits, into `out` if given; `out` may be `logits` itself. `index`: as forward."""
    tokens, vocab = logits.shape
    if out is None:
        out = torch.empty((tokens, vocab), dtype=logits.dtype, device=logits.device)
    if not tokens:
        return out
    logits, bias_logits = rows.unit_stride(logits), rows.unit_stride(bias_logits)
    target, kept = target.contiguous(), rows.contiguous(mask)
    vector, scalar = rows.per_row(temperature)
    grad_at, grad_at_target, grad_total = (torch.empty_like(x) for x in (logp_at, logp, logp))
    config = launch.choose("gradient_at", logits)
    gradient_at_kernel[(tokens,)](
        logits,
        bias_logits,
        index,
        target,
        kept,
        vector,
        ids,
        offsets,
        inv_sum,
        logp,
        entropy,
        logp_at,
        rows.as_float(grad_logp),
        rows.as_float(grad_entropy),
        rows.as_float(grad_lse),
        rows.as_float(grad_logp_at),
        grad_at,
        grad_at_target,
        grad_total,
        logits.stride(0),
        0 if bias_logits is None else bias_logits.stride(0),
        ids.shape[0],
        vocab,
        scalar,
        softcap or 1.0,
        logit_scale,
        bias_scale,
        HAS_SOFTCAP=softcap is not None,
        IDS=config.block_t,
        OTHERS=config.block_v,
        **config.options,
    )
    vectors = (row_max, inv_sum, logp, entropy, grad_total, grad_entropy)
    token_stats_bwd(
        logits,
        *(_of_rows(x, index) for x in (target, *vectors)),
        out=out,
        **_options_of_rows(index, temperature, softcap, logit_scale, mask, bias_logits, bias_scale),
    )
    config = launch.choose("store_at", logits)
    store_at_kernel[(tokens,)](
        out,
        index,
        target,
        kept,
        ids,
        offsets,
        grad_at,
        grad_at_target,
        out.stride(0),
        ids.shape[0],
        vocab,
        IDS=config.block_t,
        **config.options,
    )
    return out


# ---------------------------------------------------------------------------------- compile cases


def _arguments(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    offsets = borders(4096, 1 << 18, torch.int64)
    tokens = meta(4096, dtype=torch.int64)
    return meta(4096, 151936, dtype=dtype), tokens, meta(1 << 18, dtype=torch.int64), offsets


PLAIN = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}
IN_CHUNKS = {"temperature": 1.0, "softcap": 30.0, "logit_scale": 1.0, "mask": None}


@compile_case("token_stats_at_fwd", dtypes=FLOAT_DTYPES, streams=0)
def _(dtype: torch.dtype) -> None:
    token_stats_at_fwd(*_arguments(dtype), **PLAIN)


@compile_case("token_stats_at_bwd", dtypes=FLOAT_DTYPES, streams=0)
def _(dtype: torch.dtype) -> None:
    row, of_ids = meta(4096), meta(1 << 18)
    token_stats_at_bwd(*_arguments(dtype), row, row, row, row, of_ids, row, row, row, of_ids, **PLAIN)


@compile_case("token_stats_at_bwd/chunk", dtypes=(torch.bfloat16,), streams=0)
def _(dtype: torch.dtype) -> None:
    row, of_ids = meta(4096), meta(1 << 18)
    logits, target, ids, offsets = _arguments(dtype)
    token_stats_at_bwd(
        logits,
        target,
        ids,
        offsets,
        row,
        row,
        row,
        row,
        of_ids,
        row,
        row,
        None,
        of_ids,
        index=target,
        out=logits,
        **IN_CHUNKS,
    )
