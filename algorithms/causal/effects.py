"""Effects of removing a factor, and bounds on the probability that it was necessary and sufficient."""

import math
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import FLOATS, check_device, check_dtype, check_values, check_vector, require_tensor
from tokfuse.runtime.core.errors import refuse


class Effect(NamedTuple):
    """A difference of means and its standard error."""

    value: float
    standard_error: float


@register(
    "ablation_effect",
    kind="causal",
    system="CMB",
    label="utility",
    source="difference in means; inspired by CMB (arXiv 2505.21165)",
    summary="value of a segment: rewards with it minus rewards without it, with standard errors",
    differs=(
        "CMB's own formula was not found. This is black-box influence by forward passes, for rewards "
        "without a gradient; `ofs` chooses the arms."
    ),
)
def ablation_effect(full: torch.Tensor, without: torch.Tensor, *, paired: bool = False) -> Effect:
    """Return mean(full) - mean(without), and its standard error. Utility.

    Both need at least two runs. Variances are sample variances.

    Args:
        full: (runs,), finite, rewards with the factor.
        without: (runs',), finite, rewards with the factor removed.
        paired: True if run i of both has the same prompt and random numbers: the error is then the
            standard error of the differences. False: sqrt(var / n + var' / n').
    """
    op = "effects.ablation_effect"
    for name, x in (("full", full), ("without", without)):
        if check_vector(op, name, x).shape[0] < 2:
            raise refuse(op, name, "of at least two runs", x.shape[0], "A standard error needs two.")
        check_values(op, name, x, always=True)
    a, b = full.double(), without.double()
    if not paired:
        return Effect(float(a.mean() - b.mean()), math.sqrt(float(a.var() / a.shape[0] + b.var() / b.shape[0])))
    if a.shape != b.shape:
        raise refuse(
            op, "without", f"of shape {tuple(a.shape)} with paired=True", f"shape {tuple(b.shape)}", "Pair them."
        )
    return Effect(float((a - b).mean()), math.sqrt(float((a - b).var()) / a.shape[0]))


class Bounds(NamedTuple):
    """low <= PNS <= high."""

    low: torch.Tensor
    high: torch.Tensor


@register(
    "pns_bounds",
    kind="causal",
    system="IDUM",
    label="utility",
    source="Tian and Pearl's bounds; used by IDUM (ICML 2025)",
    summary="bounds of the probability that a step was necessary and sufficient",
    differs="The standard bounds only. IDUM's risk, which uses them, was not found.",
)
def pns_bounds(with_step: torch.Tensor, without_step: torch.Tensor, *, monotone: bool = False) -> Bounds:
    """Return max(0, p1 - p0) <= P(Y1 = 1, Y0 = 0) <= min(p1, 1 - p0). Utility.

    p1 and p0 are rates under intervention: rollouts from the same prefixes with and without the step.

    Args:
        with_step: p1, success rates with the step or hint, in [0, 1].
        without_step: p0, success rates without it, same shape.
        monotone: assume that the step never turns a success into a failure. Then PNS = p1 - p0, which must not
            be negative.
    """
    op = "effects.pns_bounds"
    for name, rate in (("with_step", with_step), ("without_step", without_step)):
        check_dtype(op, name, require_tensor(op, name, rate), FLOATS)
    check_device(op, "without_step", without_step, with_step.device)
    if with_step.shape != without_step.shape:
        raise refuse(
            op,
            "without_step",
            f"of shape {tuple(with_step.shape)}",
            f"shape {tuple(without_step.shape)}",
            "Pass one rate per rate of with_step.",
        )
    p1, p0 = with_step.double(), without_step.double()
    check_values(op, "with_step", p1, 0.0, 1.0, always=True)
    check_values(op, "without_step", p0, 0.0, 1.0, always=True)
    if monotone:
        if bool((p1 < p0).any()):
            raise refuse(
                op,
                "with_step",
                ">= without_step with monotone=True",
                "a smaller rate",
                "The data contradict monotonicity: set monotone=False.",
            )
        return Bounds(p1 - p0, p1 - p0)
    return Bounds((p1 - p0).clamp_min(0.0), torch.minimum(p1, 1 - p0))
