"""LOPTI: two optimizer steps per minibatch, the first on the rare tokens."""

from dataclasses import dataclass, replace

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import plan_mask
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number


@register(
    "lopti",
    system="The standard family",
    label="exact",
    source="arXiv 2505.12929; github.com/zhyang2226/AR-Lopti",
    summary="two steps per minibatch: tokens with pi_old < eta, then the others",
    differs="eta=0.4 is for LOPTI alone. With rules=(DampRare(alpha=0.3),), the paper uses 0.5.",
)
@dataclass(frozen=True, kw_only=True)
class LOPTI(Standard):
    """Two plans per minibatch with complementary masks, for any objective of `Standard`.

    The mask applies to the policy term, the KL term and the entropy. Both plans divide by the number of all tokens
    of the minibatch, so their losses add up to the base loss. The ratio of the second plan is computed after the
    optimizer step of the first.

    Args:
        eta: a token is rare if the old policy's probability is below eta.

    State: the state of the base method.
    Source: released code, exact.
    """

    eta: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "eta", self.eta, 0.0, 1.0)
        # A mean over a sequence would be a mean over its rare tokens only.
        check_choice(self._op, "aggregation", self.aggregation, ("token_mean", "token_sum"))
        check_choice(self._op, "level", self.level, ("token",))

    def plans(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the plan of the rare tokens, then the plan of the others."""
        plan = self.objective(batch, state)
        mask, rare = plan_mask(plan), batch.old_logp.exp() < self.eta
        total = float(plan.count())
        return tuple(replace(plan, mask=mask & part, normalizer=total) for part in (rare, ~rare))
