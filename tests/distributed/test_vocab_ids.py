"""Test ids and top_k over vocabulary shards, on every backend, with threads as ranks.

The truth is the reference op over the whole vocabulary in float64. Bounds are those of token_stats.
"""

import pytest
import thread_ranks
import torch
from harness import Backend, backends, bits, compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL

import tokfuse
from tokfuse import distributed as D

INF = float("inf")
TOKENS, VOCAB, HIDDEN, K = 10, 601, 16, 7
CUTS = (0, 1, 1, 400, 598, VOCAB)  # some shards have fewer than K columns
STATS = ("logp", "entropy", "lse", "sum_sq", "top1", "logp_at")
OPTIONS = {
    "plain": {},
    "options": {"temperature": torch.linspace(0.6, 1.8, TOKENS), "softcap": 40.0, "logit_scale": 1.3},
    "bias": {"bias_logits": True, "bias_scale": 0.4},
}


@pytest.fixture(params=backends("token_stats_at"))
def backend(request):
    return request.param


def problem():
    """Confident and excluded ids, duplicates, padding, ids that are the target, a masked row."""
    gen = torch.Generator().manual_seed(7)
    z = torch.randn(TOKENS, VOCAB, generator=gen) * 3
    z[0, 500] = 30.0  # almost certain, and no target
    z[1, 20] = 25.0
    z[2, :400] = -INF
    z[3, 590:] = -INF
    ids = torch.randint(VOCAB, (TOKENS, K), generator=gen)
    ids[0, 0], ids[1, 0], ids[2, 0], ids[3, 0] = 500, 20, 3, 600
    ids[4, 1:3] = ids[4, 0]
    ids[5, 4:] = -1
    ids[6] = -1
    target = torch.randint(VOCAB, (TOKENS,), generator=gen)
    target[0], target[1], target[2], target[3] = 3, 20, 450, 100
    ids[7, 3] = ids[7, 4] = target[7]
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[8] = False
    bias = torch.randn(TOKENS, VOCAB, generator=gen)
    z[8], ids[8, 0], target[8] = float("nan"), -9, 10**6
    return z, target, mask, ids, bias


def incoming():
    """Gradients of logp, entropy, lse and logp_at; some rows have one of them only, one has none."""
    gen = torch.Generator().manual_seed(8)
    ga, gh, g, gl = (torch.randn(shape, generator=gen) for shape in ((TOKENS,), (TOKENS,), (TOKENS, K), (TOKENS,)))
    gl[[0, 4, 7, 9]] = 0.0
    ga[4] = gh[4] = 0.0
    g[7] = 0.0
    ga[9], gh[9], g[9] = 0.0, 0.0, 0.0
    return ga, gh, gl, g


def backward(stats, given):
    pairs = zip((stats.logp, stats.entropy, stats.lse, stats.logp_at), given, strict=True)
    torch.stack([(torch.where(x.isfinite(), x, 0.0) * g.to(x)).sum() for x, g in pairs]).sum().backward()


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("form", ["matrix", "csr", "top_k"])
def test_rows(backend: Backend, form: str, name: str):
    z, target, mask, ids, bias = problem()
    options = {n: bias if x is True else x for n, x in OPTIONS[name].items()}
    given, asked = incoming(), {"ids": ids}
    if form == "csr":
        keep = ids != -1
        offsets = torch.nn.functional.pad(keep.sum(1).cumsum(0), (1, 0))
        given, asked = (*given[:3], given[3][keep]), {"ids": ids[keep], "ids_offsets": offsets}
    elif form == "top_k":
        asked = {"top_k": K}
    leaf = z.double().requires_grad_()
    wide = options | ({"bias_logits": bias.double()} if "bias_logits" in options else {})
    with tokfuse.backend("reference"):
        want = tokfuse.token_stats(leaf, target, mask=mask, **asked, **wide)
        backward(want, given)

    def cut(x, shard):
        out = torch.full((TOKENS, shard.size + 2), float("nan"), dtype=x.dtype)
        out[:, : shard.size] = x[:, shard.start : shard.stop]
        return backend.put(out).detach()

    def of_rank(shard):
        own = {n: cut(x, shard) if n == "bias_logits" else backend.put(x) for n, x in (options | asked).items()}
        part = cut(z, shard).requires_grad_()
        stats = D.token_stats(part, backend.put(target), shard=shard, mask=backend.put(mask), **own)
        backward(stats, [backend.put(x) for x in given])
        assert not part.grad[:, shard.size :].any()
        return stats, part.grad[:, : shard.size].cpu()

    results = thread_ranks.run(backend, CUTS, of_rank)
    for stats, _ in results:
        for field in STATS:
            compare(getattr(stats, field), getattr(want, field), atol=FORWARD_ATOL, rtol=FORWARD_ATOL, what=field)
            assert bits(getattr(stats, field)) == bits(getattr(results[0][0], field)), "ranks differ"
        assert (stats.top_ids is None) == (form != "top_k")
        assert form != "top_k" or torch.equal(stats.top_ids.cpu(), want.top_ids)
    # Every term of a row is a coefficient times p (1 + |log p| + entropy): at most 2 for each of them.
    size = given[0].abs() + given[1].abs() + given[2].abs()
    size = size.double() + (given[3].abs().sum(1) if form != "csr" else given[3].abs().sum())
    got = torch.cat([g for _, g in results], 1)
    compare(got, leaf.grad, atol=GRADIENT_RTOL * 4 * size[:, None] + 1e-30, what="gradient")
    if form == "matrix" and name == "plain":  # the digits of 1 - p
        assert abs(float(got[0, 500] / leaf.grad[0, 500]) - 1) < 1e-4


# Of the hidden states, and of weight and bias.
DTYPES = [(torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float32)]


@pytest.mark.parametrize("form", ["matrix", "top_k"])
@pytest.mark.parametrize("dtypes", DTYPES, ids=str)
def test_heads(backend: Backend, dtypes: tuple[torch.dtype, torch.dtype], form: str):
    _, target, mask, ids, _ = problem()
    dtype, of_head = dtypes
    gen = torch.Generator().manual_seed(9)
    case = {
        "hidden": torch.randn(TOKENS, HIDDEN, generator=gen).to(dtype),
        "weight": (torch.randn(VOCAB, HIDDEN, generator=gen) * 0.5).to(of_head),
        "bias": torch.randn(VOCAB, generator=gen).to(of_head),
    }
    given, asked = incoming(), {"ids": ids} if form == "matrix" else {"top_k": K}
    whole = {n: x.double().requires_grad_() for n, x in case.items()}
    with tokfuse.backend("reference"):
        want = tokfuse.linear_token_stats(target=target, mask=mask, temperature=0.8, **asked, **whole)
        backward(want, given)

    def of_rank(shard):
        own = {"hidden": backend.put(case["hidden"]).detach()}
        for n in ("weight", "bias"):
            part = torch.full((shard.size + 2, *case[n].shape[1:]), float("nan"), dtype=of_head)
            part[: shard.size] = case[n][shard.start : shard.stop]
            own[n] = backend.put(part).detach()
        leaves = {n: x.requires_grad_() for n, x in own.items()}
        put = {n: backend.put(x) for n, x in asked.items()} | {"mask": backend.put(mask), "temperature": 0.8}
        stats = D.linear_token_stats(target=backend.put(target), shard=shard, memory_budget=4_000, **leaves, **put)
        backward(stats, [backend.put(x) for x in given])
        return stats, {n: x.grad.cpu() for n, x in leaves.items()}

    results = thread_ranks.run(backend, CUTS, of_rank)
    for stats, _ in results:
        for field in STATS:
            compare(getattr(stats, field), getattr(want, field), atol=FORWARD_ATOL, rtol=FORWARD_ATOL, what=field)
        assert form != "top_k" or torch.equal(stats.top_ids.cpu(), want.top_ids)
    grads = [g for _, g in results]
    found = {"hidden": grads[0]["hidden"]} | {n: torch.cat([g[n][:-2] for g in grads]) for n in ("weight", "bias")}
    for n, got in found.items():
        grad = whole[n].grad
        atol = 1e-5 * grad.abs().max()
        assert got.dtype == case[n].dtype
        if got.dtype == torch.bfloat16:  # the parts of hidden are rounded before their sum
            atol = atol + half_ulp(grad, dtype) * 2 + 2.0**-7 * grad.abs().max() * (n == "hidden")
        compare(got, grad, atol=atol, what=f"grad_{n}")
