"""token_stats of hidden @ weight.T for 16-bit heads, without storing the logits.

    linear_token_stats_kernel  a block of tokens times one split of the vocabulary: tl.dot gives a
                               tile of logits in registers, which is added to running statistics
                               (rows.py) of each token
    linear_merge_kernel        merges the statistics of a token's splits in order

2 T H V floating-point operations and one exponential per logit. A split is a fixed range of the
vocabulary. So the result of a token depends neither on the number of tokens nor on the device.
Neighbouring programs use the same split: its weights are read from memory once, then from L2. Extra
memory: 20 T bytes per split.

Products of 16-bit numbers are exact in float32 and are accumulated in float32. A logit is never
rounded to 16 bits, as it is in eager PyTorch. float32 heads use the chunked GEMM of
runtime/lm_head/device_head.py, because tl.dot would need several passes for them.

Legend: T tokens, V vocabulary, H hidden, S splits.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, rows
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.tile import INTERPRET, NEG_INF, load, maximum

DTYPES = (torch.bfloat16, torch.float16)
SPLIT = 8192  # columns; a vocabulary of 152k has 19, which with 64 blocks of tokens fill any device

launch.declare(
    "linear_token_stats",
    {
        80: launch.LaunchConfig(block_t=128, block_v=128, block_h=32, num_warps=8, num_stages=4),
        90: launch.LaunchConfig(block_t=128, block_v=128, block_h=64, num_warps=8, num_stages=4),
    },
)
launch.declare("linear_merge", {80: launch.LaunchConfig(block_t=128, num_warps=4)})


@triton.jit
def _temperature_scale(temperature_ptr, offs_t, keep, temperature, softcap, logit_scale, HAS_SOFTCAP: tl.constexpr):
    """Return (c, nats) of each token; rows.base2_scale defines them."""
    t = tl.zeros(offs_t.shape, tl.float32) + temperature
    if temperature_ptr is not None:
        t = tl.load(temperature_ptr + offs_t, mask=keep, other=1.0)
    return rows.scaled_by_temperature(t, softcap, logit_scale, HAS_SOFTCAP, False)


@triton.jit
def linear_token_stats_kernel(
    hidden_ptr,  # (T, H)
    weight_ptr,  # (V, H)
    bias_ptr,  # (V,) or None
    target_ptr,  # (T,) int64
    mask_ptr,  # (T,) bool or None
    temperature_ptr,  # (T,) float32 or None
    partial_ptr,  # (S, 5, T) float32: m, sum e, sum d e, sum e^2 without the target; its logit
    stride_hidden_t,
    stride_weight_v,
    num_tokens,
    vocab_size,
    hidden_size,
    token_blocks,
    temperature,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    split = tl.program_id(0) // token_blocks
    offs_t = (tl.program_id(0) % token_blocks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    keep = offs_t < num_tokens
    if mask_ptr is not None:
        keep = keep & tl.load(mask_ptr + offs_t, mask=keep, other=0).to(tl.int1)
    c, _ = _temperature_scale(temperature_ptr, offs_t, keep, temperature, softcap, logit_scale, HAS_SOFTCAP)
    y = tl.load(target_ptr + offs_t, mask=keep, other=-1)
    offs_h = tl.arange(0, BLOCK_H)
    hidden_rows = hidden_ptr + offs_t[:, None] * stride_hidden_t

    m = tl.full((BLOCK_T,), rows.LOWEST_MAX, tl.float32)
    s = tl.zeros((BLOCK_T,), tl.float32)
    sd = tl.zeros((BLOCK_T,), tl.float32)
    ss = tl.zeros((BLOCK_T,), tl.float32)
    u_y = tl.zeros((BLOCK_T,), tl.float32)
    begin = split * SPLIT
    end = tl.minimum(begin + SPLIT, vocab_size)
    end = tl.where(tl.max(keep.to(tl.int32), axis=0) > 0, end, begin)  # no GEMM if all are masked
    for start in range(begin, end, BLOCK_V):
        offs_v = start + tl.arange(0, BLOCK_V)
        in_vocab = offs_v < vocab_size
        weight_rows = weight_ptr + offs_v[:, None].to(tl.int64) * stride_weight_v
        u = tl.zeros((BLOCK_T, BLOCK_V), tl.float32)
        for k in range(0, hidden_size, BLOCK_H):
            in_hidden = k + offs_h < hidden_size
            h = tl.load(hidden_rows + (k + offs_h)[None, :], mask=keep[:, None] & in_hidden[None, :], other=0.0)
            w = tl.load(weight_rows + (k + offs_h)[None, :], mask=in_vocab[:, None] & in_hidden[None, :], other=0.0)
            if INTERPRET:
                h, w = h.to(tl.float32), w.to(tl.float32)
            u = tl.dot(h, tl.trans(w), u)
        if bias_ptr is not None:
            u += load(bias_ptr + offs_v, in_vocab, 0.0)[None, :]
        if HAS_SOFTCAP:
            u = rows.capped(u, softcap, logit_scale)
        is_target = offs_v[None, :] == y[:, None]
        u_y += tl.sum(tl.where(is_target, u, 0.0), axis=1)
        u = tl.where(in_vocab[None, :] & (is_target == 0), u, NEG_INF)
        new_m = tl.maximum(m, tl.max(u, axis=1))
        step = tl.maximum(m - new_m, rows.FARTHEST)
        decay = tl.exp2(step * c)
        d = maximum(u - new_m[:, None], rows.FARTHEST)
        e = tl.exp2(d * c[:, None])
        sd = decay * (sd + step * s) + tl.sum(d * e, axis=1)
        s = decay * s + tl.sum(e, axis=1)
        ss = decay * decay * ss + tl.sum(e * e, axis=1)
        m = new_m

    out = partial_ptr + split.to(tl.int64) * 5 * num_tokens + offs_t
    in_range = offs_t < num_tokens
    tl.store(out, m, mask=in_range)
    tl.store(out + num_tokens, s, mask=in_range)
    tl.store(out + 2 * num_tokens, sd, mask=in_range)
    tl.store(out + 3 * num_tokens, ss, mask=in_range)
    tl.store(out + 4 * num_tokens, u_y, mask=in_range)


@triton.jit
def linear_merge_kernel(
    partial_ptr,  # (S, 5, T) float32
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
    num_tokens,
    vocab_size,
    num_splits,
    temperature,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    offs_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = offs_t < num_tokens
    keep = in_range
    if mask_ptr is not None:
        keep = keep & tl.load(mask_ptr + offs_t, mask=in_range, other=0).to(tl.int1)
    c, nats = _temperature_scale(temperature_ptr, offs_t, keep, temperature, softcap, logit_scale, HAS_SOFTCAP)
    part = partial_ptr + offs_t
    m = tl.full((BLOCK_T,), rows.LOWEST_MAX, tl.float32)
    s = tl.zeros((BLOCK_T,), tl.float32)
    sd = tl.zeros((BLOCK_T,), tl.float32)
    ss = tl.zeros((BLOCK_T,), tl.float32)
    u_y = tl.zeros((BLOCK_T,), tl.float32)
    for _ in range(0, num_splits):
        part_m = tl.load(part, mask=keep, other=0.0)
        new_m = tl.maximum(m, part_m)
        step, part_step = m - new_m, part_m - new_m
        step = tl.maximum(step, rows.FARTHEST)
        part_step = tl.maximum(part_step, rows.FARTHEST)
        decay, part_decay = tl.exp2(step * c), tl.exp2(part_step * c)
        part_s = tl.load(part + num_tokens, mask=keep, other=0.0)
        part_sd = tl.load(part + 2 * num_tokens, mask=keep, other=0.0)
        part_ss = tl.load(part + 3 * num_tokens, mask=keep, other=0.0)
        sd = decay * (sd + step * s) + part_decay * (part_sd + part_step * part_s)
        s = decay * s + part_decay * part_s
        ss = decay * decay * ss + part_decay * part_decay * part_ss
        u_y += tl.load(part + 4 * num_tokens, mask=keep, other=0.0)
        m = new_m
        part += 5 * num_tokens
    y = tl.load(target_ptr + offs_t, mask=keep, other=0)
    has_target = (y >= 0) & (y < vocab_size)
    m, rest, sd, ss, d_y, _, _ = rows.with_target(tl.where(has_target & keep, u_y, NEG_INF), c, m, s, sd, ss)
    logp, entropy, lse, sum_sq, top1, m, inv_sum = rows.finish(m, rest, sd, ss, d_y, has_target, keep, nats)
    tl.store(logp_ptr + offs_t, logp, mask=in_range)
    tl.store(entropy_ptr + offs_t, entropy, mask=in_range)
    tl.store(lse_ptr + offs_t, lse, mask=in_range)
    tl.store(sum_sq_ptr + offs_t, sum_sq, mask=in_range)
    tl.store(top1_ptr + offs_t, top1, mask=in_range)
    tl.store(row_max_ptr + offs_t, m, mask=in_range)
    tl.store(inv_sum_ptr + offs_t, inv_sum, mask=in_range)


def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1, row_max and inv_sum, each (tokens,) float32.

    Args:
        hidden: (tokens, hidden) bfloat16 or float16, unit stride along hidden.
        weight: (vocab, hidden), same dtype, unit stride along hidden.
        bias: (vocab,), added to the logits. None: no bias.
        target: (tokens,) int64, token ids.
        temperature: divides the logits; a number or (tokens,).
        softcap: bound of the tanh on the logits. None: no softcap.
        logit_scale: multiplies the logits before the softcap.
        mask: (tokens,) bool. None: every token counts.
    """
    tokens, vocab = hidden.shape[0], weight.shape[0]
    # Separate tensors: the results of an op in a compiled graph must not share storage.
    out = [torch.empty(tokens, dtype=torch.float32, device=hidden.device) for _ in range(7)]
    if tokens == 0:
        return tuple(out)
    config = launch.choose("linear_token_stats", hidden)
    token_blocks, splits = triton.cdiv(tokens, config.block_t), triton.cdiv(vocab, SPLIT)
    partial = torch.empty(splits, 5, tokens, dtype=torch.float32, device=hidden.device)
    vector, scalar = rows.per_row(temperature)
    mask, target = rows.contiguous(mask), target.contiguous()
    linear_token_stats_kernel[(token_blocks * splits,)](
        hidden,
        weight,
        bias,
        target,
        mask,
        vector,
        partial,
        hidden.stride(0),
        weight.stride(0),
        tokens,
        vocab,
        hidden.shape[1],
        token_blocks,
        scalar,
        softcap or 1.0,
        logit_scale,
        HAS_SOFTCAP=softcap is not None,
        SPLIT=SPLIT,
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        **config.options,
    )
    merge = launch.choose("linear_merge", hidden)
    linear_merge_kernel[(triton.cdiv(tokens, merge.block_t),)](
        partial,
        target,
        mask,
        vector,
        *out,
        tokens,
        vocab,
        splits,
        scalar,
        softcap or 1.0,
        logit_scale,
        HAS_SOFTCAP=softcap is not None,
        BLOCK_T=merge.block_t,
        **merge.options,
    )
    return tuple(out)


def _case(dtype: torch.dtype, softcap: float | None) -> None:
    linear_token_stats(
        meta(8192, 4096, dtype=dtype),
        meta(151936, 4096, dtype=dtype),
        None,
        meta(8192, dtype=torch.int64),
        temperature=0.7,
        softcap=softcap,
        logit_scale=1.0,
        mask=meta(8192, dtype=torch.bool),
    )


@compile_case("linear_token_stats", dtypes=DTYPES)
def _(dtype: torch.dtype) -> None:
    _case(dtype, None)


@compile_case("linear_token_stats/softcap", dtypes=(torch.bfloat16,))
def _(dtype: torch.dtype) -> None:
    _case(dtype, 30.0)
