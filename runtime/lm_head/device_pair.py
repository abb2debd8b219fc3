"""Two heads on a device: torch's GEMMs of both sides around the row kernels of CUDA or Triton.

Each chunk runs the divergence kernel (two reads of each side, the second from the cache if the row
fits), token_stats of each side (one read each), and a comparison of the two maxima in torch (two reads
of each side). The divergence kernel writes the gradient over the student's logits. Gradients of logp and
the entropy, of a policy term and of a cross entropy together need token_stats' backward and one addition.
"""

import functools
from collections.abc import Callable

import torch

from tokfuse.runtime.backends import cuda_rows, triton_rows
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.lm_head import device_head, device_runs
from tokfuse.runtime.lm_head.device_head import DeviceHead, RowClasses
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
from tokfuse.runtime.lm_head.pair_rows import (
    RowKernels,
    RowPolicy,
    compare_rows,
    options_of_rows,
    row_bytes,
    same_transform,
    stats_gradient,
    student_stats,
)
from tokfuse.runtime.lm_head.problem import HeadProblem, wanted


def _pair_run(
    kernels: RowKernels,
    linear_forward: Callable[[HeadProblem], tuple[torch.Tensor, ...]],
    p: PairProblem,
    given: Coefficients | None,
    policy: PolicyPart | None,
) -> tuple[Stats, Gradients]:
    """A `PairRun`."""
    s, t = p.student, p.teacher
    if may_read(s.target):
        check_values_of(p)
    if policy is not None and policy.objective.level != "token":
        run = functools.partial(_pair_run, kernels, linear_forward)
        return policy_first(run, linear_forward, p, given, policy)
    needs = (False, False, False) if given is None else wanted(s)
    given = None if given is None else given.each(torch.Tensor.float)
    sorted_rows = pair_rows(p, given, policy, device_head.capturing(s.hidden))
    counts = (sorted_rows.compared, sorted_rows.gradient, sorted_rows.forward)
    rows = RowClasses(sorted_rows.order, *counts[1:], sorted_rows.keep, sorted_rows.in_order)
    chunk_policy = None if policy is None else ChunkPolicy(policy, s.tokens, s.hidden.device)
    own, beside = row_bytes(p, given, s.vocab)
    if policy is not None:
        beside += 4 * s.vocab  # the gradient of logp and entropy
    budget = max(1, s.memory_budget // (own + beside)) * own
    head = DeviceHead(s._replace(memory_budget=budget), needs, rows)
    teacher = p.teacher_head(budget)
    of_teacher = None if teacher is None else DeviceHead(teacher, (False, False, False), rows)

    def of_chunk(index: torch.Tensor) -> tuple[Coefficients | None, RowPolicy | None]:
        """Return the coefficients of a chunk, and how its statistics make those of the policy term."""
        part = None if given is None else given.each(lambda x: x[index])
        return part, None if chunk_policy is None else functools.partial(chunk_policy.coefficients, index)

    # Not the rows of one tensor: results of an op in a compiled graph must not share storage.
    count = 5 if given is None else 5 + given.further
    out = tuple(torch.zeros(s.tokens, dtype=torch.float32, device=s.hidden.device) for _ in range(count))
    with torch.no_grad():
        for chunk in head.chunks(0, counts[0]):
            index, h, _ = chunk
            z = head.logits_of(chunk)
            keep = None if rows.keep is None else rows.keep[index]
            if of_teacher is None:
                assert t.logits is not None
                q = t.logits.detach()[index].float()
            else:
                of_index = of_teacher.hidden[index]
                q = of_teacher.logits(of_index if keep is None else torch.where(keep[:, None], of_index, 0.0))
            of_p, of_q = options_of_rows(s.options, index, keep), options_of_rows(t.options, index, keep)
            if same_transform(s.options, t.options):
                of_q = of_p
            dz = head.gradient_like(z) if any(needs) else None
            stats, _ = compare_rows(kernels, z, q, s.target[index], of_p, of_q, p.divergence, *of_chunk(index), dz)
            for whole, x in zip(out, stats, strict=True):
                whole[index] = x
            if dz is not None:
                head.add(index, h, dz)
        for start, stop in zip(counts, counts[1:], strict=False):  # rows of the student alone
            for chunk in head.chunks(start, stop):
                index, h, _ = chunk
                z, of_p, target = head.logits_of(chunk), options_of_rows(s.options, index, None), s.target[index]
                part, of_policy = of_chunk(index)
                stats, further = student_stats(kernels, z, target, of_p, part)
                for whole, x in zip((out[1], out[2], *out[5:]), (stats[1], stats[0], *further), strict=True):
                    whole[index] = x
                if part is not None and of_policy is not None:
                    part = part.plus(*of_policy(stats[0], stats[1]))
                if part is not None and any(needs) and stop == counts[1]:
                    dz = head.gradient_like(z)
                    stats_gradient(kernels, z, target, of_p, stats, part, dz)
                    head.add(index, h, dz)
    if given is not None and rows.keep is not None:
        return with_student_stats(out, (out[2], out[1]), given.divergence), head.finish()
    return out, head.finish()


def _logits_run(
    kernels: RowKernels, p: LogitsPair, given: Coefficients, policy: PolicyPart | None
) -> tuple[Stats, torch.Tensor]:
    """A `LogitsRun`: rows without a coefficient are masked, and so not read by the kernels."""
    if may_read(p.target):
        check_logits_values("distill_step", p)
    options = p.options
    if policy is None:
        active = given.active()
        options = options._replace(mask=active if options.mask is None else active & options.mask)
    both_sides = policy is None and not given.of_stats()
    with torch.no_grad():
        grad = torch.empty(p.logits.shape, dtype=p.logits.dtype, device=p.logits.device)
        stats, _ = compare_rows(
            kernels,
            p.logits.detach(),
            p.teacher_logits.detach(),
            p.target,
            options,
            p.teacher_options,
            p.divergence,
            given,
            None if policy is None else policy.coefficients,
            grad,
            None if both_sides else given.divergence != 0,
        )
    return stats, grad


CUDA = RowKernels(cuda_rows.TOKEN_STATS, cuda_rows.PAIRED_DIVERGENCE)
TRITON = RowKernels(triton_rows.TOKEN_STATS, triton_rows.PAIRED_DIVERGENCE)
CUDA_PAIR = functools.partial(_pair_run, CUDA, device_runs.cuda_linear_fwd)
TRITON_PAIR = functools.partial(_pair_run, TRITON, device_runs.triton_linear_fwd)
CUDA_LOGITS, TRITON_LOGITS = (functools.partial(_logits_run, kernels) for kernels in (CUDA, TRITON))
