"""The collectives that the project uses, over torch.distributed; every call is one collective.

A group of None is the default group. With one rank nothing is sent.
"""

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# torch 2.13 renamed both and warns of the old names.
GATHER, SCATTER = (
    new if hasattr(dist, new) else old
    for new, old in (
        ("all_gather_single", "all_gather_into_tensor"),
        ("reduce_scatter_single", "reduce_scatter_tensor"),
    )
)


def require_group(op: str, group: "ProcessGroup | None") -> None:
    """Refuse a group that this process cannot speak to."""
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
    """Ranks in the group."""
    return dist.get_world_size(group)


def own_rank(group: "ProcessGroup | None") -> int:
    """Place of this process in the group."""
    return dist.get_rank(group)


def all_gather(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """(ranks, ...): `x` of every rank, in rank order; the same shape and dtype on all."""
    ranks, x = num_ranks(group), x.contiguous()
    if ranks == 1:
        return x.unsqueeze(0)
    out = torch.empty((ranks, *x.shape), dtype=x.dtype, device=x.device)
    if x.numel() == 0:  # on every rank, as the shapes are the same
        return out
    # As a vector, because gloo and NCCL agree on the meaning of flat buffers only.
    getattr(dist, GATHER)(out.view(-1), x.view(-1), group=group)
    return out


def sum_(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """`x`, overwritten by its sum over the ranks."""
    if num_ranks(group) > 1 and x.numel() > 0:
        dist.all_reduce(x, group=group)
    return x


def sum_and_split(x: torch.Tensor, group: "ProcessGroup | None") -> torch.Tensor:
    """This rank's equal part, along the first axis, of the sum over the ranks."""
    ranks = num_ranks(group)
    if ranks == 1:
        return x
    out = torch.empty((x.shape[0] // ranks, *x.shape[1:]), dtype=x.dtype, device=x.device)
    if x.numel() > 0:
        getattr(dist, SCATTER)(out, x.contiguous(), group=group)
    return out
