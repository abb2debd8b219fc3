"""PARL: the preference loss of a reward, including its effect on the policy that it will train."""

from dataclasses import dataclass

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    FLOATS,
    Rows,
    check_choice,
    check_normalizer,
    check_number,
    check_values,
    check_vector,
)

OP = "algorithms.parl"


@register(
    "parl",
    kind="reward",
    system="PARL",
    label="analogue",
    source="inspired by arXiv 2308.02585",
    summary="Bradley-Terry, plus the effect of the reward on the pairs that it is judged on",
    differs="PARL differentiates through the lower level with the policy's Hessian. Here the lower level "
    "is KL-regularised, pi* = ref exp(r / beta) / Z, and needs no Hessian. The baseline is an addition.",
)
@dataclass(frozen=True, kw_only=True)
class PARL:
    """Loss whose gradient is -d/dnu E_{pairs ~ pi*_nu}[U_nu]. Analogue.

    U = y log sig(r_0 - r_1) + (1 - y) log sig(r_1 - r_0). With pi* = ref exp(r_nu / beta) / Z,
    d log pi*(y) / d nu = (d r(y) - E_{pi*} d r) / beta. Therefore
    loss = -mean[U + stopgrad(U - b) (r_0 + r_1 - 2 E r) / beta].

    Args:
        beta: temperature of the regularised policy, > 0.
        baseline: b. "mean": the mean of U over the other pairs of the batch (leave-one-out, unbiased). "none": 0.
    """

    beta: float = 0.1
    baseline: str = "mean"

    def __post_init__(self) -> None:
        check_number(OP, "beta", self.beta, 0.0, open_low=True)
        check_choice(OP, "baseline", self.baseline, ("mean", "none"))

    def coefficient(self, utility: torch.Tensor) -> torch.Tensor:
        """Return (U - b) / beta, (pairs,), detached: the REINFORCE coefficient of the reward gradient."""
        u, pairs = utility.detach(), utility.shape[0]
        if self.baseline == "mean" and pairs > 1:
            u = u - (u.sum() - u) / (pairs - 1)
        return u / self.beta

    def loss(
        self,
        first: torch.Tensor,
        second: torch.Tensor,
        label: torch.Tensor,
        expected: torch.Tensor,
        *,
        normalizer: float | torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the loss, (), differentiable in all rewards.

        Args:
            first, second: (pairs,), rewards of two responses sampled from the current policy.
            label: (pairs,), probability in [0, 1] that the first is preferred.
            expected: (pairs,), mean reward of further samples of the same prompt. They must be independent of the
                pair, otherwise the estimate is biased.
            normalizer: number of pairs > 0 over micro-batches and ranks. None: of this call.
        """
        pairs = check_vector(OP, "first", first).shape[0]
        rows = Rows(pairs, "first", first.device)
        for name, value in (("second", second), ("label", label), ("expected", expected)):
            check_vector(OP, name, value, rows, FLOATS)
        check_values(OP, "label", label.detach(), 0.0, 1.0)
        check_normalizer(OP, normalizer)
        d = first - second
        utility = label * logsigmoid(d) + (1 - label) * logsigmoid(-d)
        through = self.coefficient(utility) * (first + second - 2 * expected)
        value = utility.sum() + (through - through.detach()).sum()
        return -value / (max(1, pairs) if normalizer is None else normalizer)
