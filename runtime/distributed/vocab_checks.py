"""Checks of calls over vocabulary shards. They read only values that all ranks have: all ranks raise, or none does."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions, check_logits, check_options, check_values
from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.distributed.vocab_rows import HeadCall
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.pair_problem import Teacher, check_teacher
from tokfuse.runtime.lm_head.problem import check_head, refuse_captured

F = TypeVar("F", bound=Callable[..., Any])


def outside_compile(function: F) -> F:
    """Exclude a function from torch.compile by one graph break: process groups cannot be traced."""
    return torch.compiler.disable(function)  # type: ignore[no-any-return]


def check_shard_target(op: str, target: torch.Tensor, o: LogitOptions, shard: VocabShard) -> None:
    """Check the values of targets and temperatures."""
    # Checked before the exchange, and only on replicated tensors, so that either all ranks raise or none.
    if may_read(target):
        check_values(op, target, shard.vocab_size, o.mask, o.temperature)


def check_shard(op: str, shard: object) -> None:
    """Raise TypeError unless `shard` is a VocabShard."""
    if not isinstance(shard, VocabShard):
        raise TypeError(
            f"{op}: shard must be a VocabShard; got {type(shard).__name__}. "
            "Pass, for example, VocabShard.even(vocab_size, group)."
        )


def check_shard_logits(op: str, logits: torch.Tensor, target: torch.Tensor, o: LogitOptions, shard: VocabShard) -> None:
    """Check this rank's columns of the logits."""
    check_shard(op, shard)
    checks.check_matrix(op, "logits", logits, "(tokens, columns)")
    if logits.shape[1] < shard.size:
        raise refuse(
            op,
            "logits",
            f"at least {shard.size} columns wide, the shard's size",
            f"shape {tuple(logits.shape)}",
            "Pass this rank's columns.",
        )
    if logits.shape[1] > 0:
        check_logits(op, logits, target, o)
    else:
        rows = checks.Rows(logits.shape[0], "the rows of logits", logits.device)
        checks.check_vector(op, "target", target, rows, checks.INT64)
        check_options(op, logits.shape[0], logits.device, o)
    check_shard_target(op, target, o, shard)


def check_shard_head(
    call: HeadCall, hidden: torch.Tensor | None, weight: torch.Tensor | None, bias: torch.Tensor | None
) -> None:
    """Check this rank's rows of the lm_head."""
    op, shard = call.op, call.shard
    check_shard(op, shard)
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")  # type: ignore[arg-type]
    assert hidden is not None
    if call.sequence_parallel:
        ranks = collectives.num_ranks(shard.group)
        if call.target.shape[0] != ranks * hidden.shape[0]:
            raise refuse(
                op,
                "target",
                f"{ranks} x {hidden.shape[0]} long with sequence_parallel",
                f"shape {tuple(call.target.shape)}",
                "Pass the targets of the tokens of all ranks.",
            )
        hidden = of_all_ranks(hidden, ranks)
    if isinstance(weight, torch.Tensor) and weight.dim() == 2 and weight.shape[0] == 0:
        weight, bias = weight.new_empty(1, weight.shape[1]), None  # an empty shard
    check_head(op, hidden, weight, bias, call.target, call.options, call.memory_budget)
    assert weight is not None
    refuse_captured(op, weight, "split over ranks", "Capture the other layers")
    if weight.shape[0] < shard.size:
        raise refuse(
            op,
            "weight",
            f"at least {shard.size} rows long, the shard's size",
            f"shape {tuple(weight.shape)}",
            "Pass this rank's rows.",
        )
    check_shard_target(op, call.target, call.options, shard)


def of_all_ranks(x: torch.Tensor, ranks: int) -> torch.Tensor:
    """Return a tensor without values in the shape of the gathered slices."""
    return x.detach().new_empty(1, x.shape[1]).expand(x.shape[0] * ranks, -1)


def own_part(op: str, name: str, x: torch.Tensor, size: int, axis: int) -> torch.Tensor:
    """Return the part of a rank's tensor without its padding."""
    checks.require_tensor(op, name, x)
    if x.dim() <= axis or x.shape[axis] < size:
        extent = "columns" if axis == 1 else "rows"
        shape = f"shape {tuple(x.shape)}"
        raise refuse(op, name, f"at least {size} {extent}, the shard's size", shape, f"Pass this rank's {extent}.")
    return x.detach().narrow(axis, 0, size)


def check_teacher_shard(
    op: str, teacher: Teacher, size: int, tokens: int, ranks: int, device: torch.device, dtype: torch.dtype
) -> Teacher:
    """Check this rank's part of a teacher. Return it without padding rows and columns.

    Args:
        op: the public op, for messages.
        teacher: hidden states and a head, or logits.
        size: size of the shard.
        tokens: number of tokens of all slices.
        ranks: number of slices of the hidden states.
        device, dtype: of the student's head.
    """
    axes = {"hidden": None, "weight": 0, "bias": 0, "logits": 1}
    own: dict[str, torch.Tensor | None] = {}
    for name, axis in axes.items():
        x = getattr(teacher, name)
        if x is not None:
            name_of = f"teacher_{name}"
            checks.check_constant(op, name_of, checks.require_tensor(op, name_of, x))
            x = x.detach() if axis is None else own_part(op, name_of, x, size, axis)
        own[name] = x
    cut = Teacher(own["hidden"], own["weight"], own["bias"], own["logits"], teacher.options)
    seen = cut
    if cut.hidden is not None and cut.hidden.dim() == 2:
        seen = cut._replace(hidden=of_all_ranks(cut.hidden, ranks))
    check_teacher(op, seen, tokens, size, device, dtype)
    return cut
