"""Losses over whole units of tokens (a sequence, a pair of sequences, the batch), from hidden states.

The coefficient of a token depends on all tokens of its unit, so the gradient cannot be computed row by row.
Instead, as many units as fit into the workspace are processed together: their logits, their statistics, their
loss and its derivative with respect to every logp, and then the gradient, which overwrites the logits. This
needs 2 T H V operations for the logits, and 4 T H V for the gradients of rows with a nonzero coefficient. Only a
unit larger than the workspace is computed twice: its statistics first, then its logits again, which needs
2 T H V more operations.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from tokfuse.runtime.core.dispatch import RowState
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.problem import HeadProblem


class UnitStats(NamedTuple):
    """Statistics of the tokens of some units, (rows,) each. logp, lse and logit_sum are differentiable."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    sum_sq: torch.Tensor
    top1: torch.Tensor
    logit_sum: torch.Tensor | None = None
    """None if the head problem requests none."""


Loss = Callable[[UnitStats, torch.Tensor, int, int], torch.Tensor]
"""(statistics, tokens, first unit, end unit) -> (): the sum of the losses of these units.

`tokens` are the tokens of the units, unit by unit. The statistics belong to these tokens, in the same order.
"""


class Units(NamedTuple):
    """Tokens sorted by unit."""

    order: torch.Tensor
    """(rows,) int64: the tokens that count, unit by unit."""
    border: Sequence[int]
    """units + 1 offsets of the units in `order`."""

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """Yield ranges of consecutive units that together fit into `rows`. A larger unit has its own range.

        The ranges are about equal, because a GEMM of few rows still reads the whole weight.
        """
        first, units = 0, len(self.border) - 1
        while first < units:
            start = self.border[first]
            left = self.border[units] - start
            share = -(-left // max(1, -(-left // rows)))
            enough = bisect_left(self.border, start + share, first + 1)
            fitting = bisect_right(self.border, start + rows, first + 1) - 1
            last = max(first + 1, min(enough, fitting))
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


class Coefficients(NamedTuple):
    """The gradients of a loss for statistics, (tokens,) each, 0 outside the units. None: the loss does not use it."""

    logp: torch.Tensor
    lse: torch.Tensor | None
    logit_sum: torch.Tensor | None

    def live(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return which of the tokens have a gradient. NaN counts as one."""
        found = self.logp[tokens] != 0
        for x in (self.lse, self.logit_sum):
            if x is not None:
                found |= x[tokens] != 0
        return found


def coefficients(
    stats: list[torch.Tensor], logit_sum: torch.Tensor | None, units: Units, first: int, last: int, loss: Loss
) -> tuple[torch.Tensor, Coefficients]:
    """Return the loss of units [first, last) and its gradients for the statistics, which are (tokens,)."""
    tokens = units.order[units.border[first] : units.border[last]]
    with torch.inference_mode(False), torch.enable_grad():
        logp, entropy, lse, sum_sq, top1 = (x[tokens] for x in stats[:5])
        sums = None if logit_sum is None else logit_sum[tokens]
        leaves = [x.requires_grad_() for x in (logp, lse, sums) if x is not None]
        value = loss(UnitStats(logp, entropy, lse, sum_sq, top1, sums), tokens, first, last)
        found = torch.autograd.grad(value, leaves, allow_unused=True)

    def spread(part: torch.Tensor | None) -> torch.Tensor | None:
        return None if part is None else torch.zeros_like(stats[0]).index_copy_(0, tokens, part)

    by_logp, by_lse, *rest = map(spread, found)
    by_logp = torch.zeros_like(stats[0]) if by_logp is None else by_logp
    return value.detach(), Coefficients(by_logp, by_lse, rest[0] if rest else None)
