"""Test LeaF, Thought Branches, Shapley, effects and PNS bounds: definitions, constructed cases, errors."""

import itertools
import math

import pytest
import torch

from tokfuse import algorithms
from tokfuse.algorithms.causal import effects
from tokfuse.algorithms.curation import leaf, shapley, thought_branches

make = algorithms.make


def t(*values, dtype=torch.float64):
    return torch.tensor(values, dtype=dtype)


# -------------------------------------------------------------------------------------------- LeaF


def test_sensitivity_is_the_row_norm_of_the_embeddings_gradient():
    gen = torch.Generator().manual_seed(0)
    embeddings = torch.randn(4, 6, generator=gen, dtype=torch.float64, requires_grad=True)
    loss = (embeddings.sum(1) ** 3).mean()
    (grad,) = torch.autograd.grad(loss, embeddings)
    expected = torch.stack([row.square().sum().sqrt() for row in grad])
    torch.testing.assert_close(leaf.embedding_sensitivity(grad), expected)


def by_definition(student, teacher, q, cap):
    def unit(x):
        return [(v - min(x)) / ((max(x) - min(x)) or 1.0) for v in x]

    d = unit([a - b for a, b in zip(unit(teacher), unit(student), strict=True)])
    threshold = min(sorted(d)[math.floor(q * len(d))], cap)
    return [v <= threshold for v in d]


@pytest.mark.parametrize("q", [0.0, 0.1, 0.35, 0.9])
@pytest.mark.parametrize("cap", [0.5, 0.2])
def test_confounders_by_their_definition(q, cap):
    gen = torch.Generator().manual_seed(1)
    student, teacher = torch.rand(2, 20, generator=gen, dtype=torch.float64)
    found = make("leaf", q=q, cap=cap).confounders(student, teacher)
    assert found.tolist() == by_definition(student.tolist(), teacher.tolist(), q, cap)
    assert bool((found <= make("leaf", q=q, cap=1.0).confounders(student, teacher)).all())


def test_confounders_are_what_only_the_student_looks_at_and_never_whitespace():
    student, teacher = t(0, 5, 1, 5, 0), t(0, 5, 1, 0, 0)
    method = make("leaf", q=0.1)
    assert method.confounders(student, teacher).tolist() == [False] * 3 + [True, False]
    keep = torch.tensor([False, False, False, True, False])
    assert not method.confounders(student, teacher, keep).any()
    assert not method.confounders(t(), t()).any()
    # Scaling the gradients of one model changes nothing, because each model is mapped to [0, 1] separately.
    assert torch.equal(method.confounders(100 * student, teacher), method.confounders(student, teacher))


def test_spans_and_pruned_prompts():
    mask = torch.tensor([True, True, False, True, False, True])
    assert leaf.spans(mask) == [(0, 2), (3, 4), (5, 6)]
    pruned = leaf.prune(torch.arange(6), mask)
    assert [p.tolist() for p in pruned] == [[2, 3, 4, 5], [0, 1, 2, 4, 5], [0, 1, 2, 3, 4]]
    assert leaf.spans(torch.zeros(3, dtype=torch.bool)) == [] == leaf.spans(mask[:0])
    kept = leaf.worth_keeping(*torch.tensor(list(itertools.product([False, True], repeat=3))).t())
    assert kept.tolist() == [False, False, False, True, False, False, False, False]


# ------------------------------------------------------------------------------- Thought Branches


def test_binary_kl_and_its_smoothing():
    p, q = 0.25, 0.5
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert thought_branches.kl_binary(25, 100, 50, 100) == pytest.approx(expected, abs=1e-8)
    assert thought_branches.kl_binary(5, 10, 5, 10) == 0.0
    never = thought_branches.kl_binary(10, 10, 0, 10)
    assert never == pytest.approx(math.log((10 + 1e-9) / 1e-9), rel=1e-6)
    laplace = thought_branches.kl_binary(10, 10, 0, 10, alpha=1.0)
    assert laplace == pytest.approx(11 / 12 * math.log(11) + 1 / 12 * math.log(1 / 11))


def test_importance_is_of_the_dissimilar_rollouts_only():
    similarity = t(0.9, 0.1, 0.2, 0.59, 0.6, 0.7)
    outcome = torch.tensor([True, False, False, True, True, True])
    kept = torch.tensor([True, True, True, False])
    method = make("thought_branches")
    assert method.importance(similarity, outcome, kept) == pytest.approx(thought_branches.kl_binary(1, 3, 3, 4))
    wide = make("thought_branches", similar=0.15).importance(similarity, outcome, kept)
    assert wide == pytest.approx(thought_branches.kl_binary(0, 1, 3, 4))
    few = make("thought_branches", similar=0.15, min_dissimilar=0.2)
    assert few.importance(similarity, outcome, kept) == pytest.approx(thought_branches.kl_binary(4, 6, 3, 4))
    smooth = make("thought_branches", alpha=1.0).importance(similarity, outcome, kept)
    assert smooth == pytest.approx(thought_branches.kl_binary(1, 3, 3, 4, alpha=1.0))


def same(sentence, candidates):
    return [float(c == sentence) for c in candidates]


def test_resilience_counts_removals_until_the_content_stays_away():
    continuations = iter([["x", "S", "y"], ["a", "b", "S"], ["c"]])
    prefixes = []

    def resample(prefix):
        prefixes.append(list(prefix))
        return next(continuations)

    out = make("thought_branches").resilience(["p", "S", "z"], 1, resample, same)
    assert out == (3, True, ["p", "x", "a", "b", "c"])
    assert prefixes == [["p"], ["p", "x"], ["p", "x", "a", "b"]]
    stubborn = make("thought_branches", max_interventions=4).resilience(["S"], 0, lambda prefix: ["S"], same)
    assert stubborn == (4, False, ["S"])
    assert make("thought_branches").resilience(["S"], 0, lambda prefix: [], same).abandoned


def test_transplant_curve_and_the_binary_difference():
    outcomes = [torch.tensor(o, dtype=torch.bool) for o in ([0, 0, 0, 1], [1, 1], [1, 1, 1, 0])]
    assert thought_branches.transplant_curve(outcomes).tolist() == [0.0, 0.75, 0.5]
    assert thought_branches.counterfactual_plus_plus(0.9, 0.4) == pytest.approx(0.5)


# ------------------------------------------------------------------------------------- Shapley


def game(members):
    """A non-additive game: two players that work together, one that does harm, one without effect."""
    worth = 1.0 * (0 in members) + 3.0 * ({1, 2} <= members) - 2.0 * ({0, 3} <= members)
    return worth + 0.5 * len(members & {0, 1, 2}) ** 2


def test_exact_values_are_means_over_all_orders():
    expected = [0.0] * 5
    for order in itertools.permutations(range(5)):
        members = frozenset()
        for i in order:
            expected[i] += (game(members | {i}) - game(members)) / math.factorial(5)
            members |= {i}
    found = shapley.shapley_exact(game, 5)
    assert found.tolist() == pytest.approx(expected)
    assert float(found.sum()) == pytest.approx(game(frozenset(range(5))) - game(frozenset()))
    assert float(found[4]) == 0.0 and float(found[1]) == float(found[2])
    assert shapley.shapley_exact(game, 0).tolist() == []


def test_monte_carlo_agrees_with_exact_within_its_errors():
    exact = shapley.shapley_exact(game, 5)
    estimate = shapley.shapley_monte_carlo(game, 5, permutations=2000, seed=1)
    assert bool(((estimate.value - exact).abs() <= 4 * estimate.standard_error + 1e-12).all())
    assert float(estimate.value.sum()) == pytest.approx(float(exact.sum()))
    again = shapley.shapley_monte_carlo(game, 5, permutations=2000, seed=1)
    assert torch.equal(estimate.value, again.value)
    other = make("cdc_mas", permutations=50, seed=2)(game, 5)
    assert not torch.equal(other.value, estimate.value)
    assert float(other.standard_error[1]) > float(estimate.standard_error[1])


def test_its_standard_error_covers():
    exact = shapley.shapley_exact(game, 4)
    inside = 0
    for seed in range(60):
        found = shapley.shapley_monte_carlo(game, 4, permutations=40, seed=seed)
        inside += int(abs(found.value[1] - exact[1]) <= 1.96 * found.standard_error[1])
    assert 50 <= inside <= 60  # 57 expected


def test_each_set_is_evaluated_once():
    calls = []
    shapley.shapley_monte_carlo(lambda s: calls.append(s) or 0.0, 3, permutations=100)
    assert len(calls) == len(set(calls)) <= 8


def test_trap_edges_run_from_cause_to_effect():
    """A gave B bad data: B depends on A, so the edge goes from the cause A to the effect B."""
    assert shapley.performance_graph([("B", "A")]) == [("A", "B")]


# -------------------------------------------------------------------------------------- effects


def test_ablation_effect_and_its_errors():
    gen = torch.Generator().manual_seed(0)
    noise = torch.randn(400, generator=gen, dtype=torch.float64)
    full, without = noise + 0.3, noise + 0.01 * noise.flip(0)
    unpaired = effects.ablation_effect(full, without)
    paired = make("ablation_effect", paired=True)(full, without)
    assert unpaired.value == pytest.approx(paired.value) == pytest.approx(0.3, abs=0.01)
    spread = math.sqrt(float(full.var() / 400 + without.var() / 400))
    assert unpaired.standard_error == pytest.approx(spread)
    assert paired.standard_error == pytest.approx(float((full - without).std()) / 20)
    assert paired.standard_error < unpaired.standard_error / 10


def test_ablation_errors_are_those_of_repeated_experiments():
    gen = torch.Generator().manual_seed(1)
    found = [
        effects.ablation_effect(torch.randn(30, generator=gen), torch.randn(20, generator=gen)) for _ in range(400)
    ]
    values = torch.tensor([f.value for f in found])
    mean_error = sum(f.standard_error for f in found) / len(found)
    assert float(values.std()) == pytest.approx(mean_error, rel=0.15)


def test_pns_bounds_hold_the_truth_of_every_coupling():
    """For every joint distribution of the two outcomes on a grid, PNS is inside the bounds, and both bounds occur."""
    low, high = {}, {}
    steps = range(11)
    for both, only1, only0 in itertools.product(steps, repeat=3):
        if both + only1 + only0 <= 10:
            key, pns = (both + only1, both + only0), only1 / 10
            low[key], high[key] = min(low.get(key, 1), pns), max(high.get(key, 0), pns)
    for p1, p0 in low:
        bounds = effects.pns_bounds(t(p1 / 10), t(p0 / 10))
        assert float(bounds.low) == pytest.approx(low[p1, p0])
        assert float(bounds.high) == pytest.approx(high[p1, p0])
    assert effects.pns_bounds(t(0.7), t(0.2), monotone=True).high.tolist() == pytest.approx([0.5])


# ------------------------------------------------------------------------------------------- errors

B, NO = torch.tensor([True]), torch.zeros(0, dtype=torch.bool)
REFUSED = [
    (lambda: make("leaf", q=1.0), "algorithms.leaf: q must be a finite number"),
    (lambda: make("leaf", cap=2.0), "algorithms.leaf: cap must be"),
    (lambda: make("leaf").confounders(t(1, 2), t(1)), r"leaf: teacher must be of shape \(2,\)"),
    (lambda: thought_branches.kl_binary(2, 1, 0, 1), "kl_binary: successes_p must be"),
    (lambda: thought_branches.kl_binary(0, 0, 0, 1), "kl_binary: trials_p must be"),
    (lambda: make("thought_branches").importance(t(1), B, NO), "outcome and kept_outcome must be"),
    (lambda: make("thought_branches", similar=2.0), "thought_branches: similar must be"),
    (lambda: make("thought_branches").resilience(["a"], 1, list, same), "thought_branches: i must"),
    (lambda: thought_branches.transplant_curve([NO]), "transplant_curve: outcomes must be at leas"),
    (lambda: shapley.shapley_exact(game, 17), "shapley_exact: players must be"),
    (lambda: shapley.shapley_monte_carlo(game, 2, permutations=1), "permutations must be"),
    (lambda: effects.ablation_effect(t(1), t(1, 2)), "ablation_effect: full must be of at least t"),
    (lambda: effects.ablation_effect(t(1, 2), t(1, 2, 3), paired=True), "without must be of shape"),
    (lambda: effects.pns_bounds(t(1), t(1, 1)), "pns_bounds: without_step must be of shape"),
    (lambda: effects.pns_bounds(t(1.5), t(1)), r"pns_bounds: with_step must be finite and in \[0, 1\]"),
    (lambda: effects.pns_bounds(t(0.1), t(0.2), monotone=True), "with_step must be >= without_ste"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED, ids=range(len(REFUSED)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()
