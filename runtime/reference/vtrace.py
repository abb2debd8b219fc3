"""Reference of `tokfuse.vtrace`: V-trace and the sequential doubly robust scan in plain torch."""

import torch

from tokfuse.runtime.reference.gae import bootstrap, token_layout
from tokfuse.runtime.reference.segments import reverse_scan

LOG_RATIO_CLAMP = 20.0


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
    """Return (target, advantage, rho) in the dtype of `reward`. The scan runs in float64."""
    num_tokens, dtype = reward.shape[0], reward.dtype
    if num_tokens == 0:
        empty = torch.zeros_like(reward)
        return empty, empty.clone(), empty.clone()
    mask, seq, end = token_layout(cu_seqlens, mask, num_tokens)
    zero = torch.zeros((), dtype=torch.float64, device=reward.device)
    r = torch.where(mask, reward.double(), zero)
    v = torch.where(mask, value.double(), zero)
    d = torch.where(mask, log_ratio.double(), zero)
    ratio = d.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
    rho = ratio if rho_bar is None else ratio.clamp(max=rho_bar)
    c = lam * (ratio if c_bar is None else ratio.clamp(max=c_bar))
    following, later = bootstrap(v, mask, seq, end, finished)
    delta = torch.where(mask, rho * (r + gamma * following - v), zero)
    scan = reverse_scan(torch.where(mask, gamma * c, torch.ones_like(r)), delta, end)
    carried = torch.where(later < num_tokens, scan[later.clamp_max(num_tokens - 1)], zero)
    advantage = r + gamma * (following + carried) - v
    return (
        torch.where(mask, v + scan, zero).to(dtype),
        torch.where(mask, advantage, zero).to(dtype),
        torch.where(mask, rho, zero).to(dtype),
    )
