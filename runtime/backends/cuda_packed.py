"""Launchers of the CUDA kernels over packed vectors: outputs and scratch memory from torch.

One launch each. Ids are sorted by torch first, in memory of the caching allocator.
"""

import math

import torch

from tokfuse.runtime.backends.cuda_backend import launchers, place, sorted_ids
from tokfuse.runtime.backends.device_sketch import device_sketch
from tokfuse.runtime.backends.value_checks import with_segment_ids
from tokfuse.runtime.core.codes import BASELINES, ESTIMATES, NORMALIZE, SCALES, WEIGHT_LEVELS, WEIGHT_MODES
from tokfuse.runtime.core.native import pointer
from tokfuse.runtime.policy.keep_rule import KeepRule


def _doubles(count: int, like: torch.Tensor) -> torch.Tensor:
    return torch.empty(count, dtype=torch.float64, device=like.device)


def launch_segment_moments(
    values: torch.Tensor,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_segments: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(count, sum, sum_sq, min, max), each (segments,).

    A row whose id is outside [0, num_segments) counts nowhere.
    """
    if segment_ids is not None and mask is not None:
        # The id of a masked row is not read: it goes behind the last segment.
        segment_ids, mask = torch.where(mask, segment_ids, num_segments), None
    ids, order = sorted_ids(segment_ids)
    count = torch.empty(num_segments, dtype=torch.int64, device=values.device)
    out = [count, *(values.new_empty(num_segments) for _ in range(4))]
    rows = values.shape[0]
    parts = launchers().moments_parts(rows, num_segments)
    table = tickets = None
    if parts > 1:
        table = _doubles(5 * parts * num_segments, values)
        tickets = torch.empty(num_segments, dtype=torch.int32, device=values.device)
    launchers().segment_moments(
        place(values),
        pointer(values),
        values.dtype == torch.float64,
        pointer(ids),
        pointer(order),
        pointer(cu_seqlens),
        pointer(mask),
        *map(pointer, out),
        pointer(table),
        pointer(tickets),
        rows,
        num_segments,
    )
    return tuple(out)


segment_moments = with_segment_ids(launch_segment_moments)


def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float | torch.Tensor,
    length_adaptive_alpha: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage, returns), each (tokens,)."""
    advantage, returns = torch.empty_like(reward), torch.empty_like(reward)
    per_seq = lam if isinstance(lam, torch.Tensor) else None
    launchers().gae(
        place(reward),
        pointer(reward),
        pointer(value),
        pointer(cu_seqlens),
        pointer(mask),
        pointer(finished),
        pointer(per_seq),
        pointer(advantage),
        pointer(returns),
        reward.shape[0],
        cu_seqlens.shape[0] - 1,
        gamma,
        1.0 if isinstance(lam, torch.Tensor) else lam,
        length_adaptive_alpha or 0.0,
    )
    return advantage, returns


def vtrace(
    log_ratio: torch.Tensor,
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float,
    lam: float,
    rho_bar: float | None,
    c_bar: float | None,
    mask: torch.Tensor | None,
    finished: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target, advantage, rho), each (tokens,)."""
    target, advantage, rho = (torch.empty_like(reward) for _ in range(3))
    launchers().vtrace(
        place(reward),
        pointer(log_ratio),
        pointer(reward),
        pointer(value),
        pointer(cu_seqlens),
        pointer(mask),
        pointer(finished),
        pointer(target),
        pointer(advantage),
        pointer(rho),
        reward.shape[0],
        cu_seqlens.shape[0] - 1,
        gamma,
        lam,
        math.inf if rho_bar is None else rho_bar,
        math.inf if c_bar is None else c_bar,
    )
    return target, advantage, rho


def whiten(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    shift_mean: bool,
    eps: float,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
) -> torch.Tensor:
    """(tokens,), 0 where masked."""
    out = torch.empty_like(x)
    scratch = None
    if mean is None:
        scratch = _doubles(3 * -(-x.shape[0] // launchers().WHITEN_BLOCK), x)
    launchers().whiten(
        place(x),
        pointer(x),
        pointer(mask),
        pointer(mean),
        pointer(var),
        pointer(out),
        pointer(scratch),
        x.shape[0],
        shift_mean,
        eps,
    )
    return out


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(5, 2): estimate and standard error, in the order of `ESTIMATES`."""
    values = _doubles(2 * len(ESTIMATES), weight)
    scratch = _doubles(10 * -(-reward.shape[0] // launchers().OPE_BLOCK), weight)
    launchers().ope(
        place(weight),
        pointer(weight),
        pointer(reward),
        pointer(q_pi),
        pointer(q_a),
        pointer(mask),
        pointer(values),
        pointer(scratch),
        reward.shape[0],
    )
    return values.view(len(ESTIMATES), 2).to(reward.dtype)


def group_advantage(
    reward: torch.Tensor,
    group_ids: torch.Tensor | None,
    *,
    baseline: str,
    scale: str,
    sample_std: bool,
    eps: float,
    singleton_reward: bool,
    lengths: torch.Tensor | None,
    greedy_reward: torch.Tensor | None,
) -> torch.Tensor:
    """(seqs,)."""
    out = torch.empty_like(reward)
    ids, order = sorted_ids(group_ids)
    launchers().group_advantage(
        place(reward),
        pointer(reward),
        pointer(ids),
        pointer(order),
        pointer(lengths),
        pointer(greedy_reward),
        pointer(out),
        reward.shape[0],
        BASELINES.index(baseline),
        SCALES.index(scale),
        int(sample_std),
        eps,
        singleton_reward,
    )
    return out


def offpolicy_weights(
    logp: torch.Tensor | None,
    behavior: torch.Tensor,
    *,
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, ess, kept)."""
    tokens = behavior.shape[0]
    seqs = 0 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    normalize_code = NORMALIZE.index(normalize)
    spans = launchers().offpolicy_spans(tokens, seqs, cu_seqlens is not None, normalize_code)
    weight, ess = torch.empty_like(behavior), behavior.new_empty(())
    kept = torch.empty(tokens, dtype=torch.bool, device=behavior.device)
    partial = _doubles(5 * spans, behavior)
    ids, order = sorted_ids(group_ids)
    launchers().offpolicy_weights(
        place(behavior),
        pointer(logp),
        pointer(behavior),
        pointer(cu_seqlens),
        pointer(mask),
        pointer(ids),
        pointer(order),
        pointer(advantage),
        pointer(weight),
        pointer(kept),
        pointer(ess),
        pointer(partial),
        tokens,
        seqs,
        WEIGHT_LEVELS.index(level),
        WEIGHT_MODES.index(mode),
        -math.inf if low is None else low,
        math.inf if high is None else high,
        lam or power or 0.0,
        normalize_code,
        [rule.record for rule in rules],
    )
    return weight, ess, kept


def launch_sketch(left: torch.Tensor, right: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(seqs, rank, rank): per sequence the sum over its tokens of left_t right_t^T.

    left, right: (tokens, rank) float32.
    """
    seqs, rank = cu_seqlens.shape[0] - 1, left.shape[1]
    out = left.new_empty(seqs, rank, rank)
    left, right = left.contiguous(), right.contiguous()
    launchers().sketch(
        place(left),
        pointer(left),
        pointer(right),
        pointer(cu_seqlens.contiguous()),
        pointer(out),
        left.shape[0],
        seqs,
        rank,
    )
    return out


sketch = device_sketch(launch_sketch)
