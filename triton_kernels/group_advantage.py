"""group_advantage: (reward - baseline) / scale per group of rows with the same id.

Ids may be any integers in any order. So rows are first sorted by id on the device (torch.sort,
stable). For median and second_best they are sorted by reward before that, so the position of a row
in its group is its rank. Then one kernel is launched with one program per row: the program of the
first row of a group computes the whole group, and the others return after their first loads.
`batch_std` adds the launch of partial_moments. The host never reads the number of groups, so
nothing synchronises. Baselines without groups need one launch and no sort.

Bytes per row at float32: 4 read in each of up to three passes over a group (from L1 after the
first), 24 for ids and order, 4 written. Legend: S rows.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import as_int64, joined, merged_moments, pair, partial_moments


@triton.jit
def _batch_std(partial_ptr, num_partials, num_rows, DDOF: tl.constexpr):
    """Return the standard deviation of all rewards of the batch; 1 for a single one."""
    _, _, square = merged_moments(partial_ptr, num_partials)
    n = as_int64(num_rows).to(tl.float64)
    return tl.where(num_rows == 1, 1.0, tl.sqrt(square / tl.maximum(n - DDOF, 1.0)))


@triton.jit
def group_size(ids_ptr, start, num_rows, BLOCK: tl.constexpr):
    """Return the number of equal ids from `start` on in the sorted ids."""
    id = tl.load(ids_ptr + start)
    size = tl.zeros((), tl.int64)
    found = tl.full((), BLOCK, tl.int64)
    while found == BLOCK:
        offs = start + size + tl.arange(0, BLOCK)
        inside = offs < num_rows
        same = inside & (tl.load(ids_ptr + offs, mask=inside, other=0) == id)
        found = tl.sum(same.to(tl.int64), axis=0)
        size += found
    return size


@triton.jit
def _ranked(reward_ptr, order_ptr, place):
    return tl.load(reward_ptr + tl.load(order_ptr + place)).to(tl.float64)


@triton.jit
def _one_group(
    reward_ptr,
    order_ptr,
    lengths_ptr,
    advantage_ptr,
    start,
    size,
    batch_std,
    eps,
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    SINGLETON_REWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    n = size.to(tl.float64)
    first = _ranked(reward_ptr, order_ptr, start)
    total = tl.zeros((BLOCK,), tl.float64)
    weight = tl.zeros((BLOCK,), tl.float64)
    weighted = tl.zeros((BLOCK,), tl.float64)
    different = tl.zeros((BLOCK,), tl.int32)
    for begin in range(0, size, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < size
        row = tl.load(order_ptr + start + offs, mask=inside, other=0)
        x = tl.load(reward_ptr + row, mask=inside, other=0.0).to(tl.float64)
        total += x
        different |= (inside & (x != first)).to(tl.int32)  # a NaN differs from itself
        if BASELINE == "length_weighted":
            length = tl.load(lengths_ptr + row, mask=inside, other=0).to(tl.float64)
            weight += length
            weighted += length * x
    # Equal rewards are detected by comparison, because the rounding error of the mean divided by
    # eps = 1e-6 can reach 0.1.
    equal = tl.max(different, axis=0) == 0
    group_sum = tl.sum(total, axis=0)
    mean = group_sum / n

    divisor = 1.0 + tl.zeros((), tl.float64)
    if SCALE == "std":
        square = tl.zeros((BLOCK,), tl.float64)
        for begin in range(0, size, BLOCK):
            offs = begin + tl.arange(0, BLOCK)
            inside = offs < size
            row = tl.load(order_ptr + start + offs, mask=inside, other=0)
            x = tl.load(reward_ptr + row, mask=inside, other=0.0).to(tl.float64)
            d = tl.where(inside, x - mean, 0.0)
            square += d * d
        divisor = tl.sqrt(tl.sum(square, axis=0) / tl.maximum(n - DDOF, 1.0)) + eps
    elif SCALE == "batch_std":
        divisor = batch_std + eps
    elif SCALE == "mean":
        divisor = mean + eps
    factor = 1.0 / divisor

    centre = mean
    best = mean
    if BASELINE == "leave_one_out":
        factor *= n / tl.maximum(n - 1.0, 1.0)
    elif BASELINE == "length_weighted":
        all_weight = tl.sum(weight, axis=0)
        share = tl.sum(weighted, axis=0) / tl.where(all_weight == 0.0, 1.0, all_weight)
        centre = tl.where(all_weight == 0.0, mean, share)
    elif BASELINE == "median" or BASELINE == "second_best":
        low = _ranked(reward_ptr, order_ptr, start + (size - 1) // 2)
        high = _ranked(reward_ptr, order_ptr, start + size // 2)
        best = _ranked(reward_ptr, order_ptr, start + size - 1)
        centre = low + 0.5 * (high - low)
        if BASELINE == "second_best":
            centre = _ranked(reward_ptr, order_ptr, start + tl.maximum(size - 2, 0))
        # A NaN is last in the sorted rewards. Then all advantages of the group are NaN.
        factor = tl.where(best == best, factor, best)
    beaten = tl.where(best == best, 0.0, best)

    for begin in range(0, size, BLOCK):
        offs = begin + tl.arange(0, BLOCK)
        inside = offs < size
        row = tl.load(order_ptr + start + offs, mask=inside, other=0)
        x = tl.load(reward_ptr + row, mask=inside, other=0.0).to(tl.float64)
        advantage = (x - centre) * factor
        if BASELINE == "second_best":
            advantage = tl.where(x == best, advantage, beaten)
        advantage = tl.where(equal, 0.0, advantage)
        alone = tl.where(x == x, 0.0, x)
        if SINGLETON_REWARD:
            alone = x
            if SCALE == "batch_std":
                alone = x / divisor
            elif SCALE != "none":
                alone = x / (1.0 + eps)
        advantage = tl.where(size == 1, alone, advantage)
        tl.store(advantage_ptr + row, advantage.to(advantage_ptr.dtype.element_ty), mask=inside)


@triton.jit
def group_advantage_kernel(
    reward_ptr,  # (S,) float
    ids_ptr,  # (S,) int64, ascending
    order_ptr,  # (S,) int64, row of each sorted id
    lengths_ptr,  # (S,) int64, or None
    partial_ptr,  # (3, programs) float64 of partial_moments, or None
    advantage_ptr,  # (S,) float
    num_rows,
    num_partials,
    eps,  # split by `pair`
    BASELINE: tl.constexpr,
    SCALE: tl.constexpr,
    DDOF: tl.constexpr,
    SINGLETON_REWARD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64)
    before = tl.maximum(start - 1, 0)
    if (start == 0) | (tl.load(ids_ptr + start) != tl.load(ids_ptr + before)):
        batch_std = tl.zeros((), tl.float64)
        if SCALE == "batch_std":
            batch_std = _batch_std(partial_ptr, num_partials, num_rows, DDOF)
        size = group_size(ids_ptr, start, num_rows, BLOCK)
        _one_group(
            reward_ptr,
            order_ptr,
            lengths_ptr,
            advantage_ptr,
            start,
            size,
            batch_std,
            joined(eps),
            BASELINE,
            SCALE,
            DDOF,
            SINGLETON_REWARD,
            BLOCK,
        )


@triton.jit
def groupless_advantage_kernel(
    reward_ptr,  # (S,) float
    greedy_ptr,  # (S,) float; None: the baseline is 0
    partial_ptr,  # (3, programs) float64 of partial_moments; None: the scale is 1
    advantage_ptr,  # (S,) float
    num_rows,
    num_partials,
    eps,  # split by `pair`
    DDOF: tl.constexpr,
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_rows
    x = tl.load(reward_ptr + offs, mask=inside, other=0.0).to(tl.float64)
    if greedy_ptr is not None:
        x -= tl.load(greedy_ptr + offs, mask=inside, other=0.0).to(tl.float64)
    if partial_ptr is not None:
        x /= _batch_std(partial_ptr, num_partials, num_rows, DDOF) + joined(eps)
    tl.store(advantage_ptr + offs, x.to(advantage_ptr.dtype.element_ty), mask=inside)


declare("group_advantage", {80: LaunchConfig(block_t=64, num_warps=1)})
declare("groupless_advantage", {80: LaunchConfig(block_t=512, num_warps=4)})


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
    """Return (seqs,) advantages in the dtype of `reward`. The caller has checked all arguments."""
    advantage = torch.empty_like(reward)
    num_rows = reward.shape[0]
    if num_rows == 0:
        return advantage
    partial = partial_moments(reward, None) if scale == "batch_std" else None
    num_partials = 0 if partial is None else partial.shape[1]
    if group_ids is None:
        config = choose("groupless_advantage", reward)
        groupless_advantage_kernel[(triton.cdiv(num_rows, config.block_t),)](
            reward,
            greedy_reward,
            partial,
            advantage,
            num_rows,
            num_partials,
            pair(eps),
            DDOF=int(sample_std),
            BLOCK=config.block_t,
            **config.options,
        )
        return advantage
    config = choose("group_advantage", reward)
    ids, order = sorted_groups(group_ids, reward if baseline in RANKED else None)
    group_advantage_kernel[(num_rows,)](
        reward,
        ids,
        order,
        lengths,
        partial,
        advantage,
        num_rows,
        num_partials,
        pair(eps),
        BASELINE=baseline,
        SCALE=scale,
        DDOF=int(sample_std),
        SINGLETON_REWARD=singleton_reward,
        BLOCK=config.block_t,
        **config.options,
    )
    return advantage


RANKED = ("median", "second_best")


def sorted_groups(group_ids: torch.Tensor, key: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ascending ids and the row of each. Rows of one id are sorted by `key`, if given."""
    if key is None:
        ids, order = torch.sort(group_ids, stable=True)
        return ids, order
    by_key = torch.argsort(key, stable=True)
    ids, place = torch.sort(group_ids[by_key], stable=True)
    return ids, by_key[place]


def _case(baseline: str, scale: str, dtype: torch.dtype) -> None:
    reward, ids = meta(4096, dtype=dtype), meta(4096, dtype=torch.int64)
    grouped = baseline != "greedy"
    group_advantage(
        reward,
        ids if grouped else None,
        baseline=baseline,
        scale=scale,
        sample_std=True,
        eps=1e-6,
        singleton_reward=True,
        lengths=ids if baseline == "length_weighted" else None,
        greedy_reward=None if grouped else reward,
    )


@compile_case("group_advantage/grpo", dtypes=(torch.float32, torch.float64))
def _(dtype: torch.dtype) -> None:
    _case("mean", "std", dtype)


@compile_case("group_advantage/rloo", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    _case("leave_one_out", "batch_std", dtype)


@compile_case("group_advantage/opo", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    _case("length_weighted", "none", dtype)


@compile_case("group_advantage/gbpo_target", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    _case("median", "std", dtype)


@compile_case("group_advantage/pass_at_k", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    _case("second_best", "std", dtype)


@compile_case("group_advantage/remax", dtypes=(torch.float32,))
def _(dtype: torch.dtype) -> None:
    _case("greedy", "batch_std", dtype)
