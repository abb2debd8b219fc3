"""Two heads on the device kernels, run on the CPU: what the chunks add to the kernels of the simple ops.

Triton in its interpreter, CUDA on the host. Small cases, each with every part of the path; the grid of
options runs on a GPU and on the CPU kernels (tests/ops/test_linear_paired_divergence.py).
"""

from dataclasses import replace

import pytest
import torch
from harness import Backend, backends, bits, compare, half_ulp
from pair_cases import KINDS, PairCase, logits_of, pair_truth

import tokfuse
from tokfuse.runtime.lm_head import device_head

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 5, 8, 12, 150
LEAVES = ("hidden", "weight", "bias")
ROWS = torch.linspace(0.7, 1.6, TOKENS)


@pytest.fixture(params=[p for p in backends("linear_paired_divergence") if p.id in ("triton", "cuda")])
def backend(request):
    with request.param.forced():
        yield request.param


def case_of(dtype: torch.dtype) -> PairCase:
    gen = torch.Generator().manual_seed(6)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=gen).mul(scale).to(dtype)

    return PairCase(
        normal(TOKENS, HIDDEN),
        normal(VOCAB, HIDDEN, scale=0.5),
        normal(VOCAB),
        normal(TOKENS, TEACHER_HIDDEN),
        normal(VOCAB, TEACHER_HIDDEN, scale=0.4),
        normal(VOCAB),
        torch.randint(0, VOCAB, (TOKENS,), generator=gen),
    )


def check(backend: Backend, dtype: torch.dtype, kind: str, rows: int, logits: bool = False, **options):
    """Every output and gradient of linear_paired_divergence against float64 formulas, in chunks of `rows`."""
    case = case_of(dtype)
    at = torch.arange(TOKENS)
    c = tuple(torch.where(at % 4 == shift, 0.0, torch.cos(at + shift)) for shift in (1.0, 1.0, 2.0))
    z, teacher = logits_of(case)
    given = {n: backend.put(x) for n, x in case._asdict().items()}
    if logits:
        teacher = teacher.to(dtype)
        given |= {"teacher_hidden": None, "teacher_weight": None, "teacher_bias": None}
        given["teacher_logits"] = backend.put(teacher)
    leaves = {n: given[n].requires_grad_() for n in LEAVES}
    own = {n: backend.put(x) for n, x in options.items()}
    budget = rows * (11 * 160 + 8 * (HIDDEN + TEACHER_HIDDEN) + 64)
    out = tokfuse.linear_paired_divergence(**given, **KINDS[kind], **own, memory_budget=budget)
    torch.autograd.backward([out.divergence, out.entropy, out.logp], [backend.put(x) for x in c])
    truth = pair_truth(z, teacher, case.target, c, KINDS[kind], **options)
    for name, want in truth.stats.items():
        compare(getattr(out, name), want, atol=4e-6, rtol=4e-6, what=name)
    grads, scales = truth.through_head(case)
    for name, leaf in leaves.items():
        atol = 1e-5 * scales[name]
        if dtype != torch.float32:
            atol = atol + half_ulp(grads[name], dtype)
        compare(leaf.grad, grads[name], atol=atol, what=name)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind(kind: str, backend: Backend):
    check(backend, torch.float32, kind, 2)


OPTIONS = {
    "bfloat16": {"dtype": torch.bfloat16},
    "one transform": {"temperature": 0.8, "teacher_temperature": 0.8, "softcap": 6.0, "teacher_softcap": 6.0},
    "rows": {"temperature": ROWS, "teacher_temperature": 1.2, "mask": torch.arange(TOKENS) != 3},
    "softcaps": {"softcap": 5.0, "teacher_softcap": 8.0, "teacher_temperature": ROWS},
    "teacher softcap": {"teacher_softcap": 4.0, "logit_scale": 0.7},
    "logits": {"logits": True, "dtype": torch.bfloat16, "teacher_logit_scale": 0.5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, backend: Backend):
    options = {"dtype": torch.float32} | OPTIONS[name]
    check(backend, options.pop("dtype"), "jsd", 3, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [{}, {"softcap": 5.0, "teacher_temperature": 0.8}], ids=["one", "two"])
def test_step_from_logits(options: dict, dtype: torch.dtype, backend: Backend):
    case = case_of(torch.float32)
    z, teacher = (x.to(dtype) for x in logits_of(case))
    z[2], teacher[2] = float("nan"), float("inf")
    coef = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.3])
    leaf = backend.put(z).requires_grad_()
    step = tokfuse.distill_step(
        logits=leaf,
        teacher_logits=backend.put(teacher),
        target=backend.put(case.target),
        coef=backend.put(coef),
        kind="kl_reverse",
        normalizer=2.0,
        **options,
    )
    step.loss.backward()
    z, teacher = z.detach().clone(), teacher.clone()
    z[2], teacher[2] = 0.0, 0.0
    c, none = coef.double() / 2.0, torch.zeros(TOKENS)
    truth = pair_truth(z, teacher, case.target, (c, none, none), KINDS["kl_reverse"], mask=coef != 0, **options)
    for name, want in truth.stats.items():
        compare(getattr(step.stats, name), want, atol=4e-6, rtol=4e-6, what=name)
    bound = 1e-9 + 1e-5 * truth.terms.amax(-1, keepdim=True) + half_ulp(truth.grad_logits, dtype)
    compare(leaf.grad, truth.grad_logits, atol=bound, what="gradient")


def test_a_captured_step_masks_what_it_cannot_leave_out(backend: Backend, monkeypatch):
    """In a CUDA graph no row count reaches the host: every row enters, those without a weight as zeros."""
    case, coef = case_of(torch.float32), torch.tensor([1.0, 0.0, 0.5, 0.0, 2.0])
    case.hidden[1], case.teacher_hidden[3] = float("nan"), float("nan")

    def run():
        given = {n: backend.put(x).clone() for n, x in case._asdict().items()}
        leaves = [given[n].requires_grad_() for n in LEAVES]
        step = tokfuse.distill_step(kind="jsd", coef=backend.put(coef), **given)
        step.loss.backward()
        return [step.loss.detach(), step.divergence, *(x.grad for x in leaves)]

    want = run()
    monkeypatch.setattr(device_head, "capturing", lambda x: True)
    got = run()
    for a, b in zip(got, want, strict=True):
        compare(a, b, atol=1e-6 * float(b.abs().max()))
    assert bits(got[2][1]) == bits(torch.zeros(HIDDEN))


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("source", ["hidden", "logits", "captured"])
def test_a_policy_term(source: str, level: str, backend: Backend, monkeypatch):
    """Against the reference: tokens of both sides, of the student alone, of no gradient, masked ones."""
    case = case_of(torch.float32)
    given = {"advantage": torch.tensor([1.0, -0.7, 0.0, 0.4, 1.0]), "old_logp": torch.full((TOKENS,), -5.0)}
    given |= {"objective": tokfuse.Objective(level=level), "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
    given |= {"coef": torch.tensor([0.5, 0.0, 0.0, 1.0, 1.0]), "mask": torch.arange(TOKENS) != 4, "normalizer": 3.0}
    given |= {"target": case.target, "kind": "jsd"}
    tensors = {n: getattr(case, n) for n in PairCase._fields[:-1]}
    if source == "logits":
        tensors = dict(zip(("logits", "teacher_logits"), (x.float() for x in logits_of(case)), strict=True))
    if source == "captured":
        monkeypatch.setattr(device_head, "capturing", lambda x: True)
    names = ("logits",) if source == "logits" else LEAVES

    def run(name: str, put):
        with tokfuse.backend(name):
            own = {n: put(x).detach().clone() for n, x in tensors.items()}
            leaves = [own[n].requires_grad_() for n in names]
            budget = {} if source == "logits" else {"memory_budget": 5_000}
            step = tokfuse.distill_step(**own, **{n: put(x) for n, x in given.items()}, **budget)
            step.loss.backward()
            stats = [step.loss.detach(), step.policy.token_loss, *step.stats]
            return stats, [x.grad for x in leaves], step.policy.metrics.mean()

    (got, grads, metrics), (want, truth, of_reference) = run(backend.name, backend.put), run("reference", lambda x: x)
    for a, b in zip(got, want, strict=True):
        compare(a, b, atol=8e-6, rtol=8e-6)
    for a, b, name in zip(grads, truth, names, strict=True):
        compare(a, b, atol=1e-5 * float(b.abs().max()), what=name)
    assert metrics == pytest.approx(of_reference, rel=1e-4, abs=1e-4)


CLASSES = torch.linspace(0.0, 2.0, VOCAB)
CROSS_ENTROPIES = {
    "plain": tokfuse.CrossEntropy(torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0]), CLASSES),
    "z-loss": tokfuse.CrossEntropy(z_loss=0.1, ignore_index=3),
    "smoothed": tokfuse.CrossEntropy(label_smoothing=0.2),
    "everything": tokfuse.CrossEntropy(torch.tensor([1.0, 0.5, 0.0, -1.0, 2.0]), CLASSES, 0.2, 0.1, 3),
}


@pytest.mark.parametrize("source", ["hidden", "logits", "captured"])
@pytest.mark.parametrize(
    ("name", "level"),
    [*((name, None) for name in CROSS_ENTROPIES), ("everything", "token"), ("everything", "sequence")],
)
def test_a_cross_entropy(level: str | None, name: str, source: str, backend: Backend, monkeypatch):
    """Against the reference, alone and with a policy term: tokens of both sides, of the student alone, masked ones."""
    case = case_of(torch.float32)
    case.target[1] = 3
    given = {"coef": torch.tensor([0.5, 0.3, 0.0, 0.0, 1.0]), "mask": torch.arange(TOKENS) != 4, "normalizer": "batch"}
    given |= {"target": case.target, "kind": "jsd", "softcap": 6.0, "temperature": ROWS}
    if level is not None:
        given |= {"advantage": torch.tensor([1.0, -0.7, 0.0, 0.4, 1.0]), "old_logp": torch.full((TOKENS,), -5.0)}
        given |= {"objective": tokfuse.Objective(level=level), "cu_seqlens": torch.tensor([0, 2, 5], dtype=torch.int32)}
    tensors = {n: getattr(case, n) for n in PairCase._fields[:-1]}
    if source == "logits":
        tensors = dict(zip(("logits", "teacher_logits"), (x.float() for x in logits_of(case)), strict=True))
    if source == "captured":
        monkeypatch.setattr(device_head, "capturing", lambda x: True)
    names = ("logits",) if source == "logits" else LEAVES
    term = CROSS_ENTROPIES[name]

    def run(name: str, put):
        with tokfuse.backend(name):
            own = {n: put(x).detach().clone() for n, x in tensors.items()}
            leaves = [own[n].requires_grad_() for n in names]
            budget = {} if source == "logits" else {"memory_budget": 5_000}
            of_classes = replace(term, coef=put(term.coef), class_weight=put(term.class_weight))
            rest = {n: put(x) for n, x in given.items()} | budget
            step = tokfuse.distill_step(**own, **rest, cross_entropy=of_classes)
            step.loss.backward()
            c = step.cross_entropy
            return [step.loss.detach(), c.loss, c.token_loss, c.loss_sum, c.count, *step.stats], [
                x.grad for x in leaves
            ]

    (got, grads), (want, truth) = run(backend.name, backend.put), run("reference", lambda x: x)
    for a, b in zip(got, want, strict=True):
        compare(a, b, atol=8e-6, rtol=8e-6)
    for a, b, leaf in zip(grads, truth, names, strict=True):
        compare(a, b, atol=1e-5 * float(b.abs().max()), what=leaf)
