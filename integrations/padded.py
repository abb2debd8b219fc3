"""Conversion between a host's padded (batch, length) tensors and packed tensors, and the loss of padded tensors."""

from dataclasses import dataclass

import torch

from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyLoss


@dataclass(frozen=True)
class Padding:
    """The positions of the tokens in a padded batch.

    Args:
        rows: (batch, length) bool, True where there is a token. The packed order is row by row.
    """

    rows: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """Offsets of the rows, (batch + 1,) int32. A row without a token is an empty sequence."""
        lengths = self.rows.sum(1)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """Return the entries of x at the tokens, (tokens,). x is (batch, length), (batch, 1) or (batch,)."""
        if x.dim() == 1:
            x = x.unsqueeze(1)
        return x.expand(self.rows.shape)[self.rows]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, (tokens,), as (batch, length), with 0 (False) where there is no token. Differentiable."""
        return x.new_zeros(self.rows.shape).masked_scatter(self.rows, x)


def padded_loss(
    log_probs: torch.Tensor,
    old: torch.Tensor | None,
    advantages: torch.Tensor,
    mask: torch.Tensor,
    objective: Objective,
    normalizer: float | torch.Tensor | str | None,
    weight: torch.Tensor | None = None,
) -> PolicyLoss:
    """Return `policy_loss` of the counting tokens in padded (batch, length) tensors."""
    padding = Padding(mask)
    return policy_loss(
        padding.pack(log_probs),
        old_logp=None if old is None else padding.pack(old),
        advantage=padding.pack(advantages),
        objective=objective,
        normalizer=normalizer,
        cu_seqlens=padding.cu_seqlens,
        token_weight=None if weight is None else padding.pack(weight),
    )
