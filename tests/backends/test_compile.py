"""torch.compile and the custom ops: fullgraph traces, opcheck, equality with eager.

Bound: a compiled call runs the same kernels, so values are equal, not close.
"""

import pytest
import torch
from harness import host_backends

import tokfuse
from tokfuse.runtime.core import native
from tokfuse.runtime.ops import linear_token_stats, policy_step, token_stats  # noqa: F401
from tokfuse.runtime.policy.graph_form import objective_key

pytestmark = pytest.mark.skipif(native.module() is None, reason="the native module is not built: cpu backend missing")


@pytest.fixture(params=host_backends("policy_step_hidden", "reference"), autouse=True)
def backend(request):
    with tokfuse.backend(request.param):
        yield request.param


TOKENS, VOCAB, HIDDEN = 6, 37, 8
OBJECTIVE = tokfuse.Objective(kl=tokfuse.KL(coef=0.05), entropy_coef=0.01)


def problem():
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=g)
    target = torch.randint(0, VOCAB, (TOKENS,), generator=g)
    mask = torch.tensor([True, True, False, True, True, True])
    old = -torch.rand(TOKENS, generator=g) * 3
    advantage = torch.randn(TOKENS, generator=g)
    return logits, target, mask, old, advantage


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def same(function, *leaves):
    """Value and gradients of the compiled and the eager function are equal."""
    results = []
    for run in (function, compiled(function)):
        inputs = [x.clone().requires_grad_() for x in leaves]
        value = run(*inputs)
        value.backward()
        results.append([value, *(x.grad for x in inputs)])
    for eager, traced in zip(*results, strict=True):
        assert torch.equal(eager, traced)


def test_token_stats():
    logits, target, mask, *_ = problem()
    temperature = torch.linspace(0.5, 2, TOKENS)

    def loss(z):
        s = tokfuse.token_stats(z, target, temperature=temperature, softcap=20.0, mask=mask)
        return (s.logp + 0.3 * s.entropy).sum()

    same(loss, logits)


def test_linear_token_stats():
    _, target, mask, *_ = problem()
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN)

    def loss(h, w, b):
        s = tokfuse.linear_token_stats(h, w, target, bias=b, temperature=1.3, mask=mask)
        return (s.logp + 0.3 * s.entropy).sum()

    same(loss, hidden, weight, torch.randn(VOCAB))


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_policy_loss(level):
    logits, _, mask, old, advantage = problem()
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    objective = tokfuse.Objective(level=level, kl=OBJECTIVE.kl, entropy_coef=0.01)

    def loss(logp, entropy):
        return tokfuse.policy_loss(
            logp,
            entropy=entropy,
            old_logp=old,
            advantage=advantage,
            mask=mask,
            cu_seqlens=cu,
            ref_logp=old + 0.1,
            objective=objective,
            normalizer="batch",
        ).loss

    same(loss, old + 0.2 * logits[:, 0], logits[:, 1].abs())


def test_policy_step():
    logits, target, mask, old, advantage = problem()

    def loss(z):
        return tokfuse.policy_step(
            logits=z,
            target=target,
            old_logp=old,
            advantage=advantage,
            mask=mask,
            ref_logp=old + 0.1,
            objective=OBJECTIVE,
            normalizer=3.0,
        ).loss

    same(loss, logits)


@pytest.mark.parametrize("frozen", [False, True])
def test_policy_step_from_hidden(frozen):
    _, target, mask, old, advantage = problem()
    hidden, weight = torch.randn(TOKENS, HIDDEN), torch.randn(VOCAB, HIDDEN)

    def loss(h, *w):
        return tokfuse.policy_step(
            hidden=h,
            weight=weight if frozen else w[0],
            target=target,
            old_logp=old,
            advantage=advantage,
            mask=mask,
            ref_logp=old + 0.1,
            objective=OBJECTIVE,
            normalizer=3.0,
        ).loss

    same(loss, *([hidden] if frozen else [hidden, weight]))


def test_in_place_step_refuses_to_be_traced():
    logits, target, _, old, advantage = problem()
    objective = tokfuse.Objective()

    def step(z):
        return tokfuse.policy_step_(z, target=target, old_logp=old, advantage=advantage, objective=objective).loss

    with pytest.raises(Exception, match="outside torch.compile"):
        compiled(step)(logits.clone())


def test_inductor_runs_the_ops_too(backend):
    if backend == "triton":
        pytest.skip("inductor calls the op as aot_eager does, and compiles 20 s for the CPU")
    logits, target, *_ = problem()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def loss(z):
        return tokfuse.token_stats(z * 2, target).logp.sum()

    z = logits.clone().requires_grad_()
    loss(z).backward()
    eager = logits.clone().requires_grad_()
    tokfuse.token_stats(eager * 2, target).logp.sum().backward()
    torch.testing.assert_close(z.grad, eager.grad)


def op_arguments():
    logits, target, mask, old, advantage = problem()
    grad = logits.clone().requires_grad_()
    hidden = torch.randn(TOKENS, HIDDEN).requires_grad_()
    weight = torch.randn(VOCAB, HIDDEN).requires_grad_()
    ops = torch.ops.tokfuse
    stats = (None, 1.3, 0.0, 1.0, mask, None, 1.0)
    shift = torch.zeros(TOKENS)
    policy = (old, advantage, "token", mask, None, None, None, old + 0.1, None, None)
    key = objective_key(OBJECTIVE)
    head = (None, 1.0, 0.0, 1.0, mask, 1 << 20)
    return {
        "token_stats": (ops.token_stats, (grad, target, *stats)),
        "token_stats_backward": (
            ops.token_stats_backward,
            (logits, target, shift, shift + 1, shift, advantage, None, *stats),
        ),
        "linear_token_stats": (ops.linear_token_stats, (hidden, weight, None, target, *head)),
        "linear_token_stats/bfloat16": (
            ops.linear_token_stats,
            (hidden.detach().bfloat16(), weight.detach().bfloat16(), None, target, *head),
        ),
        "linear_token_stats_backward": (
            ops.linear_token_stats_backward,
            (
                hidden.detach(),
                weight.detach(),
                None,
                target,
                *head,
                shift,
                shift + 1,
                shift,
                advantage,
                None,
                True,
                True,
                False,
            ),
        ),
        "policy_loss": (ops.policy_loss, (old.clone().requires_grad_(), (-old).requires_grad_(), *policy, key, 0.5)),
        "policy_step_hidden": (
            ops.policy_step_hidden,
            (hidden, weight, None, target, None, 1.0, 0.0, 1.0, 1 << 20, *policy, key, 0.5, False, True, True, False),
        ),
        "policy_step": (ops.policy_step, (grad, target, None, 1.3, 0.0, 1.0, *policy, key, 0.5)),
    }


@pytest.mark.parametrize("name", list(op_arguments()))
def test_opcheck(name):
    op, arguments = op_arguments()[name]
    torch.library.opcheck(op.default, arguments)
