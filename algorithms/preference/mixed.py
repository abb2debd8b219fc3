"""Several preference losses in one pass."""

from dataclasses import dataclass, field, replace

import torch

from tokfuse.algorithms.preference.base import PairLoss, PreferenceLoss
from tokfuse.algorithms.preference.batch import PreferenceBatch, Side
from tokfuse.algorithms.preference.likelihood import NLL
from tokfuse.algorithms.preference.result import PreferenceStep
from tokfuse.algorithms.stateful import State
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse


@dataclass(frozen=True, kw_only=True)
class Likelihood(PairLoss):
    """The likelihood of the chosen response alone, as a term of `Mixed` (supervised fine-tuning in TRL and MPO).

    Args:
        beta: scale of the reported rewards; a factor of the loss only with `nll.times_beta`.
        nll: weight and reduction.
        weighting: "none", or "wpo": weight by how likely the policy is to generate the pair, see `PairLoss`.
        tail_weight: weight in [0, 1] of tokens beyond the length of the shorter response (LD-DPO). None: 1.
        level_weight: one weight per level of `batch.level`, see `PairLoss`. None: the mean over all pairs.

    Inputs: no reference.
    """

    nll: NLL = NLL(coef=1.0, reduction="batch_mean")

    @property
    def needs_reference(self) -> bool:
        return False

    @property
    def likelihood(self) -> NLL | None:
        return self.nll

    def pair_losses(self, chosen: Side, rejected: Side, state: State) -> torch.Tensor:
        return torch.zeros_like(chosen.logp)


@dataclass(frozen=True, kw_only=True)
class Mixed(PreferenceLoss):
    """sum over terms of weight * loss, all from one read of the responses. MPO is a preset of this.

    Args:
        terms: losses of pairs. They must agree on `tail_weight`, because they share the sums of log-probabilities.
        weights: one weight >= 0 per term. None: each is 1.

    Rewards: of the first term. State: {"terms": [the state of each term]}.
    """

    terms: tuple[PairLoss, ...]
    weights: tuple[float, ...] | None = None
    beta: float = field(default=1.0, init=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.terms or not all(isinstance(term, PairLoss) for term in self.terms):
            raise refuse(self._op, "terms", "losses of pairs, at least one", self.terms, "Make each one by its name.")
        if len(self.each_weight) != len(self.terms):
            raise refuse(
                self._op, "weights", f"{len(self.terms)} numbers, one per term", self.weights, "Or leave them out."
            )
        for weight in self.each_weight:
            check_number(self._op, "weights", weight, 0.0)
        for name in ("tail_weight", "level_weight"):
            values = [getattr(term, name) for term in self.terms]
            if name == "level_weight":
                values = [None if x is None else len(x) for x in values]
            if len(set(values)) > 1:
                raise refuse(self._op, name, "the same in all terms", values, "The terms share the batch.")

    @property
    def each_weight(self) -> tuple[float, ...]:
        """The weight of each term."""
        return (1.0,) * len(self.terms) if self.weights is None else self.weights

    @property
    def whole(self) -> bool:
        return any(term.whole for term in self.terms)

    @property
    def needs_reference(self) -> bool:
        return any(term.needs_reference for term in self.terms)

    @property
    def token_tail_weight(self) -> float | None:
        return self.terms[0].tail_weight

    def check(self, batch: PreferenceBatch) -> None:
        self.check_reference(batch)
        for term in self.terms:
            term.check(self._seen_by(term, batch))

    def _seen_by(self, term: PairLoss, batch: PreferenceBatch) -> PreferenceBatch:
        if term.needs_reference:
            return batch
        return replace(batch, ref_logp=None, ref_sum=None, ref_tail_weight=None)

    def initial_state(self) -> State:
        return {"terms": [term.initial_state() for term in self.terms]}

    def losses(self, sides: tuple[Side, ...], batch: PreferenceBatch, state: State, units: slice) -> torch.Tensor:
        without = tuple(side._replace(ref=torch.zeros_like(side.ref)) for side in sides)
        total = torch.zeros_like(sides[0].logp)
        for term, weight, own in zip(self.terms, self.each_weight, state["terms"], strict=True):
            seen = sides if term.needs_reference else without
            total = total + weight * term.losses(seen, batch, own, units)
        return total

    def counts(self, batch: PreferenceBatch) -> dict[str, torch.Tensor]:
        return {name: count for term in self.terms for name, count in term.counts(batch).items()}

    def reward(self, side: Side) -> torch.Tensor:
        return self.terms[0].reward(side)

    def update(self, state: State, step: PreferenceStep) -> State:
        first = self.terms[0]
        scaled = [
            # BCO's state is the mean of its own reward, and `step.rewards` are those of the first term.
            replace(step, rewards=tuple(r * (term.beta / first.beta) for r in step.rewards))
            for term in self.terms
        ]
        return {"terms": [t.update(s, x) for t, s, x in zip(self.terms, state["terms"], scaled, strict=True)]}
