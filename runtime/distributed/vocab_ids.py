"""Log-probs at a few ids per token over vocabulary shards: `ids` and `top_k` of the ops in vocab_parallel.py.

An id has its log-prob in the softmax of the shard that owns it. The log-prob over the whole vocabulary adds the
shard's log-share (vocab_shard.py), so the ids travel in the all-gather of the records. For `top_k` each rank first
proposes its own K most likely ids, in one more all-gather.

With g_j the sum of what arrives at column j, grad_logp at the target included, and total = sum_i g_i - grad_lse, the
gradient of a shard is

    dz_j = f'(z) / T ( g_j (1 - p_j) - p_j (total - g_j) - gh p_j (log p_j + entropy) ).

The kernel of token_stats writes what a column without g gets. The columns of ids and target that the shard owns are
computed in float64 and overwrite it, as in csrc/cuda/token_stats_at.cuh.
"""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import Kernels, select
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import save_flat, saved_flat
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats, TokenStatsAt
from tokfuse.runtime.core.token_ids import check_ids, check_top_k, most_likely
from tokfuse.runtime.distributed import collectives, vocab_rows, vocab_shard
from tokfuse.runtime.distributed.shard_head import ExactHead, chunks_of, hidden_of
from tokfuse.runtime.distributed.vocab_rows import ELSEWHERE, HeadCall, column_of
from tokfuse.runtime.distributed.vocab_shard import RECORD, Merged, VocabShard
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.pair_rows import options_of_rows
from tokfuse.runtime.lm_head.problem import GPU_ROWS, MIN_BUDGET, HeadProblem
from tokfuse.runtime.ops import token_stats_at as at_op
from tokfuse.runtime.reference import token_stats_at as at_reference
from tokfuse.runtime.reference.kept_token_stats import row_of_each
from tokfuse.runtime.reference.token_stats import result_dtype

INF = float("inf")


class AskedIds(NamedTuple):
    """The ids of a call as a matrix."""

    ids: torch.Tensor | None
    """(tokens, K) int64, -1 for padding; None: the `top_k` most likely ones."""
    top_k: int
    place: tuple[torch.Tensor, torch.Tensor] | None
    """Row and column in the matrix of each of the concatenated ids; None if the caller gave a matrix."""


def check_asked(
    op: str,
    ids: torch.Tensor | None,
    ids_offsets: torch.Tensor | None,
    top_k: int | None,
    target: torch.Tensor,
    o: LogitOptions,
    shard: VocabShard,
) -> AskedIds:
    """Check ids or top_k. Concatenated ids cost one synchronisation, for the largest number of a token."""
    if ids is None:
        return AskedIds(None, check_top_k(op, top_k, shard.vocab_size), None)
    tokens = target.shape[0]
    flat, offsets, _ = check_ids(op, ids, ids_offsets, tokens, target.device)
    if may_read(flat):
        at_reference.check_values(op, target, flat, offsets, shard.vocab_size, o.mask, o.temperature)
    if ids_offsets is None:
        return AskedIds(flat.view(ids.shape), 0, None)
    width = int(offsets.diff().max()) if tokens else 0
    row = row_of_each(flat, offsets)
    place = (row, torch.arange(flat.shape[0], device=flat.device) - offsets[row])
    matrix = flat.new_full((tokens, width), -1)
    matrix[place] = flat
    return AskedIds(matrix, 0, place)


class Found(NamedTuple):
    """Results of some tokens, and what the gradient of this shard needs."""

    merged: Merged
    ids: torch.Tensor
    """(tokens, K)."""
    logp_at: torch.Tensor
    """(tokens, K) float64."""


def _forward(z: torch.Tensor | None, target: torch.Tensor, asked: AskedIds, o: LogitOptions, call: "_Kernels") -> Found:
    """Compute the results of rows; z are this shard's logits, None if it has no columns."""
    if asked.ids is not None:
        return _at_ids(z, target, asked.ids, o, call)
    k, shard = asked.top_k, call.shard
    own = target.new_full((target.shape[0], k), -1)
    if z is not None:
        part = most_likely(z, min(k, shard.size), vocab_rows.own_options(o, shard))
        own[:, : part.shape[1]] = torch.where(part < 0, -1, part + shard.start)
    proposed = collectives.all_gather(own, shard.group).permute(1, 0, 2).flatten(1)
    found = _at_ids(z, target, proposed, o, call)
    # Any id is before the padding, even one of an excluded column.
    score = torch.where(proposed < 0, -INF, found.logp_at.clamp(min=-torch.finfo(torch.float64).max))
    place = score.topk(k, dim=1).indices
    return Found(found.merged, proposed.gather(1, place), found.logp_at.gather(1, place))


class _Kernels(NamedTuple):
    stats: Kernels
    at: Kernels
    shard: VocabShard

    @staticmethod
    def of(device: torch.device, dtype: torch.dtype, o: LogitOptions, shard: VocabShard) -> "_Kernels":
        """Return the kernels for logits of this dtype, or from a head that is computed in it."""
        at: Kernels = select(at_op.OP, device.type, dtype, o.features()).run
        return _Kernels(vocab_rows.row_kernels(device, dtype, o), at, shard)


def _at_ids(z: torch.Tensor | None, target: torch.Tensor, ids: torch.Tensor, o: LogitOptions, call: _Kernels) -> Found:
    state, shard = call.stats.state, call.shard
    assert state is not None
    tokens, width = ids.shape
    flat = ids.reshape(-1)
    owned = shard.owns(flat)
    record, at = vocab_shard.empty_record(target, state.dtype), flat.new_full(flat.shape, INF, dtype=state.dtype)
    if z is not None:
        offsets = torch.arange(tokens + 1, device=ids.device) * width
        local = torch.where(owned, flat - shard.start, -1)
        options = vocab_rows.row_options(o, shard)
        *seven, own = call.at.forward(z, column_of(target, shard, 0), local, offsets, **options)
        record, at = vocab_shard.pack(tuple(seven), shard.owns(target)), torch.where(owned, own.to(state.dtype), INF)
    gathered = collectives.all_gather(torch.cat([record.reshape(-1), at]), shard.group)
    records = gathered[:, : RECORD * tokens].view(-1, RECORD, tokens)
    of_ids = gathered[:, RECORD * tokens :].double().view(-1, tokens, width)
    unit = state.nats(o)
    merged = vocab_shard.merge(records, collectives.own_rank(shard.group), unit, o.mask, torch.float64)
    split = vocab_shard.shares(records, unit)
    here = of_ids != INF
    logp_at = torch.where(here, of_ids + split.log_share[:, :, None], 0.0).sum(0).clamp(max=0)
    logp_at = torch.where(here.any(0), logp_at, torch.nan)  # no shard owns the id
    logp_at = torch.where(split.dead[:, None], -INF, logp_at)
    counts = ids >= 0 if o.mask is None else (ids >= 0) & o.mask[:, None]
    return Found(merged, ids, torch.where(counts, logp_at, 0.0))


class Given(NamedTuple):
    """The incoming gradients, float64."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    at: torch.Tensor
    """(tokens, K)."""

    def active(self) -> torch.Tensor:
        """(tokens,) bool: rows with a gradient."""
        return (self.logp != 0) | (self.entropy != 0) | (self.lse != 0) | (self.at != 0).any(1)


class Saved(NamedTuple):
    """What the gradient of a shard needs besides its logits."""

    ids: torch.Tensor
    logp_at: torch.Tensor
    row_max: torch.Tensor
    inv_sum: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor


def _backward(
    z: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    saved: Saved,
    given: Given,
    call: _Kernels,
    out: torch.Tensor,
) -> None:
    """Write the gradient of this shard's logits to `out`, which may be `z`."""
    keep = torch.ones_like(target, dtype=torch.bool) if o.mask is None else o.mask
    logp, entropy = saved.logp.double(), saved.entropy.double()
    columns = torch.cat([saved.ids, target[:, None]], 1)
    log_p = torch.cat([saved.logp_at.double(), logp[:, None]], 1)
    incoming = torch.cat([given.at, given.logp[:, None]], 1)
    counts = keep[:, None] & (columns >= 0)
    incoming = torch.where(counts, incoming, 0.0)
    gh, gl = (torch.where(keep, x, 0.0) for x in (given.entropy, given.lse))
    total = incoming.sum(1) - gl
    own = _sums_of_equal(columns, incoming)
    p = log_p.exp()
    log_term = torch.where(p == 0, 0.0, p * (log_p + entropy[:, None]))
    value = -own * torch.expm1(log_p) - p * (total[:, None] - own) - gh[:, None] * log_term
    at = torch.where(call.shard.owns(columns), columns - call.shard.start, 0)
    slope = o.per_temperature(o.logit_scale)
    value = value * (slope[:, None] if isinstance(slope, torch.Tensor) else slope)
    if o.softcap is not None:
        value = value * (1.0 - torch.tanh(z.gather(1, at).double() * o.logit_scale / o.softcap) ** 2)
    live = counts & given.active()[:, None] & (saved.inv_sum != 0)[:, None]
    rows, places = (live & call.shard.owns(columns)).nonzero(as_tuple=True)
    assert call.stats.backward is not None
    vectors = (saved.row_max, saved.inv_sum, saved.logp, saved.entropy)
    dtype = saved.logp.dtype
    elsewhere = torch.full_like(target, ELSEWHERE)
    options = vocab_rows.row_options(o, call.shard)
    call.stats.backward(z, elsewhere, *vectors, total.to(dtype), gh.to(dtype), out=out, **options)
    out[rows, at[rows, places]] = value[rows, places].to(out.dtype)


def _sums_of_equal(ids: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return for each entry the sum of x over the entries of its row with the same id."""
    ordered, order = ids.sort(1)
    sums = torch.nn.functional.pad(x.gather(1, order).cumsum(1), (1, 0))
    first, last = (torch.searchsorted(ordered, ids, right=right) for right in (False, True))
    return sums.gather(1, last) - sums.gather(1, first)


def _incoming(grads: tuple[torch.Tensor | None, ...], saved: Saved) -> Given | None:
    """Return the gradients of (logp, entropy, lse, ..., logp_at), or None if there is none."""
    if all(grad is None for grad in grads):
        return None
    given, like = (*grads[:3], grads[5]), (saved.logp, saved.logp, saved.logp, saved.logp_at)
    return Given._make(
        torch.zeros_like(x, dtype=torch.float64) if grad is None else grad.double()
        for grad, x in zip(given, like, strict=True)
    )


def result(out: tuple[torch.Tensor, ...], asked: AskedIds) -> TokenStatsAt:
    """Return the result of a call from the outputs of the functions below."""
    logp, entropy, lse, sum_sq, top1, logp_at, ids = out
    if asked.place is not None:
        logp_at = logp_at[asked.place]
    return TokenStatsAt(logp, entropy, lse, sum_sq, top1, logp_at, ids if asked.ids is None else None)


def _outputs(stats: TokenStats, found: Found | Saved, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (*(x.to(dtype) for x in stats), found.logp_at.to(dtype), found.ids)


class ShardStatsAt(torch.autograd.Function):
    """token_stats with ids or top_k, from this rank's logits."""

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, asked: AskedIds, o: LogitOptions, shard: VocabShard
    ) -> tuple[torch.Tensor, ...]:
        """Return the five statistics, logp_at (tokens, K) and the ids."""
        call = _Kernels.of(logits.device, logits.dtype, o, shard)
        z = logits.detach()[:, : shard.size] if shard.size > 0 else None
        found = _forward(z, target, asked, o, call)
        saved = Saved(found.ids, found.logp_at, *found.merged[1:])
        save_flat(ctx, (logits, target, *saved, *o.flat(), call))
        ctx.set_materialize_grads(False)
        out = _outputs(found.merged.stats, found, result_dtype(logits.dtype))
        ids = out[6].clone() if asked.ids is not None else out[6]  # an output is no input
        ctx.mark_non_differentiable(*out[3:5], ids)
        return (*out[:6], ids)

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        """Return the gradient of this rank's logits."""
        logits, target, *rest = saved_flat(ctx)
        saved, o, call = Saved(*rest[:6]), LogitOptions.from_flat(*rest[6:-1]), rest[-1]
        given = _incoming(grads, saved)
        if given is None:
            return (None,) * 5
        out = vocab_rows.empty_gradient(logits, call.shard)
        if call.shard.size > 0:
            z, part = logits.detach()[:, : call.shard.size], out[:, : call.shard.size]
            _backward(z, target, o, saved, given, call, part)
        return out, None, None, None, None


# ------------------------------------------------------------------------------ from hidden states


def _rows_per_chunk(call: HeadCall, hidden: int, on_cpu: bool) -> int:
    """Return the same number on all ranks: as many rows as the budget holds if the vocabulary is split evenly."""
    vocab = -(-call.shard.vocab_size // collectives.num_ranks(call.shard.group))
    row, budget = 6 * vocab + 8 * hidden + 64, call.memory_budget
    if budget is None:
        budget = max(MIN_BUDGET, vocab * hidden * 4 // 6)
        budget = budget if on_cpu else max(budget, min(GPU_ROWS * row, 1 << 30))
    return max(1, budget // row)


def _head(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall
) -> tuple[HeadProblem, _Kernels]:
    size = call.shard.size
    own_bias = None if bias is None else bias.detach()[:size]
    p = HeadProblem(call.op, hidden, weight.detach()[:size], own_bias, call.target, call.options, 1)
    return p, _Kernels.of(hidden.device, p.dtype, call.options, call.shard)


class ShardHeadAt(torch.autograd.Function):
    """linear_token_stats with ids or top_k, from this rank's rows of the lm_head."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall, asked: AskedIds
    ) -> tuple[torch.Tensor, ...]:
        """Return the five statistics, logp_at (tokens, K) and the ids."""
        hidden = vocab_rows.gathered(hidden, call.shard, call.sequence_parallel)
        p, kernels = _head(hidden, weight, bias, call)
        assert kernels.stats.state is not None
        exact = kernels.stats.state.dtype == torch.float64
        rows = device_head.classify(p, call.options.mask, None)
        none = (False, False, False)
        head = ExactHead(p, none) if exact else DeviceHead(p, none, rows)
        tokens, width = p.tokens, asked.top_k if asked.ids is None else asked.ids.shape[1]
        wide = {"dtype": torch.float64, "device": hidden.device}
        stats = [torch.zeros(tokens, **wide) for _ in range(5)]  # type: ignore[call-overload]
        kept = [torch.zeros(tokens, **wide) for _ in range(4)]  # type: ignore[call-overload]
        logp_at = torch.zeros(tokens, width, **wide)  # type: ignore[call-overload]
        ids = call.target.new_full((tokens, width), -1)
        for index in chunks_of(rows, _rows_per_chunk(call, hidden.shape[1], hidden.device.type == "cpu")):
            keep = None if rows.keep is None else rows.keep[index]
            o = options_of_rows(call.options, index, keep)
            z = head.logits(hidden_of(p.hidden, index, keep)) if call.shard.size > 0 else None
            part = asked if asked.ids is None else asked._replace(ids=asked.ids[index])
            found = _forward(z, call.target[index], part, o, kernels)
            for whole, x in zip((*stats, *kept), (*found.merged.stats, *found.merged[1:]), strict=True):
                whole[index] = x.to(whole.dtype)
            logp_at[index], ids[index] = found.logp_at, found.ids
        dtype = kernels.stats.state.dtype
        saved = Saved(ids, logp_at, *(x.to(dtype) for x in kept))
        scalars = (call.op, call.memory_budget, call.shard, call.sequence_parallel, call.reduce_hidden)
        save_flat(ctx, (hidden, weight, bias, call.target, *saved, *call.options.flat(), *scalars))
        ctx.set_materialize_grads(False)
        out = _outputs(TokenStats(*stats), saved, result_dtype(p.dtype))
        ctx.mark_non_differentiable(*out[3:5], out[6])
        return out

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        """Return the gradients of hidden, weight and bias; rows without incoming gradient are not recomputed."""
        hidden, weight, bias, target, *rest = saved_flat(ctx)
        saved, o = Saved(*rest[:6]), LogitOptions.from_flat(*rest[6:13])
        op, budget, shard, sequence_parallel, reduce_hidden = rest[13:]
        call = HeadCall(op, o, target, budget, shard, sequence_parallel, reduce_hidden)
        given = _incoming(grads, saved)
        if given is None:
            return (None,) * 5
        needs = tuple(ctx.needs_input_grad[:3])
        p, kernels = _head(hidden, weight, bias, call)
        exact = saved.logp.dtype == torch.float64
        active = given.active() if o.mask is None else given.active() & o.mask
        rows = device_head.classify(p, active, None)
        head = ExactHead(p, needs) if exact else DeviceHead(p, needs, rows)
        if shard.size > 0:
            for index in chunks_of(rows, _rows_per_chunk(call, hidden.shape[1], hidden.device.type == "cpu")):
                keep = None if rows.keep is None else rows.keep[index]
                h = hidden_of(p.hidden, index, keep)
                z, of_rows = head.logits(h), options_of_rows(o, index, keep)
                dz = head.gradient_like(z)
                part, incoming = Saved(*(x[index] for x in saved)), Given(*(x[index] for x in given))
                _backward(z, target[index], of_rows, part, incoming, kernels, dz)
                head.add(index, h, dz)
        leaves = (hidden, weight, bias)
        return *vocab_rows.reduced(head.finish(), leaves, needs, shard, sequence_parallel, reduce_hidden), None, None
