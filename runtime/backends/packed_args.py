"""Build the argument structs of the packed kernels (csrc/common/packed_args.h). Nothing else builds them.

`native` is the module whose kernel takes the struct: `core.native.loaded()` or `cuda_backend.launchers()`.
`cuda` holds the fields that only CUDA reads: `order` and scratch memory. A struct keeps its tensors alive.
`docs/names.md` defines every field.
"""

import math
from typing import Any

import torch

from tokfuse.runtime.core.codes import (
    BASELINES,
    NORMALIZE,
    RULE_OVER,
    RULE_STATISTICS,
    SCALES,
    WEIGHT_LEVELS,
    WEIGHT_MODES,
)
from tokfuse.runtime.policy.keep_rule import KeepRule


def moments_args(
    native: Any,
    *,
    values: torch.Tensor,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_segments: int,
    mask: torch.Tensor | None,
    out: tuple[torch.Tensor, ...],
    **cuda: Any,
) -> Any:
    """Build MomentsArgs. out: (count, sum, sum_sq, min, max), (segments,) each."""
    count, total, sum_sq, low, high = out
    return native.MomentsArgs(
        rows=values.shape[0],
        segments=num_segments,
        values=values,
        is_double=values.dtype == torch.float64,
        segment_ids=segment_ids,
        cu_seqlens=cu_seqlens,
        mask=mask,
        count=count,
        sum=total,
        sum_sq=sum_sq,
        min=low,
        max=high,
        threads=torch.get_num_threads(),
        **cuda,
    )


def gae_args(
    native: Any,
    *,
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float | torch.Tensor,
    length_adaptive_alpha: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
    advantage: torch.Tensor,
    returns: torch.Tensor,
) -> Any:
    """Build GaeArgs: the kernel writes to `advantage` and `returns`."""
    per_seq = isinstance(lam, torch.Tensor)
    return native.GaeArgs(
        tokens=reward.shape[0],
        seqs=cu_seqlens.shape[0] - 1,
        reward=reward,
        value=value,
        cu_seqlens=cu_seqlens,
        mask=mask,
        finished=finished,
        gamma=gamma,
        lam=1.0 if per_seq else lam,
        lam_per_seq=lam if per_seq else None,
        length_adaptive_alpha=length_adaptive_alpha or 0.0,
        advantage=advantage,
        returns=returns,
        threads=torch.get_num_threads(),
    )


def vtrace_args(
    native: Any,
    *,
    log_ratio: torch.Tensor,
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    gamma: float,
    lam: float,
    rho_bar: float | None,
    c_bar: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
    value_target: torch.Tensor,
    advantage: torch.Tensor,
    rho: torch.Tensor,
) -> Any:
    """Build VtraceArgs: the kernel writes to `value_target`, `advantage` and `rho`."""
    return native.VtraceArgs(
        tokens=reward.shape[0],
        seqs=cu_seqlens.shape[0] - 1,
        log_ratio=log_ratio,
        reward=reward,
        value=value,
        cu_seqlens=cu_seqlens,
        mask=mask,
        finished=finished,
        gamma=gamma,
        lam=lam,
        rho_bar=math.inf if rho_bar is None else rho_bar,
        c_bar=math.inf if c_bar is None else c_bar,
        value_target=value_target,
        advantage=advantage,
        rho=rho,
        threads=torch.get_num_threads(),
    )


def whiten_args(
    native: Any,
    *,
    x: torch.Tensor,
    mask: torch.Tensor | None,
    shift_mean: bool,
    eps: float,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
    out: torch.Tensor,
    **cuda: Any,
) -> Any:
    """Build WhitenArgs: the kernel writes to `out`."""
    return native.WhitenArgs(
        tokens=x.shape[0],
        x=x,
        mask=mask,
        mean=mean,
        var=var,
        out=out,
        shift_mean=shift_mean,
        eps=eps,
        threads=torch.get_num_threads(),
        **cuda,
    )


def ope_args(
    native: Any,
    *,
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    mask: torch.Tensor | None,
    out: torch.Tensor,
    **cuda: Any,
) -> Any:
    """Build OpeArgs: the kernel writes to `out`, (5, 2) float64."""
    return native.OpeArgs(
        rows=reward.shape[0],
        weight=weight,
        reward=reward,
        q_pi=q_pi,
        q_a=q_a,
        mask=mask,
        out=out,
        threads=torch.get_num_threads(),
        **cuda,
    )


def group_advantage_args(
    native: Any,
    *,
    reward: torch.Tensor,
    group_ids: torch.Tensor | None,
    baseline: str,
    scale: str,
    sample_std: bool,
    eps: float,
    singleton_reward: bool,
    lengths: torch.Tensor | None,
    greedy_reward: torch.Tensor | None,
    advantage: torch.Tensor,
    **cuda: Any,
) -> Any:
    """Build GroupAdvantageArgs: the kernel writes to `advantage`."""
    return native.GroupAdvantageArgs(
        seqs=reward.shape[0],
        reward=reward,
        group_ids=group_ids,
        lengths=lengths,
        greedy_reward=greedy_reward,
        advantage=advantage,
        baseline=BASELINES.index(baseline),
        scale=SCALES.index(scale),
        ddof=int(sample_std),
        eps=eps,
        singleton_reward=singleton_reward,
        threads=torch.get_num_threads(),
        **cuda,
    )


def keep_rule(native: Any, rule: KeepRule) -> Any:
    """Build a KeepRule struct."""
    return native.KeepRule(
        statistic=RULE_STATISTICS.index(rule.statistic),
        over=RULE_OVER.index(rule.over),
        low=-math.inf if rule.low is None else rule.low,
        high=math.inf if rule.high is None else rule.high,
        negative_only=rule.negative_only,
    )


def offpolicy_args(
    native: Any,
    *,
    logp: torch.Tensor | None,
    behavior_logp: torch.Tensor,
    level: str,
    mode: str,
    low: float | None,
    high: float | None,
    lam: float | None,
    power: float | None,
    normalize: str,
    rules: tuple[KeepRule, ...],
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    advantage: torch.Tensor | None,
    weight: torch.Tensor,
    kept: torch.Tensor,
    **cuda: Any,
) -> Any:
    """Build OffPolicyArgs: the kernel writes to `weight` and `kept`."""
    return native.OffPolicyArgs(
        tokens=behavior_logp.shape[0],
        seqs=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        logp=logp,
        behavior_logp=behavior_logp,
        cu_seqlens=cu_seqlens,
        mask=mask,
        group_ids=group_ids,
        advantage=advantage,
        level=WEIGHT_LEVELS.index(level),
        mode=WEIGHT_MODES.index(mode),
        low=-math.inf if low is None else low,
        high=math.inf if high is None else high,
        param=lam or power or 0.0,
        normalize=NORMALIZE.index(normalize),
        rules=[keep_rule(native, rule) for rule in rules],
        weight=weight,
        kept=kept,
        threads=torch.get_num_threads(),
        **cuda,
    )


def sketch_args(
    native: Any, *, left: torch.Tensor, right: torch.Tensor, cu_seqlens: torch.Tensor, out: torch.Tensor
) -> Any:
    """Build SketchArgs. left, right: (tokens, rank) float32; out: (seqs, rank, rank)."""
    return native.SketchArgs(
        tokens=left.shape[0],
        seqs=cu_seqlens.shape[0] - 1,
        rank=left.shape[1],
        left=left,
        right=right,
        cu_seqlens=cu_seqlens,
        out=out,
    )
