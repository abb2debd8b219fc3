"""Steps from hidden states on the reference: all logits at once, gradients by autograd."""

import torch

from tokfuse.runtime.backends.reference_policy import policy_loss, rounded_step, usable_by_autograd
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.problem import HeadProblem, Step, wanted
from tokfuse.runtime.lm_head.units import Loss, Units, UnitStats, UnitTerms
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference import linear_token_stats as linear_reference
from tokfuse.runtime.reference import token_stats as stats_reference


def policy_step(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> Step:
    """Compute policy_loss of token_stats of the logits of the head (a `StepRun`)."""
    needs = wanted(p)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            None if x is None else usable_by_autograd(x.detach()).requires_grad_(need)
            for x, need in zip((p.hidden, p.weight, p.bias), needs, strict=True)
        ]
        target = usable_by_autograd(p.target)
        options = LogitOptions(*map(usable_by_autograd, p.options))
        inputs = PolicyInputs(*map(usable_by_autograd, inputs))
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        every = linear_reference.logits_of(hidden, weight, bias)
        logits = kept_reference.restricted(every, p.kept, options.mask)
        logp, *others = stats_reference.exact(logits, target, op="policy_step", **options._asdict())
        stats = (kept_reference.constant_if_excluded(p.kept, logp), *others)
        terms = policy_loss(stats[0], stats[1], inputs, objective, inv_normalizer)
        asked = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
        if p.row_norms is not None or p.probes:
            asked.append(every)
        found = iter(torch.autograd.grad(terms.loss, asked, allow_unused=True, materialize_grads=True) if asked else ())
    grads = [next(found) if need else None for need in needs]
    if p.row_norms is not None or p.probes:
        of_logits(p, next(found))
    return *rounded_step(terms, stats, p.dtype), grads


def of_logits(p: HeadProblem, dz: torch.Tensor) -> None:
    """Write the norms and the probes of the gradient of the logits."""
    if p.row_norms is not None:
        p.row_norms.copy_(torch.linalg.vector_norm(dz, dim=1))
    for probe in p.probes:
        probe.out.copy_(dz.to(probe.out.dtype) @ probe.projection.t())


def unit_step(p: HeadProblem, units: Units, loss: Loss) -> UnitTerms:
    """Compute a loss over units (a `UnitsRun`). It is used where the gradient of the logits itself is requested."""
    needs = wanted(p)
    with torch.inference_mode(False), torch.enable_grad():
        leaves = [
            None if x is None else usable_by_autograd(x.detach()).requires_grad_(need)
            for x, need in zip((p.hidden, p.weight, p.bias), needs, strict=True)
        ]
        hidden, weight, bias = leaves
        assert hidden is not None and weight is not None
        logits = linear_reference.logits_of(hidden, weight, bias)
        options = LogitOptions(*map(usable_by_autograd, p.options))
        stats = stats_reference.exact(logits, usable_by_autograd(p.target), op="preference_step", **options._asdict())
        of_units = UnitStats(*(x[units.order] for x in stats))
        total = loss(of_units, units.order, 0, len(units.border) - 1)
        asked = [x for x, need in zip(leaves, needs, strict=True) if x is not None and need]
        found = iter(torch.autograd.grad(total, [*asked, logits], allow_unused=True, materialize_grads=True))
    grads = [next(found) if need else None for need in needs]
    of_logits(p, next(found))
    rounded = stats_reference.rounded((x.detach() for x in stats), p.dtype)
    return UnitTerms(total.detach().double(), TokenStats(*rounded), grads, 0)
