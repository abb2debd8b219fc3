"""Conversion between a host's padded (batch, length) tensors and packed tensors."""

from dataclasses import dataclass

import torch


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
