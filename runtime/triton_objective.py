"""The inputs of a policy objective as its Triton kernels take them."""

from typing import Any, NamedTuple, cast

import torch

from tokfuse.runtime import native, triton_backend
from tokfuse.runtime.objective import Objective
from tokfuse.runtime.reference.policy_loss import PolicyInputs

_prepare = triton_backend.launcher("policy_loss", "prepare")


class TritonInputs(NamedTuple):
    """Arguments of the launchers of policy_loss and policy_step."""

    pointers: Any
    """triton_kernels.objective.TokenPointers."""
    numbers: Any
    """triton_kernels.objective.ObjectiveNumbers."""
    codes: tuple[int, int]
    """Shape and KL estimator: compile time."""
    scale: float | torch.Tensor
    """1 / normaliser; a () float32 tensor where it is this batch's own count."""
    counts: torch.Tensor | None
    """(seqs,) int32, valid tokens of each sequence."""


def encode(inputs: PolicyInputs, objective: Objective, inverse: float) -> TritonInputs:
    """Vectors in float32; with cu_seqlens, what sequences mean for their tokens. No host sync."""
    kernels = triton_backend.kernels("objective")
    shape, _, kl, seq_mean, p, *numbers = cast(tuple[Any, ...], objective.record)
    i = inputs
    assert i.old_logp is not None  # on policy, the callers put the statistics there
    vectors = {name: native.float_vector(getattr(i, name)) for name in kernels.TokenPointers._fields
               if hasattr(i, name) and name != "mask"}  # fmt: skip
    mask = None if i.mask is None else i.mask.contiguous()
    counts, agg_weight = None, None
    per_token = objective.level == "token"
    if i.cu_seqlens is not None and (per_token or inverse < 0):
        per_sequence = per_token and i.advantage_level == "sequence"
        counts, agg_weight, advantage = _prepare(
            i.cu_seqlens.contiguous(), mask, i.old_logp.shape[0],
            seq_mean=per_token and bool(seq_mean),
            seq_advantage=vectors["advantage"] if per_sequence else None,
        )  # fmt: skip
        if per_sequence:
            vectors["advantage"] = advantage
    scale: float | torch.Tensor = inverse
    if inverse < 0:
        scale = _batch_scale(i, counts if objective.counts_sequences else None)
    pointers = kernels.TokenPointers(mask=mask, agg_weight=agg_weight, **vectors)
    return TritonInputs(
        pointers, kernels.ObjectiveNumbers(*p, *numbers), (shape, kl), scale, counts
    )


def _batch_scale(i: PolicyInputs, counts: torch.Tensor | None) -> torch.Tensor:
    """1 / count of this batch, 0 where nothing counts, without asking the device."""
    assert i.old_logp is not None
    if counts is not None:
        count = (counts > 0).sum()
    elif i.mask is not None:
        count = i.mask.sum()
    else:
        count = torch.full((), i.old_logp.shape[0], device=i.old_logp.device)
    return torch.where(count > 0, 1.0 / count.clamp(min=1).double(), 0.0).float()
