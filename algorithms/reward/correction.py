"""Losses for wrong labels, and for feedback that only some of the samples have."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    check_choice,
    check_normalizer,
    check_number,
    check_optional,
    check_unused,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse

SYSTEM = "CausalRM"
SOURCE = "arXiv 2603.18736 (a long summary with every formula)"


@register(
    "causalrm_noise",
    kind="reward",
    system=SYSTEM,
    label="recon",
    required=("rho01", "rho10"),
    source=SOURCE,
    summary="loss whose mean over label noise is the loss on clean labels",
    differs="The caller passes the base loss (the source uses squared error). Taken from a summary of the "
    "paper. The identity is a standard one, and a test checks it.",
)
@dataclass(frozen=True, kw_only=True)
class NoiseCorrection:
    """l~(1) = [(1 - rho10) l(1) - rho01 l(0)] / (1 - rho01 - rho10); l~(0) with both indices swapped.

    Reconstructed. The mean of l~(noisy label) over the noise is l(clean label). A single l~ may be negative. It is
    not clamped, because the gradient is unbiased.

    Args:
        rho01: P(label 0 | truth 1), the rate of false negatives, in [0, 1).
        rho10: P(label 1 | truth 0), the rate of false positives, in [0, 1). rho01 + rho10 < 1.
    """

    rho01: float
    rho10: float

    def __post_init__(self) -> None:
        op = "algorithms.causalrm_noise"
        check_number(op, "rho01", self.rho01, 0.0, 1.0, open_high=True)
        check_number(op, "rho10", self.rho10, 0.0, 1.0, open_high=True)
        if self.rho01 + self.rho10 >= 1.0:
            raise refuse(
                op,
                "rho01 + rho10",
                "less than 1 (otherwise labels carry no information)",
                self.rho01 + self.rho10,
                "Estimate the rates again.",
            )

    def loss(self, loss_one: torch.Tensor, loss_zero: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        """Return the corrected losses, (samples,).

        Args:
            loss_one: (samples,), base loss of the prediction with label 1.
            loss_zero: (samples,), base loss of the prediction with label 0.
            label: (samples,) bool, the observed labels.
        """
        op = "algorithms.causalrm_noise"
        rows = Rows(check_vector(op, "loss_one", loss_one).shape[0], "loss_one", loss_one.device)
        check_vector(op, "loss_zero", loss_zero, rows)
        check_vector(op, "label", label, rows, BOOL)
        scale = 1.0 / (1.0 - self.rho01 - self.rho10)
        one = (1 - self.rho10) * loss_one - self.rho01 * loss_zero
        zero = (1 - self.rho01) * loss_zero - self.rho10 * loss_one
        return scale * torch.where(label, one, zero)


def anchor_noise_rates(probability: torch.Tensor) -> tuple[float, float]:
    """Return (rho01, rho10) = (1 - max P(label 1), min P(label 1)) over samples. Reads values from the device.

    The most certain samples are the anchors: their truth is assumed to be 1 and 0.

    Args:
        probability: (samples,), in [0, 1], P(label 1) of a proxy model trained on the noisy labels.

    Source: CausalRM, reconstructed; the anchor-point estimate of Liu and Tao (2016).
    """
    check_vector("algorithms.causalrm_noise", "probability", probability)
    if probability.shape[0] == 0:
        raise refuse(
            "algorithms.causalrm_noise", "probability", "of at least one sample", "none", "Score the data with it."
        )
    check_values("algorithms.causalrm_noise", "probability", probability, 0.0, 1.0, always=True)
    return 1.0 - float(probability.max()), float(probability.min())


FORMS = ("ips", "snips", "dr")


@register(
    "causalrm",
    kind="reward",
    system=SYSTEM,
    label="recon",
    source=SOURCE,
    summary="losses of the observed samples divided by their propensity, or doubly robust",
    differs="Clipping of the propensities is an addition, off by default.",
)
@dataclass(frozen=True, kw_only=True)
class PropensityLoss:
    """Mean loss over all samples, estimated from the observed ones. Reconstructed from standard estimators.

    ips: mean(o l / p); snips: sum(o l / p) / sum(o / p); dr: mean(e + o (l - e) / p), unbiased if p or e is right.
    o is 1 for an observed sample, l its loss, p its propensity, e its imputed loss.

    Args:
        form: "ips", "snips" or "dr".
        clip: lower bound of p, in (0, 1); biases the estimate. None: no bound.
    """

    form: str = "ips"
    clip: float | None = None

    def __post_init__(self) -> None:
        check_choice("algorithms.causalrm", "form", self.form, FORMS)
        if self.clip is not None:
            check_number("algorithms.causalrm", "clip", self.clip, 0.0, 1.0, open_low=True, open_high=True)

    def loss(
        self,
        loss: torch.Tensor,
        observed: torch.Tensor,
        propensity: torch.Tensor | None = None,
        *,
        weight: torch.Tensor | None = None,
        imputed: torch.Tensor | None = None,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the estimate, (), differentiable in `loss` and `imputed` but not in the propensity or weight.

        Pass either the propensity or the weight; the other must be None.

        Args:
            loss: (samples,), loss of each sample (with noisy labels: the corrected loss). Values where observed is
                False are not read and may be NaN.
            observed: (samples,), bool.
            propensity: (samples,), p = P(observed), in (0, 1] for observed samples, and in [0, 1] with `clip`. Values
                where observed is False are not read.
            weight: (samples,), used in place of 1 / p; finite and >= 0 for observed samples. For weights w with mean
                1 over the observed samples (kernel balancing), pass (all samples / observed samples) w. `clip` is
                for propensities only.
            imputed: (samples,), the expected loss of each sample; for "dr", and only there.
            normalizer: number of samples > 0 over all micro-batches and ranks, for "ips" and "dr". None: of
                this call.
        """
        op = "algorithms.causalrm"
        samples = check_vector(op, "loss", loss).shape[0]
        rows = Rows(samples, "loss", loss.device)
        check_vector(op, "observed", observed, rows, BOOL)
        check_optional(op, "imputed", imputed, rows)
        check_normalizer(op, normalizer)
        if (imputed is None) == (self.form == "dr"):
            raise refuse(
                op,
                "imputed",
                "given with form 'dr', and only then",
                None if imputed is None else "a tensor",
                "Set the form that you need.",
            )
        w = _weights(op, observed, propensity, weight, rows, self.clip)
        known = torch.where(observed, loss, 0.0)
        if self.form == "snips":
            if normalizer is not None:
                raise refuse(op, "normalizer", "left out with form 'snips'", "a number", "It divides by its weights.")
            total = w.sum()
            return (w * known).sum() / torch.where(total > 0, total, 1.0)
        count = max(1, samples) if normalizer is None else normalizer
        if imputed is None:
            return (w * known).sum() / count
        return (imputed + w * (known - torch.where(observed, imputed, 0.0))).sum() / count


def imputation_loss(
    loss: torch.Tensor,
    imputed: torch.Tensor,
    observed: torch.Tensor,
    propensity: torch.Tensor | None = None,
    *,
    weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return o (l - e)^2 / p, (samples,): the loss of the imputation head of "dr". l is detached.

    Pass either the propensity or the weight, as to `PropensityLoss.loss`.

    Args:
        loss: (samples,), l. Values where observed is False are not read.
        imputed: (samples,), e; receives the gradient.
        observed: (samples,), bool, o.
        propensity: (samples,), p, in (0, 1] for observed samples. Other values are not read.
        weight: (samples,), used in place of 1 / p; finite and >= 0 for observed samples.

    Source: kernel balancing's released code (w (e - e_hat)^2), exact.
    """
    op = "algorithms.imputation_loss"
    rows = Rows(check_vector(op, "loss", loss).shape[0], "loss", loss.device)
    check_vector(op, "imputed", imputed, rows)
    check_vector(op, "observed", observed, rows, BOOL)
    gap = torch.where(observed, loss.detach() - imputed, 0.0)
    return gap * gap * _weights(op, observed, propensity, weight, rows, None)


def _weights(
    op: str,
    observed: torch.Tensor,
    propensity: torch.Tensor | None,
    weight: torch.Tensor | None,
    rows: Rows,
    clip: float | None,
) -> torch.Tensor:
    """Return the detached weights of the samples: 1 / p or `weight` where observed, 0 elsewhere."""
    if (propensity is None) == (weight is None):
        actual = "none" if weight is None else "both"
        raise refuse(op, "propensity or weight", "given, exactly one of them", actual, "Pass one of the two.")
    if weight is not None:
        check_unused(op, "weight", clip=clip)
        check_vector(op, "weight", weight, rows)
        check_values(op, "weight", weight.detach(), 0.0, where=observed)
        return torch.where(observed, weight.detach(), 0.0)
    p = check_vector(op, "propensity", propensity, rows).detach()
    check_values(op, "propensity", p, 0.0, 1.0, open_low=clip is None, where=observed)
    if clip is not None:
        p = p.clamp(min=clip)
    return torch.where(observed, 1.0 / torch.where(observed, p, 1.0), 0.0)
