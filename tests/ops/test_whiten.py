"""Test whiten against fsum formulas in Python floats, on every backend: one float32 rounding."""

import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st

from tokfuse.runtime.ops.whiten import whiten

whiten = on_its_device(whiten)


@pytest.fixture(params=backends("whiten"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def expected(x, mask=None, shift_mean=True, eps=1e-8):
    rows = [v for i, v in enumerate(x) if mask is None or mask[i]]
    out = [0.0] * len(x)
    if rows:
        mean = math.fsum(rows) / len(rows)
        var = math.fsum((v - mean) ** 2 for v in rows) / max(len(rows) - 1, 1)
        if min(rows) == max(rows):
            mean, var = rows[0], 0.0
        for i, v in enumerate(x):
            if mask is None or mask[i]:
                spread = math.sqrt(var + eps)
                out[i] = (v - mean) / spread if spread else 0.0
                out[i] += 0.0 if shift_mean else mean
    return torch.tensor(out, dtype=torch.float64)


def close(actual, wanted, slack=0.0):
    assert actual.dtype == torch.float32 and not actual.requires_grad
    torch.testing.assert_close(actual.double(), wanted, rtol=2e-7, atol=1e-9 + slack)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_formulas(data):
    numbers = st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    x = data.draw(st.lists(numbers, max_size=30))
    size = {"min_size": len(x), "max_size": len(x)}
    mask = data.draw(st.none() | st.lists(st.booleans(), **size))
    shift = data.draw(st.booleans())
    out = whiten(
        torch.tensor(x, dtype=torch.float32),
        None if mask is None else torch.tensor(mask, dtype=torch.bool),
        shift_mean=shift,
    )
    # (x - mean) * 1e4 if the variance is far below eps.
    close(out, expected(x, mask, shift), slack=1e-8 * max((abs(v) for v in x), default=0.0))


@pytest.mark.parametrize("size", [1, 4095, 4096, 4097, 20_011])
def test_sizes_around_a_block(size):
    gen = torch.Generator().manual_seed(size)
    x = 3.0 * torch.randn(size, generator=gen) + 100.0
    mask = torch.rand(size, generator=gen) < 0.6
    mask[:1] = True
    for m in (None, mask):
        close(whiten(x, m), expected(x.tolist(), None if m is None else m.tolist()))


def test_moments_of_the_result():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 7 + 1e4
    out = whiten(x).double()
    assert abs(out.mean().item()) < 1e-6 and out.std().item() == pytest.approx(1.0, rel=1e-6)
    kept = whiten(x, shift_mean=False).double()
    assert kept.mean().item() == pytest.approx(x.double().mean().item(), rel=1e-6)


def test_large_mean_keeps_its_digits():
    x = (torch.arange(10_000) % 2).float() + 2.0**23
    half = 0.5 / math.sqrt(0.25 * 10_000 / 9_999 + 1e-8)
    want = torch.where(torch.arange(10_000) % 2 == 0, -half, half)
    torch.testing.assert_close(whiten(x), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [0.1, 1.1, -3e30, 0.0])
def test_equal_values_give_exactly_zero(value):
    x = torch.full((5001,), value)
    for eps in (1e-8, 0.0):
        assert whiten(x, eps=eps).abs().max() == 0
        assert torch.equal(whiten(x, shift_mean=False, eps=eps), x)


def test_one_valid_value():
    x, mask = torch.tensor([5.0, 3.0]), torch.tensor([False, True])
    assert whiten(x, mask).tolist() == [0.0, 0.0]
    assert whiten(x, mask, shift_mean=False).tolist() == [0.0, 3.0]


def test_edges():
    assert whiten(torch.zeros(0)).shape == (0,)
    assert whiten(torch.ones(3), torch.zeros(3, dtype=torch.bool)).tolist() == [0.0] * 3


def test_masked_nan_is_not_read_and_a_valid_one_poisons():
    x, mask = torch.tensor([1.0, float("nan"), 3.0]), torch.tensor([True, False, True])
    close(whiten(x, mask), expected([1.0, 0.0, 3.0], mask.tolist()))
    out = whiten(torch.tensor([1.0, float("nan"), 3.0, 7.0]), torch.tensor([True] * 3 + [False]))
    assert out.isnan().tolist() == [True, True, True, False]
    assert whiten(torch.tensor([float("nan")])).isnan().all()


def test_given_statistics_of_a_larger_batch():
    x = torch.randn(600, generator=torch.Generator().manual_seed(2))
    whole = whiten(x)
    mean, var = x.double().mean(), x.double().var()
    parts = [whiten(part, mean=mean, var=var) for part in x.split(200)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-6, atol=1e-7)
    numbers = whiten(x, mean=mean.item(), var=var.item(), shift_mean=False)
    torch.testing.assert_close(numbers, whiten(x, shift_mean=False), rtol=1e-6, atol=1e-7)
    assert whiten(x, mean=0.0, var=0.0, eps=0.0).abs().max() == 0


def test_options_are_honoured():
    x = torch.randn(50, generator=torch.Generator().manual_seed(3)) + 2
    results = [
        whiten(x),
        whiten(x, torch.arange(50) < 30),
        whiten(x, shift_mean=False),
        whiten(x, eps=0.5),
        whiten(x, mean=0.0, var=1.0),
    ]
    assert len({tuple(r.tolist()) for r in results}) == len(results)
    close(results[3], expected(x.tolist(), eps=0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    x = torch.randn(50, generator=torch.Generator().manual_seed(3)).to(dtype)
    if dtype == torch.float64 and backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32"):
            whiten(x)
        return
    out = whiten(x)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), expected(x.tolist()), rtol=2e-7, atol=1e-9)


def test_strided_and_differentiable_input():
    wide = torch.randn(40, 3, generator=torch.Generator().manual_seed(4), requires_grad=True)
    out = whiten(wide[:, 1], (wide[:, 2] > 0))
    assert not out.requires_grad
    assert torch.equal(out, whiten(wide[:, 1].contiguous(), wide[:, 2] > 0))


def test_bits_do_not_depend_on_the_thread_count(backend):
    size = 5_000 if backend == "triton" else 50_000
    x = torch.randn(size, generator=torch.Generator().manual_seed(5))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(whiten(x, x > -1))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


X = torch.ones(3)
REFUSALS = [
    ((X[None],), {}, "x must be a 1-D tensor"),
    ((X.int(),), {}, "x must be of dtype"),
    ((X, X), {}, "mask must be of dtype bool"),
    ((X, X[:2].bool()), {}, r"mask must be of shape \(3,\) to match x"),
    ((X,), {"eps": -1.0}, "eps must be a finite number"),
    ((X,), {"mean": 0.0}, "mean and var must be given together"),
    ((X,), {"var": 1.0}, "mean and var must be given together"),
    ((X,), {"mean": X, "var": X}, "mean must be a number or a 0-dim tensor on cpu"),
    ((X,), {"mean": 0.0, "var": -1.0}, "var must be a finite number"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^whiten: {message}"):
        whiten(*args, **kwargs)
