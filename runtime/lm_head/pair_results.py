"""The result of distill_step, and its metrics."""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.forward_gradients import Gradients, HeldGradients
from tokfuse.runtime.core.statistics import PairedStats
from tokfuse.runtime.lm_head.class_part import CrossEntropyLoss
from tokfuse.runtime.lm_head.pair_problem import PolicyPart
from tokfuse.runtime.policy.inputs import Normalizer, inverse_of
from tokfuse.runtime.policy.metrics import NamedMeans
from tokfuse.runtime.policy.results import Influence, PolicyLoss, PolicyTerms, loss_result, sampler_mismatch

SLOTS = ("tokens", "loss", "divergence", "entropy", "logp_gap", "top1_agreement")


@dataclass(frozen=True)
class DistillMetrics(NamedMeans):
    """Sums over the tokens with a weight, of one or more batches; nothing here has a gradient.

    Attributes:
        sums: (6,) float64, in the order of `SLOTS`. Add two `DistillMetrics` to merge them; across
            ranks all-reduce `sums`.
        has_target: whether `logp_gap` was computed.

    `mean()` gives divergence, entropy (of the student), logp_gap (mean of logp - teacher_logp, the
    one-sample estimate of the reverse KL), top1_agreement, loss and tokens.
    """

    sums: torch.Tensor
    has_target: bool

    def __add__(self, other: "DistillMetrics") -> "DistillMetrics":
        return DistillMetrics(self.sums + other.sums, self.has_target and other.has_target)

    def mean(self) -> dict[str, float]:
        """Return every metric as a number. Reads the device once. Without a token the means are 0."""
        sums = dict(zip(SLOTS, self.sums.tolist(), strict=True))
        count = max(sums["tokens"], 1.0)
        out = {name: sums[name] / count for name in SLOTS[2:] if self.has_target or name != "logp_gap"}
        return out | {"loss": sums["loss"], "tokens": sums["tokens"]}


@dataclass(frozen=True)
class DistillStep(HeldGradients):
    """Result of `distill_step`."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer, with the policy term and the cross entropy; `loss.backward()` returns the
    gradients."""
    divergence: torch.Tensor
    """(tokens,) float32, nats, of the tokens with a weight, 0 elsewhere; detached."""
    loss_sum: torch.Tensor
    """() float32, sum of coef * divergence before the normaliser; detached."""
    count: torch.Tensor
    """() float64, the denominator of this batch: the number of tokens that the mask keeps."""
    metrics: DistillMetrics
    stats: PairedStats
    """Statistics of the tokens with a weight, 0 elsewhere; detached. logp and entropy also have the tokens of the cross
    entropy, if there is one, and all tokens that the mask keeps, if there is a policy term."""
    _gradients: Gradients
    policy: PolicyLoss | None = None
    """Loss, token losses, count and metrics of the policy term, detached; None without an objective."""
    cross_entropy: CrossEntropyLoss | None = None
    """Loss, token losses and count of the cross entropy, detached; None without one."""
    influence: Influence | None = None
    """Gradient norms and sketches, if `influence=InfluenceSpec(...)` was passed, else None."""


class TokenWeights(NamedTuple):
    """The weights of the tokens in the loss."""

    coefficient: torch.Tensor
    """(tokens,), d loss / d divergence; exactly 0 for a token without weight."""
    inverse: float | torch.Tensor
    """1 / normaliser."""
    tokens: torch.Tensor
    """() float64: the denominator of the batch; for the divergence, the number of tokens that the mask keeps."""


def token_weights(
    op: str,
    coef: float | torch.Tensor | None,
    mask: torch.Tensor | None,
    normalizer: Normalizer,
    tokens: int,
    device: torch.device,
    dtype: torch.dtype,
    name: str = "coef",
    counts: torch.Tensor | None = None,
) -> TokenWeights:
    """Check the weights of the tokens, and combine them.

    Args:
        name: of `coef`, for errors.
        counts: (tokens,), what each token adds to the count of normalizer="batch". None: 1 where the mask is True.
    """
    of_tokens = coef if isinstance(coef, torch.Tensor) else None
    if of_tokens is not None:
        checks.check_constant_vector(op, name, of_tokens, checks.Rows(tokens, "the tokens", device))
    elif coef is not None:
        checks.check_number(op, name, coef, -math.inf)
    if mask is None:
        kept = torch.full((), tokens, dtype=torch.float64, device=device)
    else:
        kept = mask.sum().double()
    count = kept if counts is None else counts.sum(dtype=torch.float64)
    inverse: float | torch.Tensor = inverse_of(op, normalizer)
    if isinstance(normalizer, str):
        inverse = 1.0 / torch.where(kept == 0, 1.0, count)
    if of_tokens is None:
        c = torch.ones(tokens, dtype=torch.float64, device=device) * (1.0 if coef is None else checks.number(coef))
    else:
        c = of_tokens.detach().double()
    c = c * inverse
    return TokenWeights((c if mask is None else torch.where(mask, c, 0.0)).to(dtype), inverse, count)


def weighted_sum(value: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """Return the sum of c * value in float64; a value without a coefficient may be infinite."""
    return (torch.where(c != 0, value.double(), 0.0) * c.double()).sum()


def loss_of(stats: tuple[torch.Tensor, ...], coefficient: torch.Tensor) -> torch.Tensor:
    """Return the loss, (), in the dtype of the coefficients."""
    return weighted_sum(stats[0], coefficient).to(coefficient.dtype)


def distill_result(
    loss: torch.Tensor,
    found: tuple[torch.Tensor, ...],
    weights: TokenWeights,
    has_target: bool,
    gradients: Gradients,
    policy: PolicyPart | None = None,
    sampler_logp: torch.Tensor | None = None,
    of_classes: TokenWeights | None = None,
) -> DistillStep:
    """Assemble the result.

    Args:
        loss: (), differentiable.
        found: the five fields of `PairedStats`; with a policy term its loss, token losses and metric sums; with a
            cross entropy its loss and token losses.
        weights: of the tokens in the loss.
        has_target: whether the caller gave one.
        gradients: by name.
        policy: the policy term, or None.
        sampler_logp: (tokens,), for a metric of the policy term.
        of_classes: the weights of the tokens in the cross entropy, or None.
    """
    found = tuple(x.detach() for x in found)
    divergence, entropy, logp, teacher_logp, top1_agreement = found[:5]
    active = weights.coefficient != 0
    gap, of_active = (torch.where(active, x, 0.0) for x in (logp - teacher_logp, entropy))
    sums = [active.sum(), loss.detach(), *(x.double().sum() for x in (divergence, of_active, gap, top1_agreement))]
    metrics = DistillMetrics(torch.stack([x.double() for x in sums]), has_target)
    paired = PairedStats(
        divergence, entropy, logp if has_target else None, teacher_logp if has_target else None, top1_agreement
    )
    total = (weighted_sum(divergence, weights.coefficient) / weights.inverse).to(loss.dtype)
    part = None
    if policy is not None:
        of_policy, token_loss, policy_sums = found[5:8]
        terms = PolicyTerms(of_policy, token_loss, token_loss, token_loss, policy_sums)
        mismatch = sampler_mismatch(sampler_logp, policy.inputs, logp)
        part = loss_result(terms, policy.inputs, policy.objective, policy.inv_normalizer, True, mismatch)
    classes = None
    if of_classes is not None:
        of_loss, token_loss = found[-2:]
        classes = CrossEntropyLoss(of_loss, token_loss, of_loss / of_classes.inverse, of_classes.tokens)
    step = DistillStep(loss, divergence, total, weights.tokens, metrics, paired, gradients, part)
    return step if classes is None else replace(step, cross_entropy=classes)
