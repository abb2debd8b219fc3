"""Kernel causal balancing: weights of observed samples that match the features of the population."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_number, check_values, check_vector
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.kernel_balancing"


@register(
    "kernel_balancing",
    kind="reward",
    system="Kernel causal balancing",
    label="exact (released code)",
    required=("gamma", "slack"),
    source="arXiv 2404.19596; github.com/haoxuanli-pku/ICLR24-Kernel-Balancing",
    summary="entropy of the weights plus a hinge for each unbalanced feature",
    differs="One hinge per anchor. The released code sums the gaps before the hinge, so gaps of opposite "
    "sign cancel. The caller passes the features (kernel values at anchors). The weighted and "
    "doubly robust losses are `causalrm` with weight (all / observed) w.",
)
@dataclass(frozen=True, kw_only=True)
class BalancePenalty:
    """penalty(w) = mean(w log w) + gamma sum_j max(0, |m_j - mean_i w_i phi_ij| - slack). Exact.

    Args:
        gamma: weight of the balance, > 0. The published runs tune it.
        slack: gap that is not penalised, >= 0.
    """

    gamma: float
    slack: float

    def __post_init__(self) -> None:
        check_number(OP, "gamma", self.gamma, 0.0, open_low=True)
        check_number(OP, "slack", self.slack, 0.0)

    def gaps(self, weight: torch.Tensor, features: torch.Tensor, target_mean: torch.Tensor) -> torch.Tensor:
        """Return m_j - mean_i w_i phi_ij, (anchors,). Arguments as for `loss`."""
        samples = check_vector(OP, "weight", weight).shape[0]
        check_values(OP, "weight", weight.detach(), 0.0, open_low=True)
        if features.dim() != 2 or features.shape[0] != samples:
            raise refuse(
                OP,
                "features",
                f"of shape ({samples}, anchors) to match weight",
                tuple(features.shape),
                "Pass one row per observed sample.",
            )
        if target_mean.shape != features.shape[1:]:
            raise refuse(
                OP,
                "target_mean",
                f"of shape {tuple(features.shape[1:])} to match features",
                tuple(target_mean.shape),
                "Average over all samples.",
            )
        return target_mean - (weight @ features) / max(1, samples)

    def loss(self, weight: torch.Tensor, features: torch.Tensor, target_mean: torch.Tensor) -> torch.Tensor:
        """Return the penalty, (), differentiable in the weights.

        Args:
            weight: (samples,) > 0, weights of the observed samples, 1 on average.
            features: (samples, anchors), phi of the observed samples, e.g. k(x_i, x_j).
            target_mean: (anchors,), mean of phi over all samples, observed or not.
        """
        gap = self.gaps(weight, features, target_mean)
        entropy = torch.xlogy(weight, weight).sum() / max(1, weight.shape[0])
        return entropy + self.gamma * torch.relu(gap.abs() - self.slack).sum()
