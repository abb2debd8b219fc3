"""Test policy_loss on every backend: each published method against its formula and finite differences.

Bounds: float32 2e-6 of the largest value of the batch (exp amplifies a float32 log-ratio of 20 by 1e-6);
float64 on the reference 1e-8, the error of the finite differences.
"""

import math

import pytest
import torch
from harness import backends, compare
from policy_cases import LENGTHS, SEQUENCE_METHODS, TOKEN_METHODS, Batch, Direct, batch, by_sequence, clip, ratio

import tokfuse
from tokfuse import KL, LinearRatio, Objective, PPOClip
from tokfuse.runtime.policy.objective import KL_ESTIMATORS


@pytest.fixture(params=[*backends("policy_loss"), pytest.param(None, id="reference-float64")])
def run(request):
    """Return (result, d loss / d logp, d loss / d entropy) of policy_loss on one backend."""
    backend = request.param

    def call(data: Batch, objective: Objective, **options):
        logp, inputs = data.cast(torch.float64 if backend is None else torch.float32)
        if backend is not None:
            logp, inputs = backend.put(logp), {k: backend.put(v) for k, v in inputs.items()}
        x = logp.detach().requires_grad_()
        h = inputs.pop("entropy", None)
        h = None if h is None else h.detach().requires_grad_()
        out = tokfuse.policy_loss(x, entropy=h, objective=objective, **inputs, **options)
        assert out.loss.dtype == out.token_loss.dtype == x.dtype
        out.loss.backward()
        return out, x.grad, None if h is None else h.grad

    call.tolerance = 1e-8 if backend is None else 2e-6
    if backend is None:
        yield call
    else:
        with backend.forced():
            yield call


def check(run, data: Batch, objective: Objective, direct: Direct, agg=None, **options):
    """Compare losses, their sum and the gradient of one call with the formula."""
    values, slopes = direct.evaluate(agg)
    out, grad, _ = run(data, objective, **options)
    scale = max(1.0, max(map(abs, values)))
    compare(
        out.token_loss,
        torch.tensor(values, dtype=torch.float64),
        atol=run.tolerance * scale,
        rtol=run.tolerance,
        what="token_loss",
    )
    total = math.fsum(values)
    assert abs(float(out.loss.detach()) - total) <= 2 * run.tolerance * max(scale, abs(total))
    scale = max(1.0, max(map(abs, slopes)))
    compare(
        grad, torch.tensor(slopes, dtype=torch.float64), atol=run.tolerance * scale, rtol=run.tolerance, what="gradient"
    )
    return out, grad


@pytest.mark.parametrize("name", TOKEN_METHODS)
def test_token_methods(name: str, run):
    objective, formula = TOKEN_METHODS[name]
    data = batch(*(["signal"] if objective.shape.needs_signal else []))
    check(run, data, objective, Direct(by_sequence(formula), data))


@pytest.mark.parametrize("name", SEQUENCE_METHODS)
def test_sequence_methods(name: str, run):
    objective, formula = SEQUENCE_METHODS[name]
    data = batch(*(["signal"] if objective.shape.needs_signal else []), per_sequence=True)
    if name == "nft_sequence":
        cu = data.inputs["cu_seqlens"]
        rates = data.inputs["signal"][cu[:-1].clamp(max=sum(LENGTHS) - 1).long()]
        data.inputs["signal"] = rates.repeat_interleave(torch.tensor(LENGTHS))
    if name == "vespo":  # e^-lam w underflows in float32, so the factor stays near 1
        data.inputs["old_logp"] = data.logp - 0.02 * (data.logp - data.inputs["old_logp"])
    check(run, data, objective, Direct(formula, data))


def test_sequence_methods_with_advantages_that_vary_inside_a_sequence(run):
    data = batch()
    for name in ("gspo", "gspo_token"):
        objective, formula = SEQUENCE_METHODS[name]
        check(run, data, objective, Direct(formula, data))


def test_advantage_per_sequence_equals_the_same_advantage_per_token(run):
    data = batch(per_sequence=True)
    per_seq = torch.tensor([1.5, 9.0, -0.75, -1.25, 0.5, 2.0], dtype=torch.float64)
    short = Batch(data.logp, data.inputs | {"advantage": per_seq})
    for level in ("token", "sequence"):
        one, grad, _ = run(data, Objective(level=level))
        two, again, _ = run(short, Objective(level=level), advantage_level="sequence")
        assert torch.equal(one.token_loss, two.token_loss) and torch.equal(grad, again)


# ------------------------------------------------------------------------------------- KL, entropy


def kl_formula(name: str, k: float, k0: float, r: float, bound: float = 20.0) -> float:
    """Return the value of an estimator. Straight-through estimators have k0's value and the gradient of k2."""
    k, k0 = clip(k, -bound, bound), clip(k0, -bound, bound)
    k3 = math.expm1(-k) + k
    values = {"k1": k, "k2": 0.5 * k * k, "k3": k3, "ratio_k3": r * k3, "abs": abs(k)}
    if name in values:
        return values[name]
    value = k0 if name == "k1_straight" else math.expm1(-k0) + k0
    return value + 0.5 * (k * k - k0 * k0)


@pytest.mark.parametrize("coef", [0.05, -0.01])
@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_kl_estimators(estimator: str, coef: float, run):
    data = batch("ref_logp")
    if "k3" in estimator:  # e^20 would hide all other values of the batch
        data.inputs["ref_logp"][3] = data.logp[3] + 25.0 * 0.1
    old, ref = data.inputs["old_logp"].tolist(), data.inputs["ref_logp"].tolist()
    objective = Objective(shape=LinearRatio(), kl=KL(estimator=estimator, coef=coef))

    def term(t: int, live: float, frozen: float) -> float:
        k, k0 = live - ref[t], frozen - ref[t]
        return coef * kl_formula(estimator, k, k0, ratio(live, old[t]))

    surrogate = by_sequence(lambda live, frozen, o, a, s: -a * ratio(live, o))
    check(run, data, objective, Direct(surrogate, data, term))


@pytest.mark.parametrize("estimator", KL_ESTIMATORS)
def test_an_anchor_beside_a_reference_kl(estimator: str, run):
    """Each KL term keeps its own coefficient, estimator, clamp, weight and log-probabilities."""
    data = batch("ref_logp", "kl_weight", "anchor_logp", "anchor_weight")
    data.inputs["ref_logp"][3] = data.logp[3] + 1.0
    old, ref, anchor, kl_weight, anchor_weight = (
        data.inputs[n].tolist() for n in ("old_logp", "ref_logp", "anchor_logp", "kl_weight", "anchor_weight")
    )
    objective = Objective(
        shape=LinearRatio(), kl=KL(coef=0.3), anchor=KL(estimator=estimator, coef=-0.07, clamp=0.9), log_ratio_clamp=9.0
    )

    def ratio_of(live: float, t: int) -> float:
        return math.exp(clip(live - old[t], -9.0, 9.0))

    def term(t: int, live: float, frozen: float) -> float:
        r = ratio_of(live, t)
        reference = 0.3 * kl_weight[t] * kl_formula("k3", live - ref[t], frozen - ref[t], r)
        x = kl_formula(estimator, live - anchor[t], frozen - anchor[t], r, bound=0.9)
        return reference - 0.07 * anchor_weight[t] * x

    at = {o: t for t, o in enumerate(old)}
    surrogate = by_sequence(lambda live, frozen, o, a, s: -a * ratio_of(live, at[o]))
    _, grad = check(run, data, objective, Direct(surrogate, data, term))
    data.inputs.update(ref_logp=data.inputs["anchor_logp"], anchor_logp=data.inputs["ref_logp"])
    assert not torch.equal(grad, run(data, objective)[1])


@pytest.mark.parametrize("estimator", ["k1", "k3", "k3_straight"])
def test_kl_clamp_stops_the_gradient_outside(estimator: str, run):
    data = batch("ref_logp")
    data.inputs["advantage"] = torch.zeros_like(data.logp)
    ref = data.inputs["ref_logp"].tolist()
    objective = Objective(shape=LinearRatio(), kl=KL(estimator=estimator, coef=0.5, clamp=0.7))

    def term(t: int, live: float, frozen: float) -> float:
        return 0.5 * kl_formula(estimator, live - ref[t], frozen - ref[t], 1.0, bound=0.7)

    zero = by_sequence(lambda live, frozen, o, a, s: 0.0)
    _, grad = check(run, data, objective, Direct(zero, data, term))
    outside = (data.logp - data.inputs["ref_logp"]).abs() > 0.7
    assert outside.any() and not grad.cpu()[outside].any()


def test_weights_multiply_their_own_term(run):
    names = ("token_weight", "ref_logp", "kl_weight", "entropy", "entropy_weight")
    data = batch(*names)
    data.inputs["ref_logp"][3] = data.logp[3] + 1.0
    old, ref = data.inputs["old_logp"].tolist(), data.inputs["ref_logp"].tolist()
    kl_weight, h_weight = (data.inputs[n].tolist() for n in ("kl_weight", "entropy_weight"))
    entropy, keep = data.inputs["entropy"].tolist(), data.inputs["mask"].tolist()
    objective = Objective(kl=KL(coef=0.3), entropy_coef=0.02)

    def term(t: int, live: float, frozen: float) -> float:
        kl = kl_formula("k3", live - ref[t], frozen - ref[t], ratio(live, old[t]))
        return 0.3 * kl_weight[t] * kl - 0.02 * h_weight[t] * entropy[t]

    clipped = by_sequence(lambda live, frozen, o, a, s: max(-a * ratio(live, o), -a * clip(ratio(live, o), 0.8, 1.2)))
    check(run, data, objective, Direct(clipped, data, term))
    _, _, grad = run(data, objective)
    expected = [-0.02 * w * k for w, k in zip(h_weight, keep, strict=True)]
    compare(grad, torch.tensor(expected, dtype=torch.float64), rtol=2e-7)


# -------------------------------------------------------------------------- aggregation, normaliser


def aggregation(name: str, data: Batch) -> list[float]:
    keep, cu = data.inputs["mask"].tolist(), data.inputs["cu_seqlens"].tolist()
    out = [1.0] * len(keep)
    if name == "seq_mean_token_mean":
        for begin, end in zip(cu, cu[1:], strict=False):
            count = sum(keep[begin:end])
            out[begin:end] = [1.0 / max(count, 1)] * (end - begin)
    return out


COUNTS = {"token_mean": 17, "seq_mean_token_mean": 4, "seq_mean_token_sum": 4}


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("name", [*COUNTS, "token_sum"])
def test_aggregations_and_normalizers(name: str, level: str, run):
    data = batch(per_sequence=True)
    objective = Objective(level=level, aggregation=name, shape=PPOClip(low=0.2, high=0.2))
    formula = SEQUENCE_METHODS["gspo"][1]
    if level == "token":
        formula = by_sequence(
            lambda live, frozen, o, a, s: max(-a * ratio(live, o), -a * clip(ratio(live, o), 0.8, 1.2))
        )
    direct, agg = Direct(formula, data), aggregation(name, data)
    out, _ = check(run, data, objective, direct, agg)
    assert float(out.loss_sum) == float(out.loss.detach())
    assert float(out.count) == COUNTS.get(name, 17)
    for normalizer in (12.5, torch.tensor(12.5), torch.tensor([12.5], dtype=torch.float64)):
        scaled, _ = check(run, data, objective, direct, [w / 12.5 for w in agg], normalizer=normalizer)
        assert float(scaled.loss_sum) == pytest.approx(float(out.loss.detach()), 1e-6, 2e-6)
    if name in COUNTS:
        mean, _ = check(run, data, objective, direct, [w / COUNTS[name] for w in agg], normalizer="batch")
        assert float(mean.loss_sum) == pytest.approx(float(out.loss.detach()), 1e-6, 2e-6)


def test_without_cu_seqlens_a_token_objective_is_the_same(run):
    data = batch()
    packed, grad, _ = run(data, Objective())
    bare = Batch(data.logp, {k: v for k, v in data.inputs.items() if k != "cu_seqlens"})
    flat, again, _ = run(bare, Objective())
    assert torch.equal(packed.token_loss, flat.token_loss) and torch.equal(grad, again)


def test_log_ratio_clamp_bounds_value_and_gradient(run):
    data = batch()
    objective = Objective(shape=LinearRatio(), log_ratio_clamp=0.5)
    formula = by_sequence(lambda live, frozen, o, a, s: -a * math.exp(clip(live - o, -0.5, 0.5)))
    check(run, data, objective, Direct(formula, data))
