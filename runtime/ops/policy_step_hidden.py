"""policy_step from hidden states: the lm_head's GEMMs around the fused row kernels."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_policy, triton_objective
from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import (
    FLOAT_DTYPES,
    register_cpu,
    register_cuda,
    register_reference,
    register_triton,
    select,
)
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head import head as heads
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.head import GradientPool, Head, HeadGradients, HeadProblem, LogitsBuffer
from tokfuse.runtime.ops import linear_token_stats as linear
from tokfuse.runtime.ops import policy_loss as losses
from tokfuse.runtime.ops.policy_loss import PolicyTerms
from tokfuse.runtime.ops.token_stats import Kernels, TokenStats
from tokfuse.runtime.policy.metrics import SLOT
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.step_result import Gradients, hand_over
from tokfuse.runtime.reference import linear_token_stats as linear_reference
from tokfuse.runtime.reference import token_stats as stats_reference
from tokfuse.runtime.reference.policy_loss import PolicyInputs

OP = "policy_step_hidden"
NAMES = ("hidden", "weight", "bias")
PREPARE, ROWS, METRICS = 1, 2, 4  # phases of tokfuse._native.policy_step
STEP_PHASES = PREPARE | ROWS | METRICS

Step = tuple[PolicyTerms, TokenStats, list[torch.Tensor | None]]


def apply(
    problem: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float
) -> tuple[tuple[torch.Tensor, ...], Gradients]:
    """((loss, token_loss, sums, *stats), gradients), wired to autograd."""
    gradients: Gradients = {}
    if torch.compiler.is_compiling():
        p, features = problem, problem.options.features()
        if select(OP, p.hidden.device.type, p.hidden.dtype, features).backend == "reference":
            logits = linear_reference.logits_of(p.hidden, p.weight, p.bias)
            return traced_reference(logits, p.target, p.options, inputs, objective, inverse, p.hidden.dtype), {}
        return _custom_op(problem, inputs, objective, inverse)
    p, features = problem, problem.options.features()
    run = select(OP, p.hidden.device.type, p.hidden.dtype, features).run
    out = attach(p.hidden, p.weight, p.bias, lambda: run(p, inputs, objective, inverse), gradients)
    return out, gradients


def attach(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    compute: Callable[[], Step],
    gradients: Gradients,
) -> tuple[torch.Tensor, ...]:
    """(loss, token_loss, sums, *stats) of `compute()`, whose gradients, also put into `gradients`,
    the backward of the loss hands out."""
    out: tuple[torch.Tensor, ...] = _HiddenStep.apply(hidden, weight, bias, compute, gradients)
    return out


def traced_reference(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, ...]:
    """(loss, token_loss, sums, *stats) for torch.compile, which then makes the backward."""
    exact = stats_reference.exact(logits, target, **o._asdict())
    terms = losses._reference_run(exact[0], exact[1], inputs, objective, inverse)
    (loss,) = stats_reference.rounded([terms.loss], dtype)
    terms, stats = rounded_step(terms, exact, dtype)
    return loss, terms.token_loss, terms.sums, *stats


def rounded_step(
    terms: PolicyTerms, stats: Iterable[torch.Tensor], dtype: torch.dtype
) -> tuple[PolicyTerms, TokenStats]:
    """What the reference composes in float64, detached, in the result dtype of inputs of `dtype`."""
    *values, sums = terms
    loss, token_loss, d_logp, d_entropy = stats_reference.rounded((x.detach() for x in values), dtype)
    detached = stats_reference.rounded((x.detach() for x in stats), dtype)
    return PolicyTerms(loss, token_loss, d_logp, d_entropy, sums), TokenStats(*detached)


class _HiddenStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        compute: Callable[[], Step],
        gradients: Gradients,
    ) -> tuple[torch.Tensor, ...]:
        terms, stats, grads = compute()
        gradients.update(zip(NAMES, grads, strict=True))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(terms.token_loss, terms.sums, *stats)
        return terms.loss, terms.token_loss, terms.sums, *stats

    @staticmethod
    @torch.autograd.function.once_differentiable
    @ranged("policy_step.bwd")
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        grads = hand_over(ctx.gradients, grad_loss)
        return *(grads[name] for name in NAMES), None, None


def wanted(p: HeadProblem) -> tuple[bool, bool, bool]:
    """Which of hidden, weight and bias ask for a gradient."""
    if p.needs is not None:
        return p.needs
    bias = p.bias is not None and p.bias.requires_grad
    return p.hidden.requires_grad, p.weight.requires_grad, bias


def policy_terms(out: tuple[torch.Tensor, ...]) -> PolicyTerms:
    """PolicyTerms from the native output vectors."""
    token_loss, d_logp, d_entropy, sums, _ = out
    return PolicyTerms(sums[SLOT["loss"]].to(torch.float32), token_loss, d_logp, d_entropy, sums)


# ---------------------------------------------------------------------------------------- backends


def _reference_run(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float) -> Step:
    needs = wanted(p)
    usable = losses.usable_by_autograd
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            None if x is None else usable(x.detach()).requires_grad_(need)
            for x, need in zip((p.hidden, p.weight, p.bias), needs, strict=True)
        ]
        p = p._replace(target=usable(p.target), options=LogitOptions(*map(usable, p.options)))
        inputs = PolicyInputs(*map(usable, inputs))
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        logits = linear_reference.logits_of(hidden, weight, bias)
        options = linear._reference_options(p.options)
        stats = stats_reference.exact(logits, p.target, op="policy_step", **options)
        terms = losses._reference_run(stats[0], stats[1], inputs, objective, inverse)
        asked = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
        if p.row_norms is not None:
            asked.append(logits)
        found = iter(torch.autograd.grad(terms.loss, asked, allow_unused=True, materialize_grads=True) if asked else ())
    grads = [next(found) if need else None for need in needs]
    if p.row_norms is not None:
        p.row_norms.copy_(torch.linalg.vector_norm(next(found), dim=1))
    return *rounded_step(terms, stats, p.hidden.dtype), grads


def _cpu_run(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float) -> Step:
    linear.check_targets("policy_step", p)
    with torch.no_grad():
        if objective.level != "token":
            return _cpu_run_sequence(p, inputs, objective, inverse)
        return _cpu_run_token(p, inputs, objective, inverse)


def _cpu_run_token(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float) -> Step:
    """Gradients in the forward: 2MHV for the logits, 4MHV for the rows that carry gradient."""
    module = native.module()
    assert module is not None
    index = linear.row_index(p)
    stats = [torch.zeros(p.tokens, dtype=torch.float32) for _ in range(7)]
    out = losses.native_outputs(p.tokens)
    for x in out[:3]:
        x.zero_()  # masked rows enter no chunk
    record, alive = losses.native_record(stats[0], stats[1], inputs, objective, inverse, out)
    pointers = [x.data_ptr() for x in stats[2:]]
    head = Head(p)
    gradients = HeadGradients(head, wanted(p))

    def phase(which: int, buffer: LogitsBuffer, start: int, chunk: torch.Tensor, kept: int) -> int:
        chunk_record, chunk_alive = buffer.record(p, start, start + chunk.shape[0], chunk)
        code: int = module.policy_step(which, chunk_record, record, *pointers, chunk_record[0], chunk_record[1], kept)
        del chunk_alive
        assert code < 0  # targets were checked before the first GEMM
        return -1 - code

    def fill(pool: GradientPool, tokens: torch.Tensor) -> int:
        """Take tokens into the pool until it is full, run its GEMMs; returns how many it took."""
        done = 0
        while done < tokens.shape[0] and pool.free() > 0:
            chunk = tokens[done : done + pool.free()]
            head.logits(head.rows_of_hidden(chunk), pool.buffer, pool.used)
            kept = pool.tokens[pool.used :].data_ptr()
            pool.used += phase(ROWS, pool.buffer, pool.used, chunk, kept)
            done += chunk.shape[0]
        pool.flush()
        return done

    tiny = LogitsBuffer.workspace(1, p.vocab)
    phase(PREPARE, tiny, 0, index[:0], 0)
    start, rows = 0, heads.workspace_rows(p, max(1, index.shape[0]))
    if gradients.weight is not None:
        inside = heads.dw_buffer(gradients.weight, index.shape[0], rows)
        if inside is not None:
            start = fill(GradientPool(inside, gradients), index)
    if start < index.shape[0]:
        rows = heads.workspace_rows(p, index.shape[0] - start)
        pool = GradientPool(LogitsBuffer.workspace(rows, p.vocab), gradients)
        while start < index.shape[0]:
            start += fill(pool, index[start:])
    phase(METRICS, tiny, 0, index[:0], 0)
    del alive
    return policy_terms(out), TokenStats(*stats[:5]), gradients.finish()


def _cpu_run_sequence(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float) -> Step:
    """A ratio of the whole sequence needs all its logp first: statistics, then gradients."""
    *stats, shift, inv_sum = linear._cpu_forward(p)
    terms = losses._cpu_run(stats[0], stats[1], inputs, objective, inverse)
    grads = linear._cpu_backward(p, shift, inv_sum, stats[1], terms.d_logp, terms.d_entropy, wanted(p))
    return terms, TokenStats(*stats), grads


# ----------------------------------------------------------------------- CUDA and Triton backends


class PolicyKernels(NamedTuple):
    """What the two device backends do differently."""

    objective: Any
    """Module with encode, policy_step_rows, policy_metrics and results_like."""
    loss: Callable[..., PolicyTerms]
    linear: Kernels


def may_carry_gradient(x: Any, objective: Objective) -> torch.Tensor | None:
    """(tokens,) bool, False where a token-level coefficient is 0 whatever the logits; None: all.

    A zero advantage is the common case, whole groups of it. What the clip will stop is not known.
    `x` holds the per-token inputs of the objective.
    """
    if not objective.shape.zero_without_advantage:
        return None
    terms = [x.advantage != 0 if x.token_weight is None else (x.advantage != 0) & (x.token_weight != 0)]
    for coef, weight in (
        (0.0 if objective.kl is None else objective.kl.coef, x.kl_weight),
        (objective.entropy_coef, x.entropy_weight),
    ):
        if coef != 0.0 and weight is None:
            return None
        if coef != 0.0:
            terms.append(weight != 0)
    return torch.stack(terms).any(0)


def _device_run(kernels: PolicyKernels) -> Callable[..., Step]:
    def run(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float) -> Step:
        if may_read(p.target):
            linear.check_targets("policy_step", p)
        device_head.check_compact("policy_step", p)
        with torch.no_grad():
            per_token = objective.level == "token" and inputs.old_logp is not None
            way = _device_run_token if per_token else _device_run_sequence
            return way(kernels, p, inputs, objective, inverse)

    return run


def _device_run_token(
    kernels: PolicyKernels, p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float
) -> Step:
    """Gradients in the forward: 2MHV, and 4MHV for the rows that may carry gradient."""
    given = kernels.objective.encode(inputs, objective, inverse)
    x, o = given.pointers, p.options
    needs = wanted(p)
    gradient = may_carry_gradient(x, objective)
    if not any(needs):
        gradient = torch.zeros_like(p.target, dtype=torch.bool)
    rows = device_head.classify(p, o.mask, gradient)
    head = DeviceHead(p, needs, rows)
    stats = TokenStats(*(torch.zeros_like(x.old_logp) for _ in range(5)))
    out = kernels.objective.results_like(x.old_logp)
    for start, stop in ((0, rows.gradient), (rows.gradient, rows.forward)):
        for index, h in head.chunks(start, stop):
            logits = head.logits(h)
            dz = head.gradient_like(logits)
            kernels.objective.policy_step_rows(
                logits,
                dz,
                index,
                p.target,
                given,
                stats,
                out,
                temperature=o.temperature,
                softcap=o.softcap,
                logit_scale=o.logit_scale,
            )
            if start > 0:
                continue
            if p.compact_clipped:
                live = (out.d_logp[index] != 0) | (out.d_entropy[index] != 0)
                head.add_live(index, h, dz, live)
            else:
                head.add(index, h, dz)
    sums = kernels.objective.policy_metrics(stats.logp, stats.entropy, given, out)
    loss = sums[SLOT["loss"]].to(torch.float32)
    terms = PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, sums)
    return terms, stats, head.finish()


def _device_run_sequence(
    kernels: PolicyKernels, p: HeadProblem, inputs: PolicyInputs, objective: Objective, inverse: float
) -> Step:
    """As on the CPU: statistics, then the gradients of the rows that carry one."""
    assert kernels.linear.backward is not None
    *stats, row_max, inv_sum = kernels.linear.forward(p)
    terms = kernels.loss(stats[0], stats[1], inputs, objective, inverse)
    grads: Any = kernels.linear.backward(p, row_max, inv_sum, stats[1], terms.d_logp, terms.d_entropy, wanted(p))
    return terms, TokenStats(*stats), grads


register_cpu(OP, _cpu_run, FLOAT_DTYPES, "softcap")
register_cuda(OP, _device_run(PolicyKernels(cuda_policy, losses._cuda_run, linear.CUDA)), FLOAT_DTYPES, "softcap")
register_triton(
    OP, _device_run(PolicyKernels(triton_objective, losses._triton_run, linear.TRITON)), FLOAT_DTYPES, "softcap"
)
register_reference(OP, _reference_run, "softcap")


# -------------------------------------------------------------------------------- torch.compile


@torch.library.custom_op("tokfuse::policy_step_hidden", mutates_args=())
@ranged("policy_step.fwd")
def _hidden_op(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: torch.Tensor | None,
    scalar_temperature: float,
    softcap: float,
    logit_scale: float,
    memory_budget: int,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    advantage_level: str,
    cu_seqlens: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    signal: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    kl_weight: torch.Tensor | None,
    entropy_weight: torch.Tensor | None,
    objective_key: str,
    inverse: float,
    compact_clipped: bool,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> list[torch.Tensor]:
    p = linear.head_problem(
        hidden, weight, bias, target, mask, temperature, scalar_temperature, softcap, logit_scale, memory_budget
    )
    needs = (needs_hidden, needs_weight, needs_bias)
    p = p._replace(needs=needs, compact_clipped=compact_clipped)
    inputs = PolicyInputs(
        old_logp,
        advantage,
        advantage_level,
        mask,
        cu_seqlens,
        token_weight,
        signal,
        ref_logp,
        kl_weight,
        entropy_weight,
    )
    run = select(OP, hidden.device.type, hidden.dtype, p.options.features()).run
    terms, stats, grads = run(p, inputs, losses.objective_of(objective_key), inverse)
    held = [hidden.new_empty(0) if x is None else x for x in grads]
    return [terms.loss, terms.token_loss, terms.sums, *stats, *held]


@_hidden_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Any:
    vectors = [hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(6)]
    sums = hidden.new_empty(len(SLOT), dtype=torch.float64)
    grads = [
        x.new_empty(x.shape) if x is not None and need else hidden.new_empty(0)
        for x, need in zip((hidden, weight, bias), rest[-3:], strict=True)
    ]
    loss = hidden.new_empty((), dtype=torch.float32)
    return [loss, vectors[0], sums, *vectors[1:], *grads]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(*output[8:])


def _op_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    scaled = [
        g * grads[0].to(g.dtype) if need else None
        for g, need in zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    ]
    return (*scaled,) + (None,) * 22


_hidden_op.register_autograd(_op_backward, setup_context=_setup_context)


def _custom_op(
    p: HeadProblem, i: PolicyInputs, objective: Objective, inverse: float
) -> tuple[tuple[torch.Tensor, ...], Gradients]:
    o = p.options
    vector = o.temperature if isinstance(o.temperature, torch.Tensor) else None
    scalar = 1.0 if isinstance(o.temperature, torch.Tensor) else o.temperature
    needs = wanted(p)
    out = _hidden_op(
        p.hidden,
        p.weight,
        p.bias,
        p.target,
        o.mask,
        vector,
        scalar,
        o.softcap or 0.0,
        o.logit_scale,
        p.memory_budget,
        i.old_logp,
        i.advantage,
        i.advantage_level,
        i.cu_seqlens,
        i.token_weight,
        i.signal,
        i.ref_logp,
        i.kl_weight,
        i.entropy_weight,
        losses.objective_key(objective),
        inverse,
        p.compact_clipped,
        *needs,
    )
    grads = [x if need else None for x, need in zip(out[8:], needs, strict=True)]
    return tuple(out[:8]), dict(zip(NAMES, grads, strict=True))
