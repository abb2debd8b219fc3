"""distill_step with an objective: equal to policy_step + distill_step, with no GEMM run twice.

The truth is the sum of the two steps by the reference in float64. Values agree within 1e-5, gradients within 1e-5 of
their largest entry: the bounds of the two ops, whose gradients add up.
"""

import inspect
from unittest import mock

import numpy as np
import pytest
import torch
from harness import Backend, backends, bits, compare
from pair_cases import KINDS, PairCase, logits_of, pair_case

import tokfuse
from tokfuse import KL, Objective, PPOClip
from tokfuse.runtime.lm_head import cpu_head
from tokfuse.runtime.policy.inputs import PolicyInputs

LEAVES = ("hidden", "weight", "bias")
TENSORS = PairCase._fields[:-1]
TOKENS = 37
AT = torch.arange(TOKENS)
MASK = AT % 9 != 4
COEF = torch.where(AT % 4 == 1, 0.0, torch.cos(AT * 1.3) + 0.5)


@pytest.fixture(params=backends("linear_paired_divergence", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def policy(**objective):
    """Arguments of policy_step: tokens without advantage, clipped ones, three sequences."""
    gen = torch.Generator().manual_seed(2)
    advantage = torch.where(AT % 3 == 0, 0.0, torch.randn(TOKENS, generator=gen))
    z, _ = logits_of(pair_case("one_tile"))
    logp = torch.log_softmax(z, -1).gather(1, pair_case("one_tile").target[:, None])[:, 0]
    old_logp = (logp + 0.3 * torch.randn(TOKENS, generator=gen)).float()
    return {"advantage": advantage, "old_logp": old_logp, "objective": Objective(**objective)}


SEQUENCES = torch.tensor([0, 11, 23, TOKENS], dtype=torch.int32)
POLICIES = {
    "token": lambda: policy(shape=PPOClip(low=0.2, high=0.28)),
    "kl and entropy": lambda: (
        policy(kl=KL(coef=0.1), entropy_coef=0.02)
        | {"ref_logp": policy()["old_logp"] + 0.1, "kl_weight": (AT % 2).float(), "sampler_logp": policy()["old_logp"]}
    ),
    "anchor": lambda: (
        policy(anchor=KL(coef=0.3, estimator="k2"))
        | {"anchor_logp": policy()["old_logp"] - 0.2, "anchor_weight": (AT % 4 == 1).float() * 1.5}
    ),
    "weights": lambda: policy() | {"token_weight": (AT % 5 != 0).float() * 0.7},
    "sequence means": lambda: (
        policy(aggregation="seq_mean_token_mean")
        | {"cu_seqlens": SEQUENCES, "advantage": torch.tensor([1.0, 0.0, -0.5]), "advantage_level": "sequence"}
    ),
    "sequence ratio": lambda: policy(level="sequence", entropy_coef=0.01) | {"cu_seqlens": SEQUENCES},
    "on policy": lambda: policy() | {"old_logp": None},
}


def composed(case: PairCase, source: str, kind: dict, given: dict, *, coef, mask, normalizer, **options):
    """(policy step, distillation step, {name: gradient of both}) by the reference in float64."""
    wide = {n: getattr(case, n).double() for n in TENSORS}
    z, teacher = (x.double() for x in logits_of(case))
    student = {n: wide[n].requires_grad_() for n in LEAVES} if source == "hidden" else {"logits": z.requires_grad_()}
    of_teacher = {n: wide[n] for n in TENSORS if n.startswith("teacher")} if source == "hidden" else {}
    if source == "logits":
        of_teacher = {"teacher_logits": teacher}
    shared = {"target": case.target, "mask": mask, "normalizer": normalizer}
    own = {n: x for n, x in options.items() if not n.startswith("teacher")}
    with tokfuse.backend("reference"):
        of_policy = tokfuse.policy_step(**student, **shared, **given, **own)
        distilled = tokfuse.distill_step(**student, **of_teacher, **shared, **kind, coef=coef, **options)
        (of_policy.loss + distilled.loss).backward()
    return of_policy, distilled, {n: x.grad for n, x in student.items()}


def fused(backend: Backend, case: PairCase, source: str, kind: dict, given: dict, **keywords):
    """(step, {name: gradient})."""
    tensors = {n: backend.put(getattr(case, n)).detach() for n in TENSORS}
    if source == "logits":
        z, teacher = logits_of(case)
        tensors = {"logits": backend.put(z.float()).detach(), "teacher_logits": backend.put(teacher.float())}
    leaves = {n: tensors[n].requires_grad_() for n in (LEAVES if source == "hidden" else ("logits",))}
    keywords = {n: backend.put(x) for n, x in (keywords | given).items()}
    step = tokfuse.distill_step(**tensors, **kind, target=backend.put(case.target), **keywords)
    held = {n: getattr(step, f"grad_{n}").clone() for n in leaves}
    step.loss.backward()
    assert all(bits(held[n]) == bits(x.grad) for n, x in leaves.items())
    return step, {n: x.grad for n, x in leaves.items()}


def check(backend: Backend, source: str, name: str, kind: str = "kl_reverse", *, coef=COEF, normalizer=7.0, **options):
    case, given = pair_case("one_tile"), POLICIES[name]()
    common = {"coef": coef, "mask": MASK, "normalizer": normalizer} | options
    of_policy, distilled, grads = composed(case, source, KINDS[kind], given, **common)
    step, found = fused(backend, case, source, KINDS[kind], given, **common)
    close = {"atol": 1e-5, "rtol": 1e-5}
    compare(step.loss, of_policy.loss + distilled.loss, **close, what="loss")
    compare(step.divergence, distilled.divergence, **close, what="divergence")
    compare(step.loss_sum, distilled.loss_sum, atol=1e-4, what="loss_sum")
    for field in ("loss", "token_loss", "loss_sum", "count"):
        compare(getattr(step.policy, field), getattr(of_policy, field), atol=2e-5, rtol=1e-5, what=f"policy {field}")
    want = of_policy.metrics.mean() | {"loss": step.policy.metrics["loss"]}
    assert step.policy.metrics.mean() == pytest.approx(want, rel=1e-4, abs=1e-4)
    want = distilled.metrics.mean() | {"loss": float(step.loss.detach())}
    assert step.metrics.mean() == pytest.approx(want, rel=1e-4, abs=1e-4)
    for field in ("logp", "entropy"):
        compare(getattr(step.stats, field), getattr(of_policy.stats, field), **close, what=field)
    for field in ("teacher_logp", "top1_agreement"):
        compare(getattr(step.stats, field), getattr(distilled.stats, field), **close, what=field)
    for leaf, grad in grads.items():
        compare(found[leaf], grad, atol=1e-5 * float(grad.abs().max()), what=f"grad_{leaf}")
    return step


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_two_steps(name: str, source: str, backend: Backend):
    check(backend, source, name)


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "kl_reverse"])
def test_every_divergence(kind: str, source: str, backend: Backend):
    check(backend, source, "token", kind, normalizer="batch")


OPTIONS = {
    "number": {"coef": 0.3},
    "number of numpy": {"coef": np.float32(0.3), "temperature": np.float32(1.3)},
    "no coef": {"coef": None, "normalizer": None},
    "no divergence": {"coef": 0.0},
    "softcaps": {"softcap": 5.0, "teacher_temperature": 1.5},
    "temperatures": {"temperature": torch.linspace(0.6, 1.8, TOKENS), "teacher_temperature": 0.8},
}


@pytest.mark.parametrize("source", ["hidden", "logits"])
@pytest.mark.parametrize("name", OPTIONS)
def test_options(name: str, source: str, backend: Backend):
    check(backend, source, "kl and entropy", "jsd", **OPTIONS[name])


@pytest.mark.parametrize("budget", [1, 40_000])
def test_chunks(budget: int, backend: Backend):
    case, given = pair_case("one_tile"), POLICIES["sequence means"]()
    keywords = {"coef": COEF, "mask": MASK, "normalizer": "batch"}
    whole, want = fused(backend, case, "hidden", KINDS["jsd"], given, **keywords)
    parts, grads = fused(backend, case, "hidden", KINDS["jsd"], given, memory_budget=budget, **keywords)
    compare(parts.loss, whole.loss, atol=2e-6)
    for name, grad in want.items():
        compare(grads[name], grad, atol=5e-6 * float(grad.abs().max()), what=name)


@pytest.mark.parametrize("source", ["hidden", "logits"])
def test_a_token_uses_only_what_it_needs(source: str, backend: Backend):
    """The teacher's values at tokens without a weight, and all values at masked tokens, are never used."""
    case, given = pair_case("one_tile"), POLICIES["token"]()
    keywords = {"coef": COEF, "mask": MASK, "normalizer": 7.0}

    def run(spoil: bool):
        z, teacher = logits_of(case)
        tensors = {n: getattr(case, n).clone() for n in TENSORS}
        if source == "logits":
            tensors = {"logits": z.float(), "teacher_logits": teacher.float()}
        if spoil:
            own, other = (tensors[n] for n in (source, f"teacher_{source}"))
            own[~MASK], other[(COEF == 0) | ~MASK] = float("nan"), float("nan")
        tensors = {n: backend.put(x) for n, x in tensors.items()}
        leaf = tensors[source].requires_grad_()
        put = {n: backend.put(x) for n, x in (given | keywords).items()}
        step = tokfuse.distill_step(**tensors, kind="jsd", target=backend.put(case.target), **put)
        step.loss.backward()
        return step.loss.detach(), step.divergence, step.stats.logp, leaf.grad

    for got, want in zip(run(True), run(False), strict=True):
        assert bits(got) == bits(want)


def test_no_gemm_runs_twice():
    """Student: every token that counts. Teacher: tokens with a weight. Gradients: tokens that have one."""
    rows = {"logits": [], "gradient": []}
    logits, add = cpu_head.Head.logits, cpu_head.HeadGradients.add

    def counted_logits(self, hidden, buffer, start):
        rows["logits"].append((self.weight.shape[1], hidden.shape[0]))
        return logits(self, hidden, buffer, start)

    def counted_add(self, buffer, tokens):
        rows["gradient"].append(tokens.shape[0])
        return add(self, buffer, tokens)

    case, given = pair_case("one_tile"), POLICIES["token"]()
    with (
        tokfuse.backend("cpu"),
        mock.patch.object(cpu_head.Head, "logits", counted_logits),
        mock.patch.object(cpu_head.HeadGradients, "add", counted_add),
    ):
        cpu = next(p.values[0] for p in backends("linear_paired_divergence") if p.id == "cpu")
        step, grads = fused(cpu, case, "hidden", KINDS["jsd"], given, coef=COEF, mask=MASK, memory_budget=40_000)
    student = sum(n for size, n in rows["logits"] if size == case.weight.shape[1])
    teacher = sum(n for size, n in rows["logits"] if size == case.teacher_weight.shape[1])
    weighted = int((MASK & (COEF != 0)).sum())
    live = int((grads["hidden"] != 0).any(1).sum())
    assert student == int(MASK.sum()) and teacher == weighted
    assert sum(rows["gradient"]) == live and weighted < live < student
    assert step.policy.metrics["grad_rows"] > 0


def test_without_grad_mode(backend: Backend):
    case, given = pair_case("one_tile"), POLICIES["token"]()
    with torch.no_grad():
        tensors = {n: backend.put(getattr(case, n)).requires_grad_(n == "weight") for n in TENSORS}
        put = {n: backend.put(x) for n, x in given.items()}
        step = tokfuse.distill_step(**tensors, kind="jsd", target=backend.put(case.target), **put)
    assert not step.loss.requires_grad and step.grad_weight is None and step.policy.metrics["tokens"] == TOKENS


def test_a_shape_of_the_user():
    """A shape without kernels runs on the reference."""

    class Plain(PPOClip):
        def loss(self, log_ratio, advantage, signal=None):
            return -advantage * log_ratio.exp()

    case, given = pair_case("one_tile"), policy(shape=Plain())
    tensors = {n: getattr(case, n) for n in TENSORS}
    keywords = {"target": case.target, "kind": "jsd", "coef": 0.0}
    step = tokfuse.distill_step(**tensors, **given, **keywords)
    want = tokfuse.policy_step(**{n: tensors[n] for n in LEAVES}, target=case.target, **given)
    compare(step.loss, want.loss, atol=1e-5, rtol=1e-5)


REFUSALS = {
    "no advantage": ({"advantage": None}, "advantage must be given with objective="),
    "no target": ({"target": None}, "target must be given with objective="),
    "no objective": ({"objective": None}, "advantage must be left out with objective=None"),
    "no reference": ({"objective": Objective(kl=KL(coef=0.1))}, "ref_logp must be given for a KL term"),
    "unused": ({"kl_weight": torch.ones(TOKENS)}, "kl_weight must be None with kl=None"),
    "no anchor": ({"objective": Objective(anchor=KL(coef=0.1))}, "anchor_logp must be given for an anchor term"),
    "unused anchor": ({"anchor_logp": torch.ones(TOKENS)}, "anchor_logp must be None with anchor=None"),
    "sequences": ({"objective": Objective(level="sequence")}, "cu_seqlens must be given"),
    "sampler": ({"sampler_logp": torch.zeros(3)}, "sampler_logp must be of shape"),
    "coef": ({"coef": float("nan")}, "coef must be"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refusals(name: str):
    case = pair_case("one_tile")
    given = {n: getattr(case, n) for n in (*TENSORS, "target")} | POLICIES["token"]()
    changed, text = REFUSALS[name]
    with pytest.raises(ValueError, match=text):
        tokfuse.distill_step(**(given | {"kind": "jsd"} | changed))


def test_policy_arguments_need_an_objective():
    case = pair_case("one_tile")
    given = {n: getattr(case, n) for n in TENSORS} | {"kind": "jsd"}
    of_policy = set(PolicyInputs._fields) - {"advantage_level", "mask", "cu_seqlens"}
    assert set(PolicyInputs._fields) <= set(inspect.signature(tokfuse.distill_step).parameters)
    for name in (*of_policy, "sampler_logp"):
        with pytest.raises(ValueError, match=f"{name} must be left out with objective=None"):
            tokfuse.distill_step(**given, **{name: torch.zeros(TOKENS)})
    with pytest.raises(ValueError, match="advantage_level must be left out with objective=None"):
        tokfuse.distill_step(**given, advantage_level="sequence")
