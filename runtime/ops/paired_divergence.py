"""paired_divergence: KL or Jensen-Shannon divergence of two streams of logits, token by token."""

from typing import Any

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.backends.row_args import DIVERGENCE_STATE
from tokfuse.runtime.backends.value_checks import check_temperature
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_options
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference import paired_divergence as reference
from tokfuse.runtime.reference import paired_shard as shard

OP = "paired_divergence"


@ranged("paired_divergence.fwd")
def paired_divergence(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str = "jsd",
    beta: float = BETA,
    alpha: float = ALPHA,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the divergence of P = softmax(logits_p) from Q = softmax(logits_q), token by token.

    P is the distribution that learns (the student), Q is its target (the teacher). With s_j as given,
    the gradient with respect to logits_p is `p_j (s_j - sum_i p_i s_i) / temperature`. For kl_forward
    it is `(p_j - q_j) / temperature`.

    kl_forward: KL(Q || P) = sum q log(q / p). P learns to cover Q.
    kl_reverse: KL(P || Q) = sum p log(p / q). P learns the modes of Q. s = log(p / q).
    jsd: beta KL(Q || M) + (1 - beta) KL(P || M) with the mixture M = beta Q + (1 - beta) P.
        s = (1 - beta) log(p / m). Symmetric at beta = 1/2, where it is at most log 2.
    skew_forward: KL(Q || M) with M = alpha Q + (1 - alpha) P. s = -(1 - alpha) q / m.
    skew_reverse: KL(P || M) with M = alpha P + (1 - alpha) Q. s = log(p / m) - alpha p / m.
    tvd: total variation distance, 1/2 sum |p - q|. s = 1/2 sign(p - q).

    Row t of logits_p is paired with row t of logits_q. If the prompts differ, pack the response tokens
    of each in order first.

    Args:
        logits_p: (tokens, vocab) float32, bfloat16, float16 or float64. Any row stride.
        logits_q: same shape, dtype and device; must not require grad.
        kind: "jsd", "kl_forward", "kl_reverse", "skew_forward", "skew_reverse" or "tvd".
        beta: weight of Q in the mixture, in (0, 1); for "jsd" only.
        alpha: weight in the mixture of the distribution that is compared with it, in (0, 1); for
            "skew_forward" and "skew_reverse" only. At 0 these are kl_forward and kl_reverse.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits of both streams.
        softcap: cap of the tanh soft-cap (Gemma) of both streams, > 0. None: no cap.
        logit_scale: multiplies the logits of both streams before the cap (Cohere); > 0.
        mask: (tokens,) bool; False rows are not read and return 0. None: all rows count.

    Returns:
        (tokens,) float32 (float64 for float64 logits), nats (a probability for "tvd"), >= 0. Sum it
        and divide by a count of your choice.

    Numerics: float32 accumulation for every input dtype. |error| <= 2e-6 + 2e-6 of the value
        against float64. Exactly 0 if the rows of P and Q are equal. Never above its largest value:
        the entropy of (beta, 1 - beta) for "jsd", -log(alpha) for the skew kinds, 1 for "tvd". The
        gradient of "tvd" jumps at p_j = q_j. If they agree to float32 rounding, s_j is 1/2, -1/2 or 0.
        Excluded entries (-inf): one that is excluded in both P and Q contributes exactly 0. One that
        P alone excludes makes kl_forward +inf, and one that Q alone excludes makes kl_reverse +inf;
        the gradient of such a row is zero. All other kinds stay finite. A row of only -inf in either
        P or Q returns 0 with a zero gradient. NaN or +inf makes its own row NaN. Bitwise repeatable;
        a row does not depend on its batch or on the thread count.

    Gradients and memory: logits_p. Forward: one read of P and Q for a KL of at least 1e-4. The other
        kinds, a smaller KL and rows with an excluded entry read both rows once more, from the cache
        if it holds them. Saved: both logits and 6 floats per token. Backward: one read of P and Q, one
        write; rows with a zero incoming gradient are not read.

    Examples:
        >>> p, q = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 0.0]])
        >>> tokfuse.paired_divergence(p, q)
        tensor([0.1109])
        >>> tokfuse.paired_divergence(p, q, kind="tvd")
        tensor([0.4621])

    Raises:
        ValueError: wrong shape, dtype, device, range or kind; logits_q requires grad; beta or alpha
            with a kind that does not use it; a temperature <= 0 where mask is True. On a GPU, values
            are checked only with TOKFUSE_CHECK=1; otherwise such a row is NaN.
        BackendUnavailable: the forced backend cannot run this call.

    Source: JSD as in CDAS (arXiv 2602.05234; beta = 0.5, P intervened, Q source) and, with beta on
        the teacher, GKD (arXiv 2306.13649); forward KL as in LeaF (arXiv 2506.07851); skew KLs as in
        DistiLLM (arXiv 2402.03898), whose code has `lam` = 0.1 for alpha. Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    _check(logits_p, logits_q, options)
    mix_weight = mix_weight_of(OP, kind, beta, alpha)
    capability = select(OP, logits_p.device.type, logits_p.dtype, options.features())
    arguments = {**options.without_bias(), "kind": kind, "mix_weight": mix_weight}
    if capability.backend == "reference":
        if isinstance(temperature, torch.Tensor) and not torch.compiler.is_compiling():
            check_temperature(OP, temperature, mask)
        return reference.forward(logits_p, logits_q, **arguments)
    if torch.compiler.is_compiling():
        out: torch.Tensor = _divergence_op(logits_p, logits_q, kind, mix_weight, *options.flat()[:5])[0]
        return out
    run = capability.run
    if logits_p.requires_grad and torch.is_grad_enabled():
        out = _DivergenceFunction.apply(logits_p, logits_q, kind, mix_weight, options, run)
        return out
    return run.forward(logits_p, logits_q, **arguments)[0]  # type: ignore[no-any-return]


def _check(logits_p: torch.Tensor, logits_q: torch.Tensor, o: LogitOptions) -> None:
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
    check_options(OP, logits_p.shape[0], logits_p.device, o)


register_cpu(OP, cpu_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_cuda(OP, cuda_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_triton(OP, triton_rows.PAIRED_DIVERGENCE, FLOAT_DTYPES, "softcap")
register_reference(OP, Kernels(shard.forward, shard.backward, shard.STATE), "softcap")


# ------------------------------------------------------------------------------ autograd, compile


class _DivergenceFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_p: torch.Tensor,
        logits_q: torch.Tensor,
        kind: str,
        mix_weight: float,
        o: LogitOptions,
        run: Kernels,
    ) -> torch.Tensor:
        out, state = run.forward(logits_p, logits_q, kind=kind, mix_weight=mix_weight, **o.without_bias())
        scalars, tensors = o.split()
        ctx.save_for_backward(logits_p, logits_q, state, *tensors)
        ctx.rest = kind, mix_weight, scalars, run
        return out

    @staticmethod
    @first_order("paired_divergence")
    @ranged("paired_divergence.bwd")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        p, q, state, *tensors = ctx.saved_tensors
        kind, mix_weight, scalars, run = ctx.rest
        o = scalars.joined(*tensors)
        grad_p = run.backward(p, q, state, grad, kind=kind, mix_weight=mix_weight, **o.without_bias())
        return (grad_p,) + (None,) * 5


PAIR_SCHEMA = "Tensor logits_p, Tensor logits_q"


@graph_op(
    "tokfuse::paired_divergence",
    f"({PAIR_SCHEMA}, str kind, float mix_weight, {FLAT_SCHEMA_WITHOUT_BIAS}) -> (Tensor, Tensor)",
)
@ranged("paired_divergence.fwd")
def _divergence_op(
    logits_p: torch.Tensor, logits_q: torch.Tensor, kind: str, mix_weight: float, *flat: Any
) -> tuple[torch.Tensor, ...]:
    o = LogitOptions.from_flat(*flat)
    run: Kernels = select(OP, logits_p.device.type, logits_p.dtype, o.features()).run
    return run.forward(logits_p, logits_q, kind=kind, mix_weight=mix_weight, **o.without_bias())


@_divergence_op.register_fake
def _(logits_p: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = logits_p.shape[0]
    state = logits_p.new_empty((tokens, DIVERGENCE_STATE), dtype=torch.float32)
    return logits_p.new_empty(tokens, dtype=torch.float32), state


@graph_op(
    "tokfuse::paired_divergence_backward",
    f"({PAIR_SCHEMA}, Tensor state, Tensor grad, str kind, float mix_weight, {FLAT_SCHEMA_WITHOUT_BIAS}) -> Tensor",
)
@ranged("paired_divergence.bwd")
def _divergence_backward_op(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    kind: str,
    mix_weight: float,
    *flat: Any,
) -> torch.Tensor:
    o = LogitOptions.from_flat(*flat)
    run = select(OP, logits_p.device.type, logits_p.dtype, o.features()).run
    out: torch.Tensor = run.backward(
        logits_p, logits_q, state, grad, kind=kind, mix_weight=mix_weight, **o.without_bias()
    )
    return out


@_divergence_backward_op.register_fake
def _(logits_p: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits_p.new_empty(logits_p.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    p, q, kind, mix_weight, *flat = inputs
    scalars, tensors = LogitOptions.from_flat(*flat).split()
    ctx.save_for_backward(p, q, output[1], *tensors)
    ctx.rest = kind, mix_weight, scalars
    ctx.mark_non_differentiable(output[1])


def _op_backward(ctx: Any, grad: torch.Tensor, _: Any) -> tuple[Any, ...]:
    p, q, state, *tensors = ctx.saved_tensors
    kind, mix_weight, scalars = ctx.rest
    o = scalars.joined(*tensors)
    return (_divergence_backward_op(p, q, state, grad, kind, mix_weight, *o.flat()[:5]),) + (None,) * 8


_divergence_op.register_autograd(_op_backward, setup_context=_setup_context)
