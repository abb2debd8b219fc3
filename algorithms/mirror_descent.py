"""The mirror-descent actor step: the analogue of one part of optimistic actor-critics."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import with_anchor
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.policy.shapes import LinearRatio, Shape


@register(
    "mirror_descent",
    system="Actor-critics, optimal sample efficiency",
    label="analogue",
    source="inspired by arXiv 2505.03710",
    summary="-A r + KL(pi || pi_k) / eta: the multiplicative-weights step on tokens",
    required=("eta",),
    differs=(
        "The paper is theory and defines no LLM loss. Its optimism over a confidence set cannot be "
        "computed at this scale and is left out."
    ),
)
@dataclass(frozen=True, kw_only=True)
class MirrorDescent(Standard):
    """loss_t = -A r + (1 / eta) r k3(logp, logp of pi_k), where pi_k is the policy at the start of the update.

    The exact step is pi_k+1 ~ pi_k exp(eta A). The tokens are samples of pi_k, so the expected gradient of r k3 is the
    gradient of KL(pi || pi_k) wherever pi has moved to; k2 has it only at pi = pi_k.

    For "rare switching", set `batch.ref_logp`. It is then pi_k, in place of old_logp, and the trainer decides when
    to switch it. With `kl`, ref_logp is the reference of that KL, and pi_k is old_logp.

    Args:
        eta: step size > 0.

    State: none.
    Analogue: this is not the paper's algorithm.
    """

    shape: Shape = LinearRatio()
    eta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "eta", self.eta, 0.0, open_low=True)

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the base plan with the proximal term."""
        plan = super().objective(batch, state)
        anchor = plan.batch.old_logp if batch.ref_logp is None or self.kl is not None else batch.ref_logp
        kl = KL(estimator="ratio_k3", coef=1.0 / self.eta)
        return with_anchor(plan, kl, anchor, torch.ones_like(anchor), self._op)
