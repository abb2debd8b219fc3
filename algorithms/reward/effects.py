"""The effect of a treatment (a hint, a prompt, a rewrite) on the reward, per group, and its ranking."""

from typing import NamedTuple

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    BOOL,
    INTS,
    Rows,
    check_choice,
    check_integer,
    check_number,
    check_optional,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.segment_moments import segment_moments

SYSTEM = "PUC / PTONet"
SOURCE = "github.com/euzmin/PUC (utils.py, models/PTONet.py)"


class GroupEffect(NamedTuple):
    """Result of `group_effect`. (groups,) float64, detached."""

    effect: torch.Tensor
    """NaN if a group lacks samples that the estimator needs."""
    error: torch.Tensor
    """Standard error. NaN with fewer than two samples (in each arm, for the difference of means)."""


@register(
    "group_effect",
    kind="reward",
    system=SYSTEM,
    label="utility",
    source="standard estimators, as used for PTONet's targets: " + SOURCE,
    summary="treatment effect per group with its standard error: difference of means, IPW or AIPW",
    differs="No uplift network, only the estimators that judge its rankings.",
)
def group_effect(
    reward: torch.Tensor,
    treated: torch.Tensor,
    group_ids: torch.Tensor,
    num_groups: int,
    *,
    propensity: torch.Tensor | None = None,
    mu1: torch.Tensor | None = None,
    mu0: torch.Tensor | None = None,
) -> GroupEffect:
    """Return the mean reward with the treatment minus without it, for every group. Utility.

    Without propensity: difference of means with Welch's error. With propensity: IPW, the mean of t r / e -
    (1-t) r / (1-e). With mu1 and mu0 too: AIPW, the mean of mu1 - mu0 + t (r - mu1) / e -
    (1-t) (r - mu0) / (1-e), which is right if either e or mu is.

    Args:
        reward: (samples,), finite, r.
        treated: (samples,), bool, t.
        group_ids: (samples,), int, in [0, num_groups), e.g. the prompt.
        num_groups: number of groups, >= 0.
        propensity: (samples,), e = P(treated), in (0, 1). At 0 and 1 there is no sample to compare with.
        mu1: (samples,), finite, expected reward with the treatment. Both mu or none.
        mu0: (samples,), finite, expected reward without it.

    Returns:
        GroupEffect(effect, error).
    """
    op = "algorithms.group_effect"
    rows = Rows(check_vector(op, "reward", reward).shape[0], "reward", reward.device)
    check_vector(op, "treated", treated, rows, BOOL)
    check_vector(op, "group_ids", group_ids, rows, INTS)
    for name, value in (("propensity", propensity), ("mu1", mu1), ("mu0", mu0)):
        check_optional(op, name, value, rows)
    num_groups = check_integer(op, "num_groups", num_groups, 0)
    check_values(op, "group_ids", group_ids, 0, num_groups, open_high=True, always=True)
    check_values(op, "reward", reward, always=True)
    if propensity is not None:
        check_values(op, "propensity", propensity, 0.0, 1.0, open_low=True, open_high=True, always=True)
    for name, value in (("mu1", mu1), ("mu0", mu0)):
        if value is not None:
            check_values(op, name, value, always=True)
    if (mu1 is None) != (mu0 is None) or (mu1 is not None and propensity is None):
        raise refuse(op, "mu1 and mu0", "both given, with propensity", "a part of them", "AIPW needs all three.")
    r = reward.detach().double()
    if propensity is None:
        arms = [_mean_and_error(r, group_ids, num_groups, arm) for arm in (treated, ~treated)]
        (one, error_one), (zero, error_zero) = arms
        return GroupEffect(one - zero, (error_one**2 + error_zero**2).sqrt())
    e = propensity.detach().double()
    base, first, second = torch.zeros_like(r), r, r
    if mu1 is not None and mu0 is not None:
        a, b = mu1.detach().double(), mu0.detach().double()
        base, first, second = a - b, r - a, r - b
    term = base + torch.where(treated, first / e, -second / (1 - e))
    return GroupEffect(*_mean_and_error(term, group_ids, num_groups, None))


def _mean_and_error(
    x: torch.Tensor, ids: torch.Tensor, groups: int, keep: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (mean, standard error) per group. NaN where it is undefined."""
    n = segment_moments(x, ids, num_segments=groups, mask=keep)
    mean = n.sum / n.count
    centred = x - mean.nan_to_num(0.0)[ids.long()]
    square = segment_moments(centred, ids, num_segments=groups, mask=keep).sum_sq
    many = torch.where(n.count > 1, n.count.double(), torch.nan)
    return mean, (square / (many - 1) / many).sqrt()


@register(
    "principled_uplift_auc",
    kind="reward",
    system=SYSTEM,
    label="utility",
    source=SOURCE,
    summary="quality of predicted uplifts: treated-good and untreated-bad count the same",
    differs="Samples with equal uplift share their mean credit. The released code takes them in input "
    "order, which moves its own example from 0.48 to 1.00. area='zero' (default) starts the curve at "
    "the origin, like the chord; area='code' starts at its first rank, as the code does.",
)
def principled_uplift_auc(
    uplift: torch.Tensor, treated: torch.Tensor, outcome: torch.Tensor, *, area: str = "zero"
) -> torch.Tensor:
    """Return the area between curve and chord divided by the same area of the ideal order, (). Utility.

    1 is ideal, 0 random, -1 reversed. The curve at rank k, by falling uplift, is the sum over i <= k of +1 if treated
    and outcome agree, else -1.

    Args:
        uplift: (samples,), finite, predicted effect.
        treated: (samples,), bool.
        outcome: (samples,), bool.
        area: "zero": trapezoids from rank 0. "code": from rank 1, under a chord that is one rank shorter.

    Returns:
        float64. NaN if all samples agree or none does, because every order is then ideal.
    """
    op = "algorithms.principled_uplift_auc"
    rows = Rows(check_vector(op, "uplift", uplift).shape[0], "uplift", uplift.device)
    check_vector(op, "treated", treated, rows, BOOL)
    check_vector(op, "outcome", outcome, rows, BOOL)
    check_choice(op, "area", area, ("zero", "code"))
    check_values(op, "uplift", uplift, always=True)
    credit = torch.where(treated == outcome, 1.0, -1.0).double()
    # Equal uplifts get their mean credit, which is the mean over all orders of them.
    _, tie = uplift.detach().unique(return_inverse=True)
    count = torch.zeros(int(tie.max()) + 1 if tie.numel() else 0, dtype=torch.float64, device="cpu")
    count = count.to(credit.device)
    mean = count.index_add(0, tie, credit) / count.index_add(0, tie, torch.ones_like(credit))
    order = uplift.argsort(descending=True, stable=True)
    ideal = credit.sort(descending=True).values
    return _above_chord(mean[tie][order], area) / _above_chord(ideal, area)


def _above_chord(step: torch.Tensor, area: str) -> torch.Tensor:
    """Return the trapezoids under the curve minus the triangle under its chord."""
    curve = step.cumsum(0)
    if area == "zero":
        return curve.sum() - (curve[-1:].sum() * (curve.shape[0] + 1)) / 2
    return curve.sum() - (curve[:1].sum() + curve[-1:].sum() * curve.shape[0]) / 2


@register(
    "uplift_loss",
    kind="reward",
    system=SYSTEM,
    label="utility",
    source=SOURCE,
    summary="PUL: cross-entropy of sig(uplift) with the agreement of treatment and outcome",
    differs="Weighted by 0.5 / P(own treatment). Without the weight, its label is centred on the effect "
    "only at propensity 1/2. It is a ranking loss and does not calibrate uplifts in (-1, 1).",
)
def uplift_loss(
    uplift: torch.Tensor, treated: torch.Tensor, outcome: torch.Tensor, *, propensity: float | torch.Tensor = 0.5
) -> torch.Tensor:
    """Return w BCE(sig(uplift), t y + (1-t)(1-y)), (samples,), with w = 0.5 / e or 0.5 / (1-e). Utility.

    Args:
        uplift: (samples,), predicted effect; receives the gradient.
        treated: (samples,), bool, t.
        outcome: (samples,), bool, y.
        propensity: e = P(treated), in (0, 1), a number or (samples,).
    """
    op = "algorithms.uplift_loss"
    rows = Rows(check_vector(op, "uplift", uplift).shape[0], "uplift", uplift.device)
    check_vector(op, "treated", treated, rows, BOOL)
    check_vector(op, "outcome", outcome, rows, BOOL)
    if isinstance(propensity, torch.Tensor):
        check_vector(op, "propensity", propensity, rows)
        check_values(op, "propensity", propensity, 0.0, 1.0, open_low=True, open_high=True)
    else:
        check_number(op, "propensity", propensity, 0.0, 1.0, open_low=True, open_high=True)
    e = torch.as_tensor(propensity, dtype=uplift.dtype, device=uplift.device)
    weight = 0.5 / torch.where(treated, e, 1 - e)
    return -weight * logsigmoid(torch.where(treated == outcome, uplift, -uplift))
