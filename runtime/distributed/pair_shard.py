"""The merge of divergences over vocabulary shards.

Shard r has the log-sum-exps of its own columns, of both sides. Let p_r and q_r be its probabilities in the
whole distributions, and KL_r(P || Q) the divergence of the two softmaxes over its columns alone. Then

    KL(P || Q) = sum_r p_r (KL_r(P || Q) + log p_r - log q_r),

so a KL needs one exchange. The terms of the other kinds depend on the log-sum-exps of the whole rows: after the
first exchange every shard sums its own terms, and a second exchange adds up the sums.

The gradient of a shard needs the log-sum-exps of the whole rows relative to the shard's own maxima, and the mean
slope. These are the state of the kernels of paired_divergence.
"""

import math
from typing import NamedTuple

import torch

RECORD = 6
"""Numbers per token and rank: max u_p, log2 S_p, max u_q, log2 S_q, divergence, whether the maxima share a column."""
LN_2 = math.log(2.0)


class MergedPair(NamedTuple):
    """The divergence of the whole rows, and what the kernels of this shard need."""

    value: torch.Tensor
    """(tokens,) float64: the KL of the local kernels' kind, over the whole vocabulary."""
    state: torch.Tensor
    """(tokens, 6): the state of the whole rows, relative to the maxima of this shard; KL or mean slope last."""
    top1_agreement: torch.Tensor
    """(tokens,) float64."""


def pack(value: torch.Tensor, state: torch.Tensor, meet: torch.Tensor) -> torch.Tensor:
    """Return the record of a shard, (RECORD, tokens), from the outputs of its divergence kernel."""
    return torch.stack([state[:, 1], state[:, 3], state[:, 2], state[:, 4], value, meet.to(value.dtype)])


def empty_record(tokens: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return the record of a shard without columns."""
    values = torch.tensor([0.0, -math.inf, 0.0, -math.inf, 0.0, 0.0], dtype=dtype, device=device)
    return values[:, None].expand(RECORD, tokens)


def merge(
    records: torch.Tensor, rank: int, unit: float | torch.Tensor, kind: str, mask: torch.Tensor | None
) -> MergedPair:
    """Merge the records of all shards in float64 and in rank order, so that all ranks get the same bits.

    Args:
        records: (ranks, RECORD, tokens), the records of all shards.
        rank: the shard for which the state is returned.
        unit: nats per unit of the maxima, a number or (tokens,).
        kind: "kl_forward" or "kl_reverse", the kind of the divergences in the records.
        mask: (tokens,) bool. Masked rows are 0. None: all rows count.
    """
    p_max, p_log2s, q_max, q_log2s, kl, meet = records.double().unbind(1)
    p, q = _Side(p_max, p_log2s, unit), _Side(q_max, q_log2s, unit)
    own, other = (p, q) if kind == "kl_reverse" else (q, p)
    infinite = ((kl == math.inf) | other.absent) & ~own.absent
    terms = own.log_share.exp() * (torch.where(other.absent, 0.0, kl) + own.log_share - other.log_share)
    terms = torch.where(infinite, math.inf, torch.where(own.absent, 0.0, terms))
    live = ~(p.absent.all(0) | q.absent.all(0))
    if mask is not None:
        live = live & mask
    value = torch.where(live, terms.sum(0).clamp(min=0), 0.0)
    highest = (p.highest == p.highest.amax(0)) & (q.highest == q.highest.amax(0))
    top1 = torch.where(live, ((meet != 0) & highest).any(0).double(), 0.0)
    state = [live & (value != math.inf), *p.of_rank(rank)[:1], *q.of_rank(rank)[:1]]
    state += [*p.of_rank(rank)[1:], *q.of_rank(rank)[1:], value]
    return MergedPair(value, torch.stack([x.double() for x in state], 1).to(records.dtype), top1)


class _Side:
    """The distribution of one side, split over the shards."""

    def __init__(self, largest: torch.Tensor, log2s: torch.Tensor, unit: float | torch.Tensor) -> None:
        self.unit = unit
        self.absent = log2s == -math.inf
        self.largest = torch.where(self.absent, 0.0, largest)
        self.highest = torch.where(self.absent, -math.inf, largest)
        nats = torch.where(self.absent, -math.inf, self.largest * unit + log2s * LN_2)
        self.lse = nats.logsumexp(0)
        self.log_share = torch.where(self.absent, -math.inf, nats - self.lse)

    def of_rank(self, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the maximum of a shard, and log2 of the sum of the whole row relative to it."""
        return self.largest[rank], (self.lse - self.largest[rank] * self.unit) / LN_2
