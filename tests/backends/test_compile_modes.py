"""Test torch.compile with dynamic shapes, the reference, dtypes, and errors at run time."""

import pytest
import torch
from harness import backends, bits, compare

import tokfuse
from tokfuse import KL, Objective

TOKENS = Objective(kl=KL(coef=0.05), entropy_coef=0.01)
SEQUENCES = Objective(level="sequence", aggregation="seq_mean_token_mean")
VOCAB, HIDDEN = 19, 5


def batch(tokens: int, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(tokens)
    other = {
        "target": torch.randint(0, VOCAB, (tokens,), generator=gen),
        "old_logp": torch.rand(tokens, generator=gen, dtype=torch.float64).to(dtype) - 3,
        "advantage": torch.randn(tokens, generator=gen, dtype=torch.float64).to(dtype),
        "mask": torch.arange(tokens) % 4 != 1,
        "cu_seqlens": torch.tensor([0, 2, tokens]).int(),
    }
    return torch.randn(tokens, VOCAB, generator=gen).to(dtype), other


def stats(z, target, old_logp, advantage, mask, cu_seqlens):
    s = tokfuse.token_stats(z, target, mask=mask, temperature=0.9)
    return (advantage * s.logp).sum() + s.entropy.sum()


def loss(z, target, old_logp, advantage, mask, cu_seqlens):
    s = tokfuse.token_stats(z, target, mask=mask)
    return tokfuse.policy_loss(
        s.logp,
        entropy=s.entropy,
        old_logp=old_logp,
        advantage=advantage,
        mask=mask,
        cu_seqlens=cu_seqlens,
        objective=SEQUENCES,
        normalizer="batch",
    ).loss


def step(z, target, old_logp, advantage, mask, cu_seqlens):
    return tokfuse.policy_step(
        logits=z,
        target=target,
        old_logp=old_logp,
        advantage=advantage,
        mask=mask,
        ref_logp=old_logp - 0.1,
        objective=TOKENS,
        normalizer=3.0,
    ).loss


def head(z, target, old_logp, advantage, mask, cu_seqlens):
    weight = torch.linspace(-1, 1, VOCAB * HIDDEN, dtype=z.dtype).view(VOCAB, HIDDEN)
    s = tokfuse.linear_token_stats(z[:, :HIDDEN], weight, target, mask=mask)
    return (
        s.logp.sum()
        + tokfuse.policy_step(
            hidden=z[:, HIDDEN : 2 * HIDDEN],
            weight=weight,
            target=target,
            old_logp=old_logp,
            advantage=advantage,
            mask=mask,
            cu_seqlens=cu_seqlens,
            objective=SEQUENCES,
        ).loss
    )


FUNCTIONS = {f.__name__: f for f in (stats, loss, step, head)}


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


def both(eager, traced, z, other):
    """Return [(value, gradient)] of the eager and the compiled function."""
    out = []
    for run in (eager, traced):
        x = z.clone().requires_grad_()
        value = run(x, **other)
        value.backward()
        out.append((value.detach(), x.grad))
    return out


@pytest.mark.parametrize("name", FUNCTIONS)
def test_dynamic_shapes_trace_once_or_twice(name: str):
    """One graph, and at most one more for sizes that need another graph."""
    if not any(p.values[0].name == "cpu" and not p.marks for p in backends("policy_step")):
        pytest.skip("cpu: the native module is not built")
    function = FUNCTIONS[name]
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    for tokens in (4, 7, 11):
        z, other = batch(tokens)
        if not graphs:
            torch._dynamo.reset()
            traced = torch.compile(function, fullgraph=True, backend=count, dynamic=True)
        x = z.clone().requires_grad_()
        value = traced(x, **other)
        value.backward()
        (want, grad), _ = both(function, function, z, other)
        assert bits(value) == bits(want) and bits(x.grad) == bits(grad)
    assert len(graphs) <= 2


@pytest.mark.parametrize(
    ("name", "dtype"), [("stats", torch.float32), ("step", torch.float64), ("head", torch.float64)]
)
def test_the_reference_compiles_too(name: str, dtype: torch.dtype):
    """torch.compile then derives its backward from the forward."""
    z, other = batch(6, dtype)
    with tokfuse.backend("reference"):
        (value, grad), (again, traced) = both(FUNCTIONS[name], compiled(FUNCTIONS[name]), z, other)
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    assert again.dtype == traced.dtype == dtype
    compare(again, value, atol=atol, rtol=atol)
    compare(traced, grad, atol=atol, rtol=atol)


@pytest.mark.parametrize(("name", "dtype"), [("step", torch.bfloat16), ("head", torch.float16)])
def test_16_bit(name: str, dtype: torch.dtype):
    z, other = batch(6, dtype)
    (value, grad), (again, traced) = both(FUNCTIONS[name], compiled(FUNCTIONS[name]), z, other)
    assert bits(value) == bits(again) and bits(grad) == bits(traced)


def test_every_output_is_there_and_only_the_loss_has_a_graph():
    z, other = batch(6)

    def outputs(x):
        out = tokfuse.policy_step(logits=x, objective=SEQUENCES, **other, sampler_logp=other["old_logp"] + 0.1)
        return (
            out.loss,
            out.token_loss,
            out.loss_sum,
            out.count,
            out.metrics.sums,
            out.metrics.sampler_kl_k3,
            *out.stats,
            out.grad_logits,
        )

    eager = outputs(z.clone().requires_grad_())
    traced = compiled(outputs)(z.clone().requires_grad_())
    assert [bits(a) for a in eager] == [bits(a) for a in traced]
    assert [a.requires_grad for a in traced] == [True] + [False] * (len(traced) - 1)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_grad(context):
    z, other = batch(6)
    with context():
        value = compiled(step)(z.clone().requires_grad_(), **other)
    assert not value.requires_grad
    compare(value, step(z, **other))


def test_autocast_changes_nothing():
    z, other = batch(6)
    (value, grad), _ = both(step, step, z, other)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, (again, traced) = both(step, compiled(step), z, other)
    assert bits(value) == bits(again) and bits(grad) == bits(traced)


def test_values_are_checked_when_the_graph_runs():
    z, other = batch(6)
    traced = compiled(stats)
    traced(z, **other)
    bad = other | {"target": torch.full((6,), VOCAB)}
    with pytest.raises(ValueError, match=r"target must be in \[0, 19\)"):
        traced(z, **bad)
    traced = compiled(loss)
    traced(z, **other)
    for offsets in ([0, 2, 5], [1, 2, 6], [0, 7, 6]):
        with pytest.raises(ValueError, match="cu_seqlens must"):
            traced(z, **other | {"cu_seqlens": torch.tensor(offsets).int()})


def test_a_forced_backend_is_part_of_the_trace():
    """A graph traced for one backend is not used for a call that forces another."""
    z, other = batch(6)
    traced = compiled(stats)
    first = traced(z, **other)
    with tokfuse.backend("cuda"), pytest.raises(Exception, match="cannot run this call"):
        compiled(stats)(z, **other)
    assert bits(traced(z, **other)) == bits(first)
