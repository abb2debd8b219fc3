"""Leading dimensions: tensors of shape (batch, length, ...) around an op over packed rows."""

import math
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.checks import is_integer, require_tensor
from tokfuse.runtime.core.errors import refuse


class Leading(NamedTuple):
    """The leading dimensions of a call, e.g. (batch, length). The rows of the op are their elements in order."""

    op: str
    shape: tuple[int, ...]
    """All dimensions of the main input except the last."""
    partner: str
    """Name of the main input, for messages."""

    def rows(self, name: str, x: torch.Tensor | None) -> torch.Tensor | None:
        """Return (..., columns) as (rows, columns). A contiguous tensor is not copied."""
        if x is None:
            return None
        if require_tensor(self.op, name, x).dim() < 1 or tuple(x.shape[:-1]) != self.shape:
            raise self._error(name, "(..., columns)", x)
        return x.reshape(math.prod(self.shape), x.shape[-1])

    def vector(self, name: str, x: Any) -> Any:
        """Return (...) as (rows,). Everything but a tensor is returned unchanged."""
        if not isinstance(x, torch.Tensor):
            return x
        if tuple(x.shape) != self.shape:
            raise self._error(name, "(...)", x)
        return x.reshape(-1)

    def unpack(self, x: Any) -> Any:
        """Return (rows, ...) with the leading dimensions in place of the rows, or every tensor of a record so."""
        if isinstance(x, tuple):
            return type(x)(*(self.unpack(value) for value in x))
        return None if x is None else x.view((*self.shape, *x.shape[1:]))

    def _error(self, name: str, form: str, x: torch.Tensor) -> ValueError:
        return refuse(
            self.op,
            name,
            f"of shape {form} with the leading dimensions {self.shape} of {self.partner}",
            f"shape {tuple(x.shape)}",
            "Give every token tensor the same leading dimensions, or pack all of them.",
        )


def without_ignored(
    op: str, target: torch.Tensor, mask: torch.Tensor | None, ignore_index: int | None, name: str = "ignore_index"
) -> torch.Tensor | None:
    """Return the mask without the rows whose target is `ignore_index`; `name` is how the caller wrote that argument."""
    if ignore_index is None:
        return mask
    if isinstance(ignore_index, bool) or not is_integer(ignore_index):
        raise refuse(op, name, "an int or None", repr(ignore_index), "Pass -100 for labels of transformers.")
    counts = target != ignore_index
    if mask is None:
        return counts
    if require_tensor(op, "mask", mask).shape != target.shape or mask.dtype != torch.bool:
        want = f"bool of shape {tuple(target.shape)} like target"
        raise refuse(op, "mask", want, f"{mask.dtype} of shape {tuple(mask.shape)}", "Pass mask.bool().")
    return counts & mask
