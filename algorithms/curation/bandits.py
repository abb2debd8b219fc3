"""Choice among a few arms (prompts, hints, clip ranges), with logged probabilities of the choices.

    method = tokfuse.algorithms.make("squarecb", arms=3)
    choice = method.choose(state)
    state = method.observe(state, choice, reward)

The log of choices contains propensities, so `tokfuse.ope` can estimate the value of another policy from it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful, draws
from tokfuse.runtime.core.checks import Rows, check_integer, check_number, check_values, check_vector
from tokfuse.runtime.core.errors import refuse


class Choice(NamedTuple):
    """The log entry of one decision: the arm, its probability, and the probabilities of all arms."""

    arm: int
    propensity: float
    probabilities: list[float]


def squarecb_probabilities(cost: torch.Tensor, gamma: float) -> torch.Tensor:
    """Return p(a) = 1 / (K + gamma (cost_a - cost_min)) for all arms but the cheapest, which gets the rest.

    Therefore 1 / p(a) <= K + gamma * gap, and importance weights are bounded. Of equal cheapest arms the first gets the
    rest.

    Args:
        cost: (arms,), finite, predicted cost; lower is better.
        gamma: >= 0; 0 is uniform.

    Returns:
        (arms,) float64, sum 1.

    Source: SquareCB as in Vowpal Wabbit (cb_explore_adf_squarecb). Exact.
    """
    check_vector("squarecb_probabilities", "cost", cost)
    check_number("squarecb_probabilities", "gamma", gamma, 0.0)
    if cost.numel() == 0:
        raise refuse("squarecb_probabilities", "cost", "of at least one arm", "none", "Pass the cost of every arm.")
    check_values("squarecb_probabilities", "cost", cost, always=True)
    gap = cost.double() - cost.double().min()
    p = 1.0 / (cost.shape[0] + gamma * gap)
    best = int(cost.argmin())
    p[best] = 0.0
    p[best] = 1.0 - p.sum()
    return p


@dataclass(frozen=True, kw_only=True)
class Arms(Stateful):
    """Base class: the mean outcome of each arm, and the number of decisions so far."""

    arms: int = 0

    def __post_init__(self) -> None:
        check_integer(self._op, "arms", self.arms, 1)

    def initial_state(self) -> State:
        """Return the state before the first decision."""
        zero = [0.0] * self.arms
        return {"pulls": [0] * self.arms, "reward": zero, "residual": zero, "step": 0}

    def observe(self, state: State, choice: Choice, reward: float, residual: float | None = None) -> State:
        """Return the state with the outcome of a choice added.

        Args:
            state: the state before.
            choice: what `choose` returned.
            reward: outcome of the choice, finite.
            residual: violation of a constraint, finite; > 0 violates it. None: 0.

        Raises:
            ValueError: an unknown arm, or an outcome that is not finite. One NaN would stay in the arm's mean for ever.
        """
        arm = check_integer(self._op, "choice.arm", choice.arm, 0, self.arms - 1)
        reward = check_number(self._op, "reward", reward, -math.inf)
        residual = check_number(self._op, "residual", 0.0 if residual is None else residual, -math.inf)
        added = {"pulls": 1, "reward": reward, "residual": residual}
        out = {"step": state["step"] + 1}
        for key, value in added.items():
            out[key] = [x + value * (i == arm) for i, x in enumerate(state[key])]
        return out

    def means(self, state: State, key: str = "reward") -> torch.Tensor:
        """Return the mean outcome of each arm, (arms,) float64. An arm that was never chosen: 0."""
        total = torch.tensor(state[key], dtype=torch.float64, device="cpu")
        return total / torch.tensor(state["pulls"], device="cpu").clamp_min(1)


@register(
    "squarecb",
    kind="selection",
    system="Adyen bandits",
    label="utility",
    source="arXiv 2412.00569; Vowpal Wabbit's rule",
    summary="explores by the inverse gap of predicted costs, with logged propensities",
    required=("arms",),
    differs=(
        "The rule is Vowpal Wabbit's. That Adyen uses it comes from an aggregator. The predicted cost "
        "is minus the arm's mean, or the caller's regression. The paper warns of degrading "
        "generations: check `generation_report` for every generation."
    ),
)
@dataclass(frozen=True, kw_only=True)
class SquareCB(Arms):
    """p(a) = 1 / (K + gamma gap_a), and the best arm gets the rest; gamma = scale n^power. Utility.

    Args:
        arms: K, number of arms.
        scale: g0 >= 0.
        power: exponent of the number of decisions n, >= 0 (0.5 in Vowpal Wabbit).
        seed: seed of the draws, >= 0.

    State: number of pulls, sum of rewards and of residuals of each arm, and the number of decisions.
    """

    scale: float = 10.0
    power: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "scale", self.scale, 0.0)
        check_number(self._op, "power", self.power, 0.0)
        check_integer(self._op, "seed", self.seed, 0)

    def choose(self, state: State, cost: torch.Tensor | None = None) -> Choice:
        """Return the arm of the next decision.

        Args:
            state: the current state.
            cost: (arms,), finite, predicted cost in this context. None: minus the mean reward of each arm.
        """
        if cost is None:
            cost = -self.means(state)
        check_vector(self._op, "cost", cost, Rows(self.arms, "arms", cost.device))
        check_values(self._op, "cost", cost, always=True)
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
    summary="the best optimistic reward among arms that may satisfy a constraint",
    required=("arms",),
    differs=(
        "Reconstructed from the abstract; the constant of the confidence width is unknown. Without "
        "the constraint it is UCB. It is deterministic: propensities are 0 and 1, which importance "
        "weights cannot correct."
    ),
)
@dataclass(frozen=True, kw_only=True)
class OFS(Arms):
    """Optimistic choice under a constraint, with the confidence width beta = width sqrt(log t / n). Utility.

    Of the arms with mean residual - beta <= 0, the one with the largest mean reward + beta is chosen; if there
    is none, the one with the smallest mean residual - beta. Arms that were never chosen come first.
    Of equal arms the first wins.

    Args:
        arms: number of arms.
        width: factor c of the confidence width, >= 0.

    State: number of pulls, sum of rewards and of residuals of each arm, and the number of decisions.
    """

    width: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "width", self.width, 0.0)

    def choose(self, state: State) -> Choice:
        """Return the arm of the next decision."""
        pulls = torch.tensor(state["pulls"], dtype=torch.float64, device="cpu")
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
    """Summary of the log of one generation of a policy."""

    effective_sample_size: float
    shares: list[float]


def generation_report(log: Sequence[Choice], target: Sequence[Sequence[float]]) -> GenerationReport:
    """Return whether the log of one policy is suited to train or evaluate the next one.

    Args:
        log: the choices, each with a propensity in (0, 1].
        target: for each choice, the probabilities of the policy to evaluate, in [0, 1].

    Returns:
        The effective sample size (sum w)^2 / sum w^2 of w = target / propensity, and the share of each arm. If
        an arm's share falls to 0, or the size is far below len(log), the generations degrade.
    """
    op = "generation_report"
    if len(log) != len(target) or not log:
        raise refuse(
            op,
            "target",
            "one row per choice, at least one",
            f"{len(target)} for {len(log)}",
            "Score every logged choice.",
        )
    arms = len(log[0].probabilities)
    weight = []
    for i, (c, row) in enumerate(zip(log, target, strict=True)):
        check_integer(op, f"log[{i}].arm", c.arm, 0, arms - 1)
        check_number(op, f"log[{i}].propensity", c.propensity, 0.0, 1.0, open_low=True)
        if len(row) != arms:
            raise refuse(op, "target", f"of {arms} probabilities per choice", len(row), "Score every arm.")
        weight.append([check_number(op, f"target[{i}]", p, 0.0, 1.0) for p in row][c.arm] / c.propensity)
    w = torch.tensor(weight, dtype=torch.float64, device="cpu")
    square = float(w.square().sum())
    pulls = torch.bincount(torch.tensor([c.arm for c in log], device="cpu"), minlength=arms)
    size = float(w.sum()) ** 2 / square if square > 0 else 0.0
    return GenerationReport(size, (pulls.double() / len(log)).tolist())
