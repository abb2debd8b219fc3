"""policy_step from logits on an accelerator, as its two backends have it in common."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.ops.policy_loss import PolicyTerms
from tokfuse.runtime.ops.token_stats import Kernels, TokenStats
from tokfuse.runtime.policy.metrics import SLOT
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.reference import token_stats as reference
from tokfuse.runtime.reference.policy_loss import PolicyInputs


class StepTerms(NamedTuple):
    """What a backend computes from one batch of logits."""

    terms: PolicyTerms
    stats: TokenStats
    grad_logits: torch.Tensor


class DeviceStep(NamedTuple):
    """What the two device backends do differently."""

    stats: Kernels
    loss: Callable[..., PolicyTerms]
    fused: Callable[..., tuple[Any, Any, torch.Tensor, torch.Tensor]]
    """(logits, target, options, inputs, objective, inverse, in_place) -> statistics, token results,
    metric sums, gradient."""


def device_run(kernels: DeviceStep) -> Callable[..., StepTerms]:
    def run(
        logits: torch.Tensor,
        target: torch.Tensor,
        o: LogitOptions,
        inputs: PolicyInputs,
        objective: Objective,
        inverse: float,
        in_place: bool,
    ) -> StepTerms:
        if may_read(target):
            reference.check_values("policy_step", target, logits.shape[1], o.mask, o.temperature)
        z = logits.detach()
        if objective.level != "token" or inputs.old_logp is None:
            return _device_run_sequence(kernels, z, target, o, inputs, objective, inverse, in_place)
        stats, out, sums, grad = kernels.fused(z, target, o, inputs, objective, inverse, in_place)
        loss = sums[SLOT["loss"]].to(torch.float32)
        terms = PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, sums)
        return StepTerms(terms, TokenStats(*stats), grad)

    return run


def _device_run_sequence(
    kernels: DeviceStep,
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    in_place: bool,
) -> StepTerms:
    """Statistics, objective, gradient; where the objective needs the statistics first."""
    assert kernels.stats.backward is not None
    *stats, row_max, inv_sum = kernels.stats.forward(logits, target, **o._asdict())
    terms = kernels.loss(stats[0], stats[1], inputs, objective, inverse)
    grad = kernels.stats.backward(
        logits,
        target,
        row_max,
        inv_sum,
        stats[1],
        terms.d_logp,
        terms.d_entropy,
        out=logits if in_place else None,
        **o._asdict(),
    )
    return StepTerms(terms, TokenStats(*stats), grad)
