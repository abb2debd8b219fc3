"""Two heads on the CPU: torch's GEMMs of both sides around one native row kernel.

A chunk holds full rows of both sides, so every divergence needs each GEMM once. The student's logits
fill a buffer, and their gradient overwrites them. The teacher's logits are not needed after the row
kernel: they are computed in smaller chunks, and each chunk overwrites the previous one.

The first buffer uses the memory of dW, and so do the teacher's logits if they fit into the rest of it.
All further buffers share `memory_budget`.

A policy term needs the student's statistics of a chunk before the gradient: one more read of its logits.
"""

from collections.abc import Callable

import torch

from tokfuse.runtime.backends import cpu_rows, row_args
from tokfuse.runtime.core import native
from tokfuse.runtime.lm_head import cpu_runs
from tokfuse.runtime.lm_head.cpu_head import (
    Head,
    HeadGradients,
    LogitsBuffer,
    batch_tile,
    dw_buffer,
    tiled_columns,
    workspace_rows,
)
from tokfuse.runtime.lm_head.pair_problem import (
    ChunkPolicy,
    Coefficients,
    Gradients,
    LogitsPair,
    PairProblem,
    PolicyPart,
    Stats,
    check_logits_values,
    check_values_of,
    pair_rows,
    policy_first,
    with_student_stats,
)
from tokfuse.runtime.lm_head.problem import wanted


def pair_run(p: PairProblem, given: Coefficients | None, policy: PolicyPart | None) -> tuple[Stats, Gradients]:
    """2MV(Hs + Ht) operations for the logits and 4MVHs for the gradients. A `PairRun`."""
    check_values_of(p)
    with torch.no_grad():
        if policy is not None and policy.objective.level != "token":
            return policy_first(pair_run, cpu_runs.linear_fwd, p, given, policy)
        return _PairWork(p, given, policy).run()


def logits_run(p: LogitsPair, given: Coefficients, policy: PolicyPart | None) -> tuple[Stats, torch.Tensor]:
    """One read of both sides, one write; with a policy term one more read of the student. A `LogitsRun`."""
    check_logits_values("distill_step", p)
    module = native.loaded()
    stats = tuple(torch.empty(p.logits.shape[0], dtype=torch.float32, device="cpu") for _ in range(5 + given.further))
    grad_logits = native.empty_like_rows(p.logits)
    logits = p.logits.detach()
    if policy is not None:
        own = cpu_rows.token_stats_fwd(logits, p.target, **p.options._asdict())
        given = given.plus(*policy.coefficients(own[0], own[1]))
    student = row_args.logits_args(module, logits, p.target, p.options)
    teacher = row_args.logits_args(module, p.teacher_logits.detach(), p.target, p.teacher_options)
    kind, mix_weight = p.divergence
    bad = module.distill_rows(
        row_args.distill_args(
            module, student, teacher, kind=kind, mix_weight=mix_weight, class_weight=given.class_weight
        ),
        row_args.distill_out(module, stats),
        row_args.distill_grad(module, *given[:6], grad_logits=grad_logits),
    )
    assert bad < 0  # values were checked
    return (stats if policy is None else with_student_stats(stats, own, given.divergence)), grad_logits


class _PairWork:
    """One call's buffers."""

    def __init__(self, p: PairProblem, given: Coefficients | None, policy: PolicyPart | None) -> None:
        self.problem, self.student = p, p.student
        self.teacher = p.teacher_head(p.student.memory_budget)
        self.coefficients = None if given is None else given.each(torch.Tensor.float)
        self.policy = None
        if policy is not None and self.coefficients is not None:
            self.policy = ChunkPolicy(policy, p.student.tokens, p.student.hidden.device)
            # The policy term is added chunk by chunk.
            self.coefficients = self.coefficients.plus(
                *(torch.zeros(p.student.tokens, dtype=torch.float32, device="cpu") for _ in range(2))
            )
        self.order = pair_rows(p, self.coefficients, policy)
        needs = (False, False, False) if given is None else wanted(p.student)
        self.backward = any(needs)
        self.head = Head(self.student)
        self.teacher_head = None if self.teacher is None else Head(self.teacher)
        self.gradients = HeadGradients(self.head, needs)
        further = 0 if given is None else given.further
        self.stats = tuple(
            torch.zeros(self.student.tokens, dtype=torch.float32, device="cpu") for _ in range(5 + further)
        )
        self.out = row_args.distill_out(native.loaded(), self.stats)
        self.own: list[torch.Tensor] = []
        if policy is not None or self.order.gradient > self.order.compared:
            # token_stats of the student, whose logp, entropy and lse are results of this call.
            shared = [self.stats[2], self.stats[1], *self.stats[5:6]]
            rest = (torch.zeros(self.student.tokens, dtype=torch.float32, device="cpu") for _ in range(7 - len(shared)))
            self.own = [*shared, *rest]
        if given is not None and given.logit_sum is not None:
            self.student = self.student._replace(logit_sum=self.stats[6], class_weight=given.class_weight)

    def run(self) -> tuple[Stats, Gradients]:
        """Chunk after chunk: rows of both sides, rows of the student alone, rows without a gradient."""
        order = self.order
        compared, alone, rest = (
            order.order[start:stop]
            for start, stop in ((0, order.compared), (order.compared, order.gradient), (order.gradient, order.forward))
        )
        self._compare(compared)
        self._in_chunks(alone, self._student_gradient)
        self._in_chunks(rest, self._student_stats)
        return self.stats, self.gradients.finish()

    def _compare(self, index: torch.Tensor) -> None:
        start = 0
        if index.shape[0] > 0:
            rows = self._rows_in_budget(1)
            first = None
            if self.gradients.weight is not None:
                first = dw_buffer(self.gradients.weight, index.shape[0], min(rows, index.shape[0]))
            if first is not None:
                beside = self._beside(first)
                teacher = beside if beside is not None and beside.rows >= min(rows, first.rows) else None
                start = self._fill(first, teacher or self._teacher_buffer(min(rows, first.rows)), index)
        if start < index.shape[0]:
            rows = min(self._rows_in_budget(2), index.shape[0] - start)
            pool, teacher = LogitsBuffer.workspace(rows, self.student.vocab), self._teacher_buffer(rows)
            while start < index.shape[0]:
                start += self._fill(pool, teacher, index[start:])

    def _in_chunks(self, index: torch.Tensor, visit: Callable[[LogitsBuffer, torch.Tensor], None]) -> None:
        """Compute the student's logits of these tokens, without the teacher's, and visit them."""
        if index.shape[0] == 0:
            return
        rows = workspace_rows(self.student, index.shape[0])
        buffer = LogitsBuffer.workspace(rows, self.student.vocab)
        for tokens in index.split(rows):
            self.head.logits_of(tokens, buffer, 0)
            visit(buffer, tokens)

    def _student_stats(self, buffer: LogitsBuffer, tokens: torch.Tensor) -> None:
        """Statistics of the student, and what the policy term makes of them."""
        cpu_runs.stats_of_buffer(buffer, self.student, tokens, self.own)
        if self.policy is not None:
            assert self.coefficients is not None
            _, logp, entropy, *_ = self.coefficients
            assert logp is not None and entropy is not None
            by_logp, by_entropy = self.policy.coefficients(tokens, *(x[tokens] for x in self.own[:2]))
            logp[tokens] += by_logp
            entropy[tokens] += by_entropy

    def _student_gradient(self, buffer: LogitsBuffer, tokens: torch.Tensor) -> None:
        """Statistics, and the gradient of tokens whose divergence has no weight."""
        self._student_stats(buffer, tokens)
        assert self.coefficients is not None
        live = self.coefficients.active()[tokens]
        if not self.backward or not bool(live.any()):
            return
        logp, entropy, lse, _, _, row_max, inv_sum = self.own
        c = self.coefficients
        by_logp = torch.zeros_like(logp) if c.logp is None else c.logp
        given = (by_logp, c.entropy, c.of_lse(lse), c.logit_sum)
        cpu_runs.gradient_over_buffer(buffer, self.student, tokens, row_max, inv_sum, logp, entropy, *given)
        buffer.compact(live)
        self.gradients.add(buffer, tokens[live])

    def _rows_in_budget(self, sides: int) -> int:
        """Rows whose logits of the teacher, and with two sides of the student, the budget holds."""
        columns = 2 * self.student.hidden.shape[1] + 16 + (sides - 1) * self.student.vocab
        if self.teacher is not None:
            columns += self.teacher.hidden.shape[1] + tiled_columns(self.student.vocab)
        return max(1, self.student.memory_budget // (4 * columns))

    def _teacher_buffer(self, rows: int) -> LogitsBuffer | None:
        return None if self.teacher is None else LogitsBuffer.for_statistics(rows, self.student.vocab)

    def _beside(self, first: LogitsBuffer) -> LogitsBuffer | None:
        """Return a buffer for the teacher in the part of dW that `first` leaves free, or None."""
        used = -(-first.vocab // first.tile) * first.rows * first.tile
        left = first.storage[used:]
        rows = min(left.shape[0] // tiled_columns(first.vocab), first.rows)
        if self.teacher is None or rows == 0:
            return None
        return LogitsBuffer(left, rows, first.vocab, batch_tile(first.vocab))

    def _fill(self, buffer: LogitsBuffer, teacher: LogitsBuffer | None, tokens: torch.Tensor) -> int:
        """Compute the statistics of as many tokens as the buffer holds, and their gradient GEMMs. Return how many."""
        tokens = tokens[: buffer.rows]
        rows = tokens.shape[0]
        self.head.logits_of(tokens, buffer, 0)
        if self.policy is not None:
            self._student_stats(buffer, tokens)
        parts = 1 if teacher is None else -(-rows // teacher.rows)
        size = -(-rows // parts)  # equal parts: a small last one would read the whole weight, too
        for start in range(0, rows, size):
            self._rows_of_buffer(buffer, start, teacher, tokens[start : start + size])
        if self.backward:
            self.gradients.add(buffer, tokens)
        return rows

    def _rows_of_buffer(
        self, buffer: LogitsBuffer, start: int, teacher: LogitsBuffer | None, chunk: torch.Tensor
    ) -> None:
        """Statistics of these tokens, and their gradient over rows from `start` of the buffer."""
        module, stop = native.loaded(), start + chunk.shape[0]
        student = buffer.logits_args(self.student, start, stop, chunk)
        kind, mix_weight = self.problem.divergence
        given, grad = self.coefficients, row_args.distill_grad(module)
        args = row_args.distill_args(
            module,
            student,
            self._teacher_args(teacher, chunk),
            kind=kind,
            mix_weight=mix_weight,
            class_weight=None if given is None else given.class_weight,
        )
        if given is not None and self.backward:
            grad = row_args.distill_grad(module, *given[:6], grad_logits=buffer.first_tile(start, stop))
        bad = module.distill_rows(args, self.out, grad)
        assert bad < 0  # values were checked before the first GEMM

    def _teacher_args(self, buffer: LogitsBuffer | None, chunk: torch.Tensor) -> object:
        """Build LogitsArgs of the teacher: the logits of the chunk, or the given logits."""
        t = self.problem.teacher
        if buffer is None:
            assert t.logits is not None
            return row_args.logits_args(native.loaded(), t.logits.detach(), self.student.target, t.options)
        assert self.teacher is not None and self.teacher_head is not None
        buffer = buffer.of_rows(chunk.shape[0])
        self.teacher_head.logits_of(chunk, buffer, 0)
        return buffer.logits_args(self.teacher, 0, chunk.shape[0], chunk)
