"""linear_paired_divergence on every backend against float64 formulas over the full logits of both sides.

Bounds: those of paired_divergence and token_stats for logits of a few nats, plus float32 GEMM rounding:
4e-6 for a statistic, 1.5e-5 of the sum of absolute terms for a gradient: 1e-5 as for one head, and the
rounding of the second head's logits (at most 1.12e-5 measured, without FMA). 16-bit gradients are rounded
once: half an ulp more.
"""

import pytest
import torch
from harness import FLOAT_DTYPES, ROUNDED_ONCE, Backend, assert_untouched, backends, bits, compare, half_ulp
from head_cases import SIZES, peak_growth
from pair_cases import INF, KINDS, PairCase, logits_of, pair_case, pair_truth

import tokfuse
from tokfuse.runtime.core.codes import DIVERGENCES
from tokfuse.runtime.reference import linear_paired_divergence as reference

STATS = ("divergence", "entropy", "logp", "teacher_logp", "top1_agreement")
TENSORS = PairCase._fields[:-1]


@pytest.fixture(params=backends("linear_paired_divergence", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def coefficients(tokens: int, zero_rows: bool = True):
    """Incoming gradients of divergence, entropy and logp; some rows have none, some only one."""
    at = torch.arange(tokens)
    out = [torch.cos(at + shift * 1.7) for shift in range(3)]
    if zero_rows:
        for x in out:
            x[at % 5 == 2] = 0.0
        out[0][at % 7 == 3] = 0.0
    return tuple(out)


def evaluate(backend: Backend, case: PairCase, c, *, bias=True, needs="hwb", logits=False, **options):
    """(statistics, {name: gradient}) of one call; `needs` names what requires grad."""
    given = {n: backend.put(getattr(case, n)).detach() for n in TENSORS}
    leaves = {n: given[n].requires_grad_(n[0] in needs and (bias or n != "bias")) for n in TENSORS[:3]}
    if not bias:
        given["bias"] = given["teacher_bias"] = None
    if logits:
        teacher = backend.put(logits_of(case, bias)[1].to(case.teacher_hidden.dtype))
        given |= {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None, "teacher_logits": teacher}
    options = {name: backend.put(value) for name, value in options.items()}
    stats = tokfuse.linear_paired_divergence(target=backend.put(case.target), **given, **options)
    if stats.divergence.requires_grad:
        outputs = [stats.divergence, stats.entropy, stats.logp]
        torch.autograd.backward(outputs, [backend.put(x) for x in c])
    return stats, {name: tensor.grad for name, tensor in leaves.items()}


def check(backend: Backend, case: PairCase, *, kind="kl_reverse", bias=True, needs="hwb", logits=False, **options):
    c = coefficients(len(case.target))
    z, teacher = logits_of(case, bias)
    if logits:
        teacher = teacher.to(case.teacher_hidden.dtype)
    given = {name: value for name, value in options.items() if name != "memory_budget"}
    truth = pair_truth(z, teacher, case.target, c, KINDS[kind], **given)
    stats, grads = evaluate(backend, case, c, bias=bias, needs=needs, logits=logits, **KINDS[kind], **options)
    exact = backend.name == "reference"
    for name in STATS:
        bound = ROUNDED_ONCE if exact else {"atol": 4e-6, "rtol": 4e-6}
        compare(getattr(stats, name), truth.stats[name], **bound, what=name)
    expected, scales = truth.through_head(case)
    for name, grad in grads.items():
        if name[0] not in needs or (name == "bias" and not bias):
            assert grad is None, name
            continue
        assert grad is not None and grad.dtype == getattr(case, name).dtype
        atol = 1.5e-5 * scales[name]
        if exact:
            atol = 1e-12 * scales[name] + half_ulp(expected[name], torch.float32)
        if grad.dtype != torch.float32:
            atol = atol + half_ulp(expected[name], grad.dtype)
        compare(grad, expected[name], atol=atol, what=f"grad_{name}")
    return stats


def test_the_cases_cover_every_kind():
    assert {options["kind"] for options in KINDS.values()} == set(DIVERGENCES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, kind: str, backend: Backend):
    stats = check(backend, pair_case("tiles", dtype), kind=kind)
    assert 0 < stats.top1_agreement.sum() < 37


@pytest.mark.parametrize("size", SIZES)
def test_sizes(size: str, backend: Backend):
    check(backend, pair_case(size))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_of_logits(dtype: torch.dtype, kind: str, backend: Backend):
    check(backend, pair_case("tiles", torch.float32, dtype), kind=kind, logits=True, mask=torch.arange(37) % 3 != 1)


@pytest.mark.parametrize("wide", [("hidden", "teacher_weight"), ("weight", "teacher_hidden")])
def test_mixed_dtypes_of_a_head(wide, backend: Backend):
    case = pair_case("tiles", torch.bfloat16)
    check(backend, case._replace(**{name: getattr(case, name).float() for name in wide}), kind="jsd")


def test_a_teacher_of_another_dtype(backend: Backend):
    check(backend, pair_case("tiles", torch.float32, torch.bfloat16))
    check(backend, pair_case("tiles", torch.bfloat16, torch.float16))


ROWS = torch.linspace(0.6, 1.8, 37)
OPTIONS = {
    "temperature": {"temperature": 1.4},
    "teacher_temperature": {"teacher_temperature": 0.7},
    "temperature_rows": {"temperature": ROWS},
    "teacher_temperature_rows": {"teacher_temperature": ROWS.flip(0)},
    "softcap": {"softcap": 5.0},
    "teacher_softcap": {"teacher_softcap": 5.0},
    "logit_scale": {"logit_scale": 0.3},
    "teacher_logit_scale": {"teacher_logit_scale": 0.3},
    "both": {"temperature": ROWS, "teacher_temperature": ROWS, "softcap": 5.0, "teacher_softcap": 5.0},
    "all": {
        "temperature": ROWS,
        "teacher_temperature": 1.3,
        "softcap": 5.0,
        "teacher_softcap": 8.0,
        "logit_scale": 0.8,
        "teacher_logit_scale": 1.2,
        "mask": torch.arange(37) % 2 == 0,
    },
    "mask": {"mask": torch.arange(37) % 3 != 1},
    "mask_all": {"mask": torch.zeros(37, dtype=torch.bool)},
    "mask_none": {"mask": torch.ones(37, dtype=torch.bool)},
}


@pytest.mark.parametrize("kind", ["kl_forward", "jsd"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, kind: str, backend: Backend):
    case = pair_case()
    stats = check(backend, case, kind=kind, **OPTIONS[name])
    check(backend, case, kind=kind, logits=True, **OPTIONS[name])
    if name not in ("mask_none", "mask_all"):
        plain, _ = evaluate(backend, case, coefficients(37), **KINDS[kind])
        assert not torch.equal(plain.divergence, stats.divergence)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "wb", "hb"])
def test_gradients_only_where_asked(needs: str, backend: Backend):
    check(backend, pair_case(), needs=needs)
    check(backend, pair_case(), needs=needs, bias=False)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [1, 400_000, 1 << 40])
def test_any_memory_budget_gives_the_same(budget: int, size: str, backend: Backend):
    mask = torch.arange(SIZES[size][0]) % 4 != 2
    check(backend, pair_case(size), memory_budget=budget, mask=mask, kind="jsd")


def test_masked_tokens_are_never_used(backend: Backend):
    case, mask = pair_case(), torch.arange(37) % 3 != 1
    bad = case._replace(
        hidden=case.hidden.clone(), target=case.target.clone(), teacher_hidden=case.teacher_hidden.clone()
    )
    bad.hidden[~mask], bad.target[~mask], bad.teacher_hidden[~mask] = float("nan"), -100, INF
    rows = torch.where(mask, 1.0, float("nan"))
    c, kind = coefficients(37), KINDS["jsd"]
    want, want_grads = evaluate(backend, case, c, mask=mask, **kind)
    got, grads = evaluate(backend, bad, c, mask=mask, temperature=rows, teacher_temperature=rows, **kind)
    for a, b in zip(got, want, strict=True):
        assert bits(a) == bits(b) and not a[~mask].any()
    if backend.name != "reference":  # a full GEMM multiplies the masked rows' NaN by 0
        for name in grads:
            assert bits(grads[name]) == bits(want_grads[name]), name


@pytest.mark.parametrize("kind", KINDS)
def test_bad_values_poison_their_token_only(kind: str, backend: Backend):
    case = pair_case("one_tile")
    bad = case._replace(hidden=case.hidden.clone(), teacher_hidden=case.teacher_hidden.clone())
    bad.hidden[3], bad.teacher_hidden[5] = float("nan"), float("nan")
    want, _ = evaluate(backend, case, coefficients(37), **KINDS[kind])
    got, _ = evaluate(backend, bad, coefficients(37), **KINDS[kind])
    clean = torch.tensor([t not in (3, 5) for t in range(37)])
    compare(got.divergence[clean], want.divergence[clean], atol=1e-6)
    assert got.divergence[~clean].isnan().all() and got.entropy[3].isnan() and got.entropy[5].isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_excluded_columns(kind: str, backend: Backend):
    """Excluded on both sides: no part of it. By one side: an infinite KL without a gradient."""
    case = pair_case("one_tile")
    both = case._replace(bias=case.bias.clone(), teacher_bias=case.teacher_bias.clone())
    both.bias[100:], both.teacher_bias[100:] = -INF, -INF
    stats, grads = evaluate(backend, both, coefficients(37), **KINDS[kind])
    assert stats.divergence.isfinite().all() and all(grads[n][:100].isfinite().all() for n in ("weight", "bias"))
    small = PairCase(
        case.hidden,
        case.weight[:100],
        case.bias[:100],
        case.teacher_hidden,
        case.teacher_weight[:100],
        case.teacher_bias[:100],
        case.target % 100,
    )
    want, _ = evaluate(backend, small, coefficients(37), **KINDS[kind])
    compare(stats.divergence, want.divergence, atol=4e-6, rtol=4e-6)
    for side, infinite in (("bias", "kl_forward"), ("teacher_bias", "kl_reverse")):
        one = case._replace(**{side: getattr(case, side).clone()})
        getattr(one, side)[5] = -INF
        stats, grads = evaluate(backend, one, (torch.ones(37), *[torch.zeros(37)] * 2), **KINDS[kind])
        assert stats.divergence.eq(INF).all() if infinite == kind else stats.divergence.isfinite().all()
        assert grads["hidden"].isfinite().all() if side == "teacher_bias" else True
        if infinite == kind:
            assert not grads["weight"].any() and not grads["hidden"].nan_to_num(0).any()


def test_no_tokens(backend: Backend):
    case = pair_case("one_tile")
    empty = case._replace(hidden=case.hidden[:0], teacher_hidden=case.teacher_hidden[:0], target=case.target[:0])
    stats, grads = evaluate(backend, empty, [torch.zeros(0)] * 3, kind="jsd")
    assert [tuple(x.shape) for x in stats] == [(0,)] * 5
    assert not grads["weight"].any() and grads["hidden"].shape == (0, 24)


def test_without_a_target(backend: Backend):
    case = pair_case("one_tile")
    given = {name: backend.put(getattr(case, name)) for name in TENSORS}
    stats = tokfuse.linear_paired_divergence(kind="jsd", **given)
    with_target = tokfuse.linear_paired_divergence(kind="jsd", target=backend.put(case.target), **given)
    assert stats.logp is None and stats.teacher_logp is None
    for name in ("divergence", "entropy", "top1_agreement"):
        compare(getattr(stats, name), getattr(with_target, name), atol=1e-6)


def test_equals_paired_divergence_of_the_logits(backend: Backend):
    case = pair_case("one_tile")
    p, q = (backend.put(z.float()) for z in logits_of(case))
    stats, _ = evaluate(backend, case, coefficients(37), kind="jsd")
    compare(stats.divergence, tokfuse.paired_divergence(p, q), atol=4e-6)
    direct = tokfuse.token_stats(p, backend.put(case.target))
    compare(stats.entropy, direct.entropy, atol=4e-6)
    compare(stats.logp, direct.logp, atol=4e-6)


def test_exactly_zero_for_the_same_head(backend: Backend):
    case = pair_case("one_tile")
    same = case._replace(teacher_hidden=case.hidden, teacher_weight=case.weight, teacher_bias=case.bias)
    for kind in KINDS.values():
        stats, grads = evaluate(backend, same, (torch.ones(37), *[torch.zeros(37)] * 2), **kind)
        limit = 1e-14 if backend.name == "reference" else 0.0
        assert (stats.divergence == 0).all() and (stats.top1_agreement == 1).all()
        assert all(grad.abs().max() <= limit for grad in grads.values())


def test_non_contiguous_tensors(backend: Backend):
    case = pair_case()
    strided = PairCase(
        torch.stack([case.hidden, case.hidden], 1)[:, 0],
        case.weight.t().contiguous().t(),
        torch.stack([case.bias, case.bias], 1)[:, 1],
        torch.stack([case.teacher_hidden, case.teacher_hidden], 1)[:, 0],
        case.teacher_weight.t().contiguous().t(),
        torch.stack([case.teacher_bias, case.teacher_bias], 1)[:, 1],
        torch.stack([case.target, case.target], 1)[:, 0],
    )
    assert not any(x.is_contiguous() for x in strided)
    check(backend, strided)


def test_two_runs_are_bitwise_equal(backend: Backend):
    case = pair_case("tiles", torch.bfloat16)
    runs = [evaluate(backend, case, coefficients(37), memory_budget=300_000, kind="jsd") for _ in range(2)]
    assert [bits(x) for x in runs[0][0]] == [bits(x) for x in runs[1][0]]
    assert {k: bits(v) for k, v in runs[0][1].items()} == {k: bits(v) for k, v in runs[1][1].items()}


def test_a_row_does_not_depend_on_its_batch(backend: Backend):
    """With a chunk of one row each: the GEMM library may round a row differently in a larger one."""
    case = pair_case()
    part = case._replace(hidden=case.hidden[9:14], teacher_hidden=case.teacher_hidden[9:14], target=case.target[9:14])
    whole, _ = evaluate(backend, case, coefficients(37), memory_budget=1, kind="jsd")
    few, _ = evaluate(backend, part, coefficients(5), memory_budget=1, kind="jsd")
    for a, b in zip(whole, few, strict=True):
        if backend.name != "reference":
            assert bits(a[9:14]) == bits(b)
        compare(a[9:14], b, atol=1e-6)


def test_no_argument_is_written(backend: Backend):
    case = pair_case("tiles", torch.bfloat16)
    given = {name: backend.put(value) for name, value in case._asdict().items()}
    for name in ("hidden", "weight", "bias"):
        given[name] = given[name].detach().requires_grad_()

    def call():
        tokfuse.linear_paired_divergence(kind="jsd", **given).divergence.sum().backward()

    assert_untouched(call, given)


def test_autocast_changes_nothing(backend: Backend):
    case = pair_case("one_tile")
    want, want_grads = evaluate(backend, case, coefficients(37), kind="jsd")
    with torch.autocast(backend.device, dtype=torch.bfloat16):
        got, grads = evaluate(backend, case, coefficients(37), kind="jsd")
    assert [bits(x) for x in got] == [bits(x) for x in want]
    assert {k: bits(v) for k, v in grads.items()} == {k: bits(v) for k, v in want_grads.items()}


def test_retained_graph_and_second_backward(backend: Backend):
    case = pair_case("one_tile")
    hidden = backend.put(case.hidden).requires_grad_()
    rest = [backend.put(x) for x in (case.weight, case.teacher_hidden, case.teacher_weight)]
    loss = tokfuse.linear_paired_divergence(hidden, *rest, kind="kl_forward").divergence.sum()
    first = torch.autograd.grad(loss, hidden, retain_graph=True)[0]
    assert bits(first) == bits(torch.autograd.grad(loss, hidden)[0])
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        torch.autograd.grad(loss, hidden)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_the_reference(kind: str):
    """Of every differentiable output by every input of the student, numerically in float64."""
    case = pair_case("one_tile")
    z, teacher = (x[:3, :17].clone() for x in logits_of(case))
    target = torch.tensor([0, 5, 16])
    from tokfuse.runtime.core.logit_options import LogitOptions

    o = LogitOptions(torch.tensor([0.7, 1.0, 1.9], dtype=torch.float64), 6.0, 0.8, None)
    t = LogitOptions(1.2, 9.0, 1.1, None)
    options = {"kind": KINDS[kind]["kind"], "mix_weight": 0.3}

    def call(z):
        return reference.exact(z, teacher, target, o, t, "test", **options)[:3]

    assert torch.autograd.gradcheck(call, z.requires_grad_())


REFUSALS = {
    "kind": ({"kind": "kl"}, "kind must be one of"),
    "beta": ({"beta": 1.0}, "beta must be in"),
    "alpha": ({"kind": "skew_forward", "alpha": 0.0}, "alpha must be in"),
    "alpha without a skew": ({"alpha": 0.2}, "alpha must be left out with"),
    "beta with a KL": ({"kind": "kl_forward", "beta": 0.2}, "beta must be left out with"),
    "no teacher": ({"teacher_hidden": None, "teacher_weight": None}, "teacher must be teacher_hidden= with"),
    "two teachers": ({"teacher_logits": torch.zeros(37, 700)}, "got both"),
    "no weight": ({"teacher_weight": None}, "teacher_weight must be given with teacher_hidden="),
    "top-k": (
        {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": torch.zeros(37, 8)},
        r"teacher_logits must be of shape.*linear_token_stats\(\.\.\., ids=\)",
    ),
    "vocabulary": ({"teacher_weight": torch.zeros(701, 40)}, "teacher_weight must be of shape.*common rows"),
    "tokens": ({"teacher_hidden": torch.zeros(36, 40)}, "teacher_hidden must be of shape"),
    "dtypes": ({"teacher_weight": torch.zeros(700, 40).long()}, "teacher_weight must be of dtype"),
    "double": (
        {"teacher_weight": torch.zeros(700, 40).double(), "teacher_hidden": torch.zeros(37, 40).double()},
        "teacher_hidden must be torch.float32 or narrower",
    ),
    "bias": ({"teacher_bias": torch.zeros(7)}, "teacher_bias must be"),
    "gradient": ({"teacher_weight": torch.zeros(700, 40).requires_grad_()}, "teacher_weight must be detached"),
    "temperature": ({"teacher_temperature": 0.0}, "teacher_temperature must be a finite number"),
    "softcap": ({"teacher_softcap": -1.0}, "teacher_softcap must be"),
    "scale": ({"teacher_logit_scale": 0.0}, "teacher_logit_scale must be"),
    "rows": ({"teacher_temperature": torch.zeros(37)}, "teacher_temperature must be > 0 in every row"),
    "target": ({"target": torch.full((37,), 700)}, "target must be in"),
    "budget": ({"memory_budget": 0}, "memory_budget must be"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str):
    case = pair_case("one_tile")
    given = {n: getattr(case, n) for n in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
    changed, text = REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        tokfuse.linear_paired_divergence(**(given | {"kind": "jsd"} | changed))


PEAK = """
t = torch.randn(tokens, 48)
v = torch.randn(30_000, 48)
tokfuse.linear_paired_divergence(h, w, t, v, kind="jsd", memory_budget=8 << 20).divergence.sum().backward()
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """1024 rows of 30000 float32 logits of two sides are 234 MiB; the workspace holds 8 MiB of them."""
    assert peak_growth(PEAK) < 40
