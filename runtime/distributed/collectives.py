"""Wrappers of the torch.distributed collectives. Every call of a collective function is one collective.

The group None is the default group. With one rank there is no communication.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# torch 2.13 renamed both functions, and warns if the old names are used.
GATHER, SCATTER = (
    new if hasattr(dist, new) else old
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    )
)


def require_group(op: str, group: "ProcessGroup | None") -> None:
    """Raise an error unless torch.distributed is initialised and `group` contains this process."""
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError(
            f"{op}: torch.distributed must be initialised; got no process group. "
            "Call torch.distributed.init_process_group first."
        )
    if dist.get_rank(group) < 0:
        raise ValueError(
            f"{op}: group must contain this process; got one without rank {dist.get_rank()}. "
            "Pass the group that this rank belongs to."
        )


def num_ranks(group: "ProcessGroup | None") -> int:
    """Return the number of ranks in the group."""
    return dist.get_world_size(group)


def own_rank(group: "ProcessGroup | None") -> int:
    """Return the rank of this process in the group."""
    return dist.get_rank(group)


def all_gather(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """Return `x` of every rank in rank order, (ranks, ...). All ranks must pass the same shape and dtype."""
    ranks, x = num_ranks(group), x.contiguous()
    if ranks == 1:
        return x.unsqueeze(0)
    out = torch.empty((ranks, *x.shape), dtype=x.dtype, device=x.device)
    if x.numel() == 0:  # true on every rank, because the shapes are equal
        return out
    # Flat buffers, because gloo and NCCL interpret buffers of other shapes differently.
    getattr(dist, GATHER)(out.view(-1), x.view(-1), group=group)
    return out


def sum_(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """Overwrite `x` with its sum over the ranks, and return it."""
    if num_ranks(group) > 1 and x.numel() > 0:
        dist.all_reduce(x, group=group)
    return x


def sum_and_split(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """Return this rank's equal part, along the first axis, of the sum of `x` over the ranks."""
    ranks = num_ranks(group)
    if ranks == 1:
        return x
    out = torch.empty((x.shape[0] // ranks, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        getattr(dist, SCATTER)(out, x.contiguous(), group=group)
    return out
