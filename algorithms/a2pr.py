"""Likelihood term on the best responses of each group, gated by the advantage: the analogue of A2PR."""

from dataclasses import dataclass

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import PositiveLikelihood
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number


@register(
    "a2pr_nll",
    system="A2PR",
    label="analogue",
    source="inspired by arXiv 2405.19909; github.com/ltlhuuu/A2PR",
    summary="+ mu (-logp) on the best response of a group if its advantage is positive",
    required=("mu",),
    differs=(
        "A2PR clones the better of the data set's action and a VAE's action, in continuous control. "
        "Only the gate is implemented here. mu has no published value and must be given."
    ),
)
@dataclass(frozen=True, kw_only=True)
class A2PR(Standard):
    """loss_t = base + mu 1[response is the group's best and A > 0] (-logp), averaged over all tokens.

    `base` is the loss of `Standard` with the same options.

    Args:
        mu: weight of the likelihood term, >= 0.

    Inputs: group_ids.
    State: none.
    Analogue: this is not the paper's algorithm.
    """

    mu: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "mu", self.mu, 0.0)

    @property
    def _gate(self) -> PositiveLikelihood:
        return PositiveLikelihood(coef=self.mu, of="group_best", over="all")

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the prepared batch of the base, with the best responses of each group marked."""
        return self._gate.prepare(super().prepare(batch, state))

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the base plan with the likelihood term."""
        return self._gate.apply(super().objective(batch, state), state)
