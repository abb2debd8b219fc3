"""Row kernels over the logits of two models: one transform for both sides, statistics and gradients of rows.

The divergence kernels apply one temperature, softcap and scale to both streams. If the teacher's differ,
its logits are first converted to the unit of the student's logits. If the student has a softcap, its
logits are transformed too, and the gradient is multiplied by the slope (`common_streams`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.dispatch import Kernels
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.lm_head.pair_problem import Coefficients, Divergence, PairProblem, Stats

RowPolicy = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]
"""(logp, entropy) of the rows -> the coefficients that a policy term gives them."""


class RowKernels(NamedTuple):
    """The kernels of a backend."""

    stats: Kernels
    divergence: Kernels


class Streams(NamedTuple):
    """Logits of both sides as the divergence kernels take them."""

    p: torch.Tensor
    q: torch.Tensor
    options: dict[str, Any]
    slope: torch.Tensor | None
    """d (what the kernel reads) / d (the student's logits); None: 1, the kernel applies its options."""


def transformed(z: torch.Tensor, o: LogitOptions) -> torch.Tensor:
    """softcap(logit_scale z) / temperature."""
    u = wide(z) * o.logit_scale
    if o.softcap is not None:
        u = torch.where(u == float("-inf"), u, torch.tanh(u / o.softcap) * o.softcap)
    return u / _column(o.temperature, u)


def wide(z: torch.Tensor) -> torch.Tensor:
    """Return z in float32, or in float64 if it has that."""
    return z if z.dtype == torch.float64 else z.float()


def _column(temperature: float | torch.Tensor, like: torch.Tensor) -> float | torch.Tensor:
    return temperature.to(like.dtype)[:, None] if isinstance(temperature, torch.Tensor) else temperature


def same_transform(a: LogitOptions, b: LogitOptions) -> bool:
    """Whether two sides have one transform, as far as the host knows."""
    if isinstance(a.temperature, torch.Tensor) or isinstance(b.temperature, torch.Tensor):
        return a.temperature is b.temperature and a[1:3] == b[1:3]
    return a[:3] == b[:3]


def common_streams(p: torch.Tensor, q: torch.Tensor, of_p: LogitOptions, of_q: LogitOptions) -> Streams:
    """Streams of one transform; `of_p` holds the mask."""
    options = of_p.without_bias()
    if same_transform(of_p, of_q):
        return Streams(p, q, options, None)
    q = transformed(q, of_q)
    if of_p.softcap is None:
        q *= _column(of_p.temperature, q) / of_p.logit_scale
        return Streams(wide(p), q, options, None)
    u = transformed(p, of_p)
    t = torch.tanh(wide(p) * (of_p.logit_scale / of_p.softcap))
    slope = (1.0 - t * t) * of_p.logit_scale / _column(of_p.temperature, t)
    plain = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": of_p.mask}
    return Streams(u, q, plain, slope)


def compare_rows(
    kernels: RowKernels,
    p: torch.Tensor,
    q: torch.Tensor,
    target: torch.Tensor,
    of_p: LogitOptions,
    of_q: LogitOptions,
    divergence: Divergence,
    given: Coefficients | None,
    policy: RowPolicy | None,
    out: torch.Tensor | None,
    compared: torch.Tensor | None = None,
) -> tuple[Stats, torch.Tensor | None]:
    """Statistics of rows and, with `out`, their gradient in it; `out` may be `p`, which it overwrites.

    The mask of `of_p` counts for both sides; `given` belongs to the rows.

    compared: (rows,) bool, of the rows that count those that need the other side. None: all.
    """
    of_all = of_p
    stats_p, further = student_stats(kernels, p, target, of_p, given)
    if given is not None and policy is not None:
        given = given.plus(*policy(stats_p[0], stats_p[1]))
    if compared is not None:
        of_p = of_p._replace(mask=compared if of_p.mask is None else compared & of_p.mask)
    stats_q = kernels.stats.forward(q, target, **of_q._replace(mask=of_p.mask).without_bias())
    highest_p, highest_q = p.amax(1, keepdim=True), q.amax(1, keepdim=True)
    meet = ((p == highest_p) & (q == highest_q)).any(1) & (highest_p + highest_q > float("-inf"))[:, 0]
    if of_p.mask is not None:
        meet = meet & of_p.mask
    streams = common_streams(p, q, of_p, of_q)
    value, state = kernels.divergence.forward(streams.p, streams.q, **divergence._asdict(), **streams.options)
    stats = (value, stats_p[1], stats_p[0], stats_q[0], meet.float(), *further)
    if out is None:
        return stats, None
    assert given is not None
    more = stats_gradient(kernels, p, target, of_all, stats_p, given)
    divergence_gradient(kernels, streams, state, given.divergence, divergence, out)
    if more is not None:
        out += more
    return stats, out


def student_stats(
    kernels: RowKernels, p: torch.Tensor, target: torch.Tensor, options: LogitOptions, given: Coefficients | None
) -> tuple[tuple[torch.Tensor, ...], tuple[torch.Tensor, ...]]:
    """Return the seven outputs of the token_stats kernel, and the `Coefficients.further` statistics."""
    if given is None or given.logit_sum is None:
        stats = kernels.stats.forward(p, target, **options.without_bias())
        return stats, () if given is None else (stats[2],)[: given.further]
    logit_sum = torch.empty(p.shape[0], dtype=torch.float32, device=p.device)
    sums = {"logit_sum": logit_sum, "class_weight": given.class_weight}
    stats = kernels.stats.forward(p, target, **sums, **options.without_bias())
    return stats, (stats[2], logit_sum)


def stats_gradient(
    kernels: RowKernels,
    p: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    stats: tuple[torch.Tensor, ...],
    given: Coefficients,
    out: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The part of the gradient through the statistics of the student, in `out` if given."""
    if not given.of_stats():
        return None
    logp, entropy, lse, _, _, row_max, inv_sum = stats
    assert kernels.stats.backward is not None
    zero = torch.zeros_like(logp)
    ga, gh = (zero if x is None else x for x in (given.logp, given.entropy))
    gl = given.of_lse(lse)
    # A GPU kernel without the further terms is another one.
    more = {} if gl is None else {"grad_lse": gl}
    if given.logit_sum is not None:
        more |= {"grad_logit_sum": given.logit_sum}
        if given.class_weight is not None:
            more["class_weight"] = given.class_weight
    state = (row_max, inv_sum, logp, entropy)
    return kernels.stats.backward(p, target, *state, ga, gh, out=out, **more, **options.without_bias())


def divergence_gradient(
    kernels: RowKernels,
    streams: Streams,
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


def row_bytes(p: PairProblem, given: Coefficients | None, vocab: int) -> tuple[int, int]:
    """Bytes of a row of the student's workspace, and of everything beside it."""
    vocab = -(-vocab // 16) * 16
    mixed = p.student.dtype != torch.float32 and p.student.hidden.device.type != "cpu"
    student = vocab * (6 if mixed else 4) + 8 * p.student.hidden.shape[1] + 64
    beside = 4 * vocab + 3 * vocab  # the teacher's logits; three masks of the maxima
    if p.teacher.hidden is not None:
        beside += 8 * p.teacher.hidden.shape[1]
    if not same_transform(p.student.options, p.teacher.options):
        beside += (4 if p.student.options.softcap is None else 16) * vocab
    if given is not None and given.of_stats():
        beside += 4 * vocab
    return student, beside


def options_of_rows(o: LogitOptions, index: torch.Tensor, keep: torch.Tensor | None) -> LogitOptions:
    """The options of some tokens, of which `keep` counts."""
    temperature = o.temperature[index] if isinstance(o.temperature, torch.Tensor) else o.temperature
    return o._replace(temperature=temperature, mask=keep)
