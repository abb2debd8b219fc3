"""DCPO (distribution-centric): positives reweighted towards a temperature-shifted policy."""

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
    label="exact",
    source="arXiv 2601.12730; github.com/597358816/DCPO",
    summary="a REINFORCE term on positives aimed at a hotter or cooler copy of the policy",
    differs=(
        "Named dcpo_dist: another DCPO clips by token priors. Without a positive the code divides "
        "by 0; here alpha is 0. 'Entropy' is the code's sample estimate -mean(old_logp)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class DCPO(Standard):
    """A_t <- (1 - alpha) A_t + alpha b kappa_t, then PPO with dual clip.

    kappa_t = exp(old logp at T - old logp at 1), b = 1[R > threshold],
    alpha_1 = min(|H0 - H|, alpha_max) / mean(b), alpha = alpha_1 / (1 + alpha_1),
    T = `hot` if H <= H0 else `cold`; H the previous batch's -mean(old_logp), 0 before the first.

    Args:
        target_entropy: H0; 0.25 is the paper's best, 0.5 its script's.
        alpha_max: 0.1. hot, cold: 1.2 and 0.8. threshold: 0.05.

    Inputs: group_ids, second_logp = old policy at `temperature(state)`, from the same read:
    `token_stats(..., second_temperature=algorithm.temperature(state))`. State: H. Source: released
    code, exact.
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
        """The base's, and H."""
        return super().initial_state() | {"entropy": 0.0}

    def temperature(self, state: State) -> float:
        """T, at which the next batch's second_logp is to be taken."""
        return self.hot if state["entropy"] <= self.target_entropy else self.cold

    def prepare(self, batch: Batch, state: State) -> Batch:
        """With the mixed advantages on every token."""
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
        """H of the batch."""
        entropy = -float(batch.global_mean(batch.old_logp))
        return super().advance(state, batch) | {"entropy": entropy}
