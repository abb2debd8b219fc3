"""Test linear_token_stats on every backend against float64 formulas over the full logits.

Bounds: those of token_stats for logits of a few nats, and float32 GEMM rounding: 1e-5 of the sum of absolute
terms for a gradient. 16-bit gradients are rounded once, which adds half an ulp.
"""

import pytest
import torch
from harness import FLOAT_DTYPES, ROUNDED_ONCE, Backend, assert_untouched, backends, bits, compare, half_ulp
from head_cases import SIZES, HeadCase, head_case, head_truth, peak_growth
from logit_cases import FORWARD_ATOL, INF, coefficients

import tokfuse


@pytest.fixture(params=backends("linear_token_stats", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def evaluate(backend: Backend, case: HeadCase, ga, gh, *, bias=True, needs="hwb", **options):
    """Return (statistics, {name: gradient}) of one call; `needs` names the inputs that require grad."""
    tensors = {n: backend.put(getattr(case, n)).detach() for n in ("hidden", "weight", "bias")}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name[0] in needs and (bias or name != "bias"))
    options = {name: backend.put(value) for name, value in options.items()}
    if bias:
        options["bias"] = tensors["bias"]
    stats = tokfuse.linear_token_stats(tensors["hidden"], tensors["weight"], backend.put(case.target), **options)
    if stats.logp.requires_grad:
        torch.autograd.backward([stats.logp, stats.entropy], [backend.put(ga), backend.put(gh)])
    return stats, {name: tensor.grad for name, tensor in tensors.items()}


def check(backend: Backend, case: HeadCase, *, bias=True, needs="hwb", memory_budget=None, **options):
    ga, gh = coefficients(len(case.target))
    expected = head_truth(case, ga, gh, bias, **options)
    stats, grads = evaluate(backend, case, ga, gh, bias=bias, needs=needs, memory_budget=memory_budget, **options)
    exact = backend.name == "reference"
    for name in ("logp", "entropy", "lse"):
        bound = ROUNDED_ONCE if exact else {"atol": FORWARD_ATOL}
        compare(getattr(stats, name), getattr(expected.stats, name), **bound, what=name)
    compare(stats.sum_sq, expected.stats.sum_sq, **(ROUNDED_ONCE if exact else {"rtol": 2e-5}), what="sum_sq")
    compare(stats.top1, expected.stats.top1, what="top1")
    for name, grad in grads.items():
        if name[0] not in needs or (name == "bias" and not bias):
            assert grad is None, name
            continue
        assert grad is not None and grad.dtype == getattr(case, name).dtype
        atol = 1e-5 * expected.scales[name]
        if exact:
            atol = 1e-13 * expected.scales[name] + half_ulp(expected.grads[name], torch.float32)
        if grad.dtype != torch.float32:
            atol = atol + half_ulp(expected.grads[name], grad.dtype)
        compare(grad, expected.grads[name], atol=atol, what=f"grad_{name}")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_values_and_gradients(size: str, dtype: torch.dtype, backend: Backend):
    check(backend, head_case(size, dtype))


MIXED = {  # hidden, weight, bias
    "float32 head": (torch.bfloat16, torch.float32, torch.float32),
    "float32 hidden": (torch.float32, torch.bfloat16, torch.bfloat16),
    "two 16-bit dtypes": (torch.float16, torch.bfloat16, torch.float32),
    "float32 bias": (torch.bfloat16, torch.bfloat16, torch.float32),
}


@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes(name: str, backend: Backend):
    """Nothing is rounded before the GEMM, and each input has its gradient in its own dtype."""
    case = head_case("tiles")
    mixed = (x.to(dtype) for x, dtype in zip(case[:3], MIXED[name], strict=True))
    check(backend, HeadCase(*mixed, case.target))


OPTIONS = {
    "temperature": lambda t: 1.4,
    "temperature_rows": lambda t: torch.linspace(0.6, 1.8, t),
    "softcap": lambda t: 5.0,
    "logit_scale": lambda t: 0.3,
    "mask": lambda t: torch.arange(t) % 3 != 1,
    "mask_all": lambda t: torch.zeros(t, dtype=torch.bool),
    "mask_none": lambda t: torch.ones(t, dtype=torch.bool),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: Backend):
    case = head_case("tiles")
    option = {name.split("_")[0] if name[:4] != "logi" else name: OPTIONS[name](37)}
    check(backend, case, **option)
    if name not in ("mask_none", "mask_all"):
        plain, _ = evaluate(backend, case, *coefficients(37))
        given, _ = evaluate(backend, case, *coefficients(37), **option)
        assert not torch.equal(plain.logp, given.logp)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "wb", "hb"])
def test_gradients_only_where_asked(needs: str, backend: Backend):
    check(backend, head_case("tiles"), needs=needs)
    check(backend, head_case("tiles"), needs=needs, bias=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [1, 400_000, 1 << 40])
def test_any_memory_budget_gives_the_same(budget: int, size: str, dtype, backend: Backend):
    mask = torch.arange(SIZES[size][0]) % 4 != 2
    check(backend, head_case(size, dtype), memory_budget=budget, mask=mask)


def test_masked_tokens_are_never_used(backend: Backend):
    case, mask = head_case("tiles"), torch.arange(37) % 3 != 1
    bad = case._replace(hidden=case.hidden.clone(), target=case.target.clone())
    bad.hidden[~mask], bad.target[~mask] = float("nan"), -100
    temperature = torch.where(mask, 1.0, float("nan"))
    want, want_grads = evaluate(backend, case, *coefficients(37), mask=mask)
    got, grads = evaluate(backend, bad, *coefficients(37), mask=mask, temperature=temperature)
    for a, b in zip(got, want, strict=True):
        assert bits(a) == bits(b) and not a[~mask].any()
    if backend.name != "reference":  # a full GEMM multiplies the masked rows' NaN by 0
        for name in grads:
            assert bits(grads[name]) == bits(want_grads[name]), name


def test_bad_values_poison_their_token_only(backend: Backend):
    case = head_case("one_tile")
    bad = case._replace(hidden=case.hidden.clone(), bias=case.bias.clone())
    bad.hidden[3], bad.hidden[5, 2] = float("nan"), INF
    bad.bias[100:] = -INF  # excluded vocabulary through the bias
    case = case._replace(bias=bad.bias)
    want, _ = evaluate(backend, case, *coefficients(37))
    got, _ = evaluate(backend, bad, *coefficients(37))
    clean = torch.tensor([t not in (3, 5) for t in range(37)])
    for name in ("logp", "entropy", "lse"):
        compare(getattr(got, name)[clean], getattr(want, name)[clean], atol=1e-6)
    assert got.entropy[~clean].isnan().all() and got.logp[~clean].isnan().all()
    assert got.logp[clean & (case.target >= 100)].eq(-INF).all()
    check(backend, case)


def test_no_tokens(backend: Backend):
    case = head_case("one_tile")
    none = case._replace(hidden=case.hidden[:0], target=case.target[:0])
    stats, grads = evaluate(backend, none, torch.zeros(0), torch.zeros(0))
    assert [tuple(x.shape) for x in stats] == [(0,)] * 5
    assert not grads["weight"].any() and grads["hidden"].shape == (0, 24)


def test_non_contiguous_hidden_weight_and_bias(backend: Backend):
    case = head_case("tiles")
    strided = HeadCase(
        torch.stack([case.hidden, case.hidden], 1)[:, 0],
        case.weight.t().contiguous().t(),
        torch.stack([case.bias, case.bias], 1)[:, 1],
        torch.stack([case.target, case.target], 1)[:, 0],
    )
    assert not any(x.is_contiguous() for x in strided)
    check(backend, strided)


def test_two_runs_are_bitwise_equal(backend: Backend):
    case = head_case("tiles", torch.bfloat16)
    runs = [evaluate(backend, case, *coefficients(37), memory_budget=300_000) for _ in range(2)]
    assert [bits(x) for x in runs[0][0]] == [bits(x) for x in runs[1][0]]
    assert {k: bits(v) for k, v in runs[0][1].items()} == {k: bits(v) for k, v in runs[1][1].items()}


def test_equals_token_stats_of_the_logits(backend: Backend):
    case = head_case("one_tile")
    logits = case.hidden @ case.weight.t() + case.bias
    direct = tokfuse.token_stats(backend.put(logits), backend.put(case.target))
    stats, _ = evaluate(backend, case, *coefficients(37))
    for a, b in zip(stats, direct, strict=True):
        compare(a, b, atol=4e-6)


def test_retained_graph_and_second_backward(backend: Backend):
    case = head_case("one_tile")
    hidden = backend.put(case.hidden).requires_grad_()
    stats = tokfuse.linear_token_stats(hidden, backend.put(case.weight), backend.put(case.target))
    loss = stats.logp.sum() + stats.entropy.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert bits(first) == bits(torch.autograd.grad(loss, hidden)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, hidden)


def test_no_graph_without_grad(backend: Backend):
    case = head_case("one_tile")
    hidden, weight, target = (backend.put(case[i]) for i in (0, 1, 3))
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            stats = tokfuse.linear_token_stats(hidden.clone().requires_grad_(), weight, target)
            assert not any(x.requires_grad for x in stats)
    stats = tokfuse.linear_token_stats(hidden.clone().requires_grad_(), weight, target)
    assert [x.requires_grad for x in stats] == [True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_changes_nothing(dtype: torch.dtype, backend: Backend):
    case = head_case("one_tile", dtype)
    ga, gh = coefficients(37)
    plain, grads = evaluate(backend, case, ga, gh)
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        cast, cast_grads = evaluate(backend, case, ga, gh)
    assert [bits(x) for x in cast] == [bits(x) for x in plain]
    if backend.name != "reference":  # autograd's own GEMMs follow autocast when it is on
        assert all(bits(cast_grads[k]) == bits(grads[k]) for k in grads)


def test_float64_runs_on_the_reference():
    gen = torch.Generator().manual_seed(1)
    h, w = torch.randn(5, 3, dtype=torch.float64, generator=gen), torch.randn(7, 3, dtype=torch.float64, generator=gen)
    b, y = torch.randn(7, dtype=torch.float64, generator=gen), torch.tensor([0, 6, 2, 3, 3])

    def call(hidden, weight, bias):
        return tokfuse.linear_token_stats(hidden, weight, y, bias=bias, temperature=1.2)[:3]

    inputs = tuple(x.requires_grad_() for x in (h, w, b))
    assert torch.autograd.gradcheck(call, inputs)
    assert call(*inputs)[0].dtype == torch.float64


def test_no_argument_is_written(backend: Backend):
    case = head_case("tiles", torch.bfloat16)
    given = {name: backend.put(value) for name, value in case._asdict().items()}
    for name in ("hidden", "weight", "bias"):
        given[name] = given[name].detach().requires_grad_()
    assert_untouched(lambda: tokfuse.linear_token_stats(**given).logp.sum().backward(), given)


PEAK = """
y = torch.zeros(tokens, dtype=torch.int64)
tokfuse.linear_token_stats(h, w, y, memory_budget=8 << 20).logp.sum().backward()
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """1024 rows of 30000 float32 logits are 117 MiB; the workspace holds 8 MiB of them."""
    assert peak_growth(PEAK) < 40
