"""LOPTI: each minibatch in two optimizer steps, the rare tokens first."""

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
    summary="two passes over a minibatch: tokens with pi_old < eta, then the others",
    differs="eta 0.4 is the value alone; with rules=(DampRare(alpha=0.3),) the paper takes 0.5.",
)
@dataclass(frozen=True, kw_only=True)
class LOPTI(Standard):
    """Two plans a minibatch over any objective of `Standard`, with complementary masks.

    The mask acts on policy term, KL and entropy alike; both divide by all tokens of the minibatch,
    so the two losses add up to the base's. The ratio of the second pass is taken after the first
    one's step.

    Args:
        eta: border of the old policy's probability.

    State: the base's. Source: released code, exact.
    """

    eta: float = 0.4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "eta", self.eta, 0.0, 1.0)
        # A mean over a sequence would be taken over its rare tokens alone.
        check_choice(self._op, "aggregation", self.aggregation, ("token_mean", "token_sum"))
        check_choice(self._op, "level", self.level, ("token",))

    def plans(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """The rare tokens, then the rest."""
        plan = self.objective(batch, state)
        mask, rare = plan_mask(plan), batch.old_logp.exp() < self.eta
        total = max(float(plan.count()), 1.0)
        return tuple(replace(plan, mask=mask & part, normalizer=total) for part in (rare, ~rare))
