"""Modifications of an objective: corrections of the rollout mismatch, and token rules.

Each one is a frozen dataclass. `Standard.correction` takes one `Correction`. `Standard.rules` takes any number of
token rules and applies them in order.
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

UNBOUNDED = 1e6  # no log-probability reaches this clamp


@dataclass(frozen=True, kw_only=True)
class Correction:
    """Detached weights that correct the mismatch between rollout engine and trainer: TIS, MIS, IcePop, ...

    The policy term is multiplied by f(w), with the ratio w = exp(logp of `policy` - sampler_logp).
    `tokfuse.offpolicy_weights` defines f and the ratio at each level.

    Args:
        level: unit of the ratio. "token"; "sequence": exp of the summed log-ratio; "geometric": exp of the mean
            log-ratio.
        mode: f. "truncate": min(max(w, low), high). "mask": w inside [low, high], else 0 and dropped. "ips": w.
            "keep": 1, so that only keep_rules act. The others are listed in `tokfuse.offpolicy_weights`.
        low, high: absolute bounds on the ratio. "truncate" and "mask" need at least one, "switch" needs high.
        keep_rules: `KeepRule`s. A token that fails one of them is dropped.
        normalize: "none"; "batch": divide by the mean weight over all ranks of the batch that the plan is made of: over
            the kept tokens, or at the levels of sequences over the sequences with a kept token.
        policy: numerator of the ratio. "old": the trainer's policy at the start of the update, which makes
            three policies. "current": the current policy (OPSM).
        dropped: effect of a dropped token on the denominator of the loss. "leave": the token no longer counts
            (verl multiplies the mask). "count": it counts with loss 0 (TRL).

    Raises:
        ValueError: an unknown `policy`, `dropped` or `normalize`. `tokfuse.offpolicy_weights` checks the other fields.
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
        check_choice("Correction", "normalize", self.normalize, ("none", "batch"))

    def apply(self, plan: Plan, op: str) -> Plan:
        """Return the plan with a weighted policy term."""
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
            cu_seqlens=batch.cu_seqlens,
            mask=plan.mask,
            advantage=token_advantage(plan) if negative_only else None,
        )
        weight, kept = out.weight, out.kept_mask
        if self.normalize == "batch":
            units, of_kept = kept, replace(batch, mask=kept)
            value = weight.double()
            if self.level != "token":
                units, value = of_kept.lengths > 0, of_kept.sequence_mean(weight)
            total, number = batch.world.sum(torch.stack([torch.where(units, value, 0.0).sum(), units.sum().double()]))
            # A mean of 0 has no weight above 0, and no unit gives 0 / 0.
            weight = torch.where(kept & (total != 0), weight / (total / number), 0.0).to(weight.dtype)
        if self.dropped == "leave":
            plan = replace(plan, mask=kept)
        return plan.weigh(weight)


def token_advantage(plan: Plan) -> torch.Tensor:
    """Return the plan's advantage of every token, (tokens,)."""
    if plan.advantage_level == "token":
        return plan.advantage
    return plan.batch.spread(plan.advantage)


class TokenRule(ABC):
    """A modification of the plan that depends on single tokens."""

    needs: ClassVar[tuple[str, ...]] = ()

    def prepare(self, batch: Batch) -> Batch:
        """Return the prepared rollout batch with what the rule decides about whole groups.

        A minibatch may hold only a part of a group, so `apply` cannot decide it.
        """
        return batch

    @abstractmethod
    def apply(self, plan: Plan, state: State) -> Plan:
        """Return the modified plan."""


@dataclass(frozen=True, kw_only=True)
class HighEntropy(TokenRule):
    """Trains only on tokens with entropy >= the (1 - fraction) quantile over the tokens of all ranks.

    The denominator still counts all tokens.

    Args:
        fraction: share of tokens that train.

    Source: 80/20 (arXiv 2506.01939), as in TRL: exact.
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
    """Multiplies A by (alpha pi_old + 1 - alpha): rare tokens, which have large gradients, count less.

    Args:
        alpha: strength in [0, 1]; 0 has no effect.

    Source: AR (arXiv 2505.12929): exact.
    """

    alpha: float = 0.2

    def __post_init__(self) -> None:
        check_number("DampRare", "alpha", self.alpha, 0.0, 1.0)

    def apply(self, plan: Plan, state: State) -> Plan:
        factor = self.alpha * plan.batch.old_logp.exp() + 1.0 - self.alpha
        return replace(plan, advantage=token_advantage(plan) * factor, advantage_level="token")


@dataclass(frozen=True, kw_only=True)
class ClipCov(TokenRule):
    """Sets the loss of a few random tokens with high covariance of advantage and log-probability to 0.

    Candidates are unclipped tokens with low < cov < high. max(1, fraction N) of them are drawn without
    replacement and get weight 0. The denominator does not change. N and the means are taken over all ranks
    (verl: over the micro-batch). The generator is seeded with (seed, update), and the ranks share one draw, in rank
    order: the tokens do not depend on the number of ranks.

    Args:
        fraction: share of the N counting tokens that is drawn.
        low, high: bounds on the covariance of a candidate.
        seed: seed of the draw.

    Source: Clip-Cov (arXiv 2505.22617): exact, apart from the random generator.
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
        sizes = batch.world.all(torch.tensor(batch.num_tokens, device=mask.device)).tolist()
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + int(state.get("updates", 0))) * 65_537)
        draw = (
            torch.rand(sum(sizes), generator=generator, dtype=torch.float32, device="cpu")
            .split(sizes)[batch.world.rank]
            .to(mask.device)
        )
        return plan.weigh(~top_mask(draw, count, candidate, batch.world))


@dataclass(frozen=True, kw_only=True)
class KLCov(TokenRule):
    """Adds coef |logp - old_logp| on the max(1, fraction N) tokens with the highest covariance.

    N is the number of counting tokens of all ranks. If logp and old_logp are equal to the bit, the gradient is 0, so
    the rule has no effect on the first update of a batch. If they differ by a rounding error, the gradient is its sign,
    as in the authors' code.

    Args:
        fraction: share of tokens; the paper's 7B runs use 2e-3.
        coef: coefficient of the penalty.

    Source: KL-Cov (arXiv 2505.22617): exact.
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
        return with_anchor(plan, KL(estimator="abs", coef=self.coef), batch.old_logp, chosen, "KLCov")


@dataclass(frozen=True, kw_only=True)
class PositiveLikelihood(TokenRule):
    """Adds coef times the negative log-likelihood of good responses.

    over="chosen" counts the chosen tokens of this plan over all ranks. To accumulate micro-batches, use `Plan.take`.
    The term is the anchor of the objective: a "k1" KL against log-probability 0 has the value and gradient of the
    likelihood. A KL to the reference can be used together with it.

    Args:
        coef: weight of the term.
        of: good responses. "correct": `batch.correct` (VAPO). "group_best": the highest reward of a group with
            unequal rewards, if its advantage is above 0 (the analogue of A2PR's gate). It is decided in
            `prepare`, on the whole group.
        over: tokens that the term is averaged over: the "chosen" tokens, or "all" tokens.

    Source: VAPO (arXiv 2504.05118), formula in NeMo-RL: exact.
    """

    coef: float = 0.1
    of: str = "correct"
    over: str = "chosen"

    def __post_init__(self) -> None:
        check_number("PositiveLikelihood", "coef", self.coef, 0.0)
        check_choice("PositiveLikelihood", "of", self.of, ("correct", "group_best"))
        check_choice("PositiveLikelihood", "over", self.over, ("chosen", "all"))

    def prepare(self, batch: Batch) -> Batch:
        if self.of == "correct":
            return batch
        batch.require("PositiveLikelihood", "group_ids", "advantage")
        assert batch.advantage is not None
        value = batch.advantage
        if batch.advantage_level == "token":
            value = batch.sequence_mean(value)
        return replace(batch, imitation=(_group_best(batch) & (value > 0)).to(batch.old_logp.dtype))

    def apply(self, plan: Plan, state: State) -> Plan:
        batch, op = plan.batch, "PositiveLikelihood"
        if plan.objective.aggregation != "token_mean":
            raise refuse(
                op, "aggregation", "'token_mean'", repr(plan.objective.aggregation), "This term is a mean over tokens."
            )
        if self.of == "correct":
            batch.require(op, "correct")
            assert batch.correct is not None
            good = batch.correct
        else:
            batch.require(op, "imitation")
            assert batch.imitation is not None
            good = batch.imitation > 0
        chosen = batch.spread(good) & plan_mask(plan)
        weight = chosen.to(batch.old_logp.dtype)
        if self.over == "chosen":
            all_tokens, some = batch.world.sum(torch.stack([plan.count(), chosen.sum().double()]))
            weight = weight * (all_tokens / some.clamp(min=1)).to(weight.dtype)
        kl = KL(estimator="k1", coef=-self.coef, clamp=UNBOUNDED)
        return with_anchor(plan, kl, torch.zeros_like(batch.old_logp), weight, op)


def _group_best(batch: Batch) -> torch.Tensor:
    assert batch.group_ids is not None
    group = groups_of(batch.group_ids).member
    lowest = torch.full_like(batch.reward, -torch.inf)
    return batch.reward == lowest.scatter_reduce(0, group, batch.reward, "amax")[group]


def with_anchor(plan: Plan, kl: KL, anchor_logp: torch.Tensor, weight: torch.Tensor, op: str) -> Plan:
    """Return the plan with this second KL term, next to a KL to the reference. An objective has only one anchor."""
    if plan.objective.anchor is not None:
        raise refuse(
            op,
            "rules",
            "only one that adds a term of log-probabilities (the objective has one anchor)",
            plan.objective.anchor,
            "Remove one of the two.",
        )
    weight = weight.to(plan.batch.old_logp.dtype)
    objective = replace(plan.objective, anchor=kl)
    return replace(plan, objective=objective, anchor_logp=anchor_logp, anchor_weight=weight)


def plan_mask(plan: Plan) -> torch.Tensor:
    """Return the tokens that count in the plan, (tokens,) bool."""
    return plan.batch.valid if plan.mask is None else plan.mask
