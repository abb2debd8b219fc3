"""`tokfuse.linear_token_stats`: token_stats of hidden @ weight.T, without a (tokens, vocab) tensor."""

from typing import Any, overload

import torch

from tokfuse.runtime.backends import kept_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import require_tensor
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.leading import Leading, without_ignored
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStats, TokenStatsAt
from tokfuse.runtime.core.token_ids import check_one_of
from tokfuse.runtime.lm_head import cpu_runs, device_runs
from tokfuse.runtime.lm_head.probe import deliver, with_probes
from tokfuse.runtime.lm_head.problem import HEAD_SCHEMA, HeadProblem, check_head, fake_gradients, probed
from tokfuse.runtime.lm_head.units import HeadKernels
from tokfuse.runtime.ops.linear_token_stats_at import linear_token_stats_at
from tokfuse.runtime.reference import linear_token_stats as reference
from tokfuse.runtime.reference import vocab_parallel as rows

OP = "linear_token_stats"


@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    memory_budget: int | None = ...,
    ignore_index: int | None = ...,
    kept_ids: torch.Tensor | None = ...,
    kept_offsets: torch.Tensor | None = ...,
) -> TokenStats: ...


@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    memory_budget: int | None = ...,
    ignore_index: int | None = ...,
    ids: torch.Tensor,
    ids_offsets: torch.Tensor | None = ...,
) -> TokenStatsAt: ...


@overload
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    memory_budget: int | None = ...,
    ignore_index: int | None = ...,
    top_k: int,
) -> TokenStatsAt: ...


@ranged("linear_token_stats.fwd")
def linear_token_stats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    memory_budget: int | None = None,
    ids: torch.Tensor | None = None,
    ids_offsets: torch.Tensor | None = None,
    top_k: int | None = None,
    ignore_index: int | None = None,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
) -> TokenStats | TokenStatsAt:
    """Return `token_stats(hidden @ weight.T + bias, target, ...)` without storing the logits of all tokens.

    The shapes below are for packed tokens. Leading dimensions work too: with hidden of shape
    (..., hidden), every (tokens,) argument has shape (...), and so have the results.

    Args:
        hidden: (tokens, hidden) float32, bfloat16, float16 or float64. Final hidden states.
        weight: (vocab, hidden). Weight of the lm_head. It may have another dtype than hidden, e.g. a
            float32 head over a bfloat16 model.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        bias: (vocab,), any of these dtypes. None: no bias.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows do not enter the GEMMs and return 0. None: all rows count.
        memory_budget: workspace in bytes for the logits, which are computed in chunks of rows. None: 64 MiB, or
            a sixth of the weight's float32 size if that is more; on a GPU at least the workspace of 1024 rows,
            up to 1 GiB. A chunk has at least one row.
        ids: (tokens, K) int32 or int64. Also returns the log-probs of these ids, e.g. the top K of a
            teacher. -1 is padding. An id may repeat. With ids_offsets: (ids,), the ids of all rows,
            concatenated.
        ids_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of ids per row.
        top_k: also returns the top_k most likely ids of each row and their log-probs.
        ignore_index: rows with this target are left out, as with mask = False: -100 for labels of
            transformers. None: no target is special.
        kept_ids: (kept,) int32 or int64, the kept ids of all rows, concatenated. The distribution is then over
            the kept ids of each row, as in `kept_token_stats`: what a sampler with top-p or top-k draws from. Not
            together with ids or top_k. None: over the whole vocabulary.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids per row.

    Returns:
        TokenStats(logp, entropy, lse, sum_sq, top1), each (tokens,) float32 (float64 for float64).
        With ids or top_k: TokenStatsAt, with the additional field logp_at in the shape of the ids, 0 at
        padding and in masked rows. With top_k it also has top_ids, (tokens, top_k) int64: the most likely
        id first, -1 in masked rows.

    Numerics: same bounds as `token_stats` with float32 logits. bfloat16 and float16 inputs are converted
        exactly, and GEMMs accumulate in float32. dW accumulates in float32 and is rounded once. Bitwise
        repeatable. The GEMM library may round a row differently with another chunk size.
        With kept ids, logits outside them become -inf in the workspace, so nothing cancels if their mass is tiny.
        A target that is not a kept id, or a row without kept ids, gives logp = -inf without a gradient.
        If hidden and weight differ in dtype, the logits are computed in the wider dtype (float32 for
        bfloat16 with float16), and each gradient has the dtype of its tensor.

    Gradients and memory: hidden, weight and bias receive a gradient if they require grad. Saved: the
        inputs and four (tokens,) vectors. The backward recomputes the logits of the rows whose incoming
        gradient is not zero, chunk by chunk, and overwrites them with their gradient. Peak extra memory:
        memory_budget, the gradients, and a float32 dW if weight is 16-bit. On a GPU, the statistics of a
        16-bit head need no workspace, except with ids, top_k or kept_ids. The gradient of its logits is
        rounded once to 16 bits for the gradient GEMMs. The backward
        synchronises once to read the number of its rows. Under CUDA-graph capture it does not synchronise, and
        every row is computed. If hidden and weight differ in dtype, the narrower one is widened piece by piece: the
        rows of a chunk, or 64 MiB of the weight (2 MiB on the CPU). No float32 copy of the weight is made.
        Kept ids cost one more write of the workspace per pass. On a GPU they cost about 30 more small launches per
        chunk, and one more synchronisation per pass, for the number of kept ids (none under CUDA-graph capture).

    Examples:
        >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8)
        >>> tokfuse.linear_token_stats(hidden, weight, torch.tensor([0, 1, 2])).entropy
        tensor([1.6094, 1.6094, 1.6094])

    Raises:
        ValueError: wrong shape, dtype, device or range; a target or an id out of range where mask
            is True; ids together with top_k.
        BackendUnavailable: the forced backend cannot run this call.

    Source: the chunked heads of TRL and Liger; same outputs as `token_stats`. Exact.
    """
    if ignore_index is not None or (isinstance(hidden, torch.Tensor) and hidden.dim() != 2):
        if require_tensor(OP, "hidden", hidden).dim() < 1:
            raise refuse(OP, "hidden", "(..., hidden)", "shape ()", "Pass final hidden states.")
        to = Leading(OP, tuple(hidden.shape[:-1]), "hidden")
        flat_target = to.vector("target", require_tensor(OP, "target", target))
        given: dict[str, Any] = {"ids": ids, "ids_offsets": ids_offsets, "top_k": top_k, "memory_budget": memory_budget}
        given |= {"kept_ids": kept_ids, "kept_offsets": kept_offsets}
        if ids is not None and ids_offsets is None:
            given["ids"] = to.rows("ids", ids)
        flat: Any = linear_token_stats(
            to.rows("hidden", hidden),  # type: ignore[arg-type]
            weight,
            flat_target,
            bias=bias,
            temperature=to.vector("temperature", temperature),
            softcap=softcap,
            logit_scale=logit_scale,
            mask=without_ignored(OP, flat_target, to.vector("mask", mask), ignore_index),
            **given,
        )
        if ids_offsets is not None:  # logp_at has one element per id
            fields = flat._asdict().items()
            return TokenStatsAt(*(x if name == "logp_at" else to.unpack(x) for name, x in fields))
        spread: TokenStats | TokenStatsAt = to.unpack(flat)
        return spread
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    problem = probed(OP, check_head(OP, hidden, weight, bias, target, options, memory_budget))
    if ids is not None or top_k is not None or ids_offsets is not None:
        check_one_of(OP, ids, ids_offsets, top_k)
        kept_rows.refuse_with_ids(OP, kept_ids, kept_offsets)
        return linear_token_stats_at(problem, ids, ids_offsets, top_k)
    kept = kept_rows.check_kept(OP, kept_ids, kept_offsets, problem.tokens, hidden.device)
    problem = problem._replace(kept=kept)
    capability = select(OP, hidden.device.type, problem.dtype, options.features())
    if capability.backend == "reference":
        hidden, weight = with_probes(hidden, weight, problem.probes)
        kept_rows.check_kept_values(OP, kept, problem.vocab, mask)
        return TokenStats(*reference.forward(hidden, weight, target, bias=bias, kept=kept, **options.without_bias()))
    if torch.compiler.is_compiling():
        rest = (*options.flat()[:5], problem.memory_budget, *kept_rows.flat(kept))
        return TokenStats(*_linear_op(hidden, weight, bias, target, *rest)[:5])
    run = capability.run
    wants = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    if wants and torch.is_grad_enabled():
        return TokenStats(*_LinearFunction.apply(hidden, weight, bias, problem, run))
    return TokenStats(*run.forward(problem)[:5])


register_cpu(OP, cpu_runs.LINEAR, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_runs.CUDA_LINEAR, FLOAT_DTYPES, "softcap")
register_triton(OP, device_runs.TRITON_LINEAR, FLOAT_DTYPES, "softcap")
register_reference(OP, HeadKernels(rows.head_forward, rows.head_backward, rows.STATE), "softcap")


# ------------------------------------------------------------------------------- autograd, compile


class _LinearFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        p: HeadProblem,
        run: HeadKernels,
    ) -> tuple[torch.Tensor, ...]:
        logp, entropy, lse, sum_sq, top1, row_max, inv_sum = run.forward(p)
        scalars, tensors = p.options.split()
        kept = kept_rows.flat(p.kept)
        ctx.save_for_backward(hidden, weight, bias, p.target, *tensors, *kept, row_max, inv_sum, logp, entropy)
        ctx.rest = scalars, p.memory_budget, run, p.probes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(sum_sq, top1)
        return logp, entropy, lse, sum_sq, top1

    @staticmethod
    @first_order("linear_token_stats")
    @ranged("linear_token_stats.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads[:3]):
            return None, None, None, None, None
        hidden, weight, bias, target, vector, mask, bias_logits, ids, offsets, *stats = ctx.saved_tensors
        scalars, budget, run, probes = ctx.rest
        probes = tuple(probe.emptied() for probe in probes)
        options = scalars.joined(vector, mask, bias_logits)
        kept = kept_rows.of_graph(ids, offsets)
        p = HeadProblem(OP, hidden, weight, bias, target, options, budget, probes=probes, kept=kept)
        needs = tuple(ctx.needs_input_grad[:3])
        found = run.backward(p, *stats, grads[0], grads[1], needs, grad_lse=grads[2])
        deliver(probes)
        return (*found, None, None)


def _problem(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor, *rest: Any
) -> tuple[HeadProblem, HeadKernels]:
    *flat, budget, ids, offsets = rest
    kept = kept_rows.of_graph(ids, offsets)
    p = HeadProblem(OP, hidden, weight, bias, target, LogitOptions.from_flat(*flat), budget, kept=kept)
    return p, select(OP, hidden.device.type, p.dtype, p.options.features()).run


ARGUMENTS = f"{HEAD_SCHEMA}, {FLAT_SCHEMA_WITHOUT_BIAS}, int memory_budget, {kept_rows.SCHEMA}"


@graph_op("tokfuse::linear_token_stats", f"({ARGUMENTS}) -> ({', '.join(['Tensor'] * 7)})")
@ranged("linear_token_stats.fwd")
def _linear_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    p, run = _problem(*arguments)
    return run.forward(p)


@_linear_op.register_fake
def _(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(7))


@graph_op(
    "tokfuse::linear_token_stats_backward",
    f"({ARGUMENTS}, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy, Tensor? grad_logp"
    ", Tensor? grad_entropy, Tensor? grad_lse, bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("linear_token_stats.bwd")
def _linear_backward_op(*arguments: Any) -> list[torch.Tensor]:
    p, run = _problem(*arguments[:12])
    *given, grad_lse = arguments[12:-3]
    found = run.backward(p, *given, arguments[-3:], grad_lse=grad_lse)
    return [p.hidden.new_empty(0) if x is None else x for x in found]


@_linear_backward_op.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:
    return fake_gradients(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    *head, ctx.budget, ids, offsets = inputs
    tensors, flat = head[:4], head[4:]
    logp, entropy, lse, sum_sq, top1, row_max, inv_sum = output
    ctx.options, more = LogitOptions.from_flat(*flat).split()
    ctx.save_for_backward(*tensors, *more, ids, offsets, row_max, inv_sum, logp, entropy)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(sum_sq, top1, row_max, inv_sum)


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(g is None for g in grads[:3]):
        return (None,) * 12
    *tensors, vector, mask, bias_logits, ids, offsets, row_max, inv_sum, logp, entropy = ctx.saved_tensors
    stats = (row_max, inv_sum, logp, entropy)
    o = ctx.options.joined(vector, mask, bias_logits)
    needs = tuple(ctx.needs_input_grad[:3])
    arguments = (*tensors, *o.flat()[:5], ctx.budget, ids, offsets)
    out = _linear_backward_op(*arguments, *stats, *grads[:3], *needs)
    chosen = [x if need else None for x, need in zip(out, needs, strict=True)]
    return (*chosen,) + (None,) * 9


_linear_op.register_autograd(_op_backward, setup_context=_setup_context)
