"""Test policy_loss on a grid of shapes x levels x KL x aggregations: kernels against the float64 reference.

Every shape is combined with every level and every KL estimator. Each combination runs with two of the
aggregations, which change from level to level.

The kernels compute in float32 from the same numbers: 1e-5 relative (a log-ratio near 20 adds 1e-6 to r and
twice that to r^2), and 1e-6 of the batch's largest value if terms cancel.
"""

import math

import pytest
import torch
from harness import Backend, backends, compare
from policy_cases import LOG_RATIOS, SHAPES, batch

import tokfuse
from tokfuse import KL, Objective
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import AGGREGATIONS, KL_ESTIMATORS, LEVELS


@pytest.fixture(params=backends("policy_loss", without="reference", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def evaluate(put, objective: Objective, dtype: torch.dtype, inputs):
    logp, others = inputs.cast(dtype)
    others = {k: put(v) for k, v in others.items()}
    x, h = (v.detach().clone().requires_grad_() for v in (put(logp), others.pop("entropy")))
    out = tokfuse.policy_loss(x, entropy=h, objective=objective, **others)
    out.loss.backward()
    return out, x.grad, h.grad


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_the_reference(shape: str, level: str, backend: Backend):
    names = ["token_weight", "ref_logp", "kl_weight", "entropy", "entropy_weight", "anchor_logp", "anchor_weight"]
    data = batch(*names, *(["signal"] if SHAPES[shape].needs_signal else []))
    turn, aggregations = list(LEVELS).index(level), list(AGGREGATIONS)
    for i, estimator in enumerate((None, *KL_ESTIMATORS)):
        kl = None if estimator is None else KL(estimator=estimator, coef=0.07, clamp=12.0)
        estimators = list(KL_ESTIMATORS)
        anchor = KL(estimator=estimators[(i + turn) % 7], coef=-0.05, clamp=3.0) if i % 2 == 0 else None
        unused = (["kl_weight"] if kl is None else []) + (["anchor_logp", "anchor_weight"] if anchor is None else [])
        given = type(data)(data.logp, {k: v for k, v in data.inputs.items() if k not in unused})
        for aggregation in (aggregations[(i + turn) % 4], aggregations[(i + turn + 1) % 4]):
            objective = Objective(
                shape=SHAPES[shape],
                level=level,
                kl=kl,
                anchor=anchor,
                entropy_coef=0.013,
                aggregation=aggregation,
                log_ratio_clamp=15.0,
            )
            with tokfuse.backend("reference"):
                want = evaluate(lambda x: x, objective, torch.float64, given)
            got = evaluate(backend.put, objective, torch.float32, given)
            check(got, want, f"{estimator} {aggregation}")


def check(got, want, what: str) -> None:
    largest = float(want[0].token_loss.abs().max())
    for i, name in ((1, "d logp"), (2, "d entropy")):
        scale = max(1.0, float(want[i].abs().max()))
        compare(got[i], want[i], atol=1e-6 * scale, rtol=1e-5, what=f"{name} {what}")
    compare(got[0].token_loss, want[0].token_loss, atol=1e-6 * max(1.0, largest), rtol=1e-5, what=f"token_loss {what}")
    atol = torch.zeros(len(SLOTS))
    atol[SLOTS.index("loss")] = 1e-5 * max(1.0, float(want[0].token_loss.abs().sum()))
    compare(got[0].metrics.sums, want[0].metrics.sums, atol=atol, rtol=3e-6, what=f"sums {what}")
    assert float(got[0].loss.detach()) == pytest.approx(float(got[0].metrics["loss"]), rel=1e-6)


# ----------------------------------------------------------------------------------------- metrics


@pytest.fixture(params=backends("policy_loss"))
def any_backend(request):
    with request.param.forced():
        yield request.param


def metrics_of(backend: Backend, objective: Objective, *names: str, **options):
    data = batch(*names, per_sequence=True)
    logp, inputs = data.cast(torch.float32)
    inputs = {k: backend.put(v) for k, v in inputs.items()}
    out = tokfuse.policy_loss(backend.put(logp), objective=objective, **inputs, **options)
    return out.metrics.mean(), data, out


def test_every_metric_is_what_it_says(any_backend: Backend):
    objective = Objective(shape=tokfuse.PPOClip(low=0.2, high=0.28, dual=3.0), kl=KL(coef=0.1))
    got, data, out = metrics_of(any_backend, objective, "ref_logp", "entropy", "sampler_logp")
    keep = data.inputs["mask"].tolist()
    tokens = [t for t, valid in enumerate(keep) if valid]
    old, ref, sampler, entropy, advantage = (
        data.inputs[n].tolist() for n in ("old_logp", "ref_logp", "sampler_logp", "entropy", "advantage")
    )
    logp, n = data.logp.tolist(), len(tokens)
    r = {t: math.exp(max(-20.0, min(20.0, logp[t] - old[t]))) for t in tokens}
    d = {t: logp[t] - old[t] for t in tokens}
    k = {t: logp[t] - ref[t] for t in tokens}
    gap = {t: old[t] - sampler[t] for t in tokens}
    up = [t for t in tokens if advantage[t] > 0 and r[t] > 1.28]
    low = [t for t in tokens if advantage[t] < 0 and r[t] < 0.8]
    dual = [t for t in tokens if advantage[t] < 0 and r[t] > 3.0]
    expected = {
        "clip_low": len(low) / n,
        "clip_high": len(up) / n,
        "dual_clip": len(dual) / n,
        "kl_k1": sum(-d[t] for t in tokens) / n,
        "kl_k3": sum(math.expm1(d[t]) - d[t] for t in tokens) / n,
        "ref_kl_k1": sum(k.values()) / n,
        "ref_kl_k3": sum(math.expm1(-k[t]) + k[t] for t in tokens) / n,
        "sampler_kl_k3": sum(math.expm1(gap[t]) - gap[t] for t in tokens) / n,
        "ratio": sum(r.values()) / n,
        "ratio_min": min(r.values()),
        "ratio_max": max(r.values()),
        "entropy": sum(entropy[t] for t in tokens) / n,
        "masked": 1 - n / len(keep),
        "tokens": n,
        "seqs": 4,
        "grad_rows": 1.0,
        "loss": float(out.loss),
    }
    assert up and low and dual and set(got) == set(expected)
    for name, value in expected.items():
        assert got[name] == pytest.approx(value, rel=2e-6), name
        assert out.metrics[name] == got[name]


def test_grad_rows_counts_what_will_cost_arithmetic(any_backend: Backend):
    got, data, _ = metrics_of(any_backend, Objective(shape=tokfuse.PPOClip(low=0.2, high=0.28, dual=3.0)))
    clipped = got["clip_low"] + got["clip_high"] + got["dual_clip"]
    outside = [t for t, d in enumerate(LOG_RATIOS) if abs(d) > 20 and data.inputs["mask"][t]]
    assert outside == [10] and data.inputs["advantage"][10] < 0  # r = e^-20 is clipped low in any case
    assert got["grad_rows"] == pytest.approx(1 - clipped, abs=1e-12)
    zero = Objective(shape=tokfuse.LinearRatio(), log_ratio_clamp=0.5)
    got, data, _ = metrics_of(any_backend, zero)
    inside = [t for t, d in enumerate(LOG_RATIOS) if abs(d) <= 0.5 and data.inputs["mask"][t]]
    assert got["grad_rows"] == pytest.approx(len(inside) / 17)


def test_ratio_metrics_are_at_the_level_of_the_objective(any_backend: Backend):
    got, data, _ = metrics_of(any_backend, Objective(level="sequence"))
    keep, cu = data.inputs["mask"], data.inputs["cu_seqlens"].tolist()
    means, counts = [], []
    for begin, end in zip(cu, cu[1:], strict=False):
        valid = keep[begin:end]
        if valid.any():
            d = (data.logp - data.inputs["old_logp"])[begin:end][valid].clamp(-20, 20)
            means.append(math.exp(float(d.mean())))
            counts.append(int(valid.sum()))
    assert got["ratio_min"] == pytest.approx(min(means), rel=2e-6)
    assert got["ratio_max"] == pytest.approx(max(means), rel=2e-6)
    weighted = sum(m * c for m, c in zip(means, counts, strict=True)) / sum(counts)
    assert got["ratio"] == pytest.approx(weighted, rel=2e-6)


def test_absent_inputs_give_no_metric(any_backend: Backend):
    got, _, out = metrics_of(any_backend, Objective())
    assert not {"entropy", "ref_kl_k1", "ref_kl_k3", "sampler_kl_k3"} & set(got)
    with pytest.raises(KeyError, match="name must be one of clip_low.*; got 'entropy'"):
        out.metrics["entropy"]


def test_ref_logp_without_a_kl_term_gives_the_metric_only(any_backend: Backend):
    plain, _, out = metrics_of(any_backend, Objective())
    given, _, same = metrics_of(any_backend, Objective(), "ref_logp")
    assert torch.equal(out.loss, same.loss) and set(given) - set(plain) == {"ref_kl_k1", "ref_kl_k3"}


def test_merged_metrics_are_those_of_the_whole(any_backend: Backend):
    names = ("ref_logp", "entropy", "sampler_logp")
    whole, data, out = metrics_of(any_backend, Objective(), *names)
    logp, inputs = data.cast(torch.float32)
    parts = []
    for begin, end, first, last in ((0, 6, 0, 3), (6, 22, 3, 6)):
        cut = {k: any_backend.put(v[begin:end]) for k, v in inputs.items() if k != "cu_seqlens"}
        cu = any_backend.put(inputs["cu_seqlens"][first : last + 1] - begin)
        piece = any_backend.put(logp[begin:end])
        out = tokfuse.policy_loss(piece, objective=Objective(), cu_seqlens=cu, **cut)
        parts.append(out.metrics)
    before = parts[0].sums.clone()
    merged = (parts[0] + parts[1]).mean()
    assert torch.equal(parts[0].sums, before)
    assert merged == pytest.approx(whole, rel=1e-6)


def test_metrics_without_a_valid_token(any_backend: Backend):
    data = batch("entropy")
    logp, inputs = data.cast(torch.float32)
    inputs["mask"] = torch.zeros_like(inputs["mask"])
    inputs = {k: any_backend.put(v) for k, v in inputs.items()}
    got = tokfuse.policy_loss(any_backend.put(logp), objective=Objective(), **inputs).metrics.mean()
    assert got.pop("ratio_min") == math.inf and got.pop("ratio_max") == -math.inf
    assert got.pop("masked") == 1.0
    assert set(got.values()) == {0.0}
