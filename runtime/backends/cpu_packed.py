"""The CPU kernels over packed vectors; the same functions as those of CUDA and Triton."""

import torch

from tokfuse.runtime.backends import packed_args
from tokfuse.runtime.backends.value_checks import refuse_segment_id
from tokfuse.runtime.core import native
from tokfuse.runtime.core.codes import ESTIMATES
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
    module = native.loaded()
    count = torch.empty(num_segments, dtype=torch.int64)
    out = (count, *(values.new_empty(num_segments) for _ in range(4)))
    bad = module.segment_moments(
        packed_args.moments_args(
            module,
            values=values,
            segment_ids=segment_ids,
            cu_seqlens=cu_seqlens,
            num_segments=num_segments,
            mask=mask,
            out=out,
        )
    )
    if bad >= 0:
        assert segment_ids is not None
        refuse_segment_id(segment_ids, bad, num_segments)
    return out


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
    module = native.loaded()
    advantage, returns = native.empty_like_rows(reward), native.empty_like_rows(reward)
    module.gae(
        packed_args.gae_args(
            module,
            reward=reward,
            value=value,
            cu_seqlens=cu_seqlens,
            gamma=gamma,
            lam=lam,
            length_adaptive_alpha=length_adaptive_alpha,
            mask=mask,
            finished=finished,
            advantage=advantage,
            returns=returns,
        )
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
    module = native.loaded()
    target, advantage, rho = (native.empty_like_rows(reward) for _ in range(3))
    module.vtrace(
        packed_args.vtrace_args(
            module,
            log_ratio=log_ratio,
            reward=reward,
            value=value,
            cu_seqlens=cu_seqlens,
            gamma=gamma,
            lam=lam,
            rho_bar=rho_bar,
            c_bar=c_bar,
            mask=mask,
            finished=finished,
            value_target=target,
            advantage=advantage,
            rho=rho,
        )
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
    module, out = native.loaded(), native.empty_like_rows(x)
    module.whiten(
        packed_args.whiten_args(module, x=x, mask=mask, shift_mean=shift_mean, eps=eps, mean=mean, var=var, out=out)
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
    module, values = native.loaded(), torch.empty(len(ESTIMATES), 2, dtype=torch.float64)
    module.ope(packed_args.ope_args(module, weight=weight, reward=reward, q_pi=q_pi, q_a=q_a, mask=mask, out=values))
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
    module, out = native.loaded(), torch.empty_like(reward)
    module.group_advantage(
        packed_args.group_advantage_args(
            module,
            reward=reward,
            group_ids=group_ids,
            baseline=baseline,
            scale=scale,
            sample_std=sample_std,
            eps=eps,
            singleton_reward=singleton_reward,
            lengths=lengths,
            greedy_reward=greedy_reward,
            advantage=out,
        )
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
    module, weight = native.loaded(), native.empty_like_rows(behavior)
    kept = torch.empty(behavior.shape[0], dtype=torch.bool)
    ess = module.offpolicy_weights(
        packed_args.offpolicy_args(
            module,
            logp=logp,
            behavior_logp=behavior,
            level=level,
            mode=mode,
            low=low,
            high=high,
            lam=lam,
            power=power,
            normalize=normalize,
            rules=rules,
            cu_seqlens=cu_seqlens,
            mask=mask,
            group_ids=group_ids,
            advantage=advantage,
            weight=weight,
            kept=kept,
        )
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
