"""paired_divergence and linear_paired_divergence over a vocabulary that is sharded over ranks.

Each rank holds the same columns of both models. pair_shard.py contains the formulas. A KL needs one all-gather
for both sides; the other kinds need a second one of two numbers per token.
"""

from typing import Any

import torch

from tokfuse.runtime.backends.value_checks import check_temperature
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import save_flat, saved_flat
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import PairedStats
from tokfuse.runtime.distributed import pair_rows, vocab_rows
from tokfuse.runtime.distributed.pair_checks import check_heads, check_streams
from tokfuse.runtime.distributed.pair_rows import Columns, PairCall, PairSaved
from tokfuse.runtime.distributed.vocab_checks import outside_compile
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.pair_problem import Divergence, Teacher
from tokfuse.runtime.ops.linear_paired_divergence import given_by
from tokfuse.runtime.reference.token_stats import result_dtype

PAIR, LINEAR = (f"distributed.{op}" for op in ("paired_divergence", "linear_paired_divergence"))


@outside_compile
def paired_divergence(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    shard: VocabShard,
    kind: str = "jsd",
    beta: float = BETA,
    alpha: float = ALPHA,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute `tokfuse.paired_divergence` of logits whose columns are sharded over the ranks of `shard.group`.

    All arguments except the logits and the shard must be equal on all ranks.

    Args:
        logits_p: (tokens, columns), this rank's columns of the distribution that learns. Columns beyond
            shard.size are padding.
        logits_q: (tokens, columns), the same columns of its target, in the same dtype. Must not require
            grad.
        shard: this rank's part of the vocabulary.
        kind: "kl_forward", "kl_reverse", "jsd", "skew_forward", "skew_reverse" or "tvd"; the formulas
            are in `tokfuse.paired_divergence`.
        beta: weight of Q in the mixture of "jsd", in (0, 1).
        alpha: for the skew kinds, weight in the mixture of the distribution whose average is taken, in
            (0, 1).
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits of both streams.
        softcap: cap of the tanh soft-cap (Gemma) of both streams, > 0. None: no cap.
        logit_scale: multiplies the logits of both streams before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows are not read and return 0. None: all rows count.

    Returns:
        (tokens,) divergence over the whole vocabulary, bitwise equal on all ranks.

    Numerics: same bounds as `tokfuse.paired_divergence`. Records are exchanged in float32 (float64 for
        float64 logits) and merged in float64, in rank order.

    Gradients and communication: one all-gather of 24 bytes per token and rank; for a kind that is no KL
        one more of 8 bytes, because its terms depend on the log-sum-exps of the whole rows. logits_p
        receive their gradient without a collective. Padding columns receive 0.

    Raises:
        ValueError: the errors of `tokfuse.paired_divergence`; fewer columns than shard.size.
        BackendUnavailable: the forced backend cannot run this call.

    Source: the divergences of `tokfuse.paired_divergence`; vocabulary shards as Megatron-LM
        (arXiv 1909.08053). Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    divergence = Divergence(kind, mix_weight_of(PAIR, kind, beta, alpha))
    p, q = check_streams(PAIR, ("logits_p", "logits_q"), logits_p, logits_q, options, shard)
    if isinstance(temperature, torch.Tensor) and may_read(temperature):
        check_temperature(PAIR, temperature, mask)
    out: torch.Tensor = _ShardPair.apply(logits_p, p, q, options, divergence, shard)
    return out


@outside_compile
def linear_paired_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    *,
    shard: VocabShard,
    kind: str,
    beta: float = BETA,
    alpha: float = ALPHA,
    target: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_temperature: float | torch.Tensor = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
    reduce_hidden: bool = True,
) -> PairedStats:
    """Compute `tokfuse.linear_paired_divergence` with two lm_heads whose rows are sharded alike over ranks.

    All arguments except weights, biases, teacher_logits and the shard must be equal on all ranks. With
    sequence_parallel, the hidden states also differ.

    Args:
        hidden: (tokens, hidden), hidden states of the student. With sequence_parallel (tokens / ranks,
            hidden), this rank's equal slice in rank order.
        weight: (rows, hidden), this rank's rows of the student's lm_head. Rows beyond shard.size are
            padding.
        teacher_hidden: (tokens, teacher_hidden), or this rank's slice. Must not require grad.
        teacher_weight: (rows, teacher_hidden), the same rows of the teacher's lm_head, with any padding.
        shard: this rank's part of the vocabulary.
        kind: "kl_forward", "kl_reverse", "jsd", "skew_forward", "skew_reverse" or "tvd"; the formulas
            are in `tokfuse.paired_divergence`.
        beta: weight of Q in the mixture of "jsd", in (0, 1).
        alpha: for the skew kinds, weight in the mixture of the distribution whose average is taken, in
            (0, 1).
        target: (tokens,) int64 of all tokens, in [0, shard.vocab_size) where mask is True. None: no
            log-probabilities are returned.
        bias: (rows,), this rank's part of the student's bias. None: no bias.
        teacher_bias: (rows,), this rank's part of the teacher's bias. None: no bias.
        teacher_logits: (tokens, columns), this rank's columns of the teacher's logits for all tokens,
            instead of teacher_hidden and teacher_weight.
        mask: (tokens,) bool. False rows enter no GEMM and return 0. None: all rows count.
        temperature: a number, or (tokens,) one per row; > 0. Divides the student's logits.
        softcap: cap of the tanh soft-cap (Gemma) of the student, > 0. None: no cap.
        logit_scale: multiplies the student's logits before the cap (Cohere); > 0.
        teacher_temperature: divides the teacher's logits.
        teacher_softcap: cap of the teacher's logits.
        teacher_logit_scale: multiplies the teacher's logits.
        memory_budget: bytes of workspace for this rank's logits of both sides, in chunks of rows, if the
            vocabulary is split evenly: all ranks need the same chunks. None: 64 MiB; on a GPU 1024 rows,
            up to 1 GiB.
        sequence_parallel: True gathers the hidden states of the ranks first, and splits the gradient.
        reduce_hidden: False returns only this shard's part of the gradient of hidden, without a
            collective; the host framework sums the parts. Not supported with sequence_parallel.

    Returns:
        PairedStats of the whole vocabulary for all tokens, bitwise equal on all ranks. If the maxima of
        two shards differ by less than a rounding error, top1_agreement counts both.

    Numerics: same bounds as `tokfuse.linear_paired_divergence`.

    Gradients and communication: hidden, weight and bias, through divergence, entropy and logp. Per chunk
        one all-gather of 64 bytes per token and rank, for a kind that is no KL one more of 8 bytes. The
        backward computes the logits again, and all-reduces the gradient of hidden once.

    Raises:
        ValueError: the errors of `tokfuse.linear_paired_divergence`; fewer rows than shard.size; a target
            that is not ranks times as long as hidden with sequence_parallel.

    Source: `tokfuse.linear_paired_divergence`; vocabulary shards as Megatron-LM (arXiv 1909.08053). Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    teacher = Teacher(
        teacher_hidden,
        teacher_weight,
        teacher_bias,
        teacher_logits,
        LogitOptions(teacher_temperature, teacher_softcap, teacher_logit_scale, None).floats(),
    )
    if sequence_parallel and not reduce_hidden:
        raise refuse(
            LINEAR,
            "reduce_hidden",
            "True with sequence_parallel",
            False,
            "Pass reduce_hidden=True, because the gradient of a slice is a sum over the shards.",
        )
    divergence = Divergence(kind, mix_weight_of(LINEAR, kind, beta, alpha))
    call = check_heads(
        LINEAR, hidden, weight, bias, target, options, teacher, divergence, memory_budget, shard, sequence_parallel
    )
    whole = (sequence_parallel, reduce_hidden)
    stats = PairedStats(*_ShardHeads.apply(hidden, weight, bias, call, whole))
    return stats if target is not None else stats._replace(logp=None, teacher_logp=None)


class _ShardPair(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits_p: torch.Tensor,
        p: torch.Tensor,
        q: torch.Tensor,
        o: LogitOptions,
        divergence: Divergence,
        shard: VocabShard,
    ) -> torch.Tensor:
        kernels = pair_rows.kernels_of(p.device, p.dtype, o.features())
        columns = Columns.of(p, q, o, o) if shard.size > 0 else None
        value, state = pair_rows.compare(kernels, columns, divergence, o, o, p, shard)
        scalars, tensors = o.split()
        ctx.save_for_backward(logits_p, q, state, *tensors)
        ctx.rest = scalars, divergence, shard, kernels
        return value.to(result_dtype(p.dtype))

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[Any, ...]:
        logits_p, q, state, *tensors = ctx.saved_tensors
        scalars, divergence, shard, kernels = ctx.rest
        o = scalars.joined(*tensors)
        out = vocab_rows.empty_gradient(logits_p, shard)
        if shard.size > 0:
            p, of_shard = logits_p.detach()[:, : shard.size], out[:, : shard.size]
            kernels.divergence.backward(p, q, state, grad, out=of_shard, **divergence._asdict(), **o.without_bias())
        return out, None, None, None, None, None


class _ShardHeads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        call: PairCall,
        reduction: tuple[bool, bool],
    ) -> tuple[torch.Tensor, ...]:
        call = call.gathered(reduction[0])
        stats, saved, _ = pair_rows.head_pass(call, None, (False, False, False), None)
        assert saved is not None
        save_flat(ctx, (weight, bias, *saved, *call.flat()))
        ctx.reduction = reduction
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[3:])
        return stats

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        weight, bias, *rest = saved_flat(ctx)
        saved, call = PairSaved(*rest[: len(PairSaved._fields)]), PairCall.from_flat(*rest[len(PairSaved._fields) :])
        given = given_by(grads, call.hidden)
        if given is None:
            return (None,) * 5
        needs = tuple(ctx.needs_input_grad[:3])
        found = pair_rows.head_pass(call, given, needs, saved)[2]
        leaves = (call.hidden, weight, bias)
        return *vocab_rows.reduced(found, leaves, needs, call.shard, *ctx.reduction), None, None
