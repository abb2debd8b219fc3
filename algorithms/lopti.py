"""LOPTI: updates on the rare tokens first, then on the others."""

from dataclasses import dataclass, replace

from tokfuse.algorithms.base import Algorithm, Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import plan_mask
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number


@register(
    "lopti",
    system="The standard family",
    label="exact (released code)",
    source="arXiv 2505.12929; github.com/zhyang2226/AR-Lopti ray_trainer.py",
    summary="updates on the tokens with pi_old < eta, then on the others",
    differs=(
        "form='code' (default) goes over all minibatches with the rare tokens, then over all with the others, as "
        "the released trainer does. form='minibatch' takes both steps in each minibatch; with one minibatch the two "
        "agree. eta=0.4 is for LOPTI alone; with rules=(DampRare(alpha=0.3),), the authors use 0.5."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LOPTI(Standard):
    """Two updates with complementary masks, for any objective of `Standard`.

    The mask applies to the policy term, the KL term and the entropy. Both updates divide by the number of all tokens
    of the minibatch, so their losses add up to the base loss. The ratios of the second one are computed after the
    optimizer steps of the first.

    Args:
        eta: a token is rare if the old policy's probability is below eta.
        form: "code": two passes over all minibatches (`passes`), the first on the rare tokens. "minibatch": both
            updates in every minibatch.
        tokens: "all"; or "rare" or "others", the pass of form "code" that this object trains (`passes` sets it).

    State: the state of the base method.
    Source: released code, exact.
    """

    eta: float = 0.4
    form: str = "code"
    tokens: str = "all"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "eta", self.eta, 0.0, 1.0)
        check_choice(self._op, "form", self.form, ("code", "minibatch"))
        check_choice(self._op, "tokens", self.tokens, ("all", "rare", "others"))
        # A mean over a sequence would be a mean over its rare tokens only.
        check_choice(self._op, "aggregation", self.aggregation, ("token_mean", "token_sum"))
        check_choice(self._op, "level", self.level, ("token",))

    def passes(self) -> tuple[Algorithm, ...]:
        """Return the method of the pass on the rare tokens, then of the pass on the others, with form "code"."""
        if self.form == "minibatch" or self.tokens != "all":
            return (self,)
        return replace(self, tokens="rare"), replace(self, tokens="others")

    def plans(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the plan of the rare tokens, then the plan of the others; in a pass, only the plan of its tokens."""
        plan = self.objective(batch, state)
        mask, rare = plan_mask(plan), batch.old_logp.exp() < self.eta
        total = float(plan.count())
        parts = {"rare": (rare,), "others": (~rare,), "all": (rare, ~rare)}[self.tokens]
        return tuple(replace(plan, mask=mask & part, normalizer=total) for part in parts)
