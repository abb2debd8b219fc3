"""Test global selections against sorting and brute force, with ties, on several ranks and on one batch."""

import dataclasses
import itertools

import pytest
import torch
from algorithm_cases import METHODS, example, rollout, spread_over
from harness import bits, compare

from tokfuse.algorithms import World, selection

SCORES = torch.tensor([0.5, -0.0, 3.0, 0.0, -2.0, 3.0, float("inf"), 1e-40, 0.5, -1e30, 3.0, 0.25])
MASK = torch.tensor([True] * 9 + [False, True, True])


def top_by_sorting(score: torch.Tensor, k: int, mask: torch.Tensor) -> torch.Tensor:
    rows = sorted(mask.nonzero().flatten().tolist(), key=lambda t: (-float(score[t]), t))[:k]
    out = torch.zeros_like(mask)
    out[rows] = True
    return out


@pytest.mark.parametrize("k", range(-1, 14))
def test_top_mask_is_a_stable_sort(k: int):
    """Zeros of both signs tie; a denormal does not. The first of equal values is taken."""
    expected = top_by_sorting(SCORES, max(k, 0), MASK)
    assert torch.equal(selection.top_mask(SCORES, k, MASK), expected)
    parts = spread_over(
        2, lambda world: selection.top_mask(SCORES.split([5, 7])[world.rank], k, MASK.split([5, 7])[world.rank], world)
    )
    assert torch.equal(torch.cat(parts), expected)


def test_top_mask_of_many_random_scores_with_ties():
    gen = torch.Generator().manual_seed(0)
    for _ in range(30):
        score = torch.randn(200, generator=gen).mul(4).round().div(4)
        mask = torch.rand(200, generator=gen) > 0.2
        k = int(torch.randint(200, (), generator=gen))
        assert torch.equal(selection.top_mask(score, k, mask), top_by_sorting(score, k, mask))


def test_nan_scores_come_first_and_nothing_comes_of_nothing():
    score = torch.tensor([1.0, float("nan"), 2.0])
    assert selection.top_mask(score, 1, torch.ones(3, dtype=torch.bool)).tolist() == [0, 1, 0]
    empty = torch.zeros(0)
    assert selection.top_mask(empty, 3, empty.bool()).shape == (0,)
    assert selection.at_least_quantile(empty, 0.5, empty.bool()).shape == (0,)


@pytest.mark.parametrize("q", [0.0, 0.1, 0.25, 0.5, 0.8, 0.9, 1.0])
def test_quantile_keeps_what_torch_keeps(q: float):
    gen = torch.Generator().manual_seed(1)
    for size in (1, 2, 5, 11, 101):
        score = torch.randn(size, generator=gen).mul(3).round()
        mask = torch.rand(size, generator=gen) > 0.1
        mask[0] = True
        expected = mask & (score.double() >= torch.quantile(score[mask].double(), q))
        assert torch.equal(selection.at_least_quantile(score, q, mask), expected)
        if size > 2:
            cut = [2, size - 2]
            parts = spread_over(
                2,
                lambda w, s=score, m=mask, c=cut: selection.at_least_quantile(
                    s.split(c)[w.rank], q, m.split(c)[w.rank], w
                ),
            )
            assert torch.equal(torch.cat(parts), expected)


def test_max_variance_subset_is_the_best_of_all_subsets():
    """300 random instances, half of them with ties, some far from 0."""
    gen = torch.Generator().manual_seed(2)
    for case in range(300):
        n = int(torch.randint(2, 10, (), generator=gen))
        k = int(torch.randint(1, n + 1, (), generator=gen))
        value = torch.randn(n, generator=gen, dtype=torch.float64)
        if case % 2:
            value = value.round()
        keep = selection.max_variance_subset(value + 100.0 * (case % 3), k)
        assert int(keep.sum()) == k
        variances = [value[list(s)].var(correction=0) for s in itertools.combinations(range(n), k)]
        compare(value[keep].var(correction=0), torch.stack(variances).max(), atol=1e-9)
    with pytest.raises(ValueError, match="k must be >= 1; got 0"):
        selection.max_variance_subset(value, 0)


def test_max_variance_ties_take_the_smallest_i():
    """With equal values none counts as largest: the first k rows are taken as the smallest."""
    assert selection.max_variance_subset(torch.ones(5), 2).tolist() == [1, 1, 0, 0, 0]
    assert selection.max_variance_subset(torch.tensor([1.0, 0.0, 0.0, 1.0]), 3).tolist() == [True, True, True, False]


def test_informative_groups():
    reward = torch.tensor([0.1, 1.0, 0.1, 2.0, 0.1, 5.0])
    group = torch.tensor([4, 9, 4, 9, 4, 2])
    assert selection.informative(reward, group).tolist() == [0, 1, 0, 1, 0, 0]


# Advantages of a group do not depend on other ranks. These methods select over all ranks.
GLOBAL = (
    "bapo",
    "cip_entropy",
    "clip_cov",
    "d3s",
    "dcpo_dist",
    "gpg",
    "high_entropy",
    "kl_cov",
    "ppo",
    "reinforce_pp",
    "vapo",
    "pipo",
    "epo",
)
assert set(GLOBAL) <= set(METHODS)


@pytest.mark.parametrize("name", GLOBAL)
def test_ranks_decide_as_one(name: str):
    """Two ranks with one and two prompts: their plans together equal the plan of the whole batch."""
    b = rollout(6)
    ids = (torch.arange(0, 4), torch.arange(4, 12))
    options = {"batch_rollouts": 4} if name == "d3s" else {}
    method = example(name, **options)

    def work(world: World):
        batch = b if world.gather is None else b.take(ids[world.rank])
        batch = dataclasses.replace(batch, world=world)
        state = method.initial_state()
        prepared = method.prepare(batch, state)
        (plan,) = method.plans(prepared, state)
        return plan, method.advance(state, prepared)

    whole, state = work(World())
    parts = spread_over(2, work)
    cu = b.cu_seqlens[4].item()
    for field in ("token_weight", "mask", "kl_weight", "entropy_weight", "signal"):
        value = getattr(whole, field)
        found = [getattr(plan, field) for plan, _ in parts]
        assert (value is None) == (found[0] is None)
        if value is None:
            continue
        compare(torch.cat(found), value, atol=1e-12, what=field)
    assert [len(plan.batch.old_logp) for plan, _ in parts] == [cu, b.num_tokens - cu]
    advantage = [plan.advantage for plan, _ in parts]
    compare(torch.cat(advantage), whole.advantage, atol=1e-12, what="advantage")
    assert parts[0][0].objective == parts[1][0].objective == whole.objective
    for key in ("entropy", "means", "sum", "batches", "step"):
        assert key not in state or parts[0][1][key] == pytest.approx(state[key], rel=1e-12)


def test_the_result_does_not_depend_on_the_run():
    b = rollout(6, binary=False)
    for name in ("d3s", "clip_cov", "high_entropy", "kl_cov"):
        method = example(name)
        state = method.initial_state()
        first, second = (method.plans(method.prepare(b, state), state)[0] for _ in range(2))
        for field in ("token_weight", "mask", "kl_weight", "advantage"):
            x, y = getattr(first, field), getattr(second, field)
            assert x is None or torch.equal(x, y)
        loss = [bits(plan.loss(b.logp).loss) for plan in (first, second)]
        assert loss[0] == loss[1]
