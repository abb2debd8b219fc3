"""Test the preference losses against the papers' formulas in float64: values and gradients.

Every loss is a function of per-sequence sums. These tests use the reference in float64, with logits that
have chosen log-probabilities. test_preference_step.py tests the backends.
"""

import dataclasses
import math

import pytest
import torch
from harness import compare
from preference_cases import (
    LOSSES,
    PAIRS,
    PAIRWISE,
    TOKENS,
    S,
    example,
    example_batch,
    logsig,
    of_sequence,
    pair_batch,
    sequences,
    sig,
)

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import NLL, PreferenceBatch, PreferenceLoss, preference_step
from tokfuse.algorithms.preference import Contrast
from tokfuse.algorithms.preference.pointwise import log_odds


def two_way(logp: torch.Tensor) -> torch.Tensor:
    """Return (tokens, 2) logits whose first entry has these log-probabilities, differentiable."""
    return torch.stack([logp, torch.log(-torch.expm1(logp))], 1)


def run(loss: PreferenceLoss, batch: PreferenceBatch, logp: torch.Tensor, **given):
    """Return (step, d loss / d logp) of the reference in float64, for chosen log-probabilities."""
    leaf = logp.clone().requires_grad_()
    target = torch.zeros(logp.shape[0], dtype=torch.int64)
    with tokfuse.backend("reference"):
        step = preference_step(loss=loss, batch=batch, logits=two_way(leaf), target=target, **given)
        (grad,) = torch.autograd.grad(step.loss, leaf)
    return step, grad


def expected(formula, batch: PreferenceBatch, logp: torch.Tensor, ref: torch.Tensor):
    """Return (losses, gradient of their sum) of a formula over pairs."""
    leaf = logp.clone().requires_grad_()
    out = [formula(*(of_sequence(batch, leaf, ref, i) for i in pair)) for pair in PAIRS]
    (grad,) = torch.autograd.grad(sum(out), leaf)
    return torch.stack(out).detach(), grad


@pytest.mark.parametrize("name", PAIRWISE)
@pytest.mark.parametrize("seed", [0, 1])
def test_formula(name: str, seed: int):
    options, formula = PAIRWISE[name]
    _, _, logp, ref = sequences(seed)
    loss = algorithms.make(name, **options)
    batch = pair_batch(seed, loss.needs_reference)
    losses, grad = expected(formula, batch, logp, ref)
    step, found = run(loss, batch, logp)
    compare(step.losses, losses, rtol=1e-11, what="losses")
    compare(step.loss, losses.sum(), rtol=1e-11, what="loss")
    compare(found, grad, atol=1e-10 * float(grad.abs().max()), what="d logp")
    mean, half = run(loss, batch, logp, normalizer="batch")
    compare(mean.loss, losses.mean(), rtol=1e-11)
    compare(half, grad / 4, atol=1e-10 * float(grad.abs().max()))


def test_every_pairwise_row_has_a_formula_or_a_test_of_its_own():
    own = {"wpo", "ld_dpo", "cpo", "kto", "aot", "aot_unpaired", "hpl", "aries"}
    assert set(LOSSES) == set(PAIRWISE) | own


# -------------------------------------------------------------------------- published coefficients


def table(w: S, r: S, b: float):
    """Return (c_chosen, c_rejected) of some rows in closed form."""
    u = b * (w.rho - r.rho)
    s_w, s_l, s = sig(b * w.rho), sig(b * r.rho), sig(u)
    m = w.rho / w.n - r.rho / r.n - 1 / (2 * b)
    a_w, a_l = w.lp / w.n, r.lp / r.n
    z = sig(log_odds(r.lp / r.n) - log_odds(w.lp / w.n))
    return {
        "dpo": (-b * sig(-u), b * sig(-u)),
        "conservative_dpo": (-b * (sig(-u) - 0.1), b * (sig(-u) - 0.1)),
        "robust_dpo": [k * b * (0.9 * sig(-u) + 0.1 * s) / 0.8 for k in (-1, 1)],
        "slic": (-b * (u < 1).double(), b * (u < 1).double()),
        "ipo_sum": [k * 2 * (w.rho - r.rho - 1 / (2 * b)) for k in (1, -1)],
        "ipo": (2 * m / w.n, -2 * m / r.n),
        "dpo_norm": [k * b / n * sig(-b * (w.rho / w.n - r.rho / r.n)) for k, n in ((-1, w.n), (1, r.n))],
        "orpo": (-1 / w.n - 0.1 * z / (w.n * (1 - a_w.exp())), 0.1 * z / (r.n * (1 - a_l.exp()))),
        "apo_zero": (-b * s_w * (1 - s_w), b * s_l * (1 - s_l)),
        "apo_down": (b * s_w * (1 - s_w) - b * s * (1 - s), b * s * (1 - s)),
    }


def test_coefficients_are_one_number_per_sequence():
    _, mask, logp, ref = sequences()
    for name in table(S(logp[0], ref[0], 1), S(logp[1], ref[1], 1), 0.1):
        loss = algorithms.make(name)
        batch = pair_batch(0, loss.needs_reference)
        _, grad = run(loss, batch, logp)
        want = torch.zeros_like(logp)
        cu = batch.cu_seqlens.tolist()
        for pair in PAIRS:
            w, r = (of_sequence(batch, logp, ref, i) for i in pair)
            for i, c in zip(pair, table(w, r, 0.1)[name], strict=True):
                want[cu[i] : cu[i + 1]] = c
        compare(grad, torch.where(mask, want, 0.0), atol=1e-11, what=name)


# ---------------------------------------------------------------------- losses with their own rows


def test_simpo_and_cpo_read_no_reference():
    _, _, logp, _ = sequences()
    batch = pair_batch(reference=False)
    tokens = [t for i, _ in PAIRS for t in range(*batch.cu_seqlens[i : i + 2].tolist())]
    tokens = [t for t in tokens if batch.mask[t]]

    def cpo(w, r):
        return -logsig(0.1 * (w.lp - r.lp)) - logp[tokens].mean()

    losses, _ = expected(lambda w, r: -logsig(0.1 * (w.lp - r.lp)), batch, logp, logp)
    step, grad = run(algorithms.make("cpo"), batch, logp, normalizer="batch")
    compare(step.loss, losses.mean() - logp[tokens].mean(), rtol=1e-12)
    plain, less = run(algorithms.make("cpo", nll=None), batch, logp, normalizer="batch")
    extra = torch.zeros_like(logp)
    extra[tokens] = -1 / len(tokens)
    compare(grad - less, extra, atol=1e-14)


def test_kto():
    cu, mask, logp, ref = sequences()
    loss = algorithms.make("kto", desirable_weight=1.5, undesirable_weight=0.7)
    batch = example_batch(loss, kl=torch.tensor(0.25, dtype=torch.float64))
    step, grad = run(loss, batch, logp)
    want = torch.zeros_like(logp)
    losses = []
    for i, good in enumerate(batch.desirable.tolist()):
        x = of_sequence(batch, logp, ref, i)
        s = sig(0.1 * (x.rho - 0.25) * (1 if good else -1))
        losses.append((1.5 if good else 0.7) * (1 - s))
        want[cu[i] : cu[i + 1]] = (-1.5 if good else 0.7) * 0.1 * s * (1 - s)
    compare(step.losses, torch.stack(losses), rtol=1e-12)
    compare(grad, torch.where(mask, want, 0.0), atol=1e-13)
    assert step.metrics["desirable_count"] == 7 and "margin" not in step.metrics
    assert float(step.metrics["desirable"]) == pytest.approx(float(step.rewards[0][batch.desirable].sum()))


def test_kto_kl_is_detached_clamped_and_global():
    """Trap 14: detached, at least 0, over all ranks. A batch of one has no mismatched pair."""
    lp = torch.tensor([-3.0, -5.0], requires_grad=True)
    ref = torch.tensor([-4.0, -4.5])
    kl = algorithms.kto_kl(lp, ref)
    assert float(kl) == 0.25 and not kl.requires_grad
    assert float(algorithms.kto_kl(ref, lp)) == 0.0
    ranks = [torch.tensor([0.5, 2.0]).double(), torch.tensor([7.0, 1.0]).double()]
    world = algorithms.World(gather=lambda x: torch.stack([x, ranks[1]]))
    assert float(algorithms.kto_kl(lp, ref, world)) == pytest.approx(7.5 / 3)
    assert algorithms.mismatched(3).tolist() == [1, 2, 0]
    with pytest.raises(ValueError, match="num_seqs must be at least 2"):
        algorithms.mismatched(1)
    _, _, logp, _ = sequences()
    loss = algorithms.make("kto")
    low, _ = run(loss, example_batch(loss, kl=torch.tensor(-2.0)), logp)
    zero, _ = run(loss, example_batch(loss, kl=torch.tensor(0.0)), logp)
    assert low.loss.item() == zero.loss.item()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_couples_the_pairs_of_a_batch(name: str):
    _, _, logp, ref = sequences()
    loss, batch = algorithms.make(name, smoothing=0.1), pair_batch()
    leaf = logp.clone().requires_grad_()
    w, r = ([of_sequence(batch, leaf, ref, p[k]) for p in PAIRS] for k in (0, 1))
    if name == "aot":
        left = [a.lp - b.lp for a, b in zip(w, r, strict=True)]
        right = [a.ref - b.ref for a, b in zip(w, r, strict=True)]
    else:
        left, right = [x.rho for x in w], [x.rho for x in r]
    d = [a - b for a, b in zip(sorted(left), sorted(right), strict=True)]
    want = sum(-0.9 * logsig(0.1 * x) - 0.1 * logsig(-0.1 * x) for x in d)
    (grad,) = torch.autograd.grad(want, leaf)
    step, found = run(loss, batch, logp)
    compare(step.loss, want, rtol=1e-12)
    compare(found, grad, atol=1e-13)


def test_ld_dpo_damps_the_tail_of_the_longer_side():
    cu, mask, logp, ref = sequences()
    loss, batch = algorithms.make("ld_dpo", tail_weight=0.3), pair_batch()
    leaf, total = logp.clone().requires_grad_(), 0.0
    for pair in PAIRS:
        rows = [[t for t in range(cu[i], cu[i + 1]) if mask[t]] for i in pair]
        short = min(map(len, rows))
        rho = [sum((1.0 if k < short else 0.3) * (leaf - ref)[t] for k, t in enumerate(side)) for side in rows]
        total = total - logsig(0.1 * (rho[0] - rho[1]))
    (grad,) = torch.autograd.grad(total, leaf)
    step, found = run(loss, batch, logp)
    compare(step.loss, total, rtol=1e-12)
    compare(found, grad, atol=1e-14)
    sums = torch.zeros(10, dtype=torch.float64)
    for a, b in PAIRS:
        rows = {i: [t for t in range(cu[i], cu[i + 1]) if mask[t]] for i in (a, b)}
        short = min(map(len, rows.values()))
        for i, side in rows.items():
            sums[i] = sum((1.0 if k < short else 0.3) * ref[t] for k, t in enumerate(side))
    kept, again = run(loss, pair_batch(ref_sum=sums, ref_tail_weight=0.3), logp)
    compare(kept.loss, total, rtol=1e-12)
    compare(again, grad, atol=1e-14)
    for weight in (None, 0.5):
        with pytest.raises(ValueError, match=rf"ref_tail_weight must be 0.3, .*; got {weight}"):
            loss.check(pair_batch(ref_sum=sums, ref_tail_weight=weight))
    with pytest.raises(ValueError, match="ref_tail_weight must be None"):
        algorithms.make("dpo").check(pair_batch(ref_sum=sums, ref_tail_weight=0.3))
    with pytest.raises(ValueError, match="ref_tail_weight must be left out without ref_sum"):
        pair_batch(ref_tail_weight=0.3)


MIXES = {
    "mpo": (("dpo", {}), ("bco_pair", {}), ("sft", {})),
    "without a reference first": (("simpo", {}), ("ipo", {}), ("orpo", {})),
    "sorted": (("aot", {}), ("hinge", {"beta": 0.3})),
    "weighted": (("wpo", {}), ("apo_zero", {"weighting": "wpo"})),
    "tails": (("ld_dpo", {}), ("sft", {"tail_weight": 0.5})),
}


def term(name, options):
    if name == "sft":
        return algorithms.Likelihood(**options)
    return algorithms.make("slic" if name == "hinge" else name, **options)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mix_is_the_weighted_sum_of_its_terms(mix: str):
    _, _, logp, _ = sequences()
    terms, weights = tuple(term(*t) for t in MIXES[mix]), (0.8, 0.2, 1.5)[: len(MIXES[mix])]
    mixed = algorithms.Mixed(terms=terms, weights=weights)
    state = mixed.initial_state()
    for own in state["terms"]:
        own.update({"mean": 0.3} if own else {})
    step, grad = run(mixed, pair_batch(), logp, normalizer="batch", state=state)
    total, want = torch.zeros((), dtype=torch.float64), torch.zeros_like(grad)
    for one, weight, own in zip(terms, weights, state["terms"], strict=True):
        batch = pair_batch(reference=one.needs_reference)
        alone, of_one = run(one, batch, logp, normalizer="batch", state=own)
        total, want = total + weight * alone.loss, want + weight * of_one
    compare(step.loss, total, rtol=1e-12)
    compare(grad, want, atol=1e-13)
    if terms[0].needs_reference:
        first, _ = run(terms[0], pair_batch(), logp)
        assert all(map(torch.equal, step.rewards, first.rewards))


def test_the_likelihood_of_a_mix_is_a_mean_over_all_chosen_tokens():
    _, _, logp, _ = sequences()
    batch = pair_batch(reference=False)
    cu = batch.cu_seqlens.tolist()
    rows = [t for i, _ in PAIRS for t in range(cu[i], cu[i + 1]) if batch.mask[t]]
    step, grad = run(algorithms.Likelihood(), batch, logp, normalizer="batch")
    want = torch.zeros_like(logp)
    want[rows] = -1 / len(rows)
    compare(step.loss, -logp[rows].mean(), rtol=1e-12)
    compare(grad, want, atol=1e-15)


def test_the_state_of_every_term_follows_its_own_reward():
    _, _, logp, _ = sequences()
    bco = algorithms.make("bco_pair", beta=0.4)
    mixed = algorithms.Mixed(terms=(algorithms.make("dpo", beta=0.1), bco))
    step, _ = run(mixed, pair_batch(), logp)
    alone, _ = run(bco, pair_batch(), logp)
    after = mixed.update(mixed.initial_state(), step)
    assert after["terms"][1]["mean"] == pytest.approx(bco.update(bco.initial_state(), alone)["mean"], rel=1e-12)


def test_what_a_mix_refuses():
    dpo = algorithms.make("dpo")
    for given, message in (
        ({"terms": ()}, "terms must be losses of pairs, at least one"),
        ({"terms": (algorithms.make("kto"),)}, "terms must be losses of pairs"),
        ({"terms": (dpo,), "weights": (1.0, 2.0)}, r"weights must be 1 numbers, one per term; got \(1.0, 2.0\)"),
        ({"terms": (dpo,), "weights": (-1.0,)}, "weights must be"),
        ({"terms": (dpo, algorithms.make("ld_dpo"))}, "tail_weight must be the same in all terms"),
        ({"terms": (dpo, algorithms.make("aries", level_weight=(1.0, 1.0)))}, "level_weight must be the same"),
    ):
        with pytest.raises(ValueError, match=message):
            algorithms.Mixed(**given)
    with pytest.raises(ValueError, match=r"batch.ref_logp or batch.ref_sum must be given"):
        algorithms.Mixed(terms=(dpo, algorithms.Likelihood())).check(pair_batch(reference=False))


def test_wpo_weights_come_from_sum_sq_and_carry_no_gradient():
    _, mask, logp, ref = sequences()
    batch = pair_batch()
    p = logp.exp()
    aligned = logp - (p * p + (1 - p) ** 2).log()  # two-way logits
    plain, base = run(algorithms.make("dpo"), batch, logp)
    step, grad = run(algorithms.make("wpo"), batch, logp)
    cu = batch.cu_seqlens.tolist()
    want = torch.zeros_like(base)
    for k, pair in enumerate(PAIRS):
        rows = [[t for t in range(cu[i], cu[i + 1]) if mask[t]] for i in pair]
        weight = math.exp(sum(float(aligned[side].mean()) for side in rows))
        assert float(step.losses[k]) == pytest.approx(weight * float(plain.losses[k]), rel=1e-11)
        for side in rows:
            want[side] = weight * base[side]
    compare(grad, want, atol=1e-13)


def test_levels_are_means_of_their_own():
    """HPL: cloning plus three DPO losses. ARIES: direct plus c times refinement."""
    _, _, logp, ref = sequences()
    level = torch.tensor([0, 1, 0, 2])
    dpo, _ = expected(lambda w, r: -logsig(0.3 * (w.rho - r.rho)), pair_batch(), logp, ref)
    nll, _ = expected(lambda w, r: -w.lp / w.n, pair_batch(), logp, ref)
    clone = (nll[0] + nll[2]) / 2
    loss = algorithms.make("hpl")
    step, _ = run(loss, pair_batch(level=level), logp, normalizer="batch")
    compare(step.loss, clone + (dpo[0] + dpo[2]) / 2 + dpo[1] + dpo[3], rtol=1e-12)
    weighed = algorithms.make("hpl", level_weight=(1.0, 0.5, 2.0), nll=None)
    step, _ = run(weighed, pair_batch(level=level), logp, normalizer="batch")
    compare(step.loss, (dpo[0] + dpo[2]) / 2 + 0.5 * dpo[1] + 2 * dpo[3], rtol=1e-12)
    aries = algorithms.make("aries", level_weight=(1.0, 0.25), beta=0.3)
    step, _ = run(aries, pair_batch(level=level % 2), logp, normalizer="batch")
    compare(step.loss, (dpo[0] + dpo[2] + dpo[3]) / 3 + 0.25 * dpo[1], rtol=1e-12)


def test_bco_shift_is_the_running_mean_of_earlier_batches():
    _, _, logp, ref = sequences()
    loss, batch = algorithms.make("bco_pair"), pair_batch()
    state = loss.initial_state()
    means = []
    for shift in (0.0, 0.4, -1.0):
        step, _ = run(loss, batch, logp + shift / 10, state=state)
        d = sum(means) / len(means) if means else 0.0
        want, _ = expected(
            lambda w, r: -logsig(0.1 * w.rho - d) - logsig(d - 0.1 * r.rho),  # noqa: B023
            batch,
            logp + shift / 10,
            ref,
        )
        compare(step.losses, want, rtol=1e-12)
        means.append(float(torch.cat(step.rewards).mean()))
        state = loss.load_state_dict(loss.state_dict(loss.update(state, step)))
    assert state == {"mean": pytest.approx(sum(means) / 3), "batches": 3}


@pytest.mark.parametrize(
    ("divergence", "alpha", "f"),
    [
        ("forward_kl", None, lambda x: -(-x).exp()),
        ("alpha", 0.5, lambda x: (-0.5 * x).exp() / -0.5),
        ("alpha", 3.0, lambda x: (2 * x).exp() / 2),
    ],
)
def test_f_divergences(divergence, alpha, f):
    _, _, logp, ref = sequences()
    loss = algorithms.make("f_dpo", divergence=divergence, alpha=alpha)
    losses, grad = expected(lambda w, r: -logsig(0.1 * (f(w.rho) - f(r.rho))), pair_batch(), logp, ref)
    step, found = run(loss, pair_batch(), logp)
    compare(step.losses, losses, rtol=1e-11)
    compare(found, grad, atol=1e-11)


# ------------------------------------------------------------------------------ finite differences


# wpo detaches its weights; the test above checks that their gradient is 0.
@pytest.mark.parametrize("name", [name for name in LOSSES if name != "wpo"])
def test_finite_differences(name: str):
    loss = example(name)
    batch = example_batch(loss)
    _, _, logp, _ = sequences(2)
    _, grad = run(loss, batch, logp, normalizer="batch")
    for t in (0, 4, 15, 24):
        step = torch.zeros(TOKENS, dtype=torch.float64)
        step[t] = 1e-5
        up, down = (run(loss, batch, logp + k * step, normalizer="batch")[0].loss.item() for k in (1, -1))
        assert float(grad[t]) == pytest.approx((up - down) / 2e-5, rel=1e-5, abs=1e-8)


# -------------------------------------------------------------------------------------------- traps


def test_trap_1_rpo_is_the_sum_and_three_others_share_its_name():
    """300 tokens: eta beta sum = 0.015 mean NLL; TRL's recipe 0.005; rpo_alpha 1."""
    cu = torch.tensor([0, 300, 600], dtype=torch.int32)
    logp = torch.full((600,), -0.5, dtype=torch.float64)
    batch = PreferenceBatch(num_tokens=600, cu_seqlens=cu, pairs=torch.tensor([[0, 1]]), ref_logp=logp)

    def term(nll: NLL) -> float:
        loss = algorithms.make("rpo", nll=nll)
        return (float(run(loss, batch, logp, normalizer="batch")[0].loss) - math.log(2)) / 0.5

    assert term(NLL(coef=0.005, reduction="sum", times_beta=True)) == pytest.approx(0.015)
    assert term(NLL(coef=0.005, reduction="batch_mean")) == pytest.approx(0.005)
    assert term(NLL(coef=0.005)) == pytest.approx(0.005)
    assert algorithms.make("rpo") == algorithms.make("rpo", nll=NLL(coef=0.005, reduction="sum", times_beta=True))


def test_trap_2_smoothing_acts_or_is_refused():
    _, _, logp, _ = sequences()
    values = {}
    for name in ("dpo", "conservative_dpo", "robust_dpo", "exo_pair"):
        options = {} if name == "dpo" else {"smoothing": 0.1}
        values[name] = float(run(algorithms.make(name, **options), pair_batch(), logp)[0].loss)
    assert len({round(x, 9) for x in values.values()}) == 4
    for name in ("slic", "ipo", "discopop"):
        with pytest.raises(ValueError, match="smoothing must be left out with link"):
            algorithms.make(name, smoothing=0.1)


def test_trap_3_ipo_of_sums_grows_with_the_length_and_ipo_of_means_does_not():
    cu, half = torch.tensor([0, 4, 8], dtype=torch.int32), torch.tensor([0, 8, 16])
    for length, border in ((8, cu), (16, half.int())):
        logp = torch.cat([torch.full((length // 2,), v).double() for v in (-0.5, -1.5)])
        batch = PreferenceBatch(
            num_tokens=length, cu_seqlens=border, pairs=torch.tensor([[0, 1]]), ref_logp=torch.full_like(logp, -1.0)
        )
        mean, total = (float(run(algorithms.make(n, beta=1.0), batch, logp)[0].loss) for n in ("ipo", "ipo_sum"))
        assert mean == pytest.approx(0.25) and total == pytest.approx((length / 2 - 0.5) ** 2)


def test_trap_4_odds_near_certainty():
    """Mean log-probabilities; 1 - exp(a) keeps its relative accuracy as a approaches 0."""
    for a in (-1e-12, -1e-3, -0.6931, -0.6932, -5.0, -800.0):
        x = torch.tensor(a, dtype=torch.float64, requires_grad=True)
        y = log_odds(x)
        want = a - (math.log(-math.expm1(a)) if a > -1 else math.log1p(-math.exp(a)))
        assert float(y) == pytest.approx(want, rel=1e-12)
        (grad,) = torch.autograd.grad(y, x)
        assert float(grad) == pytest.approx(-1 / math.expm1(a), rel=1e-12)


def test_orpo_of_a_response_without_odds():
    """An empty response gave inf. Its pair keeps the likelihood of the chosen response."""
    cu, mask, logp, _ = sequences()
    batch = PreferenceBatch(num_tokens=TOKENS, cu_seqlens=cu, mask=mask, pairs=torch.tensor([[4, 2], [8, 6]]))
    step, grad = run(algorithms.make("orpo"), batch, logp)
    chosen = logp[[t for t in range(*cu[4:6].tolist()) if mask[t]]].mean()
    compare(step.losses[0], -chosen, rtol=1e-12)
    other, alone = run(algorithms.make("orpo"), dataclasses.replace(batch, pairs=batch.pairs[1:]), logp)
    compare(step.losses[1:], other.losses, rtol=1e-12)
    assert bool(grad.isfinite().all()) and bool((grad - alone)[cu[4] : cu[5]].any())
    turned = dataclasses.replace(batch, pairs=torch.tensor([[2, 4]]))  # an empty chosen response
    step, grad = run(algorithms.make("orpo"), turned, logp)
    assert float(step.loss) == 0.0 and not grad.any()


def test_exponents_of_divergences_end_at_80():
    """Sums over long responses: exp(-x) overflowed and the loss was NaN. TRL clamps the alpha divergence."""
    cu = torch.tensor([0, 1000, 2000], dtype=torch.int32)
    ref, logp = torch.full((2000,), -1.0).double(), torch.full((2000,), -1.9).double()
    batch = PreferenceBatch(num_tokens=2000, cu_seqlens=cu, pairs=torch.tensor([[0, 1]]), ref_logp=ref)
    for options in ({"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.1}):
        step, grad = run(algorithms.make("f_dpo", **options), batch, logp)
        assert float(step.loss) == pytest.approx(math.log(2)) and not grad.any()  # both sides at the bound
    near = torch.full((2000,), -1.079).double()  # 79 below the reference
    step, grad = run(algorithms.make("f_dpo", divergence="forward_kl", beta=1e-30), batch, near)
    assert bool(grad.all())


def test_divergences_of_means_are_refused():
    """The constants of f' cancel for sums only."""
    for divergence, more in (("js", {}), ("forward_kl", {}), ("alpha", {"alpha": 0.5})):
        with pytest.raises(ValueError, match="divergence must be 'reverse_kl' with length 'mean'"):
            algorithms.make("f_dpo", divergence=divergence, length="mean", **more)


def test_likelihood_ratios_far_out_stay_finite():
    """discopop's exp(-u) overflows where its gate is 0; sums over thousands of tokens."""
    cu = torch.tensor([0, 1000, 2000], dtype=torch.int32)
    for sign in (1, -1):
        ref = torch.full((2000,), -1.0, dtype=torch.float64)
        logp = torch.cat([torch.full((1000,), -1.0 - 0.9 * s * sign).double() for s in (-1, 1)])
        batch = PreferenceBatch(num_tokens=2000, cu_seqlens=cu, pairs=torch.tensor([[0, 1]]), ref_logp=ref)
        for link, more in (("discopop", {"tau": 0.05}), ("exo", {"smoothing": 1e-3}), ("robust", {}), ("logistic", {})):
            step, grad = run(Contrast(link=link, beta=1.0, **more), batch, logp)
            assert bool(step.loss.isfinite()) and bool(grad.isfinite().all()), link
