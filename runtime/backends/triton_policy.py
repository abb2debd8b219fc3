"""Launch the Triton kernels of policy objectives: over packed tokens, and fused with rows of logits."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import triton_backend, triton_rows
from tokfuse.runtime.backends.policy_runs import DeviceStep, RowObjective, StepTerms
from tokfuse.runtime.core import native
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs, batch_inv_normalizer, per_token
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms

_prepare = triton_backend.launcher("policy_loss", "prepare")


class TritonInputs(NamedTuple):
    """Arguments of the launchers of policy_loss and policy_step."""

    pointers: Any
    """triton_kernels.objective.TokenPointers."""
    numbers: Any
    """triton_kernels.objective.ObjectiveNumbers."""
    codes: tuple[int, int, int]
    """Codes of the shape and of the estimators of the KL term and of the anchor, which are compile-time constants."""
    inv_normalizer: float | torch.Tensor
    """1 / normaliser; a () float32 tensor if the normaliser is the count of this batch."""
    counts: torch.Tensor | None
    """(seqs,) int32, valid tokens of each sequence."""


def encode(inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> TritonInputs:
    """Return the inputs of the kernels, compile-time codes apart; see `per_token`."""
    kernels = triton_backend.kernels("objective")
    r = objective.record
    numbers = kernels.ObjectiveNumbers(
        *r.p,
        kl_coef=r.kl_coef,
        kl_clamp=r.kl_clamp,
        entropy_coef=r.entropy_coef,
        log_ratio_clamp=r.log_ratio_clamp,
        anchor_coef=r.anchor_coef,
        anchor_clamp=r.anchor_clamp,
    )
    given = per_token(inputs, objective, inv_normalizer, _prepare, batch_inv_normalizer)
    pointers = kernels.TokenPointers(mask=given.mask, agg_weight=given.agg_weight, **given.vectors)
    return TritonInputs(pointers, numbers, (r.shape, r.kl, r.anchor), given.inv_normalizer, given.counts)


_launch_step = triton_backend.launcher("policy_step", "policy_step")
_launch_rows = triton_backend.launcher("policy_step", "policy_step_rows")
_launch_metrics = triton_backend.launcher("policy_metrics", "policy_metrics")


def results_like(vector: torch.Tensor, like: Callable[..., torch.Tensor]) -> Any:
    """Return TokenResults for as many tokens as `vector` (tokens,) has; like: `zeros_like` or `empty_like` of torch."""
    return triton_backend.kernels("policy_metrics").TokenResults(
        *(like(vector) for _ in range(4)), like(vector, dtype=torch.int32)
    )


def policy_step_rows(
    logits: torch.Tensor,
    grad: torch.Tensor,
    index: torch.Tensor | None,
    target: torch.Tensor,
    given: TritonInputs,
    stats: Any,
    out: Any,
    **options: Any,
) -> None:
    """Launch one kernel over the rows of `logits`, for the inputs of `encode`; see `cuda_policy.policy_step_rows`."""
    _launch_rows(
        logits,
        grad,
        index,
        target,
        given.pointers,
        given.numbers,
        given.codes,
        given.inv_normalizer,
        stats,
        out,
        **options,
    )


def policy_metrics(logp: torch.Tensor, entropy: torch.Tensor, given: TritonInputs, out: Any) -> PolicyTerms:
    """Return the terms from the results of the row kernel."""
    x = given.pointers
    sums: torch.Tensor = _launch_metrics(logp, entropy, x.old_logp, x.ref_logp, x.mask, out, given.counts)
    return PolicyTerms.of_sums(sums, out)


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    in_place: bool,
) -> StepTerms:
    """Return the results for a token-level objective."""
    given = encode(inputs, objective, inv_normalizer)
    stats, out, sums, grad = _launch_step(
        logits,
        target,
        given.pointers,
        given.numbers,
        given.codes,
        given.inv_normalizer,
        given.counts,
        in_place=in_place,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
    )
    return StepTerms(PolicyTerms.of_sums(sums, out), TokenStats(*stats), grad)


_launch_tokens = triton_backend.launcher("policy_loss", "policy_loss")
_launch_sequences = triton_backend.launcher("policy_loss", "policy_loss_sequence")


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> PolicyTerms:
    """Return the terms of an objective of any level; a `LossRun`."""
    if inputs.old_logp is None:
        inputs = inputs._replace(old_logp=logp.detach())
    given = encode(inputs, objective, inv_normalizer)
    x, h = native.float_vector(logp), native.float_vector(entropy)
    if objective.level == "token":
        out, sums = _launch_tokens(x, h, given.pointers, given.numbers, given.codes, given.inv_normalizer, given.counts)
    else:
        assert inputs.cu_seqlens is not None
        out, sums = _launch_sequences(
            x,
            h,
            inputs.cu_seqlens.contiguous(),
            given.pointers,
            given.numbers,
            (*given.codes, objective.record.level),
            given.inv_normalizer,
            seq_mean=bool(objective.record.seq_mean),
            seq_advantage=inputs.advantage_level == "sequence",
        )
    return PolicyTerms.of_sums(sums, out)


STEP = DeviceStep(triton_rows.TOKEN_STATS, policy_loss, policy_step)
ROW_OBJECTIVE = RowObjective(encode, policy_step_rows, policy_metrics, results_like)
