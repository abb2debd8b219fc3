"""Input of a preference loss: packed responses, and the pairs that they form."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms.batch import World
from tokfuse.runtime.core.checks import BOOL, FLOATS, INTS, Rows, check_cu_seqlens, check_optional, may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.lm_head.units import Units
from tokfuse.runtime.reference.segments import segment_sum, sequence_index

OP = "PreferenceBatch"


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Packed responses and their preferences. No field has a gradient.

    Args:
        num_tokens: number of rows of the logits or hidden states.
        cu_seqlens: (seqs + 1,), int32. Offsets of the responses.
        pairs: (pairs, 2), int64. Sequence indices of the chosen and the rejected response of each pair. A
            sequence is in at most one pair, in any order. None: unpaired, with `desirable`.
        desirable: (seqs,), bool. Label of every response (KTO). None: paired.
        mask: (tokens,), bool. True where a token counts: no prompt and no padding, and in an agent's trajectory
            only the agent's own tokens. None: all tokens count.
        ref_logp: (tokens,), float, nats. Log-probability under the frozen reference policy.
        ref_sum: (seqs,), float, nats. Alternative to ref_logp: its sums over the counting tokens, kept from an
            earlier pass.
        ref_tail_weight: the tail_weight (LD-DPO) that ref_sum was summed with, and only with ref_sum. None: plain
            sums. It must equal the loss's.
        pair_weight: (pairs,), float. Multiplies the loss of a pair; the count of pairs does not change. None: 1.
        level: (pairs,), int. 0, 1, ...; HPL: trajectory, step and group; ARIES: direct and refinement context.
            None: all 0.
        kl: (), float, nats. KTO's estimate for the batch, see `kto_kl`.
        counts: sums of `loss.counts(batch)` over all micro-batches and ranks, for the losses that have counts
            (level_weight, and an `NLL` with reduction "batch_mean"). None: this batch is the whole step.
        world: the ranks that share the batch.

    Raises:
        ValueError: a wrong shape, dtype or device; both or none of pairs and desirable; both of ref_logp and
            ref_sum; a sequence in two pairs (checked on a CPU, otherwise with TOKFUSE_CHECK=1).
    """

    num_tokens: int
    cu_seqlens: torch.Tensor
    pairs: torch.Tensor | None = None
    desirable: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    ref_sum: torch.Tensor | None = None
    ref_tail_weight: float | None = None
    pair_weight: torch.Tensor | None = None
    level: torch.Tensor | None = None
    kl: torch.Tensor | None = None
    counts: Mapping[str, torch.Tensor] | None = None
    world: World = World()

    def __post_init__(self) -> None:
        device = self.cu_seqlens.device
        seqs = check_cu_seqlens(OP, self.cu_seqlens, self.num_tokens, device)
        if (self.pairs is None) == (self.desirable is None):
            given = "both" if self.pairs is not None else "neither"
            raise refuse(OP, "pairs or desirable", "given, one of them", given, "Pass exactly one.")
        if self.ref_logp is not None and self.ref_sum is not None:
            raise refuse(OP, "ref_sum", "left out with ref_logp", "both", "It is computed from ref_logp.")
        if self.ref_tail_weight is not None and self.ref_sum is None:
            raise refuse(OP, "ref_tail_weight", "left out without ref_sum", self.ref_tail_weight, "It describes it.")
        tokens, per_seq = Rows(self.num_tokens, "num_tokens", device), Rows(seqs, "cu_seqlens", device)
        check_optional(OP, "mask", self.mask, tokens, BOOL)
        check_optional(OP, "ref_logp", self.ref_logp, tokens, FLOATS)
        check_optional(OP, "ref_sum", self.ref_sum, per_seq, FLOATS)
        check_optional(OP, "desirable", self.desirable, per_seq, BOOL)
        self._check_pairs(seqs, device)
        if self.kl is not None and self.kl.dim() != 0:
            raise refuse(OP, "kl", "a 0-dim tensor", f"shape {tuple(self.kl.shape)}", "Pass what kto_kl returned.")

    def _check_pairs(self, seqs: int, device: torch.device) -> None:
        pairs = self.pairs
        if pairs is None:
            for name in ("pair_weight", "level"):
                if getattr(self, name) is not None:
                    raise refuse(OP, name, "left out without pairs", "a tensor", "It has one entry per pair.")
            return
        if pairs.dim() != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
            raise refuse(
                OP,
                "pairs",
                "(pairs, 2) int64",
                f"{tuple(pairs.shape)} {pairs.dtype}",
                "Pass the chosen and the rejected sequence of each pair.",
            )
        rows = Rows(pairs.shape[0], "pairs", device)
        check_optional(OP, "pair_weight", self.pair_weight, rows, FLOATS)
        check_optional(OP, "level", self.level, rows, INTS)
        if not may_read(pairs):
            return
        if pairs.numel() and not 0 <= int(pairs.min()) <= int(pairs.max()) < seqs:
            raise refuse(
                OP, "pairs", f"sequences in [0, {seqs})", f"{int(pairs.min())} to {int(pairs.max())}", "Count from 0."
            )
        if pairs.unique().numel() != pairs.numel():
            raise refuse(OP, "pairs", "each sequence once", "one in two pairs", "Pack that response twice.")

    @property
    def num_seqs(self) -> int:
        return self.cu_seqlens.shape[0] - 1

    @property
    def num_units(self) -> int:
        """Number of pairs, or of sequences if unpaired: the divisor of a loss with normalizer "batch"."""
        return self.num_seqs if self.pairs is None else self.pairs.shape[0]

    def to_state(self) -> dict[str, Any]:
        """Return the fields, tensors, numbers and counts only, for a checkpoint; without `world`."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "world"}
        return {name: value for name, value in values.items() if value is not None}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], world: World) -> "PreferenceBatch":
        """Return the batch of a `to_state` checkpoint."""
        return cls(**state, world=world)


class Side(NamedTuple):
    """One side of some pairs, or some unpaired sequences: float64 vectors with one entry per pair or sequence."""

    logp: torch.Tensor
    """Sum of the log-probabilities of the counting tokens; differentiable."""
    ref: torch.Tensor
    """The same sum under the reference; 0 if the loss needs none."""
    length: torch.Tensor
    """Number of counting tokens, at least 1."""
    alignment: torch.Tensor
    """mean_t(logp_t - log sum_sq_t), detached; used by WPO."""

    @property
    def log_ratio(self) -> torch.Tensor:
        """logp - ref."""
        return self.logp - self.ref

    @property
    def mean(self) -> torch.Tensor:
        """logp / length."""
        return self.logp / self.length


class Layout:
    """A batch sorted into units. Pair i has the slots 2 i and 2 i + 1; without pairs, each sequence is a slot.

    Args:
        batch: the batch.
        whole: all pairs depend on each other, so the batch is one unit.
        tail_weight: weight of the tokens beyond the length of the shorter response of their pair (LD-DPO).
    """

    def __init__(self, batch: PreferenceBatch, whole: bool, tail_weight: float | None) -> None:
        device, pairs = batch.cu_seqlens.device, batch.pairs
        self.per_unit = 1 if pairs is None else 2
        self.num_units = batch.num_units
        slots = self.per_unit * self.num_units
        seq_slot = torch.full((batch.num_seqs,), -1, device=device)
        flat = torch.arange(batch.num_seqs, device=device) if pairs is None else pairs.flatten()
        seq_slot[flat] = torch.arange(slots, device=device)
        sequence = sequence_index(batch.cu_seqlens, batch.num_tokens)
        self.slot = seq_slot[sequence]
        counted = self.slot >= 0 if batch.mask is None else (self.slot >= 0) & batch.mask
        self.counted = counted
        place = torch.where(counted, self.slot, slots)  # the others are sorted last and belong to no unit
        order = place.argsort(stable=True)
        self.length = segment_sum(counted.double(), place, slots + 1)[:slots]
        unit_rows = self.length.view(-1, self.per_unit).sum(1)
        if whole:
            unit_rows = unit_rows.sum(0, keepdim=True)
        border = [0, *unit_rows.cumsum(0).long().tolist()]
        self.units = Units(order[: border[-1]], border)
        self.whole = whole
        self.token_weight: torch.Tensor | None = None
        if tail_weight is not None:
            self.token_weight = self._tails(tail_weight)
        self.ref = self._reference(batch, flat)

    def _tails(self, tail_weight: float) -> torch.Tensor:
        """Return token weights, (tokens,) float64: `tail_weight` beyond the shorter response's length, else 1."""
        shorter = self.length.view(-1, 2).amin(1).repeat_interleave(2)
        rows = self.units.order
        place = torch.arange(rows.shape[0], device=rows.device)
        start = self.length.cumsum(0) - self.length
        slot = self.slot[rows]
        weight = torch.ones(self.slot.shape[0], dtype=torch.float64, device=rows.device)
        weight[rows] = torch.where(place - start[slot] < shorter[slot], weight[rows], tail_weight)
        return weight

    def _reference(self, batch: PreferenceBatch, flat: torch.Tensor) -> torch.Tensor | None:
        if batch.ref_sum is not None:
            return batch.ref_sum.double()[flat]
        if batch.ref_logp is None:
            return None
        rows = self.units.order
        return self._sums(batch.ref_logp.double()[rows], rows, 0, self.length.shape[0])

    def _sums(self, x: torch.Tensor, tokens: torch.Tensor, start: int, count: int) -> torch.Tensor:
        if self.token_weight is not None:
            x = x * self.token_weight[tokens]
        total: torch.Tensor = segment_sum(x, self.slot[tokens] - start, count)
        return total

    def sides(
        self, logp: torch.Tensor, sum_sq: torch.Tensor, tokens: torch.Tensor, first: int, last: int
    ) -> tuple[Side, ...]:
        """Return (chosen, rejected) or (all,) of units [first, last), from the statistics of `tokens`."""
        start, stop = self.per_unit * first, self.per_unit * last
        total = self._sums(logp.double(), tokens, start, stop - start)
        length = self.length[start:stop].clamp(min=1)
        ref = torch.zeros_like(total) if self.ref is None else self.ref[start:stop]
        aligned = logp.detach().double() - sum_sq.double().log()
        alignment = segment_sum(aligned, self.slot[tokens] - start, stop - start) / length
        columns = [x.view(-1, self.per_unit).unbind(1) for x in (total, ref, length, alignment)]
        return tuple(Side(*of_side) for of_side in zip(*columns, strict=True))

    @property
    def last(self) -> int:
        """Number of units, as `unit_step` counts them."""
        return len(self.units.border) - 1

    def range(self, first: int, last: int) -> tuple[int, int]:
        """Return the range of pairs or sequences of units [first, last)."""
        return (0, self.num_units) if self.whole else (first, last)
