"""Vocabulary ids per token: argument checks, and the most likely ids of each row."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.checks import INTS, Rows, check_vector, is_integer, may_read, require_tensor
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions


class TokenIds(NamedTuple):
    """The ids of all tokens, concatenated."""

    flat: torch.Tensor
    """(ids,) int64, contiguous."""
    offsets: torch.Tensor
    """(tokens + 1,) int64: token t has the ids flat[offsets[t] : offsets[t + 1]]."""
    shape: torch.Size
    """Shape of the caller's ids, and of the log-probs that the op returns."""

    @staticmethod
    def of_matrix(ids: torch.Tensor) -> "TokenIds":
        """Return the ids of a (tokens, K) matrix."""
        tokens, width = ids.shape
        offsets = torch.arange(tokens + 1, device=ids.device) * width
        return TokenIds(ids.to(torch.int64).reshape(-1), offsets, ids.shape)


def check_csr(
    op: str, names: tuple[str, str], ids: torch.Tensor, offsets: torch.Tensor, tokens: int, device: torch.device
) -> TokenIds:
    """Check concatenated ids and their offsets; `names` are the names of the two arguments."""
    ids_name, offsets_name = names
    check_vector(op, ids_name, ids, None, INTS)
    _check_ids_device(op, ids_name, ids, device)
    check_vector(op, offsets_name, offsets, Rows(tokens + 1, "tokens + 1", device), INTS)
    if may_read(offsets):
        check_offsets(op, names, ids, offsets)
    return TokenIds(ids.to(torch.int64).contiguous(), offsets.to(torch.int64).contiguous(), ids.shape)


def check_offsets(op: str, names: tuple[str, str], ids: torch.Tensor, offsets: torch.Tensor) -> None:
    """Raise ValueError unless the offsets are a prefix sum up to the number of ids. Reads values."""
    ids_name, offsets_name = names
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != ids.shape[0]:
        want = f"a prefix sum from 0 to {ids_name}.numel() = {ids.shape[0]}"
        raise refuse(op, offsets_name, want, f"{first} to {last}", "Pass exactly the ids it counts.")
    if bool((offsets[1:] < offsets[:-1]).any()):
        raise refuse(op, offsets_name, "non-decreasing", "a decreasing pair", "Use the running sum of the sizes.")


def check_ids(
    op: str, ids: torch.Tensor, ids_offsets: torch.Tensor | None, tokens: int, device: torch.device
) -> TokenIds:
    """Check ids (tokens, K), or concatenated ids with offsets."""
    if ids_offsets is not None:
        return check_csr(op, ("ids", "ids_offsets"), ids, ids_offsets, tokens, device)
    require_tensor(op, "ids", ids)
    if ids.dim() != 2 or ids.shape[0] != tokens:
        raise refuse(
            op,
            "ids",
            f"of shape ({tokens}, K), or (ids,) with ids_offsets",
            f"shape {tuple(ids.shape)}",
            "Pad shorter rows with -1.",
        )
    _check_ids_device(op, "ids", ids, device)
    check_vector(op, "ids", ids.reshape(-1), None, INTS)
    return TokenIds.of_matrix(ids)


def _check_ids_device(op: str, name: str, ids: torch.Tensor, device: torch.device) -> None:
    if ids.device != device:
        raise refuse(op, name, f"on {device}, where the main input is", str(ids.device), "Move it with .to(device).")


def check_top_k(op: str, top_k: Any, vocab: int) -> int:
    """Return top_k as an int. Raise an error unless it is a whole number of columns; integers of numpy are."""
    if isinstance(top_k, bool) or not is_integer(top_k) or not 1 <= int(top_k) <= vocab:
        raise refuse(op, "top_k", f"a whole number in [1, vocab = {vocab}]", repr(top_k), "Pass how many ids you want.")
    return int(top_k)


def check_one_of(op: str, ids: Any, ids_offsets: Any, top_k: Any) -> None:
    """Refuse ids together with top_k, and offsets without ids."""
    if ids is not None and top_k is not None:
        raise refuse(op, "top_k", "left out with ids", repr(top_k), "Call twice for the log-probs at both.")
    if ids is None and ids_offsets is not None:
        raise refuse(op, "ids_offsets", "left out without ids", "a tensor", "It would have no effect.")


BIASED_ELEMENTS = 1 << 24
"""Logits per chunk if a bias is subtracted: 64 MiB in float32."""


def most_likely(logits: torch.Tensor, k: int, o: LogitOptions) -> torch.Tensor:
    """Return (tokens, k) int64: the ids of the k largest logits in descending order; -1 in masked rows.

    `torch.topk` chooses among equal logits. Softcap, scale and temperature do not change the order.
    """
    z = logits.detach()
    if o.bias_logits is None:
        top = z.topk(k).indices
    else:
        rows = max(1, BIASED_ELEMENTS // z.shape[1])
        parts = zip(z.split(rows), o.bias_logits.split(rows), strict=True)
        top = torch.cat([_biased(part, bias, o).topk(k).indices for part, bias in parts])
    return top if o.mask is None else torch.where(o.mask.unsqueeze(-1), top, -1)


def _biased(logits: torch.Tensor, bias_logits: torch.Tensor, o: LogitOptions) -> torch.Tensor:
    z, bias = (x if x.dtype == torch.float64 else x.float() for x in (logits, bias_logits))
    u = z * o.logit_scale
    if o.softcap is not None:
        u = o.softcap * torch.tanh(u / o.softcap)
    return torch.where(z == float("-inf"), z, u - o.bias_scale * bias)
