"""`tokfuse.kept_token_stats`: log-prob and entropy over a recorded support, e.g. the top-p ids of a sampler."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_logits
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.token_ids import check_csr
from tokfuse.runtime.reference import kept_token_stats as reference

OP = "kept_token_stats"


class KeptTokenStats(NamedTuple):
    """Statistics of each row's distribution over its kept ids. Every field is (tokens,), 0 in masked rows."""

    logp: torch.Tensor
    """log p of the target, nats; -inf if the target is not a kept id. Differentiable."""
    entropy: torch.Tensor
    """-sum p log p over the kept ids, nats. Differentiable."""
    lse: torch.Tensor
    """log-sum-exp of the kept transformed logits, nats. The lse of all logits minus this is -log of the kept mass.
    Differentiable."""


@ranged("kept_token_stats.fwd")
def kept_token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept_ids: torch.Tensor,
    kept_offsets: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> KeptTokenStats:
    """Return log-prob, entropy and log-sum-exp over the kept ids of each row. Only those logits are read.

    p = softmax over j in K_t of u_tj / temperature, where K_t are the ids
    kept_ids[kept_offsets[t] : kept_offsets[t + 1]], and u = softcap * tanh(logit_scale * logits / softcap),
    or u = logit_scale * logits without a softcap. A rollout with top-k or top-p samples from this
    distribution, not from the full softmax. If the rollout records the kept ids, ratios and entropies
    describe the policy that sampled the tokens. The result equals `token_stats` on logits that are -inf
    outside K_t.

    Args:
        logits: (tokens, vocab) float32, bfloat16, float16 or float64. Any row stride.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        kept_ids: (kept,) int32 or int64. The kept ids of all rows, concatenated. The ids of a row may
            have any order, but must not repeat.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows and their ids are not read, and return 0. None: all rows count.

    Returns:
        KeptTokenStats(logp, entropy, lse), each (tokens,) float32 (float64 for float64 logits),
        nats.

    Numerics: same bounds as `token_stats`. If the target is not a kept id, logp is -inf and has no
        gradient, but the entropy has one. A row without kept ids, or with only -inf, gives
        logp = lse = -inf, entropy = 0 and a zero gradient. Bitwise repeatable. A row does not depend
        on its batch or on the number of threads. The order of the ids affects only the rounding.

    Gradients and memory: logits receive the gradient of all three results, which is exactly 0 outside
        the kept ids. Forward and backward gather the kept logits. The backward writes a dense
        (tokens, vocab) gradient. Saved: logits, ids and four (tokens,) vectors.

    Examples:
        >>> kept, offsets = torch.tensor([0, 2, 1, 3]), torch.tensor([0, 2, 4])  # two ids per row
        >>> tokfuse.kept_token_stats(torch.zeros(2, 4), torch.tensor([2, 3]), kept, offsets).logp
        tensor([-0.6931, -0.6931])

    Raises:
        ValueError: wrong shape, dtype, device or range; an id twice in a row. Values are checked on
            the CPU, and on other devices only with TOKFUSE_CHECK=1. Without the check, a target or an
            id out of range makes its row NaN.
        BackendUnavailable: the forced backend cannot run this call.

    Source: truncated sampling, Holtzman et al. 2020 (top-p); exact softmax calculus.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    check_logits(OP, logits, target, options)
    names = ("kept_ids", "kept_offsets")
    ids, offsets, _ = check_csr(OP, names, kept_ids, kept_offsets, logits.shape[0], logits.device)
    capability = select(OP, logits.device.type, logits.dtype, options.features())
    arguments = options.without_bias()
    if capability.backend == "reference":
        return KeptTokenStats(*reference.forward(logits, target, ids, offsets, **arguments))
    if torch.compiler.is_compiling():
        return KeptTokenStats(*_kept_op(logits, target, ids, offsets, *options.flat()[:5])[:3])
    run = capability.run
    if logits.requires_grad and torch.is_grad_enabled():
        return KeptTokenStats(*_KeptFunction.apply(logits, target, ids, offsets, options, run))
    return KeptTokenStats(*run.forward(logits, target, ids, offsets, **arguments)[:3])


register_cpu(OP, cpu_rows.KEPT_TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_cuda(OP, cuda_rows.KEPT_TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_triton(OP, triton_rows.KEPT_TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_reference(OP, Kernels(reference.forward, None), "softcap")


# ------------------------------------------------------------------------------ autograd, compile


class _KeptFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        target: torch.Tensor,
        ids: torch.Tensor,
        offsets: torch.Tensor,
        o: LogitOptions,
        run: Kernels,
    ) -> tuple[torch.Tensor, ...]:
        logp, entropy, lse, row_max, inv_sum = run.forward(logits, target, ids, offsets, **o.without_bias())
        ctx.options, tensors = o.split()
        ctx.save_for_backward(logits, target, ids, offsets, row_max, inv_sum, logp, entropy, *tensors)
        ctx.run = run
        ctx.set_materialize_grads(False)
        return logp, entropy, lse

    @staticmethod
    @first_order("kept_token_stats")
    @ranged("kept_token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 6
        *saved, vector, mask, bias_logits = ctx.saved_tensors
        o = ctx.options.joined(vector, mask, bias_logits)
        return (ctx.run.backward(*saved, *grads, **o.without_bias()),) + (None,) * 5


SUPPORT_SCHEMA = "Tensor logits, Tensor target, Tensor ids, Tensor offsets"


@graph_op(
    "tokfuse::kept_token_stats",
    f"({SUPPORT_SCHEMA}, {FLAT_SCHEMA_WITHOUT_BIAS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@ranged("kept_token_stats.fwd")
def _kept_op(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, *flat: Any
) -> tuple[torch.Tensor, ...]:
    o = LogitOptions.from_flat(*flat)
    run: Kernels = select(OP, logits.device.type, logits.dtype, o.features()).run
    return run.forward(logits, target, ids, offsets, **o.without_bias())


@_kept_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(5))


@graph_op(
    "tokfuse::kept_token_stats_backward",
    f"({SUPPORT_SCHEMA}, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy, Tensor? grad_logp,"
    f" Tensor? grad_entropy, Tensor? grad_lse, {FLAT_SCHEMA_WITHOUT_BIAS}) -> Tensor",
)
@ranged("kept_token_stats.bwd")
def _kept_backward_op(logits: torch.Tensor, *rest: Any) -> torch.Tensor:
    given, flat = rest[:-5], rest[-5:]
    o = LogitOptions.from_flat(*flat)
    grad: torch.Tensor = select(OP, logits.device.type, logits.dtype, o.features()).run.backward(
        logits, *given, **o.without_bias()
    )
    return grad


@_kept_backward_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> torch.Tensor:
    return logits.new_empty(logits.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logits, target, ids, offsets, *flat = inputs
    logp, entropy, lse, row_max, inv_sum = output
    ctx.options, tensors = LogitOptions.from_flat(*flat).split()
    ctx.save_for_backward(logits, target, ids, offsets, row_max, inv_sum, logp, entropy, *tensors)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(row_max, inv_sum)


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 9
    *saved, vector, mask, bias_logits = ctx.saved_tensors
    o = ctx.options.joined(vector, mask, bias_logits)
    return (_kept_backward_op(*saved, *grads[:3], *o.flat()[:5]),) + (None,) * 8


_kept_op.register_autograd(_op_backward, setup_context=_setup_context)
