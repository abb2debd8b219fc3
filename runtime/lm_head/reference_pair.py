"""Two heads on the reference: all logits at once, gradients by torch's autograd."""

from collections.abc import Iterator

import torch

from tokfuse.runtime.backends.reference_policy import policy_loss, usable_by_autograd
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.lm_head import reference_runs
from tokfuse.runtime.lm_head.pair_problem import (
    Coefficients,
    Divergence,
    Gradients,
    LogitsPair,
    PairProblem,
    PolicyPart,
    Stats,
    Teacher,
    check_logits_values,
    check_values_of,
)
from tokfuse.runtime.lm_head.pair_results import weighted_sum
from tokfuse.runtime.lm_head.probe import with_probes
from tokfuse.runtime.lm_head.problem import wanted
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.reference import cross_entropy as sums_reference
from tokfuse.runtime.reference import linear_paired_divergence as reference
from tokfuse.runtime.reference import linear_token_stats as linear_reference
from tokfuse.runtime.reference import token_stats as stats_reference


def exact(p: PairProblem, given: Coefficients | None = None, logits: torch.Tensor | None = None) -> Stats:
    """The statistics in float64, differentiable in the student.

    Args:
        p: both heads.
        given: the result of `own_rows`. With it, logp, entropy and the further statistics belong to all rows that
            count, the rest to the rows with a coefficient of the divergence.
        logits: of the student, if they exist already.
    """
    s, t = p.student, p.teacher
    if not torch.compiler.is_compiling():
        check_values_of(p)
    if logits is None:
        logits = linear_reference.logits_of(*with_probes(s.hidden, s.weight, s.probes), s.bias)
    return _exact(logits, teacher_logits(t), s.target, s.options, t.options, p.divergence, s.op, given)


def _exact(
    logits: torch.Tensor,
    of_teacher: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    teacher_options: LogitOptions,
    divergence: Divergence,
    op: str,
    given: Coefficients | None,
) -> Stats:
    logits = logits.double()  # once: autograd would round the gradient of every conversion to 16 bits
    of_both = options if given is None else _only(options, given.divergence != 0)
    stats = reference.exact(logits, of_teacher, target, of_both, teacher_options, op, **divergence._asdict())
    if given is None:
        return stats
    logp, entropy, *own = sums_reference.exact(logits, target, given.class_weight, op, **options.without_bias())
    return stats[0], entropy, logp, *stats[3:], *own[: given.further]


def own_rows(given: Coefficients, policy: PolicyPart | None) -> Coefficients | None:
    """Return the coefficients if statistics of the student count in rows without a divergence, else None."""
    return given if policy is not None or given.of_stats() else None


def loss(stats: Stats, given: Coefficients, policy: PolicyPart | None) -> torch.Tensor:
    """The weighted sum of the statistics and the policy term, () float64, differentiable."""
    divergence, entropy, logp, _, _, *further = stats
    lse = further[0] if further else logp  # without further statistics, their coefficients are None
    logit_sum = further[-1] if further else logp
    pairs = zip((divergence, logp, entropy, lse, lse.square(), logit_sum), given[:6], strict=True)
    total = torch.stack([weighted_sum(x, usable_by_autograd(c)) for x, c in pairs if c is not None]).sum()
    if policy is None:
        return total
    return total + policy_terms(stats, policy).loss.double()


def policy_terms(stats: Stats, policy: PolicyPart) -> PolicyTerms:
    """The policy term of the reference, differentiable. torch.compile cannot trace `policy.loss`."""
    inputs = PolicyInputs(*map(usable_by_autograd, policy.inputs))
    return policy_loss(stats[2], stats[1], inputs, policy.objective, policy.inv_normalizer)


def teacher_logits(t: Teacher) -> torch.Tensor:
    """(tokens, vocab), of hidden states and head where they did not come as logits."""
    if t.hidden is None or t.weight is None:
        assert t.logits is not None
        return t.logits
    bias = None if t.bias is None else t.bias.detach()
    return linear_reference.logits_of(t.hidden.detach(), t.weight.detach(), bias)


def pair_run(p: PairProblem, given: Coefficients | None, policy: PolicyPart | None) -> tuple[Stats, Gradients]:
    """A `PairRun`."""
    needs = (False, False, False) if given is None else wanted(p.student)
    given = None if given is None else Coefficients(*map(usable_by_autograd, given))
    if given is not None and policy is None:
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
        own = None if given is None else own_rows(given, policy)
        stats = exact(p._replace(student=student, teacher=teacher), own, logits)
        found: Iterator[torch.Tensor] = iter(())
        if given is not None and any(needs):
            asked = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
            asked.append(logits)
            total = loss(stats, given, policy)
            found = iter(torch.autograd.grad(total, asked, allow_unused=True, materialize_grads=True))
    grads: Gradients = [next(found) if need else None for need in needs]
    for dz in found:
        reference_runs.of_logits(p.student, dz)
    return stats_reference.rounded((x.detach() for x in stats), p.student.dtype), grads


def exact_of_logits(p: LogitsPair, op: str, given: Coefficients | None = None) -> Stats:
    """As `exact`, differentiable in the logits of the student."""
    if not torch.compiler.is_compiling():
        check_logits_values(op, p)
    return _exact(p.logits, p.teacher_logits, p.target, p.options, p.teacher_options, p.divergence, op, given)


def logits_run(p: LogitsPair, given: Coefficients, policy: PolicyPart | None) -> tuple[Stats, torch.Tensor]:
    """A `LogitsRun`."""
    with torch.inference_mode(False), torch.enable_grad():
        logits = usable_by_autograd(p.logits.detach()).requires_grad_()
        of_rows = _only(p.options, given.active()) if policy is None else p.options
        options = LogitOptions(*map(usable_by_autograd, of_rows))
        teacher_options = LogitOptions(*map(usable_by_autograd, p.teacher_options))
        teacher_logits, target, *c = map(usable_by_autograd, (p.teacher_logits, p.target, *given))
        given = Coefficients(*c)
        pair = LogitsPair(logits, teacher_logits, target, options, teacher_options, p.divergence)
        stats = exact_of_logits(pair, "distill_step", own_rows(given, policy))
        total = loss(stats, given, policy)
        (grad,) = torch.autograd.grad(total, logits, allow_unused=True, materialize_grads=True)
    return stats_reference.rounded((x.detach() for x in stats), p.logits.dtype), grad


def _only(o: LogitOptions, active: torch.Tensor) -> LogitOptions:
    """The options with only the active rows counting."""
    return o._replace(mask=active if o.mask is None else active & o.mask)
