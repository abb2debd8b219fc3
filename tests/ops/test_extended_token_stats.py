"""Test token_stats with second_temperature and moments against float64 sums, on every backend.

Bounds: those of token_stats for logp (2e-5 at |logit| <= 100). The weighted moments have a relative bound,
because all their summands have the same sign.
"""

import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import ROUNDED_ONCE, compare, host_backends, thread_counts
from hypothesis import strategies as st

from tokfuse.runtime.core import dispatch
from tokfuse.runtime.core.statistics import ExtendedTokenStats, TokenStats
from tokfuse.runtime.ops.token_stats import token_stats

INF = float("inf")


@pytest.fixture(params=host_backends("extended_token_stats"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.backend(request.param):
        yield request.param


def batch(tokens=9, vocab=5003, scale=3.0, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocab, generator=gen) * scale).to(dtype)
    return logits, torch.randint(0, vocab, (tokens,), generator=gen)


def expected(
    logits, target, second, *, temperature=1.0, softcap=None, logit_scale=1.0, bias_logits=None, bias_scale=1.0
):
    """Return (second_logp, sum p^2 log p, sum p^2 log^2 p) by definition, in float64."""
    u = logits.double() * logit_scale
    if softcap is not None:
        u = torch.where(u == -INF, -INF, softcap * torch.tanh(u / softcap))
    if bias_logits is not None:
        u = u - bias_scale * bias_logits.double()
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.double().unsqueeze(1)
    logp = torch.log_softmax(u / temperature, -1)
    p = logp.exp()
    logp = torch.where(p == 0, 0.0, logp)
    at_second = torch.log_softmax(u / second, -1).gather(1, target.unsqueeze(1)).squeeze(1)
    return at_second, (p * p * logp).sum(1), (p * p * logp * logp).sum(1)


def check(out, wanted):
    # The error of p^2 is twice the 2e-6 of p. Sums of up to 64 summands per lane have an error of 4e-6, and a
    # GPU's exponential has an error of 2 ulp.
    exact = dispatch.forced_backend() == "reference"
    bound = ROUNDED_ONCE if exact else {"rtol": 1e-5 if dispatch.forced_backend() == "cuda" else 8e-6, "atol": 1e-9}
    compare(out.second_logp, wanted[0], **(ROUNDED_ONCE if exact else {"atol": 2e-5}))
    compare(out.sum_p2_logp, wanted[1], **bound)
    compare(out.sum_p2_logp2, wanted[2], **bound)


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.7},
    "per_token": {"temperature": torch.linspace(0.5, 2.0, 9)},
    "softcap": {"softcap": 5.0},
    "scale": {"logit_scale": 0.25},
    "bias": {"bias_logits": batch(seed=7)[0], "bias_scale": 0.3},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_float64(options):
    logits, target = batch()
    out = token_stats(logits, target, second_temperature=1.7, moments=True, **options)
    check(out, expected(logits, target, 1.7, **options))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_are_read_exactly(dtype):
    logits, target = batch(dtype=dtype)
    out = token_stats(logits, target, second_temperature=0.6, moments=True)
    assert {x.dtype for x in out} == {torch.float32}
    check(out, expected(logits, target, 0.6))


@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 2047, 2048, 2049, 6145])
@pytest.mark.parametrize("scale", [0.1, 30.0])
def test_widths_and_sizes_of_logits(vocab, scale):
    logits, target = batch(4, vocab, scale)
    out = token_stats(logits, target, second_temperature=2.0, moments=True)
    # Near p = 1, log p itself is a rounding error of 1e-6 at |logit| = 100.
    wanted = expected(logits, target, 2.0)
    if dispatch.forced_backend() == "reference":
        check(out, wanted)
    compare(out.second_logp, wanted[0], atol=2e-5)
    for got, want in zip(out[6:], wanted[1:], strict=True):
        compare(got, want, rtol=8e-6, atol=4e-6)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_row(data):
    numbers = st.one_of(st.floats(-50, 50, width=32), st.just(-INF))
    row = data.draw(st.lists(numbers, min_size=1, max_size=20).filter(lambda r: max(r) > -INF))
    y = data.draw(st.sampled_from([i for i, z in enumerate(row) if z > -INF]))
    second = data.draw(st.sampled_from([0.5, 1.0, 3.0]))
    logits, target = torch.tensor([row]), torch.tensor([y])
    out = token_stats(logits, target, second_temperature=second, moments=True)
    wanted = expected(logits, target, second)
    compare(out.second_logp, wanted[0], atol=2e-5)
    for got, want in zip(out[6:], wanted[1:], strict=True):
        compare(got, want, rtol=8e-6, atol=4e-6)


def test_the_five_plain_outputs_stay_as_they_are():
    logits, target = batch()
    mask = torch.arange(9) % 2 == 0
    plain = token_stats(logits, target, temperature=0.8, mask=mask)
    wide = token_stats(logits, target, temperature=0.8, mask=mask, second_temperature=1.0, moments=True)
    for a, b in zip(plain, wide, strict=False):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


def test_second_temperature_equal_to_the_first_gives_logp():
    logits, target = batch()
    out = token_stats(logits, target, temperature=0.8, second_temperature=0.8)
    torch.testing.assert_close(out.second_logp, out.logp, rtol=0, atol=2e-6)


def test_each_option_alone():
    logits, target = batch()
    only_second = token_stats(logits, target, second_temperature=2.0)
    assert only_second.second_logp is not None
    assert only_second.sum_p2_logp is None and only_second.sum_p2_logp2 is None
    only_moments = token_stats(logits, target, moments=True)
    assert only_moments.second_logp is None and only_moments.sum_p2_logp is not None
    assert type(only_moments) is ExtendedTokenStats
    assert type(token_stats(logits, target)) is TokenStats


def test_masked_rows_are_zero_and_not_read():
    logits, target = batch()
    mask = torch.arange(9) % 3 > 0
    logits[~mask], target[~mask] = float("nan"), -100
    out = token_stats(logits, target, mask=mask, second_temperature=2.0, moments=True)
    for field in out:
        assert (field[~mask] == 0).all() and field[mask].isfinite().all()


def test_excluded_logits_and_dead_rows():
    logits = torch.tensor([[1.0, -INF, 0.0], [-INF, -INF, -INF], [0.0, INF, 0.0]])
    out = token_stats(logits, torch.tensor([0, 1, 0]), second_temperature=2.0, moments=True)
    wanted = expected(logits[:1], torch.tensor([0]), 2.0)
    check(ExtendedTokenStats(*(x[:1] for x in out)), wanted)
    assert out.second_logp[1] == -INF and out.sum_p2_logp[1] == 0 and out.sum_p2_logp2[1] == 0
    assert not out.sum_p2_logp[2].isfinite()


@pytest.mark.parametrize("kwargs", [{"second_temperature": 2.0}, {"moments": True}])
def test_gradients_are_those_of_the_plain_call(kwargs):
    logits, target = batch()
    mask = torch.arange(9) % 3 > 0
    grads = []
    for extra in ({}, kwargs):
        z = logits.clone().requires_grad_()
        out = token_stats(z, target, mask=mask, temperature=0.9, **extra)
        assert not any(x.requires_grad for x in out[3:] if x is not None)
        (out.logp * 2 + out.entropy + 0.5 * out.lse).sum().backward()
        grads.append(z.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-6, atol=1e-7)


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("gradcheck needs float64, which only the reference takes")
    logits, target = batch(3, 7, dtype=torch.float64)
    z = logits.requires_grad_()

    def differentiable(z):
        out = token_stats(z, target, second_temperature=2.0, moments=True)
        assert out.second_logp.dtype == torch.float64
        return out.logp, out.entropy

    assert torch.autograd.gradcheck(differentiable, (z,))


def test_zero_tokens():
    out = token_stats(torch.zeros(0, 5), torch.zeros(0, dtype=torch.int64), second_temperature=2.0, moments=True)
    assert [x.shape for x in out] == [(0,)] * 8


def test_a_row_does_not_depend_on_batch_or_threads():
    logits, target = batch(64, 1500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            results.append(token_stats(logits, target, second_temperature=2.0, moments=True))
    finally:
        torch.set_num_threads(before)
    part = token_stats(logits[5:7], target[5:7], second_temperature=2.0, moments=True)
    if dispatch.forced_backend() == "reference":
        return  # torch's reductions do not guarantee this
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert all(torch.equal(a[5:7], b) for a, b in zip(results[0], part, strict=True))


@pytest.mark.parametrize("value", [0.0, -1.0, INF, math.nan])
def test_refusals(value):
    logits, target = batch()
    with pytest.raises(ValueError, match="^token_stats: second_temperature must be a finite numb"):
        token_stats(logits, target, second_temperature=value)


def test_bad_values_are_refused_as_in_the_plain_call():
    logits, target = batch()
    target[4] = 5003
    with pytest.raises(ValueError, match=r"^token_stats: target must be in \[0, 5003\).*row 4"):
        token_stats(logits, target, moments=True)
    with pytest.raises(ValueError, match="^token_stats: temperature must be > 0 in every row"):
        token_stats(logits, target * 0, moments=True, temperature=torch.zeros(9))
