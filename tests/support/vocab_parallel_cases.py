"""Cases of vocabulary parallelism for ranks.py. Every rank has the whole problem and its shard."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from harness import compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL, truth
from policy_cases import SHAPES, batch

import tokfuse
from tokfuse import distributed as D
from tokfuse.runtime.distributed import collectives

TOKENS, VOCAB, HIDDEN = 12, 4500, 24
STATS = ("logp", "entropy", "lse", "sum_sq", "top1")


def ranks() -> int:
    return dist.get_world_size()


def shards() -> dict[str, tuple[D.VocabShard, int]]:
    """Return name -> (shard of this rank, columns of its tensors including padding)."""
    rank, last = dist.get_rank(), dist.get_rank() == ranks() - 1
    even = D.VocabShard.even(VOCAB)
    megatron = D.VocabShard.even(VOCAB, multiple=1024)
    # The first rank has no columns, the last one the rest. A split by ceil(V / ranks) can also end like this.
    size = 0 if rank == 0 and not last else VOCAB - 7 * (ranks() - 2) if last else 7
    uneven = D.VocabShard.of_sizes(VOCAB if ranks() == 1 else size)
    return {
        "even": (even, even.size),
        "padded": (megatron, -(-VOCAB // (1024 * ranks())) * 1024),
        "uneven": (uneven, uneven.size),
    }


def cut(x: torch.Tensor, shard: D.VocabShard, columns: int, axis: int = 1) -> torch.Tensor:
    """Return this rank's part of a global tensor. Padding contains values that would make a result wrong."""
    part = x.narrow(axis, shard.start, shard.size)
    shape = list(part.shape)
    shape[axis] = columns
    out = torch.full(shape, float("nan"), dtype=x.dtype)
    out.narrow(axis, 0, shard.size).copy_(part)
    return out


def problem(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Return difficult rows: peaks at shard borders, excluded columns, fully masked rows."""
    gen = torch.Generator().manual_seed(3)
    z = torch.randn(TOKENS, VOCAB, generator=gen) * 4
    z[0, [0, VOCAB // 2, VOCAB - 1]] = 30.0
    z[1] += 90.0
    z[2] -= 90.0
    z[3, : VOCAB // 2] = -torch.inf
    z[4, VOCAB // 4 :] = -torch.inf
    z[5] = -torch.inf
    z[6, : VOCAB // 3] -= 120.0  # the shard's part of the probability underflows float32
    target = torch.randint(VOCAB, (TOKENS,), generator=gen)
    target[:9] = torch.tensor([VOCAB - 1, 5, VOCAB // 2, VOCAB - 3, 17, 1, 9, 10**9, VOCAB // 2 - 1])
    target[10] = int(z[10].argmax())
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[7] = False  # rows whose target is out of range
    z = z.to(dtype)
    z[7] = float("nan")
    return {
        "logits": z,
        "target": target,
        "mask": mask,
        "temperature": torch.rand(TOKENS, generator=gen) + 0.5,
        "ga": torch.randn(TOKENS, generator=gen),
        "gh": torch.randn(TOKENS, generator=gen),
        "bias_logits": torch.randn(TOKENS, VOCAB, generator=gen).to(dtype),
    }


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scalar": {"temperature": 0.7, "logit_scale": 0.5},
    "softcap": {"temperature": True, "softcap": 60.0, "logit_scale": 1.5},
    "bias": {"bias_logits": True, "bias_scale": 0.3},
}


def check_rows(dtype: torch.dtype, layout: str, name: str) -> None:
    p = problem(dtype)
    shard, columns = shards()[layout]
    options = {k: p[k] if v is True else v for k, v in OPTIONS[name].items()}
    want = truth(p["logits"], p["target"], p["ga"], p["gh"], mask=p["mask"], **options)
    own = dict(options)
    if "bias_logits" in own:
        own["bias_logits"] = cut(own["bias_logits"], shard, columns)
    z = cut(p["logits"], shard, columns).requires_grad_()
    stats = D.token_stats(z, p["target"], shard=shard, mask=p["mask"], **own)
    what = f"{layout} {name} {dtype}"
    wide = 1e-9 if dtype == torch.float64 else FORWARD_ATOL
    for field in STATS:
        compare(getattr(stats, field), getattr(want, field), atol=wide, rtol=wide, what=f"{what} {field}")
    same = torch.stack([x.double() for x in stats]).detach()
    first = same.clone()
    dist.broadcast(first, 0)
    assert torch.equal(same, first), f"{what}: ranks differ"
    usable = torch.where(stats.logp.isfinite(), stats.logp, 0.0)
    (usable @ p["ga"].to(usable) + stats.entropy @ p["gh"].to(usable)).backward()
    assert z.grad is not None
    assert not bool(z.grad[:, shard.size :].any()), f"{what}: padding has a gradient"
    grad = want.grad[:, shard.start : shard.stop]
    rtol = 1e-9 if dtype == torch.float64 else GRADIENT_RTOL
    bound = rtol * want.term.reshape(TOKENS, -1).amax(1, keepdim=True) + 1e-30
    if dtype == torch.bfloat16:
        bound = bound + half_ulp(grad, dtype)
    compare(z.grad[:, : shard.size], grad, atol=bound.expand(grad.shape), what=f"{what} gradient")


def case_rows_float32() -> None:
    for layout in ("even", "padded", "uneven"):
        check_rows(torch.float32, layout, "plain")
    check_rows(torch.float32, "uneven", "softcap")
    check_rows(torch.float32, "padded", "bias")
    check_rows(torch.float32, "even", "scalar")


def case_rows_bfloat16_and_float64() -> None:
    check_rows(torch.bfloat16, "even", "scalar")
    check_rows(torch.bfloat16, "padded", "plain")
    check_rows(torch.float64, "uneven", "softcap")
    check_rows(torch.float64, "padded", "bias")


def head_problem(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(5)
    p = problem(torch.float32)
    target = torch.where(p["mask"], p["target"], 0)
    return {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=gen).to(dtype),
        "weight": torch.randn(VOCAB, HIDDEN, generator=gen).to(dtype),
        "bias": torch.randn(VOCAB, generator=gen).to(dtype),
        "target": target,
        "mask": p["mask"],
        "temperature": p["temperature"],
        "ga": p["ga"],
        "gh": p["gh"],
    }


def leaves(p: dict[str, torch.Tensor], *names: str) -> list[torch.Tensor]:
    return [p[name].detach().clone().requires_grad_() for name in names]


def kept_of(p: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return kept ids: one next to the target, many, all, none, or without the target. Masked rows have no ids."""
    gen = torch.Generator().manual_seed(5)
    rows = []
    for t, (y, counts) in enumerate(zip(p["target"].tolist(), p["mask"].tolist(), strict=True)):
        others = torch.randperm(VOCAB, generator=gen)[: (1, 30, VOCAB, 0, 5)[t % 5]]
        own = [] if t % 5 > 2 else [y]
        rows.append(torch.cat([torch.tensor(own), others[others != y]]).long() if counts else torch.tensor([-3, 10**9]))
    return {"kept_ids": torch.cat(rows), "kept_offsets": torch.tensor([0, *map(len, rows)]).cumsum(0)}


def backward_of(stats: tokfuse.TokenStats, p: dict[str, torch.Tensor]) -> None:
    """Run the backward of logp and entropy. An infinite logp has no gradient, and does not enter the loss."""
    logp = torch.where(stats.logp.isinf(), 0.0, stats.logp)
    (logp @ p["ga"].to(logp) + stats.entropy @ p["gh"].to(logp)).backward()


def check_head(layout: str, sequence_parallel: bool, dtype: torch.dtype, kept: bool = False) -> None:
    p = head_problem(dtype)
    options = {"mask": p["mask"], "temperature": p["temperature"], "softcap": 40.0}
    if kept:
        options |= kept_of(p)
    whole = leaves(p, "hidden", "weight", "bias")
    want = tokfuse.linear_token_stats(whole[0], whole[1], p["target"], bias=whole[2], memory_budget=1, **options)
    backward_of(want, p)

    shard, rows = shards()[layout]
    h = p["hidden"].chunk(ranks())[dist.get_rank()] if sequence_parallel else p["hidden"]
    h = h.clone().requires_grad_()
    w, b = (cut(p[name], shard, rows, 0).requires_grad_() for name in ("weight", "bias"))
    got = D.linear_token_stats(h, w, p["target"], shard=shard, bias=b, sequence_parallel=sequence_parallel, **options)
    backward_of(got, p)
    what = f"{layout} sequence_parallel={sequence_parallel} {dtype}"
    atol = 1e-9 if dtype == torch.float64 else FORWARD_ATOL
    for field in STATS:
        compare(getattr(got, field), getattr(want, field), atol=atol, what=f"{what} {field}")
    grads = [x.grad for x in whole]
    if sequence_parallel:
        grads[0] = grads[0].chunk(ranks())[dist.get_rank()]
    grads[1:] = [x[shard.start : shard.stop] for x in grads[1:]]
    for x, grad, name in zip((h, w, b), grads, ("hidden", "weight", "bias"), strict=True):
        own = x.grad if name == "hidden" else x.grad[: shard.size]
        scale = float(grad.abs().max()) if grad.numel() else 1.0
        limit = (1e-9 if dtype == torch.float64 else 2e-5) * scale
        compare(own, grad, atol=limit, what=f"{what} grad_{name}")
        if name != "hidden":
            assert not bool(x.grad[shard.size :].any()), f"{what}: padding of {name}"


def case_head() -> None:
    check_head("even", False, torch.float32)
    check_head("padded", False, torch.float32)
    check_head("uneven", True, torch.float32)
    check_head("padded", True, torch.float64)


def policy_problem() -> dict[str, Any]:
    """Return the batch of the policy cases, with logits that give about its log-probs.

    Two masked tokens are added, so that four ranks can split it.
    """
    _, inputs = batch("ref_logp", "sampler_logp").cast(torch.float32)
    gen = torch.Generator().manual_seed(8)
    tokens = inputs["old_logp"].shape[0] + 2
    pad = torch.nn.functional.pad
    inputs = {k: v if k == "cu_seqlens" else pad(v, (0, 2)) for k, v in inputs.items()}
    inputs["cu_seqlens"] = pad(inputs["cu_seqlens"], (0, 1), value=tokens)
    return inputs | {
        "logits": torch.randn(tokens, VOCAB, generator=gen) * 0.3,
        "hidden": torch.randn(tokens, HIDDEN, generator=gen) * 0.3,
        "weight": torch.randn(VOCAB, HIDDEN, generator=gen) * 0.3,
        "target": torch.randint(VOCAB, (tokens,), generator=gen),
        "old_logp": torch.full((tokens,), -8.4) + torch.randn(tokens, generator=gen) * 0.3,
        "ref_logp": torch.full((tokens,), -8.4),
    }


OBJECTIVES = {
    "token": tokfuse.Objective(shape=SHAPES["ppo"], entropy_coef=0.01, kl=tokfuse.KL(coef=0.1)),
    "sequence": tokfuse.Objective(
        shape=SHAPES["ppo"],
        level="sequence",
        aggregation="seq_mean_token_mean",
        kl=tokfuse.KL(coef=0.05, estimator="k2"),
    ),
}


def check_step(
    objective: tokfuse.Objective,
    normalizer: Any,
    source: str,
    empty: bool = False,
    sequence_parallel: bool = False,
    kept: bool = False,
) -> None:
    p = policy_problem()
    if kept:
        p["mask"] = p["mask"] & (torch.arange(len(p["mask"])) % 5 < 3)  # the other rows have logp = -inf
        p |= kept_of(p)
    if empty:
        p["mask"] = torch.zeros_like(p["mask"])
    logits, hidden, weight = (p.pop(name) for name in ("logits", "hidden", "weight"))
    given = p | {"objective": objective, "normalizer": normalizer}
    shard, columns = shards()["padded"]
    if source == "logits":
        whole = [logits.clone().requires_grad_()]
        mine = [cut(logits, shard, columns).requires_grad_()]
        want = tokfuse.policy_step(logits=whole[0], **given)
        got = D.policy_step(shard=shard, logits=mine[0], **given)
        assert got.grad_logits is not None and got.grad_hidden is None
    else:
        whole = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        mine = [hidden.clone().requires_grad_(), cut(weight, shard, columns, 0).requires_grad_()]
        if sequence_parallel:
            mine[0] = hidden.chunk(ranks())[dist.get_rank()].clone().requires_grad_()
        want = tokfuse.policy_step(hidden=whole[0], weight=whole[1], **given)
        got = D.policy_step(shard=shard, hidden=mine[0], weight=mine[1], sequence_parallel=sequence_parallel, **given)
        assert got.grad_logits is None and got.grad_hidden is not None
    what = f"{source} {objective.level} empty={empty}"
    for name in ("loss", "token_loss", "loss_sum", "count"):
        compare(getattr(got, name), getattr(want, name), atol=3e-5, rtol=3e-5, what=f"{what} {name}")
    compare(got.metrics.sums, want.metrics.sums, atol=1e-3, rtol=1e-4, what=f"{what} metrics")
    for field in STATS:
        compare(getattr(got.stats, field), getattr(want.stats, field), atol=FORWARD_ATOL, what=field)
    (2 * want.loss).backward()
    (2 * got.loss).backward()
    grads = [x.grad for x in whole]
    if sequence_parallel:
        grads[0] = grads[0].chunk(ranks())[dist.get_rank()]
    grads[-1] = grads[-1].narrow(int(source == "logits"), shard.start, shard.size)
    for x, grad in zip(mine, grads, strict=True):
        own = x.grad if x.grad.shape == grad.shape else x.grad.narrow(int(source == "logits"), 0, shard.size)
        scale = float(grad.abs().max()) if grad.numel() else 0.0
        compare(own, grad, atol=3e-5 * scale, what=f"{what} gradient")


def case_policy_step() -> None:
    for source in ("logits", "hidden"):
        check_step(OBJECTIVES["token"], 37.0, source)
        check_step(OBJECTIVES["sequence"], "batch", source)


def case_kept_ids() -> None:
    check_head("padded", False, torch.float32, kept=True)
    check_head("uneven", True, torch.float64, kept=True)
    for source in ("logits", "hidden"):
        check_step(OBJECTIVES["token"], 37.0, source, kept=True)
    check_step(OBJECTIVES["sequence"], "batch", "hidden", sequence_parallel=True, kept=True)


def case_policy_step_with_sequence_parallel() -> None:
    check_step(OBJECTIVES["token"], 37.0, "hidden", sequence_parallel=True)


def case_policy_step_without_a_valid_token() -> None:
    for source in ("logits", "hidden"):
        check_step(OBJECTIVES["token"], 5.0, source, empty=True)


@contextlib.contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """Record (collective, bytes of its input) of every collective inside."""
    seen: list[tuple[str, int]] = []
    names = (collectives.GATHER, "all_reduce", collectives.SCATTER, "broadcast")
    kept = {name: getattr(dist, name) for name in names}

    def counting(name: str) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            x = args[0] if name in ("all_reduce", "broadcast") else args[1]
            seen.append((name, x.numel() * x.element_size()))
            return kept[name](*args, **kwargs)

        return call

    try:
        for name in names:
            setattr(dist, name, counting(name))
        yield seen
    finally:
        for name in names:
            setattr(dist, name, kept[name])


def case_one_collective_each_way() -> None:
    p, (shard, columns) = head_problem(), shards()["even"]
    record = (collectives.GATHER, 20 * TOKENS)
    gradient = ("all_reduce", 4 * TOKENS * HIDDEN)
    alone = ranks() == 1
    z = (p["hidden"] @ p["weight"].t())[:, shard.start : shard.stop].clone().requires_grad_()
    with counted() as seen:
        stats = D.token_stats(z, p["target"], shard=shard)
        assert seen == ([] if alone else [record])
        (stats.logp.sum() + stats.entropy.sum()).backward()
        assert seen == ([] if alone else [record])
    h, w = p["hidden"].clone().requires_grad_(), cut(p["weight"], shard, columns, 0)
    with counted() as seen:
        stats = D.linear_token_stats(h, w, p["target"], shard=shard)
        assert seen == ([] if alone else [record])
        stats.logp.sum().backward()
        assert seen == ([] if alone else [record, gradient])
    whole, h.grad = h.grad, None
    with counted() as seen:
        stats = D.linear_token_stats(h, w, p["target"], shard=shard, reduce_hidden=False)
        stats.logp.sum().backward()
        assert seen == ([] if alone else [record]), "the host adds the parts up"
    dist.all_reduce(h.grad)
    compare(h.grad, whole, atol=1e-5, what="sum of the parts")
    step = {"old_logp": torch.zeros(TOKENS), "advantage": torch.ones(TOKENS)}
    step |= {"objective": tokfuse.Objective(), "target": p["target"], "shard": shard}
    with counted() as seen:
        D.policy_step(hidden=p["hidden"], weight=w.requires_grad_(), **step).loss.backward()
        assert seen == ([] if alone else [record]), "nobody asked for the gradient of hidden"
    local = h.detach().chunk(ranks())[dist.get_rank()].clone().requires_grad_()
    with counted() as seen:
        D.policy_step(hidden=local, weight=w, sequence_parallel=True, **step).loss.backward()
    part = 4 * TOKENS * HIDDEN
    want = [(collectives.GATHER, part // ranks()), record, (collectives.SCATTER, part)]
    assert seen == ([] if alone else want), seen


def refused(call: Any, *words: str) -> None:
    try:
        call()
    except (ValueError, TypeError) as error:
        text = str(error)
    else:
        raise AssertionError(f"not refused: {words}")
    assert all(word in text for word in words), text


def case_refusals_are_the_same_on_every_rank() -> None:
    p, (shard, _) = head_problem(), shards()["even"]
    z, w, h, y = torch.zeros(TOKENS, shard.size), p["weight"], p["hidden"], p["target"]
    refused(lambda: D.token_stats(z, y + VOCAB, shard=shard), f"in [0, {VOCAB})")
    refused(lambda: D.linear_token_stats(h, w, y - VOCAB, shard=shard), f"in [0, {VOCAB})")
    refused(lambda: D.token_stats(z[:, 1:], y, shard=shard), "columns wide", "the shard's size")
    refused(lambda: D.linear_token_stats(h, w[: shard.size - 1], y, shard=shard), "rows long")
    refused(lambda: D.token_stats(z, y, shard=ranks()), "must be a VocabShard; got int")
    refused(lambda: D.token_stats(z, y, shard=shard, top_k=VOCAB + 1), "top_k", f"[1, vocab = {VOCAB}]")
    refused(lambda: D.token_stats(z, y, shard=shard, ids=y[:, None] * 0 + VOCAB), "ids", f"[0, {VOCAB})")
    refused(lambda: D.linear_token_stats(h, w, y, shard=shard, ids=y[:, None], top_k=2), "left out with ids")
    refused(lambda: D.VocabShard(10, 3, 11), "0 <= start <= stop <= 10")
    refused(lambda: D.VocabShard.even(0), "vocab_size")
    step = {"old_logp": torch.zeros(TOKENS), "advantage": torch.ones(TOKENS), "shard": shard}
    step |= {"objective": tokfuse.Objective(), "target": y}
    refused(lambda: D.policy_step(**step), "either logits= or hidden=")
    refused(lambda: D.policy_step(logits=z, weight=w, **step), "or pass hidden=")
    bad = step | {"old_logp": torch.zeros(3)}
    refused(lambda: D.policy_step(logits=z, **bad), "old_logp")
    if ranks() > 1:
        call = {"shard": shard, "sequence_parallel": True}
        part = call | {"reduce_hidden": False}
        refused(lambda: D.linear_token_stats(h, w, y, **part), "True with sequence_parallel")
        refused(lambda: D.linear_token_stats(h, w, y, **call), f"{ranks()} x {TOKENS} long")
        other = dist.new_group([ranks() - 1])
        if dist.get_rank() == 0:
            refused(lambda: D.VocabShard.even(VOCAB, other), "group must contain this process")
