"""Test ope: the estimators' formulas, their identities, and their standard errors by resampling."""

import itertools
import math
from collections.abc import Iterator

import pytest
import torch
from harness import backends, on_its_device, thread_counts

from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.ops.offpolicy_weights import offpolicy_weights
from tokfuse.runtime.ops.ope import ope
from tokfuse.runtime.reference.ope import ope as reference

ope = on_its_device(ope)


@pytest.fixture(params=backends("ope"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with request.param.forced():
        yield request.param.name


def batch(num_rows=50, seed=0):
    gen = torch.Generator().manual_seed(seed)
    weight = torch.rand(num_rows, generator=gen) * 3
    reward, q_pi, q_a = (torch.randn(num_rows, generator=gen) for _ in range(3))
    return weight, reward, q_pi, q_a, torch.rand(num_rows, generator=gen) < 0.7


def mean_and_error(rows):
    mean = math.fsum(rows) / len(rows)
    return mean, math.sqrt(math.fsum((x - mean) ** 2 for x in rows) / (len(rows) - 1) / len(rows))


@pytest.mark.parametrize("masked", [False, True])
def test_formulas(masked):
    tensors = batch()
    mask = tensors[4] if masked else None
    out = ope(*tensors[:4], mask=mask)
    keep = torch.ones(50, dtype=torch.bool) if mask is None else mask
    w, r, direct, q = (x[keep].double().tolist() for x in tensors[:4])
    n = len(w)
    pairs = list(zip(w, r, strict=True))
    assert (out.ips.item(), out.ips_se.item()) == pytest.approx(mean_and_error([a * b for a, b in pairs]), rel=1e-6)
    snips = sum(a * b for a, b in pairs) / sum(w)
    assert out.snips.item() == pytest.approx(snips, rel=1e-6)
    snips_se = math.sqrt(sum((a * (b - snips)) ** 2 for a, b in pairs) / (n * (n - 1)))
    assert out.snips_se.item() == pytest.approx(snips_se / (sum(w) / n), rel=1e-6)
    assert (out.dm.item(), out.dm_se.item()) == pytest.approx(mean_and_error(direct), rel=1e-6)
    rows = [m + a * (b - c) for m, a, b, c in zip(direct, w, r, q, strict=True)]
    assert (out.dr.item(), out.dr_se.item()) == pytest.approx(mean_and_error(rows), rel=1e-6)
    correction = sum(a * (b - c) for a, b, c in zip(w, r, q, strict=True)) / sum(w)
    assert out.sndr.item() == pytest.approx(sum(direct) / n + correction, rel=1e-6)


def test_dr_is_unbiased_when_either_the_weight_or_the_model_is_right():
    """Exact expectation over two actions with known behaviour policy, target policy and reward."""
    b, pi, r = [0.2, 0.8], [0.7, 0.3], [3.0, -1.0]
    true = sum(p * x for p, x in zip(pi, r, strict=True))
    for weights, model in itertools.product(([3.5, 0.375], [1.0, 2.0]), (r, [0.0, 5.0])):
        q_pi = sum(p * x for p, x in zip(pi, model, strict=True))
        # One logged row per action, with the probability of the behaviour policy.
        value = sum(
            b[a]
            * ope(
                torch.tensor([weights[a]]), torch.tensor([r[a]]), torch.tensor([q_pi]), torch.tensor([model[a]])
            ).dr.item()
            for a in (0, 1)
        )
        right = weights == [3.5, 0.375] or model == r
        assert (value == pytest.approx(true, rel=1e-6)) == right


def test_snips_shifts_with_the_reward_and_ips_does_not():
    weight, reward, q_pi, q_a, _ = batch()
    a, b = ope(weight, reward, q_pi, q_a), ope(weight, reward + 2.0, q_pi, q_a)
    assert (b.snips - a.snips).item() == pytest.approx(2.0, rel=1e-5)
    assert (b.sndr - a.sndr).item() == pytest.approx(2.0, rel=1e-5)
    assert abs((b.ips - a.ips).item() - 2.0) > 1e-2
    assert b.snips_se.item() == pytest.approx(a.snips_se.item(), rel=1e-4)


def test_standard_errors_cover_repeated_draws(backend):
    if backend == "triton" and triton_backend.interpreting():
        pytest.skip("900 launches take 4 s in the interpreter; the formulas are tested above")
    gen = torch.Generator().manual_seed(1)
    b, pi, r = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.2, 0.3, 0.5]), torch.arange(3.0)
    q, found = torch.tensor([0.5, 0.5, 1.5]), {"ips": [], "snips": [], "dr": [], "sndr": []}
    errors = {name: [] for name in found}
    for _ in range(300):
        action = torch.multinomial(b, 200, replacement=True, generator=gen)
        reward = r[action] + torch.randn(200, generator=gen)
        direct = (pi * q).sum().expand(200)
        out = ope((pi / b)[action], reward, direct, q[action])
        for name in found:
            found[name].append(getattr(out, name).item())
            errors[name].append(getattr(out, f"{name}_se").item())
    for name, values in found.items():
        spread = torch.tensor(values).std().item()
        assert torch.tensor(errors[name]).mean().item() == pytest.approx(spread, rel=0.15), name
        assert torch.tensor(values).mean().item() == pytest.approx(1.3, abs=0.05), name


def test_switched_weights_give_switch_dr():
    logp, behavior = torch.tensor([0.0, 2.0, 0.1]), torch.zeros(3)
    reward, q_pi, q_a = torch.tensor([1.0, 2.0, 3.0]), torch.ones(3), torch.full((3,), 0.5)
    out = offpolicy_weights(logp, behavior, level="external", mode="switch", high=3.0)
    value = ope(out.weight, reward, q_pi, q_a, mask=out.kept_mask).dr.item()
    assert value == pytest.approx(1 + (0.5 + math.exp(0.1) * 2.5) / 3, rel=1e-6)


def test_missing_models_and_edges():
    weight, reward, q_pi, _, _ = batch()
    out = ope(weight, reward)
    assert out.dm is None and out.dr is None and out.sndr is None and out.dr_se is None
    out = ope(weight, reward, q_pi)
    assert out.dm is not None and out.dr is None
    assert ope(torch.zeros(0), torch.zeros(0)).ips.isnan()
    one = ope(torch.ones(1), torch.ones(1))
    assert one.ips.item() == 1.0 and one.ips_se.isnan()


def test_masked_nan_is_not_read():
    weight, reward, q_pi, q_a, mask = batch()
    dirty = [torch.where(mask, x, float("nan")) for x in (weight, reward, q_pi, q_a)]
    for got, want in zip(ope(*dirty, mask=mask), ope(weight, reward, q_pi, q_a, mask=mask), strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("masked", [False, True])
def test_many_rows_and_any_number_of_threads(masked):
    *tensors, mask = batch(40_000)
    tensors[1] += 100.0  # the deviations are small relative to the rewards
    mask = mask if masked else None
    before, results = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            results.append(ope(*tensors, mask=mask))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    wanted = reference(*(x.double() for x in tensors), mask=mask)
    for name, (value, error) in wanted.items():
        got = getattr(results[0], name).item(), getattr(results[0], f"{name}_se").item()
        assert got == pytest.approx((value.item(), error.item()), rel=2e-7), name


def test_rows_without_weight_have_no_self_normalised_estimate():
    out = ope(torch.zeros(3), torch.arange(3.0), torch.ones(3), torch.ones(3))
    assert (out.ips.item(), out.ips_se.item(), out.dr.item()) == (0.0, 0.0, 1.0)
    assert out.snips.isnan() and out.snips_se.isnan() and out.sndr.isnan() and out.sndr_se.isnan()


def test_dtypes_and_detachment(backend):
    weight, reward, *_ = batch()
    if backend in ("cuda", "cpu"):
        with pytest.raises(RuntimeError, match=f"{backend}: takes float32"):
            ope(weight.double(), reward)
    else:
        assert ope(weight.double(), reward).ips.dtype == torch.float64
    out = ope(weight.bfloat16(), reward.requires_grad_())
    assert out.ips.dtype == torch.float32 and not out.ips.requires_grad


X = torch.ones(3)
REFUSALS = [
    ((X[:1], X), {}, r"weight must be of shape \(3,\) to match reward"),
    ((X, X, X[:1]), {}, r"q_pi must be of shape \(3,\)"),
    ((X, X, None, X), {}, "q_pi must be given with q_a"),
    ((X, X), {"mask": X}, "mask must be of dtype bool"),
    ((X, X.int()), {}, "reward must be of dtype"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^ope: {message}"):
        ope(*args, **kwargs)
