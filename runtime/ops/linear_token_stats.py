"""linear_token_stats: token_stats of hidden @ weight.T, without a (tokens, vocab) tensor."""

import functools
from typing import Any

import torch

from tokfuse.runtime.backends import triton_backend
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
from tokfuse.runtime.lm_head.head import Head, HeadGradients, HeadProblem, LogitsBuffer
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.ops.token_stats import Kernels, TokenStats
from tokfuse.runtime.reference import linear_token_stats as reference
from tokfuse.runtime.reference import token_stats as stats_reference

OP = "linear_token_stats"


@ranged("linear_token_stats.fwd")
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    memory_budget: int | None = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T + bias, target, ...)` without ever holding those logits.

    Args:
        hidden: (tokens, hidden) float32, bfloat16, float16 or float64: final hidden states.
        weight: (vocab, hidden), same dtype and device: the lm_head.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        bias: (vocab,), same dtype. None: no bias.
        temperature, softcap, logit_scale, mask: as in `token_stats`. Masked rows enter no GEMM.
        memory_budget: bytes of workspace for logits in chunks of rows. None: 64 MiB, or a sixth of
            the weight's float32 size where that is more; on a GPU 1024 rows, up to 1 GiB. At least
            one row is always computed.

    Returns:
        TokenStats(logp, entropy, lse, sum_sq, top1), each (tokens,) float32 (float64 for float64).

    Numerics: as `token_stats` over float32 logits; bfloat16 and float16 inputs are converted
        exactly, products accumulate in float32. dW is accumulated in float32 and rounded once.
        Repeatable bitwise; the GEMM library may round a row differently in another chunk size.

    Gradients and memory: hidden, weight and bias, each only where it requires grad. Saved: the
        inputs and three (tokens,) vectors. The backward recomputes the logits of those rows whose
        incoming gradient is not zero, chunk by chunk, and writes their gradient over them. Peak
        extra memory: memory_budget, the gradients, and a float32 dW where weight is 16-bit. On a
        GPU a 16-bit head forms the statistics without a workspace, rounds the gradient of its
        logits once to 16 bits for the gradient GEMMs, and the backward waits once, for the number
        of its rows (not under CUDA-graph capture: then every row is computed).

    Examples:
        >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8)
        >>> tokfuse.linear_token_stats(hidden, weight, torch.tensor([0, 1, 2])).entropy
        tensor([1.6094, 1.6094, 1.6094])

    Raises:
        ValueError: wrong shape, dtype, device or range; a target out of range where mask is True.
        BackendUnavailable: the forced backend cannot run this call.

    Source: chunked heads as TRL's and Liger's; same outputs as `token_stats`. Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask)
    problem = heads.check_head(OP, hidden, weight, bias, target, options, memory_budget)
    capability = select(OP, hidden.device.type, hidden.dtype, options.features())
    if capability.backend == "reference":
        return TokenStats(*reference.forward(hidden, weight, target, bias=bias, **_reference_options(options)))
    if torch.compiler.is_compiling():
        return TokenStats(*_custom_op(problem)[:5])
    run = capability.run
    wants = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if wants and torch.is_grad_enabled():
        return TokenStats(*_LinearFunction.apply(hidden, weight, bias, problem, run))
    return TokenStats(*run.forward(problem)[:5])


def _reference_options(o: LogitOptions) -> dict[str, Any]:
    names = ("temperature", "softcap", "logit_scale", "mask")
    return {name: getattr(o, name) for name in names}


# ------------------------------------------------------------------------------------ CPU backend


def row_index(p: HeadProblem) -> torch.Tensor:
    """Token ids of the rows to compute, (rows,) int64."""
    index = heads.needed_rows(p)
    return torch.arange(p.tokens) if index is None else index


def check_targets(op: str, p: HeadProblem) -> None:
    """Value checks before the first GEMM."""
    o = p.options
    stats_reference.check_values(op, p.target, p.vocab, o.mask, o.temperature)


def _cpu_forward(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    check_targets(OP, p)
    index = row_index(p)
    make = torch.empty if index.shape[0] == p.tokens else torch.zeros
    out = tuple(make(p.tokens, dtype=torch.float32) for _ in range(7))
    if index.shape[0] == 0:
        return out
    module = native.module()
    assert module is not None
    rows = heads.workspace_rows(p, index.shape[0])
    head, buffer = Head(p), LogitsBuffer.workspace(rows, p.vocab)
    for start in range(0, index.shape[0], rows):
        chunk = index[start : start + rows]
        head.logits(head.rows_of_hidden(chunk), buffer, 0)
        record, alive = buffer.record(p, 0, chunk.shape[0], chunk)
        module.token_stats_fwd(record, *[x.data_ptr() for x in out], 0, 0, 0, 1.0)
        del alive
    return out


def _cpu_backward(
    p: HeadProblem,
    shift: torch.Tensor,
    inv_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """[grad_hidden, grad_weight, grad_bias]; rows without incoming gradient are not recomputed."""
    ga = torch.zeros(p.tokens) if grad_logp is None else grad_logp.float().contiguous()
    gh = None if grad_entropy is None else grad_entropy.float().contiguous()
    active = ga != 0 if gh is None else (ga != 0) | (gh != 0)
    if p.options.mask is not None:
        active &= p.options.mask
    index = active.nonzero().squeeze(1)
    rows = heads.workspace_rows(p, max(1, index.shape[0]))
    head, buffer = Head(p), LogitsBuffer.workspace(rows, p.vocab)
    gradients = HeadGradients(head, needs)
    module = native.module()
    assert module is not None
    for start in range(0, index.shape[0], rows):
        chunk = index[start : start + rows]
        head.logits(head.rows_of_hidden(chunk), buffer, 0)
        record, alive = buffer.record(p, 0, chunk.shape[0], chunk)
        module.token_stats_bwd(
            record,
            shift.data_ptr(),
            inv_sum.data_ptr(),
            entropy.data_ptr(),
            ga.data_ptr(),
            native.pointer(gh),
            buffer.storage.data_ptr(),
            p.vocab,
        )
        del alive
        gradients.add(buffer, chunk)
    return gradients.finish()


# ----------------------------------------------------------------------- CUDA and Triton backends


_launch_fused = triton_backend.launcher("linear_token_stats", "linear_token_stats")


def _triton_forward(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    """16-bit heads: logits never leave the registers. float32: chunks of torch's GEMM."""
    if may_read(p.target):
        check_targets(OP, p)
    o, hidden, weight = p.options, p.hidden.detach(), p.weight.detach()
    if hidden.dtype == torch.float32:
        return forward_in_chunks(p, stats_op.TRITON)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if p.bias is None else p.bias.detach().contiguous()
    out: tuple[torch.Tensor, ...] = _launch_fused(
        hidden,
        weight,
        bias,
        p.target,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
        mask=o.mask,
    )
    return out


def rows_of_options(p: HeadProblem, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """(target, options without mask) of some tokens, for the row kernels."""
    o = p.options
    t = o.temperature[index] if isinstance(o.temperature, torch.Tensor) else o.temperature
    options = {"temperature": t, "softcap": o.softcap, "logit_scale": o.logit_scale, "mask": None}
    return p.target[index], options


def _cuda_forward(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    if may_read(p.target):
        check_targets(OP, p)
    return forward_in_chunks(p, stats_op.CUDA)


def forward_in_chunks(p: HeadProblem, kernels: Kernels) -> tuple[torch.Tensor, ...]:
    """Chunks of torch's GEMM and the row kernel: 1 and 1 launches each."""
    rows = device_head.classify(p, p.options.mask, None)
    head = DeviceHead(p, (False, False, False), rows)
    # Not the rows of one tensor: results of an op in a compiled graph must not share storage.
    out = [torch.zeros(p.tokens, dtype=torch.float32, device=p.hidden.device) for _ in range(7)]
    with torch.no_grad():
        for index, h in head.chunks(0, rows.forward):
            target, options = rows_of_options(p, index)
            if rows.keep is not None:
                options["mask"] = rows.keep[index]
            stats = kernels.forward(head.logits(h), target, **options)
            for kept, x in zip(out, stats, strict=True):
                kept[index] = x
    return tuple(out)


def backward_in_chunks(
    kernels: Kernels,
    p: HeadProblem,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
) -> list[torch.Tensor | None]:
    """As on the CPU: rows without incoming gradient are not recomputed."""
    assert kernels.backward is not None
    ga = torch.zeros_like(entropy) if grad_logp is None else grad_logp.float()
    gh = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy.float()
    if p.options.mask is not None:
        ga, gh = (torch.where(p.options.mask, x, 0.0) for x in (ga, gh))
    rows = device_head.classify(p, (ga != 0) | (gh != 0), None)
    head = DeviceHead(p, needs, rows)
    with torch.no_grad():
        for index, h in head.chunks(0, rows.gradient):
            logits = head.logits(h)
            target, options = rows_of_options(p, index)
            dz = kernels.backward(
                logits,
                target,
                row_max[index],
                inv_sum[index],
                entropy[index],
                ga[index],
                gh[index],
                out=head.gradient_like(logits),
                **options,
            )
            if p.compact_clipped and rows.keep is not None:  # else only live rows are here
                head.add_live(index, h, dz, rows.keep[index])
            else:
                head.add(index, h, dz)
    return head.finish()


register_cpu(OP, Kernels(_cpu_forward, _cpu_backward), FLOAT_DTYPES, "softcap")  # type: ignore[arg-type]
CUDA = Kernels(_cuda_forward, functools.partial(backward_in_chunks, stats_op.CUDA))  # type: ignore[arg-type]
TRITON = Kernels(_triton_forward, functools.partial(backward_in_chunks, stats_op.TRITON))  # type: ignore[arg-type]
register_cuda(OP, CUDA, FLOAT_DTYPES, "softcap")
register_triton(OP, TRITON, FLOAT_DTYPES, "softcap")
register_reference(OP, Kernels(reference.forward, None), "softcap")


# ------------------------------------------------------------------------------- autograd, compile


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, p: HeadProblem, run: Kernels
    ) -> tuple[torch.Tensor, ...]:
        logp, entropy, lse, sum_sq, top1, shift, inv_sum = run.forward(p)
        o = p.options
        vector = o.temperature if isinstance(o.temperature, torch.Tensor) else None
        ctx.save_for_backward(hidden, weight, bias, p.target, o.mask, vector, shift, inv_sum, entropy)
        scalar = o.temperature if vector is None else 1.0
        ctx.rest = (LogitOptions(scalar, o.softcap, o.logit_scale, None), p.memory_budget, run)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(lse, sum_sq, top1)
        return logp, entropy, lse, sum_sq, top1

    @staticmethod
    @torch.autograd.function.once_differentiable
    @ranged("linear_token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None, None
        hidden, weight, bias, target, mask, vector, *stats = ctx.saved_tensors
        options, budget, run = ctx.rest
        options = options._replace(mask=mask)
        if vector is not None:
            options = options._replace(temperature=vector)
        p = HeadProblem(hidden, weight, bias, target, options, budget)
        needs = tuple(ctx.needs_input_grad[:3])
        return (*run.backward(p, *stats, grads[0], grads[1], needs), None, None)


@torch.library.custom_op("tokfuse::linear_token_stats", mutates_args=())
@ranged("linear_token_stats.fwd")
def _linear_op(
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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    p = head_problem(
        hidden, weight, bias, target, mask, temperature, scalar_temperature, softcap, logit_scale, memory_budget
    )
    run = select(OP, hidden.device.type, hidden.dtype, p.options.features()).run
    return run.forward(p)  # type: ignore[no-any-return]


@_linear_op.register_fake
def _(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(7))


@torch.library.custom_op("tokfuse::linear_token_stats_backward", mutates_args=())
@ranged("linear_token_stats.bwd")
def _linear_backward_op(
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
    shift: torch.Tensor,
    inv_sum: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
) -> list[torch.Tensor]:
    p = head_problem(
        hidden, weight, bias, target, mask, temperature, scalar_temperature, softcap, logit_scale, memory_budget
    )
    run = select(OP, hidden.device.type, hidden.dtype, p.options.features()).run
    needs = (needs_hidden, needs_weight, needs_bias)
    grads = run.backward(p, shift, inv_sum, entropy, grad_logp, grad_entropy, needs)
    return [hidden.new_empty(0) if x is None else x for x in grads]


@_linear_backward_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> Any:
    needs = rest[-3:]
    likes = (hidden, weight, bias if bias is not None else hidden)
    return [x.new_empty(x.shape) if need else x.new_empty(0) for x, need in zip(likes, needs, strict=True)]


def head_problem(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    mask: torch.Tensor | None,
    temperature: torch.Tensor | None,
    scalar: float,
    softcap: float,
    logit_scale: float,
    memory_budget: int,
) -> HeadProblem:
    chosen = scalar if temperature is None else temperature
    options = LogitOptions(chosen, softcap or None, logit_scale, mask)
    return HeadProblem(hidden, weight, bias, target, options, memory_budget)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, mask, temperature, *ctx.scalars = inputs
    _, entropy, lse, sum_sq, top1, shift, inv_sum = output
    ctx.save_for_backward(hidden, weight, bias, target, mask, temperature, shift, inv_sum, entropy)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(lse, sum_sq, top1, shift, inv_sum)


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if grads[0] is None and grads[1] is None:
        return (None,) * 10
    *inputs, shift, inv_sum, entropy = ctx.saved_tensors
    needs = tuple(ctx.needs_input_grad[:3])
    out = _linear_backward_op(*inputs, *ctx.scalars, shift, inv_sum, entropy, grads[0], grads[1], *needs)
    chosen = [x if need else None for x, need in zip(out, needs, strict=True)]
    return (*chosen,) + (None,) * 7


_linear_op.register_autograd(_op_backward, setup_context=_setup_context)


def _custom_op(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    o = p.options
    vector = o.temperature if isinstance(o.temperature, torch.Tensor) else None
    scalar = 1.0 if isinstance(o.temperature, torch.Tensor) else o.temperature
    out = _linear_op(
        p.hidden, p.weight, p.bias, p.target, o.mask, vector, scalar, o.softcap or 0.0, o.logit_scale, p.memory_budget
    )
    return tuple(out)
