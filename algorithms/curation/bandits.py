"""Choosing among a few arms (prompts, hints, clip ranges) and logging with what probability.

    method = tokfuse.algorithms.make("squarecb", arms=3)
    choice = method.choose(state)
    state = method.observe(state, choice, reward)

A log of choices holds propensities, so `tokfuse.ope` can value another policy from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import check_number, check_vector
from tokfuse.runtime.core.errors import refuse


class Choice(NamedTuple):
    """One decision, as a log keeps it."""

    arm: int
    propensity: float
    probabilities: list[float]


def squarecb_probabilities(cost: torch.Tensor, gamma: float) -> torch.Tensor:
    """p(a) = 1 / (K + gamma (cost_a - cost_min)) for all but the cheapest arm, which has the rest.

    So 1 / p(a) <= K + gamma * gap: importance weights are bounded. Of equal cheapest arms the first
    has the rest.

    Args:
        cost: (arms,), predicted cost; lower is better. gamma: >= 0; 0 is uniform.

    Returns:
        (arms,) float64, sum 1.

    Source: SquareCB as in Vowpal Wabbit (cb_explore_adf_squarecb). Exact.
    """
    check_vector("squarecb_probabilities", "cost", cost)
    check_number("squarecb_probabilities", "gamma", gamma, 0.0)
    if cost.numel() == 0:
        raise refuse("squarecb_probabilities", "cost", "of at least one arm", "none", "Add one.")
    gap = cost.double() - cost.double().min()
    p = 1.0 / (cost.shape[0] + gamma * gap)
    best = int(cost.argmin())
    p[best] = 0.0
    p[best] = 1.0 - p.sum()
    return p


@dataclass(frozen=True, kw_only=True)
class Arms(Stateful):
    """Means of what each arm has given, and the number of decisions so far."""

    arms: int = 0

    def __post_init__(self) -> None:
        check_number(self._op, "arms", self.arms, 1)

    def initial_state(self) -> State:
        """No decision yet."""
        zero = [0.0] * self.arms
        return {"pulls": [0] * self.arms, "reward": zero, "residual": zero, "step": 0}

    def observe(self, state: State, choice: Choice, reward: float, residual: float | None = None) -> State:
        """The state with the outcome of a choice added. residual: constraint violation, > 0 bad."""
        if not 0 <= choice.arm < self.arms:
            raise refuse(self._op, "choice.arm", f"in [0, {self.arms})", choice.arm, "Pass what choose returned.")
        added = {"pulls": 1, "reward": float(reward), "residual": float(residual or 0.0)}
        out = {"step": state["step"] + 1}
        for key, value in added.items():
            out[key] = [x + value * (i == choice.arm) for i, x in enumerate(state[key])]
        return out

    def means(self, state: State, key: str = "reward") -> torch.Tensor:
        """(arms,) float64; 0 for an arm that was never taken."""
        total = torch.tensor(state[key], dtype=torch.float64)
        return total / torch.tensor(state["pulls"]).clamp_min(1)


@register(
    "squarecb",
    kind="selection",
    system="Adyen bandits",
    label="utility",
    source="arXiv 2412.00569; Vowpal Wabbit's rule",
    summary="explores by inverse gap of predicted costs, with logged propensities",
    required=("arms",),
    differs=(
        "The rule is Vowpal Wabbit's; that Adyen uses it comes from an aggregator. The predicted "
        "cost is minus the arm's mean, or the caller's regression. Their warning stands: watch "
        "`generation_report` from generation to generation."
    ),
)
@dataclass(frozen=True, kw_only=True)
class SquareCB(Arms):
    """p(a) = 1 / (K + gamma gap_a), the rest on the best arm; gamma = scale n^power. Utility.

    Args:
        arms: K. scale: g0 >= 0. power: >= 0 (0.5 in VW). seed: of the draws.

    State: pulls, sums of reward and residual, decisions.
    """

    scale: float = 10.0
    power: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "scale", self.scale, 0.0)
        check_number(self._op, "power", self.power, 0.0)

    def choose(self, state: State, cost: torch.Tensor | None = None) -> Choice:
        """The arm of decision state["step"]. cost: (arms,), predicted for this context."""
        if cost is None:
            cost = -self.means(state)
        elif cost.shape != (self.arms,):
            raise refuse(
                self._op,
                "cost",
                f"of shape ({self.arms},), one per arm",
                f"shape {tuple(cost.shape)}",
                "Predict every arm.",
            )
        p = squarecb_probabilities(cost, self.scale * max(1, state["step"]) ** self.power)
        place = draws(self.seed, state["step"]).random()
        arm = min(int((p.cumsum(0) <= place).sum()), self.arms - 1)
        return Choice(arm, float(p[arm]), p.tolist())


@register(
    "ofs",
    kind="selection",
    system="OFS",
    label="utility",
    source="arXiv 2512.22313, from its abstract",
    summary="best optimistic reward among arms that may satisfy a constraint",
    required=("arms",),
    differs=(
        "Reconstructed from the abstract; the constant of the confidence width is unknown. Without "
        "the constraint it is UCB. Deterministic: propensities are 0 and 1, which no importance "
        "weight can correct."
    ),
)
@dataclass(frozen=True, kw_only=True)
class OFS(Arms):
    """beta = width sqrt(log t / n). Of the arms with mean residual - beta <= 0 take the largest
    mean reward + beta; without one, the smallest mean residual - beta. Unseen arms first. Utility.

    Args:
        arms: number of arms. width: c >= 0.

    State: pulls, sums of reward and residual, decisions. The first of equal arms is taken.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "width", self.width, 0.0)

    def choose(self, state: State) -> Choice:
        """The arm of the next decision."""
        pulls = torch.tensor(state["pulls"], dtype=torch.float64)
        if bool((pulls == 0).any()):
            arm = int((pulls == 0).int().argmax())
        else:
            beta = self.width * (math.log(max(1, state["step"])) / pulls).sqrt()
            optimistic = self.means(state, "residual") - beta
            if bool((optimistic <= 0).any()):
                upper = self.means(state) + beta
                arm = int(upper.masked_fill(optimistic > 0, -math.inf).argmax())
            else:
                arm = int(optimistic.argmin())
        return Choice(arm, 1.0, [float(i == arm) for i in range(self.arms)])


class GenerationReport(NamedTuple):
    """Of the log of one generation of a policy."""

    effective_sample_size: float
    shares: list[float]


def generation_report(log: Sequence[Choice], target: Sequence[Sequence[float]]) -> GenerationReport:
    """Is the log of one policy fit to learn or evaluate the next one from?

    Args:
        log: choices. target: per choice, the probabilities of the policy to be evaluated.

    Returns:
        Effective sample size (sum w)^2 / sum w^2 of w = target / propensity, and the share of each
        arm. Shares that lose an arm, or a size far below len(log), warn of degrading generations.
    """
    if len(log) != len(target) or not log:
        raise refuse(
            "generation_report",
            "target",
            "one row per choice, at least one",
            f"{len(target)} for {len(log)}",
            "Score every logged choice.",
        )
    w = torch.tensor([row[c.arm] / c.propensity for c, row in zip(log, target, strict=True)], dtype=torch.float64)
    square = float(w.square().sum())
    arms = torch.bincount(torch.tensor([c.arm for c in log]), minlength=len(log[0].probabilities))
    size = float(w.sum()) ** 2 / square if square > 0 else 0.0
    return GenerationReport(size, (arms.double() / len(log)).tolist())
