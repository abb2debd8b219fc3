"""Policy objectives over packed tokens: losses, gradient coefficients and metric sums.

    policy_loss_kernel           token-level ratios: one block of tokens per program, also the
                                 partial metric sums
    policy_loss_sequence_kernel  sequence-level ratios: one sequence per program
    policy_prepare_kernel        with cu_seqlens: the valid tokens of each sequence, and for each
                                 token its aggregation weight and advantage

A token-level objective takes one launch over the tokens and one launch of a single program that
adds the partial sums. With cu_seqlens, policy_prepare_kernel runs before them. A sequence-level
objective takes one launch over the sequences and the two launches of policy_metrics. Per token, up
to 48 bytes of input vectors are read (twelve float32; a mask adds 1). A token-level objective writes
12 bytes per token, a sequence-level one 20.

Sequence level: the log-ratio d of a sequence is the mean (or sum) of its tokens' bounded
log-ratios. So d loss / d logp_t = d loss / d d * share * [t inside its bounds]. Here d loss / d d
is the sum over all tokens, and share is 1 / (valid tokens) for the mean, 1 for the sum. Sums over a
sequence are float64.

Legend: T tokens (packed), S sequences.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, policy_metrics
from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig
from tokfuse.triton_kernels.objective import (
    CASE_CODES,
    CASE_NUMBERS,
    LEVEL_STAGE,
    TOKEN_STAGE,
    ObjectiveNumbers,
    TokenPointers,
    bounded_log_ratio,
    load_or,
    require_signal,
    token_objective,
    token_terms,
)
from tokfuse.triton_kernels.policy_metrics import SLOTS, TokenResults, metrics_block
from tokfuse.triton_kernels.shape_codes import LEVEL_SEQUENCE, LEVEL_SEQUENCE_SUM, LEVEL_SEQUENCE_TOKEN

launch.declare("policy_sequences", {80: LaunchConfig(block_t=512, num_warps=4)})


@triton.jit
def _kept(mask_ptr, offs, in_range):
    if mask_ptr is None:
        return in_range
    else:
        return in_range & tl.load(mask_ptr + offs, mask=in_range, other=0).to(tl.int1)


@triton.jit
def _borders(cu_seqlens_ptr, seq, num_tokens):
    """Return [begin, end) of a sequence, clamped to the tokens if cu_seqlens is invalid."""
    begin = tl.maximum(tl.load(cu_seqlens_ptr + seq), 0)
    end = tl.minimum(tl.load(cu_seqlens_ptr + seq + 1), num_tokens)
    return begin.to(tl.int64), end.to(tl.int64)


@triton.jit
def policy_prepare_kernel(
    cu_seqlens_ptr,  # (S + 1,) int32
    mask_ptr,  # (T,) bool or None
    seq_advantage_ptr,  # (S,) float32 or None
    counts_ptr,  # (S,) int32, written
    agg_weight_ptr,  # (T,) float32 or None, written: 1 / (valid tokens of the sequence)
    advantage_ptr,  # (T,) float32 or None, written
    num_tokens,
    BLOCK_T: tl.constexpr,
):
    seq = tl.program_id(0)
    begin, end = _borders(cu_seqlens_ptr, seq, num_tokens)
    count = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        count += tl.where(_kept(mask_ptr, offs_t, offs_t < end), 1, 0)
    total = tl.sum(count, axis=0)
    tl.store(counts_ptr + seq, total)
    if agg_weight_ptr is not None or advantage_ptr is not None:
        for start in range(begin, end, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            if agg_weight_ptr is not None:
                share = tl.zeros((BLOCK_T,), tl.float32) + 1.0 / tl.maximum(total, 1)
                tl.store(agg_weight_ptr + offs_t, share, mask=offs_t < end)
            if advantage_ptr is not None:
                a = tl.zeros((BLOCK_T,), tl.float32) + tl.load(seq_advantage_ptr + seq)
                tl.store(advantage_ptr + offs_t, a, mask=offs_t < end)


@triton.jit
def policy_loss_kernel(
    logp_ptr,  # (T,) float32
    entropy_ptr,  # (T,) float32 or None
    x,  # TokenPointers
    out,  # TokenResults; ratio and flags are not written
    partials_ptr,  # (P, SLOTS) float64, written
    scale_ptr,  # () float32 or None: inv_normalizer as a tensor
    o,  # ObjectiveNumbers
    scale,  # inv_normalizer as a number; used if scale_ptr is None
    num_tokens,
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block = tl.program_id(0)
    offs_t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = offs_t < num_tokens
    keep = _kept(x.mask, offs_t, in_range)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    logp = tl.load(logp_ptr + offs_t, mask=keep, other=0.0)
    entropy = tl.zeros((BLOCK_T,), tl.float32)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + offs_t, mask=keep, other=0.0)
    token_loss, d_logp, d_entropy, ratio, flags = token_objective(
        logp, entropy, scale, x, offs_t, keep, o, SHAPE, KL, ANCHOR, ENTROPY_BONUS
    )
    tl.store(out.token_loss + offs_t, token_loss, mask=in_range)
    tl.store(out.d_logp + offs_t, d_logp, mask=in_range)
    tl.store(out.d_entropy + offs_t, d_entropy, mask=in_range)
    old_logp = tl.load(x.old_logp + offs_t, mask=keep, other=0.0)
    ref_logp = logp
    if x.ref_logp is not None:
        ref_logp = tl.load(x.ref_logp + offs_t, mask=keep, other=0.0)
    metrics_block(
        partials_ptr + block.to(tl.int64) * SLOTS,
        in_range,
        keep,
        logp,
        old_logp,
        ref_logp,
        entropy,
        ratio,
        flags,
        token_loss,
        d_logp,
        d_entropy,
        x.ref_logp is not None,
    )


@triton.jit
def policy_loss_sequence_kernel(
    logp_ptr,  # (T,) float32
    entropy_ptr,  # (T,) float32 or None
    cu_seqlens_ptr,  # (S + 1,) int32
    counts_ptr,  # (S,) int32, written
    x,  # TokenPointers
    out,  # TokenResults
    scale_ptr,  # () float32 or None: inv_normalizer as a tensor
    o,  # ObjectiveNumbers
    scale,  # inv_normalizer as a number; used if scale_ptr is None
    num_tokens,
    SHAPE: tl.constexpr,
    LEVEL: tl.constexpr,
    KL: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    SEQ_MEAN: tl.constexpr,
    SEQ_ADVANTAGE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    seq = tl.program_id(0)
    begin, end = _borders(cu_seqlens_ptr, seq, num_tokens)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)

    total = tl.zeros((BLOCK_T,), tl.float64)
    counts = tl.zeros((BLOCK_T,), tl.int32)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        keep = _kept(x.mask, offs_t, offs_t < end)
        log_ratio = tl.load(logp_ptr + offs_t, mask=keep, other=0.0) - tl.load(
            x.old_logp + offs_t, mask=keep, other=0.0
        )
        a = _advantage(x, offs_t, seq, keep, SEQ_ADVANTAGE)
        bounded, _ = bounded_log_ratio(log_ratio, a, o, SHAPE, TOKEN_STAGE)
        total += tl.where(keep, bounded, 0.0).to(tl.float64)
        counts += tl.where(keep, 1, 0)
    count = tl.sum(counts, axis=0)
    tl.store(counts_ptr + seq, count)
    # A float64 division is a function call with a stack frame. One Newton step is accurate enough.
    valid = tl.maximum(count, 1)
    share = (1.0 / valid.to(tl.float32)).to(tl.float64)
    share = share * (2.0 - valid.to(tl.float64) * share)
    if SEQ_MEAN:
        scale = scale * share.to(tl.float32)
    if LEVEL == LEVEL_SEQUENCE_SUM:
        share = share * 0.0 + 1.0
    mean = (tl.sum(total, axis=0) * share).to(tl.float32)
    level_log_ratio, level_inside = bounded_log_ratio(mean, 0.0, o, SHAPE, LEVEL_STAGE)

    chains = tl.zeros((BLOCK_T,), tl.float64)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        keep = _kept(x.mask, offs_t, offs_t < end)
        logp = tl.load(logp_ptr + offs_t, mask=keep, other=0.0)
        old_logp = tl.load(x.old_logp + offs_t, mask=keep, other=0.0)
        entropy = load_or(entropy_ptr, offs_t, keep, 0.0)
        d = tl.zeros((BLOCK_T,), tl.float32) + level_log_ratio
        a = _advantage(x, offs_t, seq, keep, SEQ_ADVANTAGE)
        loss, d_logp, d_entropy, chain, flags = token_terms(
            d, logp, old_logp, entropy, a, scale, x, offs_t, keep, o, SHAPE, KL, ANCHOR, ENTROPY_BONUS
        )
        if LEVEL == LEVEL_SEQUENCE_TOKEN:
            d_logp += level_inside * chain
        chains += tl.where(keep, chain, 0.0).to(tl.float64)
        in_range = offs_t < end
        tl.store(out.token_loss + offs_t, tl.where(keep, loss, 0.0), mask=in_range)
        tl.store(out.d_logp + offs_t, tl.where(keep, d_logp, 0.0), mask=in_range)
        tl.store(out.d_entropy + offs_t, tl.where(keep, d_entropy, 0.0), mask=in_range)
        tl.store(out.ratio + offs_t, tl.exp(d), mask=in_range)
        tl.store(out.flags + offs_t, flags, mask=in_range)

    if LEVEL != LEVEL_SEQUENCE_TOKEN:
        each = (level_inside * tl.sum(chains, axis=0) * share).to(tl.float32)
        tl.debug_barrier()  # another thread may have written the d_logp that is loaded below
        for start in range(begin, end, BLOCK_T):
            offs_t = start + tl.arange(0, BLOCK_T)
            keep = _kept(x.mask, offs_t, offs_t < end)
            log_ratio = tl.load(logp_ptr + offs_t, mask=keep, other=0.0) - tl.load(
                x.old_logp + offs_t, mask=keep, other=0.0
            )
            a = _advantage(x, offs_t, seq, keep, SEQ_ADVANTAGE)
            _, inside = bounded_log_ratio(log_ratio, a, o, SHAPE, TOKEN_STAGE)
            d_logp = tl.load(out.d_logp + offs_t, mask=keep, other=0.0)
            tl.store(out.d_logp + offs_t, d_logp + inside * each, mask=keep)


@triton.jit
def _advantage(x, offs, seq, keep, SEQ_ADVANTAGE: tl.constexpr):
    if SEQ_ADVANTAGE:
        return tl.where(keep, tl.load(x.advantage + seq), 0.0)
    else:
        return tl.load(x.advantage + offs, mask=keep, other=0.0)


def prepare(
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    num_tokens: int,
    *,
    seq_mean: bool,
    seq_advantage: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Launch policy_prepare_kernel.

    Args:
        cu_seqlens: (seqs + 1,) int32, borders of the sequences.
        mask: (tokens,) bool. None: every token counts.
        num_tokens: number of packed tokens.
        seq_mean: True if a token has the weight 1 / (valid tokens of its sequence).
        seq_advantage: (seqs,) float32, advantages to expand to the tokens. None: not needed.

    Returns:
        counts: (seqs,) int32, valid tokens of each sequence.
        agg_weight: (tokens,) float32 aggregation weights, or None.
        advantage: (tokens,) float32, or None.
    """
    num_seqs = cu_seqlens.shape[0] - 1
    config = launch.choose("policy_sequences", cu_seqlens)
    counts = cu_seqlens.new_empty(num_seqs)
    weights = cu_seqlens.new_empty(num_tokens, dtype=torch.float32) if seq_mean else None
    advantage = None if seq_advantage is None else seq_advantage.new_empty(num_tokens)
    if num_seqs:
        policy_prepare_kernel[(num_seqs,)](
            cu_seqlens,
            mask,
            seq_advantage,
            counts,
            weights,
            advantage,
            num_tokens,
            BLOCK_T=config.block_t,
            **config.options,
        )
    return counts, weights, advantage


def results_like(vector: torch.Tensor) -> TokenResults:
    """Return uninitialised results for the tokens of `vector`, (tokens,) float32."""
    return TokenResults(*(torch.empty_like(vector) for _ in range(4)), torch.empty_like(vector, dtype=torch.int32))


def policy_loss(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    x: TokenPointers,
    numbers: ObjectiveNumbers,
    codes: tuple[int, int, int],
    inv_normalizer: float | torch.Tensor,
    counts: torch.Tensor | None,
) -> tuple[TokenResults, torch.Tensor]:
    """Launch a token-level objective. The caller has checked shapes and devices.

    Args:
        logp: (tokens,) float32; contiguous, like all vectors here.
        entropy: (tokens,) float32 or None.
        x: inputs of the objective; advantage and aggregation weight are per token.
        numbers: run-time values of the objective.
        codes: (shape, KL estimator, estimator of the anchor).
        inv_normalizer: 1 / normaliser, a number or a () float32 tensor.
        counts: (seqs,) int32, valid tokens of each sequence, or None.

    Returns:
        out: token results; ratio and flags are None.
        sums: (SLOTS,) float64 metric sums.
    """
    require_signal(x, codes[0])
    num_tokens = logp.shape[0]
    config = launch.choose("policy_metrics", logp)  # the blocks of policy_step, for the same sums
    out = TokenResults(*(torch.empty_like(logp) for _ in range(3)), None, None)
    partials = logp.new_empty(policy_metrics.blocks(num_tokens, config), SLOTS, dtype=torch.float64)
    if num_tokens:
        scale_ptr, number = pointer_or_number(inv_normalizer)
        policy_loss_kernel[(partials.shape[0],)](
            logp,
            entropy,
            x,
            out,
            partials,
            scale_ptr,
            numbers,
            number,
            num_tokens,
            SHAPE=codes[0],
            KL=codes[1],
            ANCHOR=codes[2],
            ENTROPY_BONUS=numbers.entropy_coef != 0.0,
            BLOCK_T=config.block_t,
            SLOTS=SLOTS,
            **config.options,
        )
    return out, policy_metrics.merge(partials, counts, config)


def policy_loss_sequence(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
    x: TokenPointers,
    numbers: ObjectiveNumbers,
    codes: tuple[int, int, int, int],
    inv_normalizer: float | torch.Tensor,
    *,
    seq_mean: bool,
    seq_advantage: bool,
) -> tuple[TokenResults, torch.Tensor]:
    """Launch a sequence-level objective. The caller has checked shapes and devices.

    Args:
        logp: (tokens,) float32; contiguous, like all vectors here.
        entropy: (tokens,) float32 or None.
        cu_seqlens: (seqs + 1,) int32, borders of the sequences.
        x: inputs of the objective; the advantage is (seqs,) with seq_advantage.
        numbers: run-time values of the objective.
        codes: (shape, KL estimator, estimator of the anchor, level).
        inv_normalizer: 1 / normaliser, a number or a () float32 tensor.
        seq_mean: True if a token has the weight 1 / (valid tokens of its sequence).
        seq_advantage: True if there is one advantage per sequence.

    Returns:
        out: token results.
        sums: (SLOTS,) float64 metric sums.
    """
    require_signal(x, codes[0])
    num_tokens, num_seqs = logp.shape[0], cu_seqlens.shape[0] - 1
    config = launch.choose("policy_sequences", logp)
    out = results_like(logp)
    counts = cu_seqlens.new_empty(num_seqs)
    if num_seqs:
        scale_ptr, number = pointer_or_number(inv_normalizer)
        policy_loss_sequence_kernel[(num_seqs,)](
            logp,
            entropy,
            cu_seqlens,
            counts,
            x,
            out,
            scale_ptr,
            numbers,
            number,
            num_tokens,
            SHAPE=codes[0],
            KL=codes[1],
            ANCHOR=codes[2],
            LEVEL=codes[3],
            ENTROPY_BONUS=numbers.entropy_coef != 0.0,
            SEQ_MEAN=seq_mean,
            SEQ_ADVANTAGE=seq_advantage,
            BLOCK_T=config.block_t,
            **config.options,
        )
    sums = policy_metrics.policy_metrics(logp, entropy, x.old_logp, x.ref_logp, x.mask, out, counts)
    return out, sums


def pointer_or_number(value: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Split a value into (tensor or None, number); a kernel uses the number if there is no tensor."""
    return (value, 1.0) if isinstance(value, torch.Tensor) else (None, value)


def _case_inputs(tokens: int) -> TokenPointers:
    v = meta(tokens)
    return TokenPointers(v, v, meta(tokens, dtype=torch.bool), v, v, None, v, None, None)


@compile_case("policy_loss", dtypes=(torch.float32,), streams=7)
def _(dtype: torch.dtype) -> None:
    x = _case_inputs(8192)
    policy_loss(meta(8192), meta(8192), x, CASE_NUMBERS, CASE_CODES, 1e-3, None)


@compile_case("policy_loss/sequence", dtypes=(torch.float32,), streams=7)
def _(dtype: torch.dtype) -> None:
    x, cu = _case_inputs(8192), borders(512, 8192)
    prepare(cu, x.mask, 8192, seq_mean=True, seq_advantage=meta(512))
    policy_loss_sequence(
        meta(8192),
        meta(8192),
        cu,
        x,
        CASE_NUMBERS,
        (*CASE_CODES, LEVEL_SEQUENCE.value),
        1e-3,
        seq_mean=True,
        seq_advantage=False,
    )
