"""Selections over a whole batch: top-K, quantiles, subsets of largest variance, covariances.

Deterministic: ties are broken as each docstring says. Across ranks only tables of a fixed size
travel (`World`), and every rank comes to the same decision.
"""

import math

import torch

from tokfuse.algorithms.batch import Batch, World
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.segments import groups_of, segment_sum

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
        counts = world.sum(torch.bincount(digit, minlength=2**DIGIT))
        # Keys with a digit of at least 255, 254, ...; the first count to reach k holds the key.
        reached = above + counts.flip(0).cumsum(0)
        place = int((reached < k).sum())
        prefix = (prefix << DIGIT) | (2**DIGIT - 1 - place)
        above = int(reached[place] - counts[2**DIGIT - 1 - place])
    return prefix, above


def top_mask(score: torch.Tensor, k: int, mask: torch.Tensor, world: World | None = None) -> torch.Tensor:
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


def at_least_quantile(score: torch.Tensor, q: float, mask: torch.Tensor, world: World | None = None) -> torch.Tensor:
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
    """The k of n values with the largest variance; (n,) bool. All when k >= n.

    See `max_variance_in_groups`, of which this is the case of one group.
    """
    return max_variance_in_groups(value, torch.zeros_like(value, dtype=torch.int64), k)


def max_variance_in_groups(value: torch.Tensor, group_ids: torch.Tensor, k: int) -> torch.Tensor:
    """The k values of every group with the largest variance; exact, in float64.

    The best subset is always some i largest and the k - i smallest (brute force agrees), so one
    scan over i with prefix sums finds it: O(n log n) for the sort and n k for the scan, without a
    loop over groups. Variances within 1e-9 of the largest are ties, of which the smallest i wins;
    of equal values the first rows count as smaller.

    Args:
        value: (n,), float. group_ids: (n,), int.
        k: size of the subsets; a smaller group is kept whole.

    Returns:
        (n,) bool.
    """
    if k < 1:
        raise refuse("max_variance_subset", "k", ">= 1", k, "Keep at least one value.")
    n = value.shape[0]
    groups = groups_of(group_ids, key=value)
    # Centred by group: sums of squares lose the digits of mean / deviation.
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
    """(seqs,) bool: False in groups whose rewards are all equal, those of one response included."""
    groups = groups_of(group_ids)
    first = reward[groups.order[groups.start]]
    differs = torch.zeros_like(groups.member).index_add_(0, groups.member, (reward != first).long())
    return differs[groups.member] > 0


def covariance(batch: Batch, advantage: torch.Tensor, logp: torch.Tensor) -> torch.Tensor:
    """(tokens,) float64: (A - mean A) (logp - mean logp), means over the tokens of all ranks."""
    a, x = advantage.double(), logp.double()
    return (a - batch.global_mean(a)) * (x - batch.global_mean(x))
