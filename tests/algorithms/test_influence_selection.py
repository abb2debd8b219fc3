"""Test the influence matrix, LESS scores, GREATS greedy choice and UGDA against their definitions."""

import itertools

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from tokfuse.algorithms import influence


def features(samples=6, shape=(4, 4), seed=0, dtype=torch.float64):
    return torch.randn(samples, *shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def cosine(a, b):
    a, b = a.flatten().double(), b.flatten().double()
    return float(a @ b / (a.norm() * b.norm()))


# ------------------------------------------------------------------------------------------ matrix


def test_matrix_entries_are_inner_products_and_cosines():
    a, b = features(5), features(3, seed=1)
    plain, unit = influence.matrix(a, b, cosine=False), influence.matrix(a, b)
    for i, j in itertools.product(range(5), range(3)):
        assert plain[i, j] == pytest.approx(float((a[i] * b[j]).sum()))
        assert unit[i, j] == pytest.approx(cosine(a[i], b[j]))
    own = influence.matrix(a)
    torch.testing.assert_close(own, own.t())
    torch.testing.assert_close(own.diagonal(), torch.ones(5, dtype=torch.float64))


def test_matrix_of_silent_samples_is_zero_and_never_nan():
    a = features(3)
    a[1] = 0
    own = influence.matrix(a)
    assert own.isfinite().all() and (own[1] == 0).all() and (own[:, 1] == 0).all()
    assert influence.matrix(a.bfloat16()).dtype == torch.float32
    assert influence.matrix(features(0)).shape == (0, 0)


def test_a_step_on_a_sample_lowers_its_neighbour_s_loss_by_the_inner_product():
    """The first-order statement of the docstring, on a linear model."""
    x, y = features(4, (5,)), features(4, (), seed=1)
    w = features(1, (5,), seed=2)[0]

    def losses(w):
        return (x @ w - y) ** 2

    grads = torch.stack([torch.autograd.functional.jacobian(losses, w)[i] for i in range(4)])
    lr, products = 1e-6, influence.matrix(grads, cosine=False)
    for i in range(4):
        change = (losses(w - lr * grads[i]) - losses(w)) / lr
        torch.testing.assert_close(change, -products[i], rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------- Adam, LESS


def test_adam_features_are_adam_s_own_update():
    """One step of torch.optim.Adam from the same state, with its bias correction removed."""
    parameter = torch.nn.Parameter(torch.zeros(7, dtype=torch.float64))
    optimiser = torch.optim.Adam([parameter], lr=1.0, eps=1e-30)
    for seed in range(3):
        parameter.grad = features(1, (7,), seed=seed)[0]
        optimiser.step()
    state = optimiser.state[parameter]
    m, v = state["exp_avg"].clone(), state["exp_avg_sq"].clone()
    gradient = features(1, (7,), seed=9)
    gamma = influence.adam_features(gradient, m, v, eps=1e-30)
    before = parameter.detach().clone()
    parameter.grad = gradient[0]
    optimiser.step()
    correction = (1 - 0.9**4) / (1 - 0.999**4) ** 0.5
    torch.testing.assert_close(before - parameter.detach(), gamma[0] / correction)


def test_adam_features_eps_lies_inside_the_root():
    zero = torch.zeros(2)
    gradient = torch.tensor([[1.0, 0.0]])
    gamma = influence.adam_features(gradient, zero, zero, betas=(0.5, 0.5), eps=0.5)
    assert gamma[0].tolist() == [0.5, 0.0]  # 0.5 / sqrt(0.5 + 0.5)


@pytest.mark.parametrize("average", ["cosine", "gradient"])
def test_less_scores_by_their_definition(average):
    train = [features(6, seed=0), features(6, seed=1)]
    valid = [features(5, seed=2), features(5, seed=3)]
    subtask, weight = torch.tensor([0, 1, 0, 2, 1]), [3.0, 1.0]
    out = influence.less_scores(train, valid, weight=weight, subtask=subtask, average=average)
    for i in range(6):
        by_subtask = []
        for k in range(3):
            members = [j for j in range(5) if subtask[j] == k]
            total = 0.0
            for w, t, v in zip((0.75, 0.25), train, valid, strict=True):
                if average == "cosine":
                    total += w * sum(cosine(t[i], v[j]) for j in members) / len(members)
                else:
                    total += w * cosine(t[i], v[members].mean(0))
            by_subtask.append(total)
        assert float(out[i]) == pytest.approx(max(by_subtask))


def test_less_scores_defaults_are_one_subtask_and_equal_weights():
    train, valid = [features(4)], [features(3, seed=1)]
    out = influence.less_scores(train, valid)
    torch.testing.assert_close(out, influence.matrix(train[0], valid[0]).mean(1))
    twice = influence.less_scores(train * 2, valid * 2)
    torch.testing.assert_close(twice, out)


# ------------------------------------------------------------------------------------------ greedy


def brute_force(score, interaction, k):
    """At every step choose the sample with the largest gain. Each gain is summed again over the chosen samples."""
    chosen = []
    for _ in range(k):
        gains = {
            i: float(score[i]) - sum(float(interaction[j, i]) for j in chosen)
            for i in range(len(score))
            if i not in chosen
        }
        chosen.append(max(gains, key=lambda i: (gains[i], -i)))
    return chosen


@hypothesis.given(st.data())
def test_greedy_select_equals_brute_force(data):
    n = data.draw(st.integers(1, 6))
    # Sums of quarters are exact in float32, so both orders of summation agree bitwise.
    quarter = st.integers(-20, 20).map(lambda x: x / 4)
    rows = st.lists(quarter, min_size=n, max_size=n)
    score = torch.tensor(data.draw(rows))
    half = torch.tensor([data.draw(rows) for _ in range(n)])
    interaction = half + half.t()
    k = data.draw(st.integers(0, n))
    out = influence.greedy_select(score, interaction, k)
    assert out.dtype == torch.int64 and out.tolist() == brute_force(score, interaction, k)


def test_greedy_select_finds_the_best_pair_that_top_k_misses():
    """Two copies of the best sample: the second adds nothing. Greedy selection finds the best set."""
    g = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 0.9]])
    target, lr = torch.tensor([1.0, 1.0]), 0.5
    score, interaction = lr * g @ target, lr * lr * influence.matrix(g, cosine=False)

    def loss_after(ids):  # quadratic loss with identity Hessian and its minimum at `target`
        step = lr * g[list(ids)].sum(0)
        return float((target - step).square().sum() / 2)

    best = min(itertools.combinations(range(3), 2), key=loss_after)
    assert sorted(influence.greedy_select(score, interaction, 2).tolist()) == [0, 2]
    assert set(best) in ({0, 2}, {1, 2})
    assert score.topk(2).indices.sort().values.tolist() == [0, 1]


def test_greedy_select_without_interactions_is_top_k():
    score = torch.tensor([1.0, 3.0, 2.0, 3.0])
    out = influence.greedy_select(score, torch.zeros(4, 4), 3)
    assert out.tolist() == [1, 3, 2] and score.tolist() == [1.0, 3.0, 2.0, 3.0]


# -------------------------------------------------------------------------------------------- UGDA


def test_ugda_takes_the_uncertain_ones_first_and_of_these_the_influential_ones():
    rewards = torch.tensor([[0.0, 0.0, 0.0, 0.0], [3.0, 0.1, 2.0, 1.0]])
    score = torch.tensor([0.1, 9.0, 0.5, 0.3])
    assert influence.ugda_select(rewards, score).tolist() == [2]
    assert influence.ugda_select(rewards, score, influential=1.0).tolist() == [2, 0]
    assert influence.ugda_select(rewards, score, uncertain=1.0).tolist() == [1, 2]


# ------------------------------------------------------------------------------------------ errors

F, Q = torch.ones(3, 2), torch.ones(3)
REFUSALS = [
    (lambda: influence.matrix(Q), r"matrix: features must be of shape \(samples, ...\)"),
    (lambda: influence.matrix(F, F[:, :1]), "matrix: others must be of 2 numbers per feature"),
    (lambda: influence.adam_features(F, Q, Q), r"adam_features: exp_avg must be of shape \(2,\)"),
    (
        lambda: influence.adam_features(F, F[0], F[0], betas=(1.0, 0.9)),
        r"adam_features: betas\[0\] must be a finite number in \[0, 1\)",
    ),
    (lambda: influence.adam_features(F, F[0], F[0], eps=0.0), "adam_features: eps must be"),
    (lambda: influence.less_scores([F], []), "less_scores: train and validation must be one tens"),
    (lambda: influence.less_scores([F], [F], weight=[0.0]), "less_scores: weight must be above 0"),
    (lambda: influence.less_scores([F], [F], average="max"), "less_scores: average must be"),
    (lambda: influence.less_scores([F], [F], subtask=torch.zeros(2)), "less_scores: subtask must"),
    (lambda: influence.less_scores([F], [F], subtask=Q), "less_scores: subtask must be of dtype int32 or int64"),
    (lambda: influence.less_scores([F], [F[:0]]), "less_scores: validation must be of at least 1 sample; got none"),
    (lambda: influence.less_scores([F, F[:2]], [F, F]), "less_scores: train and validation must be of 3 and 3"),
    (lambda: influence.less_scores([F], [F], weight=[1.0, 1.0]), "less_scores: weight must be one number per"),
    (lambda: influence.less_scores([F], [F], weight=[-1.0]), r"less_scores: weight must be a finite number in \[0"),
    (lambda: influence.greedy_select(Q, F, 1), r"greedy_select: interaction must be of shape \(3"),
    (lambda: influence.greedy_select(Q, torch.eye(3), 4), r"greedy_select: k must be an integer in \[0, 3\]"),
    (lambda: influence.ugda_select(F[:1], Q), "ugda_select: rewards must be of shape"),
    (
        lambda: influence.ugda_select(F.t(), Q, uncertain=0.0),
        r"ugda_select: uncertain must be a finite number in \(0, 1\]",
    ),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=f"^influence.{message}"):
        call()
