"""One training step: statistics of the old policy, advantages, and the policy updates."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokfuse
from grpo_demo.rollout import Rollout, completion_hidden
from tokfuse.algorithms import Algorithm, Batch, Plan, train_step


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
        saved: list[dict[str, Any]] = []

        def forward(seqs: Tensor, source: str) -> dict[str, Tensor]:
            part = rollout.select(seqs[:: rollout.group_size] // rollout.group_size)  # whole groups, in order
            hidden = completion_hidden(self.model, part)
            return {"hidden": hidden, "weight": self.model.lm_head.weight, "target": part.target}

        def save(plan: Plan, inputs: Mapping[str, Any], step: tokfuse.PolicyStep) -> None:
            kept = {name: value for name, value in inputs.items() if name not in ("weight", "objective")}
            saved.append(kept | {"hidden": inputs["hidden"].detach()})

        done = train_step(
            self.algorithm,
            self.state,
            batch,
            forward,
            self.optimizer,
            minibatches=self.minibatches,
            leave_out=self.leave_out,
            on_step=save,
        )
        self.state = done.state
        clock.seconds += done.seconds
        return StepResult(old.entropy.mean().item(), len(old.logp), clock, len(done.losses), done.metrics, saved)
