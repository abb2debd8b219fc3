"""Two heads on a device: torch's GEMMs of both sides around the row kernels of CUDA or Triton.

Each chunk runs the divergence kernel (two reads of each side, the second from the cache if the row
fits), token_stats of each side (one read each), and a comparison of the two maxima in torch (two reads
of each side). The divergence kernel writes the gradient over the student's logits. Gradients of logp and
the entropy need token_stats' backward and one addition; distill_step needs neither.
"""

import functools

import torch

from tokfuse.runtime.backends import cuda_rows, triton_rows
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.pair_problem import (
    Coefficients,
    Gradients,
    LogitsPair,
    PairProblem,
    Stats,
    check_logits_values,
    check_values_of,
)
from tokfuse.runtime.lm_head.pair_rows import RowKernels, compare_rows, options_of_rows, row_bytes, same_transform
from tokfuse.runtime.lm_head.problem import wanted


def _pair_run(kernels: RowKernels, p: PairProblem, given: Coefficients | None) -> tuple[Stats, Gradients]:
    """A `PairRun`."""
    s, t = p.student, p.teacher
    if may_read(s.target):
        check_values_of(p)
    needs = (False, False, False) if given is None else wanted(s)
    needed = s.options.mask
    if given is not None:
        given = given.each(torch.Tensor.float)
        active = given.active()
        needed = active if needed is None else active & needed
    own, beside = row_bytes(p, given, s.vocab)
    budget = max(1, s.memory_budget // (own + beside)) * own
    rows = device_head.classify(s, needed, None)
    head = DeviceHead(s._replace(memory_budget=budget), needs, rows)
    teacher = p.teacher_head(budget)
    of_teacher = None if teacher is None else DeviceHead(teacher, (False, False, False), rows)
    # Not the rows of one tensor: results of an op in a compiled graph must not share storage.
    out = tuple(torch.zeros(s.tokens, dtype=torch.float32, device=s.hidden.device) for _ in range(5))
    with torch.no_grad():
        for index, h in head.chunks(0, rows.forward):
            z = head.logits(h)
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
            part = None if given is None else given.each(lambda x, index=index: x[index])  # type: ignore[misc]
            dz = head.gradient_like(z) if any(needs) else None
            stats, _ = compare_rows(kernels, z, q, s.target[index], of_p, of_q, p.divergence, part, dz)
            for whole, x in zip(out, stats, strict=True):
                whole[index] = x
            if dz is not None:
                head.add(index, h, dz)
    return out, head.finish()


def _logits_run(kernels: RowKernels, p: LogitsPair, coefficient: torch.Tensor) -> tuple[Stats, torch.Tensor]:
    """A `LogitsRun`: rows without a coefficient are masked, and so not read by the kernels."""
    if may_read(p.target):
        check_logits_values("distill_step", p)
    active = coefficient != 0
    options = p.options._replace(mask=active if p.options.mask is None else active & p.options.mask)
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
            Coefficients(coefficient),
            grad,
        )
    return stats, grad


CUDA = RowKernels(cuda_rows.TOKEN_STATS, cuda_rows.PAIRED_DIVERGENCE)
TRITON = RowKernels(triton_rows.TOKEN_STATS, triton_rows.PAIRED_DIVERGENCE)
CUDA_PAIR, TRITON_PAIR = (functools.partial(_pair_run, kernels) for kernels in (CUDA, TRITON))
CUDA_LOGITS, TRITON_LOGITS = (functools.partial(_logits_run, kernels) for kernels in (CUDA, TRITON))
