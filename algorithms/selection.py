"""Selections over a whole batch: top-K, quantiles, subsets of largest variance, covariances.

Deterministic: ties are broken as each docstring says. Across ranks only tables of a fixed size
travel (`World`), and every rank comes to the same decision.
"""

import math

import torch

from tokfuse.algorithms.batch import Batch, World
from tokfuse.runtime.errors import refuse
from tokfuse.runtime.reference.segments import groups_of

DIGIT = 8  # bits per pass of the radix selection: four gathers of 256 counts


def _key(score: torch.Tensor) -> torch.Tensor:
    """int64 in [0, 2^32) in the order of the float32 scores; NaN is the largest."""
    # -0.0 + 0.0 is 0.0, so that the two zeros tie.
    bits = (score.float() + 0.0).contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits + 2**31


def _threshold(key: torch.Tensor, k: int, world: World) -> tuple[int, int]:
    """(k-th largest key over all ranks, how many keys are larger); 1 <= k <= number of keys."""
    prefix, above = 0, 0
    for shift in range(32 - DIGIT, -1, -DIGIT):
        inside = key[(key >> (shift + DIGIT)) == prefix]
        digit = (inside >> shift) & (2**DIGIT - 1)
        counts = world.sum(torch.bincount(digit, minlength=2**DIGIT)).tolist()
        for value in range(2**DIGIT - 1, -1, -1):
            if above + counts[value] >= k:
                prefix = (prefix << DIGIT) | value
                break
            above += counts[value]
    return prefix, above


def top_mask(
    score: torch.Tensor, k: int, mask: torch.Tensor, world: World | None = None
) -> torch.Tensor:
    """The k largest scores of all ranks, among the rows with mask true.

    Args:
        score: (rows,), float; compared in float32.
        k: number over all ranks. As many as there are if there are fewer.
        mask: (rows,), bool.

    Returns:
        (rows,) bool. Of equal scores at the border the first are taken: lower rank, then lower row.
    """
    world = world or World()
    key = _key(score)
    total = int(world.sum(mask.sum()))
    if k <= 0 or total == 0:
        return torch.zeros_like(mask)
    if k >= total:
        return mask.clone()
    threshold, above = _threshold(key[mask], k, world)
    ties = mask & (key == threshold)
    before = int(world.all(ties.sum())[: world.rank].sum())
    first = ties & (ties.long().cumsum(0) <= k - above - before)
    return (mask & (key > threshold)) | first


def at_least_quantile(
    score: torch.Tensor, q: float, mask: torch.Tensor, world: World | None = None
) -> torch.Tensor:
    """Rows whose score is at least the q-quantile (linear interpolation) of all masked scores.

    Everything that ties with the smallest kept score is kept. No row: nothing.
    """
    world = world or World()
    if not 0.0 <= q <= 1.0:
        raise refuse("at_least_quantile", "q", "in [0, 1]", q, "It is a quantile.")
    key, total = _key(score), int(world.sum(mask.sum()))
    if total == 0:
        return torch.zeros_like(mask)
    # The quantile lies between two ranks; x >= it holds from the upper of the two on. A position
    # that is an integer but for rounding is that integer.
    place = q * (total - 1)
    rank = round(place) if abs(place - round(place)) < 1e-9 * total else math.ceil(place)
    threshold, _ = _threshold(key[mask], total - rank, world)
    return mask & (key >= threshold)


def max_variance_subset(value: torch.Tensor, k: int) -> torch.Tensor:
    """The k of n values with the largest variance: always some i largest and the k - i smallest.

    One scan over i with prefix sums, O(n log n). Of equal variances the smallest i wins; of equal
    values the first rows count as smaller. Exact (in float64).

    Args:
        value: (n,), float. Read on the host.
        k: size of the subset; all when k >= n.

    Returns:
        (n,) bool.
    """
    n = value.shape[0]
    if k < 1:
        raise refuse("max_variance_subset", "k", ">= 1", k, "Keep at least one value.")
    if k >= n:
        return torch.ones_like(value, dtype=torch.bool)
    x, order = value.double().sort(stable=True)
    # Centred, because sums of squares lose the digits of mean / deviation.
    x = x - x.mean()
    zero = x.new_zeros(1)
    first, second = (torch.cat([zero, v.cumsum(0)]) for v in (x, x * x))
    i = torch.arange(k + 1, device=x.device)
    total, square = (p[k - i] + p[n] - p[n - i] for p in (first, second))
    variance = square / k - (total / k) ** 2
    # A difference below the rounding of the sums is a tie.
    tie = 1e-12 * variance.max().clamp(min=1e-300)
    best = int((variance >= variance.max() - tie).nonzero()[0])
    keep = torch.zeros(n, dtype=torch.bool, device=x.device)
    keep[order[: k - best]] = True
    keep[order[n - best :]] = True
    return keep


def max_variance_in_groups(value: torch.Tensor, group_ids: torch.Tensor, k: int) -> torch.Tensor:
    """`max_variance_subset` of size k inside every group; (seqs,) bool."""
    keep = torch.zeros_like(value, dtype=torch.bool)
    for group in group_ids.unique().tolist():
        rows = (group_ids == group).nonzero().flatten()
        keep[rows] = max_variance_subset(value[rows], k)
    return keep


def informative(reward: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """(seqs,) bool: False in groups whose rewards are all equal, those of one response included."""
    groups = groups_of(group_ids)
    first = reward[groups.order[groups.start]]
    differs = torch.zeros_like(groups.member).index_add_(
        0, groups.member, (reward != first).long()
    )  # fmt: skip
    return differs[groups.member] > 0


def covariance(batch: Batch, advantage: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """(tokens,) float64: (A - mean A) (logp - mean logp), means over the tokens of all ranks."""
    a, x = advantage.double(), logp.double()
    return (a - batch.global_mean(a)) * (x - batch.global_mean(x))
