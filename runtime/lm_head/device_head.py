"""The lm_head in chunks on an accelerator: torch's GEMMs around row kernels, CUDA's or Triton's.

As runtime/lm_head/cpu_head.py does on the CPU, logits exist some rows at a time: GEMM, row kernel,
gradient GEMMs. Logits are float32. Their gradient overwrites them for a float32 head; for a 16-bit
head it is rounded once to the head's dtype, in another buffer, because tensor cores take no mixed
operands; products accumulate in float32 and dW is a float32 sum over the chunks.

A chunk is one GEMM and one row kernel for statistics, and one GEMM more for each of grad_hidden and
grad_weight; its workspace is 4 bytes per logit, 6 for a 16-bit head.

Row classes. On the CPU the rows that turn out to carry gradient are collected as they appear; here
that would make the host wait for every chunk. So rows are sorted by class on the device, before the
first GEMM, and the host reads the sizes of the classes, 16 bytes: the one synchronisation of a
call. Under CUDA-graph capture nothing can be read: all rows are computed, and those of the lower
classes contribute exact zeros.

What the clip stops is known only after a chunk's row kernel, and the size of a GEMM of torch's is
an argument of its launch. By default such rows enter with exact zeros. With `compact_clipped` the
two gradient GEMMs of the first class are kernels of ours (triton_kernels/head_gradient.py) that
find the live rows, and how many they are, in device memory: no wait, and a CUDA graph holds them.
They are no faster than cuBLAS per row, so it is the caller's to say that many rows are clipped.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch

from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.lm_head.problem import HeadProblem

_live_first = triton_backend.launcher("head_gradient", "live_first")
_live_grad_hidden = triton_backend.launcher("head_gradient", "grad_hidden")
_live_grad_weight = triton_backend.launcher("head_gradient", "grad_weight")


def check_compact(op: str, p: HeadProblem) -> None:
    """Refuse `compact_clipped` where its kernels cannot run."""
    reason = triton_backend.why_unusable() if p.compact_clipped else None
    if reason is not None:
        raise refuse(
            op,
            "compact_clipped",
            "False where Triton kernels cannot run",
            reason,
            "Leave it out: clipped rows enter with zeros.",
        )


class RowClasses(NamedTuple):
    """Tokens in the order of their class, each class in token order."""

    order: torch.Tensor
    """(tokens,) int64: those with gradient, then those with statistics only, then the rest."""
    gradient: int
    forward: int
    """Tokens of the first class, and of the first two."""
    keep: torch.Tensor | None
    """(tokens,) bool where rows outside the two classes are computed too (capture), else None."""


def capturing(x: torch.Tensor) -> bool:
    """True while a CUDA graph is recorded: no value can reach the host."""
    return x.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def classify(p: HeadProblem, needed: torch.Tensor | None, gradient: torch.Tensor | None) -> RowClasses:
    """Rows by class; None: every row, and every needed row. Reads two numbers from the device."""
    tokens, device = p.tokens, p.hidden.device
    if needed is None and gradient is None:
        return RowClasses(torch.arange(tokens, device=device), tokens, tokens, None)
    if needed is None:
        needed = torch.ones(tokens, dtype=torch.bool, device=device)
    first = needed if gradient is None else needed & gradient
    if capturing(needed):
        return RowClasses(torch.arange(tokens, device=device), tokens, tokens, needed)
    rank = 2 - needed.to(torch.int8) - first.to(torch.int8)
    order = torch.argsort(rank, stable=True)
    counts = torch.stack([first.sum(), needed.sum()]).tolist()
    return RowClasses(order, counts[0], counts[1], None)


def _matmul(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor, accumulate: bool = False) -> None:
    """out (float32) = or += a @ b. With out= autocast does not round the operands."""
    if a.dtype == out.dtype or out.device.type == "cpu":  # the CPU has no mixed product
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
    """Chunks of logits, and the gradients that are made of theirs."""

    def __init__(self, p: HeadProblem, needs: tuple[bool, bool, bool], rows: RowClasses) -> None:
        self.problem, self.rows = p, rows
        self.hidden, self.weight = p.hidden.detach(), p.weight.detach()
        self.bias = None if p.bias is None else p.bias.detach().float()
        device = p.hidden.device
        # On the CPU, where the interpreter runs, a 16-bit GEMM is a hundred times slower.
        self.mixed = p.hidden.dtype != torch.float32 and device.type != "cpu"
        self.grad_hidden: torch.Tensor | None = None
        if needs[0]:  # rows of unit stride, whatever the strides of hidden
            self.grad_hidden = self.hidden.new_zeros(self.hidden.shape)
        self.grad_weight: torch.Tensor | None = None
        if needs[1]:
            self.grad_weight = torch.empty(p.weight.shape, dtype=torch.float32, device=device)
        self.grad_bias = torch.zeros(p.vocab, device=device) if needs[2] else None
        self._weight_written = False
        # Rows begin on whole vectors, so that a row's sums do not depend on its place.
        self._stride = -(-p.vocab // 16) * 16
        self._logits: torch.Tensor | None = None
        self._dz: torch.Tensor | None = None
        self._live_weight: torch.Tensor | None = None  # of dz's dtype (the CPU's is float32)

    def rows_in_budget(self) -> int:
        """Rows of logits, their gradient and hidden states that the workspace holds."""
        p = self.problem
        wide, narrow = 4, 2 if self.mixed else 4
        buffers = wide + (narrow if self.mixed else 0)
        per_row = self._stride * buffers + 8 * p.hidden.shape[1] + 64
        return max(1, p.memory_budget // per_row)

    def chunks(self, start: int, stop: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(tokens, hidden states) of rows [start, stop) of the order, what the budget holds."""
        parts = max(1, -(-(stop - start) // self.rows_in_budget()))
        size = max(1, -(-(stop - start) // parts))
        for begin in range(start, stop, size):
            index = self.rows.order[begin : min(begin + size, stop)]
            h = self.hidden[index]
            if self.rows.keep is not None:  # a masked row may hold NaN, and 0 * NaN is one
                h = torch.where(self.rows.keep[index, None], h, 0.0)
            yield index, h

    def _buffer(self, kept: torch.Tensor | None, rows: int, dtype: torch.dtype) -> torch.Tensor:
        if kept is None or kept.shape[0] < rows:
            kept = torch.empty(rows, self._stride, dtype=dtype, device=self.hidden.device)
        return kept

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """(rows, vocab) float32 logits of hidden states, in a buffer that the next call reuses."""
        self._logits = self._buffer(self._logits, h.shape[0], torch.float32)
        out = self._logits[: h.shape[0], : self.problem.vocab]
        _matmul(h, self.weight.t(), out)
        if self.bias is not None:
            out += self.bias
        return out

    def gradient_like(self, logits: torch.Tensor) -> torch.Tensor:
        """Where a row kernel writes the gradient of `logits`: over them, or in 16 bits beside."""
        if not self.mixed:
            return logits
        self._dz = self._buffer(self._dz, logits.shape[0], self.hidden.dtype)
        return self._dz[: logits.shape[0], : self.problem.vocab]

    def add(self, index: torch.Tensor, h: torch.Tensor, dz: torch.Tensor) -> None:
        """Consume the gradient rows of tokens `index`."""
        self._add_small(index, dz)
        if self.grad_hidden is not None:
            out = torch.empty(h.shape, dtype=torch.float32, device=h.device)
            _matmul(dz, self.weight, out)
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

    def add_live(self, index: torch.Tensor, h: torch.Tensor, dz: torch.Tensor, live: torch.Tensor) -> None:
        """`add` whose GEMMs skip the rows that are not `live`, which hold zeros; never waits."""
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
        """[grad_hidden, grad_weight, grad_bias] in the dtypes of their tensors."""
        if self.grad_weight is not None and not self._weight_written:
            self.grad_weight.zero_()
        dtype = self.problem.weight.dtype
        weight = None if self.grad_weight is None else self.grad_weight.to(dtype)
        bias = None if self.grad_bias is None else self.grad_bias.to(dtype)
        return [self.grad_hidden, weight, bias]
