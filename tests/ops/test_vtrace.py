"""Test vtrace against a token loop in Python floats, and that the doubly robust scan is unbiased.

The scan is float64. The native exp has a relative error of 1e-6, and the scan multiplies errors of the
ratios into sums, so the bound is 3e-6 of the sum of absolute terms.
"""

import itertools
import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st

from tokfuse.runtime.ops.gae import gae
from tokfuse.runtime.ops.vtrace import vtrace

gae, vtrace = on_its_device(gae), on_its_device(vtrace)


@pytest.fixture(params=backends("vtrace"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def expected(d, reward, value, cu, gamma=1.0, lam=1.0, rho_bar=1.0, c_bar=1.0, mask=None, finished=None):
    d, reward, value = d.double().tolist(), reward.double().tolist(), value.double().tolist()
    target, advantage, rhos = ([0.0] * len(reward) for _ in range(3))
    for s in range(len(cu) - 1):
        places = [t for t in range(cu[s], cu[s + 1]) if mask is None or mask[t]]
        for k in reversed(range(len(places))):
            t = places[k]
            w = math.exp(max(-20.0, min(20.0, d[t])))
            rho = min(w, math.inf if rho_bar is None else rho_bar)
            c = lam * min(w, math.inf if c_bar is None else c_bar)
            if k + 1 < len(places):
                following, ahead = value[places[k + 1]], target[places[k + 1]]
            else:
                following = 0.0 if finished is None or finished[s] else value[t]
                ahead = following
            delta = rho * (reward[t] + gamma * following - value[t])
            target[t] = value[t] + delta + gamma * c * (ahead - following)
            advantage[t] = reward[t] + gamma * ahead - value[t]
            rhos[t] = rho
    return [torch.tensor(x, dtype=torch.float64) for x in (target, advantage, rhos)]


def check(actual, wanted):
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == torch.float32 and not got.requires_grad
        scale = want.abs().max().item() if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=3e-6, atol=3e-6 * scale)


def batch(lengths=(5, 0, 1, 130, 7, 0), seed=0):
    gen = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    d, reward, value = (torch.randn(total, generator=gen) for _ in range(3))
    mask = torch.rand(total, generator=gen) < 0.7
    finished = torch.rand(len(lengths), generator=gen) < 0.5
    return 0.3 * d, reward, value, cu, mask, finished


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_the_token_loop(data):
    lengths = data.draw(st.lists(st.integers(0, 6), max_size=4))
    seed = data.draw(st.integers(0, 1000))
    d, reward, value, cu, mask, finished = batch(lengths, seed)
    d = d * data.draw(st.sampled_from([0.0, 1.0, 5.0]))
    bounds = st.sampled_from([None, 0.5, 1.0, 2.0])
    unit = st.sampled_from([0.0, 0.9, 1.0])
    kwargs = {
        "gamma": data.draw(unit),
        "lam": data.draw(unit),
        "rho_bar": data.draw(bounds),
        "c_bar": data.draw(bounds),
        "mask": data.draw(st.sampled_from([None, mask])),
        "finished": data.draw(st.sampled_from([None, finished])),
    }
    check(vtrace(d, reward, value, cu, **kwargs), expected(d, reward, value, cu.tolist(), **kwargs))


def test_sequences_longer_than_a_block():
    d, reward, value, cu, mask, finished = batch((511, 512, 513, 1025, 2))
    for kwargs in ({}, {"mask": mask, "finished": finished}):
        check(
            vtrace(d, reward, value, cu, gamma=0.9, lam=0.8, **kwargs),
            expected(d, reward, value, cu.tolist(), gamma=0.9, lam=0.8, **kwargs),
        )


def test_ratio_one_gives_the_monte_carlo_return_whatever_the_value():
    _, reward, value, cu, mask, _ = batch()
    for kwargs in ({}, {"rho_bar": None, "c_bar": None}, {"mask": mask}):
        out = vtrace(torch.zeros_like(reward), reward, value, cu, gamma=0.9, **kwargs)
        returns = gae(reward, value, cu, gamma=0.9, lam=1.0, mask=kwargs.get("mask"))[1]
        torch.testing.assert_close(out.target, returns, rtol=1e-6, atol=1e-6)


def test_on_policy_lam_is_the_lam_of_gae():
    _, reward, value, cu, _, finished = batch()
    zero = torch.zeros_like(reward)
    out = vtrace(zero, reward, value, cu, gamma=0.9, lam=0.7, finished=finished)
    returns = gae(reward, value, cu, gamma=0.9, lam=0.7, finished=finished)[1]
    torch.testing.assert_close(out.target, returns, rtol=1e-5, atol=1e-5)


def test_doubly_robust_recursion():
    d, reward, value, cu, _, _ = batch((9,))
    out = vtrace(d, reward, value, cu, gamma=0.9, rho_bar=None, c_bar=None)
    ratio, ahead = d.double().exp(), 0.0
    for t in reversed(range(9)):
        ahead = value[t].item() + ratio[t].item() * (reward[t].item() + 0.9 * ahead - value[t].item())
        assert out.target[t].item() == pytest.approx(ahead, rel=1e-5, abs=1e-5)


def test_doubly_robust_is_unbiased_for_any_value():
    """Every trajectory of a 4-step binary process, weighted by its exact probability."""
    behavior, target = [0.5, 0.3, 0.6, 0.8], [0.9, 0.5, 0.2, 0.4]
    true, paths = 0.0, list(itertools.product([0, 1], repeat=4))
    d, reward, chance = [], [], []
    for path in paths:
        b = [p if a else 1 - p for p, a in zip(behavior, path, strict=True)]
        pi = [p if a else 1 - p for p, a in zip(target, path, strict=True)]
        r = [float(a) * (k + 1) for k, a in enumerate(path)]
        true += math.prod(pi) * sum(r)
        d += [math.log(p / q) for p, q in zip(pi, b, strict=True)]
        reward += r
        chance.append(math.prod(b))
    cu = torch.arange(0, 4 * len(paths) + 1, 4, dtype=torch.int32)
    prob = torch.tensor(chance)
    for value in (torch.zeros(64), torch.tensor([3.0, -1.0, 0.5, 2.0]).repeat(16)):
        unclipped = {"rho_bar": None, "c_bar": None}
        out = vtrace(torch.tensor(d), torch.tensor(reward), value, cu, **unclipped)
        mean = (out.target[::4] * prob).sum().item()
        assert mean == pytest.approx(true, rel=1e-5)


def test_each_option_is_honoured():
    d, reward, value, cu, mask, finished = batch()
    base = vtrace(d, reward, value, cu).target
    for kwargs in (
        {"gamma": 0.9},
        {"lam": 0.9},
        {"rho_bar": 0.8},
        {"rho_bar": None},
        {"c_bar": 0.8},
        {"c_bar": None},
        {"mask": mask},
        {"finished": finished},
    ):
        assert not torch.equal(vtrace(d, reward, value, cu, **kwargs).target, base), kwargs


def test_log_ratios_are_clamped():
    d, reward = torch.tensor([50.0, -50.0, float("inf"), -float("inf")]), torch.ones(4)
    cu = torch.arange(5, dtype=torch.int32)
    out = vtrace(d, reward, torch.zeros(4), cu, rho_bar=None, c_bar=None)
    want = torch.tensor([math.exp(20.0), math.exp(-20.0)] * 2)
    torch.testing.assert_close(out.rho, want, rtol=2e-6, atol=0)


def test_masked_values_are_not_read():
    d, reward, value, cu, mask, _ = batch()
    clean = vtrace(d, reward, value, cu, gamma=0.9, mask=mask)
    dirty = (torch.where(mask, x, float("nan")) for x in (d, reward, value))
    for got, want in zip(vtrace(*dirty, cu, gamma=0.9, mask=mask), clean, strict=True):
        assert torch.equal(got, want) and got[~mask].abs().sum() == 0


def test_edges():
    empty, none = torch.zeros(0), torch.tensor([0], dtype=torch.int32)
    assert [x.shape for x in vtrace(empty, empty, empty, none)] == [(0,)] * 3
    d, reward, value, cu, mask, _ = batch()
    for out in vtrace(d, reward, value, cu, mask=torch.zeros_like(mask)):
        assert out.abs().sum() == 0


def test_nan_stays_in_its_sequence():
    d, reward, value, cu, _, _ = batch((4, 5, 3))
    d[6] = float("nan")
    for out in vtrace(d, reward, value, cu)[:2]:
        assert not out[:4].isnan().any() and not out[7:].isnan().any() and out[4:6].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_dtypes(dtype, backend):
    d, reward, value, cu, _, _ = (x.to(dtype) if x.is_floating_point() else x for x in batch())
    if dtype == torch.float64 and backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32"):
            vtrace(d, reward, value, cu)
        return
    out = vtrace(d, reward, value, cu)
    assert out.target.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = expected(d, reward, value, cu.tolist())
    torch.testing.assert_close(out.target.double(), want[0], rtol=3e-6, atol=3e-5)


def test_bits_do_not_depend_on_the_thread_count(backend):
    lengths = (17, 600, 1100) if backend == "triton" else (3000, 17, 9000, 12000, 5, 800)
    d, reward, value, cu, mask, _ = batch(lengths)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(vtrace(d, reward, value, cu, mask=mask).target)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


X, CU = torch.ones(3), torch.tensor([0, 1, 3], dtype=torch.int32)
REFUSALS = [
    ((X[:1], X, X, CU), {}, r"log_ratio must be of shape \(3,\) to match reward"),
    ((X, X, X[:1], CU), {}, r"value must be of shape \(3,\) to match reward"),
    ((X, X, X, CU[1:] - 1), {}, "cu_seqlens must be a prefix sum that ends at num_tokens = 3"),
    ((X, X, X, CU), {"gamma": 2.0}, r"gamma must be a finite number in \[0, 1\]"),
    ((X, X, X, CU), {"lam": 2.0}, r"lam must be a finite number in \[0, 1\]"),
    ((X, X, X, CU), {"rho_bar": 0.0}, r"rho_bar must be a finite number in \(0, inf\)"),
    ((X, X, X, CU), {"c_bar": -1.0}, r"c_bar must be a finite number in \(0, inf\)"),
    ((X, X, X, CU), {"mask": X}, "mask must be of dtype bool"),
    ((X, X, X, CU), {"finished": X.bool()}, r"finished must be of shape \(2,\)"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^vtrace: {message}"):
        vtrace(*args, **kwargs)
