"""Argument checks shared by the ops. Each refuses with one sentence and the actual value."""

import torch

from tokfuse.runtime.errors import refuse

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def require_tensor(op: str, name: str, value: object) -> torch.Tensor:
    """`value` as a tensor, or a TypeError that names it."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(
            f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}. Convert it first."
        )
    return value


def check_matrix(op: str, name: str, x: torch.Tensor, axes: str) -> None:
    """A two-dimensional floating tensor of a supported dtype."""
    require_tensor(op, name, x)
    if x.dim() != 2:
        raise refuse(
            op, name, f"two-dimensional {axes}", f"shape {tuple(x.shape)}",
            "Pack padded batches to (tokens, ...) first.",
        )  # fmt: skip
    if x.dtype not in LOGIT_DTYPES:
        raise refuse(
            op, name, "float32, bfloat16, float16 or float64", str(x.dtype),
            "Cast it to one of these.",
        )  # fmt: skip


def check_target(op: str, target: torch.Tensor, tokens: int, device: torch.device) -> None:
    """int64 token ids, one per row; their range is checked where the values are read."""
    require_tensor(op, "target", target)
    if target.shape != (tokens,):
        raise refuse(
            op, "target", f"of shape (tokens,) = ({tokens},) to match the rows",
            f"shape {tuple(target.shape)}", "Pass one token id per row.",
        )  # fmt: skip
    if target.dtype != torch.int64:
        raise refuse(op, "target", "int64", str(target.dtype), "Call target.long().")
    check_device(op, "target", target, device)


def check_device(op: str, name: str, x: torch.Tensor, device: torch.device) -> None:
    """Same device as the op's main input."""
    if x.device != device:
        raise refuse(
            op, name, f"on {device}, where the main input is", str(x.device),
            f"Call {name}.to({str(device)!r}).",
        )  # fmt: skip


def check_mask(op: str, mask: torch.Tensor | None, tokens: int, device: torch.device) -> None:
    """Bool, one per token; True counts."""
    if mask is None:
        return
    require_tensor(op, "mask", mask)
    if mask.shape != (tokens,):
        raise refuse(
            op, "mask", f"of shape (tokens,) = ({tokens},)", f"shape {tuple(mask.shape)}",
            "Pass one flag per token.",
        )  # fmt: skip
    if mask.dtype != torch.bool:
        raise refuse(op, "mask", "bool (True counts)", str(mask.dtype), "Call mask.bool().")
    check_device(op, "mask", mask, device)


def check_vector(
    op: str, name: str, x: torch.Tensor, size: int, like: str, device: torch.device
) -> None:
    """A floating vector of `size` elements that carries no gradient."""
    require_tensor(op, name, x)
    if x.shape != (size,):
        raise refuse(
            op, name, f"of shape ({like},) = ({size},)", f"shape {tuple(x.shape)}",
            f"Pass one value for each of the {like}.",
        )  # fmt: skip
    if not x.dtype.is_floating_point:
        raise refuse(op, name, "floating point", str(x.dtype), f"Call {name}.float().")
    check_device(op, name, x, device)
    if x.requires_grad and torch.is_grad_enabled():
        raise refuse(
            op, name, "free of gradient (the op does not differentiate it)", "requires_grad=True",
            f"Call {name}.detach().",
        )  # fmt: skip


def check_positive(op: str, name: str, value: float) -> None:
    """A finite number above zero."""
    if not 0.0 < value < float("inf"):
        raise refuse(op, name, "a finite number > 0", repr(value), "Omit it for the default.")


def check_cu_seqlens(op: str, cu_seqlens: torch.Tensor, tokens: int, device: torch.device) -> None:
    """Shape, dtype and device of (seqs + 1,) int32 offsets; on the CPU their values too."""
    require_tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dim() != 1 or cu_seqlens.numel() < 1:
        raise refuse(
            op, "cu_seqlens", "of shape (seqs + 1,)", f"shape {tuple(cu_seqlens.shape)}",
            "Pass the exclusive prefix sum of the sequence lengths.",
        )  # fmt: skip
    if cu_seqlens.dtype != torch.int32:
        raise refuse(op, "cu_seqlens", "int32", str(cu_seqlens.dtype), "Call cu_seqlens.int().")
    check_device(op, "cu_seqlens", cu_seqlens, device)
    if device.type != "cpu" or torch.compiler.is_compiling():
        return
    first, last = int(cu_seqlens[0]), int(cu_seqlens[-1])
    if first != 0:
        raise refuse(op, "cu_seqlens", "an offset list that starts at 0", f"{first} first",
                     "Prepend 0 to the running sum.")  # fmt: skip
    if last != tokens:
        raise refuse(op, "cu_seqlens", f"an offset list that ends at tokens = {tokens}",
                     f"{last} last", "Its last entry is the number of packed tokens.")  # fmt: skip
    if bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        raise refuse(op, "cu_seqlens", "non-decreasing", "a decreasing pair",
                     "Use the running sum of the lengths.")  # fmt: skip
