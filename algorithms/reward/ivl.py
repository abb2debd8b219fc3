"""IVL: uses augmentations that cannot change the outcome as instruments against hidden confounding."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    INTS,
    Rows,
    check_integer,
    check_normalizer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.ops.segment_moments import segment_moments

OP = "algorithms.ivl"


@register(
    "ivl",
    kind="reward",
    system="Outcome-invariant DA / IVL",
    label="exact (released code)",
    required=("alpha",),
    source="arXiv 2510.25128; github.com/uzairakbar/causal-data-augmentation (ivl.py)",
    summary="squared group means of the residuals plus alpha times squared residuals",
    differs="The quadratic form r'Pr. The released nonlinear code averages P + alpha I over "
    "*squared* residuals. With one-hot groups this is plain squared error times 1 + alpha, so no "
    "instrument is left. Only squared loss is defined.",
)
@dataclass(frozen=True, kw_only=True)
class IVL:
    """loss = [sum_g n_g mean_g(r)^2 + alpha sum r^2] / normalizer = r'(P + alpha I) r / normalizer, exact.

    P replaces a residual by the mean of its group. A group is an *augmentation* (paraphrase, format, padding), not a
    prompt.

    Args:
        alpha: weight of the ordinary risk, >= 0.
    """

    alpha: float

    def __post_init__(self) -> None:
        check_number(OP, "alpha", self.alpha, 0.0)

    def loss(
        self,
        residual: torch.Tensor,
        group_ids: torch.Tensor,
        num_groups: int,
        *,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, (), differentiable in the residuals.

        Args:
            residual: (samples,), outcome minus prediction on the augmented input.
            group_ids: (samples,), int, the augmentation of each sample, in [0, num_groups).
            num_groups: number of augmentations, >= 0.
            normalizer: > 0, e.g. the number of samples of all micro-batches; group means are over this call. None: the
                number of samples of this call.
        """
        samples = check_vector(OP, "residual", residual).shape[0]
        check_vector(OP, "group_ids", group_ids, Rows(samples, "residual", residual.device), INTS)
        num_groups = check_integer(OP, "num_groups", num_groups, 0)
        check_values(OP, "group_ids", group_ids, 0, num_groups, open_high=True)
        check_normalizer(OP, normalizer)
        moments = segment_moments(residual, group_ids, num_segments=num_groups)
        projected = (moments.sum**2 / moments.count.clamp(min=1)).sum()
        total = projected + self.alpha * (residual * residual).sum()
        return total / (max(1, samples) if normalizer is None else normalizer)
