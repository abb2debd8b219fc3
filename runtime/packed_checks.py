"""Argument checks of the ops over packed vectors: shapes, dtypes, devices, ranges, cu_seqlens.

Checks that need the values of a tensor run for CPU tensors, where they cost no synchronisation; for
other devices only when `TOKFUSE_CHECK=1` is set.
"""

import math
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tokfuse.runtime import native
from tokfuse.runtime.errors import refuse

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTS = frozenset({torch.int32, torch.int64})
BOOL = frozenset({torch.bool})
Runs = dict[str, Callable[..., Any]]  # backend -> implementation of one op


def may_read(tensor: torch.Tensor) -> bool:
    """True when the values of `tensor` may be read on the host here.

    Not inside a compiled graph, which reading would cut; the native kernels check again.
    """
    if torch.compiler.is_compiling():
        return False
    return tensor.device.type == "cpu" or os.environ.get("TOKFUSE_CHECK", "0") not in ("", "0")


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """Dtype names in one string."""
    return " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


@dataclass(frozen=True)
class Rows:
    """What a vector has to match: the size, whose size it is, and the device."""

    size: int
    partner: str
    device: torch.device


def check_vector(
    op: str,
    name: str,
    value: object,
    rows: Rows | None = None,
    dtypes: frozenset[torch.dtype] = FLOATS,
) -> torch.Tensor:
    """A 1-D tensor of one of `dtypes` that matches `rows`."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}.")
    if value.dim() != 1 or (rows is not None and value.shape[0] != rows.size):
        want = "a 1-D tensor"
        if rows is not None:
            want = f"of shape ({rows.size},) to match {rows.partner}"
        next_step = "Pass the packed vector, without padding."
        raise refuse(op, name, want, f"shape {tuple(value.shape)}", next_step)
    if value.dtype not in dtypes:
        dtype = str(value.dtype).removeprefix("torch.")
        raise refuse(op, name, f"of dtype {names_of(dtypes)}", dtype, "Convert it first.")
    if rows is not None and value.device != rows.device:
        where = f"on {rows.device}"
        raise refuse(op, name, where, f"a tensor on {value.device}", "Move it with .to(device).")
    return value


def check_optional(
    op: str,
    name: str,
    value: object,
    rows: Rows | None = None,
    dtypes: frozenset[torch.dtype] = FLOATS,
) -> None:
    """`check_vector` unless the value is None."""
    if value is not None:
        check_vector(op, name, value, rows, dtypes)


def check_cu_seqlens(
    op: str, value: object, num_tokens: int, device: torch.device, name: str = "cu_seqlens"
) -> int:
    """(seqs + 1,) int32, starts at 0, never decreases, ends at the token count. Returns seqs."""
    cu_seqlens = check_vector(op, name, value, dtypes=frozenset({torch.int32}))
    if cu_seqlens.device != device:
        actual = f"a tensor on {cu_seqlens.device}"
        raise refuse(op, name, f"on {device}", actual, "Move it with .to(device).")
    num_seqs = cu_seqlens.shape[0] - 1
    if num_seqs < 0:
        raise refuse(op, name, "of shape (num_seqs + 1,)", "shape (0,)", "No sequence: pass [0].")
    if not may_read(cu_seqlens) or _borders_ok(cu_seqlens, num_seqs, num_tokens):
        return num_seqs
    if int(cu_seqlens[0]) != 0:
        raise refuse(op, name, "a prefix sum that starts at 0", int(cu_seqlens[0]), "Prepend 0.")
    if int(cu_seqlens[-1]) != num_tokens:
        want = f"a prefix sum that ends at num_tokens = {num_tokens}"
        raise refuse(op, name, want, int(cu_seqlens[-1]), "Pack exactly the tokens it counts.")
    if num_seqs > 0 and bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        place = int((cu_seqlens[1:] < cu_seqlens[:-1]).to(torch.uint8).argmax())
        actual = f"{int(cu_seqlens[place])} then {int(cu_seqlens[place + 1])} at {place}"
        raise refuse(op, name, "non-decreasing", actual, "Sequence lengths cannot be negative.")
    return num_seqs


def _borders_ok(cu_seqlens: torch.Tensor, num_seqs: int, num_tokens: int) -> bool:
    """The same test in one native call: five torch ops cost more than a scan over a small batch."""
    module = native.module()
    if module is None or cu_seqlens.device.type != "cpu" or not cu_seqlens.is_contiguous():
        return False
    return bool(module.cu_seqlens_ok(cu_seqlens.data_ptr(), num_seqs, num_tokens))


def check_choice(op: str, name: str, value: object, known: Iterable[str]) -> None:
    """One of the known names; the message lists them."""
    known = tuple(known)
    if value not in known:
        raise refuse(op, name, f"one of {', '.join(known)}", repr(value), "Choose a listed name.")


def check_number(
    op: str,
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
) -> float:
    """A finite number in [low, high], or (low, high] with `open_low`."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{op}: {name} must be a number; got {type(value).__name__}.")
    number = float(value)
    inside = number > low if open_low else number >= low
    if not (math.isfinite(number) and inside and number <= high):
        left = "(" if open_low else "["
        right = ")" if high == math.inf else "]"
        want = f"a finite number in {left}{low:g}, {high:g}{right}"
        raise refuse(op, name, want, value, "Check its unit and sign.")
    return number


def check_unused(op: str, used_by: str, **options: object) -> None:
    """Every option given here would be ignored, so it must be None."""
    for name, value in options.items():
        if value is not None:
            actual = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise refuse(op, name, f"left out with {used_by}", actual, "It would have no effect.")


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """float64 when any of the inputs is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def plain(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """Detached, contiguous, optionally converted; the tensor itself when it is so already."""
    if tensor is None:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous()
