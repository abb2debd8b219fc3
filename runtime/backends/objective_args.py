"""Build the argument structs of objectives (csrc/common/objective_args.h). Nothing else builds them.

`native` is the module whose kernel takes the struct: `core.native.loaded()` or `cuda_backend.launchers()`.
A struct keeps its tensors alive. `docs/names.md` defines every field.
"""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.native import contiguous, empty_vectors, float_vector
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import Objective, ObjectiveRecord

CPU = torch.device("cpu")


class ObjectiveOut(NamedTuple):
    """The outputs of policy_loss."""

    token_loss: torch.Tensor
    d_logp: torch.Tensor
    d_entropy: torch.Tensor
    """(tokens,) float32 each."""
    sums: torch.Tensor
    """(metrics,) float64, in the order of `metrics.SLOTS`."""

    @staticmethod
    def empty(tokens: int, device: torch.device = CPU) -> "ObjectiveOut":
        """Allocate the outputs, uninitialised."""
        loss, d_logp, d_entropy = empty_vectors([tokens] * 3, device)
        return ObjectiveOut(loss, d_logp, d_entropy, torch.empty(len(SLOTS), dtype=torch.float64, device=device))


class TokenResults(NamedTuple):
    """The outputs of an objective for each token, from the kernel that also computes the statistics."""

    token_loss: torch.Tensor
    d_logp: torch.Tensor
    d_entropy: torch.Tensor
    ratio: torch.Tensor
    """(tokens,) float32 each."""
    flags: torch.Tensor
    """(tokens,) int32."""


class TokenPointers(NamedTuple):
    """Per-token inputs, (tokens,) each. None means that the objective has no such term; the first two are required."""

    old_logp: torch.Tensor | None
    advantage: torch.Tensor | None
    mask: torch.Tensor | None
    agg_weight: torch.Tensor | None
    token_weight: torch.Tensor | None
    signal: torch.Tensor | None
    ref_logp: torch.Tensor | None
    kl_weight: torch.Tensor | None
    entropy_weight: torch.Tensor | None
    anchor_logp: torch.Tensor | None = None
    anchor_weight: torch.Tensor | None = None


def objective_args(
    native: Any,
    *,
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    out: ObjectiveOut,
    **scratch: torch.Tensor,
) -> Any:
    """Build ObjectiveArgs.

    If the update is on policy, `old_logp` is the memory of `logp`. The fused CPU kernel writes the logp
    of a token before it reads the token's objective.

    Args:
        inv_normalizer: 1 / normaliser. A negative value stands for 1 / the count of this batch.
        scratch: `scratch` on the CPU, `partial` on CUDA.
    """
    i = inputs
    logp = float_vector(logp)
    cu_seqlens = contiguous(i.cu_seqlens)
    return native.ObjectiveArgs(
        params=objective.record,
        tokens=logp.shape[0],
        seqs=0 if cu_seqlens is None else cu_seqlens.shape[0] - 1,
        logp=logp,
        old_logp=logp if i.old_logp is None else float_vector(i.old_logp),
        advantage=float_vector(i.advantage),
        advantage_per_seq=i.advantage_level == "sequence",
        mask=contiguous(i.mask),
        cu_seqlens=cu_seqlens,
        token_weight=float_vector(i.token_weight),
        signal=float_vector(i.signal),
        ref_logp=float_vector(i.ref_logp),
        kl_weight=float_vector(i.kl_weight),
        entropy=float_vector(entropy),
        entropy_weight=float_vector(i.entropy_weight),
        anchor_logp=float_vector(i.anchor_logp),
        anchor_weight=float_vector(i.anchor_weight),
        inv_normalizer=inv_normalizer,
        normalize_by_seqs=objective.counts_sequences,
        **out._asdict(),
        threads=torch.get_num_threads(),
        **scratch,
    )


def token_objective_args(
    native: Any, params: ObjectiveRecord, x: TokenPointers, inv_normalizer: float | torch.Tensor, out: TokenResults
) -> Any:
    """Build TokenObjectiveArgs.

    inv_normalizer: 1 / normaliser; a () float32 tensor if the normaliser is the count of this batch.
    """
    of_batch = isinstance(inv_normalizer, torch.Tensor)
    return native.TokenObjectiveArgs(
        params=params,
        old_logp=x.old_logp,
        advantage=x.advantage,
        agg_weight=x.agg_weight,
        token_weight=x.token_weight,
        signal=x.signal,
        ref_logp=x.ref_logp,
        kl_weight=x.kl_weight,
        entropy_weight=x.entropy_weight,
        anchor_logp=x.anchor_logp,
        anchor_weight=x.anchor_weight,
        batch_inv_normalizer=inv_normalizer if of_batch else None,
        inv_normalizer=1.0 if of_batch else inv_normalizer,
        **out._asdict(),
    )


def prepare_args(
    native: Any,
    *,
    cu_seqlens: torch.Tensor,
    mask: torch.Tensor | None,
    seq_advantage: torch.Tensor | None,
    counts: torch.Tensor,
    agg_weight: torch.Tensor | None,
    advantage: torch.Tensor | None,
) -> Any:
    """Build PrepareArgs: the kernel writes to `counts`, `agg_weight` and `advantage`."""
    return native.PrepareArgs(
        seqs=cu_seqlens.shape[0] - 1,
        cu_seqlens=cu_seqlens,
        mask=mask,
        seq_advantage=seq_advantage,
        counts=counts,
        agg_weight=agg_weight,
        advantage=advantage,
    )


def metrics_args(
    native: Any,
    *,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    x: TokenPointers,
    results: TokenResults,
    counts: torch.Tensor | None,
    partial: torch.Tensor,
    sums: torch.Tensor,
) -> Any:
    """Build MetricsArgs: the kernel writes to `sums`. counts: (seqs,) int32 valid tokens, or None."""
    return native.MetricsArgs(
        tokens=logp.shape[0],
        seqs=0 if counts is None else counts.shape[0],
        logp=logp,
        entropy=entropy,
        old_logp=x.old_logp,
        ref_logp=x.ref_logp,
        mask=x.mask,
        **results._asdict(),
        counts=counts,
        partial=partial,
        sums=sums,
    )


def loss_args(
    native: Any, inv_normalizer: float, normalize_by_seqs: bool, loss: torch.Tensor, loss_sum: torch.Tensor
) -> Any:
    """Build LossArgs: the kernel that writes the metric sums also writes to `loss` and `loss_sum`, () float32."""
    return native.LossArgs(
        inv_normalizer=inv_normalizer, normalize_by_seqs=normalize_by_seqs, loss=loss, loss_sum=loss_sum
    )


def count_args(
    native: Any, *, mask: torch.Tensor | None, rows: torch.Tensor, counts: torch.Tensor | None, inverse: torch.Tensor
) -> Any:
    """Build CountArgs: the kernel writes to `inverse`. rows: (tokens,); counts: (seqs,) int32; None: count tokens."""
    return native.CountArgs(
        tokens=rows.shape[0],
        seqs=0 if counts is None else counts.shape[0],
        mask=mask,
        counts=counts,
        batch_inv_normalizer=inverse,
    )
