"""The interface of all methods: a frozen configuration with pure functions, and a state of plain data.

    algorithm = tokfuse.algorithms.make("gbpo", tau=1e-4)
    state = algorithm.initial_state()
    for every rollout:
        batch = algorithm.prepare(batch, state)                    # advantages and selection
        algorithm.before(batch, state)                             # plans to run first (only PIPO has any)
        for every minibatch of sequences:
            for plan in algorithm.plans(batch.take(part), state):  # one plan; LOPTI has two
                step = tokfuse.policy_step(logits=..., target=..., **plan.inputs())
                step.loss.backward(); optimizer.step()
                metrics = algorithm.measure(plan, step.stats.logp, step.stats.entropy)
                state = algorithm.update(state, metrics)
        state = algorithm.advance(state, batch)                    # once per rollout

If `needs_policy` is True, the method reads statistics of the current policy before it computes its loss. Call
`stats = tokfuse.token_stats(logits, target)`, pass `batch.with_policy(stats.logp, stats.entropy)` to `plans`, and
compute the loss with `plan.loss(stats.logp, stats.entropy)`. The logits are still read in two passes, as in
`policy_step`, but in two calls.
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
        batch: the batch that the step trains on.
        objective: the `Objective` for `policy_step`.
        advantage: (tokens,), or (seqs,) with advantage_level "sequence".
        advantage_level: "token" or "sequence".
        mask: (tokens,), bool. True where a token counts. None: all tokens count.
        token_weight: (tokens,). Multiplies the policy term. None: 1.
        signal: (tokens,). Target signal of the shape `TargetRatio`, or success rate of the shape `NFT`.
        ref_logp: (tokens,), nats. Log-probabilities that the KL term compares the policy with.
        kl_weight: (tokens,). Multiplies the KL term. None: 1.
        entropy_weight: (tokens,). Multiplies the entropy term. None: 1.
        normalizer: "batch" divides by the count of this batch; a number divides by that number.
        constant: (). Value of terms without a gradient. The fused loss leaves them out; add them to a
            reported loss. None: 0.
        source: "current" for the batch passed to `plans`; "previous" for the last rollout batch passed to
            `advance` (PIPO).
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
        """Return the keyword arguments of `policy_step`, except the logits and the target.

        Args:
            normalizer: sum of `count()` over micro-batches and ranks. If it is 0, no token counts and the
                loss is 0 with any divisor. None: the normalizer of this plan.
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
        """Return `tokfuse.policy_loss` of differentiable statistics, with the same numbers as `policy_step`."""
        inputs = self.inputs(normalizer)
        return policy_loss(logp, entropy=entropy, **inputs)

    def count(self) -> torch.Tensor:
        """Return the divisor of the loss, () float64.

        Sum it over micro-batches and ranks to get the global normalizer. This also holds if the normalizer is
        a constant.
        """
        device = self.batch.old_logp.device
        if self.normalizer != "batch":
            return torch.tensor(self.normalizer, dtype=torch.float64, device=device)
        keep = self.batch.valid if self.mask is None else self.mask
        if self.objective.counts_sequences:
            return (replace(self.batch, mask=keep).lengths > 0).sum().double()
        return keep.sum().double()

    @property
    def needs_every_row(self) -> bool:
        """Whether the forward pass must read sequences with advantage 0.

        If False, such a sequence has gradient 0. It may be left out of the forward pass, but the normalizer
        must count it.
        """
        o = self.objective
        return o.kl is not None or o.entropy_coef != 0.0 or not o.shape.zero_without_advantage

    def weigh(self, factor: torch.Tensor) -> "Plan":
        """Return the plan with the policy term of every token multiplied by `factor`, (tokens,)."""
        weight = factor if self.token_weight is None else self.token_weight * factor
        return replace(self, token_weight=weight.to(self.batch.old_logp.dtype))


@dataclass(frozen=True, kw_only=True)
class Algorithm(Stateful, ABC):
    """A method that trains a policy. Its fields are its configuration; its methods are pure functions."""

    @property
    def needs_policy(self) -> bool:
        """Whether `objective` reads `batch.logp` or `batch.entropy` of the current policy."""
        return False

    @abstractmethod
    def advantages(self, batch: Batch) -> Advantage:
        """Return the advantages of the whole rollout batch, before it is split into minibatches."""

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """Return the tokens that take part in the loss and in its denominator, (tokens,) bool. None: all.

        The model does not need to read a sequence without such a token; see `kept_sequences`.
        """
        return None

    @abstractmethod
    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the loss of a prepared batch, or of a minibatch of it."""

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with its advantages, and with its mask reduced by `select`."""
        advantage = self.advantages(batch)
        keep = self.select(batch, advantage, state)
        mask = batch.mask if keep is None else batch.valid & keep
        return replace(batch, advantage=advantage.value, advantage_level=advantage.level, mask=mask)

    def before(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the optimizer steps to take before the steps of a prepared, whole rollout batch."""
        return ()

    def plans(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the optimizer steps of a minibatch, in order."""
        return (self.objective(batch, state),)

    def measure(self, plan: Plan, logp: torch.Tensor, entropy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the 0-dim sums that `update` needs. Add them over micro-batches and ranks."""
        return {}

    def update(self, state: State, metrics: Mapping[str, torch.Tensor]) -> State:
        """Return the state after an optimizer step."""
        return state

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state after all steps of a prepared rollout batch."""
        return state


def require_metrics(op: str, metrics: Mapping[str, torch.Tensor], *names: str) -> None:
    """Raise an error if a metric from `measure` is missing."""
    for name in names:
        if name not in metrics:
            raise refuse(
                op, f"metrics[{name!r}]", "given", sorted(metrics), "Pass what algorithm.measure(plan, ...) returned."
            )


def kept_sequences(batch: Batch) -> torch.Tensor:
    """Return the sequences that have a counting token, (count,) int64. The others need no forward pass."""
    return (batch.lengths > 0).nonzero().flatten()
