"""Test segment_moments against fsum per segment, on every backend: float64 sums, one rounding."""

import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st

from tokfuse.runtime.ops.segment_moments import segment_moments

segment_moments = on_its_device(segment_moments)
INF = float("inf")


@pytest.fixture(params=backends("segment_moments"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def expected(values, ids, num_segments, mask=None):
    rows = [[] for _ in range(num_segments)]
    for i, v in enumerate(values):
        if mask is None or mask[i]:
            rows[ids[i]].append(v)
    return (
        torch.tensor([len(r) for r in rows], dtype=torch.int64),
        torch.tensor([math.fsum(r) for r in rows], dtype=torch.float64),
        torch.tensor([math.fsum(v * v for v in r) for r in rows], dtype=torch.float64),
        torch.tensor([min(r, default=INF) for r in rows], dtype=torch.float64),
        torch.tensor([max(r, default=-INF) for r in rows], dtype=torch.float64),
    )


def check(actual, wanted, dtype=torch.float32):
    assert actual.count.dtype == torch.int64 and torch.equal(actual.count, wanted[0])
    for got, want in zip(actual[1:], wanted[1:], strict=True):
        assert got.dtype == dtype
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-9)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_formulas(data):
    numbers = st.floats(-1e3, 1e3, width=32, allow_subnormal=False)
    num_segments = data.draw(st.integers(1, 5))
    rows = st.tuples(numbers, st.integers(0, num_segments - 1), st.booleans())
    rows = data.draw(st.lists(rows, max_size=30))
    values, ids, mask = ([row[k] for row in rows] for k in range(3))
    mask = data.draw(st.sampled_from([None, mask]))
    out = segment_moments(
        torch.tensor(values, dtype=torch.float32),
        torch.tensor(ids, dtype=torch.int64),
        num_segments=num_segments,
        mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
    )
    check(out, expected(values, ids, num_segments, mask))


def batch(num_rows=3000, num_segments=7, seed=0):
    gen = torch.Generator().manual_seed(seed)
    values = torch.randn(num_rows, generator=gen)
    ids = torch.randint(0, num_segments, (num_rows,), generator=gen)
    return values, ids, torch.rand(num_rows, generator=gen) < 0.5


@pytest.mark.parametrize("num_segments", [7, 2900])
def test_many_rows_per_segment_and_few(num_segments, backend):
    if backend in ("cuda", "triton"):  # one block per segment, 3 ms per block on the CPU
        num_segments = min(num_segments, 50)
    values, ids, mask = batch(num_segments=num_segments)
    for m in (None, mask):
        out = segment_moments(values, ids, num_segments=num_segments, mask=m)
        check(out, expected(values.tolist(), ids.tolist(), num_segments, m))
        narrow = segment_moments(values, ids.int(), num_segments=num_segments, mask=m)
        assert all(map(torch.equal, out, narrow))


def test_a_long_segment_beside_short_ones():
    values, _, mask = batch(num_rows=30_000)
    cu = torch.tensor([0, 3, 29_990, 30_000], dtype=torch.int32)
    ids = torch.repeat_interleave(torch.arange(3), cu.diff())
    for m in (None, mask):
        wanted = expected(values.tolist(), ids.tolist(), 3, m)
        check(segment_moments(values, cu_seqlens=cu, mask=m), wanted)
        check(segment_moments(values, ids, num_segments=3, mask=m), wanted)


def test_borders_equal_the_ids_they_stand_for():
    values, _, mask = batch()
    cu = torch.tensor([0, 0, 5, 6, 1500, 1500, 3000], dtype=torch.int32)
    ids = torch.repeat_interleave(torch.arange(6), cu.diff())
    for m in (None, mask):
        out = segment_moments(values, cu_seqlens=cu, mask=m)
        check(out, expected(values.tolist(), ids.tolist(), 6, m))


def test_empty_segments():
    out = segment_moments(torch.tensor([2.0]), torch.tensor([1]), num_segments=3)
    assert out.count.tolist() == [0, 1, 0] and out.sum.tolist() == [0.0, 2.0, 0.0]
    assert out.min.tolist() == [INF, 2.0, INF] and out.max.tolist() == [-INF, 2.0, -INF]
    for kwargs in (
        {"segment_ids": torch.zeros(0, dtype=torch.int64), "num_segments": 2},
        {"cu_seqlens": torch.zeros(3, dtype=torch.int32)},
    ):
        out = segment_moments(torch.zeros(0), **kwargs)
        assert out.count.tolist() == [0, 0] and out.min.tolist() == [INF, INF]
    nothing = segment_moments(torch.zeros(0), torch.zeros(0, dtype=torch.int64), num_segments=0)
    assert [x.shape for x in nothing] == [(0,)] * 5
    values, ids, mask = batch()
    out = segment_moments(values, ids, num_segments=7, mask=torch.zeros_like(mask))
    assert out.count.sum() == 0 and out.max.max() == -INF


def test_nan_stays_in_its_segment():
    values = torch.tensor([1.0, float("nan"), 0.5, 2.0, -INF])
    ids, cu = torch.tensor([0, 0, 0, 1, 2]), torch.tensor([0, 3, 4, 5], dtype=torch.int32)
    for kwargs in ({"segment_ids": ids, "num_segments": 3}, {"cu_seqlens": cu}):
        for mask in (None, torch.ones(5, dtype=torch.bool)):
            out = segment_moments(values, **kwargs, mask=mask)
            for field in out[1:]:
                assert field[0].isnan() and not field[1:].isnan().any()
            assert out.min.tolist()[1:] == [2.0, -INF] and out.sum.tolist()[1:] == [2.0, -INF]
        clean = segment_moments(values, **kwargs, mask=~values.isnan())
        assert clean.sum.tolist() == [1.5, 2.0, -INF] and clean.min[0].item() == 0.5


def test_masked_rows_need_no_valid_id():
    ids = torch.tensor([0, -100, 99])
    mask = torch.tensor([True, False, False])
    out = segment_moments(torch.ones(3), ids, num_segments=2, mask=mask)
    assert out.count.tolist() == [1, 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype):
    values, ids, mask = batch()
    values = values.to(dtype)
    out = segment_moments(values, ids, num_segments=7, mask=mask)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    check(out, expected(values.tolist(), ids.tolist(), 7, mask), wide)
    cu = torch.tensor([0, 1000, 3000], dtype=torch.int32)
    halves = (torch.arange(3000) >= 1000).long().tolist()
    check(segment_moments(values, cu_seqlens=cu), expected(values.tolist(), halves, 2), wide)


def test_gradients_of_the_two_sums(backend):
    size = 8 if backend in ("cuda", "triton") else 40
    values, ids, mask = batch(num_rows=size)
    cu = torch.tensor([0, 4, 4, size], dtype=torch.int32)
    for kwargs in (
        {"segment_ids": ids, "num_segments": 7},
        {"segment_ids": ids, "num_segments": 7, "mask": mask},
        {"cu_seqlens": cu},
        {"cu_seqlens": cu, "mask": mask},
    ):
        x = values.double().requires_grad_()

        def sums(x, kwargs=kwargs):
            out = segment_moments(x, **kwargs)
            assert not (out.min.requires_grad or out.max.requires_grad)
            return out.sum, out.sum_sq

        assert torch.autograd.gradcheck(sums, (x,))
    half = values.bfloat16().requires_grad_()
    segment_moments(half, ids, num_segments=7).sum.sum().backward()
    assert half.grad.dtype == torch.bfloat16 and (half.grad == 1).all()
    empty = torch.zeros(0, requires_grad=True)
    segment_moments(empty, ids[:0], num_segments=2).sum.sum().backward()
    assert empty.grad.shape == (0,)


def test_group_mean_regression_loss_from_the_moments():
    """IVL with one-hot instruments: sum_g n_g mean_g^2 + alpha sum r^2, and its gradient."""
    values, ids, _ = batch(num_rows=60)
    residual = values.double().requires_grad_()
    out = segment_moments(residual, ids, num_segments=7)
    loss = (out.sum**2 / out.count).sum() + 0.3 * out.sum_sq.sum()
    (grad,) = torch.autograd.grad(loss, residual)
    mean = (out.sum / out.count)[ids]
    torch.testing.assert_close(grad, 2 * (mean + 0.3 * residual).detach())


def test_bits_do_not_depend_on_the_thread_count(backend):
    size = 6_000 if backend in ("cuda", "triton") else 60_000
    values, ids, mask = batch(num_rows=size, num_segments=50)
    cu = torch.tensor([0, 10, size // 2, size], dtype=torch.int32)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            by_id = segment_moments(values, ids, num_segments=50, mask=mask)
            results.append([*by_id, *segment_moments(values, cu_seqlens=cu)])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_order_of_rows_only_rounds():
    values, ids, _ = batch()
    perm = torch.randperm(3000, generator=torch.Generator().manual_seed(1))
    a = segment_moments(values, ids, num_segments=7)
    b = segment_moments(values[perm], ids[perm], num_segments=7)
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x, y, rtol=2e-7, atol=0)


X, IDS, CU = torch.ones(3), torch.zeros(3, dtype=torch.int64), torch.tensor([0, 3]).int()
REFUSALS = [
    ((X,), {}, "segment_ids or cu_seqlens must be given, exactly one of them; got none"),
    ((X, IDS), {"cu_seqlens": CU}, "segment_ids or cu_seqlens must be given, .*; got both"),
    ((X, IDS), {}, "num_segments must be an int >= 0, given with segment_ids; got None"),
    ((X, IDS), {"num_segments": -1}, "num_segments must be an int >= 0"),
    ((X,), {"cu_seqlens": CU, "num_segments": 1}, "num_segments must be left out with cu_seqlens"),
    ((X, IDS[:1]), {"num_segments": 1}, r"segment_ids must be of shape \(3,\) to match values"),
    ((X, X), {"num_segments": 1}, "segment_ids must be of dtype int32 or int64"),
    ((X, IDS + 2), {"num_segments": 2}, r"segment_ids must be in .*\[0, 2\); got 2 at row 0"),
    ((X, IDS - 1), {"num_segments": 2}, r"segment_ids must be in .*\[0, 2\); got -1 at row 0"),
    ((X, IDS), {"num_segments": 0}, r"segment_ids must be in .*\[0, 0\); got 0 at row 0"),
    ((X, IDS), {"num_segments": 1, "mask": X}, "mask must be of dtype bool"),
    ((X,), {"cu_seqlens": CU + 1}, "cu_seqlens must be a prefix sum that starts at 0"),
    ((X.int(), IDS), {"num_segments": 1}, "values must be of dtype"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^segment_moments: {message}"):
        segment_moments(*args, **kwargs)
