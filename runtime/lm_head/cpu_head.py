"""The lm_head on the CPU, in chunks of rows. The logits of a chunk are in a buffer that is reused.

The GEMM of the head computes the logits of a chunk. A row kernel replaces them by statistics or gradients, in
place. Gradient rows are collected at the front of the buffer until it is full; then the gradient GEMMs consume
them. So dW (vocab x hidden) is read and written once per full buffer, not once per chunk, and rows without
gradient do not enter a gradient GEMM.

The first buffer needs no extra memory: it uses the memory of dW (`dw_buffer`). There the logits are stored in
tiles of columns. dW is written tile by tile from the last to the first, so that it overwrites only tiles that
have been consumed.
"""

from collections.abc import Iterator
from typing import Any

import torch

from tokfuse.runtime.backends import kept_rows, row_args
from tokfuse.runtime.core import native
from tokfuse.runtime.lm_head.problem import HeadProblem

BLOCK = 2048  # kBlock of csrc/cpu/sweep.h
TILE_BYTES = 2 << 20  # size of the float32 copy of a 16-bit weight tile; it fits into the L2 or L3 cache


def rows_in_budget(p: HeadProblem) -> int:
    """Return the number of rows of logits, with their hidden states, that fit into the budget."""
    return max(1, p.memory_budget // (4 * (p.vocab + 2 * p.hidden.shape[1] + 16)))


def workspace_rows(p: HeadProblem, rows: int) -> int:
    """Return the number of rows of the workspace: the rows that fit, or equal parts if few rows would be left.

    A GEMM of many rows is faster per row, and a GEMM of few rows still reads the whole weight. 512 rows with a
    budget of 341 took 4% longer as 256 + 256 than as 341 + 171 (best of 11 on a busy machine). An eighth of
    the budget is left for the other memory of GEMMs and row kernels (4 MiB there).
    """
    limit = rows_in_budget(p)
    parts = max(1, -(-rows // limit))
    equal = max(1, -(-rows // parts))
    left_over = rows - (parts - 1) * limit
    return max(equal, limit * 7 // 8) if parts > 1 and 2 * left_over >= limit else equal


def needed_rows(p: HeadProblem) -> torch.Tensor | None:
    """Return the indices of the tokens that need a forward, or None for all tokens."""
    mask = p.options.mask
    return None if mask is None or bool(mask.all()) else mask.nonzero().squeeze(1)


class LogitsBuffer:
    """float32 logits (rows, vocab) in tiles of `tile` columns. A single tile is the row-major layout."""

    def __init__(self, storage: torch.Tensor, rows: int, vocab: int, tile: int) -> None:
        self.storage, self.rows, self.vocab, self.tile = storage, rows, vocab, tile

    @staticmethod
    def workspace(rows: int, vocab: int) -> "LogitsBuffer":
        """Return a buffer with its own memory, in one tile."""
        return LogitsBuffer(native.empty((rows * vocab,)), rows, vocab, vocab)

    @staticmethod
    def for_statistics(rows: int, vocab: int) -> "LogitsBuffer":
        """Return a buffer with its own memory for logits that no gradient GEMM reads, in tiles for `Head.logits`."""
        return LogitsBuffer(native.empty((rows * tiled_columns(vocab),)), rows, vocab, batch_tile(vocab))

    def of_rows(self, rows: int) -> "LogitsBuffer":
        """Return the first `rows` rows, fewer than there are, laid out anew; the contents are undefined."""
        return LogitsBuffer(self.storage, rows, self.vocab, self.tile)

    def whole_tiles(self) -> torch.Tensor:
        """Return all full tiles, (tiles, rows, tile)."""
        count = self.vocab // self.tile
        return self.storage[: count * self.rows * self.tile].view(count, self.rows, self.tile)

    def tiles(self, start: int, stop: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield (first column, end column, logits of rows [start, stop)) of every tile."""
        for k, begin in enumerate(range(0, self.vocab, self.tile)):
            end = min(begin + self.tile, self.vocab)
            whole = self.storage[k * self.rows * self.tile :][: self.rows * self.tile]
            yield begin, end, whole.view(self.rows, self.tile)[start:stop, : end - begin]

    def logits_args(self, p: HeadProblem, start: int, stop: int, index: torch.Tensor) -> Any:
        """Return the LogitsArgs of rows [start, stop). Row start + i belongs to token index[i].

        The mask is omitted, because masked tokens never enter a buffer.
        """
        tiled = self.tile < self.vocab
        return row_args.logits_args(
            native.loaded(),
            self.first_tile(start, stop),
            p.target,
            p.options._replace(mask=None),
            index=index,
            vocab=p.vocab,
            tile=self.tile if tiled else 0,
            tile_stride=self.rows * self.tile if tiled else 0,
        )

    def grad_rows(self, start: int, stop: int, grad_tokens: torch.Tensor | None = None) -> Any:
        """Return GradRows that overwrite the logits of rows [start, stop)."""
        return row_args.grad_rows(native.loaded(), self.first_tile(start, stop), grad_tokens)

    def compact(self, live: torch.Tensor) -> None:
        """Move the rows where `live` is True to the front, in order."""
        if bool(live.all()):
            return
        places = live.nonzero().flatten().tolist()
        for _, _, tile in self.tiles(0, self.rows):
            for place, row in enumerate(places):
                if place != row:
                    tile[place].copy_(tile[row])

    def first_tile(self, start: int, stop: int) -> torch.Tensor:
        """Return rows [start, stop) of the first tile. A single tile contains all columns."""
        return self.storage[: self.rows * self.tile].view(self.rows, self.tile)[start:stop]


# Columns of a tile in dw_buffer: a multiple of the row kernels' blocks, and wide enough for the GEMM (with 2048
# columns the GEMMs of 128 rows take 5% longer). With R rows, only the first R / (hidden - R) tiles overlap the
# tile of dW that is written from them. These are copied first.
DW_TILE = 4096


def batch_tile(vocab: int) -> int:
    """Return the columns of a tile: 2 to 8 blocks of the row kernels, with the fewest columns beyond the vocabulary."""
    blocks = -(-vocab // BLOCK)
    return vocab if blocks < 16 else BLOCK * min(range(2, 9), key=lambda k: -(-blocks // k) * k)


def tiled_columns(vocab: int) -> int:
    """Return the columns of all tiles of `batch_tile(vocab)` columns."""
    tile = batch_tile(vocab)
    return -(-vocab // tile) * tile


def dw_buffer(weight_gradient: torch.Tensor, rows: int, at_least: int) -> LogitsBuffer | None:
    """Return a buffer for up to `rows` rows of logits in the memory of an uninitialised float32 dW (vocab, hidden).

    It has at most `hidden` rows. Then tile k of the logits starts before tile k of dW ends, and after tile
    k - 1 of the logits. So writing dW from the last tile to the first overwrites no tile that is still needed.
    Return None if fewer than `at_least` rows fit.
    """
    vocab, hidden = weight_gradient.shape
    tiles = -(-vocab // DW_TILE)
    rows = min(rows, hidden, vocab * hidden // (tiles * DW_TILE))
    if rows < at_least or vocab <= DW_TILE:
        return None
    return LogitsBuffer(weight_gradient.view(-1), rows, vocab, DW_TILE)


class Head:
    """The GEMMs of the lm_head, in float32 for every dtype of its tensors."""

    def __init__(self, p: HeadProblem) -> None:
        self.problem = p
        self.weight = p.weight.detach()
        self.hidden = p.hidden.detach()
        self.bias = None if p.bias is None else p.bias.detach().float()
        if self.weight.dtype != torch.float32:
            tile = max(1, min(p.vocab, TILE_BYTES // (4 * self.weight.shape[1])))
            self.tile = torch.empty(tile, self.weight.shape[1], dtype=torch.float32, device="cpu")

    def rows_of_hidden(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the hidden states of the tokens, in float32."""
        if tokens.shape[0] == self.problem.tokens and self.hidden.dtype == torch.float32:
            first, last = int(tokens[0]), int(tokens[-1])
            if first == 0 and last == tokens.shape[0] - 1 and bool((tokens.diff() == 1).all()):
                return self.hidden  # all tokens in order need no gather
        return self.hidden[tokens].float()

    def _weight_tiles(self, begin: int, end: int) -> Iterator[tuple[int, int, torch.Tensor]]:
        """Yield the weight rows [begin, end) in float32. For 16-bit heads they are cache-sized copies."""
        if self.weight.dtype == torch.float32:
            yield begin, end, self.weight[begin:end]
            return
        for first in range(begin, end, self.tile.shape[0]):
            last = min(first + self.tile.shape[0], end)
            tile = self.tile[: last - first]
            tile.copy_(self.weight[first:last])
            yield first, last, tile

    def logits(self, hidden: torch.Tensor, buffer: LogitsBuffer, start: int) -> None:
        """Write hidden @ weight.T + bias to the buffer, from row `start` on."""
        done = self._logits_of_whole_tiles(hidden, buffer)
        for begin, end, out in buffer.tiles(start, start + hidden.shape[0]):
            if begin >= done:
                for first, last, weight in self._weight_tiles(begin, end):
                    torch.mm(hidden, weight.t(), out=out[:, first - begin : last - begin])
            if self.bias is not None:
                out += self.bias[begin:end]

    def _logits_of_whole_tiles(self, hidden: torch.Tensor, buffer: LogitsBuffer) -> int:
        """Write the logits of all full tiles in one batched GEMM if the rows fill the buffer. Return the columns done.

        MKL gives each thread whole tiles. It splits one large GEMM by rows, and each thread then packs the whole
        weight: with two threads, 256 rows x 49152 take 14% longer, and 512 rows as a GEMM per tile 7%.
        """
        count = buffer.vocab // buffer.tile
        if not (self._batches(buffer, hidden.shape[0]) and hidden.is_contiguous()):
            return 0
        weight = self.weight[: count * buffer.tile].view(count, buffer.tile, -1)
        torch.bmm(hidden.expand(count, -1, -1), weight.transpose(1, 2), out=buffer.whole_tiles())
        return count * buffer.tile

    def _batches(self, buffer: LogitsBuffer, rows: int) -> bool:
        """Return whether the full tiles of a buffer with `rows` rows can be operands of one batched GEMM."""
        plain = self.weight.dtype == torch.float32 and self.weight.is_contiguous()
        return plain and buffer.vocab // buffer.tile > 1 and rows == buffer.rows

    def logits_of(self, tokens: torch.Tensor, buffer: LogitsBuffer, start: int) -> None:
        """Write the logits of some tokens to the buffer, from row `start` on: -inf outside their kept ids."""
        self.logits(self.rows_of_hidden(tokens), buffer, start)
        kept = self.problem.kept
        if kept is None:
            return
        row, ids = kept_rows.entries(kept, tokens, int(kept_rows.counts_of(kept, tokens).sum()))
        for begin, end, tile in buffer.tiles(start, start + tokens.shape[0]):
            inside = (ids >= begin) & (ids < end)
            kept_rows.keep_only_(tile, (row[inside], ids[inside] - begin))

    def grad_hidden(self, buffer: LogitsBuffer, rows: int) -> torch.Tensor:
        """Return gradient rows @ weight, (rows, hidden)."""
        out, done = self._grad_hidden_of_pairs(buffer, rows)
        for begin, end, dz in buffer.tiles(0, rows):
            if begin < done:
                continue
            for first, last, weight in self._weight_tiles(begin, end):
                part = dz[:, first - begin : last - begin]
                if done > 0 or first > 0:
                    out.addmm_(part, weight)
                else:
                    torch.mm(part, weight, out=out)  # with out=, autocast does not round the operands
        return out

    def _grad_hidden_of_pairs(self, buffer: LogitsBuffer, rows: int) -> tuple[torch.Tensor, int]:
        """Return the sum over pairs of full tiles, each pair as one batched GEMM, and the number of columns.

        With two threads this takes as long as one GEMM over all columns; a GEMM per tile takes 4% longer.
        """
        pairs = buffer.vocab // buffer.tile // 2 if self._batches(buffer, rows) else 0
        if pairs == 0:
            return torch.empty(rows, self.weight.shape[1], dtype=torch.float32, device="cpu"), 0
        tiles = buffer.whole_tiles()
        weight = self.weight[: tiles.shape[0] * buffer.tile].view(tiles.shape[0], buffer.tile, -1)
        sums = torch.empty(2, rows, self.weight.shape[1], dtype=torch.float32, device="cpu")
        torch.bmm(tiles[:2], weight[:2], out=sums)
        for k in range(2, 2 * pairs, 2):
            sums.baddbmm_(tiles[k : k + 2], weight[k : k + 2])
        return sums[0].add_(sums[1]), 2 * pairs * buffer.tile


class HeadGradients:
    """The requested gradients of hidden, weight and bias. dW accumulates in float32."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        p = head.problem
        self.head = head
        self.hidden = torch.zeros(p.hidden.shape, dtype=p.hidden.dtype, device="cpu") if needs[0] else None
        self.weight: torch.Tensor | None = None
        if needs[1]:
            self.weight = native.empty(p.weight.shape)
        self.bias = torch.zeros(p.vocab, dtype=torch.float32, device="cpu") if needs[2] else None
        self._weight_written = False

    def add(self, buffer: LogitsBuffer, tokens: torch.Tensor) -> None:
        """Add the first len(tokens) gradient rows of the buffer to the gradients."""
        rows = tokens.shape[0]
        if rows == 0:
            return
        if self.hidden is not None:
            self.hidden[tokens] = self.head.grad_hidden(buffer, rows).to(self.hidden.dtype)
        if self.bias is not None:
            for begin, end, dz in buffer.tiles(0, rows):
                self.bias[begin:end] += dz.sum(0)
        norms = self.head.problem.row_norms
        if norms is not None:
            tiles = [torch.linalg.vector_norm(dz, dim=1) for _, _, dz in buffer.tiles(0, rows)]
            norms[tokens] = torch.linalg.vector_norm(torch.stack(tiles), dim=0)
        for probe in self.head.problem.probes:
            tiles = [dz @ probe.projection[:, begin:end].t() for begin, end, dz in buffer.tiles(0, rows)]
            probe.out[tokens] = torch.stack(tiles).sum(0)
        if self.weight is not None:
            self._add_weight(self.weight, buffer, self.head.rows_of_hidden(tokens))

    def _add_weight(self, grad: torch.Tensor, buffer: LogitsBuffer, h: torch.Tensor) -> None:
        inside = buffer.storage.data_ptr() == grad.data_ptr()
        spare = native.empty((h.shape[0], buffer.tile)) if inside else None
        for begin, end, dz in reversed(list(buffer.tiles(0, h.shape[0]))):
            out = grad[begin:end]
            if spare is not None and overlap(out, dz):
                dz = spare[:, : end - begin].copy_(dz)
            if self._weight_written:
                out.addmm_(dz.t(), h)
            else:
                torch.mm(dz.t(), h, out=out)
        self._weight_written = True

    def finish(self) -> list[torch.Tensor | None]:
        """Return [grad_hidden, grad_weight, grad_bias] in the dtypes of their tensors."""
        if self.weight is not None and not self._weight_written:
            self.weight.zero_()
        p = self.head.problem
        weight = None if self.weight is None else self.weight.to(p.weight.dtype)
        bias = None if self.bias is None or p.bias is None else self.bias.to(p.bias.dtype)
        return [self.hidden, weight, bias]


def overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Return True if the memory ranges of two tensors overlap."""
    spans = []
    for x in (a, b):
        last = sum((n - 1) * s for n, s in zip(x.shape, x.stride(), strict=True))
        spans.append((x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()))
    return spans[0][0] < spans[1][1] and spans[1][0] < spans[0][1]


class GradientPool:
    """A buffer that collects gradient rows at its front. The logits of the next chunk follow them."""

    def __init__(self, buffer: LogitsBuffer, gradients: HeadGradients) -> None:
        self.buffer, self.gradients = buffer, gradients
        self.tokens = torch.empty(buffer.rows, dtype=torch.int64, device="cpu")
        self.used = 0

    def free(self) -> int:
        """Return the number of free rows for the next chunk, or 0 if they are too few for an efficient GEMM."""
        free = self.buffer.rows - self.used
        return free if free >= max(1, self.buffer.rows // 4) else 0

    def flush(self) -> None:
        """Run the gradient GEMMs on the collected rows, and empty the pool."""
        self.gradients.add(self.buffer, self.tokens[: self.used])
        self.used = 0
