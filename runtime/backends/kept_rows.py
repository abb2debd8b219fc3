"""Restrict rows of logits to the kept ids of a sampler, for the ops that read whole rows.

Logits outside the kept ids of a row become -inf, which is an excluded column for every row kernel. So the kernels
compute the distribution over the kept ids, with all their options, and exclude no digits: nothing is subtracted from
a log-sum-exp over the whole vocabulary. A duplicate id has no effect. Bytes per row of logits and k kept ids: one
write of the row, and 8 k for ids and 2 reads or writes of k logits.
"""

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.token_ids import TokenIds, check_csr, check_offsets
from tokfuse.runtime.reference import kept_token_stats as reference

NAMES = ("kept_ids", "kept_offsets")
SCHEMA = "Tensor? kept_ids, Tensor? kept_offsets"
"""The kept ids in the schema of a custom op."""

Entries = tuple[torch.Tensor, torch.Tensor]
"""(row (kept,), id (kept,)): the places in a block of logits that keep their value."""


def check_kept(
    op: str, kept_ids: torch.Tensor | None, kept_offsets: torch.Tensor | None, tokens: int, device: torch.device
) -> TokenIds | None:
    """Check both arguments; None if neither is given. Values of the ids are checked by `check_kept_values`."""
    if kept_ids is None and kept_offsets is None:
        return None
    for name, other, value in zip(NAMES, NAMES[::-1], (kept_ids, kept_offsets), strict=True):
        if value is None:
            raise refuse(op, name, f"given with {other}", "None", "Pass both, or neither for the whole vocabulary.")
    assert kept_ids is not None and kept_offsets is not None
    return check_csr(op, NAMES, kept_ids, kept_offsets, tokens, device)


def refuse_with_ids(op: str, kept_ids: object, kept_offsets: object) -> None:
    """Raise ValueError if kept ids are given together with `ids` or `top_k`."""
    if kept_ids is not None or kept_offsets is not None:
        raise refuse(op, "kept_ids", "left out with ids or top_k", "a tensor", "Call it once for each of them.")


def of_graph(kept_ids: torch.Tensor | None, kept_offsets: torch.Tensor | None) -> TokenIds | None:
    """Return the kept ids from the arguments of a custom op."""
    if kept_ids is None or kept_offsets is None:
        return None
    return TokenIds(kept_ids, kept_offsets, kept_ids.shape)


def flat(kept: TokenIds | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Return the arguments of a custom op. The inverse of `of_graph`."""
    return (None, None) if kept is None else (kept.flat, kept.offsets)


def check_kept_values(op: str, kept: TokenIds | None, vocab: int, mask: torch.Tensor | None) -> None:
    """Raise ValueError if the offsets are no prefix sum, or an id is out of range or twice in a row of the mask."""
    if kept is None or not may_read(kept.flat):
        return
    check_offsets(op, NAMES, kept.flat, kept.offsets)
    reference.check_ids(kept.flat, reference.row_of_each(kept.flat, kept.offsets), vocab, mask, op)


def counts_of(kept: TokenIds, tokens: torch.Tensor) -> torch.Tensor:
    """Return the number of kept ids of some tokens, (tokens,) int64."""
    return (kept.offsets[tokens + 1] - kept.offsets[tokens]).clamp(min=0)


def entries(kept: TokenIds, tokens: torch.Tensor, total: int | None) -> Entries:
    """Return the entries of a block of logits whose row i is token tokens[i].

    Args:
        kept: the ids of all tokens.
        tokens: (rows,) int64.
        total: the sum of `counts_of(kept, tokens)`. None if the host cannot know it: then there is an entry for
            every kept id, and those of other tokens are in row `rows`, one past the block.
    """
    device, rows, size = tokens.device, tokens.shape[0], kept.flat.shape[0]
    if total is None:
        place = kept.offsets.new_full((kept.offsets.shape[0],), rows)
        place[tokens] = torch.arange(rows, device=device)
        token, ids = all_entries(kept)
        return place[token], ids
    counts = counts_of(kept, tokens)
    row = torch.repeat_interleave(torch.arange(rows, device=device), counts, output_size=total)
    first = kept.offsets[tokens] - (counts.cumsum(0) - counts)
    place = (torch.arange(total, device=device) + first[row]).clamp(0, max(0, size - 1))
    return row, kept.flat[place]


def all_entries(kept: TokenIds) -> Entries:
    """Return the entries of a block with a row for every token, in order."""
    # Unlike repeat_interleave, a search writes to no other memory if the offsets are wrong.
    ends = kept.offsets[1:].contiguous()
    token = torch.searchsorted(ends, torch.arange(kept.flat.shape[0], device=ends.device), right=True)
    return token.clamp(max=max(0, ends.shape[0] - 1)), kept.flat


def keep_only_(z: torch.Tensor, where: Entries, source: torch.Tensor | None = None) -> torch.Tensor:
    """Set z (rows, columns) to the kept entries of `source`, and to -inf elsewhere; return it.

    An id outside the columns makes its row NaN.

    Args:
        z: overwritten.
        where: the entries.
        source: like z. None: z itself.
    """
    row, ids = where
    inside = (ids >= 0) & (ids < z.shape[1])
    column = torch.where(inside, ids, 0)
    values = (z if source is None else source)[row, column]
    z.fill_(float("-inf"))
    z[row, column] = values
    wrong = z.new_zeros(z.shape[0] + 1).index_fill_(0, torch.where(inside, z.shape[0], row), float("nan"))
    z[:, 0].add_(wrong[:-1])
    return z


def copied(logits: torch.Tensor, kept: TokenIds) -> torch.Tensor:
    """Return a copy of the logits of all tokens with -inf outside the kept ids. It reads only the kept logits."""
    z = logits.detach()
    out = native.empty_like_rows(z) if z.device.type == "cpu" else z.new_empty(z.shape)
    return keep_only_(out, all_entries(kept), z)


def of_shard(kept: TokenIds | None, start: int, stop: int, vocab: int) -> TokenIds | None:
    """Return the kept ids in the columns [start, stop), counted from start. Synchronises, to read their number.

    An id outside [0, vocab) stays outside, in every shard.
    """
    if kept is None:
        return None
    wrong = (kept.flat < 0) | (kept.flat >= vocab)
    own = wrong | ((kept.flat >= start) & (kept.flat < stop))
    ids = torch.where(wrong, -1, kept.flat - start)[own]
    before = torch.nn.functional.pad(own.cumsum(0), (1, 0))
    offsets = before[kept.offsets.clamp(0, kept.flat.shape[0])]
    return TokenIds(ids, offsets, ids.shape)
