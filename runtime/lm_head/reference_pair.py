"""Two heads on the reference: all logits at once, gradients by torch's autograd."""

from collections.abc import Iterator

import torch

from tokfuse.runtime.backends.reference_policy import usable_by_autograd
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.lm_head import reference_runs
from tokfuse.runtime.lm_head.pair_problem import (
    Coefficients,
    Gradients,
    LogitsPair,
    PairProblem,
    Stats,
    Teacher,
    check_logits_values,
    check_values_of,
)
from tokfuse.runtime.lm_head.probe import with_probes
from tokfuse.runtime.lm_head.problem import wanted
from tokfuse.runtime.reference import linear_paired_divergence as reference
from tokfuse.runtime.reference import linear_token_stats as linear_reference
from tokfuse.runtime.reference import token_stats as stats_reference


def exact(p: PairProblem, logits: torch.Tensor | None = None) -> Stats:
    """The statistics in float64, differentiable in the student.

    Args:
        p: both heads.
        logits: of the student, if they exist already.
    """
    s, t = p.student, p.teacher
    if not torch.compiler.is_compiling():
        check_values_of(p)
    if logits is None:
        logits = linear_reference.logits_of(*with_probes(s.hidden, s.weight, s.probes), s.bias)
    return reference.exact(logits, teacher_logits(t), s.target, s.options, t.options, p.op, **p.divergence._asdict())


def teacher_logits(t: Teacher) -> torch.Tensor:
    """(tokens, vocab), of hidden states and head where they did not come as logits."""
    if t.hidden is None or t.weight is None:
        assert t.logits is not None
        return t.logits
    bias = None if t.bias is None else t.bias.detach()
    return linear_reference.logits_of(t.hidden.detach(), t.weight.detach(), bias)


def pair_run(p: PairProblem, given: Coefficients | None) -> tuple[Stats, Gradients]:
    """A `PairRun`."""
    needs = (False, False, False) if given is None else wanted(p.student)
    if given is not None:
        p = p._replace(student=p.student._replace(options=_only(p.student.options, given.active())))
    with torch.inference_mode(False), torch.enable_grad():
        s, t = p.student, p.teacher
        tensors = zip((s.hidden, s.weight, s.bias), needs, strict=True)
        leaves = [None if x is None else usable_by_autograd(x.detach()).requires_grad_(need) for x, need in tensors]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        options = LogitOptions(*map(usable_by_autograd, s.options))
        student = s._replace(
            hidden=hidden, weight=weight, bias=bias, target=usable_by_autograd(s.target), options=options
        )
        teacher = Teacher(
            usable_by_autograd(t.hidden),
            usable_by_autograd(t.weight),
            usable_by_autograd(t.bias),
            usable_by_autograd(t.logits),
            LogitOptions(*map(usable_by_autograd, t.options)),
        )
        logits = linear_reference.logits_of(hidden, weight, bias)
        stats = exact(p._replace(student=student, teacher=teacher), logits)
        found: Iterator[torch.Tensor] = iter(())
        if given is not None and any(needs):
            asked = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
            asked.append(logits)
            pairs = zip((stats[0], stats[2], stats[1]), given, strict=True)
            total = torch.stack([weighted_sum(x, usable_by_autograd(c)) for x, c in pairs if c is not None]).sum()
            found = iter(torch.autograd.grad(total, asked, allow_unused=True, materialize_grads=True))
    grads: Gradients = [next(found) if need else None for need in needs]
    for dz in found:
        reference_runs.of_logits(p.student, dz)
    return stats_reference.rounded((x.detach() for x in stats), p.student.dtype), grads


def exact_of_logits(p: LogitsPair, op: str) -> Stats:
    """The statistics in float64, differentiable in the logits of the student."""
    if not torch.compiler.is_compiling():
        check_logits_values(op, p)
    return reference.exact(
        p.logits, p.teacher_logits, p.target, p.options, p.teacher_options, op, **p.divergence._asdict()
    )


def logits_run(p: LogitsPair, coefficient: torch.Tensor) -> tuple[Stats, torch.Tensor]:
    """A `LogitsRun`."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = usable_by_autograd(p.logits.detach()).requires_grad_()
        options = LogitOptions(*map(usable_by_autograd, _only(p.options, coefficient != 0)))
        teacher_options = LogitOptions(*map(usable_by_autograd, p.teacher_options))
        teacher_logits, target, c = map(usable_by_autograd, (p.teacher_logits, p.target, coefficient))
        pair = LogitsPair(logits, teacher_logits, target, options, teacher_options, p.divergence)
        stats = exact_of_logits(pair, "distill_step")
        (grad,) = torch.autograd.grad(weighted_sum(stats[0], c), logits)
    return stats_reference.rounded((x.detach() for x in stats), p.logits.dtype), grad


def _only(o: LogitOptions, active: torch.Tensor) -> LogitOptions:
    """The options with only the active rows counting."""
    return o._replace(mask=active if o.mask is None else active & o.mask)


def weighted_sum(value: torch.Tensor, c: torch.Tensor) -> torch.Tensor:
    """sum of c value in float64; a value without a coefficient may be infinite."""
    return (torch.where(c != 0, value.double(), 0.0) * c.double()).sum()
