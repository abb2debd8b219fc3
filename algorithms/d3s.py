"""D3S: trains on the rollouts with the largest advantage variance, and there on the tokens with the largest |A| H."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.selection import max_variance_in_groups, max_variance_subset, top_mask
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse


@register(
    "d3s",
    system="D3S",
    label="recon",
    source="arXiv 2509.22115; abstract, reviews and two agreeing notes",
    summary="rollouts with the most advantage variance, then tokens with the top |A| entropy; both budgets grow",
    required=("rollouts", "tokens", "total_steps"),
    differs=(
        "Budgets are required, because the paper's values were not found. Assumed: top-K over the kept "
        "tokens of all rollouts together; the denominator counts kept tokens; the entropy is of the "
        "policy at the start of the update; counts are rounded down and at least 1."
    ),
)
@dataclass(frozen=True, kw_only=True)
class D3S(Standard):
    """Dynamic down-sampling of rollouts and tokens, for any objective of `Standard`.

    Advantages are computed over all rollouts and do not change. The selection has three steps:

        S_q = argmax over subsets of size n of Var(A), inside each prompt q
        S   = argmax over subsets of size `batch_rollouts` of Var(A), of the union of all S_q
        T   = the K tokens of S with the largest |A| H, K = floor(fraction * tokens of S)

    loss = base loss * 1[t in T], normalised by the tokens of T. n and the fraction change linearly from their first
    to their last value over `total_steps`. Both subsets are exact: the best one always consists of some number of
    the largest and the rest from the smallest.

    Args:
        rollouts: (first, last) n, rollouts kept per prompt.
        tokens: (first, last) fraction of tokens kept, in (0, 1], e.g. (0.05, 0.2).
        total_steps: number of rollout batches in the run.
        batch_rollouts: size of S over all ranks. None: the second step is skipped ("D3S-I").

    Inputs: group_ids, entropy (of the old policy).
    State: the step.
    Source: arXiv 2509.22115, reconstructed.
    """

    rollouts: tuple[int, int] = (0, 0)
    tokens: tuple[float, float] = (0.0, 0.0)
    total_steps: int = 0
    batch_rollouts: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, low, high in (("rollouts", 1, 2**31), ("tokens", 0.0, 1.0)):
            pair = getattr(self, name)
            if not isinstance(pair, tuple) or len(pair) != 2:
                raise refuse(self._op, name, "a pair (first, last)", pair, "Pass both values.")
            for value in pair:
                check_number(self._op, name, value, low, high, open_low=name == "tokens")
        check_number(self._op, "total_steps", self.total_steps, 1)
        if self.batch_rollouts is not None:
            check_number(self._op, "batch_rollouts", self.batch_rollouts, 1)

    def initial_state(self) -> State:
        """Return the base state, and the step."""
        return super().initial_state() | {"step": 0}

    def budgets(self, state: Mapping[str, int]) -> tuple[int, float]:
        """Return (rollouts per prompt, fraction of tokens) at this step."""
        p = min(state["step"] / self.total_steps, 1.0)
        (n0, n1), (k0, k1) = self.rollouts, self.tokens
        # 1e-9, because rounding may put (1 - p) n0 + p n1 just below the integer that it should be.
        return max(1, int((1 - p) * n0 + p * n1 + 1e-9)), (1 - p) * k0 + p * k1

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """Return the tokens of T."""
        batch.require(self._op, "group_ids", "entropy")
        assert batch.group_ids is not None and batch.entropy is not None
        n, fraction = self.budgets(state)
        value = advantage.value
        if advantage.level == "token":
            value = batch.sequence_mean(value)
        rows = max_variance_in_groups(value, batch.group_ids, n)
        if self.batch_rollouts is not None:
            rows = self._across_groups(batch, value, rows)
        pool = batch.spread(rows) & batch.valid
        base = super().select(batch, advantage, state)
        pool = pool if base is None else pool & base
        size = advantage.value.abs()
        size = size if advantage.level == "token" else batch.spread(size)
        count = max(1, int(fraction * int(batch.world.sum(pool.sum())) + 1e-9))
        return top_mask(size * batch.entropy, count, pool, batch.world)

    def _across_groups(self, batch: Batch, value: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return the rollouts of S. Every rank solves the same small problem over all ranks' kept rollouts."""
        assert self.batch_rollouts is not None
        size = self.batch_rollouts
        out = rows.clone()
        out[rows] = batch.world.together(lambda x: max_variance_subset(x, size), value[rows])
        return out

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state at the next step of the schedule."""
        return super().advance(state, batch) | {"step": state["step"] + 1}
