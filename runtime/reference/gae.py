"""Reference of `tokfuse.gae`: generalised advantage estimation in plain torch."""

import torch

from tokfuse.runtime.reference.segments import next_valid, reverse_scan, segment_sum, sequence_index


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
    """Return (advantage, returns) in the dtype of `reward`. The scan runs in float64."""
    num_tokens, dtype = reward.shape[0], reward.dtype
    if num_tokens == 0:
        return torch.zeros_like(reward), torch.zeros_like(reward)
    mask, seq, end = token_layout(cu_seqlens, mask, num_tokens)
    zero = torch.zeros((), dtype=torch.float64, device=reward.device)
    r = torch.where(mask, reward.double(), zero)
    v = torch.where(mask, value.double(), zero)
    following, _ = bootstrap(v, mask, seq, end, finished)
    decay = gamma * _lambda_per_token(lam, length_adaptive_alpha, mask, seq, cu_seqlens)
    delta = torch.where(mask, r + gamma * following - v, zero)
    scan = reverse_scan(torch.where(mask, decay, torch.ones_like(r)), delta, end)
    advantage = torch.where(mask, scan, zero)
    return advantage.to(dtype), torch.where(mask, scan + v, zero).to(dtype)


def token_layout(
    cu_seqlens: torch.Tensor, mask: torch.Tensor | None, num_tokens: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (mask, sequence of each token, offset one past the end of that sequence)."""
    if mask is None:
        mask = torch.ones(num_tokens, dtype=torch.bool, device=cu_seqlens.device)
    seq = sequence_index(cu_seqlens, num_tokens)
    return mask, seq, cu_seqlens.to(torch.int64)[seq + 1]


def bootstrap(
    v: torch.Tensor, mask: torch.Tensor, seq: torch.Tensor, end: torch.Tensor, finished: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the value of the next valid state of each token, and the position of that state.

    A last valid token has no next state. Its position is `tokens`, and its next value is 0 if the sequence
    is finished, else its own value (EGAE).
    """
    num_tokens = v.shape[0]
    later = next_valid(mask)
    has_next = later < end
    ended = torch.ones_like(mask) if finished is None else finished[seq]
    behind = torch.where(ended, torch.zeros_like(v), v)
    following = torch.where(has_next, v[later.clamp_max(num_tokens - 1)], behind)
    return following, torch.where(has_next, later, num_tokens)


def _lambda_per_token(
    lam: float | torch.Tensor, alpha: float | None, mask: torch.Tensor, seq: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    if alpha is not None:
        num_seqs = cu_seqlens.shape[0] - 1
        length = segment_sum(mask.double(), seq, num_seqs)
        lam = 1.0 - 1.0 / (alpha * length).clamp_min(1.0)
    if isinstance(lam, torch.Tensor):
        return lam.double()[seq]
    return torch.full(mask.shape, lam, dtype=torch.float64, device=mask.device)
