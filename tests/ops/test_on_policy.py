"""Test old_logp=None: the old policy is the current policy, in the same pass.

Results are bitwise equal to those with the pass's own log-probabilities as old_logp, for every level,
backend and source. Gradients equal those of the float64 reference.
"""

import pytest
import torch
from harness import backends

import tokfuse
from tokfuse.runtime.policy.objective import LEVELS

N, V, H = 24, 61, 12


def batch():
    gen = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(N, H, generator=gen), torch.randn(V, H, generator=gen)
    target = torch.randint(V, (N,), generator=gen)
    logp = (hidden @ weight.T).log_softmax(-1)[torch.arange(N), target]
    return (
        hidden,
        weight,
        {
            "target": target,
            "advantage": torch.randn(N, generator=gen),
            "mask": torch.rand(N, generator=gen) > 0.2,
            # Near the policy, the gradient of ratio * k3 is k, computed as a difference of terms like exp(-k).
            "ref_logp": logp + 0.3 * torch.randn(N, generator=gen),
            "cu_seqlens": torch.tensor([0, 5, 5, 16, N], dtype=torch.int32),
        },
    )


def objective(level):
    kl = tokfuse.KL(coef=0.1, estimator="ratio_k3")
    return tokfuse.Objective(level=level, kl=kl, entropy_coef=0.01)


def run(source, level, old, backend, dtype=torch.float32):
    hidden, weight, inputs = batch()
    leaves = [backend.put(x.to(dtype)).requires_grad_() for x in (hidden, weight)]
    inputs = {k: backend.put(x) for k, x in inputs.items()}
    h, w = leaves
    given = {"logits": h @ w.T} if source == "logits" else {"hidden": h, "weight": w}
    step = tokfuse.policy_step(
        **given, **inputs, old_logp=old, objective=objective(level), normalizer="batch", sampler_logp=inputs["ref_logp"]
    )
    step.loss.backward()
    return step, [x.grad for x in leaves]


@pytest.mark.parametrize("source", ["logits", "hidden"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("backend", backends("policy_step"))
def test_the_same_bits_as_with_its_own_logp(backend, level, source):
    # The reference keeps float64 from the logits to the loss. Its float32 logp is rounded.
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    with backend.forced():
        step, grads = run(source, level, None, backend, dtype)
        again, same = run(source, level, step.stats.logp, backend, dtype)
    # These are different kernels, so they are equal within the bounds of the op.
    if backend.name in ("cuda", "triton") and level == "token":
        torch.testing.assert_close(step.loss, again.loss, rtol=2e-6, atol=2e-6)
        for mine, theirs in zip(grads, same, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)
        return
    assert torch.equal(step.loss, again.loss)
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert torch.equal(step.metrics.sums, again.metrics.sums)
    assert torch.equal(step.metrics.sampler_kl_k3, again.metrics.sampler_kl_k3)
    assert step.metrics["ratio_min"] == step.metrics["ratio_max"] == 1.0


@pytest.mark.parametrize("level", LEVELS)
def test_gradients_against_float64(level):
    cpu = next(p.values[0] for p in backends("policy_step", interpreted=False) if p.values[0].name == "reference")
    step, grads = run("hidden", level, None, cpu, torch.float64)
    _, ours = run("hidden", level, None, cpu)
    stats = tokfuse.linear_token_stats(*batch()[:2], batch()[2]["target"])
    loss = tokfuse.policy_loss(
        stats.logp,
        entropy=stats.entropy,
        old_logp=None,
        objective=objective(level),
        normalizer="batch",
        **{k: x for k, x in batch()[2].items() if k != "target"},
    ).loss
    assert loss.item() == pytest.approx(step.loss.item(), rel=1e-5)
    for mine, exact in zip(ours, grads, strict=True):
        assert (mine.double() - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_compiled_whole():
    hidden, weight, inputs = batch()
    spec = objective("token")

    def loss(h):
        return tokfuse.policy_step(
            hidden=h, weight=weight, old_logp=None, normalizer="batch", objective=spec, **inputs
        ).loss

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(hidden.clone().requires_grad_()), loss(hidden))
