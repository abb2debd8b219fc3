"""Test torch.compile and the custom ops: fullgraph traces of every op, opcheck, equality with eager.

A compiled call runs the same kernels, so values are bitwise equal.
"""

import pytest
import torch
from functorch.compile import make_boxed_func
from harness import Backend, backends, bits, compare
from op_calls import SMALL, Call, Problem, calls, scalar, tensors
from torch._dynamo.backends.common import aot_autograd
from torch._inductor.utils import fresh_inductor_cache

import tokfuse
from tokfuse.runtime.backends import cuda_backend, triton_backend
from tokfuse.runtime.core import native
from tokfuse.runtime.policy.metrics import SLOT

# The options of an op take the same path to its custom ops on every backend, so the CPU kernels cover them, and a GPU
# if there is one. Elsewhere a call takes seconds: formulas are traced, kernels interpreted or simulated.
WITHOUT_OPTIONS = ["reference"]
WITHOUT_OPTIONS += ["triton"] if triton_backend.interpreting() else []
WITHOUT_OPTIONS += ["cuda"] if cuda_backend.hosted() else []
TRACEABLE = [
    pytest.param(call, *parameter.values, id=f"{call.name}-{parameter.id}", marks=parameter.marks)
    for call in calls(options="rich")
    if call.row.traceable
    for parameter in backends(call.row.op)
    if not call.option or parameter.id not in WITHOUT_OPTIONS
]


class CustomOps:
    """A backend of torch.compile that runs the graph unchanged and records the calls of tokfuse's custom ops."""

    def __init__(self) -> None:
        self.calls = []
        self.backend = aot_autograd(fw_compiler=self._compiler, bw_compiler=self._compiler)

    def _compiler(self, graph, inputs):
        recorded = self.calls

        class Recorder(torch.fx.Interpreter):
            def call_function(self, target, args, kwargs):
                if getattr(target, "namespace", "") == "tokfuse":
                    recorded.append((target, args, kwargs))
                return super().call_function(target, args, kwargs)

        return make_boxed_func(lambda *inputs: Recorder(graph).run(*inputs))


def traced(call: Call, given: dict):
    """Return (outputs and gradients, the custom ops) of the call inside torch.compile."""
    function, ops = call.function(), CustomOps()
    torch.compiler.reset()
    compiled = torch.compile(lambda **given: tensors(function(**given)), fullgraph=True, backend=ops.backend)
    results = compiled(**given)
    leaves = call.differentiable(given)
    if leaves:
        scalar(tuple(results.values())).backward()
    return results | {f"grad {name}": given[name].grad for name in leaves}, ops.calls


def with_gradients(args, given: dict):
    """Return the arguments of a custom op. Those that are leaves of the call require a gradient again."""
    leaves = {x.data_ptr() for x in given.values() if isinstance(x, torch.Tensor) and x.requires_grad}
    return tuple(
        x.detach().requires_grad_(x.data_ptr() in leaves and x.is_floating_point())
        if isinstance(x, torch.Tensor)
        else x
        for x in args
    )


@pytest.mark.parametrize(("call", "backend"), TRACEABLE)
def test_compiled_equals_eager_and_its_custom_ops_pass_opcheck(call: Call, backend: Backend):
    """The reference is compiled from its formulas, so it is close but not bitwise equal."""
    reference = backend.name == "reference"
    problem = Problem(SMALL, backend.device, torch.float64 if reference else torch.float32)
    with backend.forced():
        want = call.run(problem)
        given = call.arguments(problem)
        got, ops = traced(call, given)
        assert set(got) == set(want)
        of_policy = "metrics.sums" if call.row.op.startswith("policy") else "policy.metrics.sums"
        if reference and of_policy in want:
            want[of_policy][SLOT["grad_rows"]] = float("nan")
        for name, value in want.items():
            if reference:
                compare(got[name], value, atol=1e-12, rtol=1e-12, what=name)
            else:
                assert bits(got[name]) == bits(value), name
        assert ops or reference or not call.row.registered
        for op, args, kwargs in ops:
            args = with_gradients(args, given)
            if op.name().endswith("_backward"):
                args = with_gradients(args, {})  # not differentiable
            if any(not x.is_floating_point() for x in tensors(op(*args, **kwargs)).values()):
                args = with_gradients(args, {})  # opcheck sums outputs, and cannot sum integers
            torch.library.opcheck(op, args, kwargs)


needs_native = pytest.mark.skipif(native.module() is None, reason="the native module is not built")
TOKENS, VOCAB = 6, 37


def problem():
    g = torch.Generator().manual_seed(0)
    return torch.randn(TOKENS, VOCAB, generator=g), torch.randint(0, VOCAB, (TOKENS,), generator=g)


def compiled(function):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager")


def test_in_place_step_refuses_to_be_traced():
    logits, target = problem()
    objective = tokfuse.Objective()

    def step(z):
        vectors = {"old_logp": torch.full((TOKENS,), -3.0), "advantage": torch.ones(TOKENS)}
        return tokfuse.policy_step_(z, target=target, objective=objective, **vectors).loss

    with pytest.raises(Exception, match="outside torch.compile"):
        compiled(step)(logits.clone())


@needs_native
@pytest.mark.parametrize("needs_hidden", [True, False])
def test_a_head_of_mixed_dtypes(needs_hidden):
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, 8, generator=g).bfloat16().requires_grad_(needs_hidden)
    weight = torch.randn(VOCAB, 8, generator=g).requires_grad_()
    target = problem()[1]

    def losses(h, w):
        step = tokfuse.policy_step(
            hidden=h,
            weight=w,
            target=target,
            old_logp=None,
            advantage=torch.ones(TOKENS),
            objective=tokfuse.Objective(),
        )
        stats = tokfuse.linear_token_stats(h, w, target)
        return step.loss + stats.logp.sum() + tokfuse.linear_token_stats(h, w, target, top_k=3).logp_at.sum()

    leaves = (hidden, weight) if needs_hidden else (weight,)
    want = torch.autograd.grad(losses(hidden, weight), leaves)
    got = torch.autograd.grad(compiled(losses)(hidden, weight), leaves)
    for x, y, leaf in zip(got, want, leaves, strict=True):
        assert x.dtype == leaf.dtype
        torch.testing.assert_close(x, y, rtol=2e-2 if x.dtype == torch.bfloat16 else 1e-6, atol=1e-6)


@needs_native
def test_inductor_runs_the_ops_too():
    logits, target = problem()
    torch._dynamo.reset()

    @torch.compile(fullgraph=True)
    def loss(z):
        return tokfuse.token_stats(z * 2, target).logp.sum()

    z = logits.clone().requires_grad_()
    with fresh_inductor_cache():  # code for another version of the ops' schemas does not run
        loss(z).backward()
    eager = logits.clone().requires_grad_()
    tokfuse.token_stats(eager * 2, target).logp.sum().backward()
    torch.testing.assert_close(z.grad, eager.grad)
