"""The interface of the preference losses: one loss per pair or response, from sums over each sequence.

    loss = tokfuse.algorithms.make("dpo", beta=0.1)
    state = loss.initial_state()
    for batch in ...:
        step = tokfuse.algorithms.preference_step(
            loss=loss, batch=batch, hidden=..., weight=..., target=..., normalizer="batch")
        step.loss.backward(); optimizer.step()
        state = loss.update(state, step)                       # BCO; the other losses have no state

A loss depends on the policy only through the sum of log-probabilities of each sequence. Its gradient is therefore one
number per sequence (multiplied by a token weight in LD-DPO).
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from tokfuse.algorithms.preference.batch import Layout, PreferenceBatch, Side
from tokfuse.algorithms.preference.likelihood import NLL, chosen_tokens
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import check_choice, check_number, may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.lm_head.units import Loss, UnitStats


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss(Stateful, ABC):
    """A preference loss. Its fields are its configuration; its methods are pure functions.

    Args:
        beta: scale of the implicit reward, > 0.
    """

    beta: float = 0.1

    def __post_init__(self) -> None:
        check_number(self._op, "beta", self.beta, 0.0, open_low=True)

    @property
    def whole(self) -> bool:
        """Whether the loss of a pair depends on the other pairs of the batch."""
        return False

    @property
    def needs_reference(self) -> bool:
        """Whether the loss compares with a reference policy."""
        return True

    @property
    def token_tail_weight(self) -> float | None:
        """Weight of the tokens beyond the length of the shorter response of their pair. None: 1."""
        return None

    @abstractmethod
    def check(self, batch: PreferenceBatch) -> None:
        """Raise an error if the batch lacks an input of the loss, or has one that would be ignored."""

    @abstractmethod
    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        """Return the loss of each pair or sequence, weights included, (units,) float64.

        It is differentiable in the sums of log-probabilities. `units` are the pairs or sequences in `sides`.
        """

    def counts(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        """Return the counts of this batch that the loss divides by, besides the normalizer: name -> float64 tensor.

        Most losses have none. Add the counts of all micro-batches and ranks, and pass them as `batch.counts`.
        """
        return {}

    def check_counts(self, batch: PreferenceBatch, normalizer: float | str | None) -> None:
        """Raise an error if the loss would divide by the counts of a part of the step, or if counts are unused."""
        own = self.counts(batch)
        given = batch.counts
        if given is not None and given.keys() != own.keys():
            want = f"with the entries {', '.join(own)}" if own else "left out"
            raise refuse(self._op, "batch.counts", want, sorted(given), "Pass the sums of loss.counts(batch).")
        if own and (given is None) != (normalizer == "batch"):
            raise refuse(
                self._op,
                "batch.counts",
                'given with a global normalizer, and left out with normalizer="batch"',
                f"{'None' if given is None else 'counts'} with normalizer={normalizer!r}",
                "This loss has means over a part of the pairs. Add loss.counts(batch) of all micro-batches and ranks.",
            )

    def reward(self, side: Side) -> torch.Tensor:
        """Return the implicit reward beta (logp - ref), from which margins and accuracies are computed."""
        return self.beta * side.log_ratio

    def update(self, state: State, step: PreferenceStep) -> State:
        """Return the state after an optimizer step."""
        return state

    def objective(self, batch: PreferenceBatch, layout: Layout, state: State, scale: float) -> Loss:
        """Return the function of statistics that `unit_step` differentiates: scale * sum of the losses."""

        def of_units(stats: UnitStats, tokens: torch.Tensor, first: int, last: int) -> torch.Tensor:
            start, stop = layout.range(first, last)
            sides = layout.sides(stats.logp, stats.sum_sq, tokens, start, stop)
            return scale * self.losses(sides, batch, state, slice(start, stop)).sum()

        return of_units

    def check_reference(self, batch: PreferenceBatch) -> None:
        """Raise an error if the reference is missing or unused, or if only its sums are given but tokens are needed."""
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
        if batch.ref_sum is not None and batch.ref_tail_weight != self.token_tail_weight:
            raise refuse(
                self._op,
                "batch.ref_tail_weight",
                f"{self.token_tail_weight}, the tail_weight of the loss (the tail of the reference is weighted too)",
                batch.ref_tail_weight,
                "Pass ref_logp, or sums with that weight and ref_tail_weight.",
            )


WEIGHTINGS = ("none", "wpo")


@dataclass(frozen=True, kw_only=True)
class PairLoss(PreferenceLoss):
    """A loss of (chosen, rejected) pairs, with options that all such losses share.

    Args:
        beta: scale of the implicit reward, > 0.
        weighting: "none"; "wpo" multiplies the loss of a pair by exp(a_chosen + a_rejected), detached, where a
            is the mean over tokens of logp_t - log sum_v p_v^2. On-policy pairs then count more (WPO).
        tail_weight: weight in [0, 1] of the log-probabilities of tokens beyond the length of the shorter
            response of the pair, for policy and reference (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`. The loss is then the sum over levels of the weight
            times the mean over the pairs of the level. None: the mean over all pairs. With micro-batches or
            ranks, the means need `batch.counts`.
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

    @property
    def likelihood(self) -> NLL | None:
        """A likelihood term of the chosen response that is added to the loss of the pair, or None."""
        return None

    @abstractmethod
    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        """Return the loss of each pair before any weight, (pairs,)."""

    def check(self, batch: PreferenceBatch) -> None:
        self.check_reference(batch)
        if batch.pairs is None:
            raise refuse(self._op, "batch.pairs", "given", None, "Pass chosen and rejected.")
        if batch.kl is not None:
            raise refuse(self._op, "batch.kl", "left out", "a tensor", "Only KTO uses it.")
        if (batch.level is None) != (self.level_weight is None):
            raise refuse(
                self._op,
                "batch.level",
                "given with level_weight, and only then",
                "one of them",
                "Pass both or none of them.",
            )
        if self.level_weight is None or batch.level is None or not may_read(batch.level):
            return
        if bool(((batch.level < 0) | (batch.level >= len(self.level_weight))).any()):
            raise refuse(
                self._op,
                "batch.level",
                f"in [0, {len(self.level_weight)}), the levels of level_weight",
                batch.level.tolist(),
                "Levels start at 0.",
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
        """Return a term of the chosen response that is added to the loss of the pair, (pairs,)."""
        term = self.likelihood
        if term is None:
            return torch.zeros_like(chosen.length)
        return term.per_pair(chosen, self.beta, self.totals(batch), None if batch.level is None else batch.level[units])

    def counts(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        """Return the number of pairs, with level_weight per level, and of chosen tokens with "batch_mean"."""
        out: dict[str, torch.Tensor] = {}
        if self.level_weight is not None:
            assert batch.level is not None
            level = batch.level.long()
            zero = torch.zeros(len(self.level_weight), dtype=torch.float64, device=level.device)
            out["levels"] = zero.index_add(0, level, torch.ones_like(level).double())
        if self.likelihood is not None and self.likelihood.reduction == "batch_mean":
            out["chosen_tokens"] = chosen_tokens(batch)
        return {"pairs": pair_count(batch)} | out if out else {}

    def totals(self, batch: PreferenceBatch) -> Mapping[str, torch.Tensor]:
        """Return the counts of the whole step."""
        return self.counts(batch) if batch.counts is None else batch.counts

    def level_scale(self, batch: PreferenceBatch) -> torch.Tensor:
        """Return the weight of the level times (number of pairs / pairs of the level), (pairs,)."""
        assert batch.level is not None and self.level_weight is not None
        level, total = batch.level.long(), self.totals(batch)
        known = torch.tensor(self.level_weight, dtype=torch.float64, device=level.device)
        return known[level] * total["pairs"] / total["levels"][level]


def pair_count(batch: PreferenceBatch) -> torch.Tensor:
    """Return the number of pairs, () float64."""
    return torch.tensor(batch.num_units, dtype=torch.float64, device=batch.cu_seqlens.device)
