"""token_stats_at: token_stats with `ids` or `top_k`, which adds the log-probs of a few ids per row."""

from collections.abc import Sequence
from typing import Any

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forced import eager_cpu
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA, LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStatsAt
from tokfuse.runtime.core.token_ids import TokenIds, check_ids, check_top_k, most_likely
from tokfuse.runtime.reference import token_stats_at as reference
from tokfuse.runtime.reference import vocab_parallel as shard

OP = "token_stats_at"
"""`token_stats` with ids or top_k; it has its own rows in the table of backends."""


def token_stats_at(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor | None,
    ids_offsets: torch.Tensor | None,
    top_k: int | None,
    options: LogitOptions,
) -> TokenStatsAt:
    """Run `token_stats` with ids or top_k; all other arguments are checked."""
    tokens, vocab = logits.shape
    top_ids = None
    if ids is None:
        top_k = check_top_k("token_stats", top_k, vocab)
    capability = select(OP, logits.device.type, logits.dtype, options.features())
    if ids is None:
        ids = top_ids = _top_ids(logits, top_k, options)
    places = check_ids("token_stats", ids, ids_offsets, tokens, logits.device)
    logp, entropy, lse, sum_sq, top1, logp_at = _run(logits, target, places, options, capability)
    return TokenStatsAt(logp, entropy, lse, sum_sq, top1, logp_at.view(places.shape), top_ids)


def eager_at(logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, o: LogitOptions) -> TokenStatsAt | None:
    """Compute a plain call on the CPU by one native function. Return None if the call needs the general path."""
    native_module = eager_cpu(logits)
    if native_module is None:
        return None
    tracked = getattr(logits, "requires_grad", False) and torch.is_grad_enabled()
    out = native_module.eager_token_stats_at(logits, target, o, torch.get_num_threads(), tracked, ids)
    if out is not None and tracked:
        *outputs, offsets = out
        out = _AtFunction.apply(logits, target, ids.view(-1), offsets, o, cpu_rows.TOKEN_STATS_AT, outputs)
    return None if out is None else TokenStatsAt._make((*out, None))


def _top_ids(logits: torch.Tensor, top_k: Any, options: LogitOptions) -> torch.Tensor:
    if torch.compiler.is_compiling():
        out: torch.Tensor = _top_ids_op(logits, top_k, *options.flat())
        return out
    return most_likely(logits, top_k, options)


def _run(
    logits: torch.Tensor, target: torch.Tensor, places: TokenIds, options: LogitOptions, capability: Any
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1 and logp_at (ids,)."""
    ids, offsets, _ = places
    if capability.backend == "reference":
        return reference.forward(logits, target, ids, offsets, **options._asdict())
    if torch.compiler.is_compiling():
        *stats, _, _, logp_at = _at_op(logits, target, ids, offsets, *options.flat())
        return *stats, logp_at
    run: Kernels = capability.run
    if logits.requires_grad and torch.is_grad_enabled():
        out: tuple[torch.Tensor, ...] = _AtFunction.apply(logits, target, ids, offsets, options, run)
        return out
    *stats, _, _, logp_at = run.forward(logits, target, ids, offsets, **options._asdict())
    return *stats, logp_at


register_cpu(OP, cpu_rows.TOKEN_STATS_AT, FLOAT_DTYPES, "softcap", "bias_logits")
register_cuda(OP, cuda_rows.TOKEN_STATS_AT, FLOAT_DTYPES, "softcap", "bias_logits")
register_triton(OP, triton_rows.TOKEN_STATS_AT, FLOAT_DTYPES, "softcap", "bias_logits")
register_reference(OP, Kernels(shard.forward_at, None, shard.STATE), "softcap", "bias_logits")


# ------------------------------------------------------------------------------- autograd, compile


class _AtFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        o: LogitOptions,
        run: Kernels,
        outputs: Sequence[torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """Run the forward, unless its `outputs` are given. Their logp_at may have any shape."""
        if outputs is None:
            outputs = tuple(run.forward(logits, target, ids, offsets, **o._asdict()))
        _save(ctx, (logits, target, ids, offsets), o, outputs)
        ctx.run = run
        logp, entropy, lse, sum_sq, top1, _, _, logp_at = outputs
        ctx.mark_non_differentiable(sum_sq, top1)
        return logp, entropy, lse, sum_sq, top1, logp_at

    @staticmethod
    @first_order("token_stats")
    @ranged("token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        given = _incoming(ctx, *grads[:3], grads[5])
        if given is None:
            return (None,) * 7
        saved, o = _saved(ctx)
        return (ctx.run.backward(*saved, *given, **o._asdict()),) + (None,) * 6


def _save(ctx: Any, inputs: tuple[torch.Tensor, ...], o: LogitOptions, outputs: Sequence[torch.Tensor]) -> None:
    logp, entropy, _, _, _, row_max, inv_sum, logp_at = outputs
    ctx.options, tensors = o.split()
    ctx.save_for_backward(*inputs, row_max, inv_sum, logp, entropy, logp_at, *tensors)
    ctx.set_materialize_grads(False)


def _saved(ctx: Any) -> tuple[tuple[torch.Tensor, ...], LogitOptions]:
    *saved, logp_at, vector, mask, bias_logits = ctx.saved_tensors
    return (*saved, logp_at.view(-1)), ctx.options.joined(vector, mask, bias_logits)


def _incoming(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...] | None:
    """Return the gradients of logp, entropy, lse and logp_at in the form of the kernels. None: all are None."""
    if all(grad is None for grad in grads):
        return None
    *of_rows, grad_at = grads
    at_ids = torch.zeros_like(ctx.saved_tensors[8]) if grad_at is None else grad_at
    return *of_rows, at_ids.reshape(-1)


IDS_SCHEMA = "Tensor logits, Tensor target, Tensor ids, Tensor offsets"


@graph_op("tokfuse::token_stats_at", f"({IDS_SCHEMA}, {FLAT_SCHEMA}) -> ({', '.join(['Tensor'] * 8)})")
@ranged("token_stats.fwd")
def _at_op(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, ...]:
    o = LogitOptions.from_flat(*flat)
    run: Kernels = select(OP, logits.device.type, logits.dtype, o.features()).run
    return run.forward(logits, target, ids, offsets, **o._asdict())


@_at_op.register_fake
def _(logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    counts = [logits.shape[0]] * 7 + [ids.shape[0]]
    return tuple(logits.new_empty(count, dtype=torch.float32) for count in counts)


@graph_op(
    "tokfuse::token_stats_at_backward",
    f"({IDS_SCHEMA}, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy, Tensor logp_at"
    f", Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor grad_logp_at, {FLAT_SCHEMA}) -> Tensor",
)
@ranged("token_stats.bwd")
def _at_backward_op(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    given, flat = rest[:-7], rest[-7:]
    o = LogitOptions.from_flat(*flat)
    run = select(OP, logits.device.type, logits.dtype, o.features()).run
    grad: torch.Tensor = run.backward(logits, *given, **o._asdict())
    return grad


@_at_backward_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    _save(ctx, inputs[:4], LogitOptions.from_flat(*inputs[4:]), output)
    ctx.mark_non_differentiable(*output[3:7])


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    given = _incoming(ctx, *grads[:3], grads[7])
    if given is None:
        return (None,) * 11
    saved, o = _saved(ctx)
    return (_at_backward_op(*saved, *given, *o.flat()),) + (None,) * 10


_at_op.register_autograd(_op_backward, setup_context=_setup_context)


@graph_op("tokfuse::top_ids", f"(Tensor logits, int top_k, {FLAT_SCHEMA}) -> Tensor")
def _top_ids_op(logits: torch.Tensor, top_k: int, *flat: Any) -> torch.Tensor:
    return most_likely(logits, top_k, LogitOptions.from_flat(*flat))


@_top_ids_op.register_fake
def _(logits: torch.Tensor, top_k: int, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape[0], top_k, dtype=torch.int64)
