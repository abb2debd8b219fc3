"""DCPO (distribution-centric): reweights positive responses towards a policy at another temperature."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.policy.shapes import PPOClip, Shape


@register(
    "dcpo_dist",
    system="DCPO (distribution-centric)",
    label="exact (released code)",
    source="arXiv 2601.12730; github.com/597358816/DCPO",
    summary="a REINFORCE term on positive responses, aimed at a hotter or cooler copy of the policy",
    differs=(
        "The name is dcpo_dist, because another DCPO clips by token priors. Without a positive response "
        "the code divides by 0; here alpha is 0. 'Entropy' is the code's sample estimate -mean(old_logp)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class DCPO(Standard):
    """A_t <- (1 - alpha) A_t + alpha b kappa_t, then PPO with dual clip.

        kappa_t = exp(old logp at temperature T - old logp at temperature 1)
        b = 1[R > threshold]
        alpha_1 = min(|H0 - H|, alpha_max) / mean(b),   alpha = alpha_1 / (1 + alpha_1)
        T = `hot` if H <= H0 else `cold`

    H is -mean(old_logp) of the previous batch, and 0 before the first batch.

    Args:
        target_entropy: H0. The paper's best value is 0.25; its script uses 0.5.
        alpha_max: bound on |H0 - H| in alpha_1.
        hot: temperature used while the entropy is at or below the target.
        cold: temperature used while it is above.
        threshold: a response is positive if its reward is above this value.

    Inputs: group_ids, and second_logp, the old policy at `temperature(state)`. The same read of the logits returns
    it: `token_stats(..., second_temperature=algorithm.temperature(state))`.
    State: H.
    Source: released code, exact.
    """

    shape: Shape = PPOClip(dual=3.0)
    target_entropy: float = 0.25
    alpha_max: float = 0.1
    hot: float = 1.2
    cold: float = 0.8
    threshold: float = 0.05

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("target_entropy", "alpha_max"):
            check_number(self._op, name, getattr(self, name), 0.0)
        for name in ("hot", "cold"):
            check_number(self._op, name, getattr(self, name), 0.0, open_low=True)

    def initial_state(self) -> State:
        """Return the base state, and H."""
        return super().initial_state() | {"entropy": 0.0}

    def temperature(self, state: State) -> float:
        """Return T, the temperature for the next batch's second_logp."""
        return self.hot if state["entropy"] <= self.target_entropy else self.cold

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with mixed advantages on every token."""
        batch.require(self._op, "second_logp")
        assert batch.second_logp is not None
        base = super().prepare(batch, state)
        positive = self.rewards(batch) > self.threshold
        counts = torch.tensor([0.0, batch.num_seqs], dtype=torch.float64, device=positive.device)
        counts[0] = positive.sum()
        some, seqs = batch.world.sum(counts)
        alpha_0 = min(abs(self.target_entropy - state["entropy"]), self.alpha_max)
        alpha_1 = torch.where(some > 0, alpha_0 * seqs / some.clamp(min=1), 0.0)
        alpha = (alpha_1 / (1 + alpha_1)).to(batch.old_logp.dtype)
        assert base.advantage is not None
        advantage = base.advantage
        if base.advantage_level == "sequence":
            advantage = batch.spread(advantage)
        kappa = (batch.second_logp - batch.old_logp).exp()
        bonus = batch.spread(positive.to(kappa.dtype)) * kappa
        mixed = Advantage((1 - alpha) * advantage + alpha * bonus, "token")
        return replace(base, advantage=mixed.value, advantage_level=mixed.level)

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state with H of this batch."""
        entropy = -float(batch.global_mean(batch.old_logp))
        return super().advance(state, batch) | {"entropy": entropy}
