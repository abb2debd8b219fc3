"""The result of distill_step, and its metrics."""

from dataclasses import dataclass

import torch

from tokfuse.runtime.core.statistics import PairedStats
from tokfuse.runtime.policy.results import Gradients, HeldGradients, Influence

SLOTS = ("tokens", "loss", "divergence", "entropy", "logp_gap", "top1_agreement")


@dataclass(frozen=True)
class DistillMetrics:
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

    def __getitem__(self, name: str) -> float:
        values = self.mean()
        if name not in values:
            raise KeyError(f"DistillMetrics: no metric {name!r}; this batch has {', '.join(values)}.")
        return values[name]

    def mean(self) -> dict[str, float]:
        """Every metric as a number; reads the device once. Without a token the means are 0."""
        sums = dict(zip(SLOTS, self.sums.tolist(), strict=True))
        count = max(sums["tokens"], 1.0)
        out = {name: sums[name] / count for name in SLOTS[2:] if self.has_target or name != "logp_gap"}
        return out | {"loss": sums["loss"], "tokens": sums["tokens"]}


@dataclass(frozen=True)
class DistillStep(HeldGradients):
    """What `distill_step` returns."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer; `loss.backward()` hands out the gradients."""
    divergence: torch.Tensor
    """(tokens,) float32, nats, of the tokens with a weight, 0 elsewhere; detached."""
    loss_sum: torch.Tensor
    """() float32, sum of coef * divergence before the normaliser; detached."""
    count: torch.Tensor
    """() float64, this batch's own denominator: tokens that the mask keeps."""
    metrics: DistillMetrics
    stats: PairedStats
    """Statistics of the tokens with a weight, 0 elsewhere; detached."""
    _gradients: Gradients
    influence: Influence | None = None
    """Gradient norms and sketches, if `influence=InfluenceSpec(...)` was passed, else None."""


def distill_result(
    loss: torch.Tensor,
    stats: tuple[torch.Tensor, ...],
    coefficient: torch.Tensor,
    inverse: float | torch.Tensor,
    count: torch.Tensor,
    has_target: bool,
    gradients: Gradients,
) -> DistillStep:
    """Assemble the result.

    Args:
        loss: (), wired to autograd.
        stats: the five fields of `PairedStats`.
        coefficient: (tokens,), d loss / d divergence.
        inverse: 1 / normaliser.
        count: () float64.
        has_target: whether the caller gave one.
        gradients: by name.
    """
    divergence, entropy, logp, teacher_logp, top1_agreement = (x.detach() for x in stats)
    active = coefficient != 0
    gap = torch.where(active, logp - teacher_logp, 0.0)
    total = loss.detach()
    sums = [active.sum(), total, divergence.double().sum(), entropy.double().sum(), gap.double().sum()]
    sums.append(top1_agreement.double().sum())
    metrics = DistillMetrics(torch.stack([x.double() for x in sums]), has_target)
    paired = PairedStats(
        divergence, entropy, logp if has_target else None, teacher_logp if has_target else None, top1_agreement
    )
    return DistillStep(loss, divergence, (total.double() / inverse).to(total.dtype), count, metrics, paired, gradients)
