"""Reference of the optional outputs of token_stats: second temperature and weighted moments."""

from typing import Any

import torch

from tokfuse.runtime.reference import token_stats as reference


def forward(
    logits: torch.Tensor, target: torch.Tensor, *, second_temperature: float | None, moments: bool, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return the five outputs of token_stats, then second_logp, sum_p2_logp and sum_p2_logp2.

    The last three are detached. An output that was not requested has shape (0,).
    """
    stats = reference.forward(logits, target, **options)
    with torch.no_grad():
        nothing = stats[0].new_empty(0)
        second, p2_logp, p2_logp2 = nothing, nothing, nothing
        if second_temperature is not None:
            second = reference.forward(logits.detach(), target, **{**options, "temperature": second_temperature})[0]
        if moments:
            p2_logp, p2_logp2 = reference.rounded(weighted_moments(logits.detach(), **options), logits.dtype)
    return (*stats, second, p2_logp, p2_logp2)


def weighted_moments(
    logits: torch.Tensor, *, mask: torch.Tensor | None = None, **transform: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum p^2 log p, sum p^2 log^2 p) in float64. Masked rows and rows of only -inf give 0."""
    u = reference.transformed_logits(logits, **transform)
    dead = (u == float("-inf")).all(-1)
    logp_all, _ = reference.log_softmax(torch.where(dead.unsqueeze(-1), 0.0, u))
    q = (2 * logp_all).exp()
    logp_all = torch.where(logp_all == float("-inf"), 0.0, logp_all)
    keep = ~dead if mask is None else mask & ~dead
    first, second = (q * logp_all).sum(-1), (q * logp_all * logp_all).sum(-1)
    return torch.where(keep, first, 0.0), torch.where(keep, second, 0.0)
