"""top_k_step: equal to linear_token_stats at the ids and autograd, with no GEMM run twice.

The truth is the composition by the reference in float64. Values agree within 1e-5, gradients within 1e-5 of their
largest entry: the bounds of linear_token_stats.
"""

from unittest import mock

import pytest
import torch
from harness import Backend, backends, bits

import tokfuse
from tokfuse.algorithms import DistillationBatch, make, top_k_step
from tokfuse.runtime.lm_head import cpu_head

TOKENS, HIDDEN, VOCAB, K = 9, 24, 4131, 5  # a vocabulary of two tiles in the memory of dW
CU_SEQLENS = torch.tensor([0, 4, 4, TOKENS], dtype=torch.int32)
MASK = torch.arange(TOKENS) % 4 != 2
METHODS = {
    "forward": lambda: make("forward_kl_topk", k=K),
    "forward tail": lambda: make("forward_kl_topk_tail", k=K, aggregation="seq_mean_token_mean"),
    "reverse": lambda: make("reverse_kl_topk", k=K),
    "jsd renormalised": lambda: make("jsd_topk", k=K, beta=0.3, mass="renormalised"),
}
OPTIONS = {
    "plain": {},
    "confident": {"logit_scale": 8.0},  # ids with p near 1 take another path
    "bias": {"bias": True},
    "softcap and scale": {"softcap": 4.0, "logit_scale": 0.7},
    "chunks": {"memory_budget": 3 * 4 * VOCAB},
}


@pytest.fixture(params=backends("linear_token_stats_at"))
def backend(request):
    with request.param.forced():
        yield request.param


def problem(dtype=torch.float32, bias=False):
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(TOKENS, HIDDEN, generator=gen), 0.4 * torch.randn(VOCAB, HIDDEN, generator=gen)
    ids = torch.stack([torch.randperm(VOCAB, generator=gen)[:K] for _ in range(TOKENS)])
    ids[:, 0] = (hidden @ weight.T).argmax(1)
    ids[0, 2:], ids[1] = -1, -1
    teacher = torch.log_softmax(2 * torch.randn(TOKENS, K + 1, generator=gen), 1)[:, :K]
    tensors = {"hidden": hidden, "weight": weight}
    if bias:
        tensors["bias"] = torch.randn(VOCAB, generator=gen)
    return {n: x.to(dtype) for n, x in tensors.items()}, ids, teacher


def batch(**given):
    return DistillationBatch(num_tokens=TOKENS, cu_seqlens=CU_SEQLENS, mask=MASK, **given)


def composed(method, plan, tensors, ids, teacher, **options):
    """(loss, divergence, gradients) by autograd through the reference in float64."""
    leaves = {n: x.double().requires_grad_() for n, x in tensors.items()}
    with tokfuse.backend("reference"):
        target = torch.zeros(TOKENS, dtype=torch.int64)
        stats = tokfuse.linear_token_stats(
            leaves["hidden"], leaves["weight"], target, ids=ids, bias=leaves.get("bias"), **options
        )
    divergence = method.divergence(stats.logp_at, teacher, ids)
    loss = plan.loss(divergence)
    return loss, divergence.detach(), dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def close(found, truth, bound=1e-5):
    torch.testing.assert_close(found.double().cpu(), truth, rtol=0, atol=bound * max(1e-3, float(truth.abs().max())))


@pytest.mark.parametrize(
    "name, options", [*((m, "plain") for m in METHODS), *(("forward tail", o) for o in OPTIONS if o != "plain")]
)
def test_loss_and_gradients_equal_the_composition(backend: Backend, name: str, options: str) -> None:
    chosen = dict(OPTIONS[options])
    tensors, ids, teacher = problem(bias=chosen.pop("bias", False))
    method = METHODS[name]()
    plan = method.objective(batch())
    loss, divergence, grads = composed(method, plan, tensors, ids, teacher, **chosen)
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    step = top_k_step(method, plan, **leaves, ids=backend.put(ids), teacher_logp_at=backend.put(teacher), **chosen)
    step.loss.backward()
    close(step.loss.detach(), loss.detach())
    close(step.divergence, torch.where(MASK, divergence, 0.0))
    assert step.logp_at.shape == ids.shape and not step.logp_at.requires_grad
    for leaf, truth in grads.items():
        close(leaves[leaf].grad, truth)


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_a_frozen_side_has_no_gradient(backend: Backend, frozen: str) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    plan = method.objective(batch())
    grads = composed(method, plan, tensors, ids, teacher)[2]
    leaves = {n: backend.put(x).requires_grad_(n != frozen) for n, x in tensors.items()}
    ids, teacher = backend.put(ids), backend.put(teacher)
    top_k_step(method, plan, **leaves, ids=ids, teacher_logp_at=teacher).loss.backward()
    assert leaves.pop(frozen).grad is None
    ((name, leaf),) = leaves.items()
    close(leaf.grad, grads[name])


def test_micro_batches_add_up(backend: Backend) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    plan = method.objective(batch())
    grads = composed(method, plan, tensors, ids, teacher)[2]
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    for seqs in (torch.tensor([0, 1]), torch.tensor([2])):
        part = plan.take(seqs)
        rows = plan.batch.rows(seqs)
        given = {"ids": backend.put(ids[rows]), "teacher_logp_at": backend.put(teacher[rows])}
        top_k_step(method, part, hidden=leaves["hidden"][rows], weight=leaves["weight"], **given).loss.backward()
    for name, truth in grads.items():
        close(leaves[name].grad, truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits(backend: Backend, dtype: torch.dtype) -> None:
    tensors, ids, teacher = problem(dtype)
    method = METHODS["forward tail"]()
    plan = method.objective(batch())
    grads = composed(method, plan, tensors, ids, teacher)[2]
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    given = {"ids": backend.put(ids), "teacher_logp_at": backend.put(teacher)}
    top_k_step(method, plan, **leaves, **given).loss.backward()
    for name, truth in grads.items():
        assert leaves[name].grad.dtype == dtype
        close(leaves[name].grad, truth, 1e-2)


def test_values_of_masked_tokens_are_never_used(backend: Backend) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward"]()
    plan = method.objective(batch())

    def run(hidden, teacher):
        leaves = {"hidden": backend.put(hidden).requires_grad_(), "weight": backend.put(tensors["weight"])}
        step = top_k_step(method, plan, **leaves, ids=backend.put(ids), teacher_logp_at=backend.put(teacher))
        step.loss.backward()
        return step.loss, step.divergence, leaves["hidden"].grad

    spoiled = tensors["hidden"].clone(), teacher.clone()
    for x in spoiled:
        x[~MASK] = float("nan")
    for clean, found in zip(run(tensors["hidden"], teacher), run(*spoiled), strict=True):
        assert bits(clean) == bits(found)


def test_a_nan_stays_in_its_token(backend: Backend) -> None:
    tensors, ids, teacher = problem()
    tensors["hidden"][4] = float("nan")
    method = METHODS["forward tail"]()
    hidden, weight = (backend.put(tensors[n]).requires_grad_(n == "hidden") for n in ("hidden", "weight"))
    given = {"ids": backend.put(ids), "teacher_logp_at": backend.put(teacher)}
    step = top_k_step(method, method.objective(batch()), hidden=hidden, weight=weight, **given)
    step.loss.backward()
    bad = hidden.grad.isnan().any(1).cpu()
    assert step.loss.isnan() and bad.nonzero().flatten().tolist() == [4]


def test_an_empty_batch_has_loss_0(backend: Backend) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    plan = method.objective(
        DistillationBatch(num_tokens=TOKENS, cu_seqlens=CU_SEQLENS, mask=torch.zeros(TOKENS, dtype=torch.bool))
    )
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    step = top_k_step(method, plan, **leaves, ids=backend.put(ids), teacher_logp_at=backend.put(teacher))
    step.loss.backward()
    assert float(step.loss.detach()) == 0.0 and all(not x.grad.any() for x in leaves.values())


def test_without_grad_mode_there_is_the_loss_alone(backend: Backend) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    plan = method.objective(batch())
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    given = {"ids": backend.put(ids), "teacher_logp_at": backend.put(teacher)}
    with torch.no_grad():
        step = top_k_step(method, plan, **leaves, **given)
    assert not step.loss.requires_grad
    close(step.loss, composed(method, plan, tensors, ids, teacher)[0].detach())


def test_no_gemm_runs_twice() -> None:
    """A row of hidden states meets the weight twice: for its logits and for its gradient."""
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    rows = []
    original = cpu_head.Head.logits

    def counted(head, hidden, buffer, start):
        rows.append(hidden.shape[0])
        return original(head, hidden, buffer, start)

    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    with tokfuse.backend("cpu"), mock.patch.object(cpu_head.Head, "logits", counted):
        step = top_k_step(method, method.objective(batch()), **leaves, ids=ids, teacher_logp_at=teacher)
        step.loss.backward()
    assert sum(rows) == int(MASK.sum())


def test_the_loss_is_differentiable_once(backend: Backend) -> None:
    if backend.name == "reference":
        pytest.skip("autograd differentiates the reference twice")
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    leaves = {n: backend.put(x).requires_grad_() for n, x in tensors.items()}
    given = {"ids": backend.put(ids), "teacher_logp_at": backend.put(teacher)}
    step = top_k_step(method, method.objective(batch()), **leaves, **given)
    with pytest.raises(ValueError, match="create_graph"):
        torch.autograd.grad(step.loss, leaves["hidden"], create_graph=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden": torch.zeros(4, HIDDEN)}, "9 tokens, like the plan's batch"),
        ({"ids": torch.zeros(TOKENS, dtype=torch.int64)}, r"of shape \(9, K\)"),
        ({"ids": torch.full((TOKENS, K), VOCAB)}, r"top_k_step: ids must be in \[0, 4131\)"),
        ({"normalizer": -1.0}, r"normalizer must be a finite number in \[0, inf\); got -1"),
        ({"normalizer": float("nan")}, "normalizer must be .*got nan"),
        ({"normalizer": torch.tensor(-1.0)}, "normalizer must be .*got -1"),
        ({"normalizer": torch.ones(3)}, r"normalizer must be a 0-dim tensor; got shape \(3,\)"),
        ({"normalizer": "tokens"}, "normalizer must be .*got 'tokens'"),
        ({"teacher_logp_at": torch.zeros(TOKENS, 2)}, r"teacher_logp_at must be \(9, 5\) like ids"),
        ({"teacher_logp_at": torch.zeros(4, K)}, r"teacher_logp_at must be \(9, 5\) like ids"),
        ({"teacher_logp_at": torch.zeros(TOKENS, K, requires_grad=True)}, "teacher_logp_at"),
        ({"plan": None}, "plan must be a plan of a top-k method; got NoneType"),
        ({"plan": make("gkd").objective(batch())}, "got one over the whole vocabulary"),
        ({"softcap": -1.0}, "softcap"),
        ({"memory_budget": 0}, "memory_budget"),
    ],
)
def test_messages(change: dict, message: str) -> None:
    tensors, ids, teacher = problem()
    method = METHODS["forward tail"]()
    given = tensors | {"plan": method.objective(batch()), "ids": ids, "teacher_logp_at": teacher} | change
    with pytest.raises(ValueError, match=message):
        top_k_step(method, **given)


def test_a_method_over_the_whole_vocabulary_is_refused() -> None:
    tensors, ids, teacher = problem()
    with pytest.raises(TypeError, match="distill_step"):
        top_k_step(make("gkd"), make("gkd").objective(batch()), **tensors, ids=ids, teacher_logp_at=teacher)


def test_self_distillation_at_ids() -> None:
    tensors, ids, teacher = problem()
    method = make("sdft", form="top_k", k=K, mass="tail", skip_tokens=2, ratio_max=None)
    plan = method.objective(batch())
    loss, _, grads = composed(method, plan, tensors, ids, teacher)
    leaves = {n: x.requires_grad_() for n, x in tensors.items()}
    step = top_k_step(method.top_k(), plan, **leaves, ids=ids, teacher_logp_at=teacher)
    step.loss.backward()
    close(step.loss.detach(), loss.detach())
    close(leaves["weight"].grad, grads["weight"])
