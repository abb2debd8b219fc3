"""Counts, metrics and head weights across ranks: the collectives that a caller asks for by name."""

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
    """What to pass as `normalizer=`, so that the loss does not depend on how the batch is split.

    normalizer = (sum of count over ranks) / gradient_ranks. With it, the gradient that the trainer
    makes is that of sum over all tokens / sum of all counts, whatever the number of ranks and of
    micro-batches: DDP and FSDP average over W ranks what each has divided by N / W.

    Args:
        count: this rank's count over all its micro-batches of the optimizer step: valid tokens, or
            sequences with a valid token for objectives that average over sequences
            (`Plan.count()`, or `mask.sum()`).
        gradient_ranks: ranks over which the trainer averages gradients: the size of the DDP or
            FSDP group. 1 where it sums them.
        group: the ranks that share the batch. Ranks that hold the same tokens (tensor parallelism)
            must not be in it together. None: the default group.
        device: where the collective runs; None: the device of count (a number: the CPU).

    Returns:
        () float64, on every rank the same. 1 where nothing counts: the loss is then 0 anyway.

    Communication: one all-gather of 8 bytes. In rank order, so that ranks agree to the bit.
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
            "Add the counts first.",
        )
    total = collectives.all_gather(own, group).sum()
    return torch.where(total > 0, total / gradient_ranks, 1.0)


def merge_metrics(metrics: Metrics, group: "ProcessGroup | None" = None) -> Metrics:
    """The metrics of all ranks: sums added, extremes of the ratio kept. One all-gather.

    The means of the result are those of the whole batch, which a mean of the ranks' means is not
    where ranks hold different numbers of tokens.

    Args:
        metrics: of this rank; add those of its micro-batches first.
        group: the ranks that share the batch, as in `global_normalizer`.
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
    """A plain tensor of an lm_head weight that may be a DTensor, with the right gradient.

    FSDP2 keeps parameters as DTensors. `weight.full_tensor()`, called outside the module's forward,
    gives a gradient that was not averaged over the ranks, because the hooks that average belong to
    that forward. Here the placement of the gradient is stated, so the backward averages it.

    Args:
        weight: lm_head.weight (or its bias): a plain tensor, which comes back as it is (inside a
            forward FSDP has already gathered it and will average its gradient), or a DTensor.
        gradients: "mean" where the loss is one that data-parallel ranks average (FSDP, DDP), "sum"
            where they add up.
        tensor_parallel: name of the mesh dimension over which the vocabulary stays cut; the result
            is this rank's shard (`vocab_shard` describes it). None: the whole weight.

    Communication: for a DTensor one all-gather forward and one reduce-scatter backward over the
        data-parallel dimensions. Call it once per step, not per chunk.

    Raises:
        ValueError: unknown `gradients`, a mesh without the dimension, a weight that is cut in
            another way than by rows.
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
                "head_weight", "weight", "cut by rows or replicated", str(weight.placements), "Shard the vocabulary."
            )
        if dimension == kept:
            outcome.append(Shard(0))
            incoming.append(Shard(0))
        else:
            outcome.append(Replicate())
            incoming.append(Partial("avg" if gradients == "mean" else "sum"))
    return weight.redistribute(placements=outcome).to_local(grad_placements=incoming)


def vocab_shard(weight: torch.Tensor, tensor_parallel: str, *, vocab_size: int | None = None) -> VocabShard:
    """The shard that `head_weight(weight, ..., tensor_parallel=...)` returns.

    Args:
        weight: a DTensor, the lm_head.
        tensor_parallel: name of the mesh dimension over which the rows of weight are cut.
        vocab_size: without padding rows. None: all rows.
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
