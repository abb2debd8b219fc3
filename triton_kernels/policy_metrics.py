"""Metric sums of a policy objective: float64 sums per block of tokens, added in block order.

    metrics_block                the sums of one block, inside a kernel that has its values
    policy_metrics_kernel        the same from vectors that a kernel wrote (28 to 36 bytes per token)
    policy_metrics_merge_kernel  one program adds the partial sums

There are no atomics. A block is BLOCK_T consecutive tokens, and blocks are added in a fixed order.
So the sums are bitwise repeatable and do not depend on the device. The slots are those of
runtime/policy/metrics.py and of Metric in csrc/common/objective.h.

Legend: T tokens, P partial sums (one row per block of tokens).
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig
from tokfuse.triton_kernels.objective import CLIPPED_DUAL, CLIPPED_HIGH, CLIPPED_LOW

SLOTS = 17
SLOTS_P2 = tl.constexpr(32)  # tl.arange takes powers of two
SEQS = tl.constexpr(2)
RATIO_MIN = tl.constexpr(13)
RATIO_MAX = tl.constexpr(14)

launch.declare("policy_metrics", {80: LaunchConfig(block_t=1024, num_warps=4)})


class TokenResults(NamedTuple):
    """Outputs of an objective, (T,) each. Only the metrics read ratio and flags."""

    token_loss: Any  # float32
    d_logp: Any  # float32
    d_entropy: Any  # float32
    ratio: Any  # float32, at the objective's level
    flags: Any  # int32


@triton.jit
def _count(condition):
    return tl.sum(tl.where(condition, 1, 0), axis=0)


@triton.jit
def _exp_minus(d):
    """Return e^d - 1 - d in float64. The cancellation error of 1e-16 is negligible in a metric."""
    return tl.exp(d) - 1.0 - d


@triton.jit
def metrics_block(
    partial_ptr,  # of this block
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
    HAS_REF: tl.constexpr,
):
    """Store the sums of one block of tokens. Values of tokens that are not kept must be 0."""
    tokens, kept = _count(in_range), _count(keep)
    d = logp.to(tl.float64) - old_logp.to(tl.float64)
    r = ratio.to(tl.float64)
    tl.store(partial_ptr + 0, kept.to(tl.float64))
    tl.store(partial_ptr + 1, tokens.to(tl.float64))
    tl.store(partial_ptr + 2, 0.0)  # the merge kernel counts the sequences
    tl.store(partial_ptr + 3, tl.sum(token_loss.to(tl.float64), axis=0))
    tl.store(partial_ptr + 4, (tokens - kept).to(tl.float64))
    tl.store(partial_ptr + 5, _count(keep & (flags == CLIPPED_LOW)).to(tl.float64))
    tl.store(partial_ptr + 6, _count(keep & (flags == CLIPPED_HIGH)).to(tl.float64))
    tl.store(partial_ptr + 7, _count(keep & (flags == CLIPPED_DUAL)).to(tl.float64))
    tl.store(partial_ptr + 8, tl.sum(-d, axis=0))
    tl.store(partial_ptr + 9, tl.sum(_exp_minus(d), axis=0))
    if HAS_REF:
        k = logp.to(tl.float64) - ref_logp.to(tl.float64)
        tl.store(partial_ptr + 10, tl.sum(k, axis=0))
        tl.store(partial_ptr + 11, tl.sum(_exp_minus(-k), axis=0))
    else:
        tl.store(partial_ptr + 10, 0.0)
        tl.store(partial_ptr + 11, 0.0)
    tl.store(partial_ptr + 12, tl.sum(tl.where(keep, r, 0.0), axis=0))
    tl.store(partial_ptr + RATIO_MIN, tl.min(tl.where(keep, r, float("inf")), axis=0))
    tl.store(partial_ptr + RATIO_MAX, tl.max(tl.where(keep, r, float("-inf")), axis=0))
    tl.store(partial_ptr + 15, tl.sum(entropy.to(tl.float64), axis=0))
    tl.store(partial_ptr + 16, _count((d_logp != 0.0) | (d_entropy != 0.0)).to(tl.float64))


@triton.jit
def policy_metrics_kernel(
    logp_ptr,  # (T,) float32
    entropy_ptr,  # (T,) float32 or None
    old_logp_ptr,  # (T,) float32
    ref_logp_ptr,  # (T,) float32 or None
    mask_ptr,  # (T,) bool or None
    results,  # TokenResults
    partials_ptr,  # (P, SLOTS) float64
    num_tokens,
    BLOCK_T: tl.constexpr,
    SLOTS: tl.constexpr,
):
    block = tl.program_id(0)
    offs_t = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    in_range = offs_t < num_tokens
    keep = in_range
    if mask_ptr is not None:
        keep = in_range & tl.load(mask_ptr + offs_t, mask=in_range, other=0).to(tl.int1)
    logp = tl.load(logp_ptr + offs_t, mask=keep, other=0.0)
    old_logp = tl.load(old_logp_ptr + offs_t, mask=keep, other=0.0)
    ref_logp, entropy = logp, tl.zeros((BLOCK_T,), tl.float32)
    if ref_logp_ptr is not None:
        ref_logp = tl.load(ref_logp_ptr + offs_t, mask=keep, other=0.0)
    if entropy_ptr is not None:
        entropy = tl.load(entropy_ptr + offs_t, mask=keep, other=0.0)
    metrics_block(
        partials_ptr + block.to(tl.int64) * SLOTS,
        in_range,
        keep,
        logp,
        old_logp,
        ref_logp,
        entropy,
        tl.load(results.ratio + offs_t, mask=keep, other=0.0),
        tl.load(results.flags + offs_t, mask=keep, other=0),
        tl.load(results.token_loss + offs_t, mask=keep, other=0.0),
        tl.load(results.d_logp + offs_t, mask=keep, other=0.0),
        tl.load(results.d_entropy + offs_t, mask=keep, other=0.0),
        ref_logp_ptr is not None,
    )


@triton.jit
def policy_metrics_merge_kernel(
    partials_ptr,  # (P, SLOTS) float64
    counts_ptr,  # (S,) int32 valid tokens of each sequence, or None
    sums_ptr,  # (SLOTS,) float64
    num_partials,
    num_seqs,
    BLOCK_T: tl.constexpr,
    SLOTS: tl.constexpr,
    SLOTS_P2: tl.constexpr,
):
    slot = tl.arange(0, SLOTS_P2)
    total = tl.zeros((SLOTS_P2,), tl.float64)
    total = tl.where(slot == RATIO_MIN, float("inf"), total)
    total = tl.where(slot == RATIO_MAX, float("-inf"), total)
    for p in range(0, num_partials):
        part = tl.load(partials_ptr + p * SLOTS + slot, mask=slot < SLOTS, other=0.0)
        low, high = tl.minimum(total, part), tl.maximum(total, part)
        total = tl.where(slot == RATIO_MIN, low, tl.where(slot == RATIO_MAX, high, total + part))
    if counts_ptr is not None:
        seqs = tl.zeros((BLOCK_T,), tl.int32)
        for start in range(0, num_seqs, BLOCK_T):
            offs_s = start + tl.arange(0, BLOCK_T)
            count = tl.load(counts_ptr + offs_s, mask=offs_s < num_seqs, other=0)
            seqs += tl.where(count > 0, 1, 0)
        total = tl.where(slot == SEQS, tl.sum(seqs, axis=0).to(tl.float64), total)
    tl.store(sums_ptr + slot, total, mask=slot < SLOTS)


def blocks(num_tokens: int, config: LaunchConfig) -> int:
    """Return the number of partial sums."""
    return -(-num_tokens // config.block_t)


def policy_metrics(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logp: torch.Tensor,
    ref_logp: torch.Tensor | None,
    mask: torch.Tensor | None,
    results: TokenResults,
    counts: torch.Tensor | None,
) -> torch.Tensor:
    """Return the metric sums, (SLOTS,) float64, of token results that a kernel wrote."""
    num_tokens = logp.shape[0]
    config = launch.choose("policy_metrics", logp)
    partials = logp.new_empty(blocks(num_tokens, config), SLOTS, dtype=torch.float64)
    if num_tokens:
        policy_metrics_kernel[(partials.shape[0],)](
            logp,
            entropy,
            old_logp,
            ref_logp,
            mask,
            results,
            partials,
            num_tokens,
            BLOCK_T=config.block_t,
            SLOTS=SLOTS,
            **config.options,
        )
    return merge(partials, counts, config)


def merge(partials: torch.Tensor, counts: torch.Tensor | None, config: LaunchConfig) -> torch.Tensor:
    """Add the partial sums. `counts` has the valid tokens of each sequence."""
    sums = partials.new_empty(SLOTS)
    policy_metrics_merge_kernel[(1,)](
        partials,
        counts,
        sums,
        partials.shape[0],
        0 if counts is None else counts.shape[0],
        BLOCK_T=config.block_t,
        SLOTS=SLOTS,
        SLOTS_P2=SLOTS_P2,
        num_warps=1,
    )
    return sums


@compile_case("policy_metrics", dtypes=(torch.float32,), streams=10)
def _(dtype: torch.dtype) -> None:
    vector = meta(8192)
    results = TokenResults(*[vector] * 4, meta(8192, dtype=torch.int32))
    counts = meta(512, dtype=torch.int32)
    policy_metrics(vector, vector, vector, vector, meta(8192, dtype=torch.bool), results, counts)
