"""One training step: statistics of the old policy, advantages, and the policy updates."""

import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import tokfuse
from grpo_demo.algorithms import Algorithm
from grpo_demo.rollout import Rollout, completion_hidden


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
        return {
            "entropy": self.entropy,
            **figures,
            "updates": self.updates,
            "loss_ms": self.loss_clock.seconds * 1e3,
        }


class Learner:
    """Updates a model on batches of rollouts, one optimizer step per minibatch of whole groups.

    Args:
        model: a causal language model from transformers.
        optimizer: over the model's parameters.
        algorithm: objective, advantage and normaliser.
        minibatches: how many parts each batch is cut into. Every ratio is against the policy that
            sampled the batch, so from the second part on the policy has moved and clipping matters.
    """

    def __init__(
        self, model: Any, optimizer: torch.optim.Optimizer, algorithm: Algorithm, minibatches: int
    ) -> None:
        self.model = model
        self.optimizer = optimizer
        self.algorithm = algorithm
        self.minibatches = minibatches

    def step(self, rollout: Rollout) -> StepResult:
        """Statistics of the policy that sampled the batch, advantages, then the updates."""
        clock = Clock()
        with torch.no_grad():
            hidden = completion_hidden(self.model, rollout)
            with clock:
                old = tokfuse.linear_token_stats(hidden, self.model.lm_head.weight, rollout.target)
        with clock:
            advantage = tokfuse.group_advantage(
                rollout.reward, rollout.group_ids, kind=self.algorithm.advantage
            )
        result = StepResult(old.entropy.mean().item(), len(old.logp), clock)
        for groups in torch.arange(len(rollout.prompt)).chunk(self.minibatches):
            self._update(rollout, groups, old.logp, advantage, result)
        return result

    def _update(
        self,
        rollout: Rollout,
        groups: Tensor,
        old_logp: Tensor,
        advantage: Tensor,
        result: StepResult,
    ) -> None:
        """One optimizer step on these groups; none when no sequence of theirs has a gradient."""
        live = self._with_gradient(groups, advantage.view(-1, rollout.group_size))
        if len(live) == 0:
            return
        part = rollout.select(live)
        batch = self._loss_inputs(rollout, groups, live, old_logp, advantage)
        hidden = completion_hidden(self.model, part)
        with result.loss_clock:
            step = tokfuse.policy_step(
                hidden=hidden,
                weight=self.model.lm_head.weight,
                objective=self.algorithm.objective,
                **batch,
            )
        step.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        result.updates += 1
        result.metrics = step.metrics if result.metrics is None else result.metrics + step.metrics
        result.batches.append({"hidden": hidden.detach(), **batch})

    def _with_gradient(self, groups: Tensor, advantage: Tensor) -> Tensor:
        """The groups that the model must read again; `advantage` is (P, G).

        A group whose samples are all right or all wrong has advantage 0 everywhere, and its
        gradient is exactly 0. It still counts in the normaliser.
        """
        if self.algorithm.needs_every_row:
            return groups
        return groups[advantage[groups].ne(0).any(1)]

    def _loss_inputs(
        self, rollout: Rollout, groups: Tensor, live: Tensor, old_logp: Tensor, advantage: Tensor
    ) -> dict[str, Any]:
        """The packed inputs of `policy_step` for the groups in `live`."""
        part, counted = rollout.select(live), rollout.select(groups).length
        sequence_is_live = torch.isin(rollout.group_ids, live)
        token_is_live = sequence_is_live.repeat_interleave(rollout.length)
        return {
            "target": part.target,
            "old_logp": old_logp[token_is_live],
            "advantage": advantage[sequence_is_live],
            "advantage_level": "sequence",
            "cu_seqlens": part.cu_seqlens,
            "normalizer": self.algorithm.normalizer(
                len(counted), int(counted.sum()), rollout.completion.shape[1]
            ),
        }
