"""Test the distillation methods against plain float64 formulas: values, gradients, splits, options, errors.

Each method is run as its docstring says: through distill_step, through policy_step, or through the log-probabilities at
a few ids. The formulas here use softmax and autograd only.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from algorithm_cases import spread_over
from harness import Backend, backends, compare
from torch import Tensor

import tokfuse
from tokfuse import PPOClip, algorithms
from tokfuse.algorithms import DistillationBatch, DistillationPlan, World
from tokfuse.algorithms.distillation import demonstrations

LENGTHS, VOCAB, K = (5, 1, 4, 0, 3, 6), 17, 4
TOKENS = sum(LENGTHS)
MASKED = (2, 7, 18)
PARTS = ([[0, 1, 2, 3, 4, 5]], [[0, 5, 3], [1, 2, 4]], [[5], [4, 0], [1, 3], [2]])


def normal(*shape: int, seed: int, scale: float = 1.0) -> Tensor:
    """Values that are exact in float32."""
    x = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.float().double()


STUDENT, TEACHER = normal(TOKENS, VOCAB, seed=0, scale=1.5), normal(TOKENS, VOCAB, seed=1, scale=1.5)
OLD = STUDENT + normal(TOKENS, VOCAB, seed=2, scale=0.2)
TARGET = torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(3))
MASK = torch.tensor([t not in MASKED for t in range(TOKENS)])
CU = torch.nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
SEQUENCE = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
INFORMED = torch.tensor([True, True, False, True, True, True])
PRUNED = torch.tensor([False, True, True, False, False, True])
CONTEXT = {"sdpo": {"informed": INFORMED}, "leaf_kl": {"pruned": PRUNED}}


def at_target(z: Tensor) -> Tensor:
    return z.log_softmax(1)[torch.arange(len(z)), TARGET]


def example_batch(name: str, **given: Any) -> DistillationBatch:
    logps = {"old_logp": at_target(OLD), "logp": at_target(STUDENT), "teacher_logp": at_target(TEACHER)}
    fields = logps | CONTEXT.get(name, {}) | given
    return DistillationBatch(num_tokens=TOKENS, cu_seqlens=CU, mask=fields.pop("mask", MASK), **fields)


# ------------------------------------------------------------------------------- formulas, as in the docstrings


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum(1)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """TRL's convention: beta is the weight of the teacher q."""
    m = beta * q + (1 - beta) * p
    return beta * kl(q, m) + (1 - beta) * kl(p, m)


def token_mean(x: Tensor, mask: Tensor = MASK) -> Tensor:
    return x[mask].sum() / mask.sum()


def seq_mean(x: Tensor, mask: Tensor = MASK) -> Tensor:
    means = [x[(SEQUENCE == i) & mask].mean() for i in range(len(LENGTHS)) if ((SEQUENCE == i) & mask).any()]
    return torch.stack(means).mean()


def pair(z: Tensor, t: float = 1.0) -> tuple[Tensor, Tensor]:
    return (z / t).softmax(1), (TEACHER / t).softmax(1)


def top(x: Tensor, k: int = K) -> Tensor:
    return x.detach().topk(k, 1).indices


def on(ids: list[list[int]] | Tensor, x: Tensor, tail: bool = False, renormalised: bool = False) -> list[Tensor]:
    """Return the probabilities of each row's ids, as a list of rows."""
    rows = []
    for t, row in enumerate(ids):
        p = x[t][row if isinstance(row, list) else row.tolist()]
        if tail:
            p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
        rows.append(p / p.sum() if renormalised else p)
    return rows


def rows_of(f: Callable[..., Tensor], *sides: list[Tensor]) -> Tensor:
    return torch.cat([f(*(x[None] for x in row)) for row in zip(*sides, strict=True)])


def union(a: Tensor, b: Tensor) -> list[list[int]]:
    return [sorted(set(x.tolist()) | set(y.tolist())) for x, y in zip(a, b, strict=True)]


def weights(z: Tensor, cap: float = 2.0) -> Tensor:
    """min(ratio, cap), from the student before this update; detached."""
    return (at_target(z) - at_target(OLD)).exp().clamp(max=cap).detach()


def policy_gradient(z: Tensor, advantage: Tensor) -> Tensor:
    return -advantage * (at_target(z) - at_target(OLD)).exp()


def discounted(x: Tensor, gamma: float) -> Tensor:
    """Sum of gamma^d x over this and later counting tokens of the sequence."""
    out = torch.zeros_like(x)
    for t in range(TOKENS):
        ahead = [s for s in range(t, TOKENS) if SEQUENCE[s] == SEQUENCE[t] and MASK[s]]
        out[t] = sum(gamma**d * x[s] for d, s in enumerate(ahead)) if MASK[t] else 0.0
    return out


def minillm_loss(z: Tensor) -> Tensor:
    """The policy term of MiniLLM."""
    p, q = at_target(OLD), at_target(TEACHER)
    remaining = discounted(torch.ones_like(p), 1.0).clamp(min=1)
    r = discounted((q - p) / 0.5, 0.95) / remaining
    a = (r - r[MASK].mean()) / (r[MASK].var() + 1e-8).sqrt()
    w = at_target(z).exp() / (0.8 * p.exp() + 0.2 * q.exp())
    return token_mean(torch.maximum(-a * w, -a * w.clamp(0.8, 1.2)))


def leaf_loss(z: Tensor) -> Tensor:
    p, q = pair(z, 2.0)
    d, pruned = kl(q, p), PRUNED[SEQUENCE]
    return 4 * (0.3 * d[MASK & ~pruned].mean() + 0.7 * d[MASK & pruned].mean())


def skipped(mask: Tensor, count: int) -> Tensor:
    place = torch.arange(TOKENS) - CU[:-1].long()[SEQUENCE]
    return mask & (place >= count)


def gap() -> Tensor:
    return at_target(OLD) - at_target(TEACHER)


def k1_advantage() -> Tensor:
    return -gap()


SDPO_MASK = MASK & INFORMED[SEQUENCE]
# case -> (name, options, loss of the student's logits)
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], Tensor]]] = {
    "gkd": ("gkd", {}, lambda z: token_mean(jsd(*pair(z), 0.5))),
    "gkd 0.1 t2": ("gkd", {"beta": 0.1, "temperature": 2.0}, lambda z: token_mean(jsd(*pair(z, 2.0), 0.1))),
    "gkd 0": ("gkd", {"beta": 0.0}, lambda z: token_mean(kl(*reversed(pair(z))))),
    "gkd 1 seq": ("gkd", {"beta": 1.0, "aggregation": "seq_mean_token_mean"}, lambda z: seq_mean(kl(*pair(z)))),
    "tvd": ("tvd", {}, lambda z: token_mean(0.5 * (pair(z)[0] - pair(z)[1]).abs().sum(1))),
    "tvd seq t3": (
        "tvd",
        {"temperature": 3.0, "aggregation": "seq_mean_token_mean"},
        lambda z: seq_mean(0.5 * (pair(z, 3.0)[0] - pair(z, 3.0)[1]).abs().sum(1)),
    ),
    "distillm": ("distillm", {}, lambda z: token_mean(kl(pair(z)[0], 0.1 * pair(z)[0] + 0.9 * pair(z)[1]))),
    "distillm forward": (
        "distillm",
        {"form": "forward", "alpha": 0.4, "temperature": 2.0},
        lambda z: token_mean(kl(pair(z, 2.0)[1], 0.4 * pair(z, 2.0)[1] + 0.6 * pair(z, 2.0)[0])),
    ),
    "distillm seq": (
        "distillm",
        {"aggregation": "seq_mean_token_mean"},
        lambda z: seq_mean(kl(pair(z)[0], 0.1 * pair(z)[0] + 0.9 * pair(z)[1])),
    ),
    "opd": ("opd", {}, lambda z: token_mean(kl(*pair(z)))),
    "opd seq t2": (
        "opd",
        {"aggregation": "seq_mean_token_mean", "temperature": 2.0},
        lambda z: seq_mean(kl(*pair(z, 2.0))),
    ),
    "opd k1": ("opd", {"form": "policy_gradient"}, lambda z: token_mean(policy_gradient(z, k1_advantage()))),
    "opd k2 bound": (
        "opd",
        {"form": "policy_gradient", "estimator": "k2", "bound": 0.5},
        lambda z: token_mean(policy_gradient(z, -(gap() ** 2 / 2).clamp(max=0.5))),
    ),
    "opd k3 seq": (
        "opd",
        {"form": "policy_gradient", "estimator": "k3", "aggregation": "seq_mean_token_mean"},
        lambda z: seq_mean(policy_gradient(z, -((-gap()).exp() - 1 + gap()))),
    ),
    "opd discounted": (
        "opd",
        {"form": "policy_gradient", "gamma": 0.9},
        lambda z: token_mean(policy_gradient(z, discounted(k1_advantage(), 0.9))),
    ),
    "opd current clip": (
        "opd",
        {"form": "policy_gradient", "policy": "current", "shape": PPOClip(low=0.1, high=0.1)},
        lambda z: token_mean(clipped(z, (at_target(TEACHER) - at_target(STUDENT)), 0.1)),
    ),
    "minillm": ("minillm", {}, minillm_loss),
    "minillm paper": (
        "minillm",
        {"gamma": 1.0, "whiten": False, "reward_scale": 1.0, "reward_clip": None, "alpha": 0.0, "clip": 0.1},
        lambda z: token_mean(
            clipped(z, discounted(-gap(), 1.0) / discounted(torch.ones(TOKENS), 1.0).clamp(min=1), 0.1)
        ),
    ),
    "minillm unscaled": (
        "minillm",
        {"gamma": 0.0, "whiten": False, "reward_clip": 0.4, "length_normalised": False, "alpha": 0.0},
        lambda z: token_mean(clipped(z, (-gap() / 0.5).clamp(-0.4, 0.4), 0.2)),
    ),
    "forward_kl_topk": (
        "forward_kl_topk",
        {"k": K},
        lambda z: token_mean(rows_of(kl, on(top(TEACHER), pair(z)[1]), on(top(TEACHER), pair(z)[0])).clamp(min=0)),
    ),
    "forward_kl_topk bounds": (
        "forward_kl_topk",
        {"k": K, "loss_min": None, "loss_max": 0.4, "logp_min": -2.5},
        lambda z: token_mean(bounded_forward(z)),
    ),
    "forward_kl_topk teacher": (
        "forward_kl_topk",
        {"k": K, "mass": "teacher_renormalised", "loss_min": None},
        lambda z: token_mean(
            rows_of(kl, on(top(TEACHER), pair(z)[1], renormalised=True), on(top(TEACHER), pair(z)[0]))
        ),
    ),
    "forward_kl_topk_tail": (
        "forward_kl_topk_tail",
        {"k": K, "aggregation": "seq_mean_token_mean"},
        lambda z: seq_mean(rows_of(kl, on(top(TEACHER), pair(z)[1], True), on(top(TEACHER), pair(z)[0], True))),
    ),
    "reverse_kl_topk": (
        "reverse_kl_topk",
        {"k": K},
        lambda z: token_mean(rows_of(kl, *(on(top(z), x, True) for x in pair(z)))),
    ),
    "reverse_kl_topk renormalised": (
        "reverse_kl_topk",
        {"k": K, "mass": "renormalised"},
        lambda z: token_mean(rows_of(kl, *(on(top(z), x, renormalised=True) for x in pair(z)))),
    ),
    "jsd_topk": (
        "jsd_topk",
        {"k": K, "beta": 0.3},
        lambda z: token_mean(
            rows_of(lambda p, q: jsd(p, q, 0.3), *(on(union(top(z), top(TEACHER)), x, True) for x in pair(z)))
        ),
    ),
    "sdpo": (
        "sdpo",
        {"k": K},
        lambda z: token_mean(
            weights(z) * rows_of(lambda p, q: jsd(p, q, 0.5), *(on(top(z), x, True) for x in pair(z))), SDPO_MASK
        ),
    ),
    "sdpo sampled": (
        "sdpo",
        {"form": "sampled_token", "beta": 1.0, "k": None, "mass": None, "ratio_max": 1.1},
        lambda z: token_mean(weights(z, 1.1) * (at_target(STUDENT) - at_target(TEACHER)) * at_target(z), SDPO_MASK),
    ),
    "sdft": ("sdft", {}, lambda z: seq_mean(weights(z) * kl(*reversed(pair(z))), skipped(MASK, 3))),
    "sdft trl": (
        "sdft",
        {"form": "top_k", "beta": 0.5, "k": K, "mass": "renormalised", "skip_tokens": 0, "ratio_max": None},
        lambda z: seq_mean(rows_of(lambda p, q: jsd(p, q, 0.5), *(on(top(z), x, renormalised=True) for x in pair(z)))),
    ),
    "leaf_kl": ("leaf_kl", {"lam": 0.3, "temperature": 2.0}, leaf_loss),
    "leaf_kl code": (
        "leaf_kl",
        {"lam": None, "form": "code", "temperature": 2.0},
        lambda z: 4 * token_mean(kl(*reversed(pair(z, 2.0)))),
    ),
}


def clipped(z: Tensor, a: Tensor, width: float) -> Tensor:
    r = (at_target(z) - at_target(OLD)).exp()
    return torch.maximum(-a * r, -a * r.clamp(1 - width, 1 + width))


def bounded_forward(z: Tensor) -> Tensor:
    p, q = (x.log().clamp(min=-2.5).gather(1, top(TEACHER)) for x in pair(z))
    return (q.exp() * (q - p)).sum(1).clamp(max=0.4)


# ------------------------------------------------------------------------------------------ through the ops


def run(method: Any, plan: Any, z: Tensor, rows: Tensor, normalizer: float | None = None) -> Tensor:
    """Return the loss of a plan on some rows of the batch, differentiable in their logits."""
    teacher, target = (x.to(z.device) for x in (TEACHER[rows].to(z.dtype), TARGET[rows]))
    if not isinstance(plan, DistillationPlan):
        return tokfuse.policy_step(logits=z, target=target, **plan.inputs(normalizer)).loss
    if plan.divergence is not None:
        return tokfuse.distill_step(logits=z, teacher_logits=teacher, **plan.inputs(normalizer)).loss
    inner = method if isinstance(method, algorithms.distillation.TopK) else method.top_k()
    mine, theirs = (tokfuse.token_stats(x, target, top_k=inner.k).top_ids for x in (z.detach(), teacher))
    wanted = {"student": {"student": mine}, "teacher": {"teacher": theirs}}.get(inner.support)
    ids = inner.ids(**(wanted or {"student": mine, "teacher": theirs}))
    known = tokfuse.token_stats(teacher, target, ids=ids).logp_at
    value = method.divergence(tokfuse.token_stats(z, target, ids=ids).logp_at, known, ids)
    return plan.loss(value, normalizer)


def moved(batch: DistillationBatch, dtype: torch.dtype, device: str) -> DistillationBatch:
    changed = {
        f.name: value.to(device, dtype if value.is_floating_point() else value.dtype)
        for f in dataclasses.fields(batch)
        if isinstance(value := getattr(batch, f.name), Tensor)
    }
    return dataclasses.replace(batch, **changed)


@pytest.fixture(params=backends("distill_step", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


@pytest.mark.parametrize("case", CASES)
def test_formulas_and_gradients(case: str, backend: Backend):
    name, options, formula = CASES[case]
    exact = backend.name == "reference"
    dtype, bound = (torch.float64, 1e-13) if exact else (torch.float32, 1e-5)
    truth = STUDENT.clone().requires_grad_()
    loss = formula(truth)
    (grad,) = torch.autograd.grad(loss, truth)
    assert bool(grad[MASK].any()) and not grad[~MASK].any()
    method = algorithms.make(name, **options)
    z = STUDENT.clone().to(backend.device, dtype).requires_grad_()
    found = run(method, method.objective(moved(example_batch(name), dtype, backend.device)), z, torch.arange(TOKENS))
    found.backward()
    compare(found, loss, atol=bound * max(1.0, float(loss.detach().abs())))
    compare(z.grad, grad, atol=bound * float(grad.abs().max()))


@pytest.mark.parametrize("case", CASES)
def test_micro_batches_are_the_batch(case: str):
    """One gradient in 1, 2 and 4 parts, in any order; the counts add up, and nested parts are parts."""
    name, options, _ = CASES[case]
    method = algorithms.make(name, **options)
    plan = method.objective(example_batch(name))
    whole = STUDENT.clone().requires_grad_()
    loss = run(method, plan, whole, torch.arange(TOKENS))
    loss.backward()
    for parts in PARTS:
        z, total, count = STUDENT.clone().requires_grad_(), 0.0, 0.0
        for ids in map(torch.tensor, parts):
            part, rows = plan.take(ids).take(torch.arange(len(ids))), plan.batch.rows(ids)
            value = run(method, part, z[rows], rows)
            value.backward()
            total, count = total + float(value.detach()), count + float(part.count())
            fresh = run(method, part, z.detach()[rows], rows, float(plan.count()))
            assert float(fresh) == pytest.approx(float(value.detach()), abs=1e-14)
        assert count == float(plan.count())
        assert total == pytest.approx(float(loss.detach()), abs=1e-14)
        compare(z.grad, whole.grad, atol=1e-14)


@pytest.mark.parametrize("case", CASES)
def test_an_empty_batch_has_loss_zero(case: str):
    """No token counts: zero loss and a zero gradient for every input; an empty micro-batch as well."""
    name, options, _ = CASES[case]
    method = algorithms.make(name, **options)
    plan = method.objective(example_batch(name, mask=torch.zeros_like(MASK)))
    empty = method.objective(example_batch(name)).take(torch.tensor([3]))
    for one, rows in ((plan, torch.arange(TOKENS)), (empty, torch.arange(0))):
        z = STUDENT[rows].clone().requires_grad_()
        loss = run(method, one, z, rows)
        loss.backward()
        assert float(loss.detach()) == 0.0 and z.grad is not None and not z.grad.any()
        assert float(one.count()) == 0.0


def test_from_both_heads():
    """The inputs of a plan are those of distill_step from hidden states as well, and plan.loss is their composition."""
    hidden, weight, other = normal(TOKENS, 6, seed=4), normal(VOCAB, 6, seed=5), normal(VOCAB, 9, seed=6)
    teacher_hidden = normal(TOKENS, 9, seed=7)
    for name, options in (("gkd", {"temperature": 2.0}), ("sdft", {"aggregation": "token_mean"})):
        plan = algorithms.make(name, **options).objective(example_batch(name))
        h = hidden.clone().requires_grad_()
        models = {"hidden": h, "weight": weight, "teacher_hidden": teacher_hidden, "teacher_weight": other}
        step = tokfuse.distill_step(**models, **plan.inputs())
        step.loss.backward()
        fused, h.grad = h.grad, None
        inputs = {k: v for k, v in plan.inputs().items() if k not in ("coef", "normalizer")}
        loss = plan.loss(tokfuse.linear_paired_divergence(*models.values(), **inputs).divergence)
        loss.backward()
        compare(step.loss, loss, atol=1e-14)
        compare(fused, h.grad, atol=1e-14)


@pytest.mark.parametrize("name", ["leaf_kl", "minillm", "gkd", "sdft"])
def test_two_ranks_are_one_process(name: str):
    """Whitening and the means of both contexts are over all ranks."""
    method = algorithms.make(name, **({"lam": 0.3} if name == "leaf_kl" else {}))
    whole, parts = example_batch(name), (torch.tensor([0, 2, 3]), torch.tensor([1, 4, 5]))

    def plan_of(world: World) -> Any:
        return method.objective(dataclasses.replace(whole.take(parts[world.rank]), world=world))

    z = STUDENT.clone().requires_grad_()
    loss = run(method, method.objective(whole), z, torch.arange(TOKENS))
    loss.backward()
    plans = spread_over(2, plan_of)
    total = sum(float(plan.count()) for plan in plans)
    x = STUDENT.clone().requires_grad_()
    found = 0.0
    for plan, ids in zip(plans, parts, strict=True):
        rows = whole.rows(ids)
        value = run(method, plan, x[rows], rows, total)
        value.backward()
        found += float(value.detach())
    assert found == pytest.approx(float(loss.detach()), abs=1e-13)
    compare(x.grad, z.grad, atol=1e-13)


# ------------------------------------------------------------------------------------- properties of the methods


@pytest.mark.parametrize(("estimator", "unbiased"), [("k1", True), ("k2", False), ("k3", False)])
def test_k1_as_advantage_has_the_gradient_of_the_reverse_kl(estimator: str, unbiased: bool):
    """Expectation over all sampled tokens, by enumeration: V copies of each row, weighted by their probability."""
    z = STUDENT[:3].repeat_interleave(VOCAB, 0).requires_grad_()
    target = torch.arange(VOCAB).repeat(3)
    logp, teacher_logp = (x[:3].log_softmax(1).flatten() for x in (STUDENT, TEACHER))
    batch = DistillationBatch(
        num_tokens=3 * VOCAB,
        cu_seqlens=torch.tensor([0, 3 * VOCAB], dtype=torch.int32),
        old_logp=logp,
        teacher_logp=teacher_logp,
    )
    method = algorithms.make("opd", form="policy_gradient", estimator=estimator)
    plan = method.objective(batch).weigh(logp.exp())
    tokfuse.policy_step(logits=z, target=target, **plan.inputs(normalizer=3.0)).loss.backward()
    expected = z.grad.view(3, VOCAB, VOCAB).sum(1)
    x = STUDENT[:3].clone().requires_grad_()
    kl(x.softmax(1), TEACHER[:3].softmax(1)).mean().backward()
    assert torch.allclose(expected, x.grad, atol=1e-13) == unbiased


@pytest.mark.parametrize("name", ["forward_kl_topk_tail", "reverse_kl_topk", "jsd_topk"])
def test_a_tail_is_a_lower_bound_of_the_whole_vocabulary(name: str):
    """Merging categories cannot raise a divergence. It rises with k; with one id left out it is the divergence."""
    p, q = pair(STUDENT)
    full = {"kl_forward": kl(q, p), "kl_reverse": kl(p, q), "jsd": jsd(p, q, 0.5)}[algorithms.make(name).kind]
    before = torch.zeros(TOKENS, dtype=torch.float64)
    for k in (1, 4, 9, VOCAB - 1):
        method, ids = algorithms.make(name, k=k, support="teacher"), top(TEACHER, k)
        value = method.divergence(p.log().gather(1, ids), q.log().gather(1, ids), ids)
        assert bool((value >= before - 1e-12).all()) and bool((value <= full + 1e-12).all())
        before = value
    compare(before, full, atol=1e-12)
    same = method.divergence(p.log().gather(1, ids), p.log().gather(1, ids), ids)
    compare(same, torch.zeros(TOKENS), atol=1e-14)


def test_the_tail_has_a_floor():
    """A student that is sure of the ids has a tail of tail_floor, without a gradient; the loss stays finite."""
    logp = torch.tensor([[-1e-12, -40.0], [math.log(0.5), math.log(0.25)]], dtype=torch.float64).requires_grad_()
    teacher, ids = torch.full((2, 2), math.log(0.25), dtype=torch.float64), torch.tensor([[3, 1], [0, 2]])
    value = algorithms.make("forward_kl_topk_tail", tail_floor=1e-3).divergence(logp, teacher, ids)
    sure = 0.25 * (math.log(0.25) + 1e-12) + 0.25 * (math.log(0.25) + 40) + 0.5 * math.log(0.5 / 1e-3)
    part = 0.25 * math.log(0.5) + 0.5 * math.log(0.5 / 0.25)
    assert value.tolist() == pytest.approx([sure, part], abs=1e-12)
    (grad,) = torch.autograd.grad(value.sum(), logp)
    # d tail / d logp_k = -p_k, and d loss / d log tail = -0.5
    compare(grad, torch.tensor([[-0.25, -0.25], [-0.25 + 0.5 * 0.5 / 0.25, -0.25 + 0.5]]), atol=1e-12)


def test_ids_are_padded_and_merged():
    union = algorithms.make("jsd_topk", k=3)
    mine, theirs = torch.tensor([[4, 2, 7], [1, 0, 5]]), torch.tensor([[7, 9, 4], [5, -1, -1]])
    ids = union.ids(student=mine, teacher=theirs)
    assert ids.tolist() == [[7, 9, 4, -1, 2, -1], [5, -1, -1, 1, 0, -1]]
    assert algorithms.make("forward_kl_topk").ids(teacher=theirs) is theirs
    assert algorithms.make("reverse_kl_topk").ids(student=mine) is mine
    p, q = (x[:2].log_softmax(1) for x in (STUDENT, TEACHER))
    for mass in ("as_given", "teacher_renormalised", "renormalised", "tail"):
        method = algorithms.make("jsd_topk", k=3, mass=mass)
        at = [x.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, 0.0).requires_grad_(x is p) for x in (p, q)]
        value = method.divergence(*at, ids)
        short = [[7, 9, 4, 2], [5, 1, 0]]
        for t in range(2):
            few = torch.tensor([short[t]])
            alone = method.divergence(p[t][few], q[t][few], few)
            compare(value[t : t + 1], alone, atol=1e-14)
        (grad,) = torch.autograd.grad(value.sum(), at[0])
        assert bool(grad[ids >= 0].all()) and not grad[ids < 0].any()
        none = torch.full((2, 1), -1)
        zero = torch.zeros(2, 1).double().requires_grad_()
        empty = method.divergence(zero, zero.detach(), none)
        assert empty.tolist() == [0.0, 0.0] and not torch.autograd.grad(empty.sum(), zero)[0].any()


def test_an_id_that_the_teacher_excludes():
    """Probability 0 of the teacher adds nothing to the forward KL and makes the reverse KL infinite."""
    ids, p = torch.tensor([[0, 1]]), torch.tensor([[0.4, 0.3]], dtype=torch.float64).log().requires_grad_()
    q = torch.tensor([[0.5, 0.0]], dtype=torch.float64).log()
    forward = algorithms.make("forward_kl_topk", k=2, loss_min=None).divergence(p, q, ids)
    assert float(forward.detach()) == pytest.approx(0.5 * math.log(0.5 / 0.4), abs=1e-14)
    assert torch.autograd.grad(forward.sum(), p)[0].tolist() == [[pytest.approx(-0.5), 0.0]]
    reverse = algorithms.make("reverse_kl_topk", k=2, mass="as_given").divergence(p, q, ids)
    assert reverse.tolist() == [math.inf]


def test_gkd_mixes_the_data_with_its_share():
    drawn = [algorithms.make("gkd", lam=0.3, seed=1).source(step) for step in range(2000)]
    assert abs(drawn.count("student") / 2000 - 0.3) < 0.04 and set(drawn) == {"student", "data"}
    assert drawn[:50] == [algorithms.make("gkd", lam=0.3, seed=1).source(step) for step in range(50)]
    assert drawn != [algorithms.make("gkd", lam=0.3, seed=2).source(step) for step in range(2000)]
    assert {algorithms.make("gkd", lam=0.0).source(step) for step in range(200)} == {"data"}
    assert {algorithms.make("gkd", lam=1.0).source(step) for step in range(200)} == {"student"}


def test_distillm_adapts_its_schedule():
    schedule = algorithms.make("distillm_schedule", total_steps=1000, loss_eps=0.05, threshold_step=0.4)
    state = schedule.initial_state()
    assert {schedule.source(state, step, 0) for step in range(100)} == {"data"}  # the threshold is still 0
    state = schedule.update(state, 2.0)
    assert state == {"threshold": 0.0, "to_beat": 2.0}
    assert schedule.update(state, 2.04) == state and schedule.update(state, 1.0) == state
    for loss, threshold in ((2.05, 0.4), (2.2, 0.8), (2.3, 1.0)):
        state = schedule.update(state, loss)
        assert state == {"threshold": threshold, "to_beat": loss}
    state = {"threshold": 0.8, "to_beat": 2.2}

    def share(who: str, replay: str, first: int, stored: int = 1000) -> float:
        method = algorithms.make("distillm_schedule", total_steps=1000, replay=replay)
        return [method.source(state, step, stored) for step in range(first, first + 100)].count(who) / 100

    assert share("student", "decreasing", 0) > 0.6 and share("student", "decreasing", 900) < 0.2
    assert share("student", "increasing", 0) < 0.2 and share("student", "increasing", 900) > 0.6
    assert 0.25 < share("student", "constant", 0) < 0.55 and 0.25 < share("buffer", "constant", 900) < 0.55
    assert share("buffer", "increasing", 0, stored=999) == 0.0  # the buffer is filled first
    assert abs(share("data", "decreasing", 450) - 0.2) < 0.12
    with pytest.raises(ValueError, match=r"step must be in \[0, 1000\]; got 1001"):
        schedule.source(state, 1001, 0)


def test_minillm_mixes_distributions_and_tokens():
    method = algorithms.make("minillm")
    mixed = method.mixture(STUDENT.log_softmax(1), TEACHER.log_softmax(1))
    p, q = pair(STUDENT)
    compare(mixed.exp(), 0.8 * p + 0.2 * q, atol=1e-14)
    compare(method.mixture(at_target(STUDENT), at_target(TEACHER)), mixed[torch.arange(TOKENS), TARGET], atol=1e-14)
    z = STUDENT.clone().requires_grad_()
    run(method, method.single_step(example_batch("minillm")), z, torch.arange(TOKENS)).backward()
    x = STUDENT.clone().requires_grad_()
    token_mean(kl(*pair(x))).backward()
    compare(z.grad, x.grad, atol=1e-14)


def test_demonstrations_are_the_first_success_of_a_peer():
    reward = torch.tensor([0.0, 1.0, 0.5, 1.0, 1.0, 0.0, 0.2])
    group = torch.tensor([3, 3, 3, 3, 0, 0, 9])
    assert demonstrations(reward, group).tolist() == [1, 3, 1, 1, -1, 4, -1]
    assert demonstrations(reward, group, exclude_self=False).tolist() == [1, 1, 1, 1, 4, 4, -1]
    assert demonstrations(reward, group, threshold=0.5).tolist() == [1, 2, 1, 1, -1, 4, -1]
    assert demonstrations(reward[:0], group[:0]).tolist() == []


# ----------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gkd", {"beta": 1.5}, r"algorithms.gkd: beta must be a finite number in \[0, 1\]"),
        ("gkd", {"lam": -0.1}, "lam must be a finite number"),
        ("gkd", {"temperature": 0.0}, "temperature must be a finite number"),
        ("gkd", {"aggregation": "mean"}, "aggregation must be one of token_mean, seq_mean_token_mean"),
        ("gkd", {"lmbda": 0.5}, "got 'lmbda'. Write lam="),
        ("distillm", {"alpha": 1.0}, "alpha must be a finite number"),
        ("distillm", {"form": "both"}, "form must be one of reverse, forward"),
        ("distillm_schedule", {}, "total_steps must be given"),
        ("distillm_schedule", {"total_steps": 0}, "total_steps must be an integer >= 1"),
        ("opd", {"form": "full"}, "form must be one of full_vocabulary, policy_gradient"),
        ("opd", {"estimator": "k1"}, "estimator must be left out with form 'full_vocabulary'"),
        ("opd", {"shape": PPOClip()}, "shape must be left out with form 'full_vocabulary'"),
        ("opd", {"form": "policy_gradient", "temperature": 1.0}, "temperature must be left out"),
        ("opd", {"form": "policy_gradient", "estimator": "k4"}, "estimator must be one of k1, k2, k3"),
        ("opd", {"form": "policy_gradient", "shape": tokfuse.NFT()}, "shape must be a Shape without a signal"),
        ("minillm", {"alpha": 1.0}, "alpha must be a finite number"),
        ("forward_kl_topk", {"kind": "tvd"}, "kind must be one of kl_forward, kl_reverse, jsd"),
        ("forward_kl_topk", {"beta": 0.2}, "beta must be left out with kind 'kl_forward'"),
        ("forward_kl_topk", {"tail_floor": 1e-3}, "tail_floor must be left out with mass 'as_given'"),
        ("forward_kl_topk_tail", {"logp_min": -10.0}, "logp_min must be None, or used with mass 'as_given'"),
        ("jsd_topk", {"support": "both"}, "support must be one of teacher, student, union"),
        ("sdpo", {"form": "full_vocabulary"}, "k must be given with form 'top_k', and only then"),
        ("sdpo", {"form": "sampled_token", "k": None, "mass": None}, "beta must be 1 with form 'sampled_token'"),
        ("sdpo", {"mass": "as_given"}, "mass must be one of renormalised, tail"),
        ("sdft", {"skip_tokens": -1}, "skip_tokens must be an integer >= 0"),
        ("leaf_kl", {"lam": 0.5, "form": "code"}, "lam must be given with form 'paper', and only then"),
        ("leaf_kl", {"lam": 1.5}, r"lam must be a finite number in \[0, 1\]"),
        ("leaf_kl", {}, "lam must be given"),
        ("opdd", {}, "Did you mean 'opd'"),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        algorithms.make(name, **options)


def test_wrong_inputs():
    make = algorithms.make
    for name, options, lacking in (
        ("opd", {"form": "policy_gradient"}, "teacher_logp"),
        ("opd", {"form": "policy_gradient", "policy": "current"}, "logp"),
        ("minillm", {}, "old_logp"),
        ("sdpo", {}, "logp"),
        ("leaf_kl", {"lam": 0.5}, "pruned"),
    ):
        with pytest.raises(ValueError, match=f"batch.{lacking} must be given"):
            make(name, **options).objective(example_batch(name, **{lacking: None}))
    for name, field in (("gkd", "informed"), ("sdpo", "pruned"), ("leaf_kl", "informed"), ("jsd_topk", "pruned")):
        method = make(name, **({"lam": 0.5} if name == "leaf_kl" else {}))
        with pytest.raises(ValueError, match=f"batch.{field} must be left out"):
            method.objective(example_batch(name, **{field: PRUNED}))
    with pytest.raises(ValueError, match=r"DistillationBatch: informed must be of shape \(6,\)"):
        example_batch("sdpo", informed=PRUNED[:2])
    with pytest.raises(TypeError, match="gkd: batch must be a DistillationBatch; got int"):
        make("gkd").objective(3)
    with pytest.raises(TypeError, match="ids must be a torch.Tensor; got list"):
        make("forward_kl_topk").divergence(torch.zeros(1, 1), torch.zeros(1, 1), [[0]])
    with pytest.raises(ValueError, match="use plan.loss"):
        make("sdpo").objective(example_batch("sdpo")).inputs()
    with pytest.raises(ValueError, match="form must be 'top_k'"):
        make("sdft").top_k()
    with pytest.raises(ValueError, match="student must be left out with support 'teacher'"):
        make("forward_kl_topk").ids(student=top(STUDENT), teacher=top(TEACHER))
    with pytest.raises(ValueError, match="student must be given with support 'union'"):
        make("jsd_topk").ids(teacher=top(TEACHER))
    few, x = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"ids must be \(tokens, at most 2\)"):
        make("forward_kl_topk", k=2).divergence(x, x, few)
    with pytest.raises(ValueError, match="teacher_logp_at must be .* like ids"):
        make("forward_kl_topk").divergence(x, x[:, :2], few)
    with pytest.raises(ValueError, match="teacher_logp_at must be detached"):
        make("forward_kl_topk").divergence(x, x.clone().requires_grad_(), few)
    with pytest.raises(ValueError, match="divergence must be of shape"):
        make("jsd_topk").objective(example_batch("jsd_topk")).loss(x[0])
