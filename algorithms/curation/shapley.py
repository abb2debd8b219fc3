"""Shapley values of a set function, exact and by sampled permutations; and the blame graph of CDC-MAS."""

import itertools
import math
from collections.abc import Callable, Hashable, Iterable
from typing import NamedTuple

import numpy as np
import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_integer, check_number

Value = Callable[[frozenset[int]], float]
MOST_PLAYERS = 16  # 65,536 calls of the value function


class Estimate(NamedTuple):
    """Monte-Carlo estimates and their standard errors, (players,) float64 each."""

    value: torch.Tensor
    standard_error: torch.Tensor


def shapley_exact(value: Value, players: int) -> torch.Tensor:
    """Return phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! (v(S + i) - v(S)).

    Args:
        value: v, a function of a frozenset of players 0 .. n - 1 with a finite result. It is called once for each
            of the 2^n sets.
        players: n, in [0, 16].

    Returns:
        (players,) float64. The values add up to v(all) - v(none).

    Source: Shapley; the attribution of CDC-MAS (arXiv 2509.08682). Utility.
    """
    check_integer("shapley_exact", "players", players, 0, MOST_PLAYERS)
    sets = (frozenset(i for i in range(players) if mask >> i & 1) for mask in range(2**players))
    worth = [check_number("shapley_exact", "value(set)", value(members), -math.inf) for members in sets]
    share = [1 / (players * math.comb(players - 1, size)) for size in range(players)]
    phi = torch.zeros(players, dtype=torch.float64, device="cpu")
    for i, mask in itertools.product(range(players), range(2**players)):
        if not mask >> i & 1:
            phi[i] += share[mask.bit_count()] * (worth[mask | 1 << i] - worth[mask])
    return phi


def shapley_monte_carlo(value: Value, players: int, *, permutations: int = 200, seed: int = 0) -> Estimate:
    """Return the mean marginal contribution over random orders. Unbiased; the values add up to v(all) - v(none).

    Args:
        value: v, a function of a frozenset of players with a finite result. Values of repeated sets are cached.
        players: n >= 0.
        permutations: number of random orders, >= 2, with at most n calls each.
        seed: seed of the orders, >= 0.

    Source: permutation sampling of the Shapley value; CDC-MAS (arXiv 2509.08682). Utility.
    """
    check_integer("shapley_monte_carlo", "players", players, 0)
    check_integer("shapley_monte_carlo", "permutations", permutations, 2)
    check_integer("shapley_monte_carlo", "seed", seed, 0)
    known: dict[frozenset[int], float] = {}

    def worth(members: frozenset[int]) -> float:
        if members not in known:
            known[members] = check_number("shapley_monte_carlo", "value(set)", value(members), -math.inf)
        return known[members]

    rng = np.random.default_rng(seed)
    gain = torch.zeros(permutations, players, dtype=torch.float64, device="cpu")
    for row in gain:
        members: frozenset[int] = frozenset()
        for i in rng.permutation(players).tolist():
            larger = members | {i}
            row[i] = worth(larger) - worth(members)
            members = larger
    return Estimate(gain.mean(0), gain.std(0) / math.sqrt(permutations))


@register(
    "cdc_mas",
    kind="selection",
    system="CDC-MAS",
    label="utility",
    source="Shapley values; arXiv 2509.08682 from two notes",
    summary="blame of agents: mean marginal repair over random orders, with standard errors",
    differs=(
        "Only the Shapley part. v(S), the outcome with the agents of S repaired, is an assumption, and "
        "the caller must evaluate it. The step discovery was not found. "
        "`shapley.performance_graph` gives the edges."
    ),
)
def agent_blame(repaired: Value, agents: int, *, permutations: int = 200, seed: int = 0) -> Estimate:
    """Return `shapley_monte_carlo` of v(S) = outcome if the agents in S are repaired. Utility.

    Args:
        repaired: v, a function of a frozenset of agents with a finite result.
        agents: n >= 0.
        permutations: number of random orders, >= 2.
        seed: seed of the orders, >= 0.
    """
    check_integer("algorithms.cdc_mas", "agents", agents, 0)
    return shapley_monte_carlo(repaired, agents, permutations=permutations, seed=seed)


def performance_graph(dependencies: Iterable[tuple[Hashable, Hashable]]) -> list[tuple[Hashable, Hashable]]:
    """Return the edges (cause, effect) of bad performance: every dependency (consumer, provider) reversed.

    If A passed bad data to B, then B depends on A, and the result contains (A, B). The sources state the direction
    inconsistently; this is the direction of the result.
    """
    return [(provider, consumer) for consumer, provider in dependencies]
