"""policy_step from hidden states: the GEMMs of the lm_head around the fused row kernels."""

import functools
from collections.abc import Callable
from typing import Any

import torch

from tokfuse.runtime.backends import kept_rows
from tokfuse.runtime.backends.reference_policy import traced_step
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.forward_gradients import Computed, Gradients, with_gradients
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_MASK, LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head import cpu_runs, device_runs, reference_runs
from tokfuse.runtime.lm_head.probe import Probes, deliver
from tokfuse.runtime.lm_head.problem import HEAD_SCHEMA, NAMES, HeadProblem, Step, StepRun, wanted
from tokfuse.runtime.policy.graph_form import (
    INPUTS_SCHEMA,
    OBJECTIVE_SCHEMA,
    checked_inverse,
    flat_objective,
    objective_of,
)
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference import linear_token_stats as linear_reference

OP = "policy_step_hidden"


def apply(
    p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> tuple[PolicyTerms, TokenStats, Gradients]:
    """Return terms, statistics and gradients of the step. The loss is differentiable."""
    capability = select(OP, p.hidden.device.type, p.dtype, objective.features(p.options.features()))
    if not torch.compiler.is_compiling():
        compute = functools.partial(capability.run, p, inputs, objective, inv_normalizer)
        return attach(p.hidden, p.weight, p.bias, compute, p.probes)
    if capability.backend == "reference":
        every = linear_reference.logits_of(p.hidden, p.weight, p.bias)
        logits = kept_reference.restricted(every, p.kept, p.options.mask)
        return *traced_step(logits, p.target, p.options, inputs, objective, inv_normalizer, p.dtype), {}
    return _custom_op(p, inputs, objective, inv_normalizer)


def attach(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    compute: Callable[[], Step],
    probes: Probes = (),
) -> tuple[PolicyTerms, TokenStats, Gradients]:
    """Return terms, statistics and gradients of `compute()`. The backward of the loss returns the gradients."""
    gradients: Gradients = {}

    def flat() -> Computed:
        terms, stats, grads = compute()
        more = () if terms.loss_sum is None else (terms.loss_sum,)
        return terms.loss, (terms.token_loss, terms.sums, *stats, *more), grads

    leaves = dict(zip(NAMES, (hidden, weight, bias), strict=True))
    loss, token_loss, sums, *rest = with_gradients(
        "policy_step", leaves, flat, gradients, functools.partial(deliver, probes)
    )
    stats, loss_sum = TokenStats(*rest[:5]), rest[5] if len(rest) > 5 else None
    return PolicyTerms(loss, token_loss, token_loss, token_loss, sums, loss_sum), stats, gradients


register_cpu(OP, cpu_runs.policy_step, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_runs.step_run(device_runs.CUDA_STEP), FLOAT_DTYPES, "softcap")
register_triton(OP, device_runs.step_run(device_runs.TRITON_STEP), FLOAT_DTYPES, "softcap")
register_reference(OP, reference_runs.policy_step, "softcap", WITHOUT_KERNELS)


# -------------------------------------------------------------------------------- torch.compile


@graph_op(
    "tokfuse::policy_step_hidden",
    f"({HEAD_SCHEMA}, {FLAT_SCHEMA_WITHOUT_MASK}, int memory_budget, {kept_rows.SCHEMA}, {INPUTS_SCHEMA}"
    f", {OBJECTIVE_SCHEMA}, bool compact_clipped, bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("policy_step.fwd")
def _hidden_op(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, *rest: Any
) -> list[torch.Tensor]:
    vector, scalar, softcap, logit_scale, budget, ids, offsets, *fields = rest[:-7]
    form, coefficients, inv_normalizer, compact_clipped, *needs = rest[-7:]
    inputs = PolicyInputs(*fields)
    options = LogitOptions.from_flat(vector, scalar, softcap, logit_scale, inputs.mask)
    p = HeadProblem(
        "policy_step",
        hidden,
        weight,
        bias,
        target,
        options,
        budget,
        needs=(needs[0], needs[1], needs[2]),
        compact_clipped=compact_clipped,
        kept=kept_rows.of_graph(ids, offsets),
    )
    objective = objective_of(form, coefficients)
    run: StepRun = select(OP, hidden.device.type, p.dtype, objective.features(options.features())).run
    terms, stats, grads = run(p, inputs, objective, checked_inverse("policy_step", inv_normalizer))
    held = [hidden.new_empty(0) if x is None else x for x in grads]
    return [terms.loss, terms.token_loss, terms.sums, *stats, *held]


@_hidden_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Any:
    vectors = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(6)]
    sums = hidden.new_empty(len(SLOTS), dtype=torch.float64)
    grads = [
        x.new_empty(x.shape) if x is not None and need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    ]
    loss = hidden.new_empty((), dtype=torch.float32)
    return [loss, vectors[0], sums, *vectors[1:], *grads]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(*output[8:])
    ctx.inputs = len(inputs)


def _op_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    scaled = [
        g * grads[0].to(g.dtype) if need else None
        for g, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    rest = [None] * (ctx.inputs - 3)
    return (*scaled, *rest)


_hidden_op.register_autograd(_op_backward, setup_context=_setup_context)


def _custom_op(
    p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> tuple[PolicyTerms, TokenStats, Gradients]:
    needs = wanted(p)
    tensors = (p.hidden, p.weight, p.bias, p.target)
    rest = (*flat_objective(objective), inv_normalizer, p.compact_clipped, *needs)
    out = _hidden_op(*tensors, *p.options.flat()[:4], p.memory_budget, *kept_rows.flat(p.kept), *inputs, *rest)
    loss, token_loss, sums = out[:3]
    terms = PolicyTerms(loss, token_loss, token_loss, token_loss, sums)
    grads = [x if need else None for x, need in zip(out[8:], needs, strict=True)]
    return terms, TokenStats(*out[3:8]), dict(zip(NAMES, grads, strict=True))
