"""Test linear_cross_entropy on every backend against torch's functions in float64.

Bounds: 2e-5 nats in the log-sum-exp and the log-probability of a token. Gradients within 1e-5 of the largest one;
16-bit gradients are rounded once.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, backends, compare, half_ulp
from head_cases import head_case

import tokfuse

DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=backends("linear_cross_entropy", interpreted=False))
def backend(request):
    with request.param.forced():
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.0, 0.1), (0.2, 0.1), (1.0, 0.0)])
@pytest.mark.parametrize("weighted", [False, True])
def test_head_is_that_of_torch(weighted, smoothing, z_loss, dtype, backend: Backend):
    case = head_case("tiles", dtype)
    target = case.target.clone()
    target[::5] = -100
    class_weight = torch.rand(9001, generator=torch.Generator().manual_seed(1)) + 0.1 if weighted else None
    h, w, b = (x.double().requires_grad_() for x in (case.hidden, case.weight, case.bias))
    logits = h @ w.t() + b
    logits.retain_grad()
    cw = None if class_weight is None else class_weight.double()
    if z_loss == 0.0 and hasattr(F, "linear_cross_entropy"):
        want = F.linear_cross_entropy(h, w, target, linear_bias=b, weight=cw, label_smoothing=smoothing)
    else:
        counts = target != -100
        share = counts.double() if cw is None else torch.where(counts, cw[target.clamp_min(0)], 0.0)
        losses = F.cross_entropy(logits, target, cw, label_smoothing=smoothing, reduction="none")
        want = (losses + torch.where(counts, z_loss * logits.logsumexp(-1) ** 2, 0.0)).sum() / share.sum()
    want.backward()
    put = [backend.put(x).requires_grad_() for x in (case.hidden, case.weight, case.bias)]
    loss = tokfuse.linear_cross_entropy(
        *put[:2],
        backend.put(target),
        bias=put[2],
        class_weight=backend.put(class_weight),
        ignore_index=None,
        label_smoothing=smoothing,
        z_loss=z_loss,
        memory_budget=200_000,  # several chunks
    )
    loss.backward()
    compare(loss, want, atol=2e-5 * (1.0 + 2.0 * z_loss * float(logits.logsumexp(1).max())))
    for got, exact in zip(put, (h, w, b), strict=True):
        atol = 1e-5 * exact.grad.abs().max() + (half_ulp(exact.grad, dtype) if dtype != torch.float32 else 0.0)
        compare(got.grad, exact.grad, atol=atol)


def test_head_with_a_softcap_smooths_the_capped_logits(backend: Backend):
    case = head_case("one_tile")
    h = case.hidden.double().requires_grad_()
    logits = 5.0 * torch.tanh(h @ case.weight.double().t() / 5.0)
    want = F.cross_entropy(logits, case.target, label_smoothing=0.4)
    want.backward()
    hidden = backend.put(case.hidden).requires_grad_()
    loss = tokfuse.linear_cross_entropy(
        hidden, backend.put(case.weight), backend.put(case.target), softcap=5.0, label_smoothing=0.4
    )
    loss.backward()
    compare(loss, want, atol=2e-5)
    compare(hidden.grad, h.grad, atol=1e-5 * float(h.grad.abs().max()))


def test_draft_head_learns_the_distribution_of_its_target(backend: Backend):
    """The soft cross entropy of a draft head is the forward KL plus the entropy of the target model."""
    case = head_case("one_tile")
    gen = torch.Generator().manual_seed(5)
    teacher_hidden, teacher_weight = torch.randn(37, 40, generator=gen), torch.randn(700, 40, generator=gen) * 0.3
    h, w = case.hidden.double().requires_grad_(), case.weight.double().requires_grad_()
    q = (teacher_hidden.double() @ teacher_weight.double().t()).softmax(-1)
    want = F.cross_entropy(h @ w.t(), q)
    want.backward()
    hidden, weight = (backend.put(x).requires_grad_() for x in (case.hidden, case.weight))
    teacher = {"teacher_hidden": backend.put(teacher_hidden), "teacher_weight": backend.put(teacher_weight)}
    step = tokfuse.distill_step(hidden=hidden, weight=weight, **teacher, kind="kl_forward", normalizer="batch")
    step.loss.backward()
    entropy = -(q * q.log()).sum(-1).mean()
    compare(step.loss + float(entropy), want, atol=2e-5)
    compare(hidden.grad, h.grad, atol=1e-5 * float(h.grad.abs().max()))
    compare(weight.grad, w.grad, atol=1e-5 * float(w.grad.abs().max()))
