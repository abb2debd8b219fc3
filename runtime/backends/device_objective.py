"""What sequences and normalisers mean for the tokens of an objective, for kernels on a device.

A row kernel sees one token: what its sequence contributes (aggregation weight, advantage) is handed
to it as a vector, prepared here without asking the device for a value.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective

# (cu_seqlens, mask, tokens, seq_mean, seq_advantage) -> counts (seqs,) int32, aggregation weights
# (tokens,) or None, advantages (tokens,) or None
Prepare = Callable[..., tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]]
VECTORS = ("old_logp", "advantage", "token_weight", "signal", "ref_logp", "kl_weight", "entropy_weight")


class DeviceInputs(NamedTuple):
    """The inputs of an objective, per token."""

    vectors: dict[str, torch.Tensor | None]
    """Those of `VECTORS`, (tokens,) float32; the advantage per sequence at a sequence level."""
    mask: torch.Tensor | None
    agg_weight: torch.Tensor | None
    """(tokens,) aggregation weight before the normaliser; None: 1."""
    inv_normalizer: float | torch.Tensor
    """1 / normaliser; a () float32 tensor where it is this batch's own count."""
    counts: torch.Tensor | None
    """(seqs,) int32, valid tokens of each sequence."""


def per_token(i: PolicyInputs, objective: Objective, inv_normalizer: float, prepare: Prepare) -> DeviceInputs:
    """Vectors in float32; with cu_seqlens, what sequences mean for their tokens. No host sync."""
    old_logp = i.old_logp
    assert old_logp is not None  # the callers put the current one in its place
    vectors = {name: native.float_vector(getattr(i, name)) for name in VECTORS}
    mask = None if i.mask is None else i.mask.contiguous()
    counts, agg_weight = None, None
    at_tokens = objective.level == "token"
    if i.cu_seqlens is not None and (at_tokens or inv_normalizer < 0):
        hand_out = at_tokens and i.advantage_level == "sequence"
        counts, agg_weight, advantage = prepare(
            i.cu_seqlens.contiguous(),
            mask,
            old_logp.shape[0],
            seq_mean=at_tokens and bool(objective.record.seq_mean),
            seq_advantage=vectors["advantage"] if hand_out else None,
        )
        if hand_out:
            vectors["advantage"] = advantage
    given: float | torch.Tensor = inv_normalizer
    if inv_normalizer < 0:
        given = _batch_inv_normalizer(i.mask, old_logp, counts if objective.counts_sequences else None)
    return DeviceInputs(vectors, mask, agg_weight, given, counts)


def _batch_inv_normalizer(mask: torch.Tensor | None, rows: torch.Tensor, counts: torch.Tensor | None) -> torch.Tensor:
    """1 / count of this batch, 0 where nothing counts, without asking the device."""
    if counts is not None:
        count = (counts > 0).sum()
    elif mask is not None:
        count = mask.sum()
    else:
        count = torch.full((), rows.shape[0], device=rows.device)
    return torch.where(count > 0, 1.0 / count.clamp(min=1).double(), 0.0).float()
