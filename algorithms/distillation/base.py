"""The interface of the distillation methods: a frozen configuration that makes one plan per batch.

    method = tokfuse.algorithms.make("gkd", beta=0.1)
    plan = method.objective(DistillationBatch(num_tokens=..., cu_seqlens=...))
    step = tokfuse.distill_step(hidden=..., weight=..., teacher_hidden=..., teacher_weight=..., **plan.inputs())

There are three kinds of plans:

* A `DistillationPlan` with a divergence over the whole vocabulary: `tokfuse.distill_step(**plan.inputs())`.
* A `DistillationPlan` without one, from top-k methods: `plan.loss(method.divergence(...))` with autograd.
* A `tokfuse.algorithms.Plan`, from policy-gradient forms: `tokfuse.policy_step(**plan.inputs())`.

All of them have `count` and `take`: the parts that `take` returns have the gradient of the whole plan.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from tokfuse.algorithms.base import Plan
from tokfuse.algorithms.distillation.batch import CONTEXTS, DistillationBatch
from tokfuse.algorithms.stateful import Stateful
from tokfuse.runtime.core.checks import Rows, check_choice, check_number, check_values, check_vector
from tokfuse.runtime.core.errors import refuse

AGGREGATIONS = ("token_mean", "seq_mean_token_mean")


@dataclass(frozen=True, kw_only=True)
class DistillationPlan:
    """One optimizer step: sum over tokens of coef * divergence, divided.

    Args:
        batch: the batch that the step trains on.
        mask: (tokens,), bool. True where a token counts.
        divergence: `kind` of `distill_step`, with its `beta` or `alpha`. None: the caller passes the divergence of
            every token to `loss`.
        coef: (tokens,). Weight of each token. None: 1.
        counts_sequences: divide by the number of sequences, not of tokens.
        temperature: divides the logits of both sides.
        normalizer: "batch" divides by `count()`; a number or a 0-dim tensor divides by that number.
    """

    batch: DistillationBatch
    mask: torch.Tensor
    divergence: Mapping[str, Any] | None
    coef: torch.Tensor | None = None
    counts_sequences: bool = False
    temperature: float = 1.0
    normalizer: float | str | torch.Tensor = "batch"

    def count(self) -> torch.Tensor:
        """Return the part of the divisor that this plan contributes, () float64: its tokens or sequences that count.

        Sum it over ranks, and over micro-batches, to get the global normalizer.
        """
        if self.counts_sequences:
            return (self.batch.lengths(self.mask) > 0).sum().double()
        return self.mask.sum().double()

    def divisor(self, normalizer: float | torch.Tensor | None = None) -> float | torch.Tensor:
        """Return the number that the loss is divided by. A count of 0 gives 1: the loss is then 0 anyway."""
        _check_count(normalizer)
        given = self.normalizer if normalizer is None else normalizer
        if isinstance(given, str):
            given = self.count()
        if isinstance(given, torch.Tensor):
            return torch.where(given == 0, 1.0, given)
        return given or 1.0

    def inputs(self, normalizer: float | torch.Tensor | None = None) -> dict[str, Any]:
        """Return the keyword arguments of `distill_step`, except the models and the target.

        Args:
            normalizer: sum of `count()` over micro-batches and ranks. None: the normalizer of this plan, which for a
                plan from `take` is the count of the whole plan.
        """
        if self.divergence is None:
            raise refuse(
                "DistillationPlan.inputs",
                "divergence",
                "one over the whole vocabulary",
                None,
                "This method compares a few ids per token: use plan.loss(method.divergence(...)).",
            )
        return {
            **self.divergence,
            **self.weighting(normalizer),
            "temperature": self.temperature,
            "teacher_temperature": self.temperature,
        }

    def weighting(self, normalizer: float | torch.Tensor | None = None) -> dict[str, Any]:
        """Return mask, coef and normalizer, as `distill_step` takes them."""
        # A count of tokens stays on the device: distill_step has it too.
        divisor = "batch" if self._counts_own_tokens(normalizer) else self.divisor(normalizer)
        return {"mask": self.mask, "coef": self.coef, "normalizer": divisor}

    def _counts_own_tokens(self, normalizer: float | torch.Tensor | None) -> bool:
        return normalizer is None and isinstance(self.normalizer, str) and not self.counts_sequences

    def loss(self, divergence: torch.Tensor, normalizer: float | torch.Tensor | None = None) -> torch.Tensor:
        """Return the loss for the divergence of every token, (), differentiable in it.

        `distill_step` returns the same loss if `linear_paired_divergence` or `paired_divergence` computed `divergence`.
        """
        rows = Rows(self.batch.num_tokens, "batch.num_tokens", self.mask.device)
        value = check_vector("DistillationPlan.loss", "divergence", divergence, rows).double()
        if self.coef is not None:
            value = value * self.coef
        total = torch.where(self.mask, value, 0.0).sum() / self.divisor(normalizer)
        return total.to(divergence.dtype)

    def take(self, seqs: torch.Tensor) -> "DistillationPlan":
        """Return the plan of a micro-batch: the sequences `seqs`, (count,) int64, of this optimizer step.

        The part keeps the weights and the divisor of the whole step. If the parts cover all sequences, their losses
        add up to the loss of this plan, and their gradients to its gradient.
        """
        tokens = self.batch.rows(seqs)
        return replace(
            self,
            batch=self.batch.take(seqs),
            mask=self.mask[tokens],
            coef=None if self.coef is None else self.coef[tokens],
            normalizer=self.divisor(),
        )


def _check_count(normalizer: object) -> None:
    """Raise an error unless this is None, "batch", or a count: a finite number >= 0, or a tensor with one."""
    op = "DistillationPlan"
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            shape = f"shape {tuple(normalizer.shape)}"
            raise refuse(op, "normalizer", "a 0-dim tensor", shape, "Pass one global count.")
        check_values(op, "normalizer", normalizer, 0.0)
    elif isinstance(normalizer, str):
        check_choice(op, "normalizer", normalizer, ("batch",))
    elif normalizer is not None:
        check_number(op, "normalizer", normalizer, 0.0)


@dataclass(frozen=True, kw_only=True)
class Distillation(Stateful, ABC):
    """A distillation method. Its fields are its configuration; `objective` is a pure function."""

    contexts: ClassVar[tuple[str, ...]] = ()
    """The fields of the batch that describe the prompts and that the method reads."""

    @abstractmethod
    def objective(self, batch: DistillationBatch) -> DistillationPlan | Plan:
        """Return the loss of the batch, or of a minibatch of it."""

    def check_contexts(self, batch: DistillationBatch) -> None:
        """Raise an error if this is no batch, or if it has a field that the method would ignore."""
        if not isinstance(batch, DistillationBatch):
            kind = type(batch).__name__
            raise TypeError(f"{self._op}: batch must be a DistillationBatch; got {kind}. Make one from cu_seqlens.")
        for name in CONTEXTS:
            if getattr(batch, name) is not None and name not in self.contexts:
                raise refuse(
                    self._op, f"batch.{name}", "left out", "a tensor", "This method treats all responses alike."
                )

    def check_aggregation(self, aggregation: str) -> None:
        """Raise an error unless the aggregation is known."""
        check_choice(self._op, "aggregation", aggregation, AGGREGATIONS)

    def check_temperature(self, temperature: float) -> None:
        """Raise an error unless the temperature is positive."""
        check_number(self._op, "temperature", temperature, 0.0, open_low=True)


def mean_plan(
    batch: DistillationBatch,
    divergence: Mapping[str, Any] | None,
    aggregation: str,
    *,
    mask: torch.Tensor | None = None,
    coef: torch.Tensor | None = None,
    temperature: float = 1.0,
) -> DistillationPlan:
    """Return the plan of a mean over tokens, or of a mean over sequences of their token means.

    Args:
        batch: the batch of the step.
        divergence: as in `DistillationPlan`.
        aggregation: "token_mean" or "seq_mean_token_mean".
        mask: (tokens,), bool. Tokens that count. None: the mask of the batch.
        coef: (tokens,). Weight of each token. None: 1.
        temperature: of both sides.
    """
    keep = batch.valid if mask is None else mask
    per_sequence = aggregation == "seq_mean_token_mean"
    if per_sequence:
        share = 1.0 / batch.lengths(keep).clamp(min=1).double()[batch.sequence]
        coef = share if coef is None else coef * share
    return DistillationPlan(
        batch=batch, mask=keep, divergence=divergence, coef=coef, counts_sequences=per_sequence, temperature=temperature
    )
