"""distill_step over a vocabulary that is sharded over ranks."""

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forward_gradients import Computed, Gradients, with_gradients
from tokfuse.runtime.core.logit_options import LogitOptions, check_options
from tokfuse.runtime.distributed import pair_rows, vocab_rows
from tokfuse.runtime.distributed.pair_checks import check_heads, check_streams, check_teacher_values, of_tokens
from tokfuse.runtime.distributed.pair_rows import Columns
from tokfuse.runtime.distributed.vocab_checks import check_shard_logits, outside_compile
from tokfuse.runtime.distributed.vocab_shard import VocabShard
from tokfuse.runtime.lm_head.pair_problem import Coefficients, Divergence, Teacher
from tokfuse.runtime.lm_head.pair_results import DistillStep, distill_result, loss_of, token_weights
from tokfuse.runtime.lm_head.problem import NAMES
from tokfuse.runtime.policy.inputs import Normalizer
from tokfuse.runtime.reference.token_stats import result_dtype

STEP = "distributed.distill_step"


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
        all ranks. From logits, the gradient of this rank's columns. From hidden states, the gradients of this
        rank's weight and bias, and the all-reduced gradient of hidden.

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
        check_teacher_values(STEP, teacher_options, mask)
        if teacher_logits is None:
            raise refuse(STEP, "teacher_logits", "given with logits=", "None", "Or pass hidden= and weight=.")
        p, q = check_streams(STEP, ("logits", "teacher_logits"), logits, teacher_logits, options, shard)
        w = token_weights(STEP, coef, mask, normalizer, p.shape[0], p.device, result_dtype(p.dtype))
        leaves: dict[str, torch.Tensor | None] = {"logits": logits}

        def compute() -> Computed:
            both = (options, teacher_options)
            stats, grad = _step_of_logits(logits, p, q, target, *both, divergence, w.coefficient, shard)
            return loss_of(stats, w.coefficient), stats, [grad]

    else:
        assert hidden is not None
        call = check_heads(
            STEP, hidden, weight, bias, target, options, teacher, divergence, memory_budget, shard, sequence_parallel
        )
        w = token_weights(STEP, coef, mask, normalizer, *of_tokens(call))
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


def _needs(*leaves: torch.Tensor | None) -> tuple[bool, bool, bool]:
    wanted = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in leaves]
    return wanted[0], wanted[1], wanted[2]


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
