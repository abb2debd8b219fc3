"""Test rewards from wrong labels and partial feedback, and effects: unbiased as documented.

Monte Carlo means must be within five standard errors of the expected value, with fixed seeds.
"""

import math

import pytest
import torch
from harness import compare
from reward_cases import check_mean, differs, normal, uniform
from torch import Tensor
from torch.autograd import gradcheck

from tokfuse import algorithms
from tokfuse.algorithms.reward import anchor_noise_rates, group_effect, principled_uplift_auc, uplift_loss
from tokfuse.algorithms.reward.correction import imputation_loss

# ------------------------------------------------------------------------------------ CausalRM, KCB


def squared(prediction: Tensor) -> tuple[Tensor, Tensor]:
    return (prediction - 1) ** 2, prediction**2


def test_noise_correction_is_the_clean_loss_on_average():
    """Mean over label noise, in closed form and by simulation. Single values may be negative."""
    fix = algorithms.make("causalrm_noise", rho01=0.3, rho10=0.2)
    one, zero = squared(normal(50))
    positive = fix.loss(one, zero, torch.ones(50, dtype=torch.bool))
    negative = fix.loss(one, zero, torch.zeros(50, dtype=torch.bool))
    compare(0.7 * positive + 0.3 * negative, one, atol=1e-13, what="truth 1")
    compare(0.2 * positive + 0.8 * negative, zero, atol=1e-13, what="truth 0")
    assert float(positive.min()) < 0 or float(negative.min()) < 0
    truth = uniform(200_000, seed=1) < 0.3
    flip = torch.where(truth, uniform(200_000, seed=2) < 0.3, uniform(200_000, seed=2) < 0.2)
    one, zero = squared(torch.full((200_000,), 0.3, dtype=torch.float64))
    noisy = fix.loss(one, zero, truth ^ flip)
    clean = float(torch.where(truth, one, zero).mean())
    check_mean(noisy, clean)
    assert differs(torch.where(truth ^ flip, one, zero), clean), "noise must matter here"


def test_noise_correction_gradient_and_refusals():
    fix = algorithms.make("causalrm_noise", rho01=0.1, rho10=0.3)
    label = torch.tensor([True, False, True])
    x = normal(3).requires_grad_()
    assert gradcheck(lambda z: fix.loss(*squared(z), label), x)
    with pytest.raises(ValueError, match=r"rho01 \+ rho10 must be less than 1"):
        algorithms.make("causalrm_noise", rho01=0.6, rho10=0.4)
    with pytest.raises(ValueError, match="rho01 must be given"):
        algorithms.make("causalrm_noise", rho10=0.4)
    assert anchor_noise_rates(torch.tensor([0.25, 0.5, 0.875])) == (0.125, 0.25)


class World1:
    """Samples that are observed with a probability that depends on their loss."""

    def __init__(self, samples: int = 400_000, seed: int = 0) -> None:
        x = normal(samples, seed=seed)
        self.loss = x**2 + 0.5 * x
        self.propensity = 0.15 + 0.7 * torch.sigmoid(2 * x)
        self.observed = uniform(samples, seed=seed + 1) < self.propensity
        self.imputed = self.loss + 0.3 * normal(samples, seed=seed + 2)
        self.truth = float(self.loss.mean())
        self.wrong_p, self.wrong_e = torch.full_like(x, 0.5), torch.full_like(x, 2.0)

    def terms(self, form: str, propensity: Tensor, imputed: Tensor | None = None) -> Tensor:
        """Return each sample's contribution through the public loss, which is linear in its terms."""
        make = algorithms.make("causalrm", form=form)
        leaf = self.loss.clone().requires_grad_()
        extra = None if imputed is None else imputed.clone().requires_grad_()
        out = make.loss(leaf, self.observed, propensity, imputed=extra, normalizer=1.0)
        grads = torch.autograd.grad(out, [leaf] if extra is None else [leaf, extra])
        total = grads[0] * leaf.detach()
        if extra is not None:
            total = total + grads[1] * extra.detach()
        compare(total.sum(), out, rtol=1e-9)
        return total


def test_inverse_propensities_are_unbiased_and_dr_is_with_either_model_wrong():
    w = World1()
    check_mean(w.terms("ips", w.propensity), w.truth)
    check_mean(w.terms("dr", w.propensity, w.imputed), w.truth)
    check_mean(w.terms("dr", w.propensity, w.wrong_e), w.truth)
    check_mean(w.terms("dr", w.wrong_p, w.loss), w.truth)  # correct imputation, wrong propensity
    assert differs(w.terms("ips", w.wrong_p), w.truth)
    assert differs(w.terms("dr", w.wrong_p, w.wrong_e), w.truth)
    assert w.terms("dr", w.propensity, w.imputed).std() < w.terms("ips", w.propensity).std()


def test_propensity_forms():
    loss, p = torch.tensor([1.0, 2.0, 4.0]).double(), torch.tensor([0.5, 0.25, 0.8]).double()
    seen, e = torch.tensor([True, True, False]), torch.tensor([1.5, 1.0, 3.0]).double()
    unseen = torch.where(seen, loss, torch.nan)
    ips = algorithms.make("causalrm")
    assert float(ips.loss(unseen, seen, p)) == pytest.approx((1 / 0.5 + 2 / 0.25) / 3)
    assert float(ips.loss(unseen, seen, p, normalizer=6)) == pytest.approx(10 / 6)
    snips = algorithms.make("causalrm", form="snips")
    assert float(snips.loss(unseen, seen, p)) == pytest.approx(10 / 6)
    assert float(snips.loss(loss + 7, seen, p)) == pytest.approx(10 / 6 + 7)  # IPS does not shift so
    clipped = algorithms.make("causalrm", clip=0.4)
    assert float(clipped.loss(unseen, seen, p)) == pytest.approx((1 / 0.5 + 2 / 0.4) / 3)
    dr = algorithms.make("causalrm", form="dr")
    want = (1.5 + 1.0 + 3.0 + (1 - 1.5) / 0.5 + (2 - 1.0) / 0.25) / 3
    assert float(dr.loss(unseen, seen, p, imputed=e)) == pytest.approx(want)
    leaf, prop = loss.clone().requires_grad_(), p.clone().requires_grad_()
    dr.loss(leaf, seen, prop, imputed=e).backward()
    assert prop.grad is None and leaf.grad[2] == 0
    compare(imputation_loss(unseen, e, seen, p), torch.tensor([0.5, 4.0, 0.0]), rtol=1e-12)
    # Kernel balancing: mean over all of e, plus mean over the observed of w (l - e).
    w = torch.tensor([1.5, 0.5, 1.0]).double()
    balanced = dr.loss(unseen, seen, weight=w * (3 / 2), imputed=e)
    assert float(balanced) == pytest.approx(5.5 / 3 + (1.5 * (1 - 1.5) + 0.5 * (2 - 1)) / 2)
    with pytest.raises(ValueError, match="imputed must be given with form 'dr', and only then"):
        ips.loss(loss, seen, p, imputed=e)
    with pytest.raises(ValueError, match="normalizer must be left out with form 'snips'"):
        snips.loss(loss, seen, p, normalizer=3)
    assert float(snips.loss(unseen, torch.zeros(3, dtype=torch.bool), p)) == 0.0


def test_balance_hinges_are_per_anchor():
    """Trap: gaps of opposite sign must not cancel. The released code sums before the hinge, so they cancel there."""
    phi, target = (torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double(), torch.tensor([0.9, 0.1], dtype=torch.float64))
    penalty = algorithms.make("kernel_balancing", gamma=2.0, slack=0.1)
    even = torch.ones(2, dtype=torch.float64)
    assert float(penalty.gaps(even, phi, target).sum()) == pytest.approx(0.0)
    assert float(penalty.loss(even, phi, target)) == pytest.approx(2 * (0.3 + 0.3))
    w = torch.tensor([1.4, 0.6], dtype=torch.float64).requires_grad_()
    assert penalty.loss(w, phi, target).item() == pytest.approx(
        (1.4 * math.log(1.4) + 0.6 * math.log(0.6)) / 2 + 2 * (0.1 + 0.1)
    )
    assert gradcheck(lambda x: penalty.loss(x, phi, target), w)
    wide = algorithms.make("kernel_balancing", gamma=2.0, slack=0.5)
    assert float(wide.loss(even, phi, target)) == 0.0
    with pytest.raises(ValueError, match=r"features must be of shape \(2, anchors\)"):
        penalty.loss(even, phi[:1], target)


# ---------------------------------------------------------------------------------------------- IVL


def test_ivl_is_the_quadratic_form_and_not_that_of_squares():
    """r'(P + alpha I) r with P the projector of one-hot groups; not (1 + alpha) r'r."""
    ids = torch.tensor([0, 2, 0, 1, 2, 2])
    r = normal(6).requires_grad_()
    g = torch.nn.functional.one_hot(ids, 4)[:, :3].double()
    p = g @ torch.linalg.pinv(g)
    ivl = algorithms.make("ivl", alpha=0.3)
    want = r @ p @ r + 0.3 * r @ r
    compare(ivl.loss(r, ids, 4, normalizer=1.0), want, rtol=1e-12)
    compare(ivl.loss(r, ids, 4), want / 6, rtol=1e-12)
    (grad,) = torch.autograd.grad(ivl.loss(r, ids, 4, normalizer=1.0), r)
    compare(grad, 2 * (p @ r + 0.3 * r), rtol=1e-12, what="effective residual")
    assert gradcheck(lambda x: ivl.loss(x, ids, 4), r)
    released = (p @ (r * r)).sum() + 0.3 * (r * r).sum()
    assert float(released) == pytest.approx(1.3 * float((r * r).sum()))
    assert abs(float(released) - float(want)) > 0.1


# ------------------------------------------------------------------------- calibration and effects


def test_lcc_inverts_a_shrinkage_and_is_nothing_under_z_scores():
    truth = normal(4000)
    predicted = 1.0 + 0.5 * truth + 0.2 * normal(4000, seed=1)
    lcc = algorithms.make("reward_calibrator", method="lcc")
    state = lcc.fit(predicted[:2000], truth[:2000])
    out = lcc.transform(predicted[2000:], lcc.load_state_dict(lcc.state_dict(state)))
    x, y = out, truth[2000:]
    slope = float(((x - x.mean()) * (y - y.mean())).mean() / y.var(unbiased=False))
    assert slope == pytest.approx(1.0, abs=0.03) and abs(float(x.mean() - y.mean())) < 0.02

    def z(v: Tensor) -> Tensor:
        return (v - v.mean()) / v.std()

    compare(z(out), z(predicted[2000:]), atol=1e-12)
    error = [float(((v - y) ** 2).mean().sqrt()) for v in (0.5 * y + predicted[2000:] * 0, out)]
    assert error[1] > 0.2, "single samples are not closer"


def test_tweedie_recovers_the_spread_of_a_calibrated_predictor():
    """Truth = prediction + noise, so predictions have too little variance. The slope of corrected on truth is 1."""
    predicted = 0.8 * normal(3000)
    truth = predicted + 0.6 * normal(3000, seed=1)
    model = algorithms.make("reward_calibrator")
    state = model.fit(predicted[:2000], truth[:2000])
    out, y = model.transform(predicted[2000:], state), truth[2000:]
    before, after = (
        float(((v - v.mean()) * (y - y.mean())).mean() / y.var(unbiased=False)) for v in (predicted[2000:], out)
    )
    assert before == pytest.approx(0.64, abs=0.05) and after == pytest.approx(1.0, abs=0.1)
    assert float(((out - y) ** 2).mean()) > float(((predicted[2000:] - y) ** 2).mean())
    # Compare the slope of log p with finite differences of the density.
    h, points = state["bandwidth"], state["points"]
    at = torch.tensor([-1.0, 0.3])

    def log_density(x: Tensor) -> Tensor:
        return torch.logsumexp(-0.5 * ((x[:, None] - points) / h) ** 2, 1)

    slope = (log_density(at.double() + 1e-5) - log_density(at.double() - 1e-5)) / 2e-5
    compare(model.transform(at.double(), state), at.double() - state["noise"] ** 2 * slope, atol=1e-8)
    with pytest.raises(ValueError, match="state must be what fit returned"):
        model.transform(at, model.initial_state())
    with pytest.raises(ValueError, match="of at least 3 samples that are not all equal"):
        model.fit(torch.ones(5), torch.ones(5))


def test_group_effects():
    """Compared with plain loops. AIPW is unbiased if one of the two models is wrong."""
    r, ids = normal(12), torch.tensor([0] * 6 + [2] * 5 + [1])
    t = torch.tensor([1, 0, 1, 0, 1, 0, 1, 1, 0, 0, 1, 1], dtype=torch.bool)
    out = group_effect(r, t, ids, 3)
    for g in (0, 2):
        one, zero = r[(ids == g) & t], r[(ids == g) & ~t]
        assert float(out.effect[g]) == pytest.approx(float(one.mean() - zero.mean()))
        want = math.sqrt(float(one.var()) / len(one) + float(zero.var()) / len(zero))
        assert float(out.error[g]) == pytest.approx(want)
    assert bool(out.effect[1].isnan()) and bool(out.error[1].isnan())
    n = 200_000
    x = normal(n, seed=4)
    e = torch.sigmoid(x)
    t = uniform(n, seed=5) < e
    y = x + torch.where(t, 0.5, 0.0) + 0.1 * normal(n, seed=6)
    one_group = torch.zeros(n, dtype=torch.int64)
    zero, half = torch.zeros_like(x), torch.full_like(x, 0.5)
    for given, right in (
        ({}, False),
        ({"propensity": e}, True),
        ({"propensity": half}, False),
        ({"propensity": e, "mu1": zero, "mu0": zero}, True),
        ({"propensity": half, "mu1": x + 0.5, "mu0": x}, True),
    ):
        effect, error = group_effect(y, t, one_group, 1, **given)
        assert (abs(float(effect) - 0.5) < 5 * float(error)) == right, given
    with pytest.raises(ValueError, match="mu1 and mu0 must be both given"):
        group_effect(r, t[:12], ids, 3, mu1=r)


def test_uplift_ranking_shares_ties():
    """Ideal 1, reversed -1. Equal predictions give 0 for every order of the samples."""
    t = torch.tensor([1, 1, 0, 0, 1, 0], dtype=torch.bool)
    y = torch.tensor([1, 1, 0, 1, 0, 1], dtype=torch.bool)
    agree = (t == y).double()
    assert float(principled_uplift_auc(agree, t, y)) == pytest.approx(1.0)
    assert float(principled_uplift_auc(-agree, t, y)) == pytest.approx(-1.0)
    for order in (torch.arange(6), torch.tensor([5, 3, 1, 0, 2, 4])):
        value = principled_uplift_auc(torch.ones(6), t[order], y[order])
        assert float(value) == pytest.approx(0.0, abs=1e-12)
    score = torch.tensor([3.0, 2.0, 2.0, 2.0, 1.0, 0.0])
    credit = [1, 1 / 3, 1 / 3, 1 / 3, -1, -1]
    curve = torch.tensor(credit).cumsum(0).sum()
    ideal = torch.tensor([1.0, 1, 1, -1, -1, -1]).cumsum(0).sum()
    assert float(principled_uplift_auc(score, t, y)) == pytest.approx(float(curve / ideal))


def test_uplift_ranking_gives_the_published_values():
    """The notebook of the authors' repository. Ties are broken as by its sort, last first."""
    t = torch.tensor([1, 0, 1, 0, 0, 1, 1, 0], dtype=torch.bool)
    y = torch.tensor([1, 0, 1, 1, 0, 0, 0, 1], dtype=torch.bool)
    place = 1e-3 * torch.arange(8)
    for score, value in (
        ([1, 1, 0, 0, 0, 0, -1, -1], 0.6129032258064516),
        ([1, 0, 1, -1, 0, 0, 0, -1], 0.4838709677419355),
    ):
        found = principled_uplift_auc(torch.tensor(score) + place, t, y, area="code")
        assert float(found) == pytest.approx(value, rel=1e-12)
    tied = principled_uplift_auc(torch.tensor([1.0, 0, 1, -1, 0, 0, 0, -1]), t, y)
    first = principled_uplift_auc(torch.tensor([1.0, 0, 1, -1, 0, 0, 0, -1]) - place, t, y)
    assert float(first) == pytest.approx(1.0) and 0.5 < float(tied) < 0.9
    with pytest.raises(ValueError, match="area must be one of zero, code"):
        principled_uplift_auc(place, t, y, area="half")


def test_uplift_loss_is_centred_on_the_effect_at_any_propensity():
    """Without the weight 0.5 / P(own treatment) its target would be e p1 + (1 - e)(1 - p0)."""
    n, p1, p0, e = 400_000, 0.7, 0.4, 0.8
    t = uniform(n) < e
    y = torch.where(t, uniform(n, seed=1) < p1, uniform(n, seed=1) < p0)
    tau = torch.zeros(n, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(uplift_loss(tau, t, y, propensity=e).sum(), tau)
    # At sig(tau) = 1/2 the mean gradient is 1/2 - (1 + effect) / 2.
    check_mean(grad, -(p1 - p0) / 2)
    (plain,) = torch.autograd.grad(uplift_loss(tau, t, y).sum(), tau)
    assert differs(plain, -(p1 - p0) / 2)
    x = normal(6).requires_grad_()
    assert gradcheck(lambda z: uplift_loss(z, t[:6], y[:6], propensity=0.3), x)
