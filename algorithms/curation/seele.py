"""SEELE: chooses how much of a reference solution to show, such that half of the rollouts succeed.

    method = tokfuse.algorithms.make("seele")
    for _ in range(method.rounds):
        hint = method.hint(state, prompt, units)  # show hint.length units of the solution
        state = method.observe(state, prompt, units, hint, mean_reward_of_its_rollouts)

The rollouts continue the hint. `masks` excludes the hint's tokens from the policy loss.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import (
    INTS,
    Rows,
    check_cu_seqlens,
    check_integer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse

Bounds = tuple[tuple[float, float], tuple[float, float], tuple[float, float]]
BOUNDS: Bounds = ((0.1, 50.0), (-1.5, 0.5), (0.0, 0.99))


class ThreePL(NamedTuple):
    """f(rate) = b + (1 - b) / (1 + exp(-k (rate + mu)))."""

    k: float
    mu: float
    b: float

    def accuracy(self, rate: float) -> float:
        """Return the expected accuracy at a hint rate, in [0, 1]."""
        check_number("ThreePL", "rate", rate, 0.0, 1.0)
        return self.b + (1 - self.b) / (1 + math.exp(min(700.0, -self.k * (rate + self.mu))))


class Hint(NamedTuple):
    """The part of the solution to show: its share, and its number of units."""

    rate: float
    length: int


def fit_3pl(rates: Sequence[float], accuracies: Sequence[float], *, bounds: Bounds = BOUNDS) -> ThreePL:
    """Return the least-squares fit of the three-parameter logistic over the distinct rates.

    min over (k, mu, b) of sum_j (f(p_j) - mean accuracy of the rounds at p_j)^2. The points (0, 0) and (1, 1) are added
    if these rates have not been tried. Without them, rounds that are all correct or all wrong leave the fit
    undetermined.

    Args:
        rates: hint rates in [0, 1], one per round. Repeated rates are averaged.
        accuracies: in [0, 1], one per round.
        bounds: (low, high) of k > 0, of mu, and of b in [0, 1), with low < high. The paper states none; one of its
            plotted fits ends at k = 50.

    Returns:
        The best of three fits from fixed starting points (of equal ones the first), so it is deterministic.

    Raises:
        ValueError: wrong lengths, values outside [0, 1], wrong bounds.
        ImportError: scipy is missing.

    Source: SEELE (arXiv 2509.06923), its model, pseudo-points and trust-region solver. Exact.
    """
    op = "fit_3pl"
    if len(rates) != len(accuracies):
        raise refuse(op, "accuracies", f"one per rate, {len(rates)}", len(accuracies), "Pass one accuracy per rate.")
    for name, values in (("rates", rates), ("accuracies", accuracies)):
        for value in values:
            check_number(op, name, value, 0.0, 1.0)
    _check_bounds(op, bounds)
    solve = _least_squares()
    points: dict[float, list[float]] = {}
    for rate, accuracy in zip(rates, accuracies, strict=True):
        points.setdefault(float(rate), []).append(float(accuracy))
    points.setdefault(0.0, [0.0])
    points.setdefault(1.0, [1.0])
    x = np.array(sorted(points))
    y = np.array([sum(points[rate]) / len(points[rate]) for rate in sorted(points)])

    def residual(theta: np.ndarray) -> np.ndarray:
        k, mu, b = theta
        gap: np.ndarray = b + (1 - b) / (1 + np.exp(np.minimum(700.0, -k * (x + mu)))) - y
        return gap

    lowest, highest = (np.array([bound[i] for bound in bounds]) for i in range(2))
    best = None
    for middle in (0.5, 0.25, 0.75):
        margin = 0.01 * (highest - lowest)
        start = np.clip([8.0, -middle, 0.05], lowest + margin, highest - margin)
        found = solve(
            residual, start, bounds=(lowest, highest), method="trf", ftol=1e-12, xtol=1e-12, gtol=1e-12, max_nfev=200
        )
        if best is None or found.cost < best.cost * (1 - 1e-9):
            best = found
    assert best is not None
    return ThreePL(*map(float, best.x))


def _check_bounds(op: str, bounds: Bounds) -> None:
    """Raise an error unless `bounds` holds an interval of k > 0, of mu, and of b in [0, 1), none of them empty."""
    if len(bounds) != 3:
        raise refuse(op, "bounds", "three pairs (low, high)", bounds, "Bound k, mu and b.")
    for i, (name, pair) in enumerate(zip(("k", "mu", "b"), bounds, strict=True)):
        for j, value in enumerate(pair):
            place = f"bounds[{i}][{j}]"
            if name == "k":
                check_number(op, place, value, 0.0, open_low=True)
            elif name == "mu":
                check_number(op, place, value, -math.inf)
            else:
                check_number(op, place, value, 0.0, 1.0, open_high=True)
        if len(pair) != 2 or not pair[0] < pair[1]:
            raise refuse(op, f"bounds[{i}], of {name},", "(low, high) with low < high", pair, "Pass a wider interval.")


def _least_squares():  # type: ignore[no-untyped-def]
    try:
        from scipy.optimize import least_squares
    except ImportError as error:
        raise ImportError("algorithms.seele: the fit needs scipy. Install tokfuse[selection] or scipy.") from error
    return least_squares


def invert_3pl(curve: ThreePL, target: float) -> float:
    """Return the rate in [0, 1] at which `curve` reaches `target`.

    p = -mu - ln((1 - b) / (target - b) - 1) / k, clamped. If b >= target, every rate gives more than the target; the
    result is 0, no hint.

    Args:
        curve: parameters with k > 0 and b in [0, 1).
        target: in (0, 1).

    Raises:
        ValueError: a parameter of the curve, or the target, outside its range.

    Source: SEELE (arXiv 2509.06923); the clamp and the case b >= target are additions.
    """
    op = "invert_3pl"
    check_number(op, "target", target, 0.0, 1.0, open_low=True, open_high=True)
    k = check_number(op, "curve.k", curve.k, 0.0, open_low=True)
    mu = check_number(op, "curve.mu", curve.mu, -math.inf)
    b = check_number(op, "curve.b", curve.b, 0.0, 1.0, open_high=True)
    if b >= target:
        return 0.0
    return min(1.0, max(0.0, -mu - math.log((1 - b) / (target - b) - 1) / k))


@register(
    "seele",
    kind="selection",
    system="SEELE",
    label="exact (paper)",
    source="arXiv 2509.06923 Eqs. 1-13, Algorithm 1, Table 2 (code not retrievable)",
    summary="hint length from a three-parameter logistic fitted online, such that half of the rollouts pass",
    differs=(
        "Not in the paper: the bounds of the parameters, the clamp to [0, 1], and no hint if b >= target. "
        "The recorded rate belongs to the whole number of units shown. The imitation term on hint "
        "tokens is a log-likelihood (the paper writes a probability)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class SEELE(Stateful):
    """Rounds of rollouts per prompt: fit accuracy over hint rate, then show the hint that should give `target`.

    Args:
        target: desired accuracy, in (0, 1).
        rounds: m, number of rounds per prompt and step, >= 1.
        rollouts: n, number of rollouts of each round, >= 1. The advantage is r - mean over all m n rollouts:
            `make("dr_grpo")` with one group id per prompt.
        imitation: gamma, weight of the log-likelihood of the hint tokens, >= 0.
        bounds: bounds of k, mu and b, see `fit_3pl`.

    State: for every prompt, (rate, accuracy) of the rounds of this step, and the last rate, with which the next epoch
    starts. A new prompt starts at (units - 1) / units.
    Source: paper, exact.
    """

    target: float = 0.5
    rounds: int = 4
    rollouts: int = 8
    imitation: float = 1e-3
    bounds: Bounds = BOUNDS

    def __post_init__(self) -> None:
        check_number(self._op, "target", self.target, 0.0, 1.0, open_low=True, open_high=True)
        check_integer(self._op, "rounds", self.rounds, 1)
        check_integer(self._op, "rollouts", self.rollouts, 1)
        check_number(self._op, "imitation", self.imitation, 0.0)
        _check_bounds(self._op, self.bounds)

    def initial_state(self) -> State:
        """Return the state before the first prompt."""
        return {"memory": {}, "last": {}}

    def hint(self, state: State, prompt: str, units: int) -> Hint:
        """Return the hint for the next round of a prompt whose solution has `units` >= 1 parts."""
        check_integer(self._op, "units", units, 1)
        rounds = state["memory"].get(prompt, [])
        if rounds:
            rate = invert_3pl(fit_3pl(*zip(*rounds, strict=True), bounds=self.bounds), self.target)
        else:
            rate = state["last"].get(prompt, (units - 1) / units)
        return Hint(rate, min(units, math.floor(rate * units + 0.5)))

    def observe(self, state: State, prompt: str, units: int, hint: Hint, accuracy: float) -> State:
        """Return the state after a round whose rollouts have the mean reward `accuracy`, in [0, 1].

        After `rounds` rounds the step is over, and the rounds of the prompt are deleted.

        Args:
            state: the state before.
            prompt: key of the prompt.
            units: number of parts of the solution, >= 1.
            hint: what `hint` returned: a rate in [0, 1], and a length in [0, units].
            accuracy: mean reward, in [0, 1].
        """
        check_integer(self._op, "units", units, 1)
        check_integer(self._op, "hint.length", hint.length, 0, units)
        check_number(self._op, "hint.rate", hint.rate, 0.0, 1.0)
        check_number(self._op, "accuracy", accuracy, 0.0, 1.0)
        rounds = [*state["memory"].get(prompt, []), [hint.length / units, float(accuracy)]]
        memory = {**state["memory"], prompt: rounds}
        if len(rounds) >= self.rounds:
            del memory[prompt]
        return {"memory": memory, "last": {**state["last"], prompt: hint.rate}}

    def masks(self, cu_seqlens: torch.Tensor, hint_tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (policy mask, imitation mask), (tokens,) bool each.

        The first hint_tokens of each sequence are the hint. The policy did not sample them, so it must not be rewarded
        for them.

        Args:
            cu_seqlens: (seqs + 1,), int32, offsets of hint + generated tokens.
            hint_tokens: (seqs,), int, number of hint tokens of each sequence, in [0, its length].
        """
        lengths = cu_seqlens.diff().long()
        check_cu_seqlens(self._op, cu_seqlens, int(lengths.sum()), cu_seqlens.device)
        check_vector(
            self._op, "hint_tokens", hint_tokens, Rows(lengths.shape[0], "cu_seqlens", cu_seqlens.device), INTS
        )
        check_values(self._op, "hint_tokens", hint_tokens, 0, always=True)
        if bool((hint_tokens > lengths).any()):
            raise refuse(
                self._op,
                "hint_tokens",
                "at most the length of each sequence",
                hint_tokens.tolist(),
                "Pass the number of hint tokens of every sequence.",
            )
        start = cu_seqlens[:-1].long().repeat_interleave(lengths)
        place = torch.arange(int(cu_seqlens[-1]), device=cu_seqlens.device) - start
        hint = place < hint_tokens.long().repeat_interleave(lengths)
        return ~hint, hint
