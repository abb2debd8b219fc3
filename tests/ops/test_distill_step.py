"""distill_step on every backend: equal to composing the simple ops, and gradients in the forward.

The loss agrees with the composition to the rounding of a GEMM that is cut differently; gradients to
the bounds of linear_paired_divergence against float64.
"""

from unittest import mock

import pytest
import torch
from harness import FLOAT_DTYPES, Backend, assert_untouched, backends, bits, compare, half_ulp
from head_cases import SIZES, peak_growth
from pair_cases import INF, KINDS, PairCase, logits_of, pair_case, pair_truth

import tokfuse
from tokfuse import DistillMetrics
from tokfuse.runtime.lm_head import cpu_head

TENSORS = PairCase._fields[:-1]
LEAVES = ("hidden", "weight", "bias")


@pytest.fixture(params=backends("linear_paired_divergence", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def weights(tokens: int) -> torch.Tensor:
    """Of both signs, one in four exactly 0."""
    at = torch.arange(tokens)
    return torch.where(at % 4 == 1, 0.0, torch.cos(at * 1.3) + 0.5)


def masks(tokens: int) -> torch.Tensor:
    return torch.arange(tokens) % 5 != 3


def run(backend: Backend, case: PairCase, *, needs="hwb", **keywords):
    """(step, gradients after the backward) of hidden states and heads."""
    given = {n: backend.put(getattr(case, n)).detach() for n in TENSORS}
    for name in LEAVES:
        given[name].requires_grad_(name[0] in needs)
    keywords = {name: backend.put(value) for name, value in keywords.items()}
    step = tokfuse.distill_step(**given, **({"target": backend.put(case.target)} | keywords))
    held = {name: getattr(step, f"grad_{name}") for name in LEAVES}
    held = {name: None if x is None else x.clone() for name, x in held.items()}
    if needs:
        step.loss.backward()
    for name in LEAVES:
        got = given[name].grad
        assert (got is None) == (held[name] is None) == (name[0] not in needs)
        assert got is None or bits(got) == bits(held[name])
    return step, {name: given[name].grad for name in LEAVES}


def check(backend: Backend, case: PairCase, kind="kl_reverse", *, needs="hwb", normalizer=3.0, **keywords):
    """Against the float64 formulas with coefficients weight / normaliser."""
    tokens = len(case.target)
    coef, mask = keywords.get("coef"), keywords.get("mask")
    step, grads = run(backend, case, needs=needs, normalizer=normalizer, **KINDS[kind], **keywords)
    count = tokens if mask is None else int(mask.sum())
    divisor = {None: 1.0, "batch": max(count, 1)}.get(normalizer, normalizer)
    c = (torch.ones(tokens) if coef is None else coef).double() / divisor
    c = c if mask is None else torch.where(mask, c, 0.0)
    options = {n: v for n, v in keywords.items() if n not in ("coef", "mask", "memory_budget", "target")}
    none = torch.zeros(tokens)
    truth = pair_truth(*logits_of(case), case.target, (c, none, none), KINDS[kind], mask=c != 0, **options)
    for name, want in truth.stats.items():
        got = getattr(step.stats, name)
        assert got is None or not got.requires_grad
        if got is not None:
            compare(got, want, atol=4e-6, rtol=4e-6, what=name)
    compare(step.divergence, truth.stats["divergence"], atol=4e-6, rtol=4e-6)
    terms = c * truth.stats["divergence"]
    slack = 4e-6 * float((terms.abs() + c.abs()).sum())
    compare(step.loss, terms.sum(), atol=slack, what="loss")
    compare(step.loss_sum, terms.sum() * divisor, atol=slack * divisor, what="loss_sum")
    assert float(step.count) == count
    assert step.loss.requires_grad == bool(needs)
    expected, scales = truth.through_head(case)
    for name in LEAVES:
        if name[0] not in needs:
            continue
        atol = 1.5e-5 * scales[name]
        if grads[name].dtype != torch.float32:
            atol = atol + half_ulp(expected[name], grads[name].dtype)
        compare(grads[name], expected[name], atol=atol, what=f"grad_{name}")
    return step, grads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_values_and_gradients(dtype: torch.dtype, kind: str, backend: Backend):
    check(backend, pair_case("tiles", dtype), kind, coef=weights(37), mask=masks(37))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("budget", [1, 400_000, 1 << 40, None])
def test_any_size_and_memory_budget(budget: int | None, size: str, backend: Backend):
    tokens = SIZES[size][0]
    check(backend, pair_case(size), "jsd", coef=weights(tokens), mask=masks(tokens), memory_budget=budget)


@pytest.mark.parametrize("needs", ["", "h", "w", "b", "hw", "wb", "hb"])
def test_gradients_only_where_asked(needs: str, backend: Backend):
    check(backend, pair_case(), needs=needs, coef=weights(37))


@pytest.mark.parametrize("normalizer", [None, 7, 2.5, "batch", torch.tensor(11.0)])
def test_normalizers(normalizer, backend: Backend):
    number = normalizer if not isinstance(normalizer, torch.Tensor) else 11.0
    _, want = check(backend, pair_case("one_tile"), normalizer=number, coef=weights(37), mask=masks(37))
    case = pair_case("one_tile")
    step, grads = run(backend, case, normalizer=normalizer, coef=weights(37), mask=masks(37), **KINDS["kl_reverse"])
    assert {n: bits(x) for n, x in grads.items()} == {n: bits(x) for n, x in want.items()}


OPTIONS = {
    "temperatures": {"temperature": torch.linspace(0.6, 1.8, 37), "teacher_temperature": 0.8},
    "softcaps": {"softcap": 5.0, "teacher_softcap": 9.0},
    "student_softcap": {"softcap": 5.0, "teacher_temperature": 1.5},
    "teacher_softcap": {"teacher_softcap": 5.0},
    "scales": {"logit_scale": 0.5, "teacher_logit_scale": 0.8},
    "no_weights": {"coef": None},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: Backend):
    check(backend, pair_case(), "jsd", **({"coef": weights(37), "mask": masks(37)} | OPTIONS[name]))


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_composition(kind: str, backend: Backend):
    case, coef, mask = pair_case(), weights(37), masks(37)
    step, grads = run(backend, case, coef=coef, mask=mask, normalizer="batch", **KINDS[kind])
    given = {n: backend.put(getattr(case, n)).detach().requires_grad_(n in LEAVES) for n in TENSORS}
    out = tokfuse.linear_paired_divergence(mask=backend.put(mask), **given, **KINDS[kind])
    loss = (backend.put(coef) * out.divergence).sum() / backend.put(mask).sum()
    loss.backward()
    compare(step.loss, loss, atol=1e-6, rtol=1e-6)
    for name in LEAVES:
        compare(grads[name], given[name].grad, atol=2e-6 * float(given[name].grad.abs().max()), what=name)


def logits_step(backend: Backend, z, teacher, dtype=torch.float32, **keywords):
    """(step, gradient) of logits."""
    leaf = backend.put(z.to(dtype)).detach().requires_grad_()
    keywords = {name: backend.put(value) for name, value in keywords.items()}
    step = tokfuse.distill_step(logits=leaf, teacher_logits=backend.put(teacher.to(dtype)), **keywords)
    held = step.grad_logits.clone()
    step.loss.backward()
    assert bits(held) == bits(leaf.grad) and step.grad_hidden is None
    return step, leaf.grad


LOGIT_OPTIONS = {
    "plain": {},
    "rows": {"temperature": torch.linspace(0.6, 1.8, 37), "teacher_temperature": torch.linspace(1.8, 0.6, 37)},
    "softcaps": {"softcap": 5.0, "teacher_softcap": 9.0, "logit_scale": 0.9},
    "teacher_softcap": {"teacher_softcap": 5.0, "temperature": 0.8},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("name", LOGIT_OPTIONS)
def test_from_logits(name: str, dtype: torch.dtype, kind: str, backend: Backend):
    """Against float64 formulas of the rounded logits; bounds of paired_divergence."""
    case, options = pair_case("one_tile"), LOGIT_OPTIONS[name]
    z, teacher = (x.to(dtype) for x in logits_of(case))
    coef, mask = weights(37), masks(37)
    step, grad = logits_step(
        backend, z, teacher, dtype, coef=coef, mask=mask, normalizer=3.0, target=case.target, **KINDS[kind], **options
    )
    c, none = torch.where(mask, coef, 0.0).double() / 3.0, torch.zeros(37)
    truth = pair_truth(z, teacher, case.target, (c, none, none), KINDS[kind], mask=c != 0, **options)
    for field, want in truth.stats.items():
        compare(getattr(step.stats, field), want, atol=4e-6, rtol=4e-6, what=field)
    terms = 1e-5 * truth.terms.amax(-1, keepdim=True)
    compare(grad, truth.grad_logits, atol=1e-9 + terms + half_ulp(truth.grad_logits, dtype), what="gradient")
    assert grad.dtype == dtype and not grad[c == 0].any()


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_logits_without_weight_are_never_used(softcap: float | None, backend: Backend):
    z, teacher = logits_of(pair_case("one_tile"))
    bad_z, bad_teacher, coef, mask = z.clone(), teacher.clone(), weights(37), masks(37)
    unused = (coef == 0) | ~mask
    bad_z[unused], bad_teacher[unused] = float("nan"), INF
    keywords = {"coef": coef, "mask": mask, "kind": "jsd", "softcap": softcap, "teacher_temperature": 0.9}
    want, want_grad = logits_step(backend, z, teacher, **keywords)
    got, grad = logits_step(backend, bad_z, bad_teacher, **keywords)
    assert bits(got.loss) == bits(want.loss) and bits(got.divergence) == bits(want.divergence)
    assert bits(grad) == bits(want_grad) and not grad[unused].any()


def test_logits_and_hidden_agree(backend: Backend):
    case = pair_case("one_tile")
    keywords = {"coef": weights(37), "kind": "jsd", "normalizer": "batch"}
    step, _ = run(backend, case, **keywords)
    z, teacher = logits_of(case)
    other, _ = logits_step(backend, z, teacher, **keywords)
    compare(step.loss, other.loss, atol=1e-5)
    compare(step.divergence, other.divergence, atol=4e-6)


def test_rows_without_weight_are_not_computed(backend: Backend):
    """NaN in them reaches nothing; on the CPU they enter no GEMM."""
    case, coef = pair_case(), weights(37)
    bad = case._replace(hidden=case.hidden.clone(), teacher_hidden=case.teacher_hidden.clone())
    bad.hidden[coef == 0], bad.teacher_hidden[coef == 0] = float("nan"), float("nan")
    want, want_grads = run(backend, case, coef=coef, kind="jsd")
    got, grads = run(backend, bad, coef=coef, kind="jsd")
    assert bits(got.loss) == bits(want.loss) and bits(got.divergence) == bits(want.divergence)
    if backend.name != "reference":
        assert {n: bits(x) for n, x in grads.items()} == {n: bits(x) for n, x in want_grads.items()}
    if backend.name == "cpu":
        rows = []
        wrapped = mock.patch.object(
            cpu_head.Head,
            "logits",
            autospec=True,
            side_effect=lambda head, h, *rest, run=cpu_head.Head.logits: (rows.append(len(h)), run(head, h, *rest)),
        )
        with wrapped:
            run(backend, case, coef=coef, kind="jsd")
        assert sum(rows) == 2 * int((coef != 0).sum())


def test_all_rows_inactive_and_no_tokens(backend: Backend):
    case = pair_case("one_tile")
    empty = case._replace(hidden=case.hidden[:0], teacher_hidden=case.teacher_hidden[:0], target=case.target[:0])
    for given, keywords in (
        (case, {"coef": torch.zeros(37)}),
        (case, {"mask": torch.zeros(37, dtype=torch.bool)}),
        (empty, {}),
    ):
        step, grads = run(backend, given, kind="kl_forward", normalizer="batch", **keywords)
        assert step.loss.item() == 0 and not step.divergence.any()
        assert all(not x.any() for x in grads.values()) and grads["weight"].shape == (700, 24)
        assert step.metrics["tokens"] == 0 and step.metrics["divergence"] == 0


def test_an_infinite_divergence(backend: Backend):
    """Its row has no gradient; without a weight it is not part of the loss."""
    z, teacher = torch.zeros(2, 5), torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    z[0, 2] = -INF
    step, grad = logits_step(backend, z, teacher, kind="kl_forward")
    assert step.loss == INF and step.divergence[0] == INF and not grad[0].any() and grad[1].any()
    step, grad = logits_step(backend, z, teacher, kind="kl_forward", coef=torch.tensor([0.0, 1.0]))
    assert step.loss.isfinite() and not grad[0].any()
    teacher[1] = -INF  # no distribution
    step, grad = logits_step(backend, z, teacher, kind="jsd")
    assert step.divergence[1] == 0 and not grad[1].any()


def test_metrics(backend: Backend):
    case, coef, mask = pair_case("one_tile"), weights(37), masks(37)
    step, _ = run(backend, case, coef=coef, mask=mask, normalizer=5.0, kind="kl_reverse")
    s, active = step.stats, backend.put((coef != 0) & mask)
    found = step.metrics.mean()
    want = {
        "divergence": s.divergence[active].mean(),
        "entropy": s.entropy[active].mean(),
        "logp_gap": (s.logp - s.teacher_logp)[active].mean(),
        "top1_agreement": s.top1_agreement[active].mean(),
        "loss": step.loss,
        "tokens": active.sum(),
    }
    assert set(found) == set(want)
    for name, value in want.items():
        assert abs(found[name] - float(value)) <= 1e-5 * (1 + abs(float(value))), name
    twice = step.metrics + step.metrics
    assert isinstance(twice, DistillMetrics) and twice["tokens"] == 2 * found["tokens"]
    assert abs(twice["entropy"] - found["entropy"]) < 1e-9
    plain, _ = run(backend, case, target=None, kind="jsd")
    assert plain.stats.logp is None and "logp_gap" not in plain.metrics.mean()
    with pytest.raises(KeyError, match="DistillMetrics: name must be one of divergence.*; got 'logp_gap'"):
        plain.metrics["logp_gap"]


def test_gradients_add_up_over_micro_batches(backend: Backend):
    case = pair_case()
    _, want = run(backend, case, kind="jsd", normalizer=37)
    parts = []
    for rows in (slice(0, 20), slice(20, 37)):
        part = case._replace(
            hidden=case.hidden[rows], teacher_hidden=case.teacher_hidden[rows], target=case.target[rows]
        )
        parts.append(run(backend, part, kind="jsd", normalizer=37)[1]["weight"])
    compare(parts[0] + parts[1], want["weight"], atol=2e-6 * float(want["weight"].abs().max()))


def test_two_runs_are_bitwise_equal(backend: Backend):
    case = pair_case("tiles", torch.bfloat16)
    runs = [run(backend, case, kind="jsd", coef=weights(37), memory_budget=300_000) for _ in range(2)]
    assert bits(runs[0][0].loss) == bits(runs[1][0].loss)
    assert bits(runs[0][0].divergence) == bits(runs[1][0].divergence)
    assert {k: bits(v) for k, v in runs[0][1].items()} == {k: bits(v) for k, v in runs[1][1].items()}


def test_a_row_of_logits_does_not_depend_on_its_batch(backend: Backend):
    z, teacher = logits_of(pair_case("one_tile"))
    whole, grad = logits_step(backend, z, teacher, kind="jsd")
    few, part = logits_step(backend, z[9:14], teacher[9:14], kind="jsd")
    assert bits(whole.divergence[9:14]) == bits(few.divergence) and bits(grad[9:14]) == bits(part)


def test_no_argument_is_written(backend: Backend):
    case = pair_case("tiles", torch.bfloat16)
    given = {name: backend.put(value) for name, value in case._asdict().items()} | {"coef": backend.put(weights(37))}
    for name in LEAVES:
        given[name] = given[name].detach().requires_grad_()
    assert_untouched(lambda: tokfuse.distill_step(kind="jsd", **given).loss.backward(), given)
    z, teacher = (backend.put(x.float()) for x in logits_of(case))
    given = {"logits": z.requires_grad_(), "teacher_logits": teacher}
    assert_untouched(lambda: tokfuse.distill_step(kind="jsd", **given).loss.backward(), given)


def test_a_second_backward(backend: Backend):
    case = pair_case("one_tile")
    hidden = backend.put(case.hidden).requires_grad_()
    rest = {n: backend.put(getattr(case, n)) for n in ("weight", "teacher_hidden", "teacher_weight")}
    loss = tokfuse.distill_step(hidden=hidden, kind="jsd", **rest).loss
    twice = torch.full((), 2.0, device=loss.device)
    first = torch.autograd.grad(loss, hidden, twice, retain_graph=True)[0].clone()
    assert bits(first) == bits(torch.autograd.grad(loss, hidden, twice)[0])
    with pytest.raises(RuntimeError, match="distill_step: backward ran twice"):
        torch.autograd.grad(loss, hidden)


def test_without_grad_mode(backend: Backend):
    case = pair_case("one_tile")
    with torch.no_grad():
        given = {n: backend.put(getattr(case, n)).requires_grad_(n == "weight") for n in TENSORS}
        step = tokfuse.distill_step(kind="jsd", **given)
    assert not step.loss.requires_grad and step.grad_weight is None and step.loss > 0


REFUSALS = {
    "neither": ({"hidden": None}, "input must be either logits= or hidden="),
    "both": ({"logits": torch.zeros(37, 700)}, "input must be either.*got both"),
    "coef": ({"coef": torch.zeros(36)}, "coef must be of shape"),
    "coef gradient": ({"coef": torch.zeros(37).requires_grad_()}, "coef must be detached"),
    "normalizer": ({"normalizer": 0.0}, "normalizer must be"),
    "word": ({"normalizer": "mean"}, "normalizer must be None, a number"),
    "kind": ({"kind": "kl"}, "kind must be one of"),
    "no weight": ({"weight": None}, "weight must be given with hidden="),
    "target": ({"target": torch.full((37,), 700)}, r"^distill_step: target must be in \[0, 700\)"),
    "teacher temperature": ({"teacher_temperature": torch.zeros(37)}, "^distill_step: teacher_temperature must be > 0"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str):
    case = pair_case("one_tile")
    given = {n: getattr(case, n) for n in ("hidden", "weight", "teacher_hidden", "teacher_weight")}
    changed, text = REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        tokfuse.distill_step(**(given | {"kind": "jsd"} | changed))


LOGIT_REFUSALS = {
    "weight": ({"weight": torch.zeros(5, 3)}, "weight must be left out with logits="),
    "budget": ({"memory_budget": 5}, "memory_budget must be left out with logits="),
    "no teacher": ({"teacher_logits": None}, "teacher_logits must be given with logits="),
    "hidden teacher": (
        {"teacher_hidden": torch.zeros(2, 3), "teacher_weight": torch.zeros(5, 3)},
        "teacher must be teacher_hidden= with.*got both",
    ),
    "dtype": ({"teacher_logits": torch.zeros(2, 5).bfloat16()}, "teacher_logits must be torch.float32 like logits"),
    "shape": ({"teacher_logits": torch.zeros(2, 6)}, "teacher_logits must be of shape"),
    "target": ({"target": torch.tensor([0, 5])}, "target must be in"),
}


@pytest.mark.parametrize("name", LOGIT_REFUSALS)
def test_refusals_of_logits(name: str):
    given = {"logits": torch.zeros(2, 5), "teacher_logits": torch.zeros(2, 5), "kind": "jsd"}
    changed, text = LOGIT_REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        tokfuse.distill_step(**(given | changed))


PEAK = """
t = torch.randn(tokens, 48)
v = torch.randn(30_000, 48)
tokfuse.distill_step(
    hidden=h, weight=w, teacher_hidden=t, teacher_weight=v, kind="jsd", memory_budget=8 << 20
).loss.backward()
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """1024 rows of 30000 float32 logits of two sides are 234 MiB; the workspace holds 8 MiB of them."""
    assert peak_growth(PEAK) < 40
