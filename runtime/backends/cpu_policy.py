"""Call the CPU kernels of policy objectives: over packed tokens, and fused with rows of logits."""

from typing import Any

import torch

from tokfuse.runtime.backends import cpu_rows, row_args
from tokfuse.runtime.backends import objective_args as objectives
from tokfuse.runtime.backends.objective_args import ObjectiveOut
from tokfuse.runtime.backends.policy_runs import StepTerms, step_in_two_passes
from tokfuse.runtime.backends.row_args import RowStats
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions, bad_row
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms


def objective_args(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    out: ObjectiveOut,
) -> Any:
    """Build ObjectiveArgs with scratch memory for the CPU kernels."""
    scratch = torch.empty(4 * logp.shape[0], dtype=torch.float32, device="cpu")
    return objectives.objective_args(
        native.loaded(),
        logp=logp,
        entropy=entropy,
        inputs=inputs,
        objective=objective,
        inv_normalizer=inv_normalizer,
        out=out,
        scratch=scratch,
    )


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> PolicyTerms:
    """Return the terms of an objective of any level; a `LossRun`."""
    out = ObjectiveOut.empty(logp.shape[0])
    native.loaded().policy_loss(objective_args(logp, entropy, inputs, objective, inv_normalizer, out))
    return PolicyTerms.of_sums(out.sums, out)


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    in_place: bool,
) -> StepTerms:
    """Run one fused kernel for a token-level objective, else three kernels; a `StepRun`."""
    if objective.level != "token":
        kernels = cpu_rows.TOKEN_STATS
        return step_in_two_passes(kernels, policy_loss, logits, target, o, inputs, objective, inv_normalizer, in_place)
    module = native.loaded()
    stats, out = row_args.empty_outputs(logits), ObjectiveOut.empty(logits.shape[0])
    grad = logits.detach() if in_place else native.empty_like_rows(logits)
    bad = module.policy_step(
        logits=row_args.logits_args(module, logits, target, o),
        stats=row_args.token_stats_out(module, RowStats.of(stats)),
        objective=objective_args(stats[0], stats[1], inputs, objective, inv_normalizer, out),
        grad=row_args.grad_rows(module, grad),
        phases=module.PREPARE | module.ROWS | module.METRICS,
    )
    if bad >= 0:
        raise bad_row("policy_step", bad, target, logits.shape[1], o.temperature)
    terms = PolicyTerms.of_sums(out.sums, out)
    return StepTerms(terms, TokenStats(*stats[:5]), grad)
