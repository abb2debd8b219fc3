"""Entropy bonus with a weight per token: the analogue of CIP's causally weighted entropy."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import plan_mask
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number


@register(
    "cip_entropy",
    system="CIP",
    label="analogue",
    source="inspired by arXiv 2502.10097; github.com/HYeCao/CIP",
    summary="- lambda sum u H / sum u, with a causal weight u of each token",
    required=("entropy_coef",),
    differs=(
        "CIP is a soft actor-critic whose weights come from DirectLiNGAM on states and actions. Only "
        "the weighted entropy is implemented here; the weights are an input."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CIP(Standard):
    """loss = base - entropy_coef sum_t u_t H_t / sum_t u_t, with sums over the tokens of all ranks.

    `base` is the loss of `Standard` with the same options.

    Args:
        entropy_coef: lambda > 0.

    Inputs: causal_weight (u >= 0); u = 1 everywhere gives the plain entropy bonus.
    State: none.
    Analogue: this is not the paper's algorithm.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "entropy_coef", self.entropy_coef, 0.0, open_low=True)
        check_choice(self._op, "aggregation", self.aggregation, ("token_mean",))

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the base plan, with entropy weights whose mean is 1."""
        batch.require(self._op, "causal_weight")
        plan = super().objective(batch, state)
        assert batch.causal_weight is not None
        mean = replace(batch, mask=plan_mask(plan)).global_mean(batch.causal_weight)
        weight = batch.causal_weight / mean.to(batch.causal_weight.dtype)
        return replace(plan, entropy_weight=torch.where(mean > 0, weight, 0.0))
