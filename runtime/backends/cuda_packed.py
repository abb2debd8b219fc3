"""Launch the CUDA kernels over packed vectors, with outputs and scratch memory from torch.

Each function launches one kernel. torch sorts ids first. `options` are the keywords that
`packed_args` documents for the op.
"""

from typing import Any

import torch

from tokfuse.runtime.backends import packed_args
from tokfuse.runtime.backends.cuda_backend import launchers, place, sorted_ids
from tokfuse.runtime.backends.device_sketch import device_sketch
from tokfuse.runtime.backends.value_checks import with_segment_ids
from tokfuse.runtime.core.codes import ESTIMATES, NORMALIZE


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

    A row whose id is outside [0, num_segments) is not counted.
    """
    if segment_ids is not None and mask is not None:
        # The id of a masked row is replaced by one past the last segment, which is not counted.
        segment_ids, mask = torch.where(mask, segment_ids, num_segments), None
    ids, order = sorted_ids(segment_ids)
    native = launchers()
    count = torch.empty(num_segments, dtype=torch.int64, device=values.device)
    out = (count, *(values.new_empty(num_segments) for _ in range(4)))
    parts = native.moments_parts(rows=values.shape[0], segments=num_segments)
    table = tickets = None
    if parts > 1:
        table = _doubles(5 * parts * num_segments, values)
        tickets = torch.empty(num_segments, dtype=torch.int32, device=values.device)
    native.segment_moments(
        place(values),
        packed_args.moments_args(
            native,
            values=values,
            segment_ids=ids,
            cu_seqlens=cu_seqlens,
            num_segments=num_segments,
            mask=mask,
            out=out,
            order=order,
            parts=parts,
            table=table,
            tickets=tickets,
        ),
    )
    return out


segment_moments = with_segment_ids(launch_segment_moments)


def gae(
    reward: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(advantage, returns), each (tokens,)."""
    native, advantage, returns = launchers(), torch.empty_like(reward), torch.empty_like(reward)
    args = packed_args.gae_args(
        native, reward=reward, value=value, cu_seqlens=cu_seqlens, advantage=advantage, returns=returns, **options
    )
    native.gae(place(reward), args)
    return advantage, returns


def vtrace(
    log_ratio: torch.Tensor, reward: torch.Tensor, value: torch.Tensor, cu_seqlens: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(target, advantage, rho), each (tokens,)."""
    native = launchers()
    target, advantage, rho = (torch.empty_like(reward) for _ in range(3))
    args = packed_args.vtrace_args(
        native,
        log_ratio=log_ratio,
        reward=reward,
        value=value,
        cu_seqlens=cu_seqlens,
        value_target=target,
        advantage=advantage,
        rho=rho,
        **options,
    )
    native.vtrace(place(reward), args)
    return target, advantage, rho


def whiten(x: torch.Tensor, *, mean: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """(tokens,), 0 where masked."""
    native, out = launchers(), torch.empty_like(x)
    scratch = None
    if mean is None:
        scratch = _doubles(3 * -(-x.shape[0] // native.WHITEN_BLOCK), x)
    native.whiten(place(x), packed_args.whiten_args(native, x=x, mean=mean, out=out, scratch=scratch, **options))
    return out


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    """(5, 2): estimate and standard error, in the order of `ESTIMATES`."""
    native, values = launchers(), _doubles(2 * len(ESTIMATES), weight)
    scratch = _doubles(10 * -(-reward.shape[0] // native.OPE_BLOCK), weight)
    native.ope(
        place(weight),
        packed_args.ope_args(
            native, weight=weight, reward=reward, q_pi=q_pi, q_a=q_a, mask=mask, out=values, scratch=scratch
        ),
    )
    return values.view(len(ESTIMATES), 2).to(reward.dtype)


def group_advantage(reward: torch.Tensor, group_ids: torch.Tensor | None, **options: Any) -> torch.Tensor:
    """(seqs,)."""
    native, out = launchers(), torch.empty_like(reward)
    ids, order = sorted_ids(group_ids)
    args = packed_args.group_advantage_args(native, reward=reward, group_ids=ids, advantage=out, order=order, **options)
    native.group_advantage(place(reward), args)
    return out


def offpolicy_weights(
    logp: torch.Tensor | None,
    behavior_logp: torch.Tensor,
    *,
    normalize: str,
    cu_seqlens: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(weight, ess, kept)."""
    native, tokens = launchers(), behavior_logp.shape[0]
    spans = native.offpolicy_spans(
        tokens=tokens,
        seqs=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        borders=cu_seqlens is not None,
        normalize=NORMALIZE.index(normalize),
    )
    weight, ess = torch.empty_like(behavior_logp), behavior_logp.new_empty(())
    kept = torch.empty(tokens, dtype=torch.bool, device=behavior_logp.device)
    ids, order = sorted_ids(group_ids)
    args = packed_args.offpolicy_args(
        native,
        logp=logp,
        behavior_logp=behavior_logp,
        normalize=normalize,
        cu_seqlens=cu_seqlens,
        group_ids=ids,
        weight=weight,
        kept=kept,
        order=order,
        ess=ess,
        partial=_doubles(5 * spans, behavior_logp),
        **options,
    )
    native.offpolicy_weights(place(behavior_logp), args)
    return weight, ess, kept


def launch_sketch(left: torch.Tensor, right: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(seqs, rank, rank): per sequence the sum over its tokens of left_t right_t^T.

    left, right: (tokens, rank) float32.
    """
    seqs, rank = cu_seqlens.shape[0] - 1, left.shape[1]
    out = left.new_empty(seqs, rank, rank)
    left, right = left.contiguous(), right.contiguous()
    native = launchers()
    args = packed_args.sketch_args(native, left=left, right=right, cu_seqlens=cu_seqlens.contiguous(), out=out)
    native.sketch(place(left), args)
    return out


sketch = device_sketch(launch_sketch)
