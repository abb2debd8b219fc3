"""R2VPO: instead of a clip, a Lagrange multiplier bounds the variance of the ratio."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.base import Plan, State, require_metrics
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.shapes import Quadratic, Shape


@register(
    "r2vpo",
    system="R2VPO",
    label="recon",
    source="arXiv 2601.03320, v2 2605.26784; abstracts and third-party code",
    summary="-A r + lam (r - 1)^2, with lam by dual ascent on mean (r - 1)^2 <= delta",
    required=("delta", "step_size", "penalty"),
    differs=(
        "Assumed: no factor 1/2, token ratios. delta, step_size and the first penalty are required, "
        "because the paper's values were not found (third-party code fixes the penalty at 0.04)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class R2VPO(Standard):
    """loss_t = -A r + lam (r - 1)^2.

    After each update: lam <- max(0, lam + step_size (mean (r - 1)^2 - delta)).
    Under the behaviour policy E[r] = 1, so (r - 1)^2 is a sample of the variance and is not centred.
    The gradient weight falls linearly in r - 1 and changes sign at r = 1 + A / (2 lam).

    Args:
        delta: bound on the mean of (r - 1)^2.
        step_size: step size of the dual ascent; 0 keeps lam fixed.
        penalty: lam at the start.

    Inputs: for replayed data, `old_logp` holds the log-probabilities under the policy that generated it.
    State: lam.
    Source: reconstructed.
    """

    delta: float = 0.0
    step_size: float = 0.0
    penalty: float = 0.0
    shape: Shape = Quadratic(penalty=0.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("delta", "step_size", "penalty"):
            check_number(self._op, name, getattr(self, name), 0.0)
        if self.shape != Quadratic(penalty=0.0):
            raise refuse(
                self._op, "shape", "left out (it is Quadratic, with lam from the state)", self.shape, "Set penalty."
            )

    def initial_state(self) -> State:
        """Return the base state, and lam."""
        return super().initial_state() | {"penalty": self.penalty}

    def spec(self, state: State) -> Objective:
        """Return the base objective with lam of the state."""
        return replace(super().spec(state), shape=Quadratic(penalty=state["penalty"]))

    def measure(self, plan: Plan, logp: torch.Tensor, entropy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the sum of (r - 1)^2 over the counting tokens, and their number."""
        keep = plan.batch.valid if plan.mask is None else plan.mask
        ratio = (logp.detach().double() - plan.batch.old_logp.double()).clamp(-20, 20).exp()
        square = torch.where(keep, (ratio - 1) ** 2, 0.0).sum()
        return super().measure(plan, logp, entropy) | {"square": square, "tokens": keep.sum().double()}

    def update(self, state: State, metrics: Mapping[str, torch.Tensor]) -> State:
        """Return the state after one dual step. An update without tokens does not change lam."""
        require_metrics(self._op, metrics, "square", "tokens")
        state = super().update(state, metrics)
        tokens = float(metrics["tokens"])
        if tokens > 0:
            excess = float(metrics["square"]) / tokens - self.delta
            state["penalty"] = max(0.0, state["penalty"] + self.step_size * excess)
        return state
