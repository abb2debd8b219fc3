"""`tokfuse.token_stats`: the statistics of every row of logits that a loss needs, from one read."""

import functools
from typing import Any, Literal, NamedTuple, overload

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_backend, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import check_divisor, check_flag, number, require_tensor
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forced import eager_cpu
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.leading import Leading, without_ignored
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA, LogitOptions, check_logits
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import ExtendedTokenStats, TokenStats, TokenStatsAt
from tokfuse.runtime.core.token_ids import check_one_of
from tokfuse.runtime.ops.token_stats_at import eager_at, token_stats_at
from tokfuse.runtime.reference import extended_token_stats as extended_reference
from tokfuse.runtime.reference import token_stats as reference
from tokfuse.runtime.reference import vocab_parallel as rows

OP = "token_stats"
EXTENDED = "extended_token_stats"
"""Name of `token_stats` with second_temperature or moments in the table of backends, where it has its own rows."""


class Extras(NamedTuple):
    """The requested optional outputs."""

    second_temperature: float | None
    moments: bool

    def result(self, out: tuple[torch.Tensor, ...]) -> ExtendedTokenStats:
        """Return the eight outputs of a backend, with None for outputs that were not requested."""
        logp, entropy, lse, sum_sq, top1, second, p2_logp, p2_logp2 = out
        return ExtendedTokenStats(
            logp,
            entropy,
            lse,
            sum_sq,
            top1,
            None if self.second_temperature is None else second,
            p2_logp if self.moments else None,
            p2_logp2 if self.moments else None,
        )


@overload
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    bias_logits: torch.Tensor | None = ...,
    bias_scale: float = ...,
    ignore_index: int | None = ...,
    second_temperature: None = ...,
    moments: Literal[False] = ...,
) -> TokenStats: ...


@overload
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    bias_logits: torch.Tensor | None = ...,
    bias_scale: float = ...,
    ignore_index: int | None = ...,
    second_temperature: float,
    moments: bool = ...,
) -> ExtendedTokenStats: ...


@overload
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    bias_logits: torch.Tensor | None = ...,
    bias_scale: float = ...,
    ignore_index: int | None = ...,
    second_temperature: float | None = ...,
    moments: Literal[True],
) -> ExtendedTokenStats: ...


@overload
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    bias_logits: torch.Tensor | None = ...,
    bias_scale: float = ...,
    ignore_index: int | None = ...,
    ids: torch.Tensor,
    ids_offsets: torch.Tensor | None = ...,
) -> TokenStatsAt: ...


@overload
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    bias_logits: torch.Tensor | None = ...,
    bias_scale: float = ...,
    ignore_index: int | None = ...,
    top_k: int,
) -> TokenStatsAt: ...


@ranged("token_stats.fwd")
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
    second_temperature: float | None = None,
    moments: bool = False,
    ids: torch.Tensor | None = None,
    ids_offsets: torch.Tensor | None = None,
    top_k: int | None = None,
    ignore_index: int | None = None,
) -> TokenStats | ExtendedTokenStats | TokenStatsAt:
    """Return log-prob, entropy, log-sum-exp, sum of squared probabilities and top-1 hit of each row, in one read.

    p = softmax(u / temperature) with u = softcap * tanh(logit_scale * logits / softcap), or
    u = logit_scale * logits without a softcap. If bias_logits is given, `bias_scale * bias_logits` is
    subtracted from u.

    The shapes below are for packed tokens. Leading dimensions work too: with logits of shape
    (..., vocab), e.g. (batch, length, vocab), every (tokens,) argument has shape (...), and so have the
    results. A contiguous tensor is not copied.

    Args:
        logits: (tokens, vocab) float32, bfloat16, float16 or float64. Any row stride. A vocabulary
            that is not contiguous is copied first.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap. An excluded logit (-inf) stays
            excluded.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows are not read and return 0. None: all rows count.
        bias_logits: (tokens, vocab), same dtype and device as logits. Logits of a bias model, which are
            subtracted and not differentiated. None: nothing is subtracted.
        bias_scale: multiplies bias_logits.
        second_temperature: > 0. Also returns logp at this temperature instead of `temperature`, e.g.
            for a sampler that reports log-probs at 1 but samples at 0.7. It costs one more exp per
            element.
        moments: also returns sum p^2 log p and sum p^2 log^2 p. The gradient norm of a loss with an
            entropy bonus needs them (`tokfuse.influence.logit_norms`).
        ids: (tokens, K) int32 or int64. Also returns the log-probs of these ids, e.g. the top K of a
            teacher. -1 is padding. An id may repeat. With ids_offsets: (ids,), the ids of all rows,
            concatenated.
        ids_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of ids per row.
        top_k: also returns the top_k most likely ids of each row and their log-probs.
        ignore_index: rows with this target are left out, as with mask = False: -100 for labels of
            transformers. None: no target is special.

    Returns:
        TokenStats(logp, entropy, lse, sum_sq, top1), each (tokens,) float32 (float64 for float64
        logits), nats. With second_temperature or moments: ExtendedTokenStats, with the additional fields
        second_logp, sum_p2_logp and sum_p2_logp2; a field that was not requested is None. With ids or
        top_k: TokenStatsAt, with the additional field logp_at in the shape of the ids, 0 at padding and in
        masked rows. With top_k it also has top_ids, (tokens, top_k) int64: the most likely id first, -1 in
        masked rows. `torch.topk` chooses between equal logits.

    Numerics: float32 statistics for every input dtype. Against float64, |error| <= 2e-5 in logp,
        entropy and lse for |logit| <= 100; gradients are within 2e-6 of the largest term of the row.
        A confident target keeps its digits: logp and 1 - p have a relative error <= 2e-6, and so has
        the entropy if the target is the most likely token, at least up to p = 1 - 1e-7. With a softcap
        this bound is 2e-6 + 1e-7 softcap, and 2e-6 + 2e-7 softcap on a GPU.
        Bitwise repeatable. A row does not depend on its batch or on the number of threads. -inf logits
        contribute exactly 0. A row of only -inf gives logp = lse = -inf, entropy = sum_sq = 0 and a
        zero gradient. +inf or NaN makes its own row NaN. Zero tokens give empty outputs.
        logp_at has the bounds of logp, also for a confident id: a row in which an id other than the target
        has p > 3/4 is read twice. The other outputs are bitwise the same with and without ids. 16-bit
        gradients are rounded once, also at the ids.

    Gradients and memory: logits receive the gradient of logp, entropy and lse, and of logp_at (repeated ids
        add up). All other outputs are detached. Saved: the logits and four (tokens,) vectors, and with ids
        also the ids and logp_at. The backward reads the logits once and writes the gradient once. Rows whose
        incoming gradients are all 0 are not read.

    Examples:
        >>> stats = tokfuse.token_stats(torch.zeros(2, 4), torch.tensor([0, 3]))
        >>> stats.logp, stats.sum_sq
        (tensor([-1.3863, -1.3863]), tensor([0.2500, 0.2500]))
        >>> tokfuse.token_stats(torch.zeros(2, 4), torch.tensor([0, 3]), ids=torch.tensor([[1, 2], [0, -1]])).logp_at
        tensor([[-1.3863, -1.3863],
                [-1.3863,  0.0000]])

    Raises:
        ValueError: wrong shape, dtype, device or range; a target or an id out of range where mask is True;
            ids together with top_k, or one of them with second_temperature or moments. On a GPU, values are
            checked only with TOKFUSE_CHECK=1, because the check synchronises the device. Without the check,
            such a target makes logp and the gradient of its row NaN. Such an id makes its logp_at NaN, and
            the gradient of its row if logp_at has an incoming gradient.
        BackendUnavailable: the forced backend cannot run this call.

    Source: the online-softmax identities. sum p^2: EL2N (Paul et al. 2021) and verl's optimal token baseline.
        Bias subtraction: TE-D of CausalInfoMin (arXiv 2311.16941). Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask, bias_logits, bias_scale)
    one = isinstance(bias_scale, int | float) and bias_scale == 1.0
    if bias_logits is None and not one:
        raise refuse(
            OP, "bias_scale", "left out without bias_logits", repr(bias_scale), "Remove it: it would have no effect."
        )
    at_ids = ids is not None or top_k is not None or ids_offsets is not None
    if second_temperature is None and moments is False and bias_logits is None and ignore_index is None:
        done: TokenStats | TokenStatsAt | None = None
        if not at_ids:
            done = _eager(logits, target, options)
        elif ids is not None and top_k is None and ids_offsets is None:
            done = eager_at(logits, target, ids, options)
        if done is not None:
            return done
    if ignore_index is not None or (isinstance(logits, torch.Tensor) and logits.dim() != 2):
        more = {"second_temperature": second_temperature, "moments": moments, "ids": ids, "top_k": top_k}
        spread: TokenStats | ExtendedTokenStats | TokenStatsAt = _spread(
            logits, target, options, ignore_index, more | {"ids_offsets": ids_offsets}
        )
        return spread
    options = options.floats()
    check_flag(OP, "moments", moments)
    check_logits(OP, logits, target, options)
    if at_ids:
        check_one_of(OP, ids, ids_offsets, top_k)
        if second_temperature is not None or moments:
            given = "moments" if moments else "second_temperature"
            raise refuse(OP, given, "left out with ids or top_k", "both", "Call twice, once with each.")
        return token_stats_at(logits, target, ids, ids_offsets, top_k, options)
    if second_temperature is not None or moments:
        return _extended(logits, target, options, Extras(number(second_temperature), moments))
    capability = _capability(logits, options)
    if capability.backend == "reference":
        return TokenStats(*reference.forward(logits, target, **options._asdict()))
    if torch.compiler.is_compiling():
        return TokenStats(*_token_stats_op(logits, target, *options.flat())[:5])
    run: Kernels = capability.run
    if logits.requires_grad and torch.is_grad_enabled():
        return TokenStats(*_TokenStatsFunction.apply(logits, target, options, run))
    return TokenStats(*run.forward(logits, target, **options._asdict())[:5])


def _spread(
    logits: torch.Tensor, target: torch.Tensor, o: LogitOptions, ignore_index: int | None, more: dict[str, Any]
) -> Any:
    """Compute a call with other leading dimensions than (tokens,), or with labels to leave out, on packed rows."""
    require_tensor(OP, "target", target)
    if require_tensor(OP, "logits", logits).dim() < 1:
        raise refuse(OP, "logits", "(..., vocab)", "shape ()", "Pass the full vocabulary.")
    to = Leading(OP, tuple(logits.shape[:-1]), "logits")
    names = ("temperature", "softcap", "logit_scale")
    given = {name: to.vector(name, getattr(o, name)) for name in names}
    target = to.vector("target", target)
    given["mask"] = without_ignored(OP, target, to.vector("mask", o.mask), ignore_index)
    if o.bias_logits is not None:
        given |= {"bias_logits": to.rows("bias_logits", o.bias_logits), "bias_scale": o.bias_scale}
    if more["ids"] is not None and more["ids_offsets"] is None:
        more["ids"] = to.rows("ids", more["ids"])
    packed: Any = to.rows("logits", logits)
    flat: Any = token_stats(packed, target, **given, **more)
    if more["ids_offsets"] is not None:  # logp_at has one element per id
        return type(flat)(*(x if name == "logp_at" else to.unpack(x) for name, x in flat._asdict().items()))
    return to.unpack(flat)


def _eager(logits: torch.Tensor, target: torch.Tensor, o: LogitOptions) -> TokenStats | None:
    """Compute a plain call by one native function. Return None if the call needs the general path."""
    native_module, kernels = eager_cpu(logits), cpu_rows.TOKEN_STATS
    if native_module is None:
        native_module, kernels = cuda_backend.eager(logits), cuda_rows.TOKEN_STATS
    if native_module is None:
        return None
    tracked = getattr(logits, "requires_grad", False) and torch.is_grad_enabled()
    out = native_module.eager_token_stats(logits, target, o, torch.get_num_threads(), tracked)
    if out is not None and tracked:
        out = _TokenStatsFunction.apply(logits, target, o, kernels, out)
    return None if out is None else TokenStats(*out)


def _extended(logits: torch.Tensor, target: torch.Tensor, options: LogitOptions, extras: Extras) -> ExtendedTokenStats:
    """Compute `token_stats` with second_temperature or moments. Logits and options have been checked."""
    if extras.second_temperature is not None:
        check_divisor(OP, "second_temperature", extras.second_temperature)
    capability = select(EXTENDED, logits.device.type, logits.dtype, options.features())
    arguments = {**options._asdict(), **extras._asdict()}
    if capability.backend == "reference":
        return extras.result(extended_reference.forward(logits, target, **arguments))
    if torch.compiler.is_compiling():
        out = _extended_op(logits, target, *options.flat(), *extras)
        return extras.result((*out[:5], *out[7:]))
    run: Kernels = capability.run
    if logits.requires_grad and torch.is_grad_enabled():
        bound = run._replace(forward=functools.partial(run.forward, **extras._asdict()))
        return extras.result(_TokenStatsFunction.apply(logits, target, options, bound))
    out = run.forward(logits, target, **arguments)
    return extras.result((*out[:5], *out[7:]))


def _capability(logits: torch.Tensor, options: LogitOptions) -> Any:
    return select(OP, logits.device.type, logits.dtype, options.features())


register_cpu(OP, cpu_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_cuda(OP, cuda_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_triton(OP, triton_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_reference(OP, Kernels(rows.forward, rows.backward, rows.STATE), "softcap", "bias_logits")

register_cpu(EXTENDED, cpu_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_cuda(EXTENDED, cuda_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_triton(EXTENDED, triton_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap", "bias_logits")
register_reference(EXTENDED, Kernels(extended_reference.forward, None), "softcap", "bias_logits")


# ------------------------------------------------------------------------------- autograd, compile


class _TokenStatsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        o: LogitOptions,
        run: Kernels,
        outputs: tuple[torch.Tensor, ...] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        if outputs is None:
            outputs = run.forward(logits, target, **o._asdict())
        logp, entropy, lse, sum_sq, top1, row_max, inv_sum, *extras = outputs
        ctx.options, tensors = o.split()
        ctx.save_for_backward(logits, target, row_max, inv_sum, logp, entropy, *tensors)
        ctx.run = run
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sum_sq, top1, *extras)
        return logp, entropy, lse, sum_sq, top1, *extras

    @staticmethod
    @first_order("token_stats")
    @ranged("token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads[:3]):
            return (None,) * 5
        *saved, vector, mask, bias_logits = ctx.saved_tensors
        o = ctx.options.joined(vector, mask, bias_logits)
        grad = ctx.run.backward(*saved, *grads[:2], grad_lse=grads[2], **o._asdict())
        return grad, None, None, None, None


SEVEN = ", ".join(["Tensor"] * 7)


@graph_op("tokfuse::token_stats", f"(Tensor logits, Tensor target, {FLAT_SCHEMA}) -> ({SEVEN})")
@ranged("token_stats.fwd")
def _token_stats_op(logits: torch.Tensor, target: torch.Tensor, *flat: Any) -> tuple[torch.Tensor, ...]:
    o = LogitOptions.from_flat(*flat)
    out: tuple[torch.Tensor, ...] = _capability(logits, o).run.forward(logits, target, **o._asdict())
    return out


@_token_stats_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(7))


@graph_op(
    "tokfuse::token_stats_backward",
    "(Tensor logits, Tensor target, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy,"
    f" Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, {FLAT_SCHEMA}) -> Tensor",
)
@ranged("token_stats.bwd")
def _token_stats_backward_op(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> torch.Tensor:
    given, grad_lse, flat = rest[:6], rest[6], rest[7:]
    o = LogitOptions.from_flat(*flat)
    run = _capability(logits, o).run
    grad: torch.Tensor = run.backward(logits, target, *given, grad_lse=grad_lse, **o._asdict())
    return grad


@_token_stats_backward_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, *flat = inputs
    logp, entropy, lse, sum_sq, top1, row_max, inv_sum = output
    ctx.options, tensors = LogitOptions.from_flat(*flat).split()
    ctx.save_for_backward(logits, target, row_max, inv_sum, logp, entropy, *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sum_sq, top1, row_max, inv_sum)


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(g is None for g in grads[:3]):
        return (None,) * 9
    *saved, vector, mask, bias_logits = ctx.saved_tensors
    o = ctx.options.joined(vector, mask, bias_logits)
    grad = _token_stats_backward_op(*saved, *grads[:3], *o.flat())
    return (grad,) + (None,) * 8


_token_stats_op.register_autograd(_op_backward, setup_context=_setup_context)


@graph_op(
    "tokfuse::extended_token_stats",
    f"(Tensor logits, Tensor target, {FLAT_SCHEMA}, float? second_temperature, bool moments) -> Tensor[]",
)
@ranged("token_stats.fwd")
def _extended_op(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    *flat, second_temperature, moments = rest
    o = LogitOptions.from_flat(*flat)
    run = select(EXTENDED, logits.device.type, logits.dtype, o.features()).run
    return list(run.forward(logits, target, second_temperature=second_temperature, moments=moments, **o._asdict()))


@_extended_op.register_fake
def _(logits: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    second_temperature, moments = rest[-2:]
    wanted = [True] * 7 + [second_temperature is not None, moments, moments]
    tokens = logits.shape[0]
    return [logits.new_empty(tokens if yes else 0, dtype=torch.float32) for yes in wanted]


def _extended_setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    _setup_context(ctx, inputs[:9], tuple(output[:7]))
    ctx.mark_non_differentiable(*output[3:])


def _extended_op_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    return (*_op_backward(ctx, *grads), None, None)


_extended_op.register_autograd(_extended_op_backward, setup_context=_extended_setup_context)
