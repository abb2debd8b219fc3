"""linear_token_stats_at: linear_token_stats with `ids` or `top_k`, and losses over the log-probs at ids.

`tokfuse.algorithms.top_k_step` calls `ids_step`. lm_head/ids_runs.py describes the passes of both.
"""

import functools
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forward_gradients import Computed, Gradients, with_gradients
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStatsAt
from tokfuse.runtime.core.token_ids import TokenIds, check_ids, check_top_k, most_likely
from tokfuse.runtime.lm_head import ids_runs
from tokfuse.runtime.lm_head.ids_runs import HeadIdsKernels, IdsLoss
from tokfuse.runtime.lm_head.probe import deliver, with_probes
from tokfuse.runtime.lm_head.problem import HEAD_SCHEMA, NAMES, HeadProblem, fake_gradients
from tokfuse.runtime.reference import token_stats_at as reference
from tokfuse.runtime.reference.linear_token_stats import logits_of

OP = "linear_token_stats_at"
"""`linear_token_stats` with ids or top_k; it has its own rows in the table of backends."""


def linear_token_stats_at(
    p: HeadProblem, ids: torch.Tensor | None, ids_offsets: torch.Tensor | None, top_k: int | None
) -> TokenStatsAt:
    """Run `linear_token_stats` with ids or top_k; all other arguments are checked."""
    places = None
    if ids is None:
        top_k = check_top_k("linear_token_stats", top_k, p.vocab)
    else:
        places = check_ids("linear_token_stats", ids, ids_offsets, p.tokens, p.hidden.device)
    capability = select(OP, p.hidden.device.type, p.dtype, p.options.features())
    if capability.backend == "reference":
        *stats, logp_at, flat = _reference(p, places, top_k or 0)
    elif torch.compiler.is_compiling():
        given = (None, None) if places is None else places[:2]
        tensors = (p.hidden, p.weight, p.bias, p.target)
        *stats, _, _, logp_at, flat = _linear_at_op(
            *tensors, *p.options.flat()[:5], p.memory_budget, *given, top_k or 0
        )
    elif torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (p.hidden, p.weight, p.bias)):
        *stats, logp_at, flat = _LinearAtFunction.apply(
            p.hidden, p.weight, p.bias, p, places, top_k or 0, capability.run
        )
    else:
        *stats, _, _, logp_at, flat = capability.run.forward(p, places, top_k or 0)
    logp, entropy, lse, sum_sq, top1 = stats
    shape = (p.tokens, top_k or 0) if places is None else places.shape
    top_ids = flat.view(shape) if places is None else None
    return TokenStatsAt(logp, entropy, lse, sum_sq, top1, logp_at.view(shape), top_ids)


def _reference(p: HeadProblem, places: TokenIds | None, top_k: int) -> tuple[torch.Tensor, ...]:
    """Return five statistics, logp_at and the ids; autograd differentiates them."""
    if places is None:
        places = TokenIds.of_matrix(most_likely(logits_of(p.hidden, p.weight, p.bias), top_k, p.options))
    ids, offsets, _ = places
    o = p.options.without_bias()
    hidden, weight = with_probes(p.hidden, p.weight, p.probes)
    return *reference.linear_forward(hidden, weight, p.bias, p.target, ids, offsets, **o), ids


register_cpu(OP, ids_runs.CPU, FLOAT_DTYPES, "softcap")
register_cuda(OP, ids_runs.CUDA, FLOAT_DTYPES, "softcap")
register_triton(OP, ids_runs.TRITON, FLOAT_DTYPES, "softcap")
register_reference(OP, HeadIdsKernels(_reference, None), "softcap")


# ---------------------------------------------------------------------------------------------- step


class IdsStep(NamedTuple):
    """Result of `ids_step`."""

    loss: torch.Tensor
    """(), differentiable."""
    entropy: torch.Tensor
    """(tokens,), detached; 0 for masked tokens."""
    logp_at: torch.Tensor
    """(tokens, K), detached; 0 for masked tokens and padding."""


def ids_step(op: str, p: HeadProblem, ids: TokenIds, loss: IdsLoss) -> IdsStep:
    """Return the loss of all tokens; its gradients for hidden, weight and bias are computed in the same pass.

    Args:
        op: name of the public function, for errors.
        p: the head and its inputs. The mask leaves tokens out.
        ids: of a (tokens, K) matrix.
        loss: function that computes the sum of the losses of some tokens from the log-probs at their ids.
    """
    if may_read(ids.flat):
        o = p.options
        reference.check_values(op, p.target, ids.flat, ids.offsets, p.vocab, o.mask, o.temperature)
    capability = select(OP, p.hidden.device.type, p.dtype, p.options.features())
    kernels: HeadIdsKernels = capability.run
    run = kernels.step
    if run is None or torch.compiler.is_compiling():
        stats = linear_token_stats_at(p, ids.flat.view(ids.shape), None, None)
        tokens = torch.arange(p.tokens, device=p.hidden.device)
        if p.options.mask is not None:
            tokens = tokens[p.options.mask]
        total = loss(stats.logp_at[tokens], tokens)
        return IdsStep(total.to(stats.logp.dtype), stats.entropy.detach(), stats.logp_at.detach())
    if not torch.is_grad_enabled():
        p = p._replace(needs=(False, False, False))
    gradients: Gradients = {}
    step = run

    def compute() -> Computed:
        found = step(p, ids, loss)
        return found.loss.to(found.entropy.dtype), (found.entropy, found.logp_at), found.gradients

    leaves = dict(zip(NAMES, (p.hidden, p.weight, p.bias), strict=True))
    value, entropy, logp_at = with_gradients(op, leaves, compute, gradients, functools.partial(deliver, p.probes))
    return IdsStep(value, entropy, logp_at)


# ------------------------------------------------------------------------------- autograd, compile


class _LinearAtFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        p: HeadProblem,
        places: TokenIds | None,
        top_k: int,
        run: HeadIdsKernels,
    ) -> tuple[torch.Tensor, ...]:
        outputs = run.forward(p, places, top_k)
        logp, entropy, lse, sum_sq, top1, row_max, inv_sum, logp_at, ids = outputs
        offsets = _offsets(p, top_k) if places is None else places.offsets
        scalars, tensors = p.options.split()
        stats = (row_max, inv_sum, logp, entropy, logp_at)
        ctx.save_for_backward(hidden, weight, bias, p.target, *tensors, ids, offsets, *stats)
        ctx.rest = scalars, p.memory_budget, run, p.probes
        ctx.set_materialize_grads(False)
        ids = ids if places is None else ids.new_empty(0)  # do not return the caller's ids
        ctx.mark_non_differentiable(sum_sq, top1, ids)
        return logp, entropy, lse, sum_sq, top1, logp_at, ids

    @staticmethod
    @first_order("linear_token_stats")
    @ranged("linear_token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(grad is None for grad in grads):
            return (None,) * 7
        hidden, weight, bias, target, vector, mask, bias_logits, ids, offsets, *stats = ctx.saved_tensors
        scalars, budget, run, probes = ctx.rest
        probes = tuple(probe.emptied() for probe in probes)
        options = scalars.joined(vector, mask, bias_logits)
        p = HeadProblem(OP, hidden, weight, bias, target, options, budget, probes=probes)
        grad_at = torch.zeros_like(stats[-1]) if grads[5] is None else grads[5]
        needs = tuple(ctx.needs_input_grad[:3])
        places = TokenIds(ids, offsets, ids.shape)
        found = run.backward(p, places, *stats, *grads[:3], grad_at, needs)
        deliver(probes)
        return (*found, *(None,) * 4)


def _offsets(p: HeadProblem, top_k: int) -> torch.Tensor:
    return torch.arange(p.tokens + 1, device=p.hidden.device) * top_k


ARGUMENTS = f"{HEAD_SCHEMA}, {FLAT_SCHEMA_WITHOUT_BIAS}, int memory_budget"


def _problem(hidden: torch.Tensor, *rest: Any) -> tuple[HeadProblem, HeadIdsKernels]:
    weight, bias, target, *flat, budget = rest
    p = HeadProblem(OP, hidden, weight, bias, target, LogitOptions.from_flat(*flat), budget)
    return p, select(OP, hidden.device.type, p.dtype, p.options.features()).run


@graph_op(
    "tokfuse::linear_token_stats_at",
    f"({ARGUMENTS}, Tensor? ids, Tensor? offsets, int top_k) -> ({', '.join(['Tensor'] * 9)})",
)
@ranged("linear_token_stats.fwd")
def _linear_at_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *problem, ids, offsets, top_k = arguments
    p, run = _problem(*problem)
    places = None if ids is None else TokenIds(ids, offsets, ids.shape)
    *out, flat = run.forward(p, places, top_k)
    return (*out, flat if places is None else flat.new_empty(0))


@_linear_at_op.register_fake
def _(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    ids, _, top_k = rest[-3:]
    tokens = hidden.shape[0]
    counts = [tokens] * 7 + [tokens * top_k if ids is None else ids.shape[0]]
    made = tuple(hidden.new_empty(count, dtype=torch.float32) for count in counts)
    return (*made, hidden.new_empty(tokens * top_k if ids is None else 0, dtype=torch.int64))


@graph_op(
    "tokfuse::linear_token_stats_at_backward",
    f"({ARGUMENTS}, Tensor ids, Tensor offsets, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy"
    ", Tensor logp_at, Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor grad_logp_at"
    ", bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("linear_token_stats.bwd")
def _linear_at_backward_op(*arguments: Any) -> list[torch.Tensor]:
    p, run = _problem(*arguments[:10])
    ids, offsets, *given = arguments[10:-3]
    assert run.backward is not None
    found = run.backward(p, TokenIds(ids, offsets, ids.shape), *given, arguments[-3:])
    return [p.hidden.new_empty(0) if x is None else x for x in found]


@_linear_at_backward_op.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:
    return fake_gradients(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    hidden, weight, bias, target, *flat, ctx.budget, ids, offsets, top_k = inputs
    logp, entropy, lse, sum_sq, top1, row_max, inv_sum, logp_at, top_ids = output
    ctx.options, more = LogitOptions.from_flat(*flat).split()
    ids = top_ids if ids is None else ids
    ctx.top_k = top_k
    stats = (row_max, inv_sum, logp, entropy, logp_at)
    ctx.save_for_backward(hidden, weight, bias, target, *more, ids, offsets, *stats)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sum_sq, top1, row_max, inv_sum, top_ids)


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(grad is None for grad in grads):
        return (None,) * 13
    *tensors, vector, mask, bias_logits, ids, offsets, row_max, inv_sum, logp, entropy, logp_at = ctx.saved_tensors
    if offsets is None:
        offsets = torch.arange(logp.shape[0] + 1, device=logp.device) * ctx.top_k
    o = ctx.options.joined(vector, mask, bias_logits)
    grad_at = torch.zeros_like(logp_at) if grads[7] is None else grads[7]
    needs = tuple(ctx.needs_input_grad[:3])
    stats = (row_max, inv_sum, logp, entropy, logp_at)
    out = _linear_at_backward_op(*tensors, *o.flat()[:5], ctx.budget, ids, offsets, *stats, *grads[:3], grad_at, *needs)
    chosen = [x if need else None for x, need in zip(out, needs, strict=True)]
    return (*chosen,) + (None,) * 10


_linear_at_op.register_autograd(_op_backward, setup_context=_setup_context)
