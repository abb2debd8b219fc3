"""The sequences of the captured forwards, and the sums of projected products over them."""

from typing import NamedTuple

import torch

from tokfuse.algorithms.captured_norms import Norm
from tokfuse.algorithms.captured_projection import OP
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.influence import project, sequence_sums
from tokfuse.runtime.reference.token_stats import result_dtype

LAYERS_AT_ONCE = 16  # layers per launch of the sums; bounds the memory of projected tensors that wait


class Description(NamedTuple):
    """A description of the sequences of the next forward."""

    cu_seqlens: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    head_cu_seqlens: torch.Tensor | None = None
    sizes: tuple[int, int] | None = None
    """(seqs, tokens) of the input ids."""


class Batch:
    """The sequences of one forward, and the sums of every layer.

    Args:
        x: (seqs, ..., size) or (tokens, size), the first input of a layer.
        given: description of the sequences. Without one, the first axis of x has the sequences.
        layers: number of captured linear layers.
        rank: of the features.
    """

    def __init__(self, x: torch.Tensor, given: Description, layers: int, rank: int) -> None:
        self.tokens, self.device = x.shape[:-1].numel(), x.device
        self.packed = given.cu_seqlens is not None
        if given.cu_seqlens is not None:
            cu_seqlens = given.cu_seqlens.to(x.device)
            self.seqs = checks.check_cu_seqlens(OP, cu_seqlens, self.tokens, x.device)
        else:
            self.seqs = x.shape[0]
            if given.sizes is not None and given.sizes[1] == self.tokens:
                self.seqs = given.sizes[0]
            cu_seqlens = self.equal(self.tokens)
        self.cu_seqlens, self.head_cu_seqlens = cu_seqlens, given.head_cu_seqlens
        self.mask = None if given.mask is None else given.mask.reshape(-1).to(x.device)
        if self.mask is not None and (self.mask.dtype != torch.bool or self.mask.shape[0] != self.tokens):
            raise refuse(
                OP,
                "mask",
                f"bool with one entry for each of the {self.tokens} tokens",
                f"{self.mask.dtype}, {self.mask.shape[0]} entries",
                "Pass attention_mask.bool() of this batch.",
            )
        self.sums = torch.zeros(layers, self.seqs, rank, rank, dtype=result_dtype(x.dtype), device=x.device)
        self.norms: dict[str, torch.Tensor] = {}
        """(seqs, numbers) by the name of the norm, if a gradient arrived."""

    def equal(self, rows: int) -> torch.Tensor:
        """Return the offsets of sequences of equal length."""
        return torch.arange(self.seqs + 1, dtype=torch.int32, device=self.device) * (rows // max(1, self.seqs))

    def offsets(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """Return the offsets of the sequences in the rows of x, the input of layer `name`."""
        rows = x.shape[:-1].numel()
        if rows == self.tokens:
            return self.cu_seqlens
        if self._by_token(x):
            return self.cu_seqlens * (rows // self.tokens)
        if rows == self.seqs or self.seqs == 1 or (not self.packed and x.dim() > 2 and x.shape[0] == self.seqs):
            return self.equal(rows)  # one pooled row per sequence, or sequences of another length
        if self.head_cu_seqlens is not None:
            return self.offsets_of_head(OP, rows, None)
        raise refuse(
            OP,
            f"the input of {name}",
            f"of {self.tokens} tokens or {self.seqs} sequences",
            f"{rows} rows, which belong to no sequence",
            "Leave the layer out with modules=, or describe the forward with captured.batch(...).",
        )

    def offsets_of_head(self, op: str, rows: int, cu_seqlens: torch.Tensor | None) -> torch.Tensor:
        """Return the offsets of the sequences in the rows of an op that computes the lm_head."""
        given = self.head_cu_seqlens if cu_seqlens is None else cu_seqlens
        if given is not None:
            seqs = checks.check_cu_seqlens(op, given, rows, self.device)
            if seqs == self.seqs:
                return given
            raise refuse(
                op,
                "cu_seqlens",
                f"offsets of the {self.seqs} sequences of the captured forward",
                f"{seqs} sequences",
                "Call captured.batch(...) before a forward of other sequences.",
            )
        if rows == self.tokens:
            return self.cu_seqlens
        if rows == self.seqs or self.seqs == 1:
            return self.equal(rows)
        raise refuse(
            op,
            "hidden",
            f"of the {self.tokens} tokens of the captured forward",
            f"{rows} rows",
            "Call captured.batch(head_cu_seqlens=...) before the forward.",
        )

    def kept(self, x: torch.Tensor) -> torch.Tensor:
        """Return the rows with those that do not count set to 0."""
        if self.mask is None or x.shape[0] != self.mask.shape[0]:
            return x
        return torch.where(self.mask[:, None], x, 0.0)

    def _by_token(self, x: torch.Tensor) -> bool:
        """Return whether x has the tokens in order, each with the same number of rows (e.g. one per attention head)."""
        return any(x.shape[:axis].numel() == self.tokens for axis in range(1, x.dim()))

    def mask_of(self, name: str, x: torch.Tensor) -> torch.Tensor | None:
        """Return the mask of the rows of x, the input of norm `name`."""
        if self.mask is None:
            return None
        if not self._by_token(x):
            raise refuse(
                OP,
                f"the input of {name}",
                f"of the {self.tokens} tokens of the mask, in order",
                str(tuple(x.shape)),
                "Leave the norm out with modules=.",
            )
        return self.mask.repeat_interleave(x.shape[:-1].numel() // self.tokens)

    def add_norm(self, norm: Norm, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the gradient of a norm's weight by token, (rows, size), to the features of the sequences."""
        kept = rows.to(self.sums.dtype)
        if self.packed or offsets is self.head_cu_seqlens:
            sums = torch.segment_reduce(kept, "sum", offsets=offsets.long(), axis=0, unsafe=True, initial=0.0)
        else:
            sums = kept.view(self.seqs, kept.shape[0] // max(self.seqs, 1), kept.shape[1]).sum(1)
        found = project(sums, norm.projection.matrix_for(sums))
        self.norms[norm.name] = self.norms.get(norm.name, 0.0) + found


class _Product(NamedTuple):
    """Projected tensors of one layer, whose sums are not computed yet."""

    batch: Batch
    place: int
    offsets: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor


class Recorder:
    """The batches of a capture. Products are stored until one launch computes the sums of several layers.

    Args:
        layers: number of captured linear layers.
        rank: of the features.
    """

    def __init__(self, layers: int, rank: int) -> None:
        self.layers, self.rank = layers, rank
        self.batches: list[Batch] = []
        self.next = Description()
        self._open: list[Batch] = []  # since the last backward
        self._waiting: list[_Product] = []
        self._begins = self._backward_ran = True

    def begin(self, description: Description) -> None:
        """Let the next layer with a gradient start a batch."""
        self._begins = True
        # The description by the user overrides the one from the arguments of the model.
        given = {name: value for name, value in self.next._asdict().items() if value is not None}
        self.next = description._replace(**given)

    def batch_of(self, x: torch.Tensor) -> Batch | None:
        """Return the batch of a forward with this input, or None for a recomputation that may belong to several."""
        if in_backward():
            return self._open[0] if len(self._open) == 1 else None
        if self.starts:
            if self._backward_ran:
                self._open.clear()
            batch = Batch(x, self.next, self.layers, self.rank)
            self._open.append(batch)
            self.batches.append(batch)
            self.next, self._begins, self._backward_ran = Description(), False, False
        return self._open[-1]

    @property
    def starts(self) -> bool:
        """Whether the next forward starts a batch."""
        return self._begins or self._backward_ran

    def add(self, batch: Batch, place: int, offsets: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
        """Add the sums of left_t right_t^T over the tokens of each sequence to a layer."""
        self._backward_ran = True
        if self._waiting and (self._waiting[0].batch is not batch or self._waiting[0].offsets is not offsets):
            self.add_up()
        sides = (self._square(batch.kept(x.to(batch.sums.dtype))) for x in (left, right))
        self._waiting.append(_Product(batch, place, offsets, *sides))
        if len(self._waiting) == LAYERS_AT_ONCE:
            self.add_up()

    def _square(self, x: torch.Tensor) -> torch.Tensor:
        """Return a projection with `rank` columns. Layers smaller than that have fewer."""
        missing = self.rank - x.shape[1]
        return x if missing == 0 else torch.nn.functional.pad(x, (0, missing))

    def add_norm(self, batch: Batch, norm: Norm, offsets: torch.Tensor, rows: torch.Tensor) -> None:
        """Add the gradient of a norm's weight by token."""
        self._backward_ran = True
        batch.add_norm(norm, offsets, rows)

    def add_up(self) -> None:
        """Compute the sums of the stored products."""
        if not self._waiting:
            return
        batch, offsets = self._waiting[0].batch, self._waiting[0].offsets
        count, rows = len(self._waiting), self._waiting[0].left.shape[0]
        left, right = (torch.cat([getattr(x, side) for x in self._waiting]) for side in ("left", "right"))
        first = torch.arange(count, dtype=torch.int32, device=left.device)[:, None] * rows
        ends = first.new_full((1,), count * rows)
        borders = torch.cat([(first + offsets[:-1].to(left.device)).flatten(), ends])
        sums = sequence_sums(left, right, borders).view(count, batch.seqs, self.rank, self.rank)
        places = torch.tensor([x.place for x in self._waiting], device=batch.device)
        batch.sums.index_add_(0, places, sums.to(batch.device))
        self._waiting.clear()


def in_backward() -> bool:
    """Return whether this thread runs a backward: then a forward is a recomputation of gradient checkpointing."""
    return bool(torch._C._current_graph_task_id() != -1)
