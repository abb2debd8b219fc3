"""Selections over a whole batch: top-K, quantiles, subsets with the largest variance, covariances.

All selections are deterministic; each docstring says how ties are broken. Ranks exchange only tables of fixed size
(`World`), and every rank makes the same decision.
"""

import math

import torch

from tokfuse.algorithms.batch import Batch, World
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import groups_of, segment_sum

DIGIT = 8  # bits per pass of the radix selection: four gathers of 256 counts


def _key(score: torch.Tensor) -> torch.Tensor:
    """Return integer keys in the order of the float32 scores, int64 in [0, 2^32). NaN is the largest."""
    # -0.0 + 0.0 is 0.0: both zeros get the same key.
    bits = (score.float() + 0.0).contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return bits + 2**31


def _threshold(key: torch.Tensor, k: int, world: World) -> tuple[int, int]:
    """Return (k-th largest key over all ranks, number of larger keys), for 1 <= k <= number of keys."""
    prefix, above = 0, 0
    for shift in range(32 - DIGIT, -1, -DIGIT):
        inside = key[(key >> (shift + DIGIT)) == prefix]
        digit = (inside >> shift) & (2**DIGIT - 1)
        counts = world.sum(torch.bincount(digit, minlength=2**DIGIT))
        # Counts of keys whose digit is at least 255, 254, ...; the first count >= k belongs to the key's digit.
        reached = above + counts.flip(0).cumsum(0)
        place = int((reached < k).sum())
        prefix = (prefix << DIGIT) | (2**DIGIT - 1 - place)
        above = int(reached[place] - counts[2**DIGIT - 1 - place])
    return prefix, above


def top_mask(score: torch.Tensor, k: int, mask: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """Return a mask of the k largest scores of all ranks, among the rows where mask is True.

    Args:
        score: (rows,), float. Compared in float32.
        k: number of scores over all ranks. If there are fewer, all are selected.
        mask: (rows,), bool.
        world: the ranks. None: this process alone.

    Returns:
        (rows,) bool. Of equal scores at the threshold, the lower rank wins, then the lower row.
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


def at_least_quantile(score: torch.Tensor, q: float, mask: torch.Tensor, world: World | None = None) -> torch.Tensor:
    """Return a mask of the rows whose score is at least the q-quantile of all scores where mask is True.

    The quantile is interpolated linearly. All rows that tie with the smallest selected score are selected. Without
    rows, nothing is selected.
    """
    world = world or World()
    if not 0.0 <= q <= 1.0:
        raise refuse("at_least_quantile", "q", "in [0, 1]", q, "Pass a quantile such as 0.8.")
    key, total = _key(score), int(world.sum(mask.sum()))
    if total == 0:
        return torch.zeros_like(mask)
    # The quantile is between two neighbouring scores, so x >= quantile starts at the upper one. A position that
    # differs from an integer only by rounding is treated as that integer.
    place = q * (total - 1)
    rank = round(place) if abs(place - round(place)) < 1e-9 * total else math.ceil(place)
    threshold, _ = _threshold(key[mask], total - rank, world)
    return mask & (key >= threshold)


def max_variance_subset(value: torch.Tensor, k: int) -> torch.Tensor:
    """Return a mask of the k of n values with the largest variance, (n,) bool. All if k >= n.

    This is `max_variance_in_groups` with one group.
    """
    return max_variance_in_groups(value, torch.zeros_like(value, dtype=torch.int64), k)


def max_variance_in_groups(value: torch.Tensor, group_ids: torch.Tensor, k: int) -> torch.Tensor:
    """Return a mask of the k values of every group with the largest variance. Exact, in float64.

    The best subset always consists of the i largest and the k - i smallest values, for some i (checked by brute
    force). One scan over i with prefix sums finds it: O(n log n) for the sort and n k for the scan, without a loop
    over groups. Variances within 1e-9 of the largest are ties, and the smallest i wins. Of equal values, the first
    row counts as the smallest.

    Args:
        value: (n,), float.
        group_ids: (n,), int. Group of each value.
        k: size of the subsets. A smaller group is kept whole.

    Returns:
        (n,) bool.
    """
    if k < 1:
        raise refuse("max_variance_subset", "k", ">= 1", k, "Keep at least one value.")
    n = value.shape[0]
    groups = groups_of(group_ids, key=value)
    # Centre each group, because sums of squares lose digits if the mean is large compared to the deviation.
    x = value.double()
    x = x - segment_sum(x, groups.member, n)[groups.member] / groups.size
    first, second = (torch.nn.functional.pad(v.cumsum(0), (1, 0)) for v in (x[groups.order], x[groups.order] ** 2))
    begin, end = groups.start[:, None], (groups.start + groups.size)[:, None]
    take = groups.size.clamp(max=k)[:, None]
    i = torch.minimum(torch.arange(k + 1, device=value.device), take)
    total, square = (p[begin + take - i] - p[begin] + p[end] - p[end - i] for p in (first, second))
    variance = square / take - (total / take) ** 2
    best = (variance >= variance.amax(1, keepdim=True) * (1 - 1e-9) - 1e-15).int().argmax(1)
    rank = torch.empty_like(groups.order)
    rank[groups.order] = torch.arange(n, device=value.device)
    rank = rank - groups.start
    return (rank < take.flatten() - best) | (rank >= groups.size - best)


def informative(reward: torch.Tensor, group_ids: torch.Tensor) -> torch.Tensor:
    """Return False for responses of groups whose rewards are all equal, (seqs,) bool. A group of one is equal."""
    groups = groups_of(group_ids)
    first = reward[groups.order[groups.start]]
    differs = torch.zeros_like(groups.member).index_add_(0, groups.member, (reward != first).long())
    return differs[groups.member] > 0


def covariance(batch: Batch, advantage: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """Return (A - mean A) (logp - mean logp), (tokens,) float64, with means over the tokens of all ranks."""
    a, x = advantage.double(), logp.double()
    return (a - batch.global_mean(a)) * (x - batch.global_mean(x))
