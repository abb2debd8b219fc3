"""What may be laid over an objective: corrections of the rollout mismatch and token rules.

Each is a frozen record; `Standard.correction` takes one of the first, `Standard.rules` any of the
others, applied in order.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.selection import at_least_quantile, covariance, top_mask
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.policy.keep_rule import KeepRule
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.reference.segments import groups_of

UNBOUNDED = 1e6  # a clamp that no log-probability reaches


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Detached weights for the difference between rollout engine and trainer: TIS, MIS, IcePop, ...

    weight = f(exp(policy - sampler_logp)) multiplies the policy term; `tokfuse.offpolicy_weights`
    documents level, mode, low, high and the keep rules.

    Args:
        level, mode, low, high, keep_rules, normalize: as in `tokfuse.offpolicy_weights`.
        policy: "old" (the trainer's copy at the start of the update: three policies) or "current"
            (OPSM).
        dropped: what a dropped token does to the denominator of the loss. "leave": it no longer
            counts (verl multiplies the mask); "count": it counts with loss 0 (TRL).

    Raises:
        ValueError: unknown names here; the numbers are checked where they are used.
    """

    level: str = "token"
    mode: str = "truncate"
    low: float | None = None
    high: float | None = None
    keep_rules: tuple[KeepRule, ...] = ()
    normalize: str = "none"
    policy: str = "old"
    dropped: str = "count"

    def __post_init__(self) -> None:
        check_choice("Correction", "policy", self.policy, ("old", "current"))
        check_choice("Correction", "dropped", self.dropped, ("leave", "count"))

    def apply(self, plan: Plan, op: str) -> Plan:
        """The plan with its policy term weighted."""
        batch, current = plan.batch, self.policy == "current"
        batch.require(op, "sampler_logp", *(("logp",) if current else ()))
        negative_only = any(rule.negative_only for rule in self.keep_rules)
        out = offpolicy_weights(
            batch.logp if current else batch.old_logp,
            batch.sampler_logp,
            level=self.level,
            mode=self.mode,
            low=self.low,
            high=self.high,
            rules=self.keep_rules,
            normalize=self.normalize,
            cu_seqlens=batch.cu_seqlens,
            mask=plan.mask,
            advantage=token_advantage(plan) if negative_only else None,
        )
        if self.dropped == "leave":
            plan = replace(plan, mask=out.kept_mask)
        return plan.weigh(out.weight)


def token_advantage(plan: Plan) -> torch.Tensor:
    """(tokens,): the plan's advantage on every token."""
    if plan.advantage_level == "token":
        return plan.advantage
    return plan.batch.spread(plan.advantage)


class TokenRule(ABC):
    """A change of the plan that looks at single tokens."""

    needs: ClassVar[tuple[str, ...]] = ()

    @abstractmethod
    def apply(self, plan: Plan, state: State) -> Plan:
        """The changed plan."""


@dataclass(frozen=True, kw_only=True)
class HighEntropy(TokenRule):
    """Only tokens with entropy >= the (1 - fraction) quantile of all ranks' tokens learn.

    The denominator keeps all tokens. 80/20 (arXiv 2506.01939), as in TRL: exact.
    """

    needs: ClassVar[tuple[str, ...]] = ("entropy",)
    fraction: float = 0.2

    def __post_init__(self) -> None:
        check_number("HighEntropy", "fraction", self.fraction, 0.0, 1.0, open_low=True)

    def apply(self, plan: Plan, state: State) -> Plan:
        batch = plan.batch
        assert batch.entropy is not None
        keep = at_least_quantile(batch.entropy, 1.0 - self.fraction, plan_mask(plan), batch.world)
        return plan.weigh(keep)


@dataclass(frozen=True, kw_only=True)
class DampRare(TokenRule):
    """A times (alpha pi_old + 1 - alpha): rare tokens, whose gradients are large, count less.

    AR of arXiv 2505.12929: exact.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_number("DampRare", "alpha", self.alpha, 0.0, 1.0)

    def apply(self, plan: Plan, state: State) -> Plan:
        factor = self.alpha * plan.batch.old_logp.exp() + 1.0 - self.alpha
        return replace(plan, advantage=token_advantage(plan) * factor, advantage_level="token")


@dataclass(frozen=True, kw_only=True)
class ClipCov(TokenRule):
    """No loss for a few random tokens of high covariance between advantage and log-probability.

    Candidates: unclipped, low < cov < high. max(1, fraction N) of them, drawn without replacement,
    get weight 0; the denominator stays. N and the means are over all ranks (verl: micro-batch).
    The draw comes from a generator seeded with (seed, update, rank). Clip-Cov (arXiv 2505.22617):
    exact up to the generator.
    """

    needs: ClassVar[tuple[str, ...]] = ("logp",)
    fraction: float = 2e-4
    low: float = 1.0
    high: float = 5.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("ClipCov", "fraction", self.fraction, 0.0, 1.0, open_low=True)
        check_number("ClipCov", "high", self.high, self.low)

    def apply(self, plan: Plan, state: State) -> Plan:
        batch, mask = plan.batch, plan_mask(plan)
        assert batch.logp is not None
        advantage = token_advantage(plan)
        bounds = getattr(plan.objective.shape, "bounds", None)
        if bounds is None or plan.objective.level != "token":
            raise refuse(
                "ClipCov",
                "the objective",
                "a token-level clip (candidates are its unclipped tokens)",
                plan.objective,
                "Set shape=PPOClip().",
            )
        ratio = (batch.logp - batch.old_logp).exp()
        clipped = ((advantage > 0) & (ratio > bounds[1])) | ((advantage < 0) & (ratio < bounds[0]))
        cov = covariance(replace(batch, mask=mask), advantage, batch.logp)
        candidate = mask & ~clipped & (cov > self.low) & (cov < self.high)
        count = max(1, int(self.fraction * int(batch.world.sum(mask.sum()))))
        # Without the rank, every rank would draw the same numbers for its rows.
        generator = torch.Generator().manual_seed(
            (self.seed * 1_000_003 + int(state.get("updates", 0))) * 65_537 + batch.world.rank
        )
        draw = torch.rand(batch.num_tokens, generator=generator).to(mask.device)
        return plan.weigh(~top_mask(draw, count, candidate, batch.world))


@dataclass(frozen=True, kw_only=True)
class KLCov(TokenRule):
    """+ coef |logp - old_logp| on the max(1, fraction N) tokens of highest covariance.

    N is over all ranks. The gradient is 0 where the policies agree: on the first update of a batch
    it has no effect. KL-Cov (arXiv 2505.22617): exact; the paper's 7B runs take fraction=2e-3.
    """

    needs: ClassVar[tuple[str, ...]] = ("logp",)
    fraction: float = 2e-4
    coef: float = 1.0

    def __post_init__(self) -> None:
        check_number("KLCov", "fraction", self.fraction, 0.0, 1.0, open_low=True)
        check_number("KLCov", "coef", self.coef, 0.0)

    def apply(self, plan: Plan, state: State) -> Plan:
        batch, mask = plan.batch, plan_mask(plan)
        assert batch.logp is not None
        cov = covariance(replace(batch, mask=mask), token_advantage(plan), batch.logp)
        count = max(1, int(self.fraction * int(batch.world.sum(mask.sum()))))
        chosen = top_mask(cov, count, mask, batch.world)
        return with_kl(plan, KL(estimator="abs", coef=self.coef), batch.old_logp, chosen, "KLCov")


@dataclass(frozen=True, kw_only=True)
class PositiveLikelihood(TokenRule):
    """+ coef times the negative log-likelihood of good responses.

    "chosen" counts the tokens of the plan over all ranks: accumulate micro-batches with over="all".

    Args:
        coef: weight.
        of: "correct" (batch.correct; VAPO) or "group_best" (the highest reward of a group with
            spread, advantage above 0; our counterpart of A2PR's gate).
        over: what the term is averaged over: the "chosen" tokens, or "all" tokens.

    VAPO (arXiv 2504.05118), formula in NeMo-RL: exact. The term is a "k1" KL against
    log-probability 0, whose value and gradient are those of the likelihood; the metrics ref_kl_*
    describe that and mean nothing else. It takes the place of a KL term.
    """

    coef: float = 0.1
    of: str = "correct"
    over: str = "chosen"

    def __post_init__(self) -> None:
        check_number("PositiveLikelihood", "coef", self.coef, 0.0)
        check_choice("PositiveLikelihood", "of", self.of, ("correct", "group_best"))
        check_choice("PositiveLikelihood", "over", self.over, ("chosen", "all"))

    def apply(self, plan: Plan, state: State) -> Plan:
        batch, op = plan.batch, "PositiveLikelihood"
        if plan.objective.aggregation != "token_mean":
            raise refuse(
                op, "aggregation", "'token_mean'", repr(plan.objective.aggregation), "The term is a mean over tokens."
            )
        if self.of == "correct":
            batch.require(op, "correct")
            assert batch.correct is not None
            good = batch.correct
        else:
            batch.require(op, "group_ids")
            good = _group_best(batch) & (batch.sequence_mean(token_advantage(plan)) > 0)
        chosen = batch.spread(good) & plan_mask(plan)
        weight = chosen.to(batch.old_logp.dtype)
        if self.over == "chosen":
            all_tokens, some = batch.world.sum(torch.stack([plan.count(), chosen.sum().double()]))
            weight = weight * (all_tokens / some.clamp(min=1)).to(weight.dtype)
        kl = KL(estimator="k1", coef=-self.coef, clamp=UNBOUNDED)
        return with_kl(plan, kl, torch.zeros_like(batch.old_logp), weight, op)


def _group_best(batch: Batch) -> torch.Tensor:
    assert batch.group_ids is not None
    group = groups_of(batch.group_ids).member
    lowest = torch.full_like(batch.reward, -torch.inf)
    return batch.reward == lowest.scatter_reduce(0, group, batch.reward, "amax")[group]


def with_kl(plan: Plan, kl: KL, ref_logp: torch.Tensor, weight: torch.Tensor, op: str) -> Plan:
    """The plan with a KL term in the objective's one slot for it."""
    if plan.objective.kl is not None:
        raise refuse(
            op,
            "kl",
            "None (the objective has one KL term, and this rule uses it)",
            plan.objective.kl,
            "Drop one of the two.",
        )
    weight = weight.to(plan.batch.old_logp.dtype)
    return replace(plan, objective=replace(plan.objective, kl=kl), ref_logp=ref_logp, kl_weight=weight)


def plan_mask(plan: Plan) -> torch.Tensor:
    """(tokens,) bool: the tokens that count in the plan."""
    return plan.batch.valid if plan.mask is None else plan.mask
