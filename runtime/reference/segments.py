"""Helpers for packed sequences and groups in plain torch: index maps and the segmented reverse scan.

No function reads a value on the host, so they run on any device without a synchronisation. Sums use
`index_add`, which keeps a NaN inside its own segment.
"""

from typing import NamedTuple

import torch


def sequence_index(cu_seqlens: torch.Tensor, num_tokens: int) -> torch.Tensor:
    """Return the sequence of every token, (tokens,) int64. Empty sequences get no token."""
    position = torch.arange(num_tokens, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens[1:].to(torch.int64), position, right=True)


class Groups(NamedTuple):
    """Rows sorted by group id. Groups are numbered from 0 in that order."""

    order: torch.Tensor  # (rows,) row at each sorted place
    member: torch.Tensor  # (rows,) group number of each row
    start: torch.Tensor  # (rows,) first sorted place of the row's group
    size: torch.Tensor  # (rows,) size of the row's group


def groups_of(group_ids: torch.Tensor, key: torch.Tensor | None = None) -> Groups:
    """Sort rows by group, and inside a group by `key` (None: by row number)."""
    num_rows = group_ids.shape[0]
    if key is None:
        order = torch.argsort(group_ids, stable=True)
    else:
        by_key = torch.argsort(key, stable=True)
        order = by_key[torch.argsort(group_ids[by_key], stable=True)]
    ids = group_ids[order]
    number = torch.zeros(num_rows, dtype=torch.int64, device=ids.device)
    number[1:] = (ids[1:] != ids[:-1]).cumsum(0)
    member = torch.empty_like(number).scatter_(0, order, number)
    size = torch.zeros(num_rows, dtype=torch.int64, device=ids.device)
    size.index_add_(0, member, torch.ones_like(member))
    start = size.cumsum(0) - size
    return Groups(order, member, start[member], size[member])


def segment_sum(x: torch.Tensor, index: torch.Tensor, num_segments: int) -> torch.Tensor:
    """Return the sum of `x` over the rows of each index, (num_segments,)."""
    zero = torch.zeros(num_segments, dtype=x.dtype, device=x.device)
    return zero.index_add(0, index, x)


def next_valid(mask: torch.Tensor) -> torch.Tensor:
    """Return the next later position where mask is True, (tokens,) int64. Without one it is `tokens`."""
    num_tokens = mask.shape[0]
    place = torch.arange(num_tokens, device=mask.device)
    here = torch.where(mask, place, num_tokens)
    nearest = here.flip(0).cummin(0).values.flip(0)
    return torch.cat([nearest[1:], nearest.new_full((min(num_tokens, 1),), num_tokens)])


def reverse_scan(coef: torch.Tensor, inject: torch.Tensor, end: torch.Tensor) -> torch.Tensor:
    """Return y[t] = inject[t] + coef[t] * y[t + 1] inside each sequence, with y = 0 after its end.

    The algorithm is doubling. After k rounds, b[t] is the recursion over 2^k positions and a[t] is the
    product of their coefficients. So log2(tokens) elementwise rounds replace the loop over tokens.

    Args:
        coef: (tokens,), coefficient of the next value.
        inject: (tokens,), summand of each token.
        end: (tokens,) int64. Offset one past the last token of the token's sequence.
    """
    num_tokens = inject.shape[0]
    place = torch.arange(num_tokens, device=inject.device)
    a, b = coef, inject
    zero = torch.zeros((), dtype=inject.dtype, device=inject.device)
    step = 1
    while step < num_tokens:
        inside = place + step < end
        b = b + torch.where(inside, a * b.roll(-step), zero)
        a = torch.where(inside, a * a.roll(-step), zero)
        step *= 2
    return b
