"""paired_divergence, linear_paired_divergence and distill_step over a vocabulary that is sharded over ranks.

Each rank holds the same columns of both models. pair_shard.py contains the formulas. A KL needs one all-gather
for both sides; the other kinds need a second one of two numbers per token.
"""

from typing import Any

import torch

from tokfuse.runtime.backends.value_checks import check_temperature
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import save_flat, saved_flat
from tokfuse.runtime.core.logit_options import LogitOptions, check_options
from tokfuse.runtime.core.statistics import PairedStats
from tokfuse.runtime.distributed import collectives, pair_rows, vocab_rows
from tokfuse.runtime.distributed.pair_rows import Columns, PairCall, PairSaved
from tokfuse.runtime.distributed.vocab_checks import (
    check_shard,
    check_shard_head,
    check_shard_logits,
    check_teacher_shard,
    outside_compile,
    own_part,
)
from tokfuse.runtime.distributed.vocab_rows import HeadCall
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.pair_problem import Coefficients, Divergence, Teacher, check_teacher_temperature
from tokfuse.runtime.lm_head.pair_results import DistillStep, distill_result, loss_of, token_weights
from tokfuse.runtime.lm_head.problem import NAMES
from tokfuse.runtime.ops.linear_paired_divergence import given_by
from tokfuse.runtime.policy.inputs import Normalizer
from tokfuse.runtime.policy.results import Computed, Gradients, with_gradients
from tokfuse.runtime.reference.token_stats import result_dtype

PAIR, LINEAR, STEP = (f"distributed.{op}" for op in ("paired_divergence", "linear_paired_divergence", "distill_step"))


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
    p, q = _check_streams(PAIR, ("logits_p", "logits_q"), logits_p, logits_q, options, shard)
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
    call = _check_heads(
        LINEAR, hidden, weight, bias, target, options, teacher, divergence, memory_budget, shard, sequence_parallel
    )
    whole = (sequence_parallel, reduce_hidden)
    stats = PairedStats(*_ShardHeads.apply(hidden, weight, bias, call, whole))
    return stats if target is not None else stats._replace(logp=None, teacher_logp=None)


@outside_compile
def distill_step(
    *,
    shard: VocabShard,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    kind: str,
    beta: float = BETA,
    alpha: float = ALPHA,
    coef: float | torch.Tensor | None = None,
    target: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_temperature: float | torch.Tensor = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> DistillStep:
    """Compute `tokfuse.distill_step` over a vocabulary that is sharded over ranks.

    The gradient is computed in the forward, and no GEMM runs twice: the ranks exchange the records of a
    chunk of rows while its logits are in memory. All arguments except shard, logits, weights and biases
    must be equal on all ranks of the group. With sequence_parallel, the hidden states also differ.

    An `objective` and a `cross_entropy` are not supported over shards.

    Args:
        shard: this rank's part of the vocabulary.
        logits: (tokens, columns), this rank's columns of the student's logits; they need teacher_logits.
            None: pass hidden and weight instead.
        hidden: (tokens, hidden), hidden states of the student. With sequence_parallel (tokens / ranks,
            hidden), this rank's equal slice in rank order.
        weight: (rows, hidden), this rank's rows of the student's lm_head. Rows beyond shard.size are
            padding.
        bias: (rows,), this rank's part of the bias. None: no bias.
        teacher_logits: (tokens, columns), this rank's columns of the teacher's logits.
        teacher_hidden: (tokens, teacher_hidden), or this rank's slice.
        teacher_weight: (rows, teacher_hidden), the same rows of the teacher's lm_head, with any padding.
        teacher_bias: (rows,), this rank's part of the teacher's bias. None: no bias.
        kind: "kl_forward", "kl_reverse", "jsd", "skew_forward", "skew_reverse" or "tvd"; the formulas
            are in `tokfuse.paired_divergence`.
        beta: weight of Q in the mixture of "jsd", in (0, 1).
        alpha: for the skew kinds, weight in the mixture of the distribution whose average is taken, in
            (0, 1).
        coef: weight of the divergence, a number or (tokens,). None: 1. A token with weight 0 costs nothing.
        target: (tokens,) int64, the sampled token, for the log-probabilities in `stats` and `metrics`.
            None: they are not returned.
        mask: (tokens,) bool. True counts. Values at masked tokens are never used. None: all rows count.
        normalizer: None: no division. A number or 0-dim tensor: divides (global token count).
            "batch": the number of tokens that the mask keeps, whatever their weight.
        temperature: a number, or (tokens,) one per row; > 0. Divides the student's logits.
        softcap: cap of the tanh soft-cap (Gemma) of the student, > 0. None: no cap.
        logit_scale: multiplies the student's logits before the cap (Cohere); > 0.
        teacher_temperature: divides the teacher's logits.
        teacher_softcap: cap of the teacher's logits.
        teacher_logit_scale: multiplies the teacher's logits.
        memory_budget: from hidden only: bytes of workspace for this rank's logits of both sides, in
            chunks of rows, if the vocabulary is split evenly. None: 64 MiB; on a GPU 1024 rows, up to 1 GiB.
        sequence_parallel: True gathers the hidden states of the ranks first, and splits the gradient.

    Returns:
        DistillStep. Loss, metrics and statistics belong to the whole vocabulary and are bitwise equal on
        all ranks. The gradients are those of this rank's logits, or of its weight and bias and of hidden
        (all-reduced).

    Numerics: as `linear_paired_divergence` and `paired_divergence` of this module.

    Gradients and communication: per chunk of rows (from logits: once) one all-gather of 64 bytes per
        token with a weight and rank, for a kind that is no KL one more of 8 bytes. From hidden one
        all-reduce of its gradient, all inside this call; `loss.backward()` needs none.

    Raises:
        ValueError: the errors of `tokfuse.distill_step` and of the functions of this module.

    Source: `tokfuse.distill_step`; vocabulary shards as Megatron-LM (arXiv 1909.08053). Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    teacher_options = LogitOptions(teacher_temperature, teacher_softcap, teacher_logit_scale, None).floats()
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_options)
    divergence, has_target = Divergence(kind, mix_weight_of(STEP, kind, beta, alpha)), target is not None
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(STEP, "input", "either logits= or hidden= with weight=", given, "Pass one.")
    gradients: Gradients = {}
    if logits is not None:
        checks.check_unused(
            STEP,
            "logits=",
            weight=weight,
            bias=bias,
            teacher_hidden=teacher_hidden,
            teacher_weight=teacher_weight,
            teacher_bias=teacher_bias,
            memory_budget=memory_budget,
            sequence_parallel=sequence_parallel or None,
        )
        if target is None:
            target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
        check_shard_logits(STEP, logits, target, options, shard)
        check_options(STEP, logits.shape[0], logits.device, teacher_options, "teacher_")
        _check_teacher_values(STEP, teacher_options, mask)
        if teacher_logits is None:
            raise refuse(STEP, "teacher_logits", "given with logits=", "None", "Or pass hidden= and weight=.")
        p, q = _check_streams(STEP, ("logits", "teacher_logits"), logits, teacher_logits, options, shard)
        w = token_weights(STEP, coef, mask, normalizer, p.shape[0], p.device, result_dtype(p.dtype))
        leaves: dict[str, torch.Tensor | None] = {"logits": logits}

        def compute() -> Computed:
            both = (options, teacher_options)
            stats, grad = _step_of_logits(logits, p, q, target, *both, divergence, w.coefficient, shard)
            return loss_of(stats, w.coefficient), stats, [grad]

    else:
        assert hidden is not None
        call = _check_heads(
            STEP, hidden, weight, bias, target, options, teacher, divergence, memory_budget, shard, sequence_parallel
        )
        w = token_weights(STEP, coef, mask, normalizer, *_of_tokens(call))
        leaves = dict(zip(NAMES, (hidden, weight, bias), strict=True))
        needs = _needs(hidden, weight, bias)

        def compute() -> Computed:
            whole = call.gathered(sequence_parallel)
            stats, _, grads = pair_rows.head_pass(whole, Coefficients(w.coefficient), needs, None)
            padded = (whole.hidden, weight, bias)
            grads = vocab_rows.reduced(grads, padded, needs, shard, sequence_parallel, True)  # type: ignore[arg-type]
            return loss_of(stats, w.coefficient), stats, grads

    loss, *stats = with_gradients("distill_step", leaves, compute, gradients)
    return distill_result(loss, tuple(stats), w, has_target, gradients)


# ------------------------------------------------------------------------------------------ checks


def _check_streams(
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


def _check_teacher_values(op: str, o: LogitOptions, mask: torch.Tensor | None) -> None:
    if isinstance(o.temperature, torch.Tensor) and may_read(o.temperature):
        check_teacher_temperature(op, o.temperature, mask)


def _check_heads(
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
    _check_teacher_values(op, teacher.options, options.mask)
    own_weight = own_part(op, "weight", weight, shard.size, 0)
    own_bias = None if bias is None else own_part(op, "bias", bias, shard.size, 0)
    return PairCall(op, hidden.detach(), own_weight, own_bias, target, options, own, divergence, memory_budget, shard)


def _of_tokens(call: PairCall) -> tuple[int, torch.device, torch.dtype]:
    return call.target.shape[0], call.target.device, result_dtype(call.head().dtype)


def _needs(*leaves: torch.Tensor | None) -> tuple[bool, bool, bool]:
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in leaves]
    return wanted[0], wanted[1], wanted[2]


# ---------------------------------------------------------------------------------------- autograd


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


def _step_of_logits(
    logits: torch.Tensor,
    p: torch.Tensor,
    q: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    teacher_options: LogitOptions,
    divergence: Divergence,
    coefficient: torch.Tensor,
    shard: VocabShard,
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """Return the statistics of the rows with a coefficient, and the gradient of this rank's logits."""
    kernels = pair_rows.kernels_of(p.device, p.dtype, options.features() | teacher_options.features())
    assert kernels.stats.state is not None
    dtype = kernels.stats.state.dtype
    if dtype == torch.float64:
        p, q = p.double(), q.double()
    active = coefficient != 0
    of_p = options._replace(mask=active if options.mask is None else active & options.mask)
    with torch.no_grad():
        columns = Columns.of(p, q, of_p, teacher_options) if shard.size > 0 else None
        stats, saved = pair_rows.compare_with_stats(kernels, columns, divergence, of_p, teacher_options, target, shard)
        grad = vocab_rows.empty_gradient(logits, shard)
        if columns is not None:
            given = Coefficients(coefficient.to(dtype))
            of_shard = grad[:, : shard.size]
            pair_rows.write_gradient(kernels, columns, divergence, target, saved, given, shard, of_shard)
    return tuple(x.to(result_dtype(logits.dtype)) for x in stats), grad
