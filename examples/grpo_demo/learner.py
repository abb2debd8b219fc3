"""One training step: statistics of the old policy, advantages, and the policy updates."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokfuse
from grpo_demo.rollout import Rollout, completion_hidden
from tokfuse.algorithms import Algorithm, Batch, Plan


@dataclass
class Clock:
    """Adds up the time spent inside `with clock:` blocks."""

    seconds: float = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


@dataclass
class StepResult:
    """What one step did.

    Args:
        entropy: mean over all tokens that count, of the policy that sampled them.
        tokens: number of tokens that count.
        loss_clock: time spent in tokfuse.
        updates: optimizer steps taken.
        metrics: merged over the updates, so over the tokens that the model read again; None before
            the first update.
        batches: what `policy_step` was given in each update, for the backend table.
    """

    entropy: float
    tokens: int
    loss_clock: Clock
    updates: int = 0
    metrics: tokfuse.Metrics | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, float | None]:
        """The figures of a results row; None where no update means no figure."""
        figures = {"loss": None, "kl": None, "clip_fraction": None, "grad_rows": 0.0}
        if self.metrics is not None:
            mean = self.metrics.mean()
            figures["loss"] = mean["loss"] / self.updates
            figures["kl"] = mean["kl_k3"]
            figures["clip_fraction"] = mean["clip_low"] + mean["clip_high"]
            figures["grad_rows"] = mean["grad_rows"] * mean["tokens"] / self.tokens
        return {"entropy": self.entropy, **figures, "updates": self.updates, "loss_ms": self.loss_clock.seconds * 1e3}


class Learner:
    """Updates a model on batches of rollouts, one optimizer step per minibatch of whole groups.

    Args:
        model: a causal language model from transformers.
        optimizer: over the model's parameters.
        algorithm: a method of `tokfuse.algorithms`; `state` is its state.
        minibatches: how many parts each batch is cut into. Every ratio is against the policy that
            sampled the batch, so from the second part on the policy has moved and clipping matters.
        leave_out: skip the forward pass of groups that cannot have a gradient.
    """

    def __init__(
        self,
        model: Any,
        optimizer: torch.optim.Optimizer,
        algorithm: Algorithm,
        minibatches: int,
        leave_out: bool = True,
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.algorithm = algorithm
        self.minibatches = minibatches
        self.leave_out = leave_out
        self.state = algorithm.initial_state()

    def step(self, rollout: Rollout) -> StepResult:
        """Statistics of the policy that sampled the batch, advantages, then the updates."""
        clock = Clock()
        with torch.no_grad():
            hidden = completion_hidden(self.model, rollout)
            with clock:
                old = tokfuse.linear_token_stats(hidden, self.model.lm_head.weight, rollout.target)
        batch = Batch(
            reward=rollout.reward,
            correct=rollout.reward > 0,
            group_ids=rollout.group_ids,
            cu_seqlens=rollout.cu_seqlens,
            old_logp=old.logp,
            entropy=old.entropy,
        )
        with clock:
            batch = self.algorithm.prepare(batch, self.state)
        result = StepResult(old.entropy.mean().item(), len(old.logp), clock)
        for groups in torch.arange(len(rollout.prompt)).chunk(self.minibatches):
            self._update(rollout, groups, batch, result)
        self.state = self.algorithm.advance(self.state, batch)
        return result

    def _update(self, rollout: Rollout, groups: Tensor, batch: Batch, result: StepResult) -> None:
        """One optimizer step on these groups; none when no sequence of theirs has a gradient."""
        whole = self.algorithm.objective(batch.take(rollout.sequences(groups)), self.state)
        live = self._with_gradient(groups, rollout, batch, whole)
        if len(live) == 0:
            return
        part = rollout.select(live)
        plan = self.algorithm.objective(batch.take(rollout.sequences(live)), self.state)
        # A group that is left out has loss 0 and still counts in the normaliser.
        inputs = plan.inputs(normalizer=whole.count())
        hidden = completion_hidden(self.model, part)
        with result.loss_clock:
            step = tokfuse.policy_step(hidden=hidden, weight=self.model.lm_head.weight, target=part.target, **inputs)
        step.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        metrics = self.algorithm.measure(plan, step.stats.logp, step.stats.entropy)
        self.state = self.algorithm.update(self.state, metrics)
        result.updates += 1
        result.metrics = step.metrics if result.metrics is None else result.metrics + step.metrics
        del inputs["objective"]  # the algorithm's, not the batch's
        result.batches.append({"hidden": hidden.detach(), "target": part.target, **inputs})

    def _with_gradient(self, groups: Tensor, rollout: Rollout, batch: Batch, plan: Plan) -> Tensor:
        """The groups that the model must read again.

        A group whose samples are all right or all wrong has advantage 0 everywhere, and one that
        the algorithm left out has no token that counts: its gradient is exactly 0.
        """
        live = batch.lengths > 0
        if not plan.needs_every_row:
            size = batch.advantage.abs()
            live &= (batch.sequence_mean(size) if batch.advantage_level == "token" else size) > 0
        if not self.leave_out:
            return groups
        return groups[live.view(-1, rollout.group_size)[groups].any(1)]
