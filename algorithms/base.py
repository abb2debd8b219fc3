"""The interface of all methods: a frozen configuration with pure functions, and a state of plain data.

    algorithm = tokfuse.algorithms.make("gbpo", tau=1e-4)
    state = algorithm.initial_state()
    for every rollout:
        state = train_step(algorithm, state, batch, forward, optimizer).state

`train_step` makes these calls, which your own loop can make instead:

    for every rollout:
        batch = algorithm.prepare(batch, state)                    # advantages and selection
        algorithm.before(batch, state)                             # plans to run first (only PIPO has any)
        algorithm.replay(batch, state)                             # or a batch to train on first (PIPO's released code)
        for every minibatch of sequences:
            for plan in algorithm.plans(batch.take(part), state):  # one plan; LOPTI has two
                step = tokfuse.policy_step(logits=..., target=..., **plan.inputs())
                step.loss.backward(); optimizer.step()
                metrics = algorithm.measure(plan, step.stats.logp, step.stats.entropy)
                state = algorithm.update(state, metrics)
        state = algorithm.advance(state, batch)                    # once per rollout

To accumulate gradients, make the plan of the whole minibatch and pass its parts to the step. `plan.take(sequences)`
keeps the decisions and the divisor of the whole plan, so the gradient does not depend on the number of parts.

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
from tokfuse.runtime.policy.inputs import OPTIONAL_VECTORS
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
        anchor_logp: (tokens,), nats. Log-probabilities that `objective.anchor` compares the policy with.
        anchor_weight: (tokens,). Multiplies the anchor term. None: 1.
        normalizer: "batch" divides by the count of this batch; a number divides by that number.
        constant: (). Value of terms without a gradient, before the division. The fused loss leaves them out; add
            `offset` to a reported loss. None: 0.
        source: "current" for the batch passed to `plans`; "previous" for the last rollout batch passed to
            `advance` (PIPO).
        fixed: True if the divisor is a constant of the optimizer step, which does not grow with the batch (NFT).
        share: what `count` returns, if `take` made this plan. None: the plan is a whole step.
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
    anchor_logp: torch.Tensor | None = None
    anchor_weight: torch.Tensor | None = None
    normalizer: float | str = "batch"
    constant: torch.Tensor | None = None
    source: str = "current"
    fixed: bool = False
    share: float | None = None

    def inputs(self, normalizer: float | torch.Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `policy_step`, except the logits and the target.

        Args:
            normalizer: sum of `count()` over micro-batches and ranks. If it is 0, no token counts and the
                loss is 0 with any divisor. None: the normalizer of this plan, which for a plan from `take` is
                the count of the whole plan.
        """
        divisor = self.normalizer if normalizer is None else float(normalizer)
        if not isinstance(divisor, str):
            divisor = divisor or 1.0
        given = {name: getattr(self, name) for name in OPTIONAL_VECTORS} | {"sampler_logp": self.batch.sampler_logp}
        return {
            "old_logp": self.batch.old_logp,
            "advantage": self.advantage,
            "advantage_level": self.advantage_level,
            "objective": self.objective,
            "mask": self.mask,
            "cu_seqlens": self.batch.cu_seqlens,
            "normalizer": divisor,
            **{name: value for name, value in given.items() if value is not None},
        }

    def loss(
        self, logp: torch.Tensor, entropy: torch.Tensor | None = None, normalizer: float | torch.Tensor | None = None
    ) -> PolicyLoss:
        """Return `tokfuse.policy_loss` of differentiable statistics, with the same numbers as `policy_step`."""
        inputs = self.inputs(normalizer)
        return policy_loss(logp, entropy=entropy, **inputs)

    def offset(self, normalizer: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return `constant`, divided as the loss is with the same `normalizer`, ()."""
        if self.constant is None:
            return self.batch.old_logp.new_zeros(())
        divisor = self.inputs(normalizer)["normalizer"]
        return self.constant / (self.count().clamp(min=1.0) if divisor == "batch" else divisor)

    def count(self) -> torch.Tensor:
        """Return the part of the divisor that this plan contributes, () float64.

        Sum it over ranks, and over the parts that `take` returned, to get the global normalizer. Plans that were made
        from one micro-batch each can be summed too, unless they are `fixed`.
        """
        device = self.batch.old_logp.device
        if self.share is not None or self.normalizer != "batch":
            known = self.normalizer if self.share is None else self.share
            return torch.tensor(known, dtype=torch.float64, device=device)
        keep = self.batch.valid if self.mask is None else self.mask
        if self.objective.counts_sequences:
            return (replace(self.batch, mask=keep).lengths > 0).sum().double()
        return keep.sum().double()

    def take(self, seqs: torch.Tensor) -> "Plan":
        """Return the plan of a micro-batch: the sequences `seqs`, (count,) int64, of this optimizer step.

        The part keeps the weights, masks and bounds that were decided on the whole step, and its divisor. If the
        parts cover all sequences, their losses and gradients add up to the loss and gradient of this plan.
        """
        tokens = self.batch.rows(seqs)
        cut = {name: x[tokens] for name in ("mask", *OPTIONAL_VECTORS) if (x := getattr(self, name)) is not None}
        cut["advantage"] = self.advantage[tokens if self.advantage_level == "token" else seqs]
        whole, portion = float(self.count()), seqs.shape[0] / max(1, self.batch.num_seqs)
        if self.constant is not None:
            cut["constant"] = self.constant * portion
        part = replace(self, batch=self.batch.take(seqs), **cut)
        counted = self.normalizer == "batch" and self.share is None
        share = float(part.count()) if counted else whole * portion
        divisor = self.normalizer if isinstance(self.normalizer, float) else whole
        return replace(part, normalizer=divisor, share=share)

    @property
    def needs_every_row(self) -> bool:
        """Whether the forward pass must read sequences with advantage 0.

        If False, such a sequence has gradient 0. It may be left out of the forward pass, but the normalizer
        must count it.
        """
        o = self.objective
        return o.kl is not None or o.anchor is not None or o.entropy_coef != 0.0 or not o.shape.zero_without_advantage

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

    def passes(self) -> "tuple[Algorithm, ...]":
        """Return the methods of consecutive passes over all minibatches. Usually one: this method."""
        return (self,)

    def replay(self, batch: Batch, state: State) -> Batch | None:
        """Return the previous rollout batch, if the method trains on its minibatches first. It is prepared."""
        return None

    def replay_plan(self, batch: Batch, state: State) -> "Plan":
        """Return the optimizer step of a minibatch of `replay`."""
        return replace(self.objective(batch, state), source="previous")

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
