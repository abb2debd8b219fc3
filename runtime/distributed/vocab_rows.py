"""Row kernels on one vocabulary shard: local statistics, exchange of the records, local gradients."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import head_dtype
from tokfuse.runtime.core.dispatch import Kernels, RowState, select
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.distributed.vocab_shard import Merged, VocabShard, empty_record, merge, pack
from tokfuse.runtime.lm_head.problem import HeadProblem, check_head
from tokfuse.runtime.lm_head.units import HeadKernels
from tokfuse.runtime.ops import linear_token_stats as linear_op
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.reference import token_stats as stats_reference

# Target id that means "another shard owns the target" in the backward of the row kernels. It must match
# ELSEWHERE in triton_kernels/rows.py and kElsewhere in csrc/cuda/gradient.cuh. The CPU kernels accept any id
# outside the columns.
ELSEWHERE = -(2**31)


class HeadCall(NamedTuple):
    """The arguments of a call from hidden states that are not differentiable tensors."""

    op: str
    options: LogitOptions
    target: torch.Tensor
    memory_budget: int | None
    shard: VocabShard
    sequence_parallel: bool
    reduce_hidden: bool = True
    kept: TokenIds | None = None
    """Kept ids of this shard, counted from its start. None: over the whole vocabulary."""


def _exchange(
    local: tuple[torch.Tensor, ...] | None,
    target: torch.Tensor,
    o: LogitOptions,
    shard: VocabShard,
    state: RowState,
    dtype: torch.dtype,
) -> Merged:
    """Gather the records of all ranks in one all-gather, and return them merged.

    `local` are the outputs of the row kernel, or None for a shard without columns. The reference
    exchanges float64, so that its statistics are rounded only once, to `dtype`.
    """
    record = empty_record(target, state.dtype) if local is None else pack(local, shard.owns(target))
    records = collectives.all_gather(record, shard.group)
    return merge(records, collectives.own_rank(shard.group), state.nats(o), o.mask, dtype)


def column_of(target: torch.Tensor, shard: VocabShard, elsewhere: int) -> torch.Tensor:
    """Return the column of the target in this shard, or `elsewhere` if another shard owns it."""
    return torch.where(shard.owns(target), target - shard.start, elsewhere)


# ------------------------------------------------------------------------------------- from logits


def row_kernels(device: torch.device, dtype: torch.dtype, o: LogitOptions) -> Kernels:
    """Return the token_stats kernels for a shard of logits."""
    run: Kernels = select(stats_op.OP, device.type, dtype, o.features()).run
    return run


def own_options(o: LogitOptions, shard: VocabShard) -> LogitOptions:
    """Return the options for the columns of the shard, without its padding columns."""
    return o if o.bias_logits is None else o._replace(bias_logits=o.bias_logits[:, : shard.size])


def row_options(o: LogitOptions, shard: VocabShard) -> dict[str, Any]:
    """Return `own_options` as keywords."""
    return own_options(o, shard)._asdict()


def row_forward(logits: torch.Tensor, target: torch.Tensor, o: LogitOptions, shard: VocabShard) -> Merged:
    """Return the statistics of the whole vocabulary. logits is (tokens, columns) with padding columns."""
    run = row_kernels(logits.device, logits.dtype, o)
    assert run.state is not None
    local = None
    if shard.size > 0:
        z = logits.detach()[:, : shard.size]
        local = run.forward(z, column_of(target, shard, 0), **row_options(o, shard))[:7]
    dtype = stats_reference.result_dtype(logits.dtype)
    return _exchange(local, target, o, shard, run.state, dtype)


def empty_gradient(logits: torch.Tensor, shard: VocabShard) -> torch.Tensor:
    """Return a tensor for the gradient of logits, with zeros in the padding columns."""
    if logits.device.type == "cpu":
        out = native.empty_like_rows(logits)
    else:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    out[:, shard.size :] = 0.0
    return out


def row_backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    shard: VocabShard,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the logits of this shard, in `out` if given; 0 in the padding columns.

    out: like logits; it may be logits itself.
    """
    logits = logits.detach()
    if out is None:
        out = empty_gradient(logits, shard)
    else:
        out[:, shard.size :] = 0.0
    if shard.size > 0:
        backward = row_kernels(logits.device, logits.dtype, o).backward
        assert backward is not None
        backward(
            logits[:, : shard.size],
            column_of(target, shard, ELSEWHERE),
            row_max,
            inv_sum,
            logp,
            entropy,
            grad_logp,
            grad_entropy,
            out=out[:, : shard.size],
            **row_options(o, shard),
        )
    return out


# ------------------------------------------------------------------------------ from hidden states


def gathered(hidden: torch.Tensor, shard: VocabShard, sequence_parallel: bool) -> torch.Tensor:
    """Return the hidden states of all tokens. With sequence parallelism this is one all-gather."""
    hidden = hidden.detach()
    if not sequence_parallel:
        return hidden
    return collectives.all_gather(hidden, shard.group).flatten(0, 1)


def _head_kernels(hidden: torch.Tensor, dtype: torch.dtype, o: LogitOptions) -> HeadKernels:
    run: HeadKernels = select(linear_op.OP, hidden.device.type, dtype, o.features()).run
    return run


def _problem(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall, elsewhere: int
) -> HeadProblem:
    size = call.shard.size
    own_bias = None if bias is None else bias.detach()[:size]
    target = column_of(call.target, call.shard, elsewhere)
    own_weight = weight.detach()[:size]
    p = check_head(call.op, hidden, own_weight, own_bias, target, call.options, call.memory_budget)
    return p._replace(kept=call.kept)


def head_forward(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall) -> Merged:
    """Return the statistics of the whole vocabulary. weight is (rows, hidden) with padding rows."""
    computed = head_dtype(hidden, weight, bias)
    run = _head_kernels(hidden, computed, call.options)
    local = None
    if call.shard.size > 0:
        local = run.forward(_problem(hidden, weight, bias, call, 0))[:7]
    dtype = stats_reference.result_dtype(computed)
    return _exchange(local, call.target, call.options, call.shard, run.state, dtype)


def head_backward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    call: HeadCall,
    needs: tuple[bool, bool, bool],
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
) -> list[torch.Tensor | None]:
    """Return [grad_hidden summed over the shards, grad_weight and grad_bias of this shard]; 0 in the padding."""
    grads: list[torch.Tensor | None] = [None, None, None]
    if call.shard.size > 0:
        p = _problem(hidden, weight, bias, call, ELSEWHERE)
        grads = _head_kernels(hidden, p.dtype, call.options).backward(
            p, row_max, inv_sum, logp, entropy, grad_logp, grad_entropy, needs
        )
    return reduced(grads, (hidden, weight, bias), needs, call.shard, call.sequence_parallel, call.reduce_hidden)


def reduced(
    grads: list[torch.Tensor | None],
    leaves: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None],
    needs: tuple[bool, bool, bool],
    shard: VocabShard,
    sequence_parallel: bool,
    reduce_hidden: bool,
) -> list[torch.Tensor | None]:
    """Return the gradients of hidden, weight and bias from those of this shard's columns.

    The gradient of hidden is summed over the shards, and split with sequence parallelism. The others get zeros
    for padding rows. `leaves` are the hidden states of all tokens, and weight and bias with their padding.
    """
    hidden, weight, bias = leaves
    grad_hidden = None
    if needs[0]:
        part = torch.zeros_like(hidden) if grads[0] is None else grads[0]
        if sequence_parallel:
            grad_hidden = collectives.sum_and_split(part, shard.group)
        else:
            grad_hidden = collectives.sum_(part, shard.group) if reduce_hidden else part
    return [
        grad_hidden,
        _padded(grads[1], weight) if needs[1] else None,
        _padded(grads[2], bias) if needs[2] and bias is not None else None,
    ]


def _padded(grad: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
    """Return the gradient with zeros for the padding rows. Without padding rows there is no copy."""
    if grad is not None and grad.shape == like.shape:
        return grad
    out = torch.zeros_like(like)
    if grad is not None:
        out[: grad.shape[0]] = grad
    return out
