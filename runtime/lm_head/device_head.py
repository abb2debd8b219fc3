"""The lm_head on a GPU, in chunks of rows: GEMMs of torch around the row kernels of CUDA or Triton.

The logits of a chunk are in a buffer that is reused, as in runtime/lm_head/cpu_head.py. Logits are float32. For
a float32 head the gradient overwrites them. For a 16-bit head the gradient is rounded once to the dtype of the
head and stored in another buffer, because tensor cores do not support mixed operands. GEMMs accumulate in
float32, and dW is a float32 sum over the chunks.

Mixed dtypes. If hidden and weight differ, GEMMs run in float32. The hidden states of a chunk are widened, and a
narrower weight is widened tile by tile, because a whole float32 copy would be larger than the weight itself.

A chunk needs one GEMM and one row kernel for statistics, and one GEMM each for grad_hidden and grad_weight. Its
workspace is 4 bytes per logit, 6 for a 16-bit head.

Row classes. The CPU collects rows with a gradient as it finds them. On a GPU this would synchronise the host
once per chunk. Instead, rows are sorted by class on the device before the first GEMM. The host then reads the
sizes of the classes, 16 bytes. This is the only synchronisation of a call. Under CUDA-graph capture the host
cannot read anything: all rows are computed, and rows of the lower classes contribute exact zeros.

Clipped rows. Only the row kernel of a chunk finds which rows the clip stops, but the size of a torch GEMM is an
argument of its launch. By default such rows enter with exact zeros. With `compact_clipped` the two gradient
GEMMs of the first class are Triton kernels (triton_kernels/head_gradient.py). They read the live rows and their
number from device memory, so they need no synchronisation and can be captured in a CUDA graph. Per row they are
not faster than cuBLAS. Therefore the caller decides whether enough rows are clipped.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tokfuse.runtime.backends import kept_rows, triton_backend
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.lm_head.problem import HeadProblem

_live_first = triton_backend.launcher("head_gradient", "live_first")
_live_grad_hidden = triton_backend.launcher("head_gradient", "grad_hidden")
_live_grad_weight = triton_backend.launcher("head_gradient", "grad_weight")


WIDE_BYTES = 64 << 20  # size of the float32 copy of a weight tile, if hidden is wider than the weight


def check_compact(op: str, p: HeadProblem) -> None:
    """Raise ValueError if `compact_clipped` is True and its Triton kernels cannot run."""
    reason = triton_backend.why_unusable() if p.compact_clipped else None
    if reason is not None:
        raise refuse(
            op,
            "compact_clipped",
            "False if Triton kernels cannot run",
            reason,
            "Omit it: clipped rows then enter the GEMMs as zeros.",
        )


class RowClasses(NamedTuple):
    """Tokens sorted by class, in token order inside a class."""

    order: torch.Tensor
    """(tokens,) int64: tokens with a gradient, then tokens with statistics only, then the rest."""
    gradient: int
    """Number of tokens in the first class."""
    forward: int
    """Number of tokens in the first two classes."""
    keep: torch.Tensor | None
    """(tokens,) bool, True for the first two classes, if all rows are computed (graph capture). Else None."""
    in_order: bool = False
    """True if `order` is 0, 1, 2, ...: a chunk is then a slice of the hidden states, which need no gather."""


class Chunk(NamedTuple):
    """Some rows of the order, computed together."""

    tokens: torch.Tensor
    """(rows,) int64."""
    hidden: torch.Tensor
    """(rows, hidden)."""
    kept: int | None = 0
    """Number of kept ids of these rows; None if the host cannot read it."""


def capturing(x: torch.Tensor) -> bool:
    """Return True during the capture of a CUDA graph, when the host cannot read values."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def classify(p: HeadProblem, needed: torch.Tensor | None, gradient: torch.Tensor | None) -> RowClasses:
    """Return the row classes. Reads two numbers from the device.

    Args:
        p: the head and its inputs.
        needed: (tokens,) bool, rows that need statistics. None: every row.
        gradient: (tokens,) bool, rows that may have a gradient. None: every needed row.
    """
    tokens, device = p.tokens, p.hidden.device
    if needed is None and gradient is None:
        return RowClasses(torch.arange(tokens, device=device), tokens, tokens, None, in_order=True)
    if needed is None:
        needed = torch.ones(tokens, dtype=torch.bool, device=device)
    first = needed if gradient is None else needed & gradient
    if capturing(needed):
        return RowClasses(torch.arange(tokens, device=device), tokens, tokens, needed, in_order=True)
    rank = 2 - needed.to(torch.int8) - first.to(torch.int8)
    order = torch.argsort(rank, stable=True)
    counts = torch.stack([first.sum(), needed.sum()]).tolist()
    one_class = counts in ([tokens, tokens], [0, tokens], [0, 0])  # a stable sort keeps the order
    return RowClasses(order, counts[0], counts[1], None, in_order=one_class)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """Compute out = a @ b or out += a @ b in float32. With out=, autocast does not round the operands."""
    if a.dtype == out.dtype or out.device.type == "cpu":  # the CPU has no GEMM of mixed dtypes
        a, b = a.to(out.dtype), b.to(out.dtype)
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif accumulate:
        torch.ops.aten.addmm.dtype_out(out, a, b, out.dtype, out=out)
    else:
        torch.ops.aten.mm.dtype_out(a, b, out.dtype, out=out)


class DeviceHead:
    """The chunks of logits of a head, and the sums of their gradients."""

    def __init__(self, p: HeadProblem, needs: tuple[bool, bool, bool], rows: RowClasses) -> None:
        self.problem, self.rows = p, rows
        # True if the host may not read how many kept ids a chunk has. Each chunk then visits the ids of all rows.
        self._all_kept = p.kept is not None and (rows.keep is not None or capturing(p.hidden))
        self.hidden, self.weight = p.hidden.detach(), p.weight.detach()
        self.bias = None if p.bias is None else p.bias.detach().float()
        device = p.hidden.device
        # On the CPU, where the Triton interpreter runs, a 16-bit GEMM is 100 times slower than a float32 one.
        self.mixed = p.dtype != torch.float32 and device.type != "cpu"
        self.grad_hidden: torch.Tensor | None = None
        if needs[0]:  # new_zeros gives rows of unit stride for all strides of hidden
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape)
        self.grad_weight: torch.Tensor | None = None
        if needs[1]:
            self.grad_weight = torch.empty(p.weight.shape, dtype=torch.float32, device=device)
        self.grad_bias = torch.zeros(p.vocab, device=device, dtype=torch.float32) if needs[2] else None
        self._weight_written = False
        # Rows start at multiples of a vector, so that the sums of a row do not depend on its position.
        self._stride = -(-p.vocab // 16) * 16
        self._logits: torch.Tensor | None = None
        self._dz: torch.Tensor | None = None
        self._live_weight: torch.Tensor | None = None  # in the dtype of dz, which is float32 on the CPU

    def rows_in_budget(self) -> int:
        """Return the number of rows of logits, gradients and hidden states that fit into the workspace."""
        p = self.problem
        wide, narrow = 4, 2 if self.mixed else 4
        buffers = wide + (narrow if self.mixed else 0)
        per_row = self._stride * buffers + 8 * p.hidden.shape[1] + 64
        return max(1, p.memory_budget // per_row)

    def chunks(self, start: int, stop: int) -> Iterator[Chunk]:
        """Yield rows [start, stop) of the order, in chunks that fit into the budget."""
        parts = max(1, -(-(stop - start) // self.rows_in_budget()))
        size = max(1, -(-(stop - start) // parts))
        begins = range(start, stop, size)
        for begin, kept in zip(begins, self._kept_of((*begins, stop)), strict=True):
            chunk = slice(begin, min(begin + size, stop))
            index = self.rows.order[chunk]
            h = self.hidden[chunk if self.rows.in_order else index]
            if self.rows.keep is not None:  # a masked row may contain NaN, and 0 * NaN is NaN
                h = torch.where(self.rows.keep[index, None], h, 0.0)
            yield Chunk(index, h, kept)

    def _kept_of(self, borders: tuple[int, ...]) -> list[int | None]:
        """Return the number of kept ids between neighbouring borders of the order. One synchronisation if there are."""
        kept, parts = self.problem.kept, len(borders) - 1
        if kept is None or parts == 0 or self._all_kept:
            return [0 if kept is None else None] * parts
        counts = kept_rows.counts_of(kept, self.rows.order[borders[0] : borders[-1]])
        before = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        at = torch.tensor([border - borders[0] for border in borders], device="cpu").to(before.device)
        return before[at].diff().tolist()

    def _buffer(self, kept: torch.Tensor | None, rows: int, dtype: torch.dtype) -> torch.Tensor:
        if kept is None or kept.shape[0] < rows:
            kept = torch.empty(rows, self._stride, dtype=dtype, device=self.hidden.device)
        return kept

    def _weight_tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (first row, end row, rows of the weight in the dtype of the GEMMs)."""
        p = self.problem
        if self.weight.dtype == p.dtype:
            yield 0, p.vocab, self.weight
            return
        size = max(1, WIDE_BYTES // (4 * self.weight.shape[1]))
        for begin in range(0, p.vocab, size):
            end = min(begin + size, p.vocab)
            yield begin, end, self.weight[begin:end].to(p.dtype)

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Return the float32 logits (rows, vocab) of hidden states, in a buffer that the next call reuses."""
        # One more row if the entries of other rows must go somewhere, see `kept_rows.entries`.
        self._logits = self._buffer(self._logits, h.shape[0] + self._all_kept, torch.float32)
        out = self._logits[: h.shape[0], : self.problem.vocab]
        h = h.to(self.problem.dtype)
        for begin, end, weight in self._weight_tiles():
            _matmul(h, weight.t(), out[:, begin:end])
        if self.bias is not None:
            out += self.bias
        return out

    def logits_of(self, chunk: Chunk) -> torch.Tensor:
        """Return the logits of a chunk as `logits` does, -inf outside the kept ids of each row."""
        out, kept = self.logits(chunk.hidden), self.problem.kept
        if kept is not None:
            assert self._logits is not None
            rows = out.shape[0] + (chunk.kept is None)
            where = kept_rows.entries(kept, chunk.tokens, chunk.kept)
            kept_rows.keep_only_(self._logits[:rows, : self.problem.vocab], where)
        return out

    def gradient_like(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the tensor for the gradient of `logits`: `logits` itself, or a 16-bit buffer for a 16-bit head."""
        if not self.mixed:
            return logits
        self._dz = self._buffer(self._dz, logits.shape[0], self.hidden.dtype)
        return self._dz[: logits.shape[0], : self.problem.vocab]

    def add(self, index: torch.Tensor, h: torch.Tensor, dz: torch.Tensor) -> None:
        """Add the gradient rows of tokens `index` to the gradients."""
        self._add_small(index, dz)
        if self.grad_hidden is not None:
            out = torch.empty(h.shape, dtype=torch.float32, device=h.device)
            for begin, end, weight in self._weight_tiles():
                _matmul(dz[:, begin:end], weight, out, begin > 0)
            self.grad_hidden[index] = out.to(self.grad_hidden.dtype)
        if self.grad_weight is not None:
            _matmul(dz.t(), h, self.grad_weight, self._weight_written)
            self._weight_written = True

    def _add_small(self, index: torch.Tensor, dz: torch.Tensor) -> None:
        if self.grad_bias is not None:
            self.grad_bias += dz.sum(0, dtype=torch.float32)
        norms = self.problem.row_norms
        if norms is not None:
            norms[index] = torch.linalg.vector_norm(dz, dim=1, dtype=torch.float32)
        for probe in self.problem.probes:
            out = torch.empty(dz.shape[0], probe.out.shape[1], dtype=torch.float32, device=dz.device)
            _matmul(dz, probe.projection.to(dz.dtype).t(), out)
            probe.out[index] = out

    def add_live(self, index: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, live: torch.Tensor) -> None:
        """Do the same as `add`, but skip rows that are not `live`, which are zeros. Needs no synchronisation."""
        self._add_small(index, dz)
        rows, count = _live_first(live)
        if self.grad_hidden is not None:
            if self._live_weight is None:
                self._live_weight = self.weight.to(dz.dtype).contiguous()
            _live_grad_hidden(dz, self._live_weight, rows, count, index, self.grad_hidden)
        if self.grad_weight is not None:
            h = h.to(dz.dtype).contiguous()
            _live_grad_weight(dz, h, rows, count, self.grad_weight, self._weight_written)
            self._weight_written = True

    def finish(self) -> list[torch.Tensor | None]:
        """Return [grad_hidden, grad_weight, grad_bias] in the dtypes of their tensors."""
        if self.grad_weight is not None and not self._weight_written:
            self.grad_weight.zero_()
        p = self.problem
        weight = None if self.grad_weight is None else self.grad_weight.to(p.weight.dtype)
        bias = None if self.grad_bias is None or p.bias is None else self.grad_bias.to(p.bias.dtype)
        return [self.grad_hidden, weight, bias]
