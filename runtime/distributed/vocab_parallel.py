"""token_stats, linear_token_stats and policy_step over a vocabulary that is sharded over ranks.

Each rank runs the row kernels on its columns. One all-gather exchanges five numbers per token and rank
(vocab_shard.py), and every rank merges them to bitwise equal results. The backward of a shard needs no
other shard: gradients of logits need no communication, and gradients of hidden states are summed once.

Every rank of the group must make the same calls with the same target, mask, temperature and loss, as in
tensor parallelism. An invalid call raises the same error on all ranks.
"""

from collections.abc import Callable
from typing import Any

import torch

from tokfuse.runtime.backends import kept_rows
from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forward_gradients import Gradients
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.statistics import TokenStats, TokenStatsAt
from tokfuse.runtime.core.token_ids import TokenIds, check_one_of
from tokfuse.runtime.distributed import vocab_ids, vocab_rows
from tokfuse.runtime.distributed.vocab_checks import check_shard_head, check_shard_logits, outside_compile
from tokfuse.runtime.distributed.vocab_rows import HeadCall
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.problem import Step
from tokfuse.runtime.ops import policy_loss as losses
from tokfuse.runtime.ops import policy_step as step_op
from tokfuse.runtime.ops import policy_step_hidden as hidden_step
from tokfuse.runtime.policy import inputs as policy_inputs
from tokfuse.runtime.policy.inputs import Normalizer, PolicyInputs, inverse_normalizer
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyStep, PolicyTerms, step_result
from tokfuse.runtime.reference import kept_token_stats as kept_reference

STATS, LINEAR, STEP = (f"distributed.{op}" for op in ("token_stats", "linear_token_stats", "policy_step"))


@outside_compile
def token_stats(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    shard: VocabShard,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
    ids: torch.Tensor | None = None,
    ids_offsets: torch.Tensor | None = None,
    top_k: int | None = None,
) -> TokenStats | TokenStatsAt:
    """Compute `tokfuse.token_stats` of logits whose columns are sharded over the ranks of `shard.group`.

    temperature, softcap, logit_scale, mask and bias_scale must be equal on all ranks.

    Args:
        logits: (tokens, columns), this rank's columns of the vocabulary. Columns beyond shard.size are
            padding.
        target: (tokens,) int64, in [0, shard.vocab_size) where mask is True. Equal on all ranks.
        shard: this rank's part of the vocabulary.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows are not read and return 0. None: all rows count.
        bias_logits: (tokens, columns), the same columns of a bias model; they are subtracted. None:
            nothing is subtracted.
        bias_scale: multiplies bias_logits.
        ids: also return the log-probs of these ids: (tokens, K) integers, -1 for padding, or (ids,) with
            ids_offsets. Equal on all ranks. None: none.
        ids_offsets: (tokens + 1,), borders of the tokens in concatenated ids.
        top_k: also return this many most likely ids of each token, and their log-probs.

    Returns:
        TokenStats(logp, entropy, lse, sum_sq, top1) of the whole vocabulary, each (tokens,), bitwise
        equal on all ranks. With ids or top_k a TokenStatsAt.

    Numerics: same bounds as `tokfuse.token_stats`, for rows whose largest |logit| / temperature is
        below 2^22. Records are exchanged in float32 (float64 for float64 logits) and merged in float64,
        in rank order. If the maxima of two shards differ by less than a rounding error, top1 counts
        both.

    Gradients and communication: one all-gather of 20 bytes per token and rank (40 for float64).
        logits receive the gradient of logp and entropy without a collective, so every rank must
        compute the same loss from the outputs. Padding columns receive 0. Saved: the logits and four
        (tokens,) vectors. Each id adds 4 bytes per rank to the all-gather (8 for float64). top_k needs one
        more, of 8 K bytes per token and rank, and sends K log-probs per rank in the first.

    Raises:
        ValueError: the errors of `tokfuse.token_stats`; fewer columns than shard.size.
        BackendUnavailable: the forced backend cannot run this call.

    Source: vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053) in one exchange
        instead of three reductions, with entropy and sum_sq. Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask, bias_logits, bias_scale).floats()
    check_one_of(STATS, ids, ids_offsets, top_k)
    check_shard_logits(STATS, logits, target, options, shard)
    if ids is not None or top_k is not None:
        asked = vocab_ids.check_asked(STATS, ids, ids_offsets, top_k, target, options, shard)
        return vocab_ids.result(vocab_ids.ShardStatsAt.apply(logits, target, asked, options, shard), asked)
    out: tuple[torch.Tensor, ...] = _ShardStats.apply(logits, target, options, shard)
    return TokenStats(*out)


@outside_compile
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    shard: VocabShard,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
    reduce_hidden: bool = True,
    ids: torch.Tensor | None = None,
    ids_offsets: torch.Tensor | None = None,
    top_k: int | None = None,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
) -> TokenStats | TokenStatsAt:
    """Compute `tokfuse.linear_token_stats` with an lm_head whose rows are sharded over ranks.

    Args:
        hidden: (tokens, hidden), equal on all ranks. With sequence_parallel (tokens / ranks, hidden),
            this rank's equal slice in rank order.
        weight: (rows, hidden), this rank's rows of the lm_head. Rows beyond shard.size are padding.
        target: (tokens,) int64 of all tokens, equal on all ranks.
        shard: this rank's part of the vocabulary.
        bias: (rows,), this rank's part of the bias. None: no bias.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows do not enter the GEMMs and return 0. None: all rows count.
        memory_budget: workspace in bytes for the logits, which are computed in chunks of rows. None: 64
            MiB, or a sixth of the float32 size of this rank's weight if that is more; on a GPU at least
            the workspace of 1024 rows, up to 1 GiB.
        sequence_parallel: True gathers the hidden states of the ranks first, and splits their gradient.
        reduce_hidden: False returns only this shard's part of the gradient of hidden, without a
            collective. Use it if the host framework sums the parts (copy_to and gather_from regions
            of Megatron-LM). Not supported with sequence_parallel.
        ids: also return the log-probs of these ids: (tokens, K) integers, -1 for padding, or (ids,) with
            ids_offsets. Equal on all ranks. None: none.
        ids_offsets: (tokens + 1,), borders of the tokens in concatenated ids.
        top_k: also return this many most likely ids of each token, and their log-probs.
        kept_ids: (kept,) int32 or int64, the kept ids of all rows, concatenated: ids of the whole vocabulary, equal
            on all ranks. The distribution is then over the kept ids of each row, as in `tokfuse.linear_token_stats`.
            Not with ids or top_k. None: over the whole vocabulary.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids per row.

    Returns:
        TokenStats of the whole vocabulary for all tokens, bitwise equal on all ranks. With ids or top_k a
        TokenStatsAt.

    Numerics: same bounds as `tokfuse.linear_token_stats`. The parts of the gradient of hidden are
        summed over the ranks in the dtype of hidden.

    Gradients and communication: the forward is one all-gather of 20 bytes per token and rank. The
        backward is one all-reduce of the gradient of hidden, (tokens, hidden), if hidden requires
        grad. With sequence_parallel the forward also all-gathers the hidden states, and the backward
        is a reduce-scatter. weight and bias need no communication. With ids or top_k, each chunk of rows
        has the exchanges of `token_stats`. The budget assumes a vocabulary that is split evenly.

    Raises:
        ValueError: the errors of `tokfuse.linear_token_stats`; fewer rows than shard.size; with
            sequence_parallel a target that is not ranks times as long as hidden.

    Source: vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053); sequence parallelism of
        arXiv 2205.05198. Exact.
    """
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    if sequence_parallel and not reduce_hidden:
        raise refuse(
            LINEAR,
            "reduce_hidden",
            "True with sequence_parallel",
            False,
            "Pass reduce_hidden=True, because the gradient of a slice is a sum over the shards.",
        )
    call = HeadCall(LINEAR, options, target, memory_budget, shard, sequence_parallel, reduce_hidden)
    check_one_of(LINEAR, ids, ids_offsets, top_k)
    check_shard_head(call, hidden, weight, bias)
    if ids is not None or top_k is not None:
        kept_rows.refuse_with_ids(LINEAR, kept_ids, kept_offsets)
        asked = vocab_ids.check_asked(LINEAR, ids, ids_offsets, top_k, target, options, shard)
        return vocab_ids.result(vocab_ids.ShardHeadAt.apply(hidden, weight, bias, call, asked), asked)
    call = call._replace(kept=_own_kept(LINEAR, kept_ids, kept_offsets, target, options, shard))
    out: tuple[torch.Tensor, ...] = _ShardHead.apply(hidden, weight, bias, call)
    return TokenStats(*out)


@outside_compile
def policy_step(
    *,
    shard: VocabShard,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    target: torch.Tensor,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    advantage_level: str = "token",
    token_weight: torch.Tensor | None = None,
    signal: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    anchor_logp: torch.Tensor | None = None,
    anchor_weight: torch.Tensor | None = None,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    sequence_parallel: bool = False,
) -> PolicyStep:
    """Compute `tokfuse.policy_step` over a vocabulary that is sharded over ranks.

    The result equals `tokfuse.policy_loss` of `token_stats` (or `linear_token_stats`) of this module, with
    its autograd. The gradient of a token depends on every shard. So statistics and gradient are two passes
    over the logits. From hidden, the step needs (2 + 4f) M H V operations, where f is the share of rows
    with a gradient.

    All arguments except shard, logits, weight and bias must be equal on all ranks of the group. With
    sequence_parallel, hidden also differs.

    Args:
        shard: this rank's part of the vocabulary.
        logits: (tokens, columns), this rank's columns of the vocabulary. None: pass hidden and weight.
        hidden: (tokens, hidden), equal on all ranks, instead of logits. With sequence_parallel (tokens /
            ranks, hidden), this rank's equal slice in rank order.
        weight: (rows, hidden), this rank's rows of the lm_head. Rows beyond shard.size are padding.
        bias: (rows,), this rank's part of the bias. None: no bias.
        target: (tokens,) int64, in [0, shard.vocab_size) where mask is True.
        old_logp: (tokens,), nats. Log-probability at the start of the update.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence".
        advantage_level: "token" or "sequence". It is never guessed from the shape.
        mask: (tokens,) bool. True = counts. None: all tokens count. Values at masked tokens are never
            used.
        cu_seqlens: (seqs + 1,) int32 packing offsets. Needed if the objective or advantage_level uses
            sequences.
        objective: an `Objective`.
        normalizer: divisor of the loss. A number or 0-dim tensor, usually the global token or sequence
            count; or "batch", the count of this batch. None: no division, `loss` is the aggregated sum.
        token_weight: (tokens,). Multiplies the policy term (importance weights, selection masks).
        signal: (tokens,). Target signal (TargetRatio) or success rate (NFT). Only for those shapes.
        ref_logp: (tokens,), nats. Log-probability under the reference policy. Needed by a KL term.
            Without a KL term it only adds the metrics ref_kl_k1 and ref_kl_k3.
        kl_weight: (tokens,). Multiplies the KL term.
        anchor_logp: (tokens,), nats. Log-probability that `objective.anchor` compares with. Only with an anchor.
        anchor_weight: (tokens,). Multiplies the anchor term.
        entropy_weight: (tokens,). Multiplies the entropy term. The step computes the entropy itself.
        sampler_logp: (tokens,), nats, from the rollout engine. Adds the mismatch metric
            sampler_kl_k3. To correct for it, pass `token_weight` from `tokfuse.offpolicy_weights`.
        kept_ids: (kept,) int32 or int64, the kept ids of all rows, concatenated: ids of the whole vocabulary, equal
            on all ranks. The distribution is then over the kept ids of each row, as in `tokfuse.policy_step`.
            None: over the whole vocabulary.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids per row.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        memory_budget: workspace in bytes for the logits, which are computed in chunks of rows. Only
            with hidden. None: 64 MiB, or a sixth of the float32 size of this rank's weight if that is
            more; on a GPU at least the workspace of 1024 rows, up to 1 GiB.
        sequence_parallel: True gathers the hidden states of the ranks first, and splits their gradient.

    Returns:
        PolicyStep. Loss, metrics and statistics belong to the whole vocabulary and are bitwise equal on
        all ranks. The gradients belong to this rank's logits, or to its weight and bias and to hidden
        (all-reduced).

    Numerics, gradients, communication: same as `token_stats` and `linear_token_stats` of this module. All
        communication is inside this call; `loss.backward()` needs none.

    Raises:
        ValueError: the errors of `tokfuse.policy_step` and of the functions of this module.

    Source: vocabulary-parallel cross-entropy of Megatron-LM (arXiv 1909.08053) and `tokfuse.policy_step`.
        Exact.
    """
    inputs = PolicyInputs(
        old_logp,
        advantage,
        advantage_level,
        mask,
        cu_seqlens,
        token_weight,
        signal,
        ref_logp,
        kl_weight,
        entropy_weight,
        anchor_logp,
        anchor_weight,
    )
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(STEP, "input", "either logits= or hidden= with weight=", given, "Pass one of the two.")
    call = HeadCall(STEP, options, target, memory_budget, shard, sequence_parallel)
    if logits is not None:
        if weight is not None or bias is not None or sequence_parallel:
            raise refuse(
                STEP,
                "weight, bias and sequence_parallel",
                "left out with logits=",
                "given",
                "Remove them, or pass hidden=.",
            )
        check_shard_logits(STEP, logits, target, options, shard)
    else:
        check_shard_head(call, hidden, weight, bias)
    tokens, device = target.shape[0], target.device
    kept = _own_kept(STEP, kept_ids, kept_offsets, target, options, shard)
    policy_inputs.check_inputs(STEP, inputs, objective, tokens, device, has_entropy=True)
    inv_normalizer = inverse_normalizer(STEP, normalizer, objective)
    policy_inputs.check_sampler(STEP, sampler_logp, tokens, device)

    def terms_of(stats: TokenStats) -> PolicyTerms:
        run = select(losses.OP, stats.logp.device.type, stats.logp.dtype, objective.features()).run
        terms: PolicyTerms = run(stats.logp, stats.entropy, inputs, objective, inv_normalizer)
        return terms._replace(loss=terms.loss.detach())

    if logits is not None:
        terms, stats, grad = _step_from_logits(logits, target, kept, options, shard, terms_of)
        gradients: Gradients = {"logits": grad}
        terms = terms._replace(loss=step_op.attach(logits, terms.loss, gradients, in_place=False))
    else:
        assert hidden is not None and weight is not None
        h, w, call = hidden, weight, call._replace(kept=kept)
        terms, stats, gradients = hidden_step.attach(h, w, bias, lambda: _step_from_hidden(h, w, bias, call, terms_of))
    return step_result(terms, stats, inputs, objective, inv_normalizer, sampler_logp, gradients)


def _own_kept(
    op: str,
    kept_ids: torch.Tensor | None,
    kept_offsets: torch.Tensor | None,
    target: torch.Tensor,
    o: LogitOptions,
    shard: VocabShard,
) -> TokenIds | None:
    """Check the kept ids and return those of this shard. Synchronises once to read their number."""
    kept = kept_rows.check_kept(op, kept_ids, kept_offsets, target.shape[0], target.device)
    kept_rows.check_kept_values(op, kept, shard.vocab_size, o.mask)
    return kept_rows.of_shard(kept, shard.start, shard.stop, shard.vocab_size)


# ---------------------------------------------------------------------------------------- autograd


class _ShardStats(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, target: torch.Tensor, o: LogitOptions, shard: VocabShard
    ) -> tuple[torch.Tensor, ...]:
        merged = vocab_rows.row_forward(logits, target, o, shard)
        stats = merged.stats
        ctx.options, tensors = o.split()
        ctx.save_for_backward(logits, target, *merged[1:], *tensors)
        ctx.shard = shard
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[2:])
        return tuple(stats)

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None
        logits, target, *merged = ctx.saved_tensors
        o = ctx.options.joined(*merged[4:])
        grad = vocab_rows.row_backward(logits, target, o, ctx.shard, *merged[:4], *grads[:2])
        return grad, None, None, None


class _ShardHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, call: HeadCall
    ) -> tuple[torch.Tensor, ...]:
        hidden = vocab_rows.gathered(hidden, call.shard, call.sequence_parallel)
        merged = vocab_rows.head_forward(hidden, weight, bias, call)
        stats = merged.stats
        ctx.options, tensors = call.options.split()
        ctx.save_for_backward(hidden, weight, bias, call.target, *merged[1:], *tensors)
        ctx.op, ctx.rest = call.op, call[3:]
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[2:])
        return tuple(stats)

    @staticmethod
    @first_order("tokfuse.distributed")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if grads[0] is None and grads[1] is None:
            return None, None, None, None
        hidden, weight, bias, target, *merged = ctx.saved_tensors
        call = HeadCall(ctx.op, ctx.options.joined(*merged[4:]), target, *ctx.rest)
        needs = tuple(ctx.needs_input_grad[:3])
        given = (*merged[:4], *grads[:2])
        return *vocab_rows.head_backward(hidden, weight, bias, call, needs, *given), None


def _step_from_logits(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept: TokenIds | None,
    o: LogitOptions,
    shard: VocabShard,
    terms_of: Callable[[TokenStats], PolicyTerms],
) -> tuple[PolicyTerms, TokenStats, torch.Tensor]:
    with torch.no_grad():
        z = logits if kept is None else kept_rows.copied(logits, kept)
        merged = vocab_rows.row_forward(z, target, o, shard)
        stats, terms = merged.stats, terms_of(merged.stats)
        d_logp = kept_reference.gradient_if_kept(kept, stats.logp, terms.d_logp)
        out = None if kept is None else z  # the copy is not needed after the gradient
        grad = vocab_rows.row_backward(z, target, o, shard, *merged[1:], d_logp, terms.d_entropy, out)
    return terms, stats, grad


def _step_from_hidden(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    call: HeadCall,
    terms_of: Callable[[TokenStats], PolicyTerms],
) -> Step:
    needs = (hidden.requires_grad, weight.requires_grad, bias is not None and bias.requires_grad)
    with torch.no_grad():
        hidden = vocab_rows.gathered(hidden, call.shard, call.sequence_parallel)
        merged = vocab_rows.head_forward(hidden, weight, bias, call)
        stats, terms = merged.stats, terms_of(merged.stats)
        given = (*merged[1:], terms.d_logp, terms.d_entropy)
        grads = vocab_rows.head_backward(hidden, weight, bias, call, needs, *given)
    return terms, stats, grads
