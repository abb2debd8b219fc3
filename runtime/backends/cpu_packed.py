"""Call the CPU kernels over packed vectors, by the same functions as for CUDA and Triton.

`options` are the keywords that `packed_args` documents for the op.
"""

from typing import Any

import torch

from tokfuse.runtime.backends import packed_args
from tokfuse.runtime.backends.value_checks import refuse_segment_id
from tokfuse.runtime.core import native
from tokfuse.runtime.core.codes import ESTIMATES
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
    count = torch.empty(num_segments, dtype=torch.int64, device="cpu")
    out = (count, *(native.empty((num_segments,), values.dtype) for _ in range(4)))
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
    reward: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage, returns), each (tokens,)."""
    module, advantage, returns = native.loaded(), native.empty_like_rows(reward), native.empty_like_rows(reward)
    args = packed_args.gae_args(
        module, reward=reward, value=value, cu_seqlens=cu_seqlens, advantage=advantage, returns=returns, **options
    )
    module.gae(args)
    return advantage, returns


def vtrace(
    log_ratio: torch.Tensor, reward: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target, advantage, rho), each (tokens,)."""
    module = native.loaded()
    target, advantage, rho = (native.empty_like_rows(reward) for _ in range(3))
    args = packed_args.vtrace_args(
        module,
        log_ratio=log_ratio,
        reward=reward,
        value=value,
        cu_seqlens=cu_seqlens,
        value_target=target,
        advantage=advantage,
        rho=rho,
        **options,
    )
    module.vtrace(args)
    return target, advantage, rho


def whiten(x: torch.Tensor, **options: Any) -> torch.Tensor:
    """(tokens,), 0 where masked."""
    module, out = native.loaded(), native.empty_like_rows(x)
    module.whiten(packed_args.whiten_args(module, x=x, out=out, **options))
    return out


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(5, 2): estimate and standard error, in the order of `ESTIMATES`."""
    module, values = native.loaded(), torch.empty(len(ESTIMATES), 2, dtype=torch.float64, device="cpu")
    module.ope(packed_args.ope_args(module, weight=weight, reward=reward, q_pi=q_pi, q_a=q_a, mask=mask, out=values))
    return values.to(reward.dtype)


def group_advantage(reward: torch.Tensor, group_ids: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """(seqs,)."""
    module, out = native.loaded(), native.empty_like_rows(reward)
    module.group_advantage(
        packed_args.group_advantage_args(module, reward=reward, group_ids=group_ids, advantage=out, **options)
    )
    return out


def offpolicy_weights(
    logp: torch.Tensor | None, behavior_logp: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, ess, kept)."""
    module, weight = native.loaded(), native.empty_like_rows(behavior_logp)
    kept = torch.empty(behavior_logp.shape[0], dtype=torch.bool, device="cpu")
    args = packed_args.offpolicy_args(
        module, logp=logp, behavior_logp=behavior_logp, weight=weight, kept=kept, **options
    )
    ess = module.offpolicy_weights(args)
    return weight, native.empty(()).fill_(ess), kept


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
    sketches = torch.empty(len(borders) - 1, rank, rank, dtype=dtype, device="cpu")
    for s, (begin, end) in enumerate(zip(borders[:-1], borders[1:], strict=True)):
        out, inner = left[begin:end].to(dtype), right[begin:end].to(dtype)
        torch.mm(out.t(), inner, out=sketches[s])
    return sketches


def _project(x: torch.Tensor, projection: torch.Tensor) -> torch.Tensor:
    out = torch.empty(x.shape[0], projection.shape[0], dtype=projection.dtype, device="cpu")
    for start in range(0, x.shape[0], SKETCH_CHUNK):
        rows = x[start : start + SKETCH_CHUNK].to(projection.dtype)
        torch.mm(rows, projection.t(), out=out[start : start + SKETCH_CHUNK])
    return out
