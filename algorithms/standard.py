"""The standard family: one class whose fields are independent options. A method is a choice of values.

The loss is an Objective(shape, level, aggregation, kl, entropy_coef) of the estimator's advantages, multiplied by the
correction's weights and modified by the token rules. `algorithms/table.py` lists the methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from tokfuse.algorithms import advantages as estimators
from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import Algorithm, Plan, State, require_metrics
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.rules import ClipCov, Correction, TokenRule
from tokfuse.algorithms.selection import informative
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import Gamma, LinearLogp, PPOClip, Shape


@dataclass(frozen=True, kw_only=True)
class Overlong:
    """DAPO's soft length penalty, added to the reward of a response with n counting tokens.

    It is 0 up to n = max_length - cache, then falls linearly to -1 at max_length, and stays -1 beyond.

    Args:
        max_length: number of tokens at which the penalty reaches -1.
        cache: number of tokens over which the penalty falls from 0 to -1.
    """

    max_length: int = 20480
    cache: int = 4096

    def __post_init__(self) -> None:
        check_number("Overlong", "cache", self.cache, 1, self.max_length)

    def penalty(self, lengths: torch.Tensor) -> torch.Tensor:
        """Return the penalty, (seqs,) in [-1, 0]."""
        free = self.max_length - self.cache
        return ((free - lengths.double()) / self.cache).clamp(-1.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class KLControl:
    """Ziegler's controller of the KL coefficient.

    After each update: coef *= 1 + clip(KL / target - 1, +-0.2) seqs / horizon. KL is the mean of logp - ref_logp
    (k1) over the tokens of the update, and seqs the number of its responses.

    Args:
        target: desired KL, nats.
        horizon: number of responses over which the controller acts.
    """

    target: float
    horizon: float

    def __post_init__(self) -> None:
        check_number("KLControl", "target", self.target, 0.0, open_low=True)
        check_number("KLControl", "horizon", self.horizon, 0.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class EntropyControl:
    """Controller of the entropy coefficient, as in Skywork-OR1 and TRL.

    After each update the coefficient rises by `step` if the entropy H is below the target, and falls by `step`
    otherwise. The bonus is active only while H <= target. The coefficient starts at the algorithm's entropy_coef
    and never falls below 0.

    Args:
        target: desired entropy, nats.
        step: change of the coefficient per update.
    """

    target: float = 0.2
    step: float = 0.005

    def __post_init__(self) -> None:
        check_number("EntropyControl", "target", self.target, 0.0)
        check_number("EntropyControl", "step", self.step, 0.0)


@dataclass(frozen=True, kw_only=True)
class Standard(Algorithm):
    """A policy-gradient method with independent options. Every option can be set for every method.

    Args:
        advantage: estimator, see `tokfuse.algorithms.advantages.estimate`.
        eps: number added to the divisor of the advantage. None: 1e-6 for a deviation, 1e-8 for a mean.
        std: "sample" (divisor G - 1) or "population" (divisor G) standard deviation. None: "sample".
        scale: divisor of the advantage: "none", "std" (of the group), "batch_std" (of all rewards), "mean" (of
            the group). None: the estimator's own.
        singleton: advantage of a group with one response. "reward": the baseline is 0. "zero": the advantage is
            0. None: "reward".
        gamma: discount of `tokfuse.gae`. None: 1.
        lam: lambda of `tokfuse.gae`. None: 1.
        length_adaptive_alpha: alpha of VAPO's length-adaptive lambda, 1 - 1 / max(alpha * length, 1), which
            replaces lam. None: off.
        reward_kl: coefficient of the k1 KL that is subtracted from the token rewards. None: 0.
        whiten: subtract the mean of the advantages over all tokens, and divide by their deviation.
            None: True for gae, reinforce_pp and reinforce_pp_baseline, False for the others.
        overlong: length penalty added to the reward, or None.
        skip_uniform: remove groups whose rewards are all equal, also from the denominator (DAPO's dynamic
            sampling). The data loader must refill the batch.
        shape: policy term, e.g. `PPOClip(low=0.2, high=0.28)`.
        level: level of the ratio: "token", "sequence", "sequence_token" or "sequence_sum", see
            `tokfuse.Objective`.
        aggregation: "token_mean", "seq_mean_token_mean", "seq_mean_token_sum" or "token_sum", see
            `tokfuse.Objective`.
        kl: KL term, or None.
        entropy_coef: coefficient of the entropy bonus; a positive value raises the entropy.
        max_length: needed by aggregation "token_sum", and only there. The loss is divided by
            sequences * max_length.
        correction: weights for the mismatch between rollout engine and trainer, or None.
        bypass: use the rollout engine's sampler_logp as old_logp in the ratio.
        rules: token rules, applied in order.
        kl_control: controller of the KL coefficient, or None.
        entropy_control: controller of entropy_coef, or None.

    An option that the estimator does not read must be None.
    State: the number of updates, and the controlled coefficients.
    """

    advantage: str = "grpo"
    eps: float | None = None
    std: str | None = None
    scale: str | None = None
    singleton: str | None = None
    gamma: float | None = None
    lam: float | None = None
    length_adaptive_alpha: float | None = None
    reward_kl: float | None = None
    whiten: bool | None = None
    overlong: Overlong | None = None
    skip_uniform: bool = False
    shape: Shape = PPOClip()
    level: str = "token"
    aggregation: str = "token_mean"
    kl: KL | None = None
    entropy_coef: float = 0.0
    max_length: int | None = None
    correction: Correction | None = None
    bypass: bool = False
    rules: tuple[TokenRule, ...] = ()
    kl_control: KLControl | None = None
    entropy_control: EntropyControl | None = None

    def __post_init__(self) -> None:
        estimators.check_options(self._op, self.advantage, self._given())
        self._objective(self.kl, self.entropy_coef)  # checks its own fields
        if (self.max_length is None) == self._divides_by_length:
            want = "given" if self._divides_by_length else "left out"
            raise refuse(
                self._op,
                "max_length",
                f"{want} with aggregation {self.aggregation!r}",
                self.max_length,
                "Only a token_sum is divided by it.",
            )
        if self.max_length is not None:
            check_number(self._op, "max_length", self.max_length, 1)
        if self.kl_control is not None and self.kl is None:
            raise refuse(
                self._op, "kl_control", "None without a KL term", self.kl_control, "Set kl=KL(coef=...) to start from."
            )
        if isinstance(self.shape, Gamma) and self.correction is not None and self.correction.mode != "keep":
            raise refuse(
                self._op,
                "correction",
                "None, or one of mode 'keep', with the shape Gamma (the weight belongs inside its gate)",
                self.correction,
                "Use bypass=True: the ratio to sampler_logp is the ratio of the update times the weight.",
            )
        if isinstance(self.shape, LinearLogp):
            for option, value, default in (("level", self.level, "token"), ("bypass", self.bypass, False)):
                if value != default:
                    want, advice = f"{default!r} with the shape LinearLogp, which has no ratio", "Choose another shape."
                    raise refuse(self._op, option, want, repr(value), advice)
        if self.bypass and self.correction is not None:
            raise refuse(
                self._op,
                "correction",
                "None with bypass (the ratio itself corrects)",
                self.correction,
                "Choose one of the two.",
            )

    @property
    def _divides_by_length(self) -> bool:
        return self.aggregation == "token_sum"

    def _given(self) -> dict[str, Any]:
        names = ("eps", "std", "scale", "singleton", "gamma", "lam", "length_adaptive_alpha", "reward_kl")
        return {name: getattr(self, name) for name in names}

    def _objective(self, kl: KL | None, entropy_coef: float) -> Objective:
        return Objective(
            shape=self.shape, level=self.level, aggregation=self.aggregation, kl=kl, entropy_coef=entropy_coef
        )

    # ------------------------------------------------------------------------------ before the loss

    def initial_state(self) -> State:
        """Return the number of updates, and the coefficients that a controller changes."""
        state: State = {}
        if any(isinstance(rule, ClipCov) for rule in self.rules):
            state["updates"] = 0
        if self.kl_control is not None:
            state["kl_coef"] = cast(KL, self.kl).coef
        if self.entropy_control is not None:
            state |= {"entropy_coef": self.entropy_coef, "entropy": 0.0}
        return state

    def rewards(self, batch: Batch) -> torch.Tensor:
        """Return the reward that the estimator uses, (seqs,)."""
        if self.overlong is None:
            return batch.reward
        if batch.token_reward is not None:
            raise refuse(
                self._op,
                "batch.token_reward",
                "None with overlong",
                "a tensor",
                "Add the length penalty to the token rewards.",
            )
        return batch.reward + self.overlong.penalty(batch.lengths).to(batch.reward.dtype)

    def advantages(self, batch: Batch) -> Advantage:
        """Return the advantages of the chosen estimator."""
        needs, _ = estimators.ESTIMATORS[self.advantage]
        batch.require(self._op, *needs)
        whiten = self.advantage in estimators.WHITENED if self.whiten is None else self.whiten
        options = {name: value for name, value in self._given().items() if value is not None}
        return estimators.estimate(self.advantage, batch, self.rewards(batch), options, whiten)

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """Return the tokens of groups with unequal rewards if skip_uniform is set, else None."""
        if not self.skip_uniform:
            return None
        batch.require(self._op, "group_ids")
        # Use correctness if it is known: a length penalty makes the rewards of solved groups unequal.
        score = batch.reward if batch.correct is None else batch.correct.float()
        return batch.spread(informative(score, cast(torch.Tensor, batch.group_ids)))

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the batch with its advantages, the selected mask, and what the rules decide about groups."""
        batch = super().prepare(batch, state)
        for rule in self.rules:
            batch = rule.prepare(batch)
        return batch

    # ------------------------------------------------------------------------------------- the loss

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the plan of a prepared batch."""
        if batch.advantage is None:
            raise refuse(
                self._op, "batch", "prepared", "one without advantages", "Call algorithm.prepare(batch, state) first."
            )
        if self.bypass:
            batch.require(self._op, "sampler_logp")
            assert batch.sampler_logp is not None
            batch = replace(batch, old_logp=batch.sampler_logp, sampler_logp=None)
        plan = self._plan(batch, self.spec(state))
        if plan.objective.kl is not None:
            batch.require(self._op, "ref_logp")
            plan = replace(plan, ref_logp=batch.ref_logp)
        if self.correction is not None:
            plan = self.correction.apply(plan, self._op)
        for rule in self.rules:
            plan.batch.require(self._op, *rule.needs)
            plan = rule.apply(plan, state)
        return plan

    def spec(self, state: State) -> Objective:
        """Return the objective at this state, before the rules modify it."""
        kl = self.kl
        if kl is not None and self.kl_control is not None:
            kl = replace(kl, coef=state["kl_coef"])
        entropy_coef = self.entropy_coef
        if self.entropy_control is not None:
            active = state["entropy"] <= self.entropy_control.target
            entropy_coef = state["entropy_coef"] if active else 0.0
        return self._objective(kl, entropy_coef)

    def _plan(self, batch: Batch, objective: Objective) -> Plan:
        assert batch.advantage is not None
        return Plan(
            batch=batch,
            objective=objective,
            advantage=batch.advantage,
            advantage_level=batch.advantage_level,
            mask=batch.mask,
            signal=batch.signal,
            token_weight=batch.token_weight,
            normalizer=self._normalizer(batch),
            fixed=self._fixed_divisor,
        )

    def _normalizer(self, batch: Batch) -> float | str:
        if self.max_length is None:
            return "batch"
        return float(batch.num_seqs * self.max_length)

    @property
    def _fixed_divisor(self) -> bool:
        return False

    @property
    def needs_policy(self) -> bool:
        """Whether a rule or the correction reads the current policy."""
        rules = any({"logp", "entropy"} & set(rule.needs) for rule in self.rules)
        return rules or (self.correction is not None and self.correction.policy == "current")

    # ------------------------------------------------------------------------------------ the state

    def measure(self, plan: Plan, logp: torch.Tensor, entropy: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Return the sums over the plan's tokens that the controllers need."""
        keep = plan.batch.valid if plan.mask is None else plan.mask

        def total(x: torch.Tensor) -> torch.Tensor:
            return torch.where(keep, x.detach().double(), 0.0).sum()

        out = {}
        if self.kl_control is not None:
            plan.batch.require(self._op, "ref_logp")
            out["kl"] = total(logp - cast(torch.Tensor, plan.batch.ref_logp))
            out["seqs"] = (plan.batch.lengths > 0).sum().double()
        if self.entropy_control is not None:
            if entropy is None:
                raise refuse(self._op, "entropy", "given with entropy_control", None, "Pass step.stats.entropy.")
            out["entropy"] = total(entropy)
        return out | {"tokens": keep.sum().double()} if out else {}

    def update(self, state: State, metrics: Mapping[str, torch.Tensor]) -> State:
        """Return the state after one step of every controller."""
        controlled = {"kl": self.kl_control, "entropy": self.entropy_control}
        require_metrics(self._op, metrics, *(k for k, v in controlled.items() if v is not None))
        state = dict(state)
        if "updates" in state:
            state["updates"] += 1
        tokens = max(float(metrics["tokens"]), 1.0) if metrics else 1.0
        if self.kl_control is not None:
            kl = float(metrics["kl"]) / tokens
            error = min(max(kl / self.kl_control.target - 1.0, -0.2), 0.2)
            state["kl_coef"] *= 1.0 + error * float(metrics["seqs"]) / self.kl_control.horizon
        if self.entropy_control is not None:
            control, entropy = self.entropy_control, float(metrics["entropy"]) / tokens
            step = control.step if entropy < control.target else -control.step
            state["entropy_coef"] = max(0.0, state["entropy_coef"] + step)
            state["entropy"] = entropy
        return state
