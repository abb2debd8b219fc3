"""Likelihood with external weights, and DWBC's weights from a discriminator."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    check_normalizer,
    check_number,
    check_optional,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.dwbc"


def weighted_nll(
    logp: torch.Tensor, weight: torch.Tensor, *, mask: torch.Tensor | None = None, normalizer: float | torch.Tensor
) -> torch.Tensor:
    """Return -sum over tokens of weight logp / normalizer, (); the weight is detached.

    Args:
        logp: (tokens,), differentiable, e.g. `tokfuse.linear_token_stats(...).logp`, whose backward skips rows of
            weight 0.
        weight: (tokens,), any sign.
        mask: (tokens,), bool. None: all tokens count.
        normalizer: > 0, e.g. the number of counting tokens over micro-batches and ranks.
    """
    op = "algorithms.weighted_nll"
    rows = Rows(check_vector(op, "logp", logp).shape[0], "logp", logp.device)
    check_vector(op, "weight", weight, rows)
    check_optional(op, "mask", mask, rows, BOOL)
    if normalizer is None:
        raise refuse(op, "normalizer", "a number > 0", None, "Pass the number of counting tokens.")
    check_normalizer(op, normalizer)
    w = weight.detach().to(logp.dtype)
    # Mask before the product, because a masked or unweighted token may have logp -inf.
    keep = w != 0 if mask is None else mask & (w != 0)
    return -(w * torch.where(keep, logp, 0.0) * keep).sum() / normalizer


@register(
    "dwbc",
    kind="reward",
    system="OILCA",
    label="utility",
    required=("eta",),
    source="github.com/ZexuSun/OILCA-NeurIPS23 (the policy loss, which is DWBC's)",
    summary="weights of expert and other samples from a discriminator, for `weighted_nll`",
    differs="Without OILCA's own contribution, counterfactual expert data from a VAE. An expert sample "
    "can get a negative weight (7.5 - 8.9 - 1 with eta 0.8); `negative` returns their share.",
)
@dataclass(frozen=True, kw_only=True)
class DWBC:
    """Weights w of w (-log pi): expert alpha - (eta / (d (1-d)) + 1), other 1 / (1-d) - 1. Utility.

    d is the discriminator's probability that a sample is an expert's, clipped. Other samples with d < cut get 0.

    Args:
        eta: class prior of the discriminator's positive-unlabelled loss, in (0, 1).
        alpha: weight of the expert's likelihood, >= 0.
        clip: d is kept in [clip, 1 - clip]; in (0, 0.5).
        cut: threshold on d of other samples, in [0, 1].
    """

    eta: float
    alpha: float = 7.5
    clip: float = 0.1
    cut: float = 0.5

    def __post_init__(self) -> None:
        check_number(OP, "eta", self.eta, 0.0, 1.0, open_low=True, open_high=True)
        check_number(OP, "alpha", self.alpha, 0.0)
        check_number(OP, "clip", self.clip, 0.0, 0.5, open_low=True, open_high=True)
        check_number(OP, "cut", self.cut, 0.0, 1.0)

    def weights(self, probability: torch.Tensor, expert: torch.Tensor) -> torch.Tensor:
        """Return the weights, (samples,), detached.

        Args:
            probability: (samples,), in [0, 1], d before clipping.
            expert: (samples,), bool.
        """
        check_vector(OP, "probability", probability)
        rows = Rows(probability.shape[0], "probability", probability.device)
        check_vector(OP, "expert", expert, rows, BOOL)
        check_values(OP, "probability", probability.detach(), 0.0, 1.0)
        d = probability.detach().clamp(self.clip, 1 - self.clip)
        other = torch.where(d < self.cut, 0.0, 1 / (1 - d) - 1)
        return torch.where(expert, self.alpha - (self.eta / (d * (1 - d)) + 1), other)

    def negative(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the share of negative weights, (). Log it: these samples become less likely. `weight` is finite."""
        check_vector(OP, "weight", weight)
        check_values(OP, "weight", weight)
        return (weight < 0).double().mean()
