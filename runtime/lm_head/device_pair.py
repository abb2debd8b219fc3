"""Two heads on a device: torch's GEMMs of both sides around the row kernels of CUDA or Triton.

Each chunk runs the divergence kernel (two reads of each side, the second from the cache if the row
fits), token_stats of each side (one read each), and a comparison of the two maxima in torch (two reads
of each side). The divergence kernel writes the gradient over the student's logits. Gradients of logp and
the entropy need token_stats' backward and one addition; distill_step needs neither.

The divergence kernels apply one temperature, softcap and scale to both streams. If the teacher's differ,
its logits are first converted to the unit of the student's logits. If the student has a softcap, its
logits are transformed too, and the gradient is multiplied by the slope (`_common`).
"""

import functools
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_rows, triton_rows
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import Kernels
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.pair_problem import (
    Coefficients,
    Divergence,
    Gradients,
    LogitsPair,
    PairProblem,
    Stats,
    check_logits_values,
    check_values_of,
)
from tokfuse.runtime.lm_head.problem import wanted


class RowKernels(NamedTuple):
    """The differences between the two device backends."""

    stats: Kernels
    divergence: Kernels


class _Streams(NamedTuple):
    """Logits of both sides as the divergence kernels take them."""

    p: torch.Tensor
    q: torch.Tensor
    options: dict[str, Any]
    slope: torch.Tensor | None
    """d (what the kernel reads) / d (the student's logits); None: 1, the kernel applies its options."""


def _transformed(z: torch.Tensor, o: LogitOptions) -> torch.Tensor:
    """softcap(logit_scale z) / temperature."""
    u = z.float() * o.logit_scale
    if o.softcap is not None:
        u = torch.where(u == float("-inf"), u, torch.tanh(u / o.softcap) * o.softcap)
    return u / _column(o.temperature)


def _column(temperature: float | torch.Tensor) -> float | torch.Tensor:
    return temperature.float()[:, None] if isinstance(temperature, torch.Tensor) else temperature


def _same(a: LogitOptions, b: LogitOptions) -> bool:
    """Whether two sides have one transform, as far as the host knows."""
    if isinstance(a.temperature, torch.Tensor) or isinstance(b.temperature, torch.Tensor):
        return a.temperature is b.temperature and a[1:3] == b[1:3]
    return a[:3] == b[:3]


def _common(p: torch.Tensor, q: torch.Tensor, of_p: LogitOptions, of_q: LogitOptions) -> _Streams:
    """Streams of one transform; `of_p` holds the mask."""
    options = of_p.without_bias()
    if _same(of_p, of_q):
        return _Streams(p, q, options, None)
    q = _transformed(q, of_q)
    if of_p.softcap is None:
        q *= _column(of_p.temperature) / of_p.logit_scale
        return _Streams(p.float(), q, options, None)
    u = _transformed(p, of_p)
    t = torch.tanh(p.float() * (of_p.logit_scale / of_p.softcap))
    slope = (1.0 - t * t) * of_p.logit_scale / _column(of_p.temperature)
    plain = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": of_p.mask}
    return _Streams(u, q, plain, slope)


def _compare_rows(
    kernels: RowKernels,
    p: torch.Tensor,
    q: torch.Tensor,
    target: torch.Tensor,
    of_p: LogitOptions,
    of_q: LogitOptions,
    divergence: Divergence,
    given: Coefficients | None,
    out: torch.Tensor | None,
) -> tuple[Stats, torch.Tensor | None]:
    """Statistics of rows and, with `out`, their gradient in it; `out` may be `p`, which it overwrites.

    The mask of `of_p` counts for both sides; `given` belongs to the rows.
    """
    stats_p = kernels.stats.forward(p, target, **of_p.without_bias())
    stats_q = kernels.stats.forward(q, target, **of_q._replace(mask=of_p.mask).without_bias())
    highest_p, highest_q = p.amax(1, keepdim=True), q.amax(1, keepdim=True)
    meet = ((p == highest_p) & (q == highest_q)).any(1) & (highest_p + highest_q > float("-inf"))[:, 0]
    if of_p.mask is not None:
        meet = meet & of_p.mask
    streams = _common(p, q, of_p, of_q)
    value, state = kernels.divergence.forward(streams.p, streams.q, **divergence._asdict(), **streams.options)
    stats = (value, stats_p[1], stats_p[0], stats_q[0], meet.float())
    if out is None:
        return stats, None
    assert given is not None
    more = _stats_gradient(kernels, p, target, of_p, stats_p, given)
    _divergence_gradient(kernels, streams, state, given.divergence, divergence, out)
    if more is not None:
        out += more
    return stats, out


def _stats_gradient(
    kernels: RowKernels,
    p: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    stats: tuple[torch.Tensor, ...],
    given: Coefficients,
) -> torch.Tensor | None:
    """The part of the gradient through logp and entropy."""
    if given.logp is None and given.entropy is None:
        return None
    logp, entropy, _, _, _, row_max, inv_sum = stats
    assert kernels.stats.backward is not None
    zero = torch.zeros_like(logp)
    ga, gh = (zero if x is None else x for x in (given.logp, given.entropy))
    return kernels.stats.backward(
        p, target, row_max, inv_sum, logp, entropy, ga, gh, out=None, **options.without_bias()
    )


def _divergence_gradient(
    kernels: RowKernels,
    streams: _Streams,
    state: torch.Tensor,
    grad: torch.Tensor,
    divergence: Divergence,
    out: torch.Tensor,
) -> None:
    """Write it to `out`, in its dtype."""
    assert kernels.divergence.backward is not None
    # Where they differ, `streams.p` is a workspace.
    to = out if streams.slope is None and out.dtype == streams.p.dtype else streams.p
    kernels.divergence.backward(streams.p, streams.q, state, grad, out=to, **divergence._asdict(), **streams.options)
    if streams.slope is not None:
        torch.mul(to, streams.slope, out=to)
        dead = (state[:, 0] == 0) | (grad == 0)
        to.masked_fill_(dead[:, None], 0.0)
    if to is not out:
        out.copy_(to)


def _row_bytes(p: PairProblem, given: Coefficients | None) -> tuple[int, int]:
    """Bytes of a row of the student's workspace, and of everything beside it."""
    vocab = -(-p.student.vocab // 16) * 16
    mixed = p.student.dtype != torch.float32 and p.student.hidden.device.type != "cpu"
    student = vocab * (6 if mixed else 4) + 8 * p.student.hidden.shape[1] + 64
    beside = 4 * vocab + 3 * vocab  # the teacher's logits; three masks of the maxima
    if p.teacher.hidden is not None:
        beside += 8 * p.teacher.hidden.shape[1]
    if not _same(p.student.options, p.teacher.options):
        beside += (4 if p.student.options.softcap is None else 16) * vocab
    if given is not None and (given.logp is not None or given.entropy is not None):
        beside += 4 * vocab
    return student, beside


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
    own, beside = _row_bytes(p, given)
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
            of_p, of_q = _of_rows(s.options, index, keep), _of_rows(t.options, index, keep)
            if _same(s.options, t.options):
                of_q = of_p
            part = None if given is None else given.each(lambda x, index=index: x[index])  # type: ignore[misc]
            dz = head.gradient_like(z) if any(needs) else None
            stats, _ = _compare_rows(kernels, z, q, s.target[index], of_p, of_q, p.divergence, part, dz)
            for whole, x in zip(out, stats, strict=True):
                whole[index] = x
            if dz is not None:
                head.add(index, h, dz)
    return out, head.finish()


def _of_rows(o: LogitOptions, index: torch.Tensor, keep: torch.Tensor | None) -> LogitOptions:
    """The options of some tokens, of which `keep` counts."""
    temperature = o.temperature[index] if isinstance(o.temperature, torch.Tensor) else o.temperature
    return o._replace(temperature=temperature, mask=keep)


def _logits_run(kernels: RowKernels, p: LogitsPair, coefficient: torch.Tensor) -> tuple[Stats, torch.Tensor]:
    """A `LogitsRun`: rows without a coefficient are masked, and so not read by the kernels."""
    if may_read(p.target):
        check_logits_values("distill_step", p)
    active = coefficient != 0
    options = p.options._replace(mask=active if p.options.mask is None else active & p.options.mask)
    with torch.no_grad():
        grad = torch.empty(p.logits.shape, dtype=p.logits.dtype, device=p.logits.device)
        stats, _ = _compare_rows(
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
