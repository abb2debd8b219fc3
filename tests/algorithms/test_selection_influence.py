"""Test LESS, GREATS and UGDA as configured methods, on features and on the sketches of a step."""

import itertools

import pytest
import torch

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import influence

make = algorithms.make


def features(samples=6, shape=(4, 4), seed=0):
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(samples, *shape, generator=gen, dtype=torch.float64)


MOMENTS = (features(1, seed=8)[0] / 10, features(1, seed=9)[0].square() / 10)


# -------------------------------------------------------------------------------------------- LESS


def test_less_keeps_the_top_fraction_of_its_scores():
    train, valid = [features(20), features(20, seed=1)], [features(5, seed=2), features(5, seed=3)]
    subtask, weight = torch.tensor([0, 1, 0, 1, 1]), [1.0, 3.0]
    method = make("less", fraction=0.25)
    found = method.select(train, valid, weight=weight, subtask=subtask)
    score = influence.less_scores(train, valid, weight=weight, subtask=subtask)
    assert found.tolist() == score.argsort(descending=True)[:5].tolist()
    assert make("less").select(train, valid).shape == (1,)  # 5% of 20


def test_trap_adams_update_is_of_the_training_side_only():
    """eps is inside the root, no bias correction, validation features are plain gradients (released code)."""
    train, valid = features(6), features(4, seed=1)
    (m, v), (b1, b2), eps = MOMENTS, (0.8, 0.9), 0.3
    method = make("less", betas=(b1, b2), eps=eps)
    gamma = (b1 * m + (1 - b1) * train) / (b2 * v + (1 - b2) * train.square() + eps).sqrt()
    expected = influence.matrix(gamma, valid).mean(1)
    found = method.scores([train], [valid], moments=[MOMENTS])
    torch.testing.assert_close(found, expected)
    outside = (b1 * m + (1 - b1) * train) / ((b2 * v + (1 - b2) * train.square()).sqrt() + eps)
    assert not torch.allclose(found, influence.matrix(outside, valid).mean(1), atol=1e-4)
    plain = method.scores([train], [valid])
    torch.testing.assert_close(plain, influence.matrix(train, valid).mean(1))


# ------------------------------------------------------------------------------------------ GREATS


@pytest.mark.parametrize("seed", range(4))
def test_greats_equals_brute_force(seed):
    """Each pick minimises the quadratic model of the validation loss, given the earlier picks."""
    g, valid, lr, k = features(7, (5,), seed), features(3, (5,), 50 + seed), 0.1, 4
    target = valid.mean(0)

    def gain(ids):
        step = lr * g[list(ids)].sum(0)
        pairs = sum(float(g[i] @ g[j]) for i, j in itertools.combinations(ids, 2))
        return float(step @ target) - lr * lr * pairs

    chosen: list[int] = []
    for _ in range(k):
        chosen.append(max((i for i in range(7) if i not in chosen), key=lambda i: gain([*chosen, i])))
    assert make("greats", k=k, lr=lr).select(g, valid).tolist() == chosen


def test_greats_finds_the_best_set_where_overlaps_are_small():
    """Compared with all subsets of a small set, not only with greedy choices."""
    g, valid, lr = features(6, (40,)), features(2, (40,), 3), 0.01
    target = valid.mean(0)

    def gain(ids):
        pairs = sum(float(g[i] @ g[j]) for i, j in itertools.combinations(ids, 2))
        return lr * float(g[list(ids)].sum(0) @ target) - lr * lr * pairs

    best = max(itertools.combinations(range(6), 3), key=gain)
    assert sorted(make("greats", k=3, lr=lr).select(g, valid).tolist()) == list(best)


def test_trap_gradients_of_a_batch_mean_are_scaled_back():
    """The overlap is quadratic in the features and the gain is linear, so the divisor matters."""
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]])
    valid, n = torch.tensor([[1.0, 1.0]]), 100
    method = make("greats", k=2, lr=0.5)
    own = method.select(g, valid).tolist()
    assert method.select(g / n, valid / n, divisor=n).tolist() == own == [0, 2]
    lone = make("greats", k=2, lr=0.05).select(g, valid).tolist()
    assert lone == [0, 1]  # with a small step the overlap costs little


# -------------------------------------------------------------------------------------------- UGDA


def test_ugda_is_uncertainty_then_influence():
    train, valid = [features(8)], [features(4, seed=1)]
    subtask = torch.tensor([0, 0, 1, 1])
    rewards = features(3, (8,), seed=2)
    method = make("ugda", uncertain=0.5, influential=0.5, betas=(0.8, 0.9), eps=0.3)
    found = method.select(rewards, train, valid, moments=[MOMENTS], subtask=subtask)
    gamma = influence.adam_features(train[0], *MOMENTS, betas=(0.8, 0.9), eps=0.3)
    means = torch.stack([valid[0][subtask == k].mean(0) for k in range(2)])
    score = influence.matrix(gamma, means).amax(1)
    uncertain = rewards.var(0).argsort(descending=True)[:4]
    expected = uncertain[score[uncertain].argsort(descending=True)][:2]
    assert found.tolist() == expected.tolist()
    assert make("ugda", uncertain=1.0, influential=1.0).select(rewards, train, valid).shape == (8,)


def test_trap_a_choice_per_rank_is_not_the_choice_over_all_ranks():
    """Variances are per sample, but shares refer to the given samples: gather first."""
    rewards = torch.tensor([[0.0] * 8, [9.0, 8, 7, 6, 1, 2, 3, 4]])
    train, valid = features(8), features(2, seed=1)
    method = make("ugda", influential=1.0)
    whole = method.select(rewards, [train], [valid])
    halves = [
        method.select(rewards[:, part], [train[part]], [valid]) + part.start for part in (slice(0, 4), slice(4, 8))
    ]
    assert sorted(whole.tolist()) == [0, 1, 2, 3]
    assert sorted(torch.cat(halves).tolist()) == [0, 1, 6, 7]


# ------------------------------------------------------------------------------ sketches of a step


def step_sketches(hidden, weight, target, cu_seqlens, advantage, old_shift=0.0):
    old = tokfuse.linear_token_stats(hidden, weight, target).logp + old_shift
    step = tokfuse.policy_step(
        hidden=hidden,
        weight=weight,
        target=target,
        old_logp=old,
        advantage=advantage,
        advantage_level="sequence",
        cu_seqlens=cu_seqlens,
        normalizer="batch",
        objective=tokfuse.Objective(shape=tokfuse.PPOClip(), aggregation="seq_mean_token_mean"),
        influence=tokfuse.influence.InfluenceSpec(rank=None),
    )
    return step.influence.sketches


def test_methods_run_on_the_sketches_of_a_step():
    """The sample with the tokens of the validation sample is first, for every method."""
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=gen), torch.randn(30, 8, generator=gen)
    target = torch.randint(30, (12,), generator=gen)
    cu = torch.tensor([0, 3, 6, 9, 12], dtype=torch.int32)
    sketches = step_sketches(hidden, weight, target, cu, torch.ones(4))
    wanted = step_sketches(hidden[6:9], weight, target[6:9], cu[:2], torch.ones(1))
    less, greats = make("less", fraction=0.25), make("greats", k=1, lr=1e-3)
    assert less.select([sketches], [wanted]).tolist() == [2]
    assert int(influence.matrix(sketches, wanted).argmax()) == 2
    order = greats.select(sketches, wanted, divisor=4.0)
    assert order.tolist() == [int(influence.matrix(sketches, wanted, cosine=False).argmax())]


def test_trap_a_clipped_sample_has_no_influence():
    gen = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(4, 8, generator=gen), torch.randn(30, 8, generator=gen)
    target = torch.randint(30, (4,), generator=gen)
    cu = torch.tensor([0, 2, 4], dtype=torch.int32)
    # In the second sample, a ratio of e^1 with a positive advantage is beyond the clip.
    shift = torch.tensor([0.0, 0.0, -1.0, -1.0])
    sketches = step_sketches(hidden, weight, target, cu, torch.ones(2), shift)
    assert sketches[0].abs().sum() > 0 and not sketches[1].any()
    score = make("less").scores([sketches], [sketches[:1]])
    assert score[0] == pytest.approx(1.0) and score[1] == 0.0


REFUSED = [
    (lambda: make("less", fraction=0.0), "algorithms.less: fraction must be"),
    (lambda: make("less").scores([features()], [features()], moments=[]), "moments must be one"),
    (lambda: make("greats", k=1), "algorithms.greats: lr must be given"),
    (lambda: make("greats", k=0, lr=1.0), "algorithms.greats: k must be"),
    (lambda: make("greats", k=1, lr=1.0).select(features(), features(), divisor=0), "divisor must"),
    (lambda: make("ugda", uncertain=0.0), "algorithms.ugda: uncertain must be"),
    (lambda: make("ugda", influential=2.0), "algorithms.ugda: influential must be"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
