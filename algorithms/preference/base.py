"""The protocol of the preference losses: one loss per pair or response, from per-sequence sums.

    loss = tokfuse.algorithms.make("dpo", beta=0.1)
    state = loss.initial_state()
    for batch in ...:
        step = tokfuse.algorithms.preference_step(
            loss=loss, batch=batch, hidden=..., weight=..., target=..., normalizer="batch")
        step.loss.backward(); optimizer.step()
        state = loss.update(state, step)                       # BCO; all others have no state

A loss reads the policy through the sums of log-probabilities of its sequences only, so that its
gradient is one number per sequence (times a token weight in LD-DPO).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch

from tokfuse.algorithms.preference.batch import Layout, PreferenceBatch, Side
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import check_choice, check_number, may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.units import Loss


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Stateful, ABC):
    """A loss of preferences: its fields are its configuration, its methods are pure."""

    beta: float = 0.1
    whole: ClassVar[bool] = False
    """True where the loss of a pair depends on the other pairs of the batch."""

    def __post_init__(self) -> None:
        check_number(self._op, "beta", self.beta, 0.0, open_low=True)

    @property
    def needs_reference(self) -> bool:
        """False for the losses without a reference policy."""
        return True

    @property
    def token_tail_weight(self) -> float | None:
        """Weight of tokens beyond the shorter side of their pair; None: all 1."""
        return None

    @abstractmethod
    def check(self, batch: PreferenceBatch) -> None:
        """Refuse a batch that lacks what the loss reads."""

    @abstractmethod
    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        """(units,) float64: the loss of each pair or sequence, weights included; differentiable in
        the sums of log-probabilities. `units` are the pairs or sequences that `sides` holds."""

    def reward(self, side: Side) -> torch.Tensor:
        """The implicit reward beta (logp - ref) that margins and accuracies are reported of."""
        return self.beta * side.log_ratio

    def update(self, state: State, step: PreferenceStep) -> State:
        """The state after an optimizer step."""
        return state

    def objective(self, batch: PreferenceBatch, layout: Layout, state: State, scale: float) -> Loss:
        """The function of statistics that `unit_step` differentiates: scale * sum of the losses."""

        def of_units(stats: TokenStats, tokens: torch.Tensor, first: int, last: int) -> torch.Tensor:
            start, stop = layout.range(first, last)
            sides = layout.sides(stats.logp, stats.sum_sq, tokens, start, stop)
            return scale * self.losses(sides, batch, state, slice(start, stop)).sum()

        return of_units

    def check_reference(self, batch: PreferenceBatch) -> None:
        """Refuse a missing reference, one that would be ignored, and sums where tokens count."""
        given = batch.ref_logp is not None or batch.ref_sum is not None
        if self.needs_reference and not given:
            raise refuse(
                self._op,
                "batch.ref_logp or batch.ref_sum",
                "given",
                None,
                "Score the responses with the frozen reference policy.",
            )
        if given and not self.needs_reference:
            raise refuse(
                self._op,
                "batch.ref_logp and batch.ref_sum",
                "left out",
                "a tensor",
                "This loss has no reference policy.",
            )
        if batch.ref_sum is not None and self.token_tail_weight is not None:
            raise refuse(
                self._op,
                "batch.ref_sum",
                "left out with tail_weight",
                "a tensor",
                "Pass ref_logp: its tail is weighted, too.",
            )


WEIGHTINGS = ("none", "wpo")


@dataclass(frozen=True, kw_only=True)
class PairLoss(PreferenceLoss):
    """A loss of (chosen, rejected) pairs, with what any of them may be combined with.

    Args:
        beta: scale of the implicit reward.
        weighting: "wpo" multiplies the loss of a pair by exp(a_chosen + a_rejected), detached, a =
            mean over tokens of logp_t - log sum_v p_v^2: on-policy pairs count more (WPO). "none".
        tail_weight: in [0, 1]: log-probabilities of tokens beyond the shorter response of the pair
            are multiplied by it, policy and reference (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`; the loss is then the sum over levels of
            weight times the mean over the level's pairs. None: the mean over all pairs.
    """

    weighting: str = "none"
    tail_weight: float | None = None
    level_weight: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "weighting", self.weighting, WEIGHTINGS)
        if self.tail_weight is not None:
            check_number(self._op, "tail_weight", self.tail_weight, 0.0, 1.0)
        for weight in self.level_weight or ():
            check_number(self._op, "level_weight", weight, 0.0)

    @property
    def token_tail_weight(self) -> float | None:
        return self.tail_weight

    @abstractmethod
    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        """(pairs,) the loss before any weight."""

    def check(self, batch: PreferenceBatch) -> None:
        self.check_reference(batch)
        if batch.pairs is None:
            raise refuse(self._op, "batch.pairs", "given", None, "Pass chosen and rejected.")
        if batch.kl is not None:
            raise refuse(self._op, "batch.kl", "left out", "a tensor", "Only KTO reads it.")
        if (batch.level is None) != (self.level_weight is None):
            raise refuse(
                self._op,
                "batch.level",
                "given with level_weight, and only then",
                "one of them",
                "Name the level of each pair.",
            )
        if self.level_weight is None or batch.level is None or not may_read(batch.level):
            return
        if bool(((batch.level < 0) | (batch.level >= len(self.level_weight))).any()):
            raise refuse(
                self._op,
                "batch.level",
                f"in [0, {len(self.level_weight)}), the levels of level_weight",
                batch.level.tolist(),
                "Count from 0.",
            )

    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        chosen, rejected = sides
        loss = self.pair_losses(chosen, rejected, state) + self.extra(chosen, batch, units)
        if self.weighting == "wpo":
            loss = loss * (chosen.alignment + rejected.alignment).exp()
        if batch.pair_weight is not None:
            loss = loss * batch.pair_weight[units].double()
        if self.level_weight is not None:
            loss = loss * self.level_scale(batch)[units]
        return loss

    def extra(self, chosen: Side, batch: PreferenceBatch, units: slice) -> torch.Tensor:
        """(pairs,) a term of the chosen response beside the loss of the pair."""
        return torch.zeros_like(chosen.length)

    def level_scale(self, batch: PreferenceBatch) -> torch.Tensor:
        """(pairs,) weight of the level times pairs / pairs of the level."""
        assert batch.level is not None and self.level_weight is not None
        level = batch.level.long()
        known = torch.tensor(self.level_weight, dtype=torch.float64, device=level.device)
        count = torch.zeros_like(known).index_add(0, level, torch.ones_like(level).double())
        return known[level] * batch.num_units / count[level]
