"""Test the range of every numeric argument of the curation, causal and reward packages.

`TABLE` is the list of these arguments. One test tries values below, at and above each end, NaN, infinities, bools,
floats where an integer is needed and numbers of numpy. Another test fails if a public argument is missing.
"""

import importlib
import inspect
import math
import pkgutil
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch

from tokfuse.algorithms import influence
from tokfuse.algorithms.causal import answer_metrics, environments, offpolicy
from tokfuse.algorithms.causal import effects as causal_effects
from tokfuse.algorithms.curation import (
    bandits,
    cog_rethinker,
    cures,
    hpl,
    influential,
    isla,
    leaf,
    seele,
    shapley,
    thought_branches,
)
from tokfuse.algorithms.reward import (
    balance,
    calibrate,
    correction,
    effects,
    fimi,
    imitation,
    ivl,
    pairwise,
    parl,
    ugda,
)

NAN, INF = math.nan, math.inf

# -------------------------------------------------------------------------------------------------- ranges


@dataclass(frozen=True)
class Real:
    """A finite number in a range. `good` replaces the values that must be accepted."""

    low: float = -INF
    high: float = INF
    open_low: bool = False
    open_high: bool = False
    good: tuple[Any, ...] | None = None

    def middle(self) -> float:
        if self.low > -INF and self.high < INF:
            return (self.low + self.high) / 2
        return self.low + 1.0 if self.low > -INF else min(0.5, self.high - 1.0)

    def ends(self) -> tuple[list[float], list[float]]:
        """Return the values at and beside the ends: (accepted, rejected)."""
        good, bad = [self.middle()], [NAN, INF, -INF]
        for end, is_open, inward in ((self.low, self.open_low, 1.0), (self.high, self.open_high, -1.0)):
            if not math.isinf(end):
                step = inward * 1e-6 * max(1.0, abs(end))
                good.append(end + step)
                bad.append(end - step)
                (bad if is_open else good).append(end)
        return good, bad

    def accepted(self) -> list[Any]:
        good = list(self.good or self.ends()[0])
        return [*good, np.float64(good[0]), np.float32(good[0])]

    def rejected(self) -> list[Any]:
        return [*self.ends()[1], True, np.True_, "1"]


@dataclass(frozen=True)
class Whole:
    """An integer in [low, high]. `good` replaces the values that must be accepted, `bad` adds rejected ones."""

    low: int
    high: int | None = None
    good: tuple[int, ...] | None = None
    bad: tuple[int, ...] = ()

    def accepted(self) -> list[Any]:
        good = list(self.good or (self.low, self.low + 1 if self.high is None else self.high))
        return [*good, np.int64(good[0]), np.int32(good[-1])]

    def rejected(self) -> list[Any]:
        some = (self.good or (self.low,))[0]
        beyond = [] if self.high is None else [self.high + 1]
        return [self.low - 1, *beyond, *self.bad, some + 0.5, float(some), np.float64(some), NAN, INF, True, np.True_]


@dataclass(frozen=True)
class Elements(Real):
    """A floating-point tensor whose elements are all in the range. `special` are non-finite values with a meaning."""

    special: tuple[float, ...] = ()

    def accepted(self) -> list[Any]:
        return [*self.ends()[0], *self.special]

    def rejected(self) -> list[Any]:
        special = [repr(x) for x in self.special]
        return [*(x for x in self.ends()[1] if repr(x) not in special), torch.bool]


@dataclass(frozen=True)
class Ids:
    """An integer tensor whose elements are all in [low, high]. None: any integer."""

    low: int | None = None
    high: int | None = None

    def accepted(self) -> list[Any]:
        ends = [end for end in (self.low, self.high) if end is not None]
        return ends or [-7, 7]

    def rejected(self) -> list[Any]:
        below = [] if self.low is None else [self.low - 1]
        above = [] if self.high is None else [self.high + 1]
        return [*below, *above, torch.bool, torch.float32]


@dataclass(frozen=True)
class Flags:
    """A bool tensor."""

    def accepted(self) -> list[Any]:
        return [True, False]

    def rejected(self) -> list[Any]:
        return [torch.float32, torch.int64]


@dataclass(frozen=True)
class Free:
    """A tensor that is not checked, because no choice depends on it: a NaN must be visible in the result."""

    def accepted(self) -> list[Any]:
        return []

    def rejected(self) -> list[Any]:
        return []


Range = Real | Whole | Elements | Ids | Flags | Free


@dataclass(frozen=True)
class Case:
    """A public function, method or class with valid arguments, and the ranges of its numeric arguments.

    A path names an argument or a part of it: "prior[0]", "choice.arm". An argument may have several ranges, for
    example as a number and as a tensor.
    """

    name: str
    call: Callable[..., Any]
    given: dict[str, Any]
    ranges: dict[str, Range | tuple[Range, ...]] = field(default_factory=dict)


def replaced(value: Any, path: str, new: Any) -> Any:
    """Return `value` with the part at `path` replaced. In a tensor, the first element is replaced."""
    found = re.match(r"\[(\d+)\]|\.(\w+)", path)
    if found is None:
        if isinstance(new, torch.dtype):
            return value.to(new)
        if isinstance(value, torch.Tensor):
            out = value.clone()
            out.view(-1)[0] = new
            return out
        return new
    rest = path[found.end() :]
    if found[2]:
        return value._replace(**{found[2]: replaced(getattr(value, found[2]), rest, new)})
    items = list(value)
    items[int(found[1])] = replaced(items[int(found[1])], rest, new)
    return type(value)(items)


def with_part(case: Case, path: str, as_tensor: bool, new: Any) -> dict[str, Any]:
    """Return the arguments of `case` with the part at `path` replaced."""
    name = re.match(r"\w+", path)[0]
    value = case.given[name]
    if as_tensor and not isinstance(value, torch.Tensor | list | tuple):
        value = torch.tensor(float(value), dtype=torch.float64)
    return case.given | {name: replaced(value, path[len(name) :], new)}


# --------------------------------------------------------------------------------------------------- table


def t(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64)


def flags(*values: bool) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.bool)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


UNIT = Real(0.0, 1.0)
SHARE = Real(0.0, 1.0, open_low=True)
INSIDE = Real(0.0, 1.0, open_low=True, open_high=True)
BETA = Real(0.0, 1.0, open_high=True)
POSITIVE = Real(0.0, open_low=True)
WEIGHT = Real(0.0)
FINITE = Real()
COUNT = Whole(1)
SEED = Whole(0)
RATES = Elements(0.0, 1.0)
SHARES = Elements(0.0, 1.0, open_low=True)
INSIDES = Elements(0.0, 1.0, open_low=True, open_high=True)
ABOVE_ZERO = Elements(0.0)
POSITIVES = Elements(0.0, open_low=True)
ANY = Elements()
ADAM = {"betas[0]": BETA, "betas[1]": BETA, "eps": POSITIVE}
BOUNDS = {
    "bounds[0][0]": Real(0.0, 50.0, open_low=True, open_high=True),
    "bounds[0][1]": Real(0.1, open_low=True),
    "bounds[1][0]": Real(-INF, 0.5, open_high=True),
    "bounds[1][1]": Real(-1.5, open_low=True),
    "bounds[2][0]": Real(0.0, 0.99, open_high=True),
    "bounds[2][1]": Real(0.0, 1.0, open_low=True, open_high=True),
}
NORMALIZER = (POSITIVE, POSITIVES)

FEATURES = torch.tensor([[1.0, 0.5], [0.2, -1.0], [-0.3, 0.8]], dtype=torch.float64)
MOMENTS = (t(0.1, 0.2), t(0.3, 0.4))
INFLUENCE = {
    "train": [FEATURES],
    "validation": [FEATURES[:2]],
    "moments": [MOMENTS],
    "weight": [0.5],
    "subtask": ids(0, 1),
}
INFLUENCE_RANGES = {"train[0]": ANY, "validation[0]": ANY, "weight[0]": POSITIVE, "subtask": Ids()}
OF_MOMENTS = {"moments[0][0]": ANY, "moments[0][1]": ABOVE_ZERO}

ARMS = bandits.SquareCB(arms=2)
CHOICE = bandits.Choice(0, 0.5, [0.5, 0.5])
COG = cog_rethinker.CogRethinker(sft_weight=0.1)
CURES = cures.CurES(prompts=3, tau=0.1)
HPL = hpl.HPLCurriculum()
ISLA = isla.ISLA()
SEELE = seele.SEELE()
TB = thought_branches.ThoughtBranches()
DRO = environments.GroupDRO(environments=2)
LCC = calibrate.RewardCalibrator(method="lcc")
LCC_STATE = LCC.fit(t(1, 2, 3), t(1, 2, 4))
TWEEDIE = calibrate.RewardCalibrator()
TWEEDIE_STATE = TWEEDIE.fit(t(1, 2, 3), t(1, 2, 4))
NOISE = correction.NoiseCorrection(rho01=0.1, rho10=0.2)
DWBC = imitation.DWBC(eta=0.5)
PAIRS = flags(True, False)
PL = correction.PropensityLoss

TABLE = [
    # ------------------------------------------------------------------------------------ influence
    Case(
        "influence.matrix",
        influence.matrix,
        {"features": FEATURES, "others": FEATURES},
        {"features": Free(), "others": Free()},
    ),
    Case(
        "influence.adam_features",
        influence.adam_features,
        {"gradient": FEATURES, "exp_avg": MOMENTS[0], "exp_avg_sq": MOMENTS[1], "betas": (0.9, 0.99), "eps": 1e-8},
        {"gradient": Free(), "exp_avg": ANY, "exp_avg_sq": ABOVE_ZERO, **ADAM},
    ),
    Case(
        "influence.less_scores",
        influence.less_scores,
        {k: v for k, v in INFLUENCE.items() if k != "moments"},
        INFLUENCE_RANGES,
    ),
    Case(
        "influence.greedy_select",
        influence.greedy_select,
        {"score": t(1, 2), "interaction": torch.eye(2), "k": 1},
        {"score": ANY, "interaction": ANY, "k": Whole(0, 2)},
    ),
    Case(
        "influence.ugda_select",
        influence.ugda_select,
        {"rewards": torch.eye(2), "score": t(1, 2), "uncertain": 0.5, "influential": 0.5},
        {"rewards": ANY, "score": ANY, "uncertain": SHARE, "influential": SHARE},
    ),
    Case(
        "influence.top_fraction",
        influence.top_fraction,
        {"value": t(1, 2), "fraction": 0.5},
        {"value": ANY, "fraction": SHARE},
    ),
    # ------------------------------------------------------------------------------------- bandits
    Case(
        "curation.bandits.squarecb_probabilities",
        bandits.squarecb_probabilities,
        {"cost": t(1, 2), "gamma": 1.0},
        {"cost": ANY, "gamma": WEIGHT},
    ),
    Case("curation.bandits.Arms", bandits.Arms, {"arms": 2}, {"arms": COUNT}),
    Case(
        "curation.bandits.Arms.observe",
        ARMS.observe,
        {"state": ARMS.initial_state(), "choice": CHOICE, "reward": 1.0, "residual": 0.0},
        {"choice.arm": Whole(0, 1), "reward": FINITE, "residual": FINITE},
    ),
    Case(
        "curation.bandits.SquareCB",
        bandits.SquareCB,
        {"arms": 2, "scale": 1.0, "power": 0.5, "seed": 0},
        {"arms": COUNT, "scale": WEIGHT, "power": WEIGHT, "seed": SEED},
    ),
    Case(
        "curation.bandits.SquareCB.choose", ARMS.choose, {"state": ARMS.initial_state(), "cost": t(1, 2)}, {"cost": ANY}
    ),
    Case("curation.bandits.OFS", bandits.OFS, {"arms": 2, "width": 1.0}, {"arms": COUNT, "width": WEIGHT}),
    Case(
        "curation.bandits.generation_report",
        bandits.generation_report,
        {"log": [CHOICE], "target": [[0.5, 0.5]]},
        {"log[0].arm": Whole(0, 1), "log[0].propensity": SHARE, "target[0][0]": UNIT},
    ),
    # -------------------------------------------------------------------------------- cog_rethinker
    Case(
        "curation.cog_rethinker.bm25",
        cog_rethinker.bm25,
        {"query": "a", "documents": ["a b"], "k1": 1.5, "b": 0.5},
        {"k1": WEIGHT, "b": UNIT},
    ),
    Case(
        "curation.cog_rethinker.CogRethinker",
        cog_rethinker.CogRethinker,
        {"sft_weight": 0.1, "demonstrations": 1, "capacity": 2},
        {"sft_weight": WEIGHT, "demonstrations": COUNT, "capacity": COUNT},
    ),
    Case("curation.cog_rethinker.CogRethinker.route", COG.route, {"accuracies": [0.0]}, {"accuracies[0]": UNIT}),
    Case(
        "curation.cog_rethinker.CogRethinker.sft_weights",
        COG.sft_weights,
        {"cu_seqlens": offsets(0, 1, 2), "solved": PAIRS},
        {"cu_seqlens": Ids(0, 0), "solved": Flags()},
    ),
    # --------------------------------------------------------------------------------------- cures
    Case(
        "curation.cures.largest_remainder",
        cures.largest_remainder,
        {"share": t(1, 2), "total": 3},
        {"share": ABOVE_ZERO, "total": SEED},
    ),
    Case(
        "curation.cures.gradient_sigma",
        cures.gradient_sigma,
        {"p": t(0.5), "square_right": t(1), "square_wrong": t(1), "apart": t(1)},
        {"p": RATES, "square_right": ABOVE_ZERO, "square_wrong": ABOVE_ZERO, "apart": ABOVE_ZERO},
    ),
    Case(
        "curation.cures.rollout_sigma",
        cures.rollout_sigma,
        {"gradient": FEATURES[:2], "correct": PAIRS, "prompt_ids": ids(0, 1), "num_prompts": 2, "p": t(0.5, 0.5)},
        {"gradient": ANY, "correct": Flags(), "prompt_ids": Ids(0, 1), "num_prompts": Whole(0, good=(2,)), "p": RATES},
    ),
    Case(
        "curation.cures.CurES",
        cures.CurES,
        {"prompts": 3, "tau": 0.1, "prior": (1.0, 1.0), "rounding": "code", "multiple": 1, "minimum": 0, "seed": 0},
        {
            "prompts": COUNT,
            "tau": POSITIVE,
            "prior[0]": POSITIVE,
            "prior[1]": POSITIVE,
            "multiple": COUNT,
            "minimum": SEED,
            "seed": SEED,
        },
    ),
    Case(
        "curation.cures.CurES.observe",
        CURES.observe,
        {"state": CURES.initial_state(), "prompt_ids": [0, 1], "correct": PAIRS},
        {"prompt_ids[0]": Whole(0, 2), "correct": Flags()},
    ),
    Case(
        "curation.cures.CurES.observe",
        CURES.observe,
        {"state": CURES.initial_state(), "prompt_ids": ids(0, 1), "correct": PAIRS},
        {"prompt_ids": Ids(0, 2)},
    ),
    Case(
        "curation.cures.CurES.sample",
        CURES.sample,
        {"state": CURES.initial_state(), "count": 1},
        {"count": Whole(0, 3)},
    ),
    Case(
        "curation.cures.CurES.quota", CURES.quota, {"sigma": t(1, 2), "total": 3}, {"sigma": ABOVE_ZERO, "total": SEED}
    ),
    Case(
        "curation.cures.CurES.quota",
        cures.CurES(prompts=3, tau=0.1, rounding="code", multiple=2, minimum=1).quota,
        {"sigma": t(1, 2), "total": 3},
        {"sigma": ABOVE_ZERO, "total": Whole(2)},
    ),
    # ----------------------------------------------------------------------------------------- hpl
    Case(
        "curation.hpl.HPLCurriculum",
        hpl.HPLCurriculum,
        {"lengths": (3, 6), "gaps": (0.7, 0.4), "min_gap": 0.3, "min_return": 0.8},
        {
            "lengths[0]": Whole(1, 5),
            "lengths[1]": Whole(4),
            "gaps[0]": Real(0.4, open_low=True),
            "gaps[1]": Real(0.0, 0.7, open_high=True),
            "min_gap": FINITE,
            "min_return": FINITE,
        },
    ),
    Case(
        "curation.hpl.HPLCurriculum.buckets",
        HPL.buckets,
        {"length": ids(1, 2), "gap": t(0, 1)},
        {"length": Ids(0), "gap": ANY},
    ),
    Case(
        "curation.hpl.HPLCurriculum.in_phase",
        HPL.in_phase,
        {"phase": 1, "length": ids(1, 2), "gap": t(0, 1)},
        {"phase": Whole(1, 3), "length": Ids(0), "gap": ANY},
    ),
    Case(
        "curation.hpl.HPLCurriculum.keep",
        HPL.keep,
        {"expert_reward": t(1), "agent_reward": t(0), "expert_return": t(1), "agent_return": t(0)},
        dict.fromkeys(("expert_reward", "agent_reward", "expert_return", "agent_return"), ANY),
    ),
    Case("curation.hpl.group_return", hpl.group_return, {"final_reward": FEATURES}, {"final_reward": ANY}),
    Case(
        "curation.hpl.segment_fixed_size",
        hpl.segment_fixed_size,
        {"actions": 4, "size": 3},
        {"actions": SEED, "size": COUNT},
    ),
    Case(
        "curation.hpl.segment_fixed_count",
        hpl.segment_fixed_count,
        {"actions": 4, "count": 3},
        {"actions": SEED, "count": COUNT},
    ),
    Case(
        "curation.hpl.segment_uncertain",
        hpl.segment_uncertain,
        {"entropy": t(1, 2), "quantile": 0.5},
        {"entropy": ANY, "quantile": UNIT},
    ),
    Case(
        "curation.hpl.segment_uncertain",
        hpl.segment_uncertain,
        {"entropy": t(1, 2), "quantile": None, "threshold": 0.5},
        {"entropy": ANY, "threshold": FINITE},
    ),
    # --------------------------------------------------------------------------------- influential
    Case(
        "curation.influential.LESS",
        influential.LESS,
        {"fraction": 0.5, "betas": (0.9, 0.99), "eps": 1e-8},
        {"fraction": SHARE, **ADAM},
    ),
    Case("curation.influential.LESS.scores", influential.LESS().scores, INFLUENCE, INFLUENCE_RANGES | OF_MOMENTS),
    Case("curation.influential.LESS.select", influential.LESS().select, INFLUENCE, INFLUENCE_RANGES | OF_MOMENTS),
    Case("curation.influential.GREATS", influential.GREATS, {"k": 2, "lr": 0.1}, {"k": COUNT, "lr": POSITIVE}),
    Case(
        "curation.influential.GREATS.select",
        influential.GREATS(k=2, lr=0.1).select,
        {"features": FEATURES, "validation": FEATURES, "divisor": 2.0},
        {"features": ANY, "validation": ANY, "divisor": POSITIVE},
    ),
    Case(
        "curation.influential.UGDA",
        influential.UGDA,
        {"uncertain": 0.5, "influential": 0.5, "betas": (0.9, 0.99), "eps": 1e-8},
        {"uncertain": SHARE, "influential": SHARE, **ADAM},
    ),
    Case(
        "curation.influential.UGDA.select",
        influential.UGDA().select,
        INFLUENCE | {"rewards": torch.eye(3)},
        INFLUENCE_RANGES | OF_MOMENTS | {"rewards": ANY},
    ),
    # ---------------------------------------------------------------------------------------- isla
    Case("curation.isla.binary_entropy", isla.binary_entropy, {"p": t(0.5)}, {"p": RATES}),
    Case(
        "curation.isla.ISLA",
        isla.ISLA,
        {"min_accuracy_gain": 0.0, "min_uncertainty": 0.0},
        {"min_accuracy_gain": Real(-1.0, 1.0), "min_uncertainty": WEIGHT},
    ),
    Case("curation.isla.ISLA.scores", ISLA.scores, {"accuracy": t(0.5, 0.6)}, {"accuracy": RATES}),
    Case(
        "curation.isla.ISLA.select",
        ISLA.select,
        {"accuracy": t(0.5, 0.6), "uncertainty": t(1)},
        {"accuracy": RATES, "uncertainty": ANY},
    ),
    Case(
        "curation.isla.ISLA.pair",
        ISLA.pair,
        {"chosen_accuracy": 0.5, "sampled": t(0.4, 0.6)},
        {"chosen_accuracy": UNIT, "sampled": RATES},
    ),
    # ---------------------------------------------------------------------------------------- leaf
    Case(
        "curation.leaf.embedding_sensitivity",
        leaf.embedding_sensitivity,
        {"grad_embedding": FEATURES.float()},
        {"grad_embedding": Free()},
    ),
    Case("curation.leaf.LeaFMasks", leaf.LeaFMasks, {"q": 0.1, "cap": 0.5}, {"q": BETA, "cap": UNIT}),
    Case(
        "curation.leaf.LeaFMasks.confounders",
        leaf.LeaFMasks().confounders,
        {"student": t(1, 2), "teacher": t(2, 1), "keep": PAIRS},
        {"student": ABOVE_ZERO, "teacher": ABOVE_ZERO, "keep": Flags()},
    ),
    Case("curation.leaf.spans", leaf.spans, {"mask": PAIRS}, {"mask": Flags()}),
    Case("curation.leaf.prune", leaf.prune, {"ids": ids(5, 6), "mask": PAIRS}, {"ids": Ids(), "mask": Flags()}),
    Case(
        "curation.leaf.worth_keeping",
        leaf.worth_keeping,
        dict.fromkeys(("student_before", "student_after", "teacher_after"), PAIRS),
        dict.fromkeys(("student_before", "student_after", "teacher_after"), Flags()),
    ),
    # --------------------------------------------------------------------------------------- seele
    Case("curation.seele.ThreePL.accuracy", seele.ThreePL(8, -0.5, 0.1).accuracy, {"rate": 0.5}, {"rate": UNIT}),
    Case(
        "curation.seele.fit_3pl",
        seele.fit_3pl,
        {"rates": [0.2, 0.5], "accuracies": [0.1, 0.5], "bounds": seele.BOUNDS},
        {"rates[0]": UNIT, "accuracies[0]": UNIT, **BOUNDS},
    ),
    Case(
        "curation.seele.invert_3pl",
        seele.invert_3pl,
        {"curve": seele.ThreePL(8.0, -0.5, 0.1), "target": 0.5},
        {"curve.k": POSITIVE, "curve.mu": FINITE, "curve.b": BETA, "target": INSIDE},
    ),
    Case(
        "curation.seele.SEELE",
        seele.SEELE,
        {"target": 0.5, "rounds": 4, "rollouts": 8, "imitation": 0.0, "bounds": seele.BOUNDS},
        {"target": INSIDE, "rounds": COUNT, "rollouts": COUNT, "imitation": WEIGHT, **BOUNDS},
    ),
    Case(
        "curation.seele.SEELE.hint",
        SEELE.hint,
        {"state": SEELE.initial_state(), "prompt": "p", "units": 4},
        {"units": COUNT},
    ),
    Case(
        "curation.seele.SEELE.observe",
        SEELE.observe,
        {"state": SEELE.initial_state(), "prompt": "p", "units": 4, "hint": seele.Hint(0.5, 2), "accuracy": 0.5},
        {"units": Whole(1, good=(2, 4)), "hint.rate": UNIT, "hint.length": Whole(0, 4), "accuracy": UNIT},
    ),
    Case(
        "curation.seele.SEELE.masks",
        SEELE.masks,
        {"cu_seqlens": offsets(0, 2, 4), "hint_tokens": ids(1, 2)},
        {"cu_seqlens": Ids(0, 0), "hint_tokens": Ids(0, 2)},
    ),
    # ------------------------------------------------------------------------------------- shapley
    Case(
        "curation.shapley.shapley_exact",
        shapley.shapley_exact,
        {"value": len, "players": 2},
        {"players": Whole(0, 16, good=(0, 1, 3))},
    ),
    Case(
        "curation.shapley.shapley_monte_carlo",
        shapley.shapley_monte_carlo,
        {"value": len, "players": 2, "permutations": 2, "seed": 0},
        {"players": SEED, "permutations": Whole(2), "seed": SEED},
    ),
    Case(
        "curation.shapley.agent_blame",
        shapley.agent_blame,
        {"repaired": len, "agents": 2, "permutations": 2, "seed": 0},
        {"agents": SEED, "permutations": Whole(2), "seed": SEED},
    ),
    # ---------------------------------------------------------------------------- thought_branches
    Case(
        "curation.thought_branches.kl_binary",
        thought_branches.kl_binary,
        {"successes_p": 1, "trials_p": 4, "successes_q": 2, "trials_q": 4, "alpha": 1e-9},
        {
            "successes_p": Real(0.0, 4.0),
            "trials_p": Whole(1),
            "successes_q": Real(0.0, 4.0),
            "trials_q": Whole(1, good=(2, 4)),
            "alpha": POSITIVE,
        },
    ),
    Case(
        "curation.thought_branches.ThoughtBranches",
        thought_branches.ThoughtBranches,
        {"similar": 0.6, "min_dissimilar": 0.05, "max_interventions": 20, "alpha": 1e-9},
        {"similar": Real(-1.0, 1.0), "min_dissimilar": UNIT, "max_interventions": COUNT, "alpha": POSITIVE},
    ),
    Case(
        "curation.thought_branches.ThoughtBranches.importance",
        TB.importance,
        {"similarity": t(0.1, 0.9), "outcome": PAIRS, "kept_outcome": PAIRS},
        {"similarity": ANY, "outcome": Flags(), "kept_outcome": Flags()},
    ),
    Case(
        "curation.thought_branches.ThoughtBranches.resilience",
        TB.resilience,
        {"chain": ["a", "b"], "i": 0, "resample": lambda prefix: ["c"], "similarity": lambda a, b: [0.0]},
        {"i": Whole(0, 1)},
    ),
    Case(
        "curation.thought_branches.counterfactual_plus_plus",
        thought_branches.counterfactual_plus_plus,
        {"kept_rate": 0.5, "abandoned_rate": 0.5},
        {"kept_rate": UNIT, "abandoned_rate": UNIT},
    ),
    Case(
        "curation.thought_branches.transplant_curve",
        thought_branches.transplant_curve,
        {"outcomes": [PAIRS, PAIRS]},
        {"outcomes[0]": Flags()},
    ),
    # -------------------------------------------------------------------------------------- causal
    Case(
        "causal.answer_metrics.pass_rate_at_k",
        answer_metrics.pass_rate_at_k,
        {"samples": ids(4, 4), "correct": ids(1, 2), "k": 2},
        {"samples": Ids(2), "correct": Ids(0, 4), "k": Whole(1, good=(1, 4))},
    ),
    Case(
        "causal.answer_metrics.majority_at_k",
        answer_metrics.majority_at_k,
        {"answers": ["a", "b"], "weight": [1.0, 2.0]},
        {"weight[0]": WEIGHT},
    ),
    Case("causal.answer_metrics.best_of_n", answer_metrics.best_of_n, {"score": [1.0, 2.0]}, {"score[0]": FINITE}),
    Case(
        "causal.answer_metrics.best_of_n",
        answer_metrics.best_of_n,
        {"score": [1.0, 2.0], "answers": ["a", "b"], "weighted": True},
        {"score[0]": WEIGHT},
    ),
    Case(
        "causal.effects.ablation_effect",
        causal_effects.ablation_effect,
        {"full": t(1, 2), "without": t(1, 2)},
        {"full": ANY, "without": ANY},
    ),
    Case(
        "causal.effects.pns_bounds",
        causal_effects.pns_bounds,
        {"with_step": t(0.5), "without_step": t(0.5)},
        {"with_step": RATES, "without_step": RATES},
    ),
    Case(
        "causal.environments.vrex_weights",
        environments.vrex_weights,
        {"risk": t(1, 2), "penalty": 1.0},
        {"risk": ANY, "penalty": WEIGHT},
    ),
    Case(
        "causal.environments.GroupDRO",
        environments.GroupDRO,
        {"environments": 2, "step_size": 0.1},
        {"environments": COUNT, "step_size": WEIGHT},
    ),
    Case(
        "causal.environments.GroupDRO.observe",
        DRO.observe,
        {"state": DRO.initial_state(), "risk": t(1, 2)},
        {"risk": Elements(special=(NAN,))},
    ),
    Case(
        "causal.environments.irm_penalty",
        environments.irm_penalty,
        {"logp": t(-1, -2), "entropy": t(1, 1), "environment": ids(0, 0), "environments": 1, "mask": flags(True, True)},
        {"logp": Free(), "entropy": Free(), "environment": Ids(0, 0), "environments": COUNT, "mask": Flags()},
    ),
    Case(
        "causal.offpolicy.tempered_group_weights",
        offpolicy.tempered_group_weights,
        {"seq_logp": t(-1, -2), "group_ids": ids(3, 3), "power": 1.0},
        {"seq_logp": Elements(special=(-INF,)), "group_ids": Ids(), "power": Real(0.0, 4.0)},
    ),
    # -------------------------------------------------------------------------------------- reward
    Case(
        "reward.balance.BalancePenalty",
        balance.BalancePenalty,
        {"gamma": 1.0, "slack": 0.1},
        {"gamma": POSITIVE, "slack": WEIGHT},
    ),
    *(
        Case(
            f"reward.balance.BalancePenalty.{name}",
            getattr(balance.BalancePenalty(gamma=1.0, slack=0.0), name),
            {"weight": t(1, 1, 1), "features": FEATURES, "target_mean": t(0.1, 0.2)},
            {"weight": POSITIVES, "features": Free(), "target_mean": Free()},
        )
        for name in ("gaps", "loss")
    ),
    Case(
        "reward.calibrate.RewardCalibrator.fit",
        TWEEDIE.fit,
        {"predicted": t(9, 2, 3, 4), "truth": t(9, 2, 3, 4.5)},
        {"predicted": ANY, "truth": ANY},
    ),
    Case(
        "reward.calibrate.RewardCalibrator.transform",
        TWEEDIE.transform,
        {"predicted": t(1, 2), "state": TWEEDIE_STATE},
        {"predicted": Free()},
    ),
    Case(
        "reward.calibrate.RewardCalibrator.transform",
        LCC.transform,
        {"predicted": t(1, 2), "state": LCC_STATE},
        {"predicted": Free()},
    ),
    Case(
        "reward.correction.NoiseCorrection",
        correction.NoiseCorrection,
        {"rho01": 0.0, "rho10": 0.0},
        {"rho01": BETA, "rho10": BETA},
    ),
    Case(
        "reward.correction.NoiseCorrection.loss",
        NOISE.loss,
        {"loss_one": t(1, 2), "loss_zero": t(2, 1), "label": PAIRS},
        {"loss_one": Free(), "loss_zero": Free(), "label": Flags()},
    ),
    Case(
        "reward.correction.anchor_noise_rates",
        correction.anchor_noise_rates,
        {"probability": t(0.1, 0.9)},
        {"probability": RATES},
    ),
    Case("reward.correction.PropensityLoss", PL, {"clip": 0.1}, {"clip": INSIDE}),
    Case(
        "reward.correction.PropensityLoss.loss",
        PL(form="dr").loss,
        {
            "loss": t(1, 2),
            "observed": PAIRS,
            "propensity": t(0.5, 0.0),  # the second sample is not observed
            "imputed": t(1, 1),
            "normalizer": 2.0,
        },
        {"loss": Free(), "observed": Flags(), "propensity": SHARES, "imputed": Free(), "normalizer": NORMALIZER},
    ),
    Case(
        "reward.correction.PropensityLoss.loss",
        PL(clip=0.1).loss,
        {"loss": t(1, 2), "observed": PAIRS, "propensity": t(0.5, NAN)},
        {"propensity": RATES},
    ),
    Case(
        "reward.correction.PropensityLoss.loss",
        PL().loss,
        {"loss": t(1, 2), "observed": PAIRS, "weight": t(0.5, NAN)},
        {"weight": ABOVE_ZERO},
    ),
    Case(
        "reward.correction.imputation_loss",
        correction.imputation_loss,
        {"loss": t(1, 2), "imputed": t(2, 1), "observed": PAIRS, "propensity": t(0.5, -1.0)},
        {"loss": Free(), "imputed": Free(), "observed": Flags(), "propensity": SHARES},
    ),
    Case(
        "reward.correction.imputation_loss",
        correction.imputation_loss,
        {"loss": t(1, 2), "imputed": t(2, 1), "observed": PAIRS, "weight": t(0.5, -1.0)},
        {"weight": ABOVE_ZERO},
    ),
    Case(
        "reward.effects.group_effect",
        effects.group_effect,
        {
            "reward": t(1, 2),
            "treated": PAIRS,
            "group_ids": ids(0, 0),
            "num_groups": 1,
            "propensity": t(0.5, 0.5),
            "mu1": t(1, 1),
            "mu0": t(0, 0),
        },
        {
            "reward": ANY,
            "treated": Flags(),
            "group_ids": Ids(0, 0),
            "num_groups": Whole(0, good=(1,)),
            "propensity": INSIDES,
            "mu1": ANY,
            "mu0": ANY,
        },
    ),
    Case(
        "reward.effects.principled_uplift_auc",
        effects.principled_uplift_auc,
        {"uplift": t(1, 2), "treated": PAIRS, "outcome": PAIRS},
        {"uplift": ANY, "treated": Flags(), "outcome": Flags()},
    ),
    Case(
        "reward.effects.uplift_loss",
        effects.uplift_loss,
        {"uplift": t(1, 2), "treated": PAIRS, "outcome": PAIRS, "propensity": 0.5},
        {"uplift": Free(), "treated": Flags(), "outcome": Flags(), "propensity": INSIDE},
    ),
    Case(
        "reward.effects.uplift_loss",
        effects.uplift_loss,
        {"uplift": t(1, 2), "treated": PAIRS, "outcome": PAIRS, "propensity": t(0.5, 0.5)},
        {"propensity": INSIDES},
    ),
    Case(
        "reward.fimi.length_encoding",
        fimi.length_encoding,
        {"length": t(1, 2), "dim": 4},
        {"length": ABOVE_ZERO, "dim": Whole(2, good=(2, 4, 56), bad=(3,))},
    ),
    Case("reward.fimi.LengthProbe", fimi.LengthProbe, {"dim": 4}, {"dim": Whole(2, good=(2, 4), bad=(3,))}),
    Case("reward.fimi.LengthProbe.forward", fimi.LengthProbe(2).forward, {"length": t(1, 2)}, {"length": ABOVE_ZERO}),
    Case("reward.fimi.pearson", fimi.pearson, {"x": t(1, 2, 4), "y": t(1, 3, 2)}, {"x": Free(), "y": Free()}),
    Case(
        "reward.fimi.FiMi",
        fimi.FiMi,
        {"warmup": 1, "period": 8, "mse_weight": 0.5},
        {"warmup": SEED, "period": COUNT, "mse_weight": WEIGHT},
    ),
    Case(
        "reward.fimi.FiMi.probe_loss",
        fimi.FiMi(warmup=0).probe_loss,
        {"reward": t(1, 2, 4), "predicted": t(1, 3, 2)},
        {"reward": Free(), "predicted": Free()},
    ),
    Case(
        "reward.fimi.FiMi.reward_loss",
        fimi.FiMi(warmup=0).reward_loss,
        {"chosen": t(1, 2), "rejected": t(0, 1), "predicted_chosen": t(1, 2), "predicted_rejected": t(0, 2)},
        dict.fromkeys(("chosen", "rejected", "predicted_chosen", "predicted_rejected"), Free()),
    ),
    Case(
        "reward.imitation.weighted_nll",
        imitation.weighted_nll,
        {"logp": t(-1, -2), "weight": t(1, 1), "mask": PAIRS, "normalizer": 2.0},
        {"logp": Free(), "weight": Free(), "mask": Flags(), "normalizer": NORMALIZER},
    ),
    Case(
        "reward.imitation.DWBC",
        imitation.DWBC,
        {"eta": 0.5, "alpha": 7.5, "clip": 0.1, "cut": 0.5},
        {"eta": INSIDE, "alpha": WEIGHT, "clip": Real(0.0, 0.5, open_low=True, open_high=True), "cut": UNIT},
    ),
    Case(
        "reward.imitation.DWBC.weights",
        DWBC.weights,
        {"probability": t(0.2, 0.7), "expert": PAIRS},
        {"probability": RATES, "expert": Flags()},
    ),
    Case("reward.imitation.DWBC.negative", DWBC.negative, {"weight": t(1, -1)}, {"weight": ANY}),
    Case("reward.ivl.IVL", ivl.IVL, {"alpha": 1.0}, {"alpha": WEIGHT}),
    Case(
        "reward.ivl.IVL.loss",
        ivl.IVL(alpha=1.0).loss,
        {"residual": t(1, 2), "group_ids": ids(0, 0), "num_groups": 1, "normalizer": 2.0},
        {"residual": Free(), "group_ids": Ids(0, 0), "num_groups": Whole(0, good=(1,)), "normalizer": NORMALIZER},
    ),
    Case(
        "reward.pairwise.bradley_terry",
        pairwise.bradley_terry,
        {"chosen": t(1, 2), "rejected": t(0, 1), "margin": 0.5},
        {"chosen": Free(), "rejected": Free(), "margin": FINITE},
    ),
    Case(
        "reward.pairwise.pair_consistency",
        pairwise.pair_consistency,
        {"score": t(1, 2), "counterfactual": t(0, 1)},
        {"score": Free(), "counterfactual": Free()},
    ),
    Case("reward.parl.PARL", parl.PARL, {"beta": 0.1}, {"beta": POSITIVE}),
    Case("reward.parl.PARL.coefficient", parl.PARL().coefficient, {"utility": t(-1, -2)}, {"utility": Free()}),
    Case(
        "reward.parl.PARL.loss",
        parl.PARL().loss,
        {"first": t(1, 2), "second": t(0, 1), "label": t(1, 0), "expected": t(1, 1), "normalizer": 2.0},
        {"first": Free(), "second": Free(), "label": RATES, "expected": Free(), "normalizer": NORMALIZER},
    ),
    Case(
        "reward.ugda.UGDARefinement",
        ugda.UGDARefinement,
        {"levels": 5, "noise_std": 0.1, "seed": 0},
        {"levels": Whole(2), "noise_std": WEIGHT, "seed": SEED},
    ),
    Case(
        "reward.ugda.UGDARefinement.targets",
        ugda.UGDARefinement().targets,
        {"logged": FEATURES, "score": ids(1, 5), "step": 0},
        {"logged": ANY, "score": Ids(1, 5), "step": SEED},
    ),
    Case(
        "reward.ugda.UGDARefinement.loss",
        ugda.UGDARefinement().loss,
        {"reward": FEATURES, "target": FEATURES + 1, "normalizer": 2.0},
        {"reward": Free(), "target": Free(), "normalizer": NORMALIZER},
    ),
]

ROWS = [
    pytest.param(case, path, one, id=f"{case.name}-{path}-{type(one).__name__}")
    for case in TABLE
    for path, spec in case.ranges.items()
    for one in (spec if isinstance(spec, tuple) else (spec,))
]
# The message may name the quantity that is computed from the argument.
SAYS = {"moments": r"exp_avg\w*"}

# --------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize(("case", "path", "allowed"), ROWS)
def test_every_number_is_checked_against_its_range(case: Case, path: str, allowed: Range):
    tensor = not isinstance(allowed, Real | Whole) or isinstance(allowed, Elements)
    case.call(**case.given)
    for value in allowed.accepted():
        case.call(**with_part(case, path, tensor, value))
    name = re.match(r"\w+", path)[0]
    for value in allowed.rejected():
        with pytest.raises((ValueError, TypeError)) as caught:
            case.call(**with_part(case, path, tensor, value))
            pytest.fail(f"{case.name}: {path} = {value!r} was accepted")
        # The template: op, argument, requirement, actual value, next step.
        template = rf"^[\w.]+: .*\b{SAYS.get(name, name)}\b.* must be .+; got .+\. .+\.$"
        assert re.search(template, str(caught.value)), f"{path} = {value!r}: {caught.value}"
    if isinstance(allowed, Free):
        out = case.call(**with_part(case, path, True, NAN))
        parts = out if isinstance(out, tuple) else (out,)
        assert any(bool(part.isnan().any()) for part in parts), "the NaN is hidden"


PACKAGES = ("curation", "causal", "reward", "influence")
NUMERIC = re.compile(r"\b(int|float|Tensor|Choice|Hint|ThreePL)\b")


def public_callables():
    """Yield (name, function or class) of all public ones. A class that is a tuple is a result, not a call."""
    for package in PACKAGES:
        top = importlib.import_module(f"tokfuse.algorithms.{package}")
        below = pkgutil.iter_modules(getattr(top, "__path__", []), top.__name__ + ".")
        for name in [top.__name__, *(module.name for module in below)]:
            module = importlib.import_module(name)
            prefix = name.removeprefix("tokfuse.algorithms.")
            for key, found in vars(module).items():
                if key.startswith(("_", "check_")) or getattr(found, "__module__", None) != name:
                    continue
                if inspect.isfunction(found) or (inspect.isclass(found) and not issubclass(found, tuple)):
                    yield f"{prefix}.{key}", found
                if inspect.isclass(found):
                    for inner, function in vars(found).items():
                        if inspect.isfunction(function) and not inner.startswith("_"):
                            yield f"{prefix}.{key}.{inner}", function


def numeric_arguments(function: Callable[..., Any]) -> set[str]:
    """Return the arguments that hold numbers. A function that the caller passes is not one."""
    return {
        name
        for name, parameter in inspect.signature(function).parameters.items()
        if "Callable" not in str(parameter.annotation) and NUMERIC.search(str(parameter.annotation))
    }


def test_the_table_has_every_public_number():
    expected = {name: numeric_arguments(function) for name, function in public_callables()}
    assert sum(map(len, expected.values())) > 150
    written: dict[str, set[str]] = {}
    for case in TABLE:
        heads = {re.match(r"\w+", path)[0] for path in case.ranges}
        written[case.name] = written.get(case.name, set()) | heads
    missing = {name: args - written.get(name, set()) for name, args in expected.items()}
    assert not {name: args for name, args in missing.items() if args}
    assert not {name: heads - expected[name] for name, heads in written.items() if heads - expected[name]}


# ------------------------------------------------------------------------------ rules that a range cannot say


def test_gaps_in_subtask_ids_add_no_subtask():
    """Trap: a subtask without samples has the score 0, which is above a negative cosine."""
    train, valid = [-FEATURES[:1]], [torch.stack([FEATURES[0], FEATURES[0] * 2])]
    for average in ("cosine", "gradient"):
        dense = influence.less_scores(train, valid, subtask=ids(0, 1), average=average)
        assert float(dense[0]) == pytest.approx(-1.0)
        for sparse in (ids(0, 5), ids(7, 2), ids(-3, 4), ids(9, 9)):
            found = influence.less_scores(train, valid, subtask=sparse, average=average)
            assert torch.equal(found, dense)
    assert influential.LESS().scores(train, valid, subtask=ids(1, 3)).tolist() == pytest.approx([-1.0])


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_selector_names_the_sample_that_is_not_finite(bad: float):
    broken = FEATURES.clone()
    broken[1, 0] = bad
    calls = {
        "train": lambda: influential.LESS(fraction=1.0).select([broken], [FEATURES]),
        "features": lambda: influential.GREATS(k=2, lr=0.1).select(broken, FEATURES),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match=f"norms of {name} must be finite and in .* got (nan|inf) at 1"):
            call()
    with pytest.raises(ValueError, match=r"rewards must be finite and in .* at \[1, 0\]"):
        influence.ugda_select(broken, t(1, 2))
    with pytest.raises(ValueError, match="sigma must be finite and in .* at 1"):
        CURES.quota(t(1, bad), 4)


@pytest.mark.parametrize(
    "call",
    [
        lambda empty: influential.LESS().select([FEATURES], [empty]),
        lambda empty: influential.UGDA().select(torch.eye(3), [FEATURES], [empty], moments=[MOMENTS]),
        lambda empty: influential.GREATS(k=1, lr=0.1).select(FEATURES, empty),
    ],
)
def test_an_empty_validation_set_is_refused(call: Callable[..., Any]):
    with pytest.raises(ValueError, match="validation must be of at least 1 sample; got none. Pass one gradient"):
        call(FEATURES[:0])


@pytest.mark.parametrize("rounding", ["exact", "code"])
def test_quotas_are_integers_of_at_least_the_minimum(rounding: str):
    method = cures.CurES(prompts=3, tau=0.1, rounding=rounding, minimum=1)
    for sigma in (t(0, 0, 0), t(1e-300, 1e300, 0), t(5, 5, 5)):
        quota = method.quota(sigma, 10)
        assert quota.dtype == torch.int64 and int(quota.min()) >= 1
    with pytest.raises(ValueError, match="sigma must be finite and in .* got -1.0 at 0"):
        method.quota(t(-1, 1, 1), 10)


def test_a_refused_outcome_leaves_the_state_as_it_was():
    before = DRO.observe(DRO.initial_state(), t(1, 2))
    for bad in (INF, -INF):
        with pytest.raises(ValueError, match="risk must be finite"):
            DRO.observe(before, t(bad, 1))
    after = DRO.observe(before, t(NAN, 1))
    assert float(DRO.weights(after).sum()) == pytest.approx(1.0)
    state = ARMS.observe(ARMS.initial_state(), CHOICE, 1.0)
    for reward, residual in ((NAN, 0.0), (1.0, NAN), (INF, None)):
        with pytest.raises(ValueError, match="must be a finite number"):
            ARMS.observe(state, CHOICE, reward, residual)
    assert state == ARMS.observe(ARMS.initial_state(), CHOICE, 1.0)
    assert ARMS.means(state).tolist() == [1.0, 0.0]


def test_results_of_the_callers_functions_are_checked():
    for call in (shapley.shapley_exact, shapley.shapley_monte_carlo):
        with pytest.raises(ValueError, match=r"value\(set\) must be a finite number"):
            call(lambda members: NAN, 2)
    with pytest.raises(ValueError, match="similarity.* must be a finite number"):
        TB.resilience(["a"], 0, lambda prefix: ["b"], lambda sentence, candidates: [NAN])


def test_linear_calibration_needs_a_positive_slope():
    for predicted in (t(3, 2, 1), t(1, 2, 1)):
        with pytest.raises(ValueError, match="predicted must be positively correlated with the truth; got slope"):
            LCC.fit(predicted, t(1, 2, 3))
    assert set(TWEEDIE.fit(t(3, 2, 1), t(1, 2, 3))) == {"points", "bandwidth", "noise"}


def test_weights_in_place_of_propensities():
    loss, seen, p = t(1, 2, 4), flags(True, True, False), t(0.5, 0.25, 0.8)
    for form, extra in (("ips", {}), ("snips", {}), ("dr", {"imputed": t(1, 1, 3)})):
        method = PL(form=form)
        by_weight = method.loss(loss, seen, weight=1 / p, **extra)
        assert float(by_weight) == pytest.approx(float(method.loss(loss, seen, p, **extra)))
    found = correction.imputation_loss(loss, t(0, 0, 0), seen, weight=1 / p)
    assert torch.allclose(found, correction.imputation_loss(loss, t(0, 0, 0), seen, p))
    assert float(PL().loss(loss, seen, weight=t(0.25, 0, 9))) == pytest.approx(0.25 / 3)  # a weight below 1
    for both in ({}, {"propensity": p, "weight": p}):
        with pytest.raises(ValueError, match="propensity or weight must be given, exactly one"):
            PL().loss(loss, seen, **both)
    with pytest.raises(ValueError, match="clip must be left out with weight"):
        PL(clip=0.1).loss(loss, seen, weight=p)
