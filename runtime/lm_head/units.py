"""Losses over whole units of tokens (a sequence, a pair of sequences, the batch), from hidden states.

The coefficient of a token depends on all tokens of its unit, so the gradient cannot be computed row by row.
Instead, as many units as fit into the workspace are processed together: their logits, their statistics, their
loss and its derivative with respect to every logp, and then the gradient, which overwrites the logits. This
needs 2 T H V operations for the logits, and 4 T H V for the gradients of rows with a nonzero coefficient. Only a
unit larger than the workspace is computed twice: its statistics first, then its logits again, which needs
2 T H V more operations.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from tokfuse.runtime.core.dispatch import RowState
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.problem import HeadProblem

Loss = Callable[[TokenStats, torch.Tensor, int, int], torch.Tensor]
"""(statistics, tokens, first unit, end unit) -> (): the sum of the losses of these units.

`tokens` are the tokens of the units, unit by unit. The statistics belong to these tokens, in the same order.
`logp` is differentiable.
"""


class Units(NamedTuple):
    """Tokens sorted by unit."""

    order: torch.Tensor
    """(rows,) int64: the tokens that count, unit by unit."""
    border: list[int]
    """units + 1 offsets of the units in `order`."""

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of consecutive units that together fit into `rows`. A larger unit has its own range."""
        first, units = 0, len(self.border) - 1
        while first < units:
            last = first + 1
            while last < units and self.border[last + 1] - self.border[first] <= rows:
                last += 1
            yield first, last
            first = last

    @property
    def largest(self) -> int:
        """The number of rows of the largest unit."""
        pairs = zip(self.border, self.border[1:], strict=False)
        return max((end - start for start, end in pairs), default=0)


class UnitTerms(NamedTuple):
    """The values that a backend computes from all units."""

    loss: torch.Tensor
    """() float64."""
    stats: TokenStats
    """(tokens,); 0 for tokens outside all units."""
    gradients: list[torch.Tensor | None]
    """Gradients in the order of `problem.NAMES`."""
    read_twice: int
    """Number of rows whose logits were computed twice, because their unit exceeds the workspace."""


UnitsRun = Callable[[HeadProblem, Units, Loss], UnitTerms]
"""(problem, units, loss) -> UnitTerms."""


class HeadKernels(NamedTuple):
    """The `run` of linear_token_stats."""

    forward: Callable[[HeadProblem], tuple[torch.Tensor, ...]]
    """problem -> the outputs of the token_stats kernels, (tokens,) each."""
    backward: Callable[..., list[torch.Tensor | None]]
    """(problem, row_max, inv_sum, logp, entropy, grad_logp, grad_entropy, needs, *, grad_lse,
    grad_logit_sum) -> gradients in the order of `problem.NAMES`."""
    state: RowState
    """Unit and dtype of row_max and inv_sum."""
    units: UnitsRun | None = None
    """The run of unit_step. None: it is composed of linear_token_stats and autograd."""


def coefficients(
    stats: list[torch.Tensor], tokens: torch.Tensor, first: int, last: int, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (loss of the units, d loss / d logp of all tokens, (tokens,), 0 outside the units)."""
    with torch.inference_mode(False), torch.enable_grad():
        of_units = TokenStats(*(x[tokens] for x in stats[:5]))
        logp = of_units.logp.requires_grad_()
        value = loss(of_units, tokens, first, last)
        (found,) = torch.autograd.grad(value, logp, allow_unused=True, materialize_grads=True)
    coefficient = torch.zeros_like(stats[0])
    coefficient[tokens] = found
    return value.detach(), coefficient
