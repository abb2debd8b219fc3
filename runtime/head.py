"""The lm_head in chunks: logits exist a few rows at a time, in one workspace that is reused.

Rows of one chunk go through the head's GEMM, a row kernel turns them into statistics or gradients in
place, and gradient rows collect at the front of the workspace until it is full. Then two GEMMs consume
them. So dW (vocab x hidden) is read and written once per full workspace and not once per chunk, and rows
without gradient enter no gradient GEMM.
"""

import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from tokfuse.runtime import checks, native
from tokfuse.runtime.errors import refuse
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.ops.token_stats import LogitOptions

MIN_BUDGET = 64 << 20
TILE_BYTES = 2 << 20  # float32 copy of a bfloat16 / float16 weight tile; stays in the L2 or L3 cache


class HeadProblem(NamedTuple):
    """Checked arguments of an op that goes through the lm_head."""

    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    options: LogitOptions
    memory_budget: int

    @property
    def tokens(self) -> int:
        """Number of packed tokens."""
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.weight.shape[0]


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: LogitOptions,
    memory_budget: int | None,
) -> HeadProblem:
    """Shapes, dtypes, devices; fills in the default budget."""
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    if weight is None:
        raise refuse(op, "weight", "given with hidden=", "None", "Pass lm_head.weight.")
    checks.check_matrix(op, "weight", weight, "(vocab, hidden)")
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise refuse(op, "weight", f"of shape (vocab, hidden) with hidden = {hidden.shape[1]}",
                     f"shape {tuple(weight.shape)}", "Pass lm_head.weight as it is.")  # fmt: skip
    if weight.dtype != hidden.dtype:
        raise refuse(op, "weight", f"{hidden.dtype} like hidden", str(weight.dtype),
                     "Cast one of them.")  # fmt: skip
    checks.check_device(op, "weight", weight, hidden.device)
    if bias is not None:
        checks.require_tensor(op, "bias", bias)
        if bias.shape != weight.shape[:1] or bias.dtype != weight.dtype:
            raise refuse(op, "bias", f"({weight.shape[0]},) {weight.dtype} like weight",
                         f"{tuple(bias.shape)} {bias.dtype}", "Pass lm_head.bias.")  # fmt: skip
        checks.check_device(op, "bias", bias, hidden.device)
    checks.check_target(op, target, hidden.shape[0], hidden.device)
    stats_op.check_options(op, hidden.shape[0], hidden.device, options)
    if memory_budget is None:
        # A sixth of the float32 weight gradient keeps dW traffic small against the GEMMs.
        memory_budget = max(MIN_BUDGET, weight.numel() * 4 // 6)
    elif memory_budget < 1:
        raise refuse(op, "memory_budget", "a number of bytes >= 1", repr(memory_budget),
                     "Omit it for the default.")  # fmt: skip
    return HeadProblem(hidden, weight, bias, target, options, memory_budget)


def workspace_rows(p: HeadProblem, rows: int) -> int:
    """Rows of the workspace: what the budget holds, in equal parts of the rows to do."""
    per_row = 4 * (p.vocab + 2 * p.hidden.shape[1] + 16)
    limit = max(1, p.memory_budget // per_row)
    parts = max(1, -(-rows // limit))
    return max(1, -(-rows // parts))


def needed_rows(p: HeadProblem) -> torch.Tensor | None:
    """Token ids that need a forward, or None for all of them."""
    mask = p.options.mask
    return None if mask is None or bool(mask.all()) else mask.nonzero().squeeze(1)


# One workspace per thread, kept between calls: on fresh pages the first write of 50 MB costs 7 to 20 ms,
# as much as the row kernels that use it.
_LOCAL = threading.local()


def _workspace(rows: int, vocab: int) -> torch.Tensor:
    """(rows, vocab) float32 from this thread's workspace, which grows but does not shrink."""
    kept: torch.Tensor | None = getattr(_LOCAL, "workspace", None)
    if kept is None or kept.numel() < rows * vocab:
        _LOCAL.workspace = None  # freed before the larger one exists
        kept = _LOCAL.workspace = native.advise_huge_pages(torch.empty(rows * vocab))
    return kept[: rows * vocab].view(rows, vocab)


def release_workspace() -> None:
    """Free the head workspace that this thread keeps between calls (64 MiB by default)."""
    _LOCAL.workspace = None


class Head:
    """GEMMs of the lm_head in float32, whatever the dtype of its tensors."""

    def __init__(self, p: HeadProblem, rows: int) -> None:
        self.problem = p
        self.weight = p.weight.detach()
        self.hidden = p.hidden.detach()
        self.bias = None if p.bias is None else p.bias.detach().float()
        self.is_float32 = self.weight.dtype == torch.float32
        self.workspace = _workspace(rows, p.vocab)
        if not self.is_float32:
            tile = max(1, min(p.vocab, TILE_BYTES // (4 * self.weight.shape[1])))
            self.tile = torch.empty(tile, self.weight.shape[1])

    def rows_of_hidden(self, index: torch.Tensor | None, start: int, stop: int) -> torch.Tensor:
        """Rows of the hidden states in float32, by position or by index[start:stop]."""
        rows = self.hidden[start:stop] if index is None else self.hidden[index[start:stop]]
        return rows.float()

    def _tiles(self) -> Iterator[tuple[int, int, torch.Tensor]]:
        for begin in range(0, self.problem.vocab, self.tile.shape[0]):
            end = min(begin + self.tile.shape[0], self.problem.vocab)
            tile = self.tile[: end - begin]
            tile.copy_(self.weight[begin:end])
            yield begin, end, tile

    def logits(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out (rows, vocab) = hidden @ weight.T + bias."""
        if self.is_float32:
            torch.mm(hidden, self.weight.t(), out=out)
        else:
            for begin, end, tile in self._tiles():
                torch.mm(hidden, tile.t(), out=out[:, begin:end])
        if self.bias is not None:
            out += self.bias

    def grad_hidden(self, dz: torch.Tensor) -> torch.Tensor:
        """(rows, hidden) = dz @ weight."""
        if self.is_float32:  # out=: autocast would compute torch.mm(dz, weight) in 16 bits
            return torch.mm(dz, self.weight, out=torch.empty(dz.shape[0], self.weight.shape[1]))
        out = torch.zeros(dz.shape[0], self.weight.shape[1])
        for begin, end, tile in self._tiles():
            out.addmm_(dz[:, begin:end], tile)
        return out


class HeadGradients:
    """Gradients of hidden, weight and bias, each only where asked for; dW accumulated in float32."""

    def __init__(self, head: Head, needs: tuple[bool, bool, bool]) -> None:
        p = head.problem
        self.head = head
        self.hidden = torch.zeros(p.hidden.shape, dtype=p.hidden.dtype) if needs[0] else None
        self.weight: torch.Tensor | None = None
        if needs[1]:
            self.weight = native.advise_huge_pages(torch.empty(p.weight.shape))
        self.bias = torch.zeros(p.vocab, dtype=torch.float32) if needs[2] else None
        self._weight_written = False

    def add(self, dz: torch.Tensor, tokens: torch.Tensor) -> None:
        """Consume gradient rows dz (n, vocab) of the tokens (n,)."""
        if dz.shape[0] == 0:
            return
        if self.hidden is not None:
            self.hidden[tokens] = self.head.grad_hidden(dz).to(self.hidden.dtype)
        if self.weight is not None:
            h = self.head.hidden[tokens].float()
            if self._weight_written:
                self.weight.addmm_(dz.t(), h)
            else:
                torch.mm(dz.t(), h, out=self.weight)
            self._weight_written = True
        if self.bias is not None:
            self.bias += dz.sum(0)

    def finish(self) -> list[torch.Tensor | None]:
        """[grad_hidden, grad_weight, grad_bias] in the dtypes of their tensors."""
        if self.weight is not None and not self._weight_written:
            self.weight.zero_()
        dtype = self.head.problem.weight.dtype
        weight = None if self.weight is None else self.weight.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return [self.hidden, weight, bias]


class GradientPool:
    """The workspace: gradient rows collect at its front, the next chunk's logits follow them."""

    def __init__(self, head: Head, gradients: HeadGradients) -> None:
        self.workspace, self.gradients = head.workspace, gradients
        self.capacity = head.workspace.shape[0]
        self.tokens = torch.empty(self.capacity, dtype=torch.int64)
        self.used = 0

    def free(self) -> int:
        """Rows free for the next chunk; consumes the collected rows first when few are left."""
        if self.capacity - self.used < max(1, self.capacity // 4):
            self.flush()
        return self.capacity - self.used

    def flush(self) -> None:
        """Run the gradient GEMMs on what has collected."""
        self.gradients.add(self.workspace[: self.used], self.tokens[: self.used])
        self.used = 0
