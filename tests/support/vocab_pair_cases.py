"""Cases of divergences over vocabulary shards for ranks.py: equal to the whole op, and their collectives.

`tests/distributed/test_vocab_pair.py` compares every kind and backend with float64.
"""

from typing import Any

import torch
import torch.distributed as dist
from harness import compare
from vocab_parallel_cases import HIDDEN, TOKENS, VOCAB, counted, cut, ranks, refused, shards

import tokfuse
from tokfuse import distributed as D
from tokfuse.runtime.distributed import collectives

TEACHER_HIDDEN = 40
PER_SIDE = 5 * 4  # bytes per token and rank: the record of token_stats
PAIR = 6 * 4


def pair_problem() -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(9)
    sizes = {"hidden": (TOKENS, HIDDEN), "weight": (VOCAB, HIDDEN), "bias": (VOCAB,)}
    sizes |= {"teacher_hidden": (TOKENS, TEACHER_HIDDEN), "teacher_weight": (VOCAB, TEACHER_HIDDEN)}
    p = {name: torch.randn(size, generator=gen) * 0.5 for name, size in sizes.items()}
    coef = torch.randn(TOKENS, generator=gen)
    coef[3] = 0.0
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[7] = False
    target = torch.randint(VOCAB, (TOKENS,), generator=gen)
    return p | {"target": target, "mask": mask, "coef": coef, "temperature": torch.rand(TOKENS, generator=gen) + 0.5}


def check_pair_step(layout: str, kind: str, sequence_parallel: bool) -> None:
    """distill_step and linear_paired_divergence from hidden states."""
    p = pair_problem()
    given = {name: p[name] for name in ("target", "mask", "coef", "temperature")} | {"kind": kind, "normalizer": 7}
    names = ("hidden", "weight", "bias")
    whole = [p[name].clone().requires_grad_() for name in names]
    teacher = {"teacher_hidden": p["teacher_hidden"], "teacher_weight": p["teacher_weight"]}
    want = tokfuse.distill_step(**dict(zip(names, whole, strict=True)), **teacher, **given)
    (2 * want.loss).backward()

    shard, rows = shards()[layout]
    part = (lambda x: x.chunk(ranks())[dist.get_rank()].clone()) if sequence_parallel else torch.clone
    mine = [part(p["hidden"]).requires_grad_()]
    mine += [cut(p[name], shard, rows, 0).requires_grad_() for name in ("weight", "bias")]
    teacher = {"teacher_hidden": part(p["teacher_hidden"])}
    teacher["teacher_weight"] = cut(p["teacher_weight"], shard, rows, 0)
    own = dict(zip(names, mine, strict=True)) | teacher
    got = D.distill_step(shard=shard, sequence_parallel=sequence_parallel, memory_budget=60_000, **own, **given)
    (2 * got.loss).backward()
    check_same(got, want, mine, whole, shard, sequence_parallel, f"{layout} {kind}")

    grads = [x.grad.clone() for x in mine]
    for x in mine:
        x.grad = None
    del given["coef"], given["normalizer"]
    hidden, weight = own.pop("hidden"), own.pop("weight")
    out = D.linear_paired_divergence(hidden, weight, shard=shard, sequence_parallel=sequence_parallel, **own, **given)
    (2 * (out.divergence @ p["coef"]) / 7).backward()
    for x, grad in zip(mine, grads, strict=True):
        scale = float(grad.abs().max()) if grad.numel() else 0.0
        compare(x.grad, grad, atol=1e-5 * scale, what=f"{layout} {kind}: two passes")


def check_same(
    got: Any, want: Any, mine: list, whole: list, shard: D.VocabShard, sequence_parallel: bool, what: str
) -> None:
    for name in ("loss", "divergence", "loss_sum", "count"):
        compare(getattr(got, name), getattr(want, name), atol=5e-6, rtol=5e-6, what=f"{what} {name}")
    compare(got.metrics.sums, want.metrics.sums, atol=1e-4, rtol=1e-5, what=f"{what} metrics")
    first = torch.stack([got.loss.detach().expand(TOKENS), *got.stats]).clone()
    same = first.clone()
    dist.broadcast(first, 0)
    assert torch.equal(same, first), f"{what}: ranks differ"
    grads = [x.grad for x in whole]
    if sequence_parallel:
        grads[0] = grads[0].chunk(ranks())[dist.get_rank()]
    for x, grad in zip(mine, grads, strict=True):
        own = x.grad
        if grad.shape[0] == VOCAB:
            assert not bool(own[shard.size :].any()), f"{what}: padding"
            own, grad = own[: shard.size], grad[shard.start : shard.stop]
        scale = float(grad.abs().max()) if grad.numel() else 0.0
        compare(own, grad, atol=2e-5 * scale, what=f"{what} gradient")


def case_pair_step() -> None:
    check_pair_step("uneven", "kl_reverse", False)
    check_pair_step("padded", "jsd", False)
    check_pair_step("even", "tvd", True)


def case_pair_step_without_a_weight() -> None:
    p, (shard, rows) = pair_problem(), shards()["uneven"]
    h, w = p["hidden"].clone().requires_grad_(), cut(p["weight"], shard, rows, 0).requires_grad_()
    teacher = {"teacher_hidden": p["teacher_hidden"], "teacher_weight": cut(p["teacher_weight"], shard, rows, 0)}
    coef = torch.zeros(TOKENS)
    with counted() as seen:
        D.distill_step(shard=shard, hidden=h, weight=w, coef=coef, kind="jsd", **teacher).loss.backward()
    assert not bool(h.grad.any()) and not bool(w.grad.any())
    want = [] if ranks() == 1 else [("all_reduce", 4 * TOKENS * HIDDEN)]
    assert seen == want, seen


def case_pair_collectives() -> None:
    """A KL is one all-gather, another kind two; backwards add up the gradient of hidden once."""
    p, (shard, rows) = pair_problem(), shards()["padded"]
    alone = ranks() == 1
    gather = collectives.GATHER
    z, q = (cut(p[h] @ p[w].t(), shard, rows) for h, w in (("hidden", "weight"), ("teacher_hidden", "teacher_weight")))
    z.requires_grad_()
    for kind, want in (
        ("kl_forward", [(gather, PAIR * TOKENS)]),
        ("jsd", [(gather, PAIR * TOKENS), (gather, 8 * TOKENS)]),
    ):
        with counted() as seen:
            D.paired_divergence(z, q, shard=shard, kind=kind).sum().backward()
        assert seen == ([] if alone else want), seen
    h, w = p["hidden"].clone().requires_grad_(), cut(p["weight"], shard, rows, 0).requires_grad_()
    teacher = {"teacher_hidden": p["teacher_hidden"], "teacher_weight": cut(p["teacher_weight"], shard, rows, 0)}
    record, gradient = (gather, (2 * PER_SIDE + PAIR) * TOKENS), ("all_reduce", 4 * TOKENS * HIDDEN)
    with counted() as seen:
        step = D.distill_step(shard=shard, hidden=h, weight=w, kind="kl_reverse", **teacher)
        assert seen == ([] if alone else [record, gradient]), seen
        step.loss.backward()
        assert len(seen) == (0 if alone else 2)
    with counted() as seen:
        out = D.linear_paired_divergence(h, w, shard=shard, kind="jsd", **teacher)
        assert seen == ([] if alone else [record, (gather, 8 * TOKENS)]), seen
        out.divergence.sum().backward()
        assert seen == ([] if alone else [record, (gather, 8 * TOKENS), gradient]), seen


def case_pair_refusals() -> None:
    p, (shard, _) = pair_problem(), shards()["even"]
    z, w, h = torch.zeros(TOKENS, shard.size), torch.zeros(shard.size, HIDDEN), p["hidden"]
    teacher = {"teacher_hidden": h, "teacher_weight": w}
    with_grad = z.clone().requires_grad_()
    refused(lambda: D.paired_divergence(z, with_grad, shard=shard), "logits_q", "requires_grad")
    refused(lambda: D.paired_divergence(z, z[:, 1:], shard=shard), "logits_q", "the shard's size")
    refused(lambda: D.paired_divergence(z, z.double(), shard=shard), "like logits_p")
    refused(lambda: D.paired_divergence(z, z, shard=shard, kind="kl"), "kind")
    call = {"shard": shard, "kind": "jsd"}
    refused(lambda: D.linear_paired_divergence(h, w, h, w[1:], **call), "teacher_weight", "the shard's size")
    refused(lambda: D.linear_paired_divergence(h, w, h[1:], w, **call), "teacher_hidden")
    bad = p["target"] + VOCAB
    refused(lambda: D.linear_paired_divergence(h, w, h, w, target=bad, **call), f"in [0, {VOCAB})")
    refused(lambda: D.distill_step(**teacher, **call), "either logits= or hidden=")
    refused(lambda: D.distill_step(logits=z, **call), "teacher_logits")
    refused(lambda: D.distill_step(logits=z, teacher_logits=z, teacher_hidden=h, **call), "teacher_hidden")
    zero = torch.zeros(TOKENS)
    refused(lambda: D.paired_divergence(z, z, shard=shard, temperature=zero), "temperature")
    refused(lambda: D.distill_step(logits=z, teacher_logits=z, teacher_temperature=zero, **call), "teacher_temperature")
    if ranks() > 1:
        both = {"sequence_parallel": True, "reduce_hidden": False}
        refused(lambda: D.linear_paired_divergence(h, w, h, w, **call, **both), "True with sequence_parallel")
