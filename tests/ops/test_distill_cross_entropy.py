"""distill_step with a cross entropy: torch's loss, added to the divergence and to the policy term.

The truth is the step without a cross entropy by the reference in float64, plus torch's cross entropy in float64. Values
agree within 1e-5, gradients within 1e-5 of their largest entry: the bounds of the ops whose gradients add up.
"""

import dataclasses
import inspect
from unittest import mock

import numpy as np
import pytest
import torch
from harness import Backend, backends, bits, compare, half_ulp
from pair_cases import KINDS, PairCase, logits_of, pair_case

import tokfuse
from tokfuse import KL, CrossEntropy, Objective
from tokfuse.runtime.lm_head import cpu_head, cpu_pair

LEAVES = ("hidden", "weight", "bias")
TENSORS = PairCase._fields[:-1]
TOKENS = 37
AT = torch.arange(TOKENS)
MASK = AT % 9 != 4
COEF = torch.where(AT % 4 == 1, 0.0, torch.cos(AT * 1.3) + 0.5)
CLASSES = torch.where(AT % 3 == 2, 0.0, torch.sin(AT * 0.7) + 1.2)
SEQUENCES = torch.tensor([0, 11, 23, TOKENS], dtype=torch.int32)


@pytest.fixture(params=backends("linear_paired_divergence", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def vocab() -> int:
    return pair_case("one_tile").weight.shape[0]


def class_weight() -> torch.Tensor:
    """Some classes with weight 0."""
    at = torch.arange(vocab())
    return torch.where(at % 7 == 3, 0.0, torch.cos(at * 0.3) + 1.5)


def labels() -> torch.Tensor:
    """Of the tokens, some to ignore."""
    return torch.where(AT % 8 == 5, -100, pair_case("one_tile").target)


def policy(**objective) -> dict:
    gen = torch.Generator().manual_seed(2)
    advantage = torch.where(AT % 3 == 0, 0.0, torch.randn(TOKENS, generator=gen))
    old_logp = -5.0 + 0.3 * torch.randn(TOKENS, generator=gen)
    return {"advantage": advantage, "old_logp": old_logp, "objective": Objective(**objective)}


TERMS = {
    "plain": lambda: CrossEntropy(),
    "smoothed": lambda: CrossEntropy(label_smoothing=0.2),
    "only smoothed": lambda: CrossEntropy(label_smoothing=1.0),
    "z-loss": lambda: CrossEntropy(z_loss=0.05),
    "weights": lambda: CrossEntropy(class_weight=class_weight()),
    "smoothed weights": lambda: CrossEntropy(class_weight=class_weight().bfloat16(), label_smoothing=0.1),
    "number": lambda: CrossEntropy(0.3, label_smoothing=np.float32(0.1), z_loss=np.float64(1e-2)),
    "everything": lambda: CrossEntropy(CLASSES, class_weight(), 0.1, 0.02),
    "ignored": lambda: CrossEntropy(label_smoothing=0.1, ignore_index=pair_case("one_tile").target[0].item()),
}


def scaled(z: torch.Tensor, temperature=1.0, softcap=None, logit_scale=1.0) -> torch.Tensor:
    u = z * logit_scale
    u = u if softcap is None else softcap * torch.tanh(u / softcap)
    return u / (temperature.double()[:, None] if isinstance(temperature, torch.Tensor) else temperature)


def truth(case: PairCase, source: str, term: CrossEntropy, given: dict, **keywords):
    """(step without a cross entropy, loss of the cross entropy, its token losses, {name: gradient of both})."""
    wide = {n: getattr(case, n).double() for n in TENSORS}
    z, teacher = logits_of(case)
    student = {n: wide[n].requires_grad_() for n in LEAVES} if source == "hidden" else {"logits": z.requires_grad_()}
    of_teacher = {n: wide[n] for n in TENSORS if n.startswith("teacher")} if source == "hidden" else {}
    if source == "logits":
        of_teacher = {"teacher_logits": teacher}
    keep = (case.target != term.ignore_index) & keywords["mask"]
    with tokfuse.backend("reference"):
        keywords = keywords | {"mask": keep, "target": case.target.clamp_min(0)}
        step = tokfuse.distill_step(**student, **of_teacher, **keywords, **given)
    if source == "hidden":
        z = wide["hidden"] @ wide["weight"].t() + wide["bias"]
    u = scaled(z, **{n: keywords[n] for n in ("temperature", "softcap", "logit_scale") if n in keywords})
    w = None if term.class_weight is None else term.class_weight.double()
    target = torch.where(keep, case.target, -100)
    token = torch.nn.functional.cross_entropy(
        u, target, w, reduction="none", label_smoothing=float(term.label_smoothing)
    )
    token = token + torch.where(keep, float(term.z_loss) * u.logsumexp(-1).square(), 0.0)
    coef = torch.as_tensor(term.coef).double() * keep
    count = (torch.ones(u.shape[1]) if w is None else w)[case.target.clamp_min(0)][keep].sum()
    normalizer = keywords.get("normalizer")
    loss = (coef * token).sum() / (count if normalizer == "batch" else normalizer or 1.0)
    (step.loss + loss).backward()
    return step, loss, torch.where(coef != 0, token, 0.0), {n: x.grad for n, x in student.items()}, count


def fused(backend: Backend, case: PairCase, source: str, term: CrossEntropy, given: dict, dtype=None, **keywords):
    """(step, {name: gradient})."""
    tensors = {n: backend.put(getattr(case, n)).detach() for n in TENSORS}
    if source == "logits":
        z, teacher = (x.to(dtype or torch.float32) for x in logits_of(case))
        tensors = {"logits": backend.put(z).detach(), "teacher_logits": backend.put(teacher)}
    leaves = {n: tensors[n].requires_grad_() for n in (LEAVES if source == "hidden" else ("logits",))}
    keywords = {n: backend.put(x) for n, x in (keywords | given).items()}
    put = {f.name: backend.put(getattr(term, f.name)) for f in dataclasses.fields(term)}
    keywords |= {"target": backend.put(case.target), "cross_entropy": CrossEntropy(**put)}
    step = tokfuse.distill_step(**tensors, **keywords)
    held = {n: getattr(step, f"grad_{n}").clone() for n in leaves}
    step.loss.backward()
    assert all(bits(held[n]) == bits(x.grad) for n, x in leaves.items())
    return step, {n: x.grad for n, x in leaves.items()}


def check(backend: Backend, source: str, term: CrossEntropy, given: dict | None = None, case=None, **options):
    case, given = case or pair_case("one_tile")._replace(target=labels()), given or {}
    common = {"kind": "kl_reverse", "coef": COEF, "mask": MASK, "normalizer": 7.0} | options
    without, loss, token_loss, grads, count = truth(case, source, term, given, **common)
    step, found = fused(backend, case, source, term, given, **common)
    close = {"atol": 2e-5, "rtol": 1e-5}
    compare(step.loss, without.loss + loss, **close, what="loss")
    compare(step.cross_entropy.loss, loss, **close, what="loss of the cross entropy")
    compare(step.cross_entropy.token_loss, token_loss, **close, what="token losses")
    compare(step.cross_entropy.count, count, rtol=1e-6, what="count")
    scale = float(count) if common["normalizer"] == "batch" else common["normalizer"] or 1.0
    compare(step.cross_entropy.loss_sum, loss * scale, atol=1e-4, rtol=1e-5, what="loss_sum")
    for field in ("divergence", "loss_sum", "count"):
        compare(getattr(step, field), getattr(without, field), atol=1e-4, rtol=1e-5, what=field)
    for field in ("teacher_logp", "top1_agreement"):
        compare(getattr(step.stats, field), getattr(without.stats, field), **close, what=field)
    want = without.metrics.mean() | {"loss": float(step.loss.detach())}
    assert step.metrics.mean() == pytest.approx(want, rel=1e-4, abs=1e-4)
    if given:
        for field in ("loss", "token_loss", "loss_sum", "count"):
            compare(getattr(step.policy, field), getattr(without.policy, field), **close, what=f"policy {field}")
    for leaf, grad in grads.items():
        compare(found[leaf], grad, atol=1e-5 * float(grad.abs().max()), what=f"grad_{leaf}")
    return step


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("name", TERMS)
def test_equals_torch(name: str, source: str, backend: Backend):
    check(backend, source, TERMS[name](), case=pair_case("one_tile") if name == "ignored" else None)


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kl_reverse"])
def test_every_divergence(kind: str, source: str, backend: Backend):
    check(backend, source, TERMS["everything"](), normalizer="batch", **KINDS[kind])


POLICIES = {
    "token": lambda: policy(kl=KL(coef=0.1), entropy_coef=0.02) | {"ref_logp": torch.full((TOKENS,), -5.2)},
    "sequence": lambda: policy(level="sequence", entropy_coef=0.01) | {"cu_seqlens": SEQUENCES},
    "on policy": lambda: policy() | {"old_logp": None},
}


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("name", POLICIES)
def test_with_a_policy_term(name: str, source: str, backend: Backend):
    check(backend, source, TERMS["everything"](), POLICIES[name](), normalizer="batch")


OPTIONS = {
    "no divergence": {"coef": 0.0},
    "no normalizer": {"normalizer": None},
    "batch": {"normalizer": "batch", "coef": 0.5},
    "softcaps": {"softcap": 5.0, "teacher_temperature": 1.5, "logit_scale": 0.8},
    "temperatures": {"temperature": torch.linspace(0.6, 1.8, TOKENS), "teacher_temperature": 0.8},
}


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, source: str, backend: Backend):
    check(backend, source, TERMS["everything"](), **OPTIONS[name])


@pytest.mark.parametrize("budget", [1, 40_000])
@pytest.mark.parametrize("given", [{}, policy(entropy_coef=0.02)], ids=["alone", "policy"])
def test_chunks(given: dict, budget: int, backend: Backend):
    check(backend, "hidden", TERMS["everything"](), given, memory_budget=budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_logits(dtype: torch.dtype, backend: Backend):
    z, teacher = (x.to(dtype).double() for x in logits_of(pair_case("one_tile")))
    case, term = pair_case("one_tile"), TERMS["everything"]()
    common = {"kind": "jsd", "coef": COEF, "mask": MASK, "normalizer": 7.0}
    with mock.patch(f"{__name__}.logits_of", lambda _: (z, teacher)):
        _, loss, _, grads, _ = truth(case, "logits", term, {}, **common)
        step, found = fused(backend, case, "logits", term, {}, dtype, **common)
    compare(step.cross_entropy.loss, loss, atol=2e-5, rtol=1e-5)
    # On a GPU the two parts of the gradient are rounded before they are added.
    bound = 1e-5 * float(grads["logits"].abs().max()) + 3 * half_ulp(grads["logits"], dtype)
    if backend.name in ("cpu", "reference"):
        bound = bound - 2 * half_ulp(grads["logits"], dtype)
    compare(found["logits"], grads["logits"], atol=bound)


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_a_token_uses_only_what_it_needs(source: str, backend: Backend):
    """The teacher at tokens without a divergence, and all values at tokens that do not count, are never used."""
    case, term = pair_case("one_tile")._replace(target=labels()), TERMS["everything"]()
    keywords = {"coef": COEF, "mask": MASK, "normalizer": 7.0, "kind": "jsd"}
    keep = MASK & (case.target != -100)

    def run(spoil: bool):
        z, teacher = logits_of(case)
        tensors = {n: getattr(case, n).clone() for n in TENSORS}
        if source == "logits":
            tensors = {"logits": z.float(), "teacher_logits": teacher.float()}
        if spoil:
            own, other = (tensors[n] for n in (source, f"teacher_{source}"))
            own[~keep], other[(COEF == 0) | ~keep] = float("nan"), float("nan")
        tensors = {n: backend.put(x) for n, x in tensors.items()}
        leaf = tensors[source].requires_grad_()
        put = {f.name: backend.put(getattr(term, f.name)) for f in dataclasses.fields(term)}
        rest = {n: backend.put(x) for n, x in keywords.items()}
        rest |= {"target": backend.put(case.target), "cross_entropy": CrossEntropy(**put)}
        step = tokfuse.distill_step(**tensors, **rest)
        step.loss.backward()
        return step.loss.detach(), step.divergence, step.stats.logp, step.cross_entropy.token_loss, leaf.grad

    for got, want in zip(run(True), run(False), strict=True):
        assert bits(got) == bits(want)


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_float64(source: str):
    """The reference computes in float64: everything agrees to its rounding."""
    case, term = pair_case("one_tile")._replace(target=labels()), TERMS["everything"]()
    case = PairCase(*(x.double() if x.is_floating_point() else x for x in case))
    common = {"kind": "kl_forward", "coef": COEF, "mask": MASK, "normalizer": "batch"}
    reference = next(p.values[0] for p in backends("linear_paired_divergence") if p.id == "reference")
    with reference.forced():
        without, loss, token_loss, grads, _ = truth(case, source, term, {}, **common)
        step, found = fused(reference, case, source, term, {}, torch.float64, **common)
    assert step.loss.dtype == torch.float64
    compare(step.loss, without.loss + loss, rtol=1e-12)
    compare(step.cross_entropy.token_loss, token_loss, rtol=1e-12, atol=1e-13)
    for name, grad in grads.items():
        compare(found[name], grad, atol=1e-12 * float(grad.abs().max()))


def test_without_grad_mode(backend: Backend):
    case, common = pair_case("one_tile")._replace(target=labels()), {"kind": "jsd", "coef": COEF, "mask": MASK}
    want, _ = fused(backend, case, "hidden", TERMS["smoothed"](), {}, **common)
    with torch.no_grad():
        tensors = {n: backend.put(getattr(case, n)).requires_grad_(n == "weight") for n in TENSORS}
        rest = {n: backend.put(x) for n, x in common.items()} | {"target": backend.put(case.target)}
        step = tokfuse.distill_step(**tensors, **rest, cross_entropy=TERMS["smoothed"]())
    assert not step.loss.requires_grad and step.grad_weight is None
    compare(step.loss, want.loss.detach(), rtol=1e-5, atol=1e-5)


def test_no_token_that_counts(backend: Backend):
    case = pair_case("one_tile")._replace(target=torch.full((TOKENS,), -100))
    step, grads = fused(backend, case, "hidden", TERMS["everything"](), {}, kind="jsd", normalizer="batch")
    assert float(step.loss.detach()) == 0.0 and float(step.cross_entropy.count) == 0.0
    assert not any(x.any() for x in grads.values())


def test_excluded_logits(backend: Backend):
    """A class of logit -inf: as in torch its cross entropy is infinite with label smoothing, and finite without."""
    z = torch.zeros(2, 5)
    z[:, 3] = float("-inf")
    for smoothing, want in ((0.0, torch.full((2,), 4.0).log()), (0.1, torch.full((2,), float("inf")))):
        leaf = backend.put(z).requires_grad_()
        term = CrossEntropy(label_smoothing=smoothing)
        target = backend.put(torch.tensor([0, 1]))
        step = tokfuse.distill_step(
            logits=leaf, teacher_logits=leaf.detach(), kind="jsd", target=target, cross_entropy=term
        )
        compare(step.cross_entropy.token_loss, want, atol=1e-6)


def test_no_gemm_and_no_read_runs_twice(monkeypatch):
    """The coefficients of the cross entropy do not depend on the statistics: no pass before the gradient."""
    cpu = next(p.values[0] for p in backends("linear_paired_divergence") if p.id == "cpu")
    reads = []
    forward = cpu_pair.cpu_rows.token_stats_fwd
    monkeypatch.setattr(cpu_pair.cpu_rows, "token_stats_fwd", lambda *a, **k: reads.append(1) or forward(*a, **k))
    logits, rows = cpu_head.Head.logits, []

    def counted(self, hidden, buffer, start):
        rows.append((self.weight.shape[1], hidden.shape[0]))
        return logits(self, hidden, buffer, start)

    monkeypatch.setattr(cpu_head.Head, "logits", counted)
    case = pair_case("one_tile")
    with cpu.forced():
        for source in ("hidden", "logits"):
            fused(cpu, case, source, TERMS["everything"](), {}, kind="jsd", coef=COEF, mask=MASK)
    assert not reads
    student = sum(n for size, n in rows if size == case.weight.shape[1])
    teacher = sum(n for size, n in rows if size == case.teacher_weight.shape[1])
    assert student == int((MASK & ((COEF != 0) | (CLASSES != 0))).sum()) and teacher == int((MASK & (COEF != 0)).sum())


def test_options_have_the_names_and_defaults_of_linear_cross_entropy():
    known = inspect.signature(tokfuse.linear_cross_entropy).parameters
    options = {f.name: f.default for f in dataclasses.fields(CrossEntropy)}
    assert options.pop("coef") == 1.0
    assert options == {name: known[name].default for name in options}


def test_without_a_cross_entropy_the_result_has_none():
    case = pair_case("one_tile")
    step = tokfuse.distill_step(**{n: getattr(case, n) for n in TENSORS}, kind="jsd")
    assert step.cross_entropy is None


REFUSALS = {
    "type": ({"cross_entropy": 0.5}, TypeError, "cross_entropy must be a tokfuse.CrossEntropy; got float"),
    "target": ({"target": None}, ValueError, "target must be given with cross_entropy="),
    "probabilities": ({"target": torch.rand(TOKENS, 4)}, ValueError, "target must be class indices"),
    "coef": ({"cross_entropy": CrossEntropy(float("nan"))}, ValueError, "cross_entropy.coef must be"),
    "coef of tokens": (
        {"cross_entropy": CrossEntropy(torch.ones(3))},
        ValueError,
        "cross_entropy.coef must be of shape",
    ),
    "weights": (
        {"cross_entropy": CrossEntropy(class_weight=torch.ones(3))},
        ValueError,
        "cross_entropy.class_weight must be of shape",
    ),
    "smoothing": (
        {"cross_entropy": CrossEntropy(label_smoothing=1.5)},
        ValueError,
        "cross_entropy.label_smoothing must be a finite number in",
    ),
    "z-loss": (
        {"cross_entropy": CrossEntropy(z_loss=-1.0)},
        ValueError,
        "cross_entropy.z_loss must be a finite number",
    ),
    "ignore": (
        {"cross_entropy": CrossEntropy(ignore_index=0.5)},
        ValueError,
        "cross_entropy.ignore_index must be an int",
    ),
    "outside": ({"target": torch.full((TOKENS,), -1)}, ValueError, "target must be in"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str):
    case = pair_case("one_tile")
    given = {n: getattr(case, n) for n in (*TENSORS, "target")} | {"kind": "jsd", "cross_entropy": CrossEntropy()}
    changed, error, text = REFUSALS[name]
    with tokfuse.backend("reference"), pytest.raises(error, match=text):
        tokfuse.distill_step(**(given | changed))
