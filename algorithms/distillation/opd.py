"""On-policy distillation: the teacher scores the student's own responses."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.base import Plan
from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.shapes import LinearRatio, Shape

ESTIMATORS = ("k1", "k2", "k3")
CLAMP = 20.0
"""Bound on |log-ratio| in an estimate, nats, as in `KL.clamp`."""


def reverse_kl_estimate(logp: torch.Tensor, teacher_logp: torch.Tensor, estimator: str) -> torch.Tensor:
    """Return an estimate of KL(student || teacher) from one sampled token, (tokens,) float64, detached.

    With k = logp - teacher_logp, bounded by 20: "k1" is k, "k2" is k^2 / 2, "k3" is exp(-k) - 1 + k.
    """
    k = (logp.detach().double() - teacher_logp.detach().double()).clamp(-CLAMP, CLAMP)
    if estimator == "k1":
        return k
    return k.square() / 2 if estimator == "k2" else torch.expm1(-k) + k


def sum_ahead(batch: DistillationBatch, x: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return the discounted sum of x over this and the later counting tokens of the sequence, (tokens,)."""
    return gae(x, torch.zeros_like(x), batch.cu_seqlens, gamma=gamma, mask=batch.mask)[0]


def sampled_token_plan(
    batch: DistillationBatch,
    advantage: torch.Tensor,
    shape: Shape,
    aggregation: str,
    *,
    mask: torch.Tensor | None = None,
    token_weight: torch.Tensor | None = None,
) -> Plan:
    """Return the plan of a policy-gradient step with an advantage per token, (tokens,)."""
    keep = batch.valid if mask is None else mask
    inner = batch.for_policy(keep)
    dtype = inner.old_logp.dtype
    return Plan(
        batch=inner,
        objective=Objective(shape=shape, aggregation=aggregation),
        advantage=torch.where(keep, advantage, 0.0).to(dtype),
        advantage_level="token",
        mask=keep,
        token_weight=None if token_weight is None else token_weight.to(dtype),
    )


@register(
    "opd",
    kind="distillation",
    system="On-policy distillation",
    label="exact (released code)",
    source="thinkingmachines.ai/blog/on-policy-distillation with tinker-cookbook; verl trainer/distillation; TRL "
    "DistillationTrainer (beta=1)",
    summary="reverse KL on the student's own responses: over the vocabulary, or of the sampled token as advantage",
    differs="form='policy_gradient' is the blog's: k1 of the policy that sampled, no discount, the ratio without a "
    "clip. verl estimates with the current policy (policy='current'), clips the ratio (shape=PPOClip(dual=3.0)) and "
    "bounds the estimate by 10 (bound=10.0). verl also accepts 'abs', and trains on k3 directly without a ratio; "
    "neither is here.",
)
@dataclass(frozen=True, kw_only=True)
class OnPolicy(Distillation):
    """Reverse KL(p || q) of student p and teacher q on responses that the student sampled. It has two forms.

        "full_vocabulary":  mean over tokens of sum_v p_v (log p_v - log q_v), differentiated
        "policy_gradient":  policy gradient with the advantage -(K_t + gamma K_t+1 + gamma^2 K_t+2 + ...)

    K_t estimates the KL from the sampled token, with k = log p(y_t) - log q(y_t): k1 is k, k2 is k^2 / 2, k3 is
    exp(-k) - 1 + k. With k1 and gamma 0, the expected gradient of the second form is the gradient of the first, which
    has no sampling noise. k2 and k3 are never negative: their advantage also discourages tokens that the teacher finds
    more likely, so their expected gradient differs from the gradient of the KL.

    Args:
        form: "full_vocabulary", for `distill_step`, or "policy_gradient", for `policy_step`.
        aggregation: "token_mean" or "seq_mean_token_mean".
        temperature: divides the logits of both models; only for the full vocabulary. None: 1.
        estimator: "k1", "k2" or "k3". None: "k1". This option and all below: only for the policy gradient.
        policy: whose log-probability is in k: "old" (that sampled the response) or "current". None: "old".
        bound: upper bound of |K_t|, > 0. None: none.
        gamma: discount of the estimates of later tokens, in [0, 1]. None: 0.
        shape: policy term, e.g. `PPOClip()`. None: `LinearRatio()`.

    Inputs: the full vocabulary needs none. The policy gradient needs old_logp and teacher_logp; policy "current" also
    logp.
    State: none.
    Source: the blog and its code, exact.
    """

    form: str = "full_vocabulary"
    aggregation: str = "token_mean"
    temperature: float | None = None
    estimator: str | None = None
    policy: str | None = None
    bound: float | None = None
    gamma: float | None = None
    shape: Shape | None = None

    def __post_init__(self) -> None:
        check_choice(self._op, "form", self.form, ("full_vocabulary", "policy_gradient"))
        self.check_aggregation(self.aggregation)
        full = self.form == "full_vocabulary"
        unused = ("estimator", "policy", "bound", "gamma", "shape") if full else ("temperature",)
        for name in unused:
            if getattr(self, name) is not None:
                other = "policy_gradient" if full else "full_vocabulary"
                raise refuse(
                    self._op,
                    name,
                    f"left out with form {self.form!r}",
                    getattr(self, name),
                    f"It belongs to form {other!r}.",
                )
        if self.temperature is not None:
            self.check_temperature(self.temperature)
        if self.estimator is not None:
            check_choice(self._op, "estimator", self.estimator, ESTIMATORS)
        if self.policy is not None:
            check_choice(self._op, "policy", self.policy, ("old", "current"))
        if self.bound is not None:
            check_number(self._op, "bound", self.bound, 0.0, open_low=True)
        if self.gamma is not None:
            check_number(self._op, "gamma", self.gamma, 0.0, 1.0)
        if self.shape is not None and (not isinstance(self.shape, Shape) or self.shape.needs_signal):
            raise refuse(self._op, "shape", "a Shape without a signal", self.shape, "Pass, for example, PPOClip().")

    def objective(self, batch: DistillationBatch) -> DistillationPlan | Plan:
        """Return the plan of a batch: for `distill_step`, or in form "policy_gradient" for `policy_step`."""
        self.check_contexts(batch)
        if self.form == "full_vocabulary":
            temperature = 1.0 if self.temperature is None else self.temperature
            return mean_plan(batch, {"kind": "kl_reverse"}, self.aggregation, temperature=temperature)
        return sampled_token_plan(batch, self.advantage(batch), self.shape or LinearRatio(), self.aggregation)

    def advantage(self, batch: DistillationBatch) -> torch.Tensor:
        """Return the advantages of form "policy_gradient", (tokens,); 0 where the mask is False."""
        current = self.policy == "current"
        batch.require(self._op, "old_logp", "teacher_logp", *(("logp",) if current else ()))
        logp = batch.logp if current else batch.old_logp
        assert logp is not None and batch.teacher_logp is not None
        kl = reverse_kl_estimate(logp, batch.teacher_logp, self.estimator or "k1")
        if self.bound is not None:
            kl = kl.clamp(-self.bound, self.bound)
        reward = torch.where(batch.valid, -kl, 0.0)
        return sum_ahead(batch, reward.to(logp.dtype), self.gamma) if self.gamma else reward
