"""The protocol of all methods: a frozen config with pure functions, and a state that is plain data.

    algorithm = tokfuse.algorithms.make("gbpo", tau=1e-4)
    state = algorithm.initial_state()
    for every rollout:
        batch = algorithm.prepare(batch, state)                    # advantages and selection
        algorithm.before(batch, state)                             # PIPO: a plan to do first
        for every minibatch of sequences:
            for plan in algorithm.plans(batch.take(part), state):  # LOPTI: two; all others: one
                step = tokfuse.policy_step(logits=..., target=..., **plan.inputs())
                step.loss.backward(); optimizer.step()
                metrics = algorithm.measure(plan, step.stats.logp, step.stats.entropy)
                state = algorithm.update(state, metrics)
        state = algorithm.advance(state, batch)                    # once a rollout

Methods that look at the current policy before they can state their loss (`needs_policy`) take
`batch.with_policy(stats.logp, stats.entropy)` with `stats = tokfuse.token_stats(logits, target)`
and `plan.loss(stats.logp, stats.entropy)`: the same two passes over the logits, in two calls.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.stateful import State as State
from tokfuse.algorithms.stateful import Stateful
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyLoss


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One optimizer step: an objective and its inputs.

    Args:
        batch: the tokens it is about.
        objective: what `policy_step` gets.
        advantage, advantage_level, mask, token_weight, signal, ref_logp, kl_weight,
            entropy_weight: as in `tokfuse.policy_step`.
        normalizer: "batch" for this batch's own count, or a number.
        constant: () value of terms that have no gradient, left out of the fused loss: add it to a
            reported loss. None: 0.
        source: "current", or "previous" for the rollout that `advance` saw last (PIPO).
    """

    batch: Batch
    objective: Objective
    advantage: torch.Tensor
    advantage_level: str
    mask: torch.Tensor | None
    token_weight: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    kl_weight: torch.Tensor | None = None
    entropy_weight: torch.Tensor | None = None
    normalizer: float | str = "batch"
    constant: torch.Tensor | None = None
    source: str = "current"

    def inputs(self, normalizer: float | torch.Tensor | None = None) -> dict[str, Any]:
        """Keyword arguments for `policy_step`, all but the logits and the target.

        normalizer: the sum of `count()` over micro-batches and ranks; where nothing counts, 0, any
            divisor gives the loss 0. None: this plan's own.
        """
        if normalizer is not None:
            normalizer = float(normalizer) or 1.0
        given = {
            "token_weight": self.token_weight,
            "signal": self.signal,
            "ref_logp": self.ref_logp,
            "kl_weight": self.kl_weight,
            "entropy_weight": self.entropy_weight,
            "sampler_logp": self.batch.sampler_logp,
        }
        return {
            "old_logp": self.batch.old_logp,
            "advantage": self.advantage,
            "advantage_level": self.advantage_level,
            "objective": self.objective,
            "mask": self.mask,
            "cu_seqlens": self.batch.cu_seqlens,
            "normalizer": self.normalizer if normalizer is None else normalizer,
            **{name: value for name, value in given.items() if value is not None},
        }

    def loss(
        self, logp: torch.Tensor, entropy: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None
    ) -> PolicyLoss:
        """`tokfuse.policy_loss` of differentiable statistics; the same numbers as `policy_step`."""
        inputs = self.inputs(normalizer)
        return policy_loss(logp, entropy=entropy, **inputs)

    def count(self) -> torch.Tensor:
        """() float64: what "batch" divides by. Summed over micro-batches and ranks it is the global
        normaliser; a constant normaliser is counted in the same way."""
        device = self.batch.old_logp.device
        if self.normalizer != "batch":
            return torch.tensor(self.normalizer, dtype=torch.float64, device=device)
        keep = self.batch.valid if self.mask is None else self.mask
        if self.objective.counts_sequences:
            return (replace(self.batch, mask=keep).lengths > 0).sum().double()
        return keep.sum().double()

    @property
    def needs_every_row(self) -> bool:
        """False where a sequence of advantage 0 has gradient 0: it may be left out of the forward
        pass, as long as the normaliser counts it."""
        o = self.objective
        return o.kl is not None or o.entropy_coef != 0.0 or not o.shape.zero_without_advantage

    def weigh(self, factor: torch.Tensor) -> "Plan":
        """The policy term of every token times `factor`, (tokens,)."""
        weight = factor if self.token_weight is None else self.token_weight * factor
        return replace(self, token_weight=weight.to(self.batch.old_logp.dtype))


@dataclass(frozen=True, kw_only=True)
class Algorithm(Stateful, ABC):
    """A method that trains a policy: its fields are its configuration, its methods are pure."""

    @property
    def needs_policy(self) -> bool:
        """True where `objective` reads batch.logp or batch.entropy of the current policy."""
        return False

    @abstractmethod
    def advantages(self, batch: Batch) -> Advantage:
        """Of the whole rollout batch, before it is cut into minibatches."""

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """(tokens,) bool: the tokens that take part at all, loss and denominator; None: all.

        A sequence without one need not be read by the model: `kept_sequences`.
        """
        return None

    @abstractmethod
    def objective(self, batch: Batch, state: State) -> Plan:
        """The loss of a prepared batch, or of a minibatch of it."""

    def prepare(self, batch: Batch, state: State) -> Batch:
        """The batch with its advantages, and its mask narrowed by `select`."""
        advantage = self.advantages(batch)
        keep = self.select(batch, advantage, state)
        mask = batch.mask if keep is None else batch.valid & keep
        return replace(batch, advantage=advantage.value, advantage_level=advantage.level, mask=mask)

    def before(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Optimizer steps to take before those of a rollout batch, prepared and whole."""
        return ()

    def plans(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """One optimizer step each, in this order, for a minibatch."""
        return (self.objective(batch, state),)

    def measure(self, plan: Plan, logp: torch.Tensor, entropy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """0-dim sums that `update` needs; add them over micro-batches and ranks."""
        return {}

    def update(self, state: State, metrics: Mapping[str, torch.Tensor]) -> State:
        """The state after an optimizer step."""
        return state

    def advance(self, state: State, batch: Batch) -> State:
        """The state after a rollout batch, prepared, has been used up."""
        return state


def require_metrics(op: str, metrics: Mapping[str, torch.Tensor], *names: str) -> None:
    """Refuse metrics that `measure` did not make."""
    for name in names:
        if name not in metrics:
            raise refuse(
                op, f"metrics[{name!r}]", "given", sorted(metrics), "Pass what algorithm.measure(plan, ...) returned."
            )


def kept_sequences(batch: Batch) -> torch.Tensor:
    """(count,) int64: the sequences with a token that counts; the others need no forward pass."""
    return (batch.lengths > 0).nonzero().flatten()
