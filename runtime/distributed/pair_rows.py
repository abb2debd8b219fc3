"""Row kernels on the columns of two models that one rank holds: divergence, statistics, gradients, exchanges."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends.row_args import divergence_bound
from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.distributed import collectives, pair_shard, vocab_rows, vocab_shard
from tokfuse.runtime.distributed.pair_shard import MergedPair
from tokfuse.runtime.distributed.shard_head import ExactHead, chunks_of, hidden_of
from tokfuse.runtime.distributed.vocab_rows import ELSEWHERE, column_of
from tokfuse.runtime.distributed.vocab_shard import Merged, VocabShard
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.pair_problem import (
    Coefficients,
    Divergence,
    Gradients,
    PairProblem,
    Stats,
    Teacher,
    default_budget,
)
from tokfuse.runtime.lm_head.pair_rows import (
    RowKernels,
    Streams,
    common_streams,
    divergence_gradient,
    options_of_rows,
    row_bytes,
    same_transform,
    stats_gradient,
)
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.ops import paired_divergence as divergence_op
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.reference.token_stats import result_dtype


def kernels_of(device: torch.device, dtype: torch.dtype, features: frozenset[str]) -> RowKernels:
    """Return the row kernels for logits of this dtype, or from a head that is computed in it."""
    stats = select(stats_op.OP, device.type, dtype, features).run
    return RowKernels(stats, select(divergence_op.OP, device.type, dtype, features).run)


class Columns(NamedTuple):
    """This rank's logits of both sides for some tokens, without padding; None for a shard without columns."""

    p: torch.Tensor
    q: torch.Tensor
    of_p: LogitOptions
    """With the mask of both sides."""
    of_q: LogitOptions
    streams: Streams

    @staticmethod
    def of(p: torch.Tensor, q: torch.Tensor, of_p: LogitOptions, of_q: LogitOptions) -> "Columns":
        """Bring both sides to one transform."""
        return Columns(p, q, of_p, of_q, common_streams(p, q, of_p, of_q))


class PairSaved(NamedTuple):
    """What the gradient of a shard needs besides its logits; (tokens, ...)."""

    state: torch.Tensor
    """Of the divergence."""
    row_max: torch.Tensor
    inv_sum: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor


def _local_kind(kind: str) -> str:
    """Return the KL that a shard computes before the exchange; that of another kind tells close rows apart."""
    return kind if kind in ("kl_forward", "kl_reverse") else "kl_reverse"


def _divergence_record(
    kernels: RowKernels, columns: Columns | None, divergence: Divergence, tokens: int, like: torch.Tensor
) -> torch.Tensor:
    assert kernels.divergence.state is not None
    if columns is None:
        return pair_shard.empty_record(tokens, kernels.divergence.state.dtype, like.device)
    s = columns.streams
    local = Divergence(_local_kind(divergence.kind), 0.5)
    value, state = kernels.divergence.forward(s.p, s.q, **local._asdict(), **s.options)
    highest_p, highest_q = columns.p.amax(1, keepdim=True), columns.q.amax(1, keepdim=True)
    return pair_shard.pack(value, state, ((columns.p == highest_p) & (columns.q == highest_q)).any(1))


def _merged_divergence(
    kernels: RowKernels,
    columns: Columns | None,
    divergence: Divergence,
    records: torch.Tensor,
    of_p: LogitOptions,
    of_q: LogitOptions,
    shard: VocabShard,
) -> MergedPair:
    """Merge the records, and for a kind that is no KL add up the terms of the shards in a second exchange."""
    assert kernels.divergence.state is not None
    kind = _local_kind(divergence.kind)
    unit = kernels.divergence.state.nats(_stream_options(of_p, of_q))
    merged = pair_shard.merge(records, collectives.own_rank(shard.group), unit, kind, of_p.mask)
    if kind == divergence.kind:
        return merged
    state = merged.state
    # An infinite KL is no result for a mixture.
    live = (state[:, 0] != 0) | (merged.value == float("inf"))
    state[:, 0] = live.to(state.dtype)
    part = torch.zeros((2, state.shape[0]), dtype=state.dtype, device=state.device)
    if columns is not None:
        s = columns.streams
        sums, of_shard = kernels.divergence.forward(
            s.p, s.q, given=state.contiguous(), **divergence._asdict(), **s.options
        )
        part = torch.stack([sums, of_shard[:, 5]])
    total, mean = collectives.all_gather(part, shard.group).double().sum(0)
    bound = divergence_bound(divergence.kind, divergence.mix_weight)
    state[:, 5] = mean.to(state.dtype)
    return merged._replace(value=torch.where(live, total.clamp(0.0, bound), 0.0))


def _stream_options(of_p: LogitOptions, of_q: LogitOptions) -> LogitOptions:
    """Return the options that the divergence kernels apply to both streams; see `common_streams`."""
    if same_transform(of_p, of_q) or of_p.softcap is None:
        return of_p
    return LogitOptions(1.0, None, 1.0, of_p.mask)


def compare(
    kernels: RowKernels,
    columns: Columns | None,
    divergence: Divergence,
    of_p: LogitOptions,
    of_q: LogitOptions,
    like: torch.Tensor,
    shard: VocabShard,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence (tokens,), its state). One all-gather, for a kind that is no KL two."""
    record = _divergence_record(kernels, columns, divergence, like.shape[0], like)
    records = collectives.all_gather(record, shard.group)
    merged = _merged_divergence(kernels, columns, divergence, records, of_p, of_q, shard)
    return merged.value, merged.state


def compare_with_stats(
    kernels: RowKernels,
    columns: Columns | None,
    divergence: Divergence,
    of_p: LogitOptions,
    of_q: LogitOptions,
    target: torch.Tensor,
    shard: VocabShard,
) -> tuple[Stats, PairSaved]:
    """Return the five statistics in float64, and what the gradient needs. The exchanges are those of `compare`."""
    assert kernels.stats.state is not None
    dtype, unit = kernels.stats.state.dtype, kernels.stats.state.nats
    of_q = of_q._replace(mask=of_p.mask)
    sides = []
    if columns is None:
        sides = [vocab_shard.empty_record(target, dtype)] * 2
    else:
        at = column_of(target, shard, 0)
        for z, o in ((columns.p, of_p), (columns.q, of_q)):
            sides.append(vocab_shard.pack(kernels.stats.forward(z, at, **o.without_bias())[:7], shard.owns(target)))
    pair = _divergence_record(kernels, columns, divergence, target.shape[0], target)
    records = collectives.all_gather(torch.cat([*sides, pair.to(dtype)]), shard.group)
    sizes = [vocab_shard.RECORD, vocab_shard.RECORD, pair_shard.RECORD]
    of_student, of_teacher, of_pair = records.split(sizes, 1)
    rank = collectives.own_rank(shard.group)
    student: Merged = vocab_shard.merge(of_student, rank, unit(of_p), of_p.mask, torch.float64)
    teacher = vocab_shard.merge(of_teacher, rank, unit(of_q), of_p.mask, torch.float64).stats
    merged = _merged_divergence(kernels, columns, divergence, of_pair, of_p, of_q, shard)
    stats = (merged.value, student.stats.entropy, student.stats.logp, teacher.logp, merged.top1_agreement)
    return stats, PairSaved(merged.state, *student[1:])


def write_gradient(
    kernels: RowKernels,
    columns: Columns,
    divergence: Divergence,
    target: torch.Tensor,
    saved: PairSaved,
    given: Coefficients,
    shard: VocabShard,
    out: torch.Tensor,
) -> None:
    """Write the gradient of this shard's logits of the student to `out`, which may be these logits."""
    stats = (saved.logp, saved.entropy, saved.logp, saved.logp, saved.logp, saved.row_max, saved.inv_sum)
    at = column_of(target, shard, ELSEWHERE)
    more = stats_gradient(kernels, columns.p, at, columns.of_p, stats, given)
    divergence_gradient(kernels, columns.streams, saved.state, given.divergence, divergence, out)
    if more is not None:
        out += more


# ------------------------------------------------------------------------------ from hidden states


class PairCall(NamedTuple):
    """A call from hidden states: both heads of this rank without padding, the hidden states of all tokens."""

    op: str
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    options: LogitOptions
    teacher: Teacher
    divergence: Divergence
    memory_budget: int | None
    shard: VocabShard

    def features(self) -> frozenset[str]:
        """Names of the optional behaviours this call uses."""
        return self.options.features() | self.teacher.options.features()

    def gathered(self, sequence_parallel: bool) -> "PairCall":
        """Return the call with the hidden states of all tokens: one all-gather of each side, or none."""
        teacher = self.teacher
        if teacher.hidden is not None:
            hidden = vocab_rows.gathered(teacher.hidden, self.shard, sequence_parallel)
            teacher = teacher._replace(hidden=hidden)
        return self._replace(hidden=vocab_rows.gathered(self.hidden, self.shard, sequence_parallel), teacher=teacher)

    def flat(self) -> tuple[Any, ...]:
        """Return the values that `from_flat` takes; no tensor is inside a record."""
        options, of_teacher = self.options.flat()[:5], self.teacher.options.flat()[:4]
        rest = (self.divergence, self.memory_budget, self.shard, self.op)
        return (*self[1:5], *self.teacher[:4], *options, *of_teacher, *rest)

    @staticmethod
    def from_flat(*flat: Any) -> "PairCall":
        """Undo `flat`."""
        hidden, weight, bias, target, *teacher = flat[:8]
        of_teacher, of_weight, of_bias, of_logits = teacher
        options = LogitOptions.from_flat(*flat[8:13])
        vector, scalar, softcap, logit_scale, divergence, memory_budget, shard, op = flat[13:]
        teacher_options = LogitOptions.from_flat(vector, scalar, softcap, logit_scale, None)
        other = Teacher(of_teacher, of_weight, of_bias, of_logits, teacher_options)
        return PairCall(op, hidden, weight, bias, target, options, other, divergence, memory_budget, shard)

    def head(self) -> HeadProblem:
        """Return the student's head."""
        return HeadProblem(self.op, self.hidden, self.weight, self.bias, self.target, self.options, 1)


def _rows_per_chunk(call: PairCall, given: Coefficients | None) -> int:
    """Return the same number on all ranks: as many rows as the budget holds if the vocabulary is split evenly."""
    vocab = -(-call.shard.vocab_size // collectives.num_ranks(call.shard.group))
    budget = call.memory_budget
    if budget is None:
        budget = default_budget(call.hidden, call.teacher.hidden, vocab)
    p = PairProblem(call.head(), call.teacher, call.divergence)
    return max(1, budget // sum(row_bytes(p, given, vocab)))


def head_pass(
    call: PairCall, given: Coefficients | None, needs: tuple[bool, bool, bool], saved: PairSaved | None
) -> tuple[Stats, PairSaved | None, Gradients]:
    """Compute both heads chunk by chunk: statistics unless they were `saved`, gradients if coefficients are given.

    Returns:
        (five statistics (tokens,), what a later call needs for the gradients, gradients of hidden, weight
        and bias by this shard's columns). Rows that the mask excludes, and rows without a coefficient if
        they are given, are not computed.
    """
    s, t, shard = call, call.teacher, call.shard
    student = call.head()
    kernels = kernels_of(s.hidden.device, student.dtype, call.features())
    assert kernels.stats.state is not None
    dtype = kernels.stats.state.dtype
    exact = dtype == torch.float64
    needed = s.options.mask
    if given is not None:
        given = given.each(lambda x: x.to(dtype))
        active = given.active()
        needed = active if needed is None else active & needed
    rows = device_head.classify(student, needed, None)
    head = ExactHead(student, needs) if exact else DeviceHead(student, needs, rows)
    of_teacher: ExactHead | DeviceHead | None = None
    if t.hidden is not None and t.weight is not None:
        problem = HeadProblem(s.op, t.hidden, t.weight, t.bias, s.target, t.options, 1)
        none = (False, False, False)
        of_teacher = ExactHead(problem, none) if exact else DeviceHead(problem, none, rows)
    tokens, device = s.hidden.shape[0], s.hidden.device
    out = [torch.zeros(tokens, dtype=torch.float64, device=device) for _ in range(5)]
    kept = saved
    if saved is None:
        vectors = (torch.zeros(tokens, dtype=dtype, device=device) for _ in range(4))
        kept = PairSaved(torch.zeros(tokens, 6, dtype=dtype, device=device), *vectors)
    assert kept is not None
    with torch.no_grad():
        for index in chunks_of(rows, _rows_per_chunk(call, given)):
            keep = None if rows.keep is None else rows.keep[index]
            h = hidden_of(s.hidden, index, keep)
            of_p, of_q = options_of_rows(s.options, index, keep), options_of_rows(t.options, index, keep)
            if same_transform(s.options, t.options):
                of_q = of_p
            columns = None
            if shard.size > 0:
                z = head.logits(h)
                if of_teacher is None:
                    assert t.logits is not None
                    q = t.logits[index].to(z.dtype)
                else:
                    q = of_teacher.logits(hidden_of(of_teacher.hidden, index, keep))
                columns = Columns.of(z, q, of_p, of_q)
            target = s.target[index]
            if saved is None:
                stats, of_chunk = compare_with_stats(kernels, columns, s.divergence, of_p, of_q, target, shard)
                for whole, x in zip((*out, *kept), (*stats, *of_chunk), strict=True):
                    whole[index] = x.to(whole.dtype)
            if given is not None and columns is not None and any(needs):
                dz = head.gradient_like(columns.p)
                part = given.each(lambda x, index=index: x[index])  # type: ignore[misc]
                of_chunk = PairSaved(*(x[index] for x in kept))
                write_gradient(kernels, columns, s.divergence, target, of_chunk, part, shard, dz)
                head.add(index, h, dz)
    result = result_dtype(student.dtype)
    return tuple(x.to(result) for x in out), kept, head.finish()
