"""The likelihood term of the chosen response, which several preference losses add."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokfuse.algorithms.preference.batch import PreferenceBatch, Side
from tokfuse.runtime.core.checks import check_choice, check_number

NLL_REDUCTIONS = ("sum", "mean", "batch_mean")


@dataclass(frozen=True, kw_only=True)
class NLL:
    """A likelihood term of the chosen response: coef * (-logp), reduced.

    Args:
        coef: weight, >= 0.
        reduction: "sum" or "mean" over the tokens of the response ("sum" is RPO's main text). "batch_mean": mean
            over all chosen tokens of the batch, as a cross-entropy over the packed batch. With micro-batches or
            ranks, it needs `batch.counts`.
        times_beta: also multiply by the loss's beta (RPO: eta beta).
        level: apply the term only to pairs of this level. None: to all pairs.
    """

    coef: float
    reduction: str = "mean"
    times_beta: bool = False
    level: int | None = None

    def __post_init__(self) -> None:
        check_number("NLL", "coef", self.coef, 0.0)
        check_choice("NLL", "reduction", self.reduction, NLL_REDUCTIONS)

    def per_pair(
        self, chosen: Side, beta: float, totals: Mapping[str, torch.Tensor], level: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the term of each pair, (pairs,) float64.

        Args:
            chosen: the chosen responses.
            beta: scale of the loss's reward.
            totals: counts of the whole step, with reduction "batch_mean": "pairs" and "chosen_tokens".
            level: (pairs,), the level of each pair, if the term has one.
        """
        nll = -chosen.logp * (self.coef * (beta if self.times_beta else 1.0))
        if self.reduction == "mean":
            nll = nll / chosen.length
        elif self.reduction == "batch_mean":
            nll = nll * totals["pairs"] / totals["chosen_tokens"].clamp(min=1)
        if self.level is not None:
            assert level is not None
            nll = torch.where(level == self.level, nll, 0.0)
        return nll


def chosen_tokens(batch: PreferenceBatch) -> torch.Tensor:
    """Return the number of counting tokens of the batch's chosen responses, () float64."""
    assert batch.pairs is not None
    keep = batch.mask
    if keep is None:
        keep = torch.ones(batch.num_tokens, dtype=torch.bool, device=batch.pairs.device)
    before = torch.nn.functional.pad(keep.double().cumsum(0), (1, 0))
    at = before[batch.cu_seqlens.long()]
    return (at[1:] - at[:-1])[batch.pairs[:, 0]].sum()
