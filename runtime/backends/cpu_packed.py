"""The CPU kernels over packed vectors; the same functions as those of CUDA and Triton."""

import math

import torch

from tokfuse.runtime.backends.value_checks import refuse_segment_id
from tokfuse.runtime.core import native
from tokfuse.runtime.core.codes import BASELINES, ESTIMATES, NORMALIZE, SCALES, WEIGHT_LEVELS, WEIGHT_MODES
from tokfuse.runtime.policy.keep_rule import KeepRule
from tokfuse.runtime.reference.token_stats import result_dtype

SKETCH_CHUNK = 4096  # tokens projected at a time; bounds the float32 copies of 16-bit inputs


def segment_moments(
    values: torch.Tensor,
    segment_ids: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    num_segments: int,
    mask: torch.Tensor | None,
) -> tuple[torch.Tensor, ...]:
    """(count, sum, sum_sq, min, max), each (segments,)."""
    count = torch.empty(num_segments, dtype=torch.int64)
    total, square, low, high = (values.new_empty(num_segments) for _ in range(4))
    bad = native.loaded().segment_moments(
        native.pointer(values),
        values.dtype == torch.float64,
        native.pointer(segment_ids),
        native.pointer(cu_seqlens),
        native.pointer(mask),
        native.pointer(count),
        native.pointer(total),
        native.pointer(square),
        native.pointer(low),
        native.pointer(high),
        values.shape[0],
        num_segments,
        torch.get_num_threads(),
    )
    if bad >= 0:
        assert segment_ids is not None
        refuse_segment_id(segment_ids, bad, num_segments)
    return count, total, square, low, high


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
    advantage, returns = native.empty_like_rows(reward), native.empty_like_rows(reward)
    per_seq = lam if isinstance(lam, torch.Tensor) else None
    native.loaded().gae(
        native.pointer(reward),
        native.pointer(value),
        native.pointer(cu_seqlens),
        native.pointer(mask),
        native.pointer(finished),
        native.pointer(per_seq),
        native.pointer(advantage),
        native.pointer(returns),
        reward.shape[0],
        cu_seqlens.shape[0] - 1,
        gamma,
        1.0 if isinstance(lam, torch.Tensor) else lam,
        length_adaptive_alpha or 0.0,
        torch.get_num_threads(),
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
    target, advantage, rho = (native.empty_like_rows(reward) for _ in range(3))
    native.loaded().vtrace(
        native.pointer(log_ratio),
        native.pointer(reward),
        native.pointer(value),
        native.pointer(cu_seqlens),
        native.pointer(mask),
        native.pointer(finished),
        native.pointer(target),
        native.pointer(advantage),
        native.pointer(rho),
        reward.shape[0],
        cu_seqlens.shape[0] - 1,
        gamma,
        lam,
        math.inf if rho_bar is None else rho_bar,
        math.inf if c_bar is None else c_bar,
        torch.get_num_threads(),
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
    out = native.empty_like_rows(x)
    native.loaded().whiten(
        native.pointer(x),
        native.pointer(mask),
        native.pointer(mean),
        native.pointer(var),
        native.pointer(out),
        x.shape[0],
        shift_mean,
        eps,
        torch.get_num_threads(),
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
    values = torch.empty(len(ESTIMATES), 2, dtype=torch.float64)
    native.loaded().ope(
        native.pointer(weight),
        native.pointer(reward),
        native.pointer(q_pi),
        native.pointer(q_a),
        native.pointer(mask),
        native.pointer(values),
        reward.shape[0],
        torch.get_num_threads(),
    )
    return values.to(reward.dtype)


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
    native.loaded().group_advantage(
        native.pointer(reward),
        native.pointer(group_ids),
        native.pointer(lengths),
        native.pointer(greedy_reward),
        native.pointer(out),
        reward.shape[0],
        BASELINES.index(baseline),
        SCALES.index(scale),
        int(sample_std),
        eps,
        singleton_reward,
        torch.get_num_threads(),
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
    weight = native.empty_like_rows(behavior)
    kept = torch.empty(behavior.shape[0], dtype=torch.bool)
    ess = native.loaded().offpolicy_weights(
        native.pointer(logp),
        native.pointer(behavior),
        native.pointer(cu_seqlens),
        native.pointer(mask),
        native.pointer(group_ids),
        native.pointer(advantage),
        native.pointer(weight),
        native.pointer(kept),
        behavior.shape[0],
        0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        WEIGHT_LEVELS.index(level),
        WEIGHT_MODES.index(mode),
        -math.inf if low is None else low,
        math.inf if high is None else high,
        lam or power or 0.0,
        NORMALIZE.index(normalize),
        [rule.record for rule in rules],
        torch.get_num_threads(),
    )
    return weight, torch.tensor(ess, dtype=torch.float32), kept


# -------------------------------------------------------------------------------------- influence


def sketch(
    grad_hidden: torch.Tensor,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    pair: tuple[torch.Tensor, torch.Tensor] | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    """(seqs, rank, rank); one small GEMM of torch per sequence: nothing is padded."""
    dtype = result_dtype(hidden.dtype)
    left, right = grad_hidden, hidden
    if pair is not None:
        left, right = _project(left, pair[0].to(dtype)), _project(right, pair[1].to(dtype))
    rank = left.shape[1]
    borders = cu_seqlens.tolist()
    sketches = torch.empty(len(borders) - 1, rank, rank, dtype=dtype)
    for s, (begin, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        out, inner = left[begin:end].to(dtype), right[begin:end].to(dtype)
        torch.mm(out.t(), inner, out=sketches[s])
    return sketches


def _project(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], projection.shape[0], dtype=projection.dtype)
    for start in range(0, x.shape[0], SKETCH_CHUNK):
        rows = x[start : start + SKETCH_CHUNK].to(projection.dtype)
        torch.mm(rows, projection.t(), out=out[start : start + SKETCH_CHUNK])
    return out
