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
    """Adds up the time spent in `with clock:` blocks."""

    seconds: float = 0.0

    def __enter__(self) -> None:
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.perf_counter() - self._start


@dataclass
class StepResult:
    """Result of one step.

    Args:
        entropy: mean entropy of the policy that sampled the batch, over all counting tokens.
        tokens: number of counting tokens.
        loss_clock: time spent in tokfuse.
        updates: number of optimizer steps.
        metrics: metrics added over the updates, for the tokens that the model read again. None before the first
            update.
        batches: inputs of `policy_step` in each update, for the backend table.
    """

    entropy: float
    tokens: int
    loss_clock: Clock
    updates: int = 0
    metrics: tokfuse.Metrics | None = None
    batches: list[dict[str, Any]] = field(default_factory=list)

    def row(self) -> dict[str, float | None]:
        """Return the values of a results row. A value is None if it needs an update and there was none."""
        figures = {"loss": None, "kl": None, "clip_fraction": None, "grad_rows": 0.0}
        if self.metrics is not None:
            mean = self.metrics.mean()
            figures["loss"] = mean["loss"] / self.updates
            figures["kl"] = mean["kl_k3"]
            figures["clip_fraction"] = mean["clip_low"] + mean["clip_high"]
            figures["grad_rows"] = mean["grad_rows"] * mean["tokens"] / self.tokens
        return {"entropy": self.entropy, **figures, "updates": self.updates, "loss_ms": self.loss_clock.seconds * 1e3}


class Learner:
    """Updates a model on batches of rollouts, with one optimizer step per minibatch of whole groups.

    Args:
        model: a causal language model from transformers.
        optimizer: optimizer of the model's parameters.
        algorithm: a method of `tokfuse.algorithms`; `state` is its state.
        minibatches: number of parts of each batch. Every ratio compares with the policy that sampled the batch.
            From the second part on the policy has changed, so clipping matters.
        leave_out: skip the forward pass of groups whose gradient is zero.
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
        """Compute statistics of the policy that sampled the batch, then the advantages, then the updates."""
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
        """Take one optimizer step on these groups, unless all their gradients are zero."""
        whole = self.algorithm.objective(batch.take(rollout.sequences(groups)), self.state)
        live = self._with_gradient(groups, rollout, batch, whole)
        if len(live) == 0:
            return
        part = rollout.select(live)
        plan = self.algorithm.objective(batch.take(rollout.sequences(live)), self.state)
        # A skipped group has loss 0 but still counts in the normalizer.
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
        del inputs["objective"]  # belongs to the algorithm, not to the batch
        result.batches.append({"hidden": hidden.detach(), "target": part.target, **inputs})

    def _with_gradient(self, groups: Tensor, rollout: Rollout, batch: Batch, plan: Plan) -> Tensor:
        """Return the groups that the model must read again.

        The gradient of a group is exactly 0 if all its samples are correct or all are wrong (every advantage is then
        0), or if the algorithm deselected all its tokens.
        """
        live = batch.lengths > 0
        if not plan.needs_every_row:
            size = batch.advantage.abs()
            live &= (batch.sequence_mean(size) if batch.advantage_level == "token" else size) > 0
        if not self.leave_out:
            return groups
        return groups[live.view(-1, rollout.group_size)[groups].any(1)]
