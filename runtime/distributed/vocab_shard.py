"""Which part of the vocabulary a rank holds, and how the statistics of the parts become those of
the whole.

A shard with logits z_j, j in its part, has the softmax of its own logits: row maximum m, S = sum e^(z-m),
its own entropy, sum of p^2 and, where it owns the target, log-probability. With q_r the probability
that the whole softmax gives to shard r,

    lse = log sum_r S_r e^(m_r),   q_r = S_r e^(m_r - lse),   logp = logp_r + log q_r (r owns it),
    entropy = sum_r q_r (entropy_r - log q_r),   sum_sq = sum_r q_r^2 sum_sq_r.

So five numbers per token and rank, exchanged once, are all. A shard's gradient needs its own row
maximum and (e^(m_r - m) / S) of the whole: p_j = e^(z_j - m_r) e^(m_r) / sum_r S_r e^(m_r).
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

RECORD = 5  # numbers per token and rank in the one all-gather
INF = float("inf")


@dataclass(frozen=True)
class VocabShard:
    """The columns [start, stop) of the vocabulary, held by this rank of a tensor-parallel group.

    The shards of a group tile [0, vocab_size) in rank order. They may be of any size, also empty. A
    tensor may be wider than its shard: columns (rows of the lm_head) beyond stop - start are
    padding, they take no part and their gradient is 0.

    Args:
        vocab_size: of the whole vocabulary, without padding.
        start, stop: this rank's part.
        group: process group; None: the default group.

    Raises:
        ValueError: borders that are not 0 <= start <= stop <= vocab_size; a group without this
            process. RuntimeError: torch.distributed is not initialised.
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
                "Pass the borders of this rank's part.",
            )
        collectives.require_group("VocabShard", self.group)

    @classmethod
    def even(cls, vocab_size: int, group: "ProcessGroup | None" = None, *, multiple: int = 1) -> "VocabShard":
        """Equal parts of ceil(vocab_size / ranks), as DTensor's Shard(0) and torch.chunk cut.

        Args:
            multiple: round the parts up to a multiple of it, as Megatron-LM does (128).
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
        """Parts of any sizes, `size` on this rank; one small all-gather, for set-up."""
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
        """Columns of this rank."""
        return self.stop - self.start

    def owns(self, target: torch.Tensor) -> torch.Tensor:
        """(tokens,) bool: the target lies in this part."""
        return (target >= self.start) & (target < self.stop)


class Merged(NamedTuple):
    """Statistics of the whole vocabulary, and what the gradient of this shard needs."""

    stats: TokenStats
    row_max: torch.Tensor
    """(tokens,) the shard's own row maximum, in its kernel's unit."""
    inv_sum: torch.Tensor
    """(tokens,) factor that makes probabilities of the shard's exponentials."""
    logp: torch.Tensor
    """(tokens,) logp of the whole, in the records' dtype as the two above."""
    entropy: torch.Tensor
    """(tokens,) entropy of the whole, likewise."""


def pack(local: tuple[torch.Tensor, ...], owned: torch.Tensor) -> torch.Tensor:
    """(RECORD, tokens) from the seven outputs of a row kernel over the shard.

    row_max, 1 / S, entropy, sum_sq, logp. logp is +inf where another shard owns the target; 1 / S is
    negative where the target attains the shard's maximum; a shard that is -inf all over has row_max
    -inf and 1 / S = 0.
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
    """The record of a shard without columns."""
    values = torch.tensor([-INF, 0.0, 0.0, 0.0, INF], dtype=dtype, device=target.device)
    return values[:, None].expand(RECORD, target.shape[0])


def merge(
    records: torch.Tensor, rank: int, unit: float | torch.Tensor, mask: torch.Tensor | None, dtype: torch.dtype
) -> Merged:
    """Statistics of the whole from the records of all shards: (ranks, RECORD, tokens).

    In float64 and in rank order, so that every rank gets the same bits.

    Args:
        rank: the shard whose gradient factors are wanted.
        unit: nats per unit of row_max, () or (tokens,).
        mask: (tokens,) bool; masked rows are 0.
        dtype: of the statistics.
    """
    row_max, signed, entropy, sum_sq, logp = records.double().unbind(1)
    inverse = signed.abs()
    absent = inverse == 0  # -inf all over, masked, or without columns; a poisoned shard is NaN
    dead = absent.all(0)
    highest = row_max.amax(0)
    distance = torch.where(absent, -INF, (row_max - highest) * unit)
    weight = torch.where(absent, 0.0, distance.exp() / inverse)
    total = torch.where(dead, 1.0, weight.sum(0))
    share = weight / total
    log_share = torch.where(absent, -INF, distance - inverse.log() - total.log())
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
    # A factor that underflows must not look like a row without a distribution: the shard may own
    # the target, whose own term does not vanish.
    wide = records.dtype
    factor = (distance[rank].exp() / total).to(wide).clamp(min=torch.finfo(wide).tiny)
    own_max = torch.where(absent[rank], 0.0, row_max[rank])
    exact = (final(whole_logp, -INF, wide), final(whole_entropy, 0.0, wide))
    return Merged(stats, own_max.to(wide), torch.where(dead, 0.0, factor), *exact)
