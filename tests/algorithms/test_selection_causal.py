"""Test bandits, environment weights, IRMv1, tempered weights and answer metrics: formulas and traps."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms.causal import answer_metrics, environments, offpolicy
from tokfuse.algorithms.curation import bandits

make = algorithms.make


def t(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


# ----------------------------------------------------------------------------------------- bandits


def test_squarecb_probabilities_and_the_bound_of_their_weights():
    cost, gamma = t(0.3, 0.1, 0.1, 0.9), 20.0
    p = bandits.squarecb_probabilities(cost, gamma)
    assert p[0] == pytest.approx(1 / (4 + 20 * 0.2)) and p[3] == pytest.approx(1 / (4 + 20 * 0.8))
    assert p[2] == 0.25 and float(p.sum()) == pytest.approx(1.0)
    gap = cost - cost.min()
    assert bool((1 / p <= 4 + gamma * gap + 1e-9).all())
    assert bandits.squarecb_probabilities(cost, 0.0).tolist() == pytest.approx([0.25] * 4)
    assert bandits.squarecb_probabilities(t(0.0, 0.7), 20.0)[1] == pytest.approx(1 / 16)


def play(method, means, steps, residuals=None, seed=0):
    rng, state, log = np.random.default_rng(seed), method.initial_state(), []
    for _ in range(steps):
        choice = method.choose(state)
        reward = float(rng.random() < means[choice.arm])
        residual = None if residuals is None else residuals[choice.arm] + 0.1 * rng.normal()
        state = method.observe(state, choice, reward, residual)
        log.append((choice, reward))
    return state, log


def test_squarecb_learns_and_its_log_values_another_policy():
    method, means = make("squarecb", arms=3, scale=2.0, seed=1), [0.2, 0.5, 0.8]
    state, log = play(method, means, 1500)
    assert state["step"] == 1500 == sum(state["pulls"])
    assert max(range(3), key=lambda i: state["pulls"][i]) == 2
    # The logged propensities are the probabilities with which the arm was drawn.
    assert all(c.propensity == c.probabilities[c.arm] for c, _ in log)
    target = [0.5, 0.5, 0.0]
    weight = torch.tensor([target[c.arm] / c.propensity for c, _ in log], dtype=torch.float64)
    value = tokfuse.ope(weight, torch.tensor([r for _, r in log], dtype=torch.float64))
    assert float(value.snips) == pytest.approx(0.35, abs=0.1)


def test_squarecb_draws_by_its_probabilities_and_takes_a_context():
    method = make("squarecb", arms=2, scale=6.0, power=0.0)
    picks = [method.choose(method.initial_state() | {"step": i}, t(0.0, 1.0)).arm for i in range(2000)]
    assert sum(picks) / 2000 == pytest.approx(1 / 8, abs=0.03)
    growing = make("squarecb", arms=2, scale=6.0, power=0.5)
    late = growing.choose(growing.initial_state() | {"step": 100}, t(0.0, 1.0))
    assert min(late.probabilities) == pytest.approx(1 / 62)
    other = make("squarecb", arms=2, scale=6.0, power=0.0, seed=9)
    again = [other.choose(other.initial_state() | {"step": i}, t(0.0, 1.0)).arm for i in range(200)]
    assert again != picks[:200]


def test_ofs_takes_the_best_arm_that_keeps_the_constraint():
    method = make("ofs", arms=3, width=0.5)
    state, log = play(method, [0.9, 0.6, 0.3], 800, residuals=[0.4, -0.2, -0.5])
    assert max(range(3), key=lambda i: state["pulls"][i]) == 1
    assert [c.arm for c, _ in log[:3]] == [0, 1, 2]  # arms without data first, in order
    free, _ = play(method, [0.9, 0.6, 0.3], 800)
    assert max(range(3), key=lambda i: free["pulls"][i]) == 0
    nothing, _ = play(method, [0.9, 0.6, 0.3], 800, residuals=[0.9, 0.5, 0.7])
    assert max(range(3), key=lambda i: nothing["pulls"][i]) == 1  # the smallest violation


def test_ofs_index_by_its_formula():
    method = make("ofs", arms=2, width=2.0)
    state = {"pulls": [4, 9], "reward": [2.0, 6.0], "residual": [-1.0, 0.9], "step": 13}
    beta = [2 * math.sqrt(math.log(13) / n) for n in (4, 9)]
    assert 0.1 - beta[1] < 0 and 0.5 + beta[0] > 6 / 9 + beta[1]
    assert method.choose(state) == bandits.Choice(0, 1.0, [1.0, 0.0])
    assert make("ofs", arms=2, width=0.0).choose(state).arm == 0  # arm 1 violates without optimism
    assert make("ofs", arms=2, width=0.0).choose(state | {"residual": [0, 0]}).arm == 1


def test_generation_report():
    log = [bandits.Choice(0, 0.5, [0.5, 0.5]), bandits.Choice(1, 0.5, [0.5, 0.5])]
    report = bandits.generation_report(log, [[0.5, 0.5]] * 2)
    assert report == (2.0, [0.5, 0.5])
    skewed = bandits.generation_report(log, [[0.9, 0.1]] * 2)
    assert skewed.effective_sample_size == pytest.approx(1 / (0.81 + 0.01))
    assert bandits.generation_report(log[:1], [[0.0, 1.0]]).effective_sample_size == 0.0


@pytest.mark.parametrize("name", ["squarecb", "ofs"])
def test_bandits_resume_exactly(name):
    method = make(name, arms=3)
    state, _ = play(method, [0.3, 0.6, 0.5], 40)
    loaded = method.load_state_dict(json.loads(json.dumps(method.state_dict(state))))
    assert loaded == state and method.choose(loaded) == method.choose(state)
    with pytest.raises(ValueError, match="the config of the checkpoint"):
        make(name, arms=4).load_state_dict(method.state_dict(state))


# ------------------------------------------------------------------------------------ environments


def test_vrex_weights_are_the_gradient_of_mean_and_variance():
    risk = t(0.3, 1.1, 0.7).requires_grad_()
    penalised = risk.mean() + 2.5 * risk.var(unbiased=False)
    (grad,) = torch.autograd.grad(penalised, risk)
    torch.testing.assert_close(environments.vrex_weights(risk, penalty=2.5), 3 * grad)
    assert make("vrex", penalty=0.0)(risk).tolist() == [1.0] * 3


def test_group_dro_moves_weight_to_the_worst_environment():
    method = make("group_dro", environments=3, step_size=0.5)
    state = method.initial_state()
    once = method.observe(state, t(1.0, 2.0, math.nan))
    expected = t(math.exp(0.5), math.exp(1.0), 1.0)
    torch.testing.assert_close(method.weights(once), expected / expected.sum())
    torch.testing.assert_close(method.weights(method.observe(once, t(0, 0, 0))), method.weights(once))
    assert method.weights(state).tolist() == pytest.approx([1 / 3] * 3)
    loaded = method.load_state_dict(json.loads(json.dumps(method.state_dict(once))))
    assert loaded == once
    for _ in range(100):
        once = method.observe(once, t(1.0, 2.0, 1.0))
    assert float(method.weights(once)[1]) > 0.999
    gone = method.observe(state, t(0.0, 4000.0, 0.0))
    assert float(method.weights(gone)[0]) == 0.0
    back = method.observe(gone, t(4000.0, 0.0, 4000.0))
    assert method.weights(back).tolist() == pytest.approx([1 / 3] * 3)  # no environment keeps weight 0 forever


def test_irm_penalty_is_autograds_gradient_in_a_dummy_scale():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(12, 7, generator=gen, dtype=torch.float64, requires_grad=True)
    target = torch.randint(7, (12,), generator=gen)
    env, mask = torch.arange(12) % 3, torch.rand(12, generator=gen) < 0.8
    penalty = logits.new_zeros(())
    for e in range(3):
        scale = torch.ones((), dtype=torch.float64, requires_grad=True)
        chosen = (env == e) & mask
        risk = torch.nn.functional.cross_entropy(scale * logits[chosen], target[chosen])
        (slope,) = torch.autograd.grad(risk, scale, create_graph=True)
        penalty = penalty + slope.square()
    (expected,) = torch.autograd.grad(penalty, logits)
    stats = tokfuse.token_stats(logits, target)
    found = environments.irm_penalty(stats.logp, stats.entropy, env, environments=4, mask=mask)
    torch.testing.assert_close(found, penalty)
    (grad,) = torch.autograd.grad(found, logits)
    torch.testing.assert_close(grad, expected)


def test_trap_irm_sees_nothing_on_tokens_that_the_model_sampled():
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, generator=gen, dtype=torch.float64).expand(40_000, 5)
    own = torch.multinomial(logits[0].softmax(0), 40_000, replacement=True, generator=gen)
    hot = torch.multinomial((logits[0] / 1.43).softmax(0), 40_000, True, generator=gen)
    means = []
    for target in (own, hot):
        stats = tokfuse.token_stats(logits, target)
        means.append(float((-stats.logp - stats.entropy).mean()))
    assert abs(means[0]) < 0.02 < means[1]


def test_trap_a_clipped_surrogate_is_no_risk():
    """On policy its value is about 0 for every reward, so it does not distinguish environments."""
    logp = torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward = t(1, 0, 1, 1, 0, 0, 0, 1)
    cu = torch.arange(9, dtype=torch.int32)
    objective = tokfuse.Objective(shape=tokfuse.PPOClip())
    for env in (slice(0, 4), slice(4, 8)):
        advantage = reward[env] - reward[env].mean()
        loss = tokfuse.policy_loss(
            logp[env],
            old_logp=logp[env],
            advantage=advantage,
            objective=objective,
            advantage_level="sequence",
            cu_seqlens=cu[:5],
            normalizer="batch",
        ).loss
        assert abs(float(loss)) < 1e-12
    assert float(reward[:4].mean()) != float(reward[4:].mean())


# -------------------------------------------------------------------------------- tempered weights


def test_tempered_weights_are_a_softmax_of_each_group():
    logp, ids = t(-3, -1, -2, -700, -900), torch.tensor([7, 2, 7, 2, 5])
    out = make("tempered_group_weights", power=0.5)(logp, ids)
    for group in (7, 2, 5):
        rows = ids == group
        torch.testing.assert_close(out[rows], torch.softmax(0.5 * logp[rows], 0))
    assert make("tempered_group_weights", power=0.0)(logp, ids).tolist() == [0.5, 0.5, 0.5, 0.5, 1]
    lost = offpolicy.tempered_group_weights(t(-math.inf, -math.inf, -1), torch.tensor([0, 0, 0]))
    assert lost.tolist() == [0.0, 0.0, 1.0]
    none = offpolicy.tempered_group_weights(t(-math.inf, -math.inf), torch.tensor([0, 0]))
    assert none.tolist() == [0.5, 0.5]


def test_rows_of_the_ops_make_the_ops():
    p, q = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    jsd = make("paired_divergence", kind="jsd")(p, q)
    torch.testing.assert_close(jsd, tokfuse.paired_divergence(p, q, kind="jsd"))
    target = torch.tensor([0, 1, 2])
    debiased = make("debiased_token_stats", bias_logits=q)(p, target)
    torch.testing.assert_close(debiased.logp, tokfuse.token_stats(p - q, target).logp)


# ----------------------------------------------------------------------------------------- metrics


def test_pass_rate_is_the_chance_of_a_right_one_among_k():
    for n, c, k in [(5, 2, 1), (5, 2, 3), (5, 2, 4), (4, 0, 2), (4, 4, 2), (6, 1, 6)]:
        hits = [any(i < c for i in pick) for pick in itertools.combinations(range(n), k)]
        found = answer_metrics.pass_rate_at_k(torch.tensor([n]), torch.tensor([c]), k=k)
        assert float(found) == pytest.approx(sum(hits) / len(hits)), (n, c, k)
    many = make("pass_rate_at_k", k=50)(torch.tensor([10_000, 60]), torch.tensor([10, 60]))
    assert float(many[0]) == pytest.approx(1 - math.comb(9990, 50) / math.comb(10_000, 50))
    assert float(many[1]) == 1.0


def test_majority_and_best_of_n():
    answers = ["4", "5", "5", None, None, None]
    assert answer_metrics.majority_at_k(answers) == "5"
    assert answer_metrics.majority_at_k(["b", "a", "a", "b"]) == "b"  # the first of equal counts
    assert make("majority_at_k", weight=[3.0, 1.0, 1.0, 0, 0, 0])(answers) == "4"
    assert answer_metrics.majority_at_k([None]) is None and answer_metrics.majority_at_k([]) is None
    assert answer_metrics.best_of_n([0.1, 0.9, 0.9]) == 1
    weighted = make("best_of_n", weighted=True)
    assert weighted([0.6, 0.3, 0.4], ["a", "b", "b"]) == 2
    assert weighted([0.6, 0.4, 0.4], ["a", "b", "b"]) == 1  # the first of equal values


# ------------------------------------------------------------------------------------------- errors

A, ONE = make("squarecb", arms=2), torch.tensor([1])
REFUSED = [
    (lambda: bandits.squarecb_probabilities(t(), 1.0), "squarecb_probabilities: cost must be of a"),
    (lambda: bandits.squarecb_probabilities(t(1), -1.0), "squarecb_probabilities: gamma must be"),
    (lambda: make("squarecb", arms=0), "algorithms.squarecb: arms must be"),
    (lambda: make("ofs"), "algorithms.ofs: arms must be given"),
    (lambda: make("ofs", arms=1, width=-1.0), "algorithms.ofs: width must be"),
    (lambda: A.choose(A.initial_state(), t(1)), r"squarecb: cost must be of shape \(2,\)"),
    (lambda: A.observe(A.initial_state(), bandits.Choice(2, 1.0, []), 0), "squarecb: choice.arm"),
    (lambda: bandits.generation_report([], []), "generation_report: target must be one row per"),
    (lambda: environments.vrex_weights(t(1), penalty=-1.0), "vrex_weights: penalty must be"),
    (lambda: make("group_dro"), "algorithms.group_dro: environments must be given"),
    (lambda: make("group_dro", environments=2).observe({"log_weight": [0, 0]}, t(1)), "risk must"),
    (lambda: offpolicy.tempered_group_weights(t(1), ONE, power=5.0), "weights: power must be"),
    (lambda: answer_metrics.pass_rate_at_k(ONE, ONE, k=2), "pass_rate_at_k: samples must be >= k"),
    (lambda: answer_metrics.pass_rate_at_k(ONE, 2 * ONE, k=1), "pass_rate_at_k: correct must be i"),
    (lambda: answer_metrics.majority_at_k(["a"], weight=[]), "majority_at_k: weight must be one p"),
    (lambda: answer_metrics.best_of_n([]), "best_of_n: score must be of at least one"),
    (lambda: answer_metrics.best_of_n([1.0], weighted=True), "best_of_n: answers must be given ex"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
