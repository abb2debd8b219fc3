"""The cross entropy that distill_step adds: its options, its coefficients in a row, its result."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.class_loss import ClassLoss
from tokfuse.runtime.lm_head.pair_problem import Coefficients, Stats


@dataclass(frozen=True)
class CrossEntropy:
    """The cross entropy with the targets that `distill_step` adds to its loss.

    The loss of a token is the loss of `tokfuse.cross_entropy`, with the options of `linear_cross_entropy`. With y the
    target, V the vocabulary, w the class weights and p the student's distribution at its temperature, it is

        (1 - label_smoothing) w_y (-log p_y) + label_smoothing / V sum_j w_j (-log p_j) + z_loss lse^2.

    The step adds the sum of coef * this loss, divided by the normalizer of the step. A number or None works as
    for the divergence. "batch" divides by the sum of w_y over the tokens that count, for any coef, as reduction="mean"
    of torch does. With this normalizer and a number as coef, the term is coef times
    `linear_cross_entropy(..., reduction="mean")`. With None and a number, it is coef times reduction="sum". If no token
    counts, the term is 0; torch's mean is nan. With label_smoothing, a logit of -inf makes the loss infinite, as in
    torch.

    Attributes:
        coef: weight of the cross entropy, a number or (tokens,). A token with weight 0 costs nothing in this term.
        class_weight: (vocab,) class weights. Negative weights and NaN raise no error, as in torch. None: 1 for every
            class.
        label_smoothing: share of the uniform distribution in the target distribution, in [0, 1].
        z_loss: coefficient of the squared log-sum-exp, >= 0.
        ignore_index: tokens with this target do not count in any term of the step, as if `mask` were False.
    """

    coef: float | torch.Tensor = 1.0
    class_weight: torch.Tensor | None = None
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    ignore_index: int = -100


@dataclass(frozen=True)
class CrossEntropyLoss:
    """The cross entropy in the result of `distill_step`; detached."""

    loss: torch.Tensor
    """() float32, its part of the loss of the step: loss_sum / normalizer."""
    token_loss: torch.Tensor
    """(tokens,) float32, the loss of each token before coef and the normaliser; 0 without a cross entropy."""
    loss_sum: torch.Tensor
    """() float32, sum of coef * token_loss before the normaliser."""
    count: torch.Tensor
    """() float64, the denominator of this batch: the sum of w_y over the tokens that count."""


class ClassPart(NamedTuple):
    """The checked cross entropy of a step."""

    weight: torch.Tensor
    """(tokens,), d loss / d cross entropy of the token; exactly 0 for a token without one."""
    loss: ClassLoss
    vocab: int

    def coefficients(self, divergence: torch.Tensor, target: torch.Tensor) -> Coefficients:
        """Return the coefficients of the rows; `divergence` contains the coefficients of the divergence.

        The loss of a row is linear in logp, lse, lse^2 and the weighted sum of the logits. So its coefficients are
        known before the statistics, and no further pass over the logits is needed.
        """
        a, (class_weight, smoothing, z_loss) = self.weight, self.loss
        counts = self.loss.counts(target, a != 0, self.vocab, a.dtype)
        found = Coefficients(divergence, logp=-(1.0 - smoothing) * counts * a)
        if z_loss != 0.0:
            found = found._replace(lse_square=z_loss * a)
        if smoothing != 0.0:
            lse = smoothing * self.loss.share(self.vocab, a.dtype) * a
            of_classes = checks.plain(class_weight, a.dtype)
            found = found._replace(lse=lse, logit_sum=-smoothing / self.vocab * a, class_weight=of_classes)
        return found

    def losses(self, stats: Stats, target: torch.Tensor) -> torch.Tensor:
        """Return the loss of every token before its weight, (tokens,); 0 for a token without a cross entropy."""
        further = stats[5:]
        lse = further[0] if further else stats[2]  # not used without further statistics
        logit_sum = further[1] if self.loss.label_smoothing != 0.0 else None
        mask = self.weight != 0
        found = self.loss.losses(stats[2], lse, logit_sum, target, mask, self.vocab)
        return torch.where(mask, found, 0.0)

    def flat(self) -> tuple[Any, ...]:
        """Return the values of `CLASS_SCHEMA`."""
        return (self.weight, *self.loss)


CLASS_SCHEMA = "Tensor? class_coefficient, Tensor? class_weight, float label_smoothing, float z_loss"
"""A cross entropy in the schema of a custom op; without one, `WITHOUT_CLASSES`."""
WITHOUT_CLASSES = (None, None, 0.0, 0.0)
CLASS_ARGUMENTS = len(WITHOUT_CLASSES)


def class_part_of(flat: Sequence[Any], vocab: int) -> ClassPart | None:
    """Return the cross entropy from the values of `CLASS_SCHEMA`."""
    weight, *options = flat
    return None if weight is None else ClassPart(weight, ClassLoss(*options), vocab)
