"""Reference of `tokfuse.group_advantage`: group advantages in plain torch."""

import torch

from tokfuse.runtime.reference.segments import Groups, groups_of, segment_sum


def group_advantage(
    reward: torch.Tensor,
    group_ids: torch.Tensor | None,
    *,
    baseline: str,
    scale: str,
    sample_std: bool,
    eps: float,
    singleton_reward: bool,
    lengths: torch.Tensor | None,
    greedy_reward: torch.Tensor | None,
) -> torch.Tensor:
    """Return (reward - baseline) / scale per group, computed in float64, in the dtype of `reward`."""
    if reward.shape[0] == 0:
        return torch.zeros_like(reward)
    x = reward.double()
    ddof = 1 if sample_std else 0
    if baseline in ("none", "greedy"):
        gain = x.clone() if greedy_reward is None else x - greedy_reward.double()
        if scale == "batch_std":
            gain = gain / (_batch_std(x, ddof) + eps)
        return gain.to(reward.dtype)
    assert group_ids is not None
    groups = groups_of(group_ids, key=x if baseline in ("median", "second_best") else None)
    gain = _centre(x, groups, baseline, lengths)
    denominator = _denominator(x, groups, scale, ddof, eps)
    advantage = gain / denominator
    # Equal rewards are found by comparison. The rounding error of the mean, divided by eps, is far from
    # 0: 0.11 was measured for eps 1e-6 in float32.
    first = x[groups.order[groups.start]]
    different = segment_sum((x != first).to(torch.int64), groups.member, x.shape[0])
    equal = (different == 0)[groups.member]
    advantage = torch.where(equal, torch.zeros_like(x), advantage)
    one = x / (1.0 + eps if scale in ("std", "mean") else denominator)
    one = one if singleton_reward else torch.where(x == x, torch.zeros_like(x), x)
    return torch.where(groups.size == 1, one, advantage).to(reward.dtype)


def _batch_std(x: torch.Tensor, ddof: int) -> torch.Tensor:
    """Return the standard deviation of all rewards: 1 for a batch of one, exactly 0 if all are equal."""
    if x.shape[0] == 1:
        return torch.ones_like(x[0])
    std = x.std(correction=ddof)
    return torch.where((x == x[0]).all(), torch.zeros_like(std), std)


def _centre(x: torch.Tensor, groups: Groups, baseline: str, lengths: torch.Tensor | None) -> torch.Tensor:
    """Return reward minus the baseline of the group. `second_best` gives max - second to the best row, else 0."""
    num, index, count = x.shape[0], groups.member, groups.size
    mean = (segment_sum(x, index, num)[index]) / count
    if baseline == "mean":
        return x - mean
    if baseline == "leave_one_out":
        return (x - mean) * count / (count - 1)
    if baseline == "length_weighted":
        assert lengths is not None
        n = lengths.double()
        total = segment_sum(n, index, num)[index]
        weighted = segment_sum(n * x, index, num)[index] / total
        return x - torch.where(total == 0, mean, weighted)
    ranked, last = x[groups.order], groups.start + count - 1
    has_nan = segment_sum(x.isnan().to(torch.int64), index, num)[index] > 0
    poison = torch.where(has_nan, torch.full_like(x, float("nan")), torch.zeros_like(x))
    if baseline == "median":
        low = ranked[groups.start + (count - 1) // 2]
        high = ranked[groups.start + count // 2]
        return x - (low + 0.5 * (high - low)) + poison
    assert baseline == "second_best"
    best, second = ranked[last], ranked[(last - 1).clamp_min(0)]
    return torch.where(x == best, best - second, torch.zeros_like(x)) + poison


def _denominator(x: torch.Tensor, groups: Groups, scale: str, ddof: int, eps: float) -> torch.Tensor:
    """Return the divisor of each row, (rows,)."""
    if scale == "none":
        return torch.ones_like(x)
    if scale == "batch_std":
        return (_batch_std(x, ddof) + eps).expand_as(x)
    num, index, count = x.shape[0], groups.member, groups.size
    mean = segment_sum(x, index, num)[index] / count
    if scale == "mean":
        return mean + eps
    assert scale == "std"
    square = segment_sum((x - mean) ** 2, index, num)[index]
    return (square / (count - ddof)).sqrt() + eps
