"""The mirror-descent actor step, our counterpart of an ingredient of optimistic actor-critics."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import with_kl
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.policy.shapes import LinearRatio, Shape


@register(
    "mirror_descent",
    system="Actor-critics, optimal sample efficiency",
    label="analogue",
    source="inspired by arXiv 2505.03710",
    summary="-A r + KL(pi || pi_k) / eta: the multiplicative-weights step, on tokens",
    required=("eta",),
    differs=(
        "The paper is theory and defines no LLM loss: its optimism over a confidence set cannot be "
        "computed at this scale and is not here."
    ),
)
@dataclass(frozen=True, kw_only=True)
class MirrorDescent(Standard):
    """loss_t = -A r + (1 / eta) k2(logp, logp of pi_k), pi_k the policy at the start of the update.

    The exact step is pi_k+1 ~ pi_k exp(eta A). k2's gradient is that of KL(pi || pi_k). "Rare
    switching" is `batch.ref_logp`: where it is given, it is pi_k instead of old_logp, kept by the
    trainer until it decides to switch.

    Args:
        eta: step size > 0.

    State: none. Analogue: not the paper's algorithm.
    """

    shape: Shape = LinearRatio()
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "eta", self.eta, 0.0, open_low=True)

    def objective(self, batch: Batch, state: State) -> Plan:
        """The base's plan with the proximal term."""
        plan = super().objective(batch, state)
        anchor = plan.batch.old_logp if batch.ref_logp is None else batch.ref_logp
        kl = KL(estimator="k2", coef=1.0 / self.eta)
        return with_kl(plan, kl, anchor, torch.ones_like(anchor), self._op)
