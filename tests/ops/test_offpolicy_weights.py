"""Test offpolicy_weights against a row loop in Python floats, on every backend, and its identities.

Sequence sums are float64. The native kernel rounds d = logp - behavior_logp to float32, and its exp has an
error of 1e-6: 4e-6 relative. No test value is that close to a bound.
"""

import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st
from offpolicy_cases import expected

from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.policy.keep_rule import KeepRule

offpolicy_weights = on_its_device(offpolicy_weights)


@pytest.fixture(params=backends("offpolicy_weights"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def check(actual, wanted):
    weight, ess, kept = wanted
    assert actual.kept_mask.tolist() == kept and actual.kept_mask.dtype == torch.bool
    assert actual.weight.dtype == torch.float32 and not actual.weight.requires_grad
    want = torch.tensor(weight, dtype=torch.float64)
    torch.testing.assert_close(actual.weight.double(), want, rtol=4e-6, atol=1e-12)
    assert actual.ess.shape == () and actual.ess.item() == pytest.approx(ess, rel=1e-5)


def batch(lengths=(5, 0, 1, 30, 7, 0), seed=0, spread=0.4):
    gen = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    logp = -torch.rand(total, generator=gen) * 3
    behavior = logp + spread * torch.randn(total, generator=gen)
    mask = torch.rand(total, generator=gen) < 0.8
    return logp, behavior, cu, mask


def log_ratio(logp, behavior):
    return (logp.double() - behavior.double()).tolist()


MODES = {
    "ips": {},
    "truncate": {"low": 0.7, "high": 1.4},
    "mask": {"low": 0.7, "high": 1.4},
    "switch": {"high": 1.3},
    "shrink": {"lam": 2.0},
    "subgaussian": {"lam": 0.3},
    "tempered": {"power": 0.5},
}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_at_every_level(mode, level, masked):
    logp, behavior, cu, mask = batch()
    m = mask if masked else None
    out = offpolicy_weights(logp, behavior, level=level, mode=mode, cu_seqlens=cu, mask=m, **MODES[mode])
    want = expected(
        log_ratio(logp, behavior),
        level=level,
        mode=mode,
        cu=cu.tolist(),
        mask=None if m is None else m.tolist(),
        **MODES[mode],
    )
    check(out, want)


@pytest.mark.parametrize("over", ["token", "sum", "mean", "max"])
@pytest.mark.parametrize("stat", ["ratio", "k1", "k2", "k3"])
def test_every_rule(stat, over):
    logp, behavior, cu, mask = batch()
    bounds = {"ratio": (0.8, 1.25), "k1": (-0.25, 0.2), "k2": (None, 0.05), "k3": (None, 0.05)}
    factor = 20.0 if over == "sum" and stat != "ratio" else 1.0
    low, high = (None if b is None else b * factor for b in bounds[stat])
    rule = KeepRule(stat, over, low, high)
    kwargs = {"mode": "truncate", "high": 1.5, "rules": (rule,)}
    out = offpolicy_weights(logp, behavior, cu_seqlens=cu, mask=mask, **kwargs)
    d = log_ratio(logp, behavior)
    check(out, expected(d, cu=cu.tolist(), mask=mask.tolist(), **kwargs))
    only = offpolicy_weights(logp, behavior, mode="keep", rules=(rule,), cu_seqlens=cu, mask=mask)
    assert torch.equal(only.kept_mask, out.kept_mask)
    assert torch.equal(only.weight, out.kept_mask.float())


@pytest.mark.parametrize("level", ["token", "sequence", "geometric"])
@pytest.mark.parametrize("normalize", ["batch", "group"])
def test_normalised_weights(normalize, level):
    logp, behavior, cu, mask = batch((5, 3, 1, 30, 7, 0))
    groups = torch.tensor([9, -4, 9, 9, -4, 0]) if normalize == "group" else None
    out = offpolicy_weights(
        logp,
        behavior,
        level=level,
        mode="truncate",
        high=1.3,
        normalize=normalize,
        cu_seqlens=cu,
        mask=mask,
        group_ids=groups,
    )
    want = expected(
        log_ratio(logp, behavior),
        level=level,
        mode="truncate",
        high=1.3,
        normalize=normalize,
        cu=cu.tolist(),
        mask=mask.tolist(),
        group_ids=None if groups is None else groups.tolist(),
    )
    check(out, want)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_the_row_loop(data):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=5))
    spread = data.draw(st.sampled_from([0.0, 0.1, 1.0, 15.0]))
    logp, behavior, cu, mask = batch(lengths, data.draw(st.integers(0, 999)), spread)
    level = data.draw(st.sampled_from(["token", "sequence", "geometric"]))
    mode = data.draw(st.sampled_from(list(MODES)))
    normalize = data.draw(st.sampled_from(["none", "batch", "group"]))
    groups = data.draw(st.lists(st.sampled_from([0, 3, -7]), min_size=5, max_size=5))
    groups = groups[: len(lengths)] if normalize == "group" else None
    rule = st.builds(
        KeepRule,
        st.sampled_from(["ratio", "k1", "k2", "k3"]),
        st.sampled_from(["token", "sum", "mean", "max"]),
        st.sampled_from([None, -0.3, 0.003]),
        st.sampled_from([0.37, 1.7]),
        st.booleans(),
    )
    rules = tuple(data.draw(st.lists(rule, max_size=3)))
    advantage = None
    if any(r.negative_only for r in rules):
        advantage = torch.where(mask.roll(1), 0.5, -0.5)
    masked = data.draw(st.booleans())
    kwargs = {"level": level, "mode": mode, "normalize": normalize, "rules": rules, **MODES[mode]}
    want = expected(
        log_ratio(logp, behavior),
        cu=cu.tolist(),
        mask=mask.tolist() if masked else None,
        group_ids=groups,
        advantage=None if advantage is None else advantage.tolist(),
        **kwargs,
    )
    hypothesis.assume(want is not None)
    out = offpolicy_weights(
        logp,
        behavior,
        cu_seqlens=cu,
        mask=mask if masked else None,
        group_ids=None if groups is None else torch.tensor(groups, dtype=torch.int64),
        advantage=advantage,
        **kwargs,
    )
    check(out, want)


def test_published_variants():
    d = torch.tensor([0.1, -0.2, 0.9, 0.05, -0.02, 0.01])
    cu = torch.tensor([0, 3, 6], dtype=torch.int32)
    zero = torch.zeros(6)

    def run(**kwargs):
        return offpolicy_weights(d, zero, cu_seqlens=cu, **kwargs)

    tis = run(mode="truncate", high=2.0)
    torch.testing.assert_close(tis.weight, d.exp().clamp(max=2.0))
    assert tis.kept_mask.all()
    openrlhf = run(mode="truncate", low=0.9, high=1.1)
    torch.testing.assert_close(openrlhf.weight, d.exp().clamp(0.9, 1.1))
    icepop = run(mode="mask", low=0.5, high=2.0)
    assert icepop.kept_mask.tolist() == [True, True, False, True, True, True]
    torch.testing.assert_close(icepop.weight, d.exp() * icepop.kept_mask)
    seq_mis = run(level="sequence", mode="mask", high=2.0)
    assert seq_mis.kept_mask.tolist() == [False] * 3 + [True] * 3
    assert seq_mis.weight[3:].tolist() == pytest.approx([math.exp(0.04)] * 3, rel=1e-6)
    geo = run(mode="keep", rules=(KeepRule("ratio", "mean", 0.98, 1.02),))
    assert geo.weight.tolist() == [0.0] * 3 + [1.0] * 3
    # OPSM: mean(behavior - logp) is -0.267 and -0.013. Only sequences with a negative advantage can be dropped.
    opsm = (KeepRule("k1", "mean", high=-0.1, negative_only=True),)
    advantage = torch.tensor([-1.0, 1.0, -1.0, -1.0, 0.0, 1.0])
    out = run(mode="keep", rules=opsm, advantage=advantage)
    assert out.kept_mask.tolist() == [True, True, True, False, True, True]


def test_caps_of_the_shrunk_weights():
    d, zero = torch.linspace(-20, 20, 2001), torch.zeros(2001)
    shrunk = offpolicy_weights(d, zero, mode="shrink", lam=9.0).weight
    assert shrunk.max().item() == pytest.approx(1.5, rel=1e-4)
    assert shrunk.max() <= 1.5 * (1 + 1e-6)
    gauss = offpolicy_weights(d, zero, mode="subgaussian", lam=0.25).weight
    assert gauss.max().item() == pytest.approx(4.0, rel=1e-6) and gauss.max() <= 4.0 * (1 + 1e-6)
    ratio = offpolicy_weights(d[800:1200], zero[800:1200]).weight
    large = offpolicy_weights(d[800:1200], zero[800:1200], mode="shrink", lam=1e9).weight
    torch.testing.assert_close(large, ratio, rtol=1e-5, atol=0)


def test_snips_shifts_with_the_reward():
    logp, behavior, cu, mask = batch()
    reward = torch.randn(logp.shape[0], generator=torch.Generator().manual_seed(9))

    def value(r, **kwargs):
        out = offpolicy_weights(logp, behavior, cu_seqlens=cu, mask=mask, **kwargs)
        return ((out.weight * r).sum() / out.kept_mask.sum()).item()

    shift = value(reward + 3.0, mode="snips") - value(reward, mode="snips")
    assert shift == pytest.approx(3.0, rel=1e-5)
    assert abs(value(reward + 3.0) - value(reward) - 3.0) > 1e-2
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    by_group = {"mode": "snips", "group_ids": groups}
    assert value(reward + 3.0, **by_group) - value(reward, **by_group) == pytest.approx(3.0, 1e-5)


def test_snips_is_ips_normalised():
    logp, behavior, cu, _ = batch()
    groups = torch.tensor([0, 1, 0, 1, 0, 1])
    for kwargs in ({}, {"group_ids": groups}):
        norm = "group" if kwargs else "batch"
        a = offpolicy_weights(logp, behavior, mode="snips", cu_seqlens=cu, **kwargs)
        b = offpolicy_weights(logp, behavior, normalize=norm, cu_seqlens=cu, **kwargs)
        assert torch.equal(a.weight, b.weight) and torch.equal(a.ess, b.ess)
    forced = offpolicy_weights(logp, behavior, mode="snips", normalize="batch", cu_seqlens=cu)
    assert torch.equal(forced.weight, offpolicy_weights(logp, behavior, mode="snips", cu_seqlens=cu).weight)


def test_tempered_group_weights_are_a_softmax():
    logp, behavior, cu, _ = batch((4, 4, 4))
    out = offpolicy_weights(
        logp,
        behavior,
        level="sequence",
        mode="tempered",
        power=0.7,
        normalize="group",
        group_ids=torch.tensor([5, 5, 5]),
        cu_seqlens=cu,
    )
    sums = (logp - behavior).view(3, 4).sum(1)
    torch.testing.assert_close(out.weight[::4], 3 * torch.softmax(0.7 * sums, 0))


def test_external_rows_and_propensities():
    logp, p = torch.tensor([0.5, 0.25, 0.1]).log(), torch.tensor([0.25, 0.5, 0.05])
    out = offpolicy_weights(logp, propensity=p, level="external")
    torch.testing.assert_close(out.weight, torch.tensor([2.0, 0.5, 2.0]))
    inverse = offpolicy_weights(None, propensity=p, level="external")
    torch.testing.assert_close(inverse.weight, 1 / p)
    groups = torch.tensor([1, 1, 0], dtype=torch.int32)
    by_group = offpolicy_weights(None, propensity=p, level="external", mode="snips", group_ids=groups)
    torch.testing.assert_close(by_group.weight, torch.tensor([4 / 3, 2 / 3, 1.0]))
    same = offpolicy_weights(logp, p.log(), level="external")
    torch.testing.assert_close(same.weight, out.weight)


def test_effective_sample_size():
    zero = torch.zeros(10)
    assert offpolicy_weights(zero, zero).ess.item() == 10.0
    mask = torch.arange(10) < 4
    assert offpolicy_weights(zero, zero, mask=mask).ess.item() == 4.0
    one_big = torch.tensor([20.0] + [-20.0] * 9)
    assert offpolicy_weights(one_big, zero).ess.item() == pytest.approx(1.0, rel=1e-6)
    cu = torch.tensor([0, 3, 3, 10], dtype=torch.int32)
    assert offpolicy_weights(zero, zero, level="sequence", cu_seqlens=cu).ess.item() == 2.0


def test_dropped_rows_leave_the_denominator_and_switched_ones_stay():
    d, zero = torch.tensor([0.0, 3.0, 0.0, 0.0]), torch.zeros(4)
    dropped = offpolicy_weights(d, zero, mode="mask", high=2.0)
    switched = offpolicy_weights(d, zero, mode="switch", high=2.0)
    assert dropped.weight.tolist() == switched.weight.tolist() == [1.0, 0.0, 1.0, 1.0]
    assert dropped.kept_mask.sum() == 3 and switched.kept_mask.sum() == 4
    loss = torch.full((4,), 2.0)
    assert (loss * dropped.weight).sum() / dropped.kept_mask.sum() == 2.0


def test_log_ratios_are_clamped():
    inf = float("inf")
    logp = torch.tensor([30.0, -30.0, 0.0, -inf])
    behavior = torch.tensor([0.0, 0.0, -inf, 0.0])
    want = torch.tensor([math.exp(20), math.exp(-20), math.exp(20), math.exp(-20)])
    torch.testing.assert_close(offpolicy_weights(logp, behavior).weight, want, rtol=4e-6, atol=0)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    fifteen = torch.full((4,), 15.0)
    out = offpolicy_weights(fifteen, torch.zeros(4), level="sequence", cu_seqlens=cu)
    torch.testing.assert_close(out.weight, torch.full((4,), math.exp(20)))


def test_nan_shows_where_it_belongs_and_nowhere_else():
    logp, behavior, cu, mask = batch((4, 4, 4))
    logp[5] = float("nan")
    token = offpolicy_weights(logp, behavior, mode="mask", low=0.0, high=1e9)
    assert token.weight.isnan().tolist() == [i == 5 for i in range(12)] and token.kept_mask[5]
    for rule in (
        KeepRule("ratio", "mean", 0.0, 1e9),
        KeepRule("k3", "max", high=1e9),
        KeepRule("k2", "sum", high=1e9),
        KeepRule("k3", "mean", high=1e9),
    ):
        out = offpolicy_weights(logp, behavior, level="sequence", cu_seqlens=cu, rules=(rule,))
        assert out.weight.isnan().tolist() == [4 <= i < 8 for i in range(12)]
        assert out.kept_mask.all()
    groups = torch.tensor([0, 0, 1])
    out = offpolicy_weights(logp, behavior, mode="snips", cu_seqlens=cu, group_ids=groups)
    assert out.weight.isnan().tolist() == [i < 8 for i in range(12)]
    clean = offpolicy_weights(logp, behavior, mode="snips", mask=torch.arange(12) != 5)
    assert not clean.weight.isnan().any() and clean.weight[5] == 0 and not clean.kept_mask[5]


def test_edges():
    empty, none = torch.zeros(0), torch.tensor([0], dtype=torch.int32)
    for kwargs in ({}, {"cu_seqlens": none, "level": "sequence"}, {"mode": "snips"}):
        out = offpolicy_weights(empty, empty, **kwargs)
        assert out.weight.shape == out.kept_mask.shape == (0,) and out.ess.item() == 0.0
    logp, behavior, cu, mask = batch()
    for kwargs in ({}, {"level": "geometric", "cu_seqlens": cu}, {"mode": "snips"}):
        out = offpolicy_weights(logp, behavior, mask=torch.zeros_like(mask), **kwargs)
        assert out.weight.abs().sum() == 0 and not out.kept_mask.any() and out.ess.item() == 0.0
    every_zero = offpolicy_weights(torch.ones(3), torch.zeros(3), mode="switch", high=1.0, normalize="batch")
    assert every_zero.weight.tolist() == [0.0] * 3 and every_zero.ess.item() == 0.0


def test_sequences_longer_than_a_stage():
    logp, behavior, cu, mask = batch((511, 512, 513, 1200), spread=0.02)
    for level in ("token", "sequence", "geometric"):
        rules = (KeepRule("k3", "mean", high=1.0), KeepRule("k2", "max", high=10.0))
        out = offpolicy_weights(logp, behavior, level=level, cu_seqlens=cu, mask=mask, rules=rules, normalize="batch")
        want = expected(
            log_ratio(logp, behavior), level=level, cu=cu.tolist(), mask=mask.tolist(), rules=rules, normalize="batch"
        )
        check(out, want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    logp, behavior, cu, mask = batch()
    logp, behavior = logp.to(dtype), behavior.to(dtype)
    if dtype == torch.float64 and backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32"):
            offpolicy_weights(logp, behavior)
        return
    out = offpolicy_weights(logp, behavior, mask=mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert out.weight.dtype == out.ess.dtype == wide
    want = expected(log_ratio(logp, behavior), mask=mask.tolist())
    torch.testing.assert_close(out.weight.double(), torch.tensor(want[0]).double(), rtol=4e-6, atol=0)


def test_strided_and_differentiable_inputs():
    logp, behavior, cu, mask = batch()
    wide = torch.stack([logp, behavior], 1).requires_grad_()
    out = offpolicy_weights(wide[:, 0], wide[:, 1], mask=mask)
    assert torch.equal(out.weight, offpolicy_weights(logp, behavior, mask=mask).weight)
    assert not out.weight.requires_grad and not out.ess.requires_grad


def test_bits_do_not_depend_on_the_thread_count(backend):
    long = (300, 17, 900, 1200, 5, 80) if backend == "triton" else (3000, 17, 9000, 12000, 5, 800)
    logp, behavior, cu, mask = batch(long)
    groups = torch.tensor([0, 1, 0, 1, 2, 2])
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = [*offpolicy_weights(logp, behavior, mask=mask, mode="snips")]
            out += offpolicy_weights(logp, behavior, cu_seqlens=cu, mode="snips", group_ids=groups)
            results.append(out)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


X, CU = torch.zeros(3), torch.tensor([0, 1, 3], dtype=torch.int32)
IDS = torch.zeros(2, dtype=torch.int64)
SEQ_RULE, NEG_RULE = KeepRule("k1", "mean", high=1.0), KeepRule("k1", high=1.0, negative_only=True)
REFUSALS = [
    ((X,), {}, "behavior_logp or propensity must be given, exactly one of them; got none"),
    ((X, X), {"propensity": X}, "behavior_logp or propensity must be .*; got both"),
    ((None, X), {}, "logp must be given with level 'token'"),
    ((X[:1], X), {}, r"logp must be of shape \(3,\) to match behavior_logp"),
    ((X[:1],), {"propensity": X}, r"logp must be of shape \(3,\) to match propensity"),
    ((X, X.int()), {}, "behavior_logp must be of dtype"),
    ((X, X), {"level": "turn"}, "level must be one of token, sequence, geometric, external"),
    ((X, X), {"mode": "clip"}, "mode must be one of ips, truncate, mask, switch, shrink"),
    ((X, X), {"normalize": "seq"}, "normalize must be one of none, batch, group"),
    ((X, X), {"mode": "snips", "normalize": "none"}, "normalize must be 'batch' or 'group' with"),
    ((X, X), {"high": 2.0}, "high must be left out with mode 'ips'; got 2.0"),
    ((X, X), {"mode": "switch", "low": 0.1, "high": 2.0}, "low must be left out with mode 'switch'"),
    ((X, X), {"mode": "shrink", "high": 2.0}, "high must be left out with mode 'shrink'"),
    ((X, X), {"mode": "tempered", "lam": 2.0}, "lam must be left out with mode 'tempered'"),
    ((X, X), {"mode": "truncate"}, "low or high must be given with mode 'truncate'"),
    ((X, X), {"mode": "switch"}, "high must be given with mode 'switch'"),
    ((X, X), {"mode": "shrink"}, "lam must be given with mode 'shrink'"),
    ((X, X), {"mode": "tempered"}, "power must be given with mode 'tempered'"),
    ((X, X), {"mode": "mask", "low": -1.0}, r"low must be a finite number in \[0, inf\)"),
    ((X, X), {"mode": "mask", "low": 2.0, "high": 1.0}, "low must be <= high = 1; got 2.0"),
    ((X, X), {"mode": "subgaussian", "lam": 1.5}, r"lam must be a finite number in \(0, 1\]"),
    ((X, X), {"mode": "tempered", "power": 5.0}, r"power must be a finite number in \(0, 4\]"),
    ((X, X), {"mode": "keep"}, "rules must be given with mode 'keep'"),
    ((X, X), {"rules": (KeepRule("k1", high=1.0),) * 9}, "rules must be at most 8; got 9"),
    ((X, X), {"rules": (NEG_RULE,)}, "advantage must be given with a negative_only rule"),
    ((X, X), {"advantage": X}, "advantage must be left out with rules without negative_only"),
    ((X, X), {"rules": (SEQ_RULE,)}, "cu_seqlens must be given with a sequence level or rule"),
    ((X, X), {"level": "sequence"}, "cu_seqlens must be given with level 'sequence'"),
    ((X, X), {"group_ids": IDS}, "group_ids must be left out with normalize 'none'"),
    ((X, X), {"normalize": "group", "group_ids": IDS}, "cu_seqlens must be given with level"),
    ((X, X), {"normalize": "group", "cu_seqlens": CU}, "group_ids must be given with normalize"),
    (
        (X, X),
        {"normalize": "group", "cu_seqlens": CU, "group_ids": IDS[:1]},
        r"group_ids must be of shape \(2,\) to match cu_seqlens",
    ),
    ((X, X), {"cu_seqlens": CU[:2]}, "cu_seqlens must be a prefix sum that ends at"),
    ((X, X), {"level": "external", "cu_seqlens": CU}, "cu_seqlens must be left out with level"),
    ((X, X), {"mask": X}, "mask must be of dtype bool"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^offpolicy_weights: {message}"):
        offpolicy_weights(*args, **kwargs)


def test_refusals_of_a_rule():
    with pytest.raises(ValueError, match="^KeepRule: statistic must be one of ratio, k1, k2, k3"):
        KeepRule("k4", high=1.0)
    with pytest.raises(ValueError, match="^KeepRule: over must be one of token, sum, mean, max"):
        KeepRule("k1", "sequence", high=1.0)
    with pytest.raises(ValueError, match="^KeepRule: low or high must be given"):
        KeepRule("k1")
    with pytest.raises(ValueError, match="^KeepRule: low must be <= high = 1; got 2"):
        KeepRule("k1", low=2.0, high=1.0)
    with pytest.raises(TypeError, match="rules must be a tuple of KeepRule; got"):
        offpolicy_weights(X, X, rules=("k1",))
