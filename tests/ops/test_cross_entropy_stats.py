"""Test cross_entropy and linear_cross_entropy with return_stats, on every backend, against torch in float64.

Same bounds as in test_cross_entropy.py and test_linear_cross_entropy.py.
"""

from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, backends, bits, compare
from head_cases import head_case
from torch import Tensor

import tokfuse
from tokfuse.runtime.lm_head import cpu_head

TOKENS = 11
OPTIONS = {
    "plain": {},
    "z_loss": {"z_loss": 0.1, "softcap": 20.0, "class_weight": True, "reduction": "sum"},
    "smoothed": {"label_smoothing": 0.15, "z_loss": 0.1, "class_weight": True},
    "capped": {"label_smoothing": 0.15, "softcap": 5.0, "class_weight": True, "reduction": "none"},
}
BOTH = [
    pytest.param(op, p.values[0], marks=p.marks, id=f"{op}-{p.id}")
    for op in ("cross_entropy", "linear_cross_entropy")
    for p in backends(op, interpreted=op == "cross_entropy")
]
MASK = torch.arange(TOKENS) % 5 != 1
ADVANTAGE = torch.linspace(-1.0, 1.0, TOKENS)
SHIFT = torch.linspace(-0.3, 0.3, TOKENS)  # of the log-ratio: some ratios are beyond the clip


class Batch(NamedTuple):
    """The leaves of an op, the target, class weights, and the logits in float64."""

    leaves: dict[str, Tensor]
    target: Tensor
    class_weight: Tensor

    def logits(self, leaves: dict[str, Tensor], softcap: float | None) -> Tensor:
        z = leaves["logits"] if "logits" in leaves else leaves["hidden"] @ leaves["weight"].t() + leaves["bias"]
        return z if softcap is None else softcap * torch.tanh(z / softcap)


def batch(op: str) -> Batch:
    case = head_case("one_tile")
    hidden = case.hidden[:TOKENS]
    leaves = {"hidden": hidden, "weight": case.weight, "bias": case.bias}
    if op == "cross_entropy":
        leaves = {"logits": hidden @ case.weight.t() + case.bias}
    target = torch.where(MASK, case.target[:TOKENS], -100)
    return Batch(leaves, target, torch.rand(700, generator=torch.Generator().manual_seed(1)) + 0.1)


def with_policy(loss: Tensor, logp: Tensor, entropy: Tensor, old_logp: Tensor, ref_logp: Tensor, put: Any) -> Tensor:
    """Add a clipped policy term, k3 to a reference and an entropy bonus to the loss."""
    mask, advantage, old_logp, ref_logp = (put(x).to(logp.dtype) for x in (MASK, ADVANTAGE, old_logp, ref_logp))
    ratio = (logp - old_logp).exp()
    policy = -torch.minimum(advantage * ratio, advantage * ratio.clamp(0.8, 1.2))
    k3 = (ref_logp - logp).exp() - 1.0 - (ref_logp - logp)
    return loss.sum() + ((policy + 0.3 * k3 - 0.1 * entropy) * mask).sum()


def call(op: str, given: Batch, leaves: dict[str, Tensor], put: Any, options: dict[str, Any], **more: Any) -> Any:
    rest = {name: value for name, value in options.items() if name != "class_weight"} | more
    if "class_weight" in options:
        rest["weight" if op == "cross_entropy" else "class_weight"] = put(given.class_weight)
    if op == "linear_cross_entropy":
        rest["memory_budget"] = 15_000  # several chunks
    return getattr(tokfuse, op)(**leaves, target=put(given.target), **rest)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("op", "backend"), BOTH)
def test_loss_policy_term_kl_and_entropy_from_one_softmax(op: str, name: str, backend: Backend):
    options, given = OPTIONS[name], batch(op)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    exact = {n: x.double().requires_grad_() for n, x in given.leaves.items()}
    logits = given.logits(exact, options.get("softcap"))
    log_p, lse = logits.log_softmax(-1), torch.where(MASK, logits.logsumexp(-1), 0.0)
    logp = torch.where(MASK, log_p.gather(-1, given.target.clamp_min(0).unsqueeze(1)).squeeze(1), 0.0)
    peak = float(lse.detach().max())  # the error of lse^2 grows with it
    entropy = torch.where(MASK, -(log_p.exp() * log_p).sum(-1), 0.0)
    weight = given.class_weight.double() if "class_weight" in options else None
    losses = F.cross_entropy(logits, given.target, weight, label_smoothing=smoothing, reduction="none")
    losses = losses + z_loss * lse.square()
    counted = MASK.double() if weight is None else torch.where(MASK, weight[given.target.clamp_min(0)], 0.0)
    reductions = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / counted.sum()}
    loss = reductions[options.get("reduction", "mean")]
    old, ref = (logp.detach() + SHIFT).float(), (logp.detach() - SHIFT).float()
    want = with_policy(loss, logp, entropy, old, ref, lambda x: x)
    want.backward()

    def leaves() -> dict[str, Tensor]:
        return {n: backend.put(x.clone()).requires_grad_() for n, x in given.leaves.items()}

    with backend.forced():
        first, second, third = leaves(), leaves(), leaves()
        out = call(op, given, first, backend.put, options, return_stats=True)
        assert type(out) is tokfuse.CrossEntropyStats and type(out.stats) is tokfuse.TokenStats
        rows = TOKENS if options.get("reduction") == "sum" else 1
        compare(out.loss, loss, atol=2e-5 * (1.0 + 2.0 * z_loss * peak) * rows)
        for found, truth in ((out.stats.logp, logp), (out.stats.entropy, entropy), (out.stats.lse, lse)):
            compare(found, truth, atol=2e-5)
        assert not out.stats.sum_sq.requires_grad and not out.stats.top1.requires_grad
        with_policy(out.loss, out.stats.logp, out.stats.entropy, old, ref, backend.put).backward()
        for n, x in first.items():
            size = exact[n].grad.abs()
            bound = 1e-5 * size.max()
            if n == "logits":
                bound = 2e-6 * (size.amax(1, keepdim=True) + 2.0 * z_loss * peak + 1.0)
            compare(x.grad, exact[n].grad, atol=bound, what=n)

        # A call without statistics gives the same loss. token_stats gives the same statistics.
        alone = call(op, given, second, backend.put, options)
        again = call(op, given, third, backend.put, options, return_stats=True).loss
        assert bits(out.loss) == bits(again)
        alone.sum().backward()
        again.sum().backward()
        if op == "cross_entropy":
            assert bits(alone) == bits(again)
            assert [bits(x.grad) for x in second.values()] == [bits(x.grad) for x in third.values()]
        else:  # one has its gradients from the forward, with other GEMMs
            compare(alone, again, atol=2e-6 * rows * (1.0 + z_loss * peak**2))
            for x, y in zip(second.values(), third.values(), strict=True):
                compare(x.grad, y.grad, atol=2e-6 * float(y.grad.abs().max()))
        transforms = {n: v for n, v in options.items() if n == "softcap"} | {"mask": backend.put(MASK)}
        stats_of = tokfuse.token_stats if op == "cross_entropy" else tokfuse.linear_token_stats
        stats = stats_of(**leaves(), target=backend.put(given.target), **transforms)
        for found, truth in zip(out.stats, stats, strict=True):
            compare(found, truth, atol=2e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("op", ["cross_entropy", "linear_cross_entropy"])
def test_leading_dimensions_autocast_and_a_second_derivative(op: str, smoothing: float):
    given = batch(op)
    main = "logits" if op == "cross_entropy" else "hidden"
    options = {"label_smoothing": smoothing, "return_stats": True, "reduction": "none"}
    flat = getattr(tokfuse, op)(**given.leaves, target=given.target, **options)
    shaped = given.leaves | {main: given.leaves[main][:10].view(2, 5, -1)}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = getattr(tokfuse, op)(**shaped, target=given.target[:10].view(2, 5), **options)
    # Rows do not depend on their batch, except in the GEMM of an lm_head, which may sum in another order.
    atol = 0.0 if op == "cross_entropy" else 2e-6
    for found, want in zip((out.loss, *out.stats), (flat.loss, *flat.stats), strict=True):
        assert found.shape == (2, 5)
        compare(found.flatten(), want[:10], atol=atol)
    one = getattr(tokfuse, op)(**given.leaves | {main: given.leaves[main][0]}, target=given.target[0], **options)
    assert one.loss.shape == one.stats.lse.shape == ()
    compare(one.stats.lse, flat.stats.lse[0], atol=atol)
    leaf = given.leaves[main].clone().requires_grad_()
    stats = getattr(tokfuse, op)(**given.leaves | {main: leaf}, target=given.target, **options).stats
    with pytest.raises(ValueError, match="create_graph must be False"):
        torch.autograd.grad(stats.entropy.sum(), leaf, create_graph=True)


@pytest.fixture
def gemm_rows(monkeypatch) -> dict[str, list[int]]:
    """Return lists to which every GEMM of the CPU head adds its number of rows: for logits, and for gradients."""
    rows: dict[str, list[int]] = {"logits": [], "gradient": []}
    logits, add = cpu_head.Head.logits, cpu_head.HeadGradients.add

    def counted_logits(self, hidden, buffer, start):
        rows["logits"].append(hidden.shape[0])
        return logits(self, hidden, buffer, start)

    def counted_add(self, buffer, tokens):
        rows["gradient"].append(tokens.shape[0])
        return add(self, buffer, tokens)

    monkeypatch.setattr(cpu_head.Head, "logits", counted_logits)
    monkeypatch.setattr(cpu_head.HeadGradients, "add", counted_add)
    return rows


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_reduced_loss_computes_its_logits_once(smoothing: float, reduction: str, gemm_rows):
    given = batch("linear_cross_entropy")
    leaves = {n: x.clone().requires_grad_() for n, x in given.leaves.items()}
    options = {"label_smoothing": smoothing, "z_loss": 0.1, "reduction": reduction}
    counted = int(MASK.sum())
    with tokfuse.backend("cpu"):
        loss = call("linear_cross_entropy", given, leaves, lambda x: x, options).sum()
        assert sum(gemm_rows["logits"]) == counted
        assert sum(gemm_rows["gradient"]) == (0 if reduction == "none" else counted)
        (0.5 * loss).backward(retain_graph=True)
        half = [x.grad.clone() for x in leaves.values()]
        loss.backward()
        for x, part in zip(leaves.values(), half, strict=True):
            compare(x.grad, 3.0 * part, atol=1e-6 * float(x.grad.abs().max()))
        assert sum(gemm_rows["logits"]) == (3 if reduction == "none" else 1) * counted
        with torch.no_grad():
            without = call("linear_cross_entropy", given, leaves, lambda x: x, options).sum()
        compare(without, loss, atol=1e-4)
        again = call("linear_cross_entropy", given, leaves, lambda x: x, options).sum()
        with pytest.raises(ValueError, match="linear_cross_entropy: create_graph must be False"):
            torch.autograd.grad(again, leaves["hidden"], create_graph=True)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_terms_share_each_gemm_and_a_frozen_head_saves_one(smoothing: float, gemm_rows):
    rows, given, grads = gemm_rows, batch("linear_cross_entropy"), []
    with tokfuse.backend("cpu"):
        for frozen in (False, True):
            leaves = {n: x.clone().requires_grad_(n == "hidden" or not frozen) for n, x in given.leaves.items()}
            options = {"label_smoothing": smoothing, "z_loss": 0.1, "return_stats": True}
            out = call("linear_cross_entropy", given, leaves, lambda x: x, options)
            old, ref = out.stats.logp.detach() + SHIFT, out.stats.logp.detach() - SHIFT
            with_policy(out.loss, out.stats.logp, out.stats.entropy, old, ref, lambda x: x).backward()
            assert sum(rows["logits"]) == 2 * int(MASK.sum()) and sum(rows["gradient"]) == int(MASK.sum())
            assert (leaves["weight"].grad is None) == frozen
            grads.append(bits(leaves["hidden"].grad))
            rows["logits"].clear()
            rows["gradient"].clear()
    assert grads[0] == grads[1]
