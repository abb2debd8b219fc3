"""The terms of the loss of distill_step: divergence, policy loss and cross entropy."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends.policy_runs import LossRun
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.class_loss import ClassLoss
from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.leading import without_ignored
from tokfuse.runtime.lm_head import reference_pair
from tokfuse.runtime.lm_head.class_part import (
    CLASS_ARGUMENTS,
    CLASS_SCHEMA,
    WITHOUT_CLASSES,
    ClassPart,
    CrossEntropy,
    class_part_of,
)
from tokfuse.runtime.lm_head.pair_problem import Coefficients, PolicyPart, Stats
from tokfuse.runtime.lm_head.pair_results import TokenWeights, loss_of, token_weights, weighted_sum
from tokfuse.runtime.ops import policy_loss as losses
from tokfuse.runtime.policy.graph_form import checked_inverse, flat_objective, objective_of
from tokfuse.runtime.policy.inputs import Normalizer, PolicyInputs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.reference.token_stats import result_dtype

OP = "distill_step"


def loss_run(objective: Objective, device: torch.device, dtype: torch.dtype) -> LossRun:
    run: LossRun = select(losses.OP, device.type, result_dtype(dtype), objective.features()).run
    return run


def counting(
    cross_entropy: CrossEntropy, mask: torch.Tensor | None, target: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Return the mask without the tokens to ignore, and the target."""
    if not isinstance(cross_entropy, CrossEntropy):
        raise TypeError(
            f"{OP}: cross_entropy must be a tokfuse.CrossEntropy; got {type(cross_entropy).__name__}. "
            "Pass, for example, CrossEntropy(label_smoothing=0.1)."
        )
    checks.check_given(OP, "cross_entropy=", target=target)
    target = checks.require_tensor(OP, "target", target)
    if target.dtype != torch.int64:
        raise refuse(
            OP, "target", "class indices (int64)", str(target.dtype), "Pass labels; the teacher is its own side."
        )
    return without_ignored(OP, target, mask, cross_entropy.ignore_index, "cross_entropy.ignore_index"), target


def class_part(
    cross_entropy: CrossEntropy,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    normalizer: Normalizer,
    vocab: int,
    dtype: torch.dtype,
) -> tuple[ClassPart, TokenWeights]:
    """Return the checked cross entropy, and the weights of its tokens."""
    assert mask is not None
    c, device = cross_entropy, target.device
    loss = ClassLoss(c.class_weight, c.label_smoothing, c.z_loss)
    loss = loss.checked(OP, "class_weight", vocab, device, "cross_entropy.")
    counts = None if loss.class_weight is None else loss.counts(target, mask, vocab, dtype)
    name = "cross_entropy.coef"
    weights = token_weights(OP, c.coef, mask, normalizer, target.shape[0], device, dtype, name, counts)
    return ClassPart(weights.coefficient, loss, vocab), weights


class Terms(NamedTuple):
    """The terms of the loss."""

    coefficient: torch.Tensor
    """(tokens,), d loss / d divergence."""
    policy: PolicyPart | None
    classes: ClassPart | None

    def given(self, target: torch.Tensor) -> Coefficients:
        """Return the coefficients of the divergence and the cross entropy."""
        if self.classes is None:
            return Coefficients(self.coefficient)
        return self.classes.coefficients(self.coefficient, target)

    def results(self, stats: Stats, target: torch.Tensor) -> list[torch.Tensor]:
        """Return the loss, the statistics, and what `_further` adds."""
        loss = loss_of(stats, self.coefficient)
        policy = None if self.policy is None else self.policy.terms(stats[2], stats[1])
        further = self._further(policy, stats, target)
        if policy is not None:
            loss = loss + policy.loss.to(loss.dtype)
        if self.classes is not None:
            loss = loss + further[-2].to(loss.dtype)
        return [loss, *stats[:5], *further]

    def _further(self, policy: PolicyTerms | None, stats: Stats, target: torch.Tensor) -> list[torch.Tensor]:
        """Return loss, token losses and metric sums of the policy term; loss and token losses of the cross entropy."""
        out = [] if policy is None else [policy.loss, policy.token_loss, policy.sums]
        if self.classes is not None:
            token_loss = self.classes.losses(stats, target)
            out += [weighted_sum(token_loss, self.classes.weight).to(token_loss.dtype), token_loss]
        return out

    def traced(self, stats: Stats, given: Coefficients, target: torch.Tensor) -> Sequence[torch.Tensor]:
        """Return the same on the reference under torch.compile, which derives the backward."""
        c, policy = self.coefficient, self.policy
        loss = reference_pair.loss(stats, given, policy).to(c.dtype)
        rounded = [x.detach().to(c.dtype) for x in stats]
        own = reference_pair.own_rows(given, policy) is not None
        of_student = (1, 2, 5, 6) if own else ()  # entropy, logp, lse and the sum of the logits
        rounded = [x if i in of_student else torch.where(c != 0, x, 0.0) for i, x in enumerate(rounded)]
        if policy is None and own:
            rounded = [torch.where(given.active(), x, 0.0) for x in rounded]
        terms = None if policy is None else reference_pair.policy_terms(tuple(rounded), policy)
        return loss, *rounded[:5], *self._further(terms, tuple(rounded), target)

    def flat(self) -> tuple[Any, ...]:
        """Return the values of `TERMS_SCHEMA`."""
        classes = WITHOUT_CLASSES if self.classes is None else self.classes.flat()
        return (self.coefficient, *classes, *_flat_policy(self.policy))

    @staticmethod
    def from_flat(
        flat: Sequence[Any], vocab: int, mask: torch.Tensor | None, device: torch.device, dtype: torch.dtype
    ) -> "Terms":
        """Undo `flat`."""
        coefficient, *rest = flat
        policy = _policy_of(rest[CLASS_ARGUMENTS:], mask, device, dtype)
        return Terms(coefficient, policy, class_part_of(rest[:CLASS_ARGUMENTS], vocab))


POLICY_INPUTS = tuple(name for name in PolicyInputs._fields if name not in ("advantage_level", "mask"))
POLICY_SCHEMA = (
    ", ".join(f"Tensor? {name}" for name in POLICY_INPUTS)
    + ", str advantage_level, str objective, float[] coefficients, float inv_normalizer"
)
TERMS_SCHEMA = f"Tensor coefficient, {CLASS_SCHEMA}, {POLICY_SCHEMA}"
TERMS_ARGUMENTS = 1 + CLASS_ARGUMENTS + len(POLICY_INPUTS) + 4


def _flat_policy(policy: PolicyPart | None) -> tuple[Any, ...]:
    """Return the values of `POLICY_SCHEMA`; without a policy term the objective is empty."""
    if policy is None:
        # Not an empty list: torch would take it for a list of tensors.
        return (*(None,) * len(POLICY_INPUTS), "token", "", [0.0], 1.0)
    inputs = policy.inputs
    tensors = (getattr(inputs, name) for name in POLICY_INPUTS)
    return (*tensors, inputs.advantage_level, *flat_objective(policy.objective), policy.inv_normalizer)


def _policy_of(
    flat: Sequence[Any], mask: torch.Tensor | None, device: torch.device, dtype: torch.dtype
) -> PolicyPart | None:
    """Undo `_flat_policy`."""
    *tensors, level, form, coefficients, inverse = flat
    if not form:
        return None
    named = dict(zip(POLICY_INPUTS, tensors, strict=True))
    inputs = PolicyInputs(advantage_level=level, mask=mask, **named)
    objective = objective_of(form, coefficients)
    return PolicyPart(inputs, objective, checked_inverse(OP, inverse), loss_run(objective, device, dtype))


def fake_results(like: torch.Tensor, flat: Sequence[Any]) -> list[torch.Tensor]:
    """Return the tensors of `Terms.results` without their values. flat: the values of `TERMS_SCHEMA`."""
    tokens, float32 = like.shape[0], torch.float32
    out = [like.new_empty((), dtype=float32), *(like.new_empty(tokens, dtype=float32) for _ in range(5))]
    form, of_classes = flat[-3], flat[1]
    if form:
        sums = like.new_empty(len(SLOTS), dtype=torch.float64)
        out += [like.new_empty((), dtype=float32), like.new_empty(tokens, dtype=float32), sums]
    if of_classes is not None:
        out += [like.new_empty((), dtype=float32), like.new_empty(tokens, dtype=float32)]
    return out
