"""Test CurES, SEELE, HPL, Cog-Rethinker and ISLA: formulas, known parameters, states, errors."""

import itertools
import json
import math
import sys

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tokfuse import algorithms
from tokfuse.algorithms.curation import cog_rethinker, cures, hpl, isla, seele

make = algorithms.make


def t(*values):
    return torch.tensor(values, dtype=torch.float64)


# ------------------------------------------------------------------------------------------- CurES


@hypothesis.given(st.lists(st.floats(0, 1e300), min_size=1, max_size=12), st.integers(0, 5000))
def test_largest_remainder_sums_exactly_and_stays_within_one(shares, total):
    x = t(*shares)
    count = cures.largest_remainder(x, total)
    assert int(count.sum()) == total and count.dtype == torch.int64
    weights = [s / max(shares) if max(shares) else 1.0 for s in shares]
    for n, w in zip(count.tolist(), weights, strict=True):
        assert abs(n - total * w / math.fsum(weights)) < 1 + 1e-6


def test_largest_remainder_ties_go_to_the_first_rows():
    assert cures.largest_remainder(t(1, 1, 1), 4).tolist() == [2, 1, 1]
    assert cures.largest_remainder(t(0, 0), 3).tolist() == [2, 1]
    assert cures.largest_remainder(t(), 0).tolist() == []


def rollouts(seed=0, prompts=3, n=40):
    """Return gradients of correct and wrong rollouts. The success rates are the empirical ones."""
    gen = torch.Generator().manual_seed(seed)
    ids = torch.arange(prompts).repeat_interleave(n)
    right = torch.rand(prompts * n, generator=gen) < 0.4
    g = torch.randn(prompts * n, 5, generator=gen, dtype=torch.float64)
    g = g + right[:, None] * t(1, -1, 0, 2, 0) + ids[:, None]
    p = torch.stack([right[ids == i].double().mean() for i in range(prompts)])
    return g, right, ids, p


def test_sigma_is_the_deviation_of_the_policy_gradient():
    """sqrt(Tr Var((r - p) grad log pi)), computed from its definition."""
    g, right, ids, p = rollouts()
    got = cures.rollout_sigma(g, right, ids, 3, p)
    for i in range(3):
        gradient = (right[ids == i].double() - p[i])[:, None] * g[ids == i]
        variance = gradient.var(0, unbiased=False).sum()
        assert float(got[i]) == pytest.approx(float(variance.sqrt()), rel=1e-12)


def test_trap_norms_alone_overestimate_sigma():
    g, right, ids, p = rollouts()
    vector = cures.rollout_sigma(g, right, ids, 3, p)
    norms = cures.rollout_sigma(g.norm(dim=1), right, ids, 3, p)
    assert bool((norms > vector * 1.01).all())
    i = 1
    plus, minus = (g.norm(dim=1)[(ids == i) & side] for side in (right, ~right))
    q = 1 - p[i]
    square = (
        p[i] * q**2 * plus.square().mean()
        + p[i] ** 2 * q * minus.square().mean()
        - (p[i] * q * (plus.mean() - minus.mean())) ** 2
    )
    assert float(norms[i]) == pytest.approx(float(square.sqrt()))


def test_sigma_with_an_unseen_side_is_finite_and_without_rollouts_zero():
    g = torch.ones(2, 3)
    out = cures.rollout_sigma(g, torch.tensor([False, False]), torch.tensor([0, 0]), 2, t(0.25, 0.5))
    assert float(out[0]) == pytest.approx(math.sqrt(0.25 * 0.75 * (0.25 * 3 - 0.25 * 0.75 * 3)))
    assert float(out[1]) == 0.0
    certain = cures.rollout_sigma(g, torch.tensor([True, False]), torch.tensor([0, 1]), 2, t(1, 0))
    assert certain.tolist() == [0.0, 0.0]


def seen(method, wins, trials):
    state = method.initial_state()
    ids = torch.arange(len(wins)).repeat_interleave(trials)
    return method.observe(state, ids, torch.cat([torch.arange(trials) < w for w in wins]))


def test_posterior_and_paper_probabilities():
    method = make("cures", prompts=5, tau=0.1)
    state = seen(method, range(5), 4)
    p = t(*((s + 1) / 6 for s in range(5)))
    torch.testing.assert_close(method.success(state), p)
    w = ((p * (1 - p)).sqrt() / 0.1).exp()
    torch.testing.assert_close(method.probabilities(state), w / w.sum())
    relative = (5 * method.probabilities(state)).tolist()
    assert relative == pytest.approx([0.46, 1.23, 1.63, 1.23, 0.46], abs=0.01)
    other = make("cures", prompts=5, tau=0.1, prior=(3.0, 1.0))
    assert float(other.success(other.initial_state())[0]) == 0.75


def test_trap_the_released_temperature_makes_the_sampler_uniform():
    method = make("cures", prompts=5, tau=0.1, sampler="code")
    relative = (5 * method.probabilities(seen(method, range(5), 4))).tolist()
    assert relative == pytest.approx([1.0018, 1.0001, 0.9995, 0.9993, 0.9988], abs=6e-4)
    assert max(relative) - min(relative) < 0.004 and relative[0] == max(relative)


def test_draws_are_without_replacement_seeded_and_follow_the_probabilities():
    method = make("cures", prompts=4, tau=0.05, seed=3)
    state, counts, rounds = seen(method, [0, 2, 4, 1], 4), np.zeros(4), 3000
    first, after = method.sample(state, 3)
    assert len(set(first.tolist())) == 3 and after["draws"] == 1 and state["draws"] == 0
    assert torch.equal(first, method.sample(state, 3)[0])
    for _ in range(rounds):
        chosen, state = method.sample(state, 1)
        counts[int(chosen)] += 1
    expected = method.probabilities(state).numpy()
    assert np.abs(counts / rounds - expected).max() < 4 * math.sqrt(0.25 / rounds)
    moved = make("cures", prompts=4, tau=0.05, seed=4)
    runs = [[int(m.sample(state | {"draws": i}, 1)[0]) for i in range(20)] for m in (method, moved)]
    assert runs[0] != runs[1]
    cold = make("cures", prompts=4, tau=1e-9)
    assert cold.sample(seen(cold, [0, 2, 4, 1], 4), 2)[0].tolist() == [1, 3]


def test_trap_a_zero_quota_starves_a_prompt_unless_a_minimum_is_set():
    sigma = t(0.0, 1.0, 3.0)
    method = make("cures", prompts=3, tau=0.1)
    assert method.quota(sigma, 16).tolist() == [0, 4, 12]
    kept = make("cures", prompts=3, tau=0.1, minimum=1).quota(sigma, 16)
    assert int(kept.sum()) == 16 and int(kept.min()) == 1


def test_released_rounding_fills_up_to_a_multiple():
    sigma = t(1.4, 1.4, 1.2)
    code = make("cures", prompts=3, tau=0.1, rounding="code", multiple=4)
    plain = make("cures", prompts=3, tau=0.1, rounding="code")
    assert plain.quota(sigma, 10).tolist() == [4, 4, 3]  # 3.5, 3.5, 3.0: the sum is not the budget
    assert code.quota(sigma, 10).tolist() == [5, 4, 3]
    assert make("cures", prompts=3, tau=0.1).quota(sigma, 10).tolist() == [4, 3, 3]


# ------------------------------------------------------------------------------------------- SEELE


@pytest.mark.parametrize(
    "truth", [seele.ThreePL(8.0, -0.4, 0.1), seele.ThreePL(20.0, -0.7, 0.0), seele.ThreePL(5.0, -0.2, 0.25)]
)
def test_seele_recovers_planted_parameters(truth):
    pytest.importorskip("scipy")
    rates = [i / 12 for i in range(13)]
    found = seele.fit_3pl(rates, [truth.accuracy(r) for r in rates])
    assert tuple(found) == pytest.approx(tuple(truth), abs=1e-4)
    for target in (0.5, 0.8):
        assert truth.accuracy(seele.invert_3pl(found, target)) == pytest.approx(target, abs=1e-5)


def test_seele_recovers_them_from_noisy_rounds():
    pytest.importorskip("scipy")
    truth, rng = seele.ThreePL(10.0, -0.5, 0.1), np.random.default_rng(0)
    rates = [i / 20 for i in range(21)] * 2
    accuracy = [rng.binomial(64, truth.accuracy(r)) / 64 for r in rates]
    found = seele.fit_3pl(rates, accuracy)
    assert found.mu == pytest.approx(truth.mu, abs=0.03) and found.b == pytest.approx(0.1, abs=0.05)
    repeated = seele.fit_3pl([0.3, 0.3, 0.6], [0.0, 0.5, 0.75])
    averaged = seele.fit_3pl([0.3, 0.6], [0.25, 0.75])
    assert tuple(repeated) == pytest.approx(tuple(averaged))


def test_fit_bounds_are_used():
    pytest.importorskip("scipy")
    bounds = ((0.1, 3.0), (-1.5, 0.5), (0.0, 0.99))
    assert seele.fit_3pl([0.4, 0.5], [0.0, 1.0]).k > 10
    assert seele.fit_3pl([0.4, 0.5], [0.0, 1.0], bounds=bounds).k <= 3.0


@pytest.mark.parametrize(
    "rounds",
    [
        [(0.9, 0.0)],
        [(0.9, 1.0)],
        [(0.5, 1.0), (0.25, 1.0)],
        [(0.0, 1.0)],
        [(1.0, 0.0)],
        [(0.0, 0.0), (1.0, 1.0)],
        [(0.0, 0.0), (1.0, 0.0)],
        [(0.0, 1.0), (1.0, 1.0)],
    ],
)
def test_trap_rounds_all_right_or_all_wrong_still_give_a_rate(rounds):
    pytest.importorskip("scipy")
    fit = seele.fit_3pl(*zip(*rounds, strict=True))
    rate = seele.invert_3pl(fit, 0.5)
    assert 0.0 <= rate <= 1.0 and all(map(math.isfinite, fit))
    # The search goes in the correct direction: up after a failure, down after a success.
    wrong = [r for r, a in rounds if a == 0.0 and r > 0.0]
    right = [r for r, a in rounds if a == 1.0 and r < 1.0]
    assert all(rate >= r - 1e-6 for r in wrong if r < 1.0)
    assert all(rate <= r + 1e-6 for r in right)


def test_without_scipy_the_fit_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ImportError, match=r"Install tokfuse\[selection\] or scipy"):
        seele.fit_3pl([0.5], [0.5])


def test_trap_no_rate_reaches_an_accuracy_below_the_guessing_floor():
    curve = seele.ThreePL(8.0, -0.4, 0.6)
    assert seele.invert_3pl(curve, 0.5) == 0.0 and seele.invert_3pl(curve, 0.6) == 0.0
    assert seele.invert_3pl(seele.ThreePL(8.0, -1.4, 0.0), 0.5) == 1.0  # longer than the solution


def test_seele_rounds_settle_at_the_target_and_the_state_resumes():
    pytest.importorskip("scipy")
    method, truth, units = make("seele"), seele.ThreePL(9.0, -0.45, 0.05), 40
    state, seen_accuracy = method.initial_state(), []
    assert method.hint(state, "q", units).rate == 39 / 40
    assert method.hint(state, "q", 1) == seele.Hint(0.0, 0)
    at = {"memory": {}, "last": {"q": 0.65}}  # parts are rounded: 1.3 and 1.95 of them
    assert [method.hint(at, "q", n).length for n in (2, 3)] == [1, 2]
    for _ in range(method.rounds):
        hint = method.hint(state, "q", units)
        seen_accuracy.append(truth.accuracy(hint.length / units))
        before = json.dumps(state)
        after = method.observe(state, "q", units, hint, seen_accuracy[-1])
        assert json.dumps(state) == before
        state = json.loads(json.dumps(after))
        loaded = method.load_state_dict(method.state_dict(state))
        assert method.hint(loaded, "q", units) == method.hint(state, "q", units)
    assert abs(seen_accuracy[-1] - 0.5) < 0.1 < abs(seen_accuracy[0] - 0.5)
    assert state["memory"] == {} and state["last"]["q"] == hint.rate
    assert method.hint(state, "q", units) == hint  # the next epoch starts at this batch
    higher = make("seele", target=0.8)
    mid = {"memory": {"q": [[0.5, 0.4]]}, "last": {}}
    assert higher.hint(mid, "q", units).rate > method.hint(mid, "q", units).rate


def test_trap_hint_tokens_are_outside_the_policy_mask():
    policy, imitation = make("seele").masks(torch.tensor([0, 3, 3, 7], dtype=torch.int32), torch.tensor([2, 0, 1]))
    assert imitation.tolist() == [True, True, False, True, False, False, False]
    assert torch.equal(policy, ~imitation)


# --------------------------------------------------------------------------------------------- HPL


def test_hpl_buckets_and_phases():
    method = make("hpl_curriculum")
    length = torch.tensor([3, 4, 6, 7, 1, 1, 1])
    gap = t(0.7, 0.7, 0.4, 0.9, 0.69, 0.4, 0.39)
    long, hard = method.buckets(length, gap)
    assert long.tolist() == [1, 2, 2, 3, 1, 1, 1] and hard.tolist() == [1, 1, 2, 1, 2, 2, 3]
    for phase, allowed in ((1, {(1, 1)}), (2, {(1, 1), (1, 2), (2, 1)})):
        expected = [pair in allowed for pair in zip(long.tolist(), hard.tolist(), strict=True)]
        assert method.in_phase(phase, length, gap).tolist() == expected
    assert bool(method.in_phase(3, length, gap).all())
    other = make("hpl_curriculum", lengths=(1, 2), gaps=(0.5, 0.1))
    assert [x.tolist() for x in other.buckets(length[:2], gap[:2])] == [[3, 3], [1, 1]]


def test_hpl_keeps_pairs_that_the_expert_wins_clearly():
    method = make("hpl_curriculum")
    args = t(1, 1, 1, 0), t(0, 0, 0, 1), t(0.9, 0.79, 0.9, 0.9), t(0.5, 0.1, 0.61, 0.1)
    assert method.keep(*args).tolist() == [True, False, False, False]
    assert make("hpl_curriculum", min_gap=0.2).keep(*args).tolist()[2]
    assert make("hpl_curriculum", min_return=0.7).keep(*args).tolist()[1]
    assert hpl.group_return(t([0, 1, 1], [0, 0, 0])).tolist() == [2 / 3, 0.0]


def test_hpl_segmentations():
    assert hpl.segment_fixed_size(7).tolist() == [0, 3, 6, 7]
    assert hpl.segment_fixed_size(6, 2).tolist() == [0, 2, 4, 6]
    assert hpl.segment_fixed_count(7).tolist() == [0, 3, 6, 7]
    assert hpl.segment_fixed_count(2, 3).tolist() == [0, 1, 2]
    assert hpl.segment_fixed_size(0).tolist() == [0] == hpl.segment_fixed_count(0).tolist()
    entropy = t(0.1, 1.5, 0.2, 0.3, 2.0)
    assert hpl.segment_uncertain(entropy, quantile=None, threshold=1.2).tolist() == [0, 2, 5]
    assert hpl.segment_uncertain(entropy).tolist() == [0, 5]  # the cut after the last action
    assert hpl.segment_uncertain(entropy, quantile=0.5).tolist() == [0, 2, 5]
    assert hpl.segment_uncertain(t()).tolist() == [0]


# -------------------------------------------------------------------------------- Cog-Rethinker


def test_cog_rethinker_routes_only_prompts_that_nothing_solved():
    method = make("cog_rethinker", sft_weight=0.1)
    assert [method.route([0.0] * n) for n in range(4)] == ["direct", "decompose", "reflect", None]
    assert method.route([0.1]) is None and method.route([0.0, 0.5]) is None


def test_cog_rethinker_buffers_and_retrieval():
    method = make("cog_rethinker", sft_weight=0.1, demonstrations=2, capacity=3)
    state = method.initial_state()
    for question in ("sum of two primes", "area of a circle", "area of a square", "prime factors"):
        state = method.push(state, "decompose", question, question.upper())
    assert [q for q, _ in state["decompose"]] == ["area of a circle", "area of a square", "prime factors"]
    found = method.retrieve(state, "decompose", "the area of one circle")
    assert found[0] == ("area of a circle", "AREA OF A CIRCLE") and len(found) == 2
    assert method.retrieve(state, "reflect", "x") == []
    again = method.load_state_dict(json.loads(json.dumps(method.state_dict(state))))
    assert method.retrieve(again, "decompose", "prime") == method.retrieve(state, "decompose", "prime")


def test_bm25_by_its_formula():
    documents = ["a b b", "a", "c d e f"]
    idf = {w: math.log(1 + (3 - n + 0.5) / (n + 0.5)) for w, n in (("a", 2), ("b", 1))}
    mean = 8 / 3

    def term(word, f, length):
        return idf[word] * f * 2.5 / (f + 1.5 * (0.25 + 0.75 * length / mean))

    expected = [term("a", 1, 3) + term("b", 2, 3), term("a", 1, 1), 0.0]
    assert cog_rethinker.bm25("A, b!", documents).tolist() == pytest.approx(expected)
    assert cog_rethinker.bm25("a", []).tolist() == [] == cog_rethinker.bm25("", []).tolist()


def test_sft_weights_are_the_mean_over_solved_responses_of_token_means():
    method, cu = (make("cog_rethinker", sft_weight=0.3), torch.tensor([0, 2, 3, 7], dtype=torch.int32))
    w, logp = method.sft_weights(cu, torch.tensor([True, False, True])), torch.arange(1.0, 8.0)
    expected = 0.3 * (logp[:2].mean() + logp[3:].mean()) / 2
    assert float((w * logp).sum()) == pytest.approx(float(expected))
    assert not method.sft_weights(cu, torch.zeros(3, dtype=torch.bool)).any()


# -------------------------------------------------------------------------------------------- ISLA


def test_isla_stand_in():
    accuracy, uncertainty = t(0.25, 0.5, 0.5, 1.0), t(0.1, 2.0, 2.0)
    scores = make("isla", min_accuracy_gain=0.1, min_uncertainty=0.5).scores(accuracy)
    assert scores.relative_accuracy.tolist() == [0.25, 0.0, 0.5]
    h = -0.25 * math.log(0.25) - 0.75 * math.log(0.75)
    assert scores.information_gain.tolist() == pytest.approx([h - math.log(2), 0.0, math.log(2)])
    for gain, floor in itertools.product((0.0, 0.1), (0.0, 0.5)):
        method = make("isla", min_accuracy_gain=gain, min_uncertainty=floor)
        expected = [floor < 0.5, gain == 0.0, True]
        assert method.select(accuracy, uncertainty).tolist() == expected
    assert method.pair(0.5, t(0.5, 0.25, 0.25)) == 1
    assert method.pair(0.25, t(0.5, 0.25)) is None and method.pair(0.5, t()) is None
    assert isla.binary_entropy(t(0, 1)).tolist() == [0.0, 0.0]


# ------------------------------------------------------------------------------------------- errors

C = make("cures", prompts=2, tau=0.1)
S, R = make("seele"), make("cog_rethinker", sft_weight=0.0)
CU, YES = torch.tensor([0, 2], dtype=torch.int32), torch.tensor([True])
REFUSED = [
    (lambda: cures.largest_remainder(t(-1.0), 1), "largest_remainder: share must be finite and in"),
    (lambda: cures.largest_remainder(t(), 1), "largest_remainder: total must be 0 without rows"),
    (lambda: make("cures", prompts=2), "algorithms.cures: tau must be given"),
    (lambda: make("cures", prompts=2, tau=0.0), "algorithms.cures: tau must be a finite number"),
    (lambda: make("cures", prompts=0, tau=1.0), "algorithms.cures: prompts must be"),
    (lambda: make("cures", prompts=1, tau=1.0, prior=(0.0, 1.0)), r"algorithms.cures: prior\[0\]"),
    (lambda: make("cures", prompts=1, tau=1.0, sampler="x"), "algorithms.cures: sampler must be"),
    (lambda: make("cures", prompts=1, tau=1.0, rounding="x"), "algorithms.cures: rounding must"),
    (lambda: make("cures", prompts=1, tau=1.0, multiple=2), "algorithms.cures: multiple must be l"),
    (lambda: C.observe(C.initial_state(), [2], YES), r"cures: prompt_ids must be an integer in \[0, 1\]"),
    (lambda: C.sample(C.initial_state(), 3), "algorithms.cures: count must be"),
    (lambda: make("cures", prompts=2, tau=1.0, minimum=3).quota(t(1, 1), 5), "total must be >= mi"),
    (lambda: seele.fit_3pl([0.1], []), "fit_3pl: accuracies must be one per rate"),
    (lambda: seele.fit_3pl([0.1], [1.5]), "fit_3pl: accuracies must be a finite number"),
    (lambda: seele.fit_3pl([], [], bounds=((2, 1), (0, 1), (0, 0.5))), r"fit_3pl: bounds\[0\], of k,"),
    (lambda: seele.invert_3pl(seele.ThreePL(1, 0, 0), 1.0), "invert_3pl: target must be a finite number in"),
    (lambda: make("seele", target=0.0), "algorithms.seele: target must be a finite number in"),
    (lambda: S.masks(CU, torch.tensor([3])), "algorithms.seele: hint_tokens must be"),
    (lambda: make("hpl_curriculum", lengths=(3, 3)), r"hpl_curriculum: lengths\[1\] must be"),
    (lambda: make("hpl_curriculum", gaps=(0.4, 0.4)), r"hpl_curriculum: gaps\[0\] must be"),
    (lambda: make("hpl_curriculum").in_phase(4, CU, CU), "hpl_curriculum: phase must be an integer in"),
    (lambda: hpl.segment_uncertain(t(1), threshold=1.0), "segment_uncertain: quantile or threshol"),
    (lambda: make("cog_rethinker"), "algorithms.cog_rethinker: sft_weight must be given"),
    (lambda: R.route([0.0] * 4), "cog_rethinker: accuracies must be of at most 3"),
    (lambda: R.push(R.initial_state(), "direct", "", ""), "cog_rethinker: stage must be one of de"),
    (lambda: make("isla"), "algorithms.isla: min_accuracy_gain, min_uncertainty must be given"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_states_resume_exactly_and_refuse_other_configurations():
    state = C.observe(C.initial_state(), [0, 1, 1], torch.tensor([True, False, True]))
    _, state = C.sample(state, 1)
    saved = json.loads(json.dumps(C.state_dict(state)))
    loaded = C.load_state_dict(saved)
    assert loaded == state and torch.equal(C.sample(loaded, 2)[0], C.sample(state, 2)[0])
    with pytest.raises(ValueError, match="the config of the checkpoint"):
        make("cures", prompts=2, tau=0.2).load_state_dict(saved)
