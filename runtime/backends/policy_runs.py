"""Run policy_step from logits on any backend: in one pass, or statistics first and then the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import Kernels
from tokfuse.runtime.core.logit_options import LogitOptions, check_values
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms

LossRun = Callable[[torch.Tensor, torch.Tensor | None, PolicyInputs, Objective, float], PolicyTerms]
"""(logp, entropy, inputs, objective, inv_normalizer normaliser) -> terms; the `run` of policy_loss."""


class StepTerms(NamedTuple):
    """The results of a backend for one batch of logits."""

    terms: PolicyTerms
    stats: TokenStats
    grad_logits: torch.Tensor


StepRun = Callable[[torch.Tensor, torch.Tensor, LogitOptions, PolicyInputs, Objective, float, bool], StepTerms]
"""(logits, target, options, inputs, objective, inv_normalizer normaliser, in place) -> StepTerms."""


class DeviceStep(NamedTuple):
    """The differences between the two device backends."""

    stats: Kernels
    loss: LossRun
    fused: StepRun
    """Token-level objectives with old_logp only."""


class RowObjective(NamedTuple):
    """The functions of a device backend that run a token-level objective over chunks of rows of the lm_head.

    Below, `inputs` is the result of `encode`, and `results` is the result of `results_like`.
    """

    encode: Callable[[PolicyInputs, Objective, float], Any]
    """(inputs, objective, inv_normalizer normaliser) -> inputs of the kernels; `.pointers` are per token."""
    step_rows: Callable[..., None]
    """(logits, gradient, index, target, inputs, statistics, results, **options): one chunk."""
    metrics: Callable[[torch.Tensor, torch.Tensor, Any, Any], PolicyTerms]
    """(logp, entropy, inputs, results) -> terms."""
    results_like: Callable[[torch.Tensor, Callable[..., torch.Tensor]], Any]
    """((tokens,) vector, function that makes a tensor like it) -> token_loss, d_logp, d_entropy, ratio, flags."""


def statistics_first(
    forward: Callable[[], tuple[torch.Tensor, ...]],
    loss: Callable[[torch.Tensor, torch.Tensor], PolicyTerms],
    backward: Callable[..., Any],
) -> tuple[PolicyTerms, TokenStats, Any]:
    """Run statistics, objective and gradient in turn, for an objective that needs all statistics first.

    A sequence-level ratio needs the logp of all its tokens. Without old_logp, the ratio needs the logp of
    this pass.

    Args:
        forward: () -> outputs of the `token_stats` kernels.
        loss: (logp, entropy) -> terms.
        backward: (row_max, inv_sum, logp, entropy, d_logp, d_entropy) -> gradients.
    """
    *stats, row_max, inv_sum = forward()
    terms = loss(stats[0], stats[1])
    gradients = backward(row_max, inv_sum, *stats[:2], terms.d_logp, terms.d_entropy)
    return terms, TokenStats(*stats), gradients


def step_in_two_passes(
    kernels: Kernels,
    loss: LossRun,
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    in_place: bool,
) -> StepTerms:
    """Run policy_step of any level by the kernels of token_stats and policy_loss; a `StepRun`."""
    assert kernels.backward is not None
    backward, options, z = kernels.backward, o._asdict(), logits.detach()
    terms, stats, grad = statistics_first(
        lambda: kernels.forward(z, target, op="policy_step", **options),
        lambda logp, entropy: loss(logp, entropy, inputs, objective, inv_normalizer),
        lambda *given: backward(z, target, *given, out=z if in_place else None, **options),
    )
    return StepTerms(terms, stats, grad)


def device_run(kernels: DeviceStep) -> StepRun:
    """Return the `run` of policy_step for a device backend."""

    def run(
        logits: torch.Tensor,
        target: torch.Tensor,
        o: LogitOptions,
        inputs: PolicyInputs,
        objective: Objective,
        inv_normalizer: float,
        in_place: bool,
    ) -> StepTerms:
        if objective.level != "token" or inputs.old_logp is None:
            return step_in_two_passes(
                kernels.stats, kernels.loss, logits, target, o, inputs, objective, inv_normalizer, in_place
            )
        if may_read(target):
            check_values("policy_step", target, logits.shape[1], o.mask, o.temperature)
        return kernels.fused(logits.detach(), target, o, inputs, objective, inv_normalizer, in_place)

    return run
