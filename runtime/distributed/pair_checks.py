"""Checks of the ops that compare two streams of logits, or two lm_heads, over a sharded vocabulary."""

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions, check_options
from tokfuse.runtime.distributed import collectives
from tokfuse.runtime.distributed.pair_rows import PairCall
from tokfuse.runtime.distributed.vocab_checks import check_shard, check_shard_head, check_teacher_shard, own_part
from tokfuse.runtime.distributed.vocab_rows import HeadCall
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.pair_problem import Divergence, Teacher, check_teacher_temperature
from tokfuse.runtime.reference.token_stats import result_dtype


def check_streams(
    op: str, names: tuple[str, str], p: torch.Tensor, q: torch.Tensor, options: LogitOptions, shard: VocabShard
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both logits without padding and gradient."""
    check_shard(op, shard)
    checks.check_matrix(op, names[0], p, "(tokens, columns)")
    checks.check_matrix(op, names[1], q, "(tokens, columns)")
    checks.check_device(op, names[1], q, p.device)
    checks.check_constant(op, names[1], q)
    if q.shape[0] != p.shape[0] or q.dtype != p.dtype:
        want, got = f"({p.shape[0]}, columns) {p.dtype} like {names[0]}", f"{tuple(q.shape)} {q.dtype}"
        raise refuse(op, names[1], want, got, "Pair the rows of the two streams.")
    check_options(op, p.shape[0], p.device, options)
    return own_part(op, names[0], p, shard.size, 1), own_part(op, names[1], q, shard.size, 1)


def check_teacher_values(op: str, o: LogitOptions, mask: torch.Tensor | None) -> None:
    if isinstance(o.temperature, torch.Tensor) and may_read(o.temperature):
        check_teacher_temperature(op, o.temperature, mask)


def check_heads(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    options: LogitOptions,
    teacher: Teacher,
    divergence: Divergence,
    memory_budget: int | None,
    shard: VocabShard,
    sequence_parallel: bool,
) -> PairCall:
    """Check both heads of this rank. The hidden states of the call are still this rank's."""
    check_shard(op, shard)
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    ranks = collectives.num_ranks(shard.group) if sequence_parallel else 1
    tokens = hidden.shape[0] * ranks
    if target is None:
        target = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    head_call = HeadCall(op, options, target, memory_budget, shard, sequence_parallel)
    check_shard_head(head_call, hidden, weight, bias)
    assert weight is not None
    computed = checks.head_dtype(hidden, weight, bias)
    own = check_teacher_shard(op, teacher, shard.size, tokens, ranks, hidden.device, computed)
    check_teacher_values(op, teacher.options, options.mask)
    own_weight = own_part(op, "weight", weight, shard.size, 0)
    own_bias = None if bias is None else own_part(op, "bias", bias, shard.size, 0)
    return PairCall(op, hidden.detach(), own_weight, own_bias, target, options, own, divergence, memory_budget, shard)


def of_tokens(call: PairCall) -> tuple[int, torch.device, torch.dtype]:
    return call.target.shape[0], call.target.device, result_dtype(call.head().dtype)
