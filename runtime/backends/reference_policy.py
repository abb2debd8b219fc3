"""Run the policy ops on the reference. torch's autograd computes the gradients."""

from collections.abc import Iterable
from typing import Any

import torch

from tokfuse.runtime.backends.policy_runs import StepTerms
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOT
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.reference import policy_loss as reference
from tokfuse.runtime.reference import token_stats as stats_reference


def usable_by_autograd(x: Any) -> Any:
    """Return x, or a copy if it is a tensor made under torch.inference_mode, which autograd cannot save."""
    if torch.compiler.is_compiling():  # it makes no such tensors, and cannot trace the question
        return x
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> PolicyTerms:
    """Return the terms of an objective of any level. The loss keeps its graph. A `LossRun`."""
    loss, token_loss, sums = reference.forward(logp, entropy, inputs, objective, inv_normalizer)
    if torch.compiler.is_compiling():
        # torch.compile derives the backward, so the coefficients are not known here.
        sums[SLOT["grad_rows"]] = float("nan")
        unknown = torch.full_like(token_loss, float("nan"))
        return PolicyTerms(loss, token_loss, unknown, unknown, sums)
    with torch.inference_mode(False), torch.enable_grad():
        x = usable_by_autograd(logp.detach()).requires_grad_()
        h = None if entropy is None else usable_by_autograd(entropy.detach()).requires_grad_()
        given = PolicyInputs(*map(usable_by_autograd, inputs))
        again, *_ = reference.forward(x, h, given, objective, inv_normalizer)
        leaves = [x] if h is None else [x, h]
        grads = torch.autograd.grad(again, leaves, allow_unused=True, materialize_grads=True)
    d_entropy = grads[1] if h is not None else torch.zeros_like(grads[0])
    rows = (grads[0] != 0) | (d_entropy != 0)
    sums[SLOT["grad_rows"]] = rows.sum()
    return PolicyTerms(loss, token_loss, grads[0], d_entropy, sums)


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    in_place: bool,
) -> StepTerms:
    """Compute policy_loss of token_stats, and the gradient of the logits by autograd; a `StepRun`."""
    with torch.inference_mode(False), torch.enable_grad():
        z = usable_by_autograd(logits.detach()).requires_grad_()
        target, *given = map(usable_by_autograd, (target, *o))
        inputs = PolicyInputs(*map(usable_by_autograd, inputs))
        options = LogitOptions(*given)._asdict()
        stats = stats_reference.exact(z, target, op="policy_step", **options)
        terms = policy_loss(stats[0], stats[1], inputs, objective, inv_normalizer)
        (grad,) = torch.autograd.grad(terms.loss, z, allow_unused=True, materialize_grads=True)
    if in_place:
        logits.detach().copy_(grad)
        grad = logits.detach()
    return StepTerms(*rounded_step(terms, stats, logits.dtype), grad)


def traced_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    dtype: torch.dtype,
) -> tuple[PolicyTerms, TokenStats]:
    """Return terms and detached statistics for torch.compile, which derives the backward.

    dtype: dtype of the inputs; the results are rounded to the result dtype of it.
    """
    exact = stats_reference.exact(logits, target, **o._asdict())
    terms = policy_loss(exact[0], exact[1], inputs, objective, inv_normalizer)
    (loss,) = stats_reference.rounded([terms.loss], dtype)
    terms, stats = rounded_step(terms, exact, dtype)
    return terms._replace(loss=loss), stats


def rounded_step(
    terms: PolicyTerms, stats: Iterable[torch.Tensor], dtype: torch.dtype
) -> tuple[PolicyTerms, TokenStats]:
    """Return the float64 terms and statistics, detached and rounded to the result dtype of inputs of `dtype`."""
    values = (terms.loss, terms.token_loss, terms.d_logp, terms.d_entropy)
    loss, token_loss, d_logp, d_entropy = stats_reference.rounded((x.detach() for x in values), dtype)
    detached = stats_reference.rounded((x.detach() for x in stats), dtype)
    return PolicyTerms(loss, token_loss, d_logp, d_entropy, terms.sums), TokenStats(*detached)
