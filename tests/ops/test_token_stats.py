"""Test token_stats on every backend: values and gradients of difficult rows against float64 formulas.

Bounds: 2e-5 nats in logp, entropy and lse at |logit| <= 100. Gradients within 2e-6 of the row's largest term
(p and the target's 1 before they cancel); 16-bit gradients half an ulp more. `sum_sq` is a sum of squares
of float32 probabilities: 1e-5 relative. The reference: one rounding.
"""

import hypothesis
import pytest
import torch
from harness import FLOAT_DTYPES, ROUNDED_ONCE, Backend, assert_untouched, backends, bits, compare, half_ulp
from hypothesis import strategies as st
from logit_cases import CASES, FORWARD_ATOL, GRADIENT_RTOL, INF, Case, coefficients, truth

import tokfuse
from tokfuse.runtime.reference import token_stats as reference


@pytest.fixture(params=backends("token_stats"))
def backend(request):
    with request.param.forced():
        yield request.param


def evaluate(backend: Backend, logits, target, ga, gh, **options):
    """Return (statistics, gradient of the logits) of one call."""
    z = backend.put(logits).detach().requires_grad_()
    options = {name: backend.put(value) for name, value in options.items()}
    stats = tokfuse.token_stats(z, backend.put(target), **options)
    torch.autograd.backward([stats.logp, stats.entropy], [backend.put(ga), backend.put(gh)])
    return stats, z.grad


def check(backend: Backend, logits, target, **options) -> None:
    """Compare one call with the float64 formulas."""
    ga, gh = coefficients(len(logits))
    expected = truth(logits, target, ga, gh, **options)
    stats, grad = evaluate(backend, logits, target, ga, gh, **options)
    exact = backend.name == "reference"
    for name in ("logp", "entropy", "lse"):
        bound = ROUNDED_ONCE if exact else {"atol": FORWARD_ATOL}
        compare(getattr(stats, name), getattr(expected, name), **bound, what=name)
    compare(stats.sum_sq, expected.sum_sq, **(ROUNDED_ONCE if exact else {"rtol": 1e-5}), what="sum_sq")
    compare(stats.top1, expected.top1, what="top1")
    assert {value.dtype for value in stats} == {torch.float32}
    assert grad.dtype == logits.dtype
    atol = (1e-14 if exact else GRADIENT_RTOL) * expected.term
    if exact or logits.dtype != torch.float32:
        atol = atol + half_ulp(expected.grad, logits.dtype)
    if exact and logits.dtype != torch.float32:  # torch rounds float64 to 16 bits through float32
        atol = atol + half_ulp(expected.grad, torch.float32)
    compare(grad, expected.grad, atol=atol, what="gradient")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_values_and_gradients(case: Case, dtype: torch.dtype, backend: Backend):
    logits, target, options = case.make(dtype)
    check(backend, logits, target, **options)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_bias_logits_are_subtracted(dtype: torch.dtype, backend: Backend):
    gen = torch.Generator().manual_seed(2)
    logits, bias = torch.randn(2, 5, 2100, generator=gen).mul(3).to(dtype)
    logits[1, 7:400] = -INF
    bias[1, 7:90] = -INF  # excluded in both, so it stays excluded
    target = torch.tensor([3, 5, 2099, 0, 77])
    check(backend, logits, target, bias_logits=bias, bias_scale=0.5)
    check(backend, logits, target, bias_logits=bias[:, :], bias_scale=-1.0, temperature=1.3)
    check(backend, logits, target, bias_logits=bias[:1].expand(5, -1), softcap=8.0)


@pytest.mark.parametrize("lowest", (-84.0, -86.0, -87.5, -90.0))
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_blocks_whose_smallest_exponential_is_near_the_end_of_float32(
    dtype: torch.dtype, lowest: float, backend: Backend
):
    gen = torch.Generator().manual_seed(3)
    logits = torch.rand(3, 3 * 2048 + 5, generator=gen)
    logits[:, [2500, 5000]] = lowest
    logits = (logits + torch.tensor([[0.0], [-2.0], [95.0]])).to(dtype)  # both signs, negative, positive
    check(backend, logits, torch.tensor([7, 2500, 6148]))


def row_values(vocab: int) -> st.SearchStrategy[list[float]]:
    ordinary = st.floats(-100, 100, width=32)
    return st.lists(ordinary | st.just(-INF), min_size=vocab, max_size=vocab)


@hypothesis.given(data=st.data())
@hypothesis.settings(max_examples=40)
def test_any_small_batch(data: st.DataObject):
    vocab = data.draw(st.integers(1, 12))
    rows = data.draw(st.lists(row_values(vocab), max_size=3))
    target = data.draw(st.lists(st.integers(0, vocab - 1), min_size=len(rows), max_size=len(rows)))
    options = data.draw(
        st.fixed_dictionaries(
            {},
            optional={
                "temperature": st.floats(0.5, 3.0),
                "softcap": st.floats(5.0, 60.0),
                "logit_scale": st.floats(0.1, 1.0),
            },
        )
    )
    logits = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), vocab)
    for parameter in backends("token_stats"):
        backend = parameter.values[0]
        if not parameter.marks:
            with backend.forced():
                check(backend, logits, torch.tensor(target, dtype=torch.int64), **options)


# ------------------------------------------------------------------------------------ the reference


def test_reference_in_float64_is_the_formula():
    for case in CASES:
        logits, target, options = case.make(torch.float64)
        if logits.shape[1] > 3000:
            continue
        ga, gh = coefficients(len(logits))
        ga, gh = ga.double(), gh.double()
        expected = truth(logits, target, ga, gh, **options)
        z = logits.detach().requires_grad_()
        out = reference.forward(z, target, **options)
        torch.autograd.backward(out[:2], [ga, gh])
        for got, want in zip((*out, z.grad), expected[:6], strict=True):
            assert got.dtype == torch.float64
            compare(got, want, atol=1e-12, rtol=1e-12, what=case.name)


def test_float64_runs_on_the_reference_and_passes_gradcheck():
    z = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z[1, 3] = -INF
    y = torch.tensor([0, 2, 6, 3])
    options = {
        "mask": torch.tensor([True, True, False, True]),
        "softcap": 4.0,
        "logit_scale": 1.2,
        "temperature": torch.tensor([0.7, 1.0, 2.0, 1.5], dtype=torch.float64),
    }
    finite = z != -INF

    def statistics(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tokfuse.token_stats(torch.where(finite, x, -INF), y, **options)[:3]

    x = torch.where(finite, z, 0.0).requires_grad_()
    assert torch.autograd.gradcheck(statistics, (x,))
    assert torch.autograd.gradgradcheck(statistics, (x,))
    assert tokfuse.token_stats(z, y).logp.dtype == torch.float64


# ------------------------------------------------------------------------------ poison and extremes


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("value", [INF, float("nan")])
@pytest.mark.parametrize("column", [0, 2047, 2048, 4999])
def test_inf_and_nan_poison_their_row_only(value, column, dtype, backend: Backend):
    logits, target, _ = Case("poison", 4, 5003).make(dtype)
    bad = logits.clone()
    bad[1, column] = value
    bad[3] = value
    ga, gh = torch.ones(4), torch.ones(4)
    clean, clean_grad = evaluate(backend, logits, target, ga, gh)
    stats, grad = evaluate(backend, bad, target, ga, gh)
    for name in ("logp", "entropy", "lse", "sum_sq"):
        got, want = getattr(stats, name), getattr(clean, name)
        assert bits(got[[0, 2]]) == bits(want[[0, 2]])
        assert not got[[1, 3]].isfinite().any(), name
    assert bits(grad[[0, 2]]) == bits(clean_grad[[0, 2]])
    assert grad[[1, 3]].isnan().any(1).all()


def test_nan_in_a_block_of_excluded_logits_is_not_lost(backend: Backend):
    logits = torch.full((2, 4096), -INF)
    logits[:, 0] = 1.0
    logits[1, 3000] = float("nan")
    stats, _ = evaluate(backend, logits, torch.zeros(2, dtype=torch.int64), *[torch.ones(2)] * 2)
    assert stats.logp[0] == 0.0 and stats.logp[1].isnan() and stats.entropy[1].isnan()


@pytest.mark.parametrize("offset", [-1000.0, 1000.0, 20000.0])
def test_a_huge_constant_offset_changes_nothing_but_lse(offset: float, backend: Backend):
    """The logits are on a grid where the offset is exact, so z + offset is not rounded."""
    gen = torch.Generator().manual_seed(4)
    logits = torch.randint(-2000, 2000, (5, 2300), generator=gen) / 256.0
    target = torch.randint(0, 2300, (5,), generator=gen)
    ga, gh = coefficients(5)
    plain, grad = evaluate(backend, logits, target, ga, gh)
    moved, moved_grad = evaluate(backend, logits + offset, target, ga, gh)
    for name in ("logp", "entropy", "sum_sq", "top1"):
        compare(getattr(moved, name), getattr(plain, name), atol=2e-5, what=name)
    compare(moved.lse, plain.lse + offset, atol=abs(offset) * 2e-7)
    compare(moved_grad, grad, atol=2e-6)


LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_logits_of_any_finite_magnitude(biased: bool, dtype: torch.dtype, backend: Backend):
    """Fill values and larger ones: nothing overflows, and ties at the maximum share the probability."""
    logits = torch.zeros(9, 2300)
    for row, value in enumerate((LOWEST, -1e9, -1e30, 3e9, 1e30, -LOWEST)):
        logits[row] = value
    logits[6:, :] = LOWEST
    logits[7, 2100:], logits[8, 5] = -1e9, 1e30
    logits = logits.to(dtype).nan_to_num(posinf=1e38, neginf=-1e38)
    target = torch.tensor([0, 1, 2, 3, 4, 2299, 6, 2299, 5])
    options = {"bias_logits": torch.zeros_like(logits)} if biased else {}
    share = torch.tensor([2300.0] * 7 + [200.0, 1.0]).log()
    stats, grad = evaluate(backend, logits, target, torch.ones(9), torch.zeros(9), **options)
    compare(stats.logp, -share, atol=2e-6)
    compare(stats.entropy, share, atol=2e-6)
    compare(stats.sum_sq, (-share).exp(), rtol=1e-5)
    compare(stats.lse, logits.amax(1), rtol=2e-7, atol=1e-6)
    onehot = torch.nn.functional.one_hot(target, 2300)
    p = (logits == logits.amax(1, keepdim=True)) * (-share).exp().unsqueeze(1)
    compare(grad, onehot - p, atol=4e-3 if dtype == torch.bfloat16 else 2e-6)


def test_float16_subnormals_and_largest_values(backend: Backend):
    z = torch.tensor([[6e-8, -6e-8, 5.9e-5, 0.0, -0.0], [65504.0, 65504.0, 0.0, -65504.0, 1.0]])
    logits = z.half()
    stats, _ = evaluate(backend, logits, torch.tensor([2, 0]), torch.ones(2), torch.ones(2))
    expected = truth(logits, torch.tensor([2, 0]), torch.ones(2), torch.ones(2))
    compare(stats.logp, expected.logp, atol=2e-5)
    compare(stats.sum_sq, expected.sum_sq, rtol=1e-5)
    assert stats.top1.tolist() == [1.0, 1.0]


def test_16_bit_gradients_are_rounded_once(backend: Backend):
    """bf16 and f16 logits with equal values: bitwise the rounded float32 gradient."""
    logits = (torch.arange(600).reshape(3, 200) % 37 - 18) / 4.0
    target = torch.tensor([0, 20, 199])
    _, exact = evaluate(backend, logits, target, torch.ones(3), torch.ones(3))
    for dtype in (torch.bfloat16, torch.float16):
        _, grad = evaluate(backend, logits.to(dtype), target, torch.ones(3), torch.ones(3))
        assert bits(grad) == bits(exact.to(dtype))


# ------------------------------------------------------------------------------------------ masking


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_masked_rows_are_zero_and_never_read(dtype: torch.dtype, backend: Backend):
    logits, target, _ = Case("unread", 6, 2100).make(dtype)
    mask = torch.tensor([True, False, True, False, False, True])
    temperature, bias = torch.ones(6), torch.zeros_like(logits)
    bad_logits, bad_bias, bad_target = logits.clone(), bias.clone(), target.clone()
    bad_logits[~mask], bad_bias[~mask], temperature[~mask] = float("nan"), INF, float("nan")
    bad_target[~mask] = torch.tensor([-100, 2100, 1 << 40])
    for cap in (None, 20.0):
        options = {"mask": mask, "softcap": cap}
        ga, gh = coefficients(6)
        want, want_grad = evaluate(backend, logits, target, ga, gh, **options, bias_logits=bias)
        got, grad = evaluate(
            backend, bad_logits, bad_target, ga, gh, **options, bias_logits=bad_bias, temperature=temperature
        )
        for a, b in zip((*got, grad), (*want, want_grad), strict=True):
            assert bits(a) == bits(b)
            assert bits(a[~mask]) == bits(torch.zeros_like(a[~mask]))


# ------------------------------------------------------------------------------------------ options

OPTIONS = {
    "temperature": 1.7,
    "softcap": 6.0,
    "logit_scale": 0.4,
    "mask": torch.tensor([True, False, True]),
    "bias_logits": torch.linspace(-2, 3, 120).reshape(3, 40),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_alters_every_statistic_and_the_gradient(name: str, backend: Backend):
    logits, target, _ = Case("options", 3, 40).make(torch.float32)
    plain, plain_grad = evaluate(backend, logits, target, torch.ones(3), torch.ones(3))
    stats, grad = evaluate(backend, logits, target, torch.ones(3), torch.ones(3), **{name: OPTIONS[name]})
    for field in ("logp", "entropy", "lse", "sum_sq"):
        assert not torch.equal(getattr(stats, field), getattr(plain, field)), field
    assert not torch.equal(grad, plain_grad)


def test_bias_scale_multiplies_the_bias(backend: Backend):
    logits, target, _ = Case("bias_scale", 3, 40).make(torch.float32)
    bias = OPTIONS["bias_logits"]

    def logp(**options) -> torch.Tensor:
        return evaluate(backend, logits, target, torch.ones(3), torch.ones(3), **options)[0].logp

    double = logp(bias_logits=2.0 * bias)
    compare(logp(bias_logits=bias, bias_scale=2.0), double, atol=1e-6)
    compare(logp(bias_logits=bias, bias_scale=0.0), logp(), atol=1e-6)
    assert not torch.equal(double, logp())


def test_no_argument_is_written(backend: Backend):
    logits, target, options = CASES[-1].make(torch.bfloat16)
    arguments = {"logits": logits, "target": target, **options, "bias_logits": logits.clone()}
    given = {k: backend.put(v) for k, v in arguments.items()}
    given["logits"] = given["logits"].detach().requires_grad_()

    def forward_and_backward() -> None:
        tokfuse.token_stats(**given).logp.sum().backward()

    assert_untouched(forward_and_backward, given)
