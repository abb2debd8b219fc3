"""The CPU kernels of policy objectives: over packed tokens, and fused with rows of logits."""

from typing import Any

import torch

from tokfuse.runtime.backends import cpu_rows
from tokfuse.runtime.backends.policy_record import policy_record
from tokfuse.runtime.backends.policy_runs import StepTerms, step_in_two_passes, terms_of
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.reference.token_stats import bad_row

PREPARE, ROWS, METRICS = 1, 2, 4  # phases of tokfuse._native.policy_step
STEP_PHASES = PREPARE | ROWS | METRICS


def native_record(
    logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    out: tuple[torch.Tensor, ...],
) -> tuple[tuple[Any, ...], list[torch.Tensor | None]]:
    """(record for tokfuse._native, tensors that must outlive the call).

    out = (token_loss, d_logp, d_entropy, sums, scratch), see `policy_record`.
    """
    *results, scratch = out
    record, alive = policy_record(logp, entropy, inputs, objective, inverse, results)
    return (*record, torch.get_num_threads(), scratch.data_ptr()), [*alive, scratch]


def native_outputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """(token_loss, d_logp, d_entropy, sums, scratch) for `native_record`."""
    vectors = [torch.empty(tokens, dtype=torch.float32) for _ in range(3)]
    sums = torch.empty(len(SLOTS), dtype=torch.float64)
    return (*vectors, sums, torch.empty(4 * tokens, dtype=torch.float32))


def native_terms(out: tuple[torch.Tensor, ...]) -> PolicyTerms:
    """The terms in the written `native_outputs`."""
    token_loss, d_logp, d_entropy, sums, _ = out
    return terms_of(sums, token_loss, d_logp, d_entropy)


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    """Terms of an objective of any level; a `LossRun`."""
    out = native_outputs(logp.shape[0])
    record, alive = native_record(logp, entropy, inputs, objective, inverse, out)
    native.loaded().policy_loss(record)
    del alive
    return native_terms(out)


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    in_place: bool,
) -> StepTerms:
    """One kernel for a token-level objective, else three; a `StepRun`."""
    if objective.level != "token":
        kernels = cpu_rows.TOKEN_STATS
        return step_in_two_passes(kernels, policy_loss, logits, target, o, inputs, objective, inverse, in_place)
    tokens = logits.shape[0]
    logits_record, alive = cpu_rows.logits_record(logits, target, o)
    stats = [torch.empty(tokens, dtype=torch.float32) for _ in range(7)]
    out = native_outputs(tokens)
    record, more = native_record(stats[0], stats[1], inputs, objective, inverse, out)
    grad = logits.detach() if in_place else native.empty_like_rows(logits)
    bad = native.loaded().policy_step(
        STEP_PHASES, logits_record, record, *[x.data_ptr() for x in stats[2:]], grad.data_ptr(), grad.stride(0), 0
    )
    del alive, more
    if bad >= 0:
        raise bad_row("policy_step", bad, target, logits.shape[1], o.temperature)
    return StepTerms(native_terms(out), TokenStats(*stats[:5]), grad)
