"""Padded (batch, length) tensors of a host and packed ones: converted once, at the edge."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Padding:
    """Where the tokens of a padded batch are.

    Args:
        rows: (batch, length) bool: True where there is a token. Packed order is row by row.
    """

    rows: torch.Tensor

    @property
    def cu_seqlens(self) -> torch.Tensor:
        """(batch + 1,) int32; a row without a token is an empty sequence."""
        lengths = self.rows.sum(1)
        return torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(torch.int32)

    def pack(self, x: torch.Tensor) -> torch.Tensor:
        """(tokens,): the entries of x, (batch, length), (batch, 1) or (batch,), at the tokens."""
        if x.dim() == 1:
            x = x.unsqueeze(1)
        return x.expand(self.rows.shape)[self.rows]

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(batch, length): x, (tokens,), back in its place; 0 (False) elsewhere. Differentiable."""
        return x.new_zeros(self.rows.shape).masked_scatter(self.rows, x)
