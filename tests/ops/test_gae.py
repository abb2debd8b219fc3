"""Test gae against a token loop in Python floats, on every backend.

The scan is float64 on every backend and rounded once: 2e-7 relative to the largest advantage.
"""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import backends, on_its_device
from hypothesis import strategies as st

from tokfuse.runtime.ops.gae import gae

gae = on_its_device(gae)


@pytest.fixture(params=backends("gae"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def expected(reward, value, cu, gamma=1.0, lam=1.0, mask=None, finished=None, alpha=None):
    """Compute the recursion one token at a time."""
    reward, value = reward.double().tolist(), value.double().tolist()
    advantage, returns = [0.0] * len(reward), [0.0] * len(reward)
    for s in range(len(cu) - 1):
        places = [t for t in range(cu[s], cu[s + 1]) if mask is None or mask[t]]
        decay = lam[s] if isinstance(lam, list) else lam
        if alpha is not None:
            decay = 1.0 - 1.0 / max(alpha * len(places), 1.0)
        carried = 0.0
        for k in reversed(range(len(places))):
            t = places[k]
            if k + 1 < len(places):
                following = value[places[k + 1]]
            else:
                following = 0.0 if finished is None or finished[s] else value[t]
            delta = reward[t] + gamma * following - value[t]
            carried = delta + (gamma * decay * carried if k + 1 < len(places) else 0.0)
            advantage[t], returns[t] = carried, carried + value[t]
    return torch.tensor(advantage, dtype=torch.float64), torch.tensor(returns, dtype=torch.float64)


def check(actual, wanted):
    for got, want in zip(actual, wanted, strict=True):
        assert got.dtype == torch.float32 and not got.requires_grad
        scale = max(1.0, want.nan_to_num().abs().max().item()) if want.numel() else 1.0
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-12 * scale, equal_nan=True)


def batch(lengths=(5, 0, 1, 130, 7, 0), seed=0):
    gen = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    reward, value = (torch.randn(total, generator=gen) for _ in range(2))
    mask = torch.rand(total, generator=gen) < 0.7
    finished = torch.rand(len(lengths), generator=gen) < 0.5
    return reward, value, cu, mask, finished


numbers = st.floats(-100, 100, width=32, allow_subnormal=False)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_against_the_token_loop(data):
    lengths = data.draw(st.lists(st.integers(0, 9), max_size=5))
    total = sum(lengths)
    cu = [sum(lengths[:i]) for i in range(len(lengths) + 1)]

    def vector(elements, size):
        return data.draw(st.lists(elements, min_size=size, max_size=size))

    reward = torch.tensor(vector(numbers, total), dtype=torch.float32)
    value = torch.tensor(vector(numbers, total), dtype=torch.float32)
    mask = data.draw(st.none() | st.just(vector(st.booleans(), total)))
    finished = data.draw(st.none() | st.just(vector(st.booleans(), len(lengths))))
    unit = st.sampled_from([0.0, 0.5, 0.95, 1.0])
    gamma, lam = data.draw(unit), data.draw(unit)
    actual = gae(
        reward,
        value,
        torch.tensor(cu, dtype=torch.int32),
        gamma=gamma,
        lam=lam,
        mask=None if mask is None else torch.tensor(mask, dtype=torch.bool),
        finished=None if finished is None else torch.tensor(finished, dtype=torch.bool),
    )
    wanted = expected(reward, value, cu, gamma, lam, mask, finished)
    for got, want in zip(actual, wanted, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=2e-7, atol=1e-10)


def test_long_mixed_sequences():
    reward, value, cu, mask, finished = batch((300, 1, 0, 77, 1024, 3))
    for kwargs in ({}, {"mask": mask}, {"finished": finished}, {"mask": mask, "finished": finished}):
        check(
            gae(reward, value, cu, gamma=0.99, lam=0.9, **kwargs),
            expected(reward, value, cu.tolist(), 0.99, 0.9, **kwargs),
        )


def test_worked_example():
    reward, value = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.25, 0.75])
    cu = torch.tensor([0, 3], dtype=torch.int32)
    advantage, returns = gae(reward, value, cu, gamma=0.5, lam=0.5)
    # deltas: -0.375, 0.125, 0.25; A2 = 0.25, A1 = 0.125 + A2 / 4, A0 = -0.375 + A1 / 4
    assert advantage.tolist() == [-0.328125, 0.1875, 0.25]
    assert returns.tolist() == [0.171875, 0.4375, 1.0]


def test_lam_one_is_the_monte_carlo_return_minus_the_value():
    reward, value, cu, _, _ = batch()
    advantage, returns = gae(reward, value, cu, gamma=0.9, lam=1.0)
    want = expected(reward, torch.zeros_like(value), cu.tolist(), 0.9, 1.0)[0]
    torch.testing.assert_close(returns.double(), want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(advantage, returns - value, rtol=1e-5, atol=1e-5)


def test_lam_zero_is_the_one_step_error():
    reward, value, cu, _, _ = batch((6,))
    advantage, _ = gae(reward, value, cu, gamma=0.9, lam=0.0)
    following = torch.cat([value[1:], torch.zeros(1)])
    torch.testing.assert_close(advantage, reward + 0.9 * following - value)


def test_masked_tokens_are_skipped_as_if_they_were_not_there():
    reward, value, cu, mask, finished = batch()
    lengths = [int(mask[a:b].sum()) for a, b in zip(cu[:-1], cu[1:], strict=True)]
    short = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    kwargs = {"gamma": 0.97, "lam": 0.9, "finished": finished}
    packed = gae(reward[mask], value[mask], short, **kwargs)
    nan = torch.where(mask, reward, float("nan")), torch.where(mask, value, float("nan"))
    for got, want in zip(gae(*nan, cu, mask=mask, **kwargs), packed, strict=True):
        torch.testing.assert_close(got[mask], want, rtol=1e-6, atol=1e-6)
        assert got[~mask].abs().sum() == 0


def test_unfinished_sequences_bootstrap_their_last_value():
    """Extended GAE: with gamma 1 the last delta of an unfinished sequence is the last reward."""
    reward, value, cu, mask, _ = batch((4, 3))
    finished = torch.tensor([True, False])
    advantage, returns = gae(reward, value, cu, finished=finished)
    assert advantage[6].item() == pytest.approx(reward[6].item(), rel=1e-6)
    assert advantage[3].item() == pytest.approx((reward[3] - value[3]).item(), rel=1e-6)
    everything = gae(reward, value, cu)[0]
    assert torch.equal(advantage[:4], everything[:4])
    assert not torch.isclose(advantage[4:], everything[4:]).any()
    # The value of the last valid token is used, not the value of the last token.
    mask = torch.tensor([True] * 6 + [False])
    masked = gae(reward, value, cu, finished=finished, mask=mask)[0]
    assert masked[5].item() == pytest.approx(reward[5].item(), rel=1e-6)


def test_lam_per_sequence():
    reward, value, cu, mask, finished = batch()
    lam = torch.tensor([0.0, 0.1, 0.9, 1.0, 0.5, 0.3])
    check(
        gae(reward, value, cu, gamma=0.9, lam=lam, mask=mask),
        expected(reward, value, cu.tolist(), 0.9, lam.double().tolist(), mask),
    )
    assert not torch.equal(gae(reward, value, cu, lam=lam)[0], gae(reward, value, cu)[0])
    both = [gae(reward, value, cu, lam=0.95)[0], gae(reward, value, cu, lam=torch.full((6,), 0.95))[0]]
    torch.testing.assert_close(*both)


def test_length_adaptive_lam():
    reward, value, cu, mask, _ = batch((5, 0, 200, 30))
    for kwargs in ({}, {"mask": mask}):
        check(
            gae(reward, value, cu, length_adaptive_alpha=0.05, **kwargs),
            expected(reward, value, cu.tolist(), alpha=0.05, **kwargs),
        )
    # 5 tokens: alpha n < 1, so lam is 0; 200 tokens: 1 - 1 / 10.
    adaptive = gae(reward, value, cu, length_adaptive_alpha=0.05)[0]
    torch.testing.assert_close(adaptive[:5], gae(reward, value, cu, lam=0.0)[0][:5])
    torch.testing.assert_close(adaptive[5:205], gae(reward, value, cu, lam=0.9)[0][5:205])


def test_gamma_and_lam_are_honoured():
    reward, value, cu, _, _ = batch()
    results = [gae(reward, value, cu, gamma=g, lam=la)[0] for g, la in ((1, 1), (0.9, 1), (1, 0.9))]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))


def test_edges():
    none = torch.tensor([0], dtype=torch.int32)
    empty = torch.zeros(0)
    assert [x.shape for x in gae(empty, empty, none)] == [(0,), (0,)]
    only_empty = torch.tensor([0, 0, 0], dtype=torch.int32)
    assert [x.shape for x in gae(empty, empty, only_empty)] == [(0,), (0,)]
    one = torch.tensor([0, 1], dtype=torch.int32)
    advantage, returns = gae(torch.tensor([2.0]), torch.tensor([0.5]), one)
    assert (advantage.item(), returns.item()) == (1.5, 2.0)
    reward, value, cu, mask, _ = batch()
    for out in gae(reward, value, cu, mask=torch.zeros_like(mask)):
        assert out.abs().sum() == 0 and out.shape == reward.shape


def test_nan_stays_in_its_sequence():
    reward, value, cu, _, _ = batch((4, 5, 3))
    reward[6] = float("nan")
    for out in gae(reward, value, cu, gamma=0.9, lam=0.9):
        assert out[4:7].isnan().all() and not out[:4].isnan().any() and not out[7:].isnan().any()
    value[10] = float("nan")
    out = gae(reward, value, cu, lam=0.0)[0]
    assert not out[:4].isnan().any() and out[9:11].isnan().all() and not out[11].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, backend):
    reward, value, cu, _, _ = batch()
    if dtype == torch.float64 and backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32"):
            gae(reward, value.double(), cu)
        return
    out = gae(reward.to(dtype), value.to(dtype), cu, gamma=0.9)
    want = expected(reward.to(dtype), value.to(dtype), cu.tolist(), 0.9)
    for got, w in zip(out, want, strict=True):
        assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(got.double(), w, rtol=2e-7, atol=1e-10)


def test_strided_inputs_and_detached_outputs():
    reward, value, cu, mask, _ = batch()
    wide = torch.stack([reward, value, value], 1).requires_grad_()
    masks = torch.stack([mask, mask], 1)
    out = gae(wide[:, 0], wide[:, 1], cu, mask=masks[:, 0])
    for got, want in zip(out, gae(reward, value, cu, mask=mask), strict=True):
        assert torch.equal(got, want) and not got.requires_grad


def test_bits_do_not_depend_on_threads_or_on_the_batch(backend):
    lengths = (300, 17, 900, 1200) if backend == "triton" else (3000, 17, 9000, 12000, 5, 800)
    reward, value, cu, mask, _ = batch(lengths)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(gae(reward, value, cu, gamma=0.99, lam=0.95, mask=mask)[0])
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
    alone = torch.tensor([0, lengths[2]], dtype=torch.int32)
    part = slice(int(cu[2]), int(cu[3]))
    again = gae(reward[part], value[part], alone, gamma=0.99, lam=0.95, mask=mask[part])[0]
    torch.testing.assert_close(again, results[0][part], rtol=2e-7, atol=0)


X, CU = torch.ones(3), torch.tensor([0, 1, 3], dtype=torch.int32)
MASK, ENDS = torch.ones(3, dtype=torch.bool), torch.ones(2, dtype=torch.bool)


def cu_of(*borders):
    return torch.tensor(borders, dtype=torch.int32)


REFUSALS = [
    ((X, X[:2], CU), {}, r"value must be of shape \(3,\) to match reward; got shape \(2,\)"),
    ((X[:, None], X, CU), {}, "reward must be a 1-D tensor"),
    ((X.int(), X, CU), {}, "reward must be of dtype bfloat16 or"),
    ((X, X, CU.long()), {}, "cu_seqlens must be of dtype int32; got int64"),
    ((X, X, CU[:0]), {}, r"cu_seqlens must be of shape \(num_seqs \+ 1,\)"),
    ((X, X, cu_of(1, 3)), {}, "cu_seqlens must be a prefix sum that starts at 0; got 1"),
    ((X, X, cu_of(0, 2)), {}, "cu_seqlens must be a prefix sum that ends at num_tokens = 3; got 2"),
    ((X, X, cu_of(0, 2, 1, 3)), {}, "cu_seqlens must be non-decreasing; got 2 then 1 at 1"),
    ((X, X, cu_of(0, 5, 3)), {}, "cu_seqlens must be non-decreasing; got 5 then 3 at 1"),
    ((X, X, CU), {"mask": MASK[:2]}, r"mask must be of shape \(3,\) to match reward"),
    ((X, X, CU), {"mask": X}, "mask must be of dtype bool; got float32"),
    ((X, X, CU), {"finished": MASK}, r"finished must be of shape \(2,\) to match cu_seqlens"),
    ((X, X, CU), {"finished": ENDS.int()}, "finished must be of dtype bool"),
    ((X, X, CU), {"gamma": 1.1}, r"gamma must be a finite number in \[0, 1\]; got 1.1"),
    ((X, X, CU), {"lam": -0.1}, r"lam must be a finite number in \[0, 1\]; got -0.1"),
    ((X, X, CU), {"lam": X}, r"lam must be of shape \(2,\) to match cu_seqlens"),
    ((X, X, CU), {"length_adaptive_alpha": 0.0}, r"length_adaptive_alpha must be .* in \(0, inf\)"),
    ((X, X, CU), {"length_adaptive_alpha": 0.1, "lam": 0.9}, "lam must be left out with length_adaptive_alpha"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^gae: {message}"):
        gae(*args, **kwargs)


def test_wrong_types():
    with pytest.raises(TypeError, match="cu_seqlens must be a torch.Tensor; got list"):
        gae(X, X, [0, 3])
    with pytest.raises(TypeError, match="gamma must be a number; got True"):
        gae(X, X, CU, gamma=True)
