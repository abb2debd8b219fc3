"""Launchers of the CUDA kernels of policy objectives: over packed tokens, and fused with rows."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_rows, device_objective
from tokfuse.runtime.backends.cuda_backend import launchers, place
from tokfuse.runtime.backends.policy_record import policy_record
from tokfuse.runtime.backends.policy_runs import DeviceStep, RowObjective, terms_of
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.native import DTYPE_CODE, pointer
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms


class TokenPointers(NamedTuple):
    """Per-token inputs, each (tokens,) and None where the objective has no such term."""

    old_logp: Any
    advantage: Any
    mask: Any
    agg_weight: Any
    token_weight: Any
    signal: Any
    ref_logp: Any
    kl_weight: Any
    entropy_weight: Any


class CudaInputs(NamedTuple):
    """Arguments of the launchers of policy_step."""

    pointers: TokenPointers
    record: tuple[Any, ...]
    """`Objective.record`."""
    scale: float | torch.Tensor
    counts: torch.Tensor | None


class TokenResults(NamedTuple):
    """What an objective writes for each token, (tokens,) each."""

    token_loss: torch.Tensor
    d_logp: torch.Tensor
    d_entropy: torch.Tensor
    ratio: torch.Tensor
    flags: torch.Tensor


def results_like(vector: torch.Tensor) -> TokenResults:
    """Zeros for as many tokens as `vector` (tokens,) float32 has."""
    loss, d_logp, d_entropy, ratio = (torch.zeros_like(vector) for _ in range(4))
    flags = torch.zeros_like(vector, dtype=torch.int32)
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
    launchers().policy_prepare(
        place(cu_seqlens),
        pointer(cu_seqlens),
        pointer(mask),
        pointer(seq_advantage),
        pointer(counts),
        pointer(weights),
        pointer(advantage),
        seqs,
    )
    return counts, weights, advantage


def encode(inputs: PolicyInputs, objective: Objective, inverse: float) -> CudaInputs:
    """As `device_objective.per_token`."""
    given = device_objective.per_token(inputs, objective, inverse, _prepare)
    pointers = TokenPointers(mask=given.mask, agg_weight=given.agg_weight, **given.vectors)
    return CudaInputs(pointers, objective.record, given.scale, given.counts)


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
    """One launch over the rows of `logits`; the caller has checked shapes and devices.

    Args:
        logits: (rows, vocab) float32, float16 or bfloat16.
        grad: (rows, vocab), written; may be `logits`, may be 16-bit beside float32 logits.
        index: (rows,) int64 token of each row; None: row i is token i.
        target: (tokens,) int64, as all vectors that follow.
        given: the objective.
        stats, out: written at the rows' tokens.
    """
    x = given.pointers
    record, alive = cuda_rows.logits_record(
        logits, target, index=index, temperature=temperature, softcap=softcap, logit_scale=logit_scale, mask=x.mask
    )
    on_device = isinstance(given.scale, torch.Tensor)
    objective = (
        given.record,
        *(
            pointer(v)
            for v in (
                x.old_logp,
                x.advantage,
                x.agg_weight,
                x.token_weight,
                x.signal,
                x.ref_logp,
                x.kl_weight,
                x.entropy_weight,
            )
        ),
        pointer(given.scale) if isinstance(given.scale, torch.Tensor) else 0,
        1.0 if on_device else given.scale,
        *map(pointer, out),
    )
    statistics = cuda_rows.stats_record(list(stats), None)
    launchers().policy_step(
        place(logits), record, statistics, objective, grad.data_ptr(), grad.stride(0), DTYPE_CODE[grad.dtype]
    )
    del alive


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    in_place: bool,
) -> tuple[tuple[torch.Tensor, ...], TokenResults, torch.Tensor, torch.Tensor]:
    """Statistics, token results, metric sums (SLOTS,) float64 and the gradient of the logits.

    A token-level objective: one launch over the logits, one over what it left of each token.
    """
    given = encode(inputs, objective, inverse)
    vector = given.pointers.old_logp
    stats = tuple(torch.empty_like(vector) for _ in range(5))
    loss, d_logp, d_entropy, ratio = (torch.empty_like(vector) for _ in range(4))
    flags = torch.empty_like(vector, dtype=torch.int32)
    out = TokenResults(loss, d_logp, d_entropy, ratio, flags)
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
    return stats, out, policy_metrics(stats[0], stats[1], given, out), grad


def policy_metrics(logp: torch.Tensor, entropy: torch.Tensor, given: CudaInputs, out: TokenResults) -> torch.Tensor:
    """Metric sums (SLOTS,) float64 of what the row kernel left."""
    x, tokens = given.pointers, logp.shape[0]
    sums = torch.empty(len(SLOTS), dtype=torch.float64, device=logp.device)
    partial = sums.new_empty(launchers().policy_partials(tokens, 0))
    counts = given.counts
    results = (
        tokens,
        pointer(logp),
        pointer(entropy),
        pointer(x.old_logp),
        pointer(x.ref_logp),
        pointer(x.mask),
        *map(pointer, out),
        pointer(counts),
        0 if counts is None else counts.shape[0],
    )
    launchers().policy_metrics(place(logp), results, pointer(partial), pointer(sums))
    return sums


def policy_loss(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    """Terms of an objective of any level, in one launch; a `LossRun`."""
    if inputs.old_logp is None:
        inputs = inputs._replace(old_logp=logp.detach())
    outputs = [torch.empty(logp.shape[0], dtype=torch.float32, device=logp.device) for _ in range(3)]
    sums = torch.empty(len(SLOTS), dtype=torch.float64, device=logp.device)
    record, alive = policy_record(logp, entropy, inputs, objective, inverse, [*outputs, sums])
    _, tokens, seqs, *_ = record
    partial = sums.new_empty(launchers().policy_partials(tokens, seqs))
    launchers().policy_loss(place(logp), record, pointer(partial))
    del alive
    return terms_of(sums, *outputs)


STEP = DeviceStep(cuda_rows.TOKEN_STATS, policy_loss, policy_step)
ROW_OBJECTIVE = RowObjective(encode, policy_step_rows, policy_metrics, results_like)
