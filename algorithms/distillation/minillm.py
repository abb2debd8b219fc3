"""MiniLLM: reverse KL of whole responses, by policy gradient on a mixture of student and teacher."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import whiten_over_ranks
from tokfuse.algorithms.base import Plan
from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.distillation.opd import sampled_token_plan, sum_ahead
from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_flag, check_number
from tokfuse.runtime.policy.shapes import PPOClip


@register(
    "minillm",
    kind="distillation",
    system="MiniLLM",
    label="exact (released code)",
    source="arXiv 2306.08543; github.com/microsoft/LMOps minillm (sampler.py, losses.py, scripts)",
    summary="length-normalised reward to go of the log-ratio on teacher-mixed samples; plus the full-vocabulary KL",
    differs="The defaults come from the released code and scripts. The paper has no discount (gamma=1), no "
    "whitening and no scaled reward; its long-term reward starts at the next token, and its single-step term has the "
    "weight p / p_mix. The code includes the token's own reward, and weights nothing in that term. The code's whitening"
    " counts padding; here only counting tokens count. The code's pre-training loss is the caller's.",
)
@dataclass(frozen=True, kw_only=True)
class MiniLLM(Distillation):
    """Policy gradient of KL(p || q) over responses drawn from the mixture of student p and teacher q.

        m_t = (1 - alpha) p_old(y_t) + alpha q(y_t)                    `mixture` also mixes whole distributions
        r_t = clip((log q(y_t) - log p_old(y_t)) / reward_scale, -reward_clip, reward_clip)
        R_t = sum over s >= t of gamma^(s - t) r_s, divided by the number of tokens from t on
        A_t = (R_t - mean) / sqrt(var + 1e-8)                          over all tokens of the batch
        loss = mean_t max(-A_t w_t, -A_t clip(w_t, 1 - clip, 1 + clip)) + mean_t KL(p || q)_t,   w_t = p(y_t) / m_t

    `objective` is the plan of the first mean, for `policy_step`. `single_step` is the plan of the second one, over the
    whole vocabulary, for `distill_step`. Add the two losses.

    Args:
        alpha: weight of the teacher in the distribution that responses are drawn from, in [0, 1). 0: the student's own.
        gamma: discount, in [0, 1].
        length_normalised: divide R_t by the number of tokens from t on.
        reward_scale: divisor of the rewards, > 0.
        reward_clip: bound of the scaled rewards, > 0. None: none.
        whiten: subtract the mean of the advantages over all tokens, and divide by their deviation.
        clip: width of the clip, >= 0.

    Inputs: old_logp (of the student, not of the mixture) and teacher_logp of the sampled tokens.
    State: none.
    Source: the released code, exact.
    """

    alpha: float = 0.2
    gamma: float = 0.95
    length_normalised: bool = True
    reward_scale: float = 0.5
    reward_clip: float | None = 100.0
    whiten: bool = True
    clip: float = 0.2

    def __post_init__(self) -> None:
        check_number(self._op, "alpha", self.alpha, 0.0, 1.0, open_high=True)
        check_number(self._op, "gamma", self.gamma, 0.0, 1.0)
        check_flag(self._op, "length_normalised", self.length_normalised)
        check_number(self._op, "reward_scale", self.reward_scale, 0.0, open_low=True)
        if self.reward_clip is not None:
            check_number(self._op, "reward_clip", self.reward_clip, 0.0, open_low=True)
        check_flag(self._op, "whiten", self.whiten)
        check_number(self._op, "clip", self.clip, 0.0, 1.0)

    def mixture(self, logp: torch.Tensor, teacher_logp: torch.Tensor) -> torch.Tensor:
        """Return log((1 - alpha) p + alpha q), elementwise: the sampling distribution, or its value at a token."""
        if self.alpha == 0.0:
            return logp
        one = torch.ones((), dtype=torch.float64, device=logp.device)
        own, other = logp.double() + (one - self.alpha).log(), teacher_logp.double() + (one * self.alpha).log()
        return torch.logaddexp(own, other).to(logp.dtype)

    def objective(self, batch: DistillationBatch) -> Plan:
        """Return the plan of the policy gradient, for `policy_step`."""
        self.check_contexts(batch)
        batch.require(self._op, "old_logp", "teacher_logp")
        old, teacher = batch.old_logp, batch.teacher_logp
        assert old is not None and teacher is not None
        drawn = replace(batch, old_logp=self.mixture(old, teacher))
        return sampled_token_plan(drawn, self.advantage(batch), PPOClip(low=self.clip, high=self.clip), "token_mean")

    def single_step(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of the full-vocabulary reverse KL, for `distill_step`."""
        self.check_contexts(batch)
        return mean_plan(batch, {"kind": "kl_reverse"}, "token_mean")

    def advantage(self, batch: DistillationBatch) -> torch.Tensor:
        """Return the advantages, (tokens,); 0 where the mask is False."""
        batch.require(self._op, "old_logp", "teacher_logp")
        assert batch.old_logp is not None and batch.teacher_logp is not None
        keep = batch.valid
        reward = (batch.teacher_logp.double() - batch.old_logp.double()) / self.reward_scale
        if self.reward_clip is not None:
            reward = reward.clamp(-self.reward_clip, self.reward_clip)
        reward = torch.where(keep, reward, 0.0).to(batch.old_logp.dtype)
        to_go = sum_ahead(batch, reward, self.gamma)
        if self.length_normalised:
            to_go = to_go / sum_ahead(batch, keep.to(reward.dtype), 1.0).clamp(min=1.0)
        return whiten_over_ranks(batch.for_policy(keep), to_go) if self.whiten else torch.where(keep, to_go, 0.0)
