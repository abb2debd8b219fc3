"""Counts, metrics and head weights across ranks. A caller invokes these collectives explicitly."""

from typing import TYPE_CHECKING

import torch

from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.policy.metrics import Metrics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def global_normalizer(
    count: torch.Tensor | float,
    *,
    gradient_ranks: int,
    group: "ProcessGroup | None" = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Return the value for `normalizer=` that makes the loss independent of how the batch is split.

    normalizer = (sum of count over ranks) / gradient_ranks. The trainer's gradient is then the gradient
    of (sum over all tokens) / (sum of all counts), for any number of ranks and micro-batches. The reason:
    each of W ranks divides by N / W, and DDP and FSDP average the gradients over the W ranks.

    Args:
        count: this rank's count over all its micro-batches of the optimizer step. It is the number of
            valid tokens, or, for objectives that average over sequences, of sequences with a valid
            token (`Plan.count()`, or `mask.sum()`).
        gradient_ranks: number of ranks over which the trainer averages gradients: the size of the DDP
            or FSDP group. 1 if the trainer sums gradients.
        group: the ranks that share the batch. It must not contain two ranks with the same tokens
            (tensor parallelism). None: the default group.
        device: device of the collective. None: the device of count, or the CPU if count is a number.

    Returns:
        () float64, equal on every rank. It is 1 if no token counts; the loss is 0 in that case.

    Communication: one all-gather of 8 bytes. The sum is in rank order, so that it is bitwise equal on
        all ranks.
    """
    check_number("global_normalizer", "gradient_ranks", gradient_ranks, 1)
    collectives.require_group("global_normalizer", group)
    own = torch.as_tensor(count, dtype=torch.float64, device=device).detach().reshape(-1)
    if own.numel() != 1:
        raise refuse(
            "global_normalizer",
            "count",
            "one number, summed over micro-batches",
            f"shape {tuple(own.shape)}",
            "Sum the counts first.",
        )
    total = collectives.all_gather(own, group).sum()
    return torch.where(total > 0, total / gradient_ranks, 1.0)


def merge_metrics(metrics: Metrics, group: "ProcessGroup | None" = None) -> Metrics:
    """Return the metrics of all ranks merged: sums are added, extremes of the ratio are kept.

    The means of the result are the means of the whole batch. A mean of the means of the ranks would be
    wrong if the ranks have different numbers of tokens.

    Args:
        metrics: metrics of this rank. Add the metrics of its micro-batches first.
        group: the ranks that share the batch. It must not contain two ranks with the same tokens
            (tensor parallelism). None: the default group.

    Communication: one all-gather.
    """
    collectives.require_group("merge_metrics", group)
    sums = [metrics.sums.double()]
    sampler = metrics.sampler_kl_k3
    if sampler is not None:
        sums.append(sampler.double().reshape(1))
    rows = collectives.all_gather(torch.cat(sums), group)
    parts = [
        Metrics(row[: metrics.sums.shape[0]].clone(), metrics.absent, None if sampler is None else row[-1])
        for row in rows
    ]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged + part
    return merged


def head_weight(weight: torch.Tensor, *, gradients: str, tensor_parallel: str | None = None) -> torch.Tensor:
    """Return an lm_head weight that may be a DTensor as a plain tensor, with the correct gradient.

    FSDP2 keeps parameters as DTensors. `weight.full_tensor()`, called outside the forward of the module,
    gives a gradient that is not averaged over the ranks, because the averaging hooks belong to that
    forward. This function sets the placement of the gradient, so the backward averages it.

    Args:
        weight: lm_head.weight (or its bias), a plain tensor or a DTensor. A plain tensor is returned
            as is: inside a forward, FSDP has already gathered it and will average its gradient.
        gradients: "mean" if the data-parallel ranks average their gradients (FSDP, DDP), "sum" if they
            sum them.
        tensor_parallel: name of the mesh dimension over which the vocabulary stays sharded. The result
            is then this rank's shard (`vocab_shard` describes it). None: return the whole weight.

    Communication: for a DTensor, one all-gather in the forward and one reduce-scatter in the backward,
        over the data-parallel dimensions. Call it once per step, not once per chunk.

    Raises:
        ValueError: unknown `gradients`, a mesh without the dimension, a weight that is not sharded by
            rows.
    """
    check_choice("head_weight", "gradients", gradients, ("mean", "sum"))
    if not hasattr(weight, "placements"):
        return weight
    from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

    assert isinstance(weight, DTensor)
    kept = _mesh_dimension("head_weight", weight, tensor_parallel)
    outcome: list[Placement] = []
    incoming: list[Placement] = []
    for dimension, placement in enumerate(weight.placements):
        if not (placement.is_replicate() or placement.is_shard(0)):
            raise refuse(
                "head_weight", "weight", "sharded by rows or replicated", str(weight.placements), "Use Shard(0)."
            )
        if dimension == kept:
            outcome.append(Shard(0))
            incoming.append(Shard(0))
        else:
            outcome.append(Replicate())
            incoming.append(Partial("avg" if gradients == "mean" else "sum"))
    return weight.redistribute(placements=outcome).to_local(grad_placements=incoming)


def vocab_shard(weight: torch.Tensor, tensor_parallel: str, *, vocab_size: int | None = None) -> VocabShard:
    """Return the shard that `head_weight(weight, ..., tensor_parallel=...)` returns.

    Args:
        weight: the weight of the lm_head, a DTensor.
        tensor_parallel: name of the mesh dimension over which the rows of weight are sharded.
        vocab_size: number of rows without padding. None: all rows.
    """
    kept = _mesh_dimension("vocab_shard", weight, tensor_parallel)
    assert kept is not None
    rows = weight.shape[0]
    if vocab_size is not None:
        check_number("vocab_shard", "vocab_size", vocab_size, 1, rows)
    whole = VocabShard.even(rows, weight.device_mesh.get_group(kept))  # type: ignore[attr-defined]
    size = rows if vocab_size is None else vocab_size
    return VocabShard(size, min(whole.start, size), min(whole.stop, size), whole.group)


def _mesh_dimension(op: str, weight: torch.Tensor, name: str | None) -> int | None:
    if name is None:
        return None
    names = getattr(getattr(weight, "device_mesh", None), "mesh_dim_names", None) or ()
    if name not in names:
        known = ", ".join(names) or "no named dimension"
        raise refuse(
            op,
            "tensor_parallel",
            f"a mesh dimension of the weight ({known})",
            repr(name),
            "Distribute lm_head.weight over a named mesh.",
        )
    return names.index(name)
