"""paired_divergence: KL or Jensen-Shannon divergence of two streams of logits, token by token."""

import math
from typing import Any

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.backends.row_args import DIVERGENCE_STATE
from tokfuse.runtime.backends.value_checks import check_temperature
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import check_choice
from tokfuse.runtime.core.codes import DIVERGENCES
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_options
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference import paired_divergence as reference

OP = "paired_divergence"


@ranged("paired_divergence.fwd")
def paired_divergence(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str = "jsd",
    beta: float = 0.5,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Divergence of P = softmax(logits_p) from Q = softmax(logits_q), gradient to logits_p only.

    kl_forward: KL(Q || P) = sum q log(q / p), the target's average: P is pushed to cover Q
        (distillation; gradient p - q).
    kl_reverse: KL(P || Q) = sum p log(p / q): P is pushed into the modes of Q
        (gradient p (log(p / q) - KL)).
    jsd: beta KL(Q || M) + (1 - beta) KL(P || M), M = beta Q + (1 - beta) P
        (gradient (1 - beta) p (log(p / m) - KL(P || M))). Symmetric at beta = 1/2, where it is at
        most log 2.

    P is the stream that learns (student, steered run), Q the one that it is compared with. Row t of
    one stream is paired with row t of the other: where two prompts differ, pack the response tokens
    of each in order first.

    Args:
        logits_p: (tokens, vocab) float32, bfloat16, float16 or float64. Any row stride.
        logits_q: same shape, dtype and device; must not require grad.
        kind: "jsd", "kl_forward" or "kl_reverse".
        beta: weight of Q in the mixture, in (0, 1); for "jsd" only.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits of both streams.
        softcap: cap of the tanh soft-cap (Gemma) of both streams, > 0. None: no cap.
        logit_scale: multiplies the logits of both streams before the cap (Cohere); > 0.
        mask: (tokens,) bool; False rows are not read and return 0. None: all rows count.

    Returns:
        (tokens,) float32 (float64 for float64 logits), nats, >= 0. Sum it and divide by a count of
        your choice.

    Numerics: float32 accumulation whatever the input dtype. |error| <= 2e-6 + 2e-6 of the value
        against float64. Exactly 0 where the rows of the two streams are equal; at most the entropy
        of (beta, 1 - beta) for "jsd". An entry excluded (-inf) in both streams contributes exactly
        0. An entry excluded by P alone makes kl_forward +inf, one excluded by Q alone kl_reverse,
        with a zero gradient in that row; "jsd" stays finite. A row of only -inf in either stream
        returns 0 with a zero gradient. NaN or +inf poisons its own row. Bitwise repeatable; a row
        does not depend on its batch or on the thread count.

    Gradients and memory: logits_p. Forward: one read of each stream from memory, the second visit
        of a row is to the cache. Saved: both logits and 6 floats per token. Backward: one read of
        each, one write; rows with a zero incoming gradient are not read.

    Examples:
        >>> p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> tokfuse.paired_divergence(p, q)
        tensor([0.1109])

    Raises:
        ValueError: wrong shape, dtype, device, range or kind; logits_q requires grad; beta with a
            KL; a temperature <= 0 where mask is True. On a GPU values are read with TOKFUSE_CHECK=1
            only: such a row is NaN.
        BackendUnavailable: the forced backend cannot run this call.

    Source: JSD as in CDAS (arXiv 2602.05234; beta = 0.5, P intervened, Q source) and, with beta on
        the teacher, GKD (arXiv 2306.13649); forward KL as in LeaF (arXiv 2506.07851). Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask)
    _check(logits_p, logits_q, kind, beta, options)
    capability = select(OP, logits_p.device.type, logits_p.dtype, options.features())
    arguments = {**options.without_bias(), "kind": kind, "beta": beta}
    if capability.backend == "reference":
        if isinstance(temperature, torch.Tensor) and not torch.compiler.is_compiling():
            check_temperature(OP, temperature, mask)
        return reference.forward(logits_p, logits_q, **arguments)
    if torch.compiler.is_compiling():
        out: torch.Tensor = _divergence_op(logits_p, logits_q, kind, beta, *options.flat()[:5])[0]
        return out
    run = capability.run
    if logits_p.requires_grad and torch.is_grad_enabled():
        out = _DivergenceFunction.apply(logits_p, logits_q, kind, beta, options, run)
        return out
    return run.forward(logits_p, logits_q, **arguments)[0]  # type: ignore[no-any-return]


def _check(logits_p: torch.Tensor, logits_q: torch.Tensor, kind: str, beta: float, o: LogitOptions) -> None:
    checks.check_matrix(OP, "logits_p", logits_p, "(tokens, vocab)")
    checks.require_tensor(OP, "logits_q", logits_q)
    if logits_p.shape[1] < 1:
        raise refuse(
            OP, "logits_p", "at least one column wide", f"shape {tuple(logits_p.shape)}", "Pass the whole vocabulary."
        )
    if logits_q.shape != logits_p.shape or logits_q.dtype != logits_p.dtype:
        raise refuse(
            OP,
            "logits_q",
            f"{tuple(logits_p.shape)} {logits_p.dtype} like logits_p",
            f"{tuple(logits_q.shape)} {logits_q.dtype}",
            "Pair the rows of the two streams.",
        )
    checks.check_device(OP, "logits_q", logits_q, logits_p.device)
    if logits_q.requires_grad and torch.is_grad_enabled():
        raise refuse(
            OP,
            "logits_q",
            "free of gradient (only P learns)",
            "requires_grad=True",
            "Call logits_q.detach(), or swap the streams.",
        )
    check_choice(OP, "kind", kind, DIVERGENCES)
    if not 0.0 < checks.check_number(OP, "beta", beta, -math.inf) < 1.0:
        raise refuse(OP, "beta", "in (0, 1)", repr(beta), 'Its limits are kind="kl_forward" (0) and "kl_reverse" (1).')
    if kind != "jsd" and beta != 0.5:
        raise refuse(OP, "beta", f'left out with kind="{kind}"', repr(beta), 'It weights the mixture of kind="jsd".')
    check_options(OP, logits_p.shape[0], logits_p.device, o)


register_cpu(OP, cpu_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_cuda(OP, cuda_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_triton(OP, triton_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_reference(OP, Kernels(reference.forward, None), "softcap")  # type: ignore[arg-type]


# ------------------------------------------------------------------------------ autograd, compile


class _DivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits_p: torch.Tensor, logits_q: torch.Tensor, kind: str, beta: float, o: LogitOptions, run: Kernels
    ) -> torch.Tensor:
        out, state = run.forward(logits_p, logits_q, kind=kind, beta=beta, **o.without_bias())
        scalars, tensors = o.split()
        ctx.save_for_backward(logits_p, logits_q, state, *tensors)
        ctx.rest = kind, beta, scalars, run
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    @ranged("paired_divergence.bwd")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        p, q, state, *tensors = ctx.saved_tensors
        kind, beta, scalars, run = ctx.rest
        o = scalars.joined(*tensors)
        grad_p = run.backward(p, q, state, grad, kind=kind, beta=beta, **o.without_bias())
        return (grad_p,) + (None,) * 5


PAIR_SCHEMA = "Tensor logits_p, Tensor logits_q"


@graph_op(
    "tokfuse::paired_divergence",
    f"({PAIR_SCHEMA}, str kind, float beta, {FLAT_SCHEMA_WITHOUT_BIAS}) -> (Tensor, Tensor)",
)
@ranged("paired_divergence.fwd")
def _divergence_op(
    logits_p: torch.Tensor, logits_q: torch.Tensor, kind: str, beta: float, *flat: Any
) -> tuple[torch.Tensor, ...]:
    o = LogitOptions.from_flat(*flat)
    run: Kernels = select(OP, logits_p.device.type, logits_p.dtype, o.features()).run
    return run.forward(logits_p, logits_q, kind=kind, beta=beta, **o.without_bias())


@_divergence_op.register_fake
def _(logits_p: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits_p.shape[0]
    state = logits_p.new_empty((tokens, DIVERGENCE_STATE), dtype=torch.float32)
    return logits_p.new_empty(tokens, dtype=torch.float32), state


@graph_op(
    "tokfuse::paired_divergence_backward",
    f"({PAIR_SCHEMA}, Tensor state, Tensor grad, str kind, float beta, {FLAT_SCHEMA_WITHOUT_BIAS}) -> Tensor",
)
@ranged("paired_divergence.bwd")
def _divergence_backward_op(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    kind: str,
    beta: float,
    *flat: Any,
) -> torch.Tensor:
    o = LogitOptions.from_flat(*flat)
    run = select(OP, logits_p.device.type, logits_p.dtype, o.features()).run
    out: torch.Tensor = run.backward(logits_p, logits_q, state, grad, kind=kind, beta=beta, **o.without_bias())
    return out


@_divergence_backward_op.register_fake
def _(logits_p: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits_p.new_empty(logits_p.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    p, q, kind, beta, *flat = inputs
    scalars, tensors = LogitOptions.from_flat(*flat).split()
    ctx.save_for_backward(p, q, output[1], *tensors)
    ctx.rest = kind, beta, scalars
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    p, q, state, *tensors = ctx.saved_tensors
    kind, beta, scalars = ctx.rest
    o = scalars.joined(*tensors)
    return (_divergence_backward_op(p, q, state, grad, kind, beta, *o.flat()[:5]),) + (None,) * 8


_divergence_op.register_autograd(_op_backward, setup_context=_setup_context)
