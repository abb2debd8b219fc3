"""Vocabulary shards, and the merge of their statistics.

Shard r computes the softmax of its own logits z_j: the row maximum m_r, S_r = sum e^(z_j - m_r), the entropy,
the sum of p^2, and, if it owns the target, the log-probability. Let q_r be the probability of shard r in the
softmax over the whole vocabulary. Then

    lse = log sum_r S_r e^(m_r),   q_r = S_r e^(m_r - lse),   logp = logp_r + log q_r (r owns the target),
    entropy = sum_r q_r (entropy_r - log q_r),   sum_sq = sum_r q_r^2 sum_sq_r.

So one exchange of five numbers per token and rank is sufficient. The gradient of a shard needs its own row
maximum and one factor per row: p_j = e^(z_j - m_r) * factor, factor = e^(m_r) / sum_r S_r e^(m_r).
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.distributed import collectives

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

RECORD = 5  # numbers per token and rank in the all-gather
INF = float("inf")


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of the vocabulary that this rank of a tensor-parallel group holds.

    The shards of a group cover [0, vocab_size) in rank order. A shard may have any size, also 0. A tensor
    may be wider than its shard. Its columns (or rows of the lm_head) beyond stop - start are padding: they
    are ignored, and their gradient is 0.

    Args:
        vocab_size: size of the whole vocabulary, without padding.
        start, stop: first column of this rank, and one past its last column.
        group: process group. None: the default group.

    Raises:
        ValueError: not 0 <= start <= stop <= vocab_size; a group without this process.
        RuntimeError: torch.distributed is not initialised.
    """

    vocab_size: int
    start: int
    stop: int
    group: "ProcessGroup | None" = None

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise refuse(
                "VocabShard",
                "start and stop",
                f"0 <= start <= stop <= {self.vocab_size}",
                (self.start, self.stop),
                "Pass the first column of this rank, and one past its last column.",
            )
        collectives.require_group("VocabShard", self.group)

    @classmethod
    def even(cls, vocab_size: int, group: "ProcessGroup | None" = None, *, multiple: int = 1) -> "VocabShard":
        """Return this rank's shard of equal parts of ceil(vocab_size / ranks), like DTensor's Shard(0).

        Args:
            vocab_size: size of the whole vocabulary.
            group: process group. None: the default group.
            multiple: the size of the parts is rounded up to a multiple of this (Megatron-LM: 128).
        """
        check_number("VocabShard.even", "vocab_size", vocab_size, 1)
        check_number("VocabShard.even", "multiple", multiple, 1)
        collectives.require_group("VocabShard.even", group)
        ranks, rank = collectives.num_ranks(group), collectives.own_rank(group)
        part = -(-vocab_size // (ranks * multiple)) * multiple
        start = min(rank * part, vocab_size)
        return cls(vocab_size, start, min(start + part, vocab_size), group)

    @classmethod
    def of_sizes(cls, size: int, group: "ProcessGroup | None" = None) -> "VocabShard":
        """Return this rank's shard of parts of any sizes. It needs one small all-gather; call it at set-up.

        Args:
            size: number of columns of this rank.
            group: process group. None: the default group.
        """
        check_number("VocabShard.of_sizes", "size", size, 0)
        collectives.require_group("VocabShard.of_sizes", group)
        backend = torch.distributed.get_backend(group)
        device = "cuda" if backend == "nccl" else "cpu"
        own = torch.tensor([size], dtype=torch.int64, device=device)
        sizes = collectives.all_gather(own, group).flatten().tolist()
        start = sum(sizes[: collectives.own_rank(group)])
        return cls(sum(sizes), start, start + size, group)

    @property
    def size(self) -> int:
        """The number of columns of this rank."""
        return self.stop - self.start

    def owns(self, target: torch.Tensor) -> torch.Tensor:
        """Return True for targets in this shard, (tokens,) bool."""
        return (target >= self.start) & (target < self.stop)


class Merged(NamedTuple):
    """Statistics of the whole vocabulary, and the inputs that the gradient of this shard needs.

    Every field is (tokens,). The last four fields have the dtype of the records.
    """

    stats: TokenStats
    """Statistics of the whole vocabulary."""
    row_max: torch.Tensor
    """Row maximum of this shard, in the unit of its kernel."""
    inv_sum: torch.Tensor
    """Factor that converts the exponentials of this shard to probabilities."""
    logp: torch.Tensor
    """logp over the whole vocabulary."""
    entropy: torch.Tensor
    """Entropy over the whole vocabulary."""


def pack(local: tuple[torch.Tensor, ...], owned: torch.Tensor) -> torch.Tensor:
    """Return the record of a shard, (RECORD, tokens), from the seven outputs of its row kernel.

    A record contains row_max, 1 / S, entropy, sum_sq, logp. Three marks are encoded in it: logp is +inf if
    another shard owns the target; 1 / S is negative if the target attains the maximum of the shard; a shard
    with only -inf has row_max = -inf and 1 / S = 0.
    """
    logp, entropy, _, sum_sq, top1, row_max, inv_sum = local
    hit = owned & (top1 > 0)
    return torch.stack(
        [
            torch.where(inv_sum == 0, -INF, row_max),
            torch.where(hit, -inv_sum, inv_sum),
            entropy,
            sum_sq,
            torch.where(owned, logp, INF),
        ]
    )


def empty_record(target: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the record of a shard without columns."""
    values = torch.tensor([-INF, 0.0, 0.0, 0.0, INF], dtype=dtype, device=target.device)
    return values[:, None].expand(RECORD, target.shape[0])


class Shares(NamedTuple):
    """What the records say about the shards' parts of the distribution; (ranks, tokens) or (tokens,), float64."""

    absent: torch.Tensor
    """True for a shard of only -inf, masked, or without columns. A shard with +inf or NaN is not absent."""
    dead: torch.Tensor
    """True for a row without a distribution."""
    highest: torch.Tensor
    distance: torch.Tensor
    """Maximum of the shard minus that of the row, nats."""
    weight: torch.Tensor
    total: torch.Tensor
    log_share: torch.Tensor
    """log q_r."""


def shares(records: torch.Tensor, unit: float | torch.Tensor) -> Shares:
    """Return the probability of every shard, from (ranks, RECORD, tokens)."""
    row_max, inverse = records[:, 0].double(), records[:, 1].double().abs()
    absent = inverse == 0
    dead = absent.all(0)
    highest = row_max.amax(0)
    distance = torch.where(absent, -INF, (row_max - highest) * unit)
    weight = torch.where(absent, 0.0, distance.exp() / inverse)
    total = torch.where(dead, 1.0, weight.sum(0))
    log_share = torch.where(absent, -INF, distance - inverse.log() - total.log())
    return Shares(absent, dead, highest, distance, weight, total, log_share)


def merge(
    records: torch.Tensor, rank: int, unit: float | torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> Merged:
    """Merge the records of all shards. Return the statistics of the whole vocabulary and gradient inputs.

    The merge is in float64 and in rank order, so that the results are bitwise equal on all ranks.

    Args:
        records: (ranks, RECORD, tokens), the records of all shards.
        rank: the shard for which the gradient inputs are returned.
        unit: nats per unit of row_max, a number or (tokens,).
        mask: (tokens,) bool. Masked rows are 0. None: all rows count.
        dtype: dtype of the statistics.
    """
    row_max, signed, entropy, sum_sq, logp = records.double().unbind(1)
    absent, dead, highest, distance, weight, total, log_share = shares(records, unit)
    share = weight / total
    mixed = torch.where(share == 0, 0.0, share * (entropy - log_share))
    owned = logp != INF
    own_logp = torch.where(owned, logp + log_share, 0.0).sum(0)
    known = owned.any(0) | dead
    top1 = (signed.signbit() & (row_max == highest) & (weight > 0)).any(0)

    def final(x: torch.Tensor, dead_value: float, dtype: torch.dtype = dtype) -> torch.Tensor:
        x = torch.where(dead, dead_value, x)
        return (x if mask is None else torch.where(mask, x, 0.0)).to(dtype)

    whole_entropy = mixed.sum(0).clamp(min=0)
    whole_logp = torch.where(known, own_logp.clamp(max=0), math.nan)

    stats = TokenStats(
        final(whole_logp, -INF),
        final(whole_entropy, 0.0),
        final(highest * unit + total.log(), -INF),
        final((share * share * sum_sq).sum(0), 0.0),
        final(top1.double(), 0.0),
    )
    # The factor is clamped above 0, because 0 marks a row without a distribution. If the factor underflows,
    # the shard may still own the target, and the gradient term of the target is not 0.
    wide = records.dtype
    factor = (distance[rank].exp() / total).to(wide).clamp(min=torch.finfo(wide).tiny)
    own_max = torch.where(absent[rank], 0.0, row_max[rank])
    exact = (final(whole_logp, -INF, wide), final(whole_entropy, 0.0, wide))
    return Merged(stats, own_max.to(wide), torch.where(dead, 0.0, factor), *exact)
