"""Launch the CUDA kernels of policy objectives: over packed tokens, and fused with rows of logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_rows, row_args
from tokfuse.runtime.backends.cuda_backend import launchers, place
from tokfuse.runtime.backends.objective_args import (
    ObjectiveOut,
    TokenPointers,
    TokenResults,
    count_args,
    loss_args,
    metrics_args,
    objective_args,
    prepare_args,
    token_objective_args,
)
from tokfuse.runtime.backends.policy_runs import DeviceStep, RowObjective, StepTerms
from tokfuse.runtime.backends.row_args import RowStats
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs, per_token
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective, ObjectiveRecord
from tokfuse.runtime.policy.results import PolicyTerms


class CudaInputs(NamedTuple):
    """Arguments of the launchers of policy_step."""

    pointers: TokenPointers
    record: ObjectiveRecord
    inv_normalizer: float | torch.Tensor
    counts: torch.Tensor | None
    normalizer: tuple[float, bool] = (1.0, False)
    """inv_normalizer and normalize_by_seqs of `LossArgs`."""


def results_like(vector: torch.Tensor, like: Callable[..., torch.Tensor]) -> TokenResults:
    """Return TokenResults for as many tokens as `vector` (tokens,) has; like: `zeros_like` or `empty_like` of torch."""
    loss, d_logp, d_entropy, ratio = (like(vector) for _ in range(4))
    flags = like(vector, dtype=torch.int32)
    return TokenResults(loss, d_logp, d_entropy, ratio, flags)


def _prepare(
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    tokens: int,
    *,
    seq_mean: bool,
    seq_advantage: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    seqs = cu_seqlens.shape[0] - 1
    counts = cu_seqlens.new_empty(seqs)
    weights = cu_seqlens.new_empty(tokens, dtype=torch.float32) if seq_mean else None
    advantage = None if seq_advantage is None else seq_advantage.new_empty(tokens)
    native = launchers()
    native.policy_prepare(
        place(cu_seqlens),
        prepare_args(
            native,
            cu_seqlens=cu_seqlens,
            mask=mask,
            seq_advantage=seq_advantage,
            counts=counts,
            agg_weight=weights,
            advantage=advantage,
        ),
    )
    return counts, weights, advantage


def _count(mask: torch.Tensor | None, rows: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """Return 1 / the count of this batch by one launch; a `Count`."""
    native = launchers()
    inverse = rows.new_empty((), dtype=torch.float32)
    native.policy_count(place(rows), count_args(native, mask=mask, rows=rows, counts=counts, inverse=inverse))
    return inverse


def encode(inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> CudaInputs:
    """Return the inputs of the kernels; see `per_token`."""
    given = per_token(inputs, objective, inv_normalizer, _prepare, _count)
    pointers = TokenPointers(mask=given.mask, agg_weight=given.agg_weight, **given.vectors)
    normalizer = (inv_normalizer, objective.counts_sequences)
    return CudaInputs(pointers, objective.record, given.inv_normalizer, given.counts, normalizer)


def policy_step_rows(
    logits: torch.Tensor,
    grad: torch.Tensor,
    index: torch.Tensor | None,
    target: torch.Tensor,
    given: CudaInputs,
    stats: Any,
    out: TokenResults,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Launch one kernel over the rows of `logits`. The caller has checked shapes and devices.

    Args:
        logits: (rows, vocab) float32, float16 or bfloat16.
        grad: (rows, vocab), written. It may be `logits`. For float32 logits it may be 16-bit.
        index: (rows,) int64 token of each row; None: row i is token i.
        target: (tokens,) int64. All vectors below are (tokens,) too.
        given: the objective.
        stats, out: written at the tokens of the rows.
    """
    native, x = launchers(), given.pointers
    o = LogitOptions(temperature, softcap, logit_scale, x.mask)
    native.policy_step(
        place=place(logits),
        logits=row_args.logits_args(native, logits, target, o, index=index),
        stats=row_args.token_stats_out(native, RowStats(*stats)),
        objective=token_objective_args(native, given.record, x, given.inv_normalizer, out),
        grad=row_args.grad_rows(native, grad),
    )


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    in_place: bool,
) -> StepTerms:
    """Compute a step of token level: one launch reads the logits; one reduces the results of the tokens."""
    given = encode(inputs, objective, inv_normalizer)
    vector = given.pointers.old_logp
    assert vector is not None
    stats = tuple(torch.empty_like(vector) for _ in range(5))
    out = results_like(vector, torch.empty_like)
    grad = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    policy_step_rows(
        logits,
        grad,
        None,
        target,
        given,
        stats,
        out,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
    )
    return StepTerms(policy_metrics(stats[0], stats[1], given, out), TokenStats(*stats), grad)


def policy_metrics(logp: torch.Tensor, entropy: torch.Tensor, given: CudaInputs, out: TokenResults) -> PolicyTerms:
    """Return the terms from the results of the row kernel."""
    native = launchers()
    loss, loss_sum = (torch.empty((), dtype=torch.float32, device=logp.device) for _ in range(2))
    sums = torch.empty(len(SLOTS), dtype=torch.float64, device=logp.device)
    args = metrics_args(
        native,
        logp=logp,
        entropy=entropy,
        x=given.pointers,
        results=out,
        counts=given.counts,
        partial=sums.new_empty(native.policy_partials(tokens=logp.shape[0], seqs=0)),
        sums=sums,
    )
    native.policy_metrics(place(logp), args, loss_args(native, *given.normalizer, loss, loss_sum))
    return PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, sums, loss_sum)


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> PolicyTerms:
    """Return the terms of an objective of any level, by one launch; a `LossRun`."""
    if inputs.old_logp is None:
        inputs = inputs._replace(old_logp=logp.detach())
    native, cu = launchers(), inputs.cu_seqlens
    out = ObjectiveOut.empty(logp.shape[0], logp.device)
    seqs = 0 if cu is None else cu.shape[0] - 1
    args = objective_args(
        native,
        logp=logp,
        entropy=entropy,
        inputs=inputs,
        objective=objective,
        inv_normalizer=inv_normalizer,
        out=out,
        partial=out.sums.new_empty(native.policy_partials(tokens=logp.shape[0], seqs=seqs)),
    )
    loss, loss_sum = (torch.empty((), dtype=torch.float32, device=logp.device) for _ in range(2))
    end = loss_args(native, inv_normalizer, objective.counts_sequences, loss, loss_sum)
    native.policy_loss(place(logp), args, end)
    return PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, out.sums, loss_sum)


STEP = DeviceStep(cuda_rows.TOKEN_STATS, policy_loss, policy_step)
ROW_OBJECTIVE = RowObjective(encode, policy_step_rows, policy_metrics, results_like)
