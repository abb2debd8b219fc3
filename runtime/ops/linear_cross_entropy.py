"""`tokfuse.linear_cross_entropy`: the loss of torch's linear_cross_entropy without stored logits."""

import functools
from typing import Any, Literal, overload

import torch

from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.class_loss import ClassLoss
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forward_gradients import Computed, with_gradients
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.leading import Leading, without_ignored
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import CrossEntropyStats
from tokfuse.runtime.lm_head import cpu_runs, device_head, device_runs
from tokfuse.runtime.lm_head.probe import deliver, with_probes
from tokfuse.runtime.lm_head.problem import HEAD_SCHEMA, NAMES, HeadProblem, check_head, fake_gradients, probed, wanted
from tokfuse.runtime.lm_head.units import HeadKernels, Units, UnitStats
from tokfuse.runtime.ops.cross_entropy import ClassSums, LossOptions, check_labels, fake_sums, save_sums
from tokfuse.runtime.reference import cross_entropy as reference
from tokfuse.runtime.reference import vocab_parallel as rows

OP = "linear_cross_entropy"


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    class_weight: torch.Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = ...,
    class_weight: torch.Tensor | None = ...,
    ignore_index: int | None = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    memory_budget: int | None = ...,
    return_stats: Literal[True],
) -> CrossEntropyStats: ...


@ranged("linear_cross_entropy.fwd")
def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    target: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    ignore_index: int | None = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    memory_budget: int | None = None,
    return_stats: bool = False,
) -> torch.Tensor | CrossEntropyStats:
    """Return `cross_entropy(hidden @ weight.T + bias, target, ...)` without storing the logits of all tokens.

    Values, gradients and defaults equal torch.nn.functional.linear_cross_entropy(hidden, weight, target). Three of its
    arguments have other names here: linear_bias is bias, weight is class_weight, and options is memory_budget.

    The shapes below are for packed tokens. Leading dimensions work too: with hidden of shape (..., hidden),
    every (tokens,) argument has shape (...).

    Args:
        hidden: (tokens, hidden) float32, bfloat16, float16 or float64. Final hidden states.
        weight: (vocab, hidden). Weight of the lm_head. It may have another dtype than hidden.
        target: (tokens,) int64 class indices, in [0, vocab) or equal to ignore_index.
        bias: (vocab,), any of these dtypes. None: no bias.
        class_weight: (vocab,) class weights. Negative weights and NaN raise no error, as in torch. None: 1 for every
            class.
        ignore_index: rows with this target do not count and do not enter the GEMMs. None: -100, as in torch.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the uniform distribution in the target distribution, in [0, 1].
        z_loss: coefficient of the squared log-sum-exp, >= 0.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows do not count, as with ignore_index. None: all rows count.
        memory_budget: workspace in bytes for the logits, as in `linear_token_stats`.
        return_stats: also returns the statistics of the rows, to add a policy term, an entropy bonus or an
            estimate of a KL to the loss. They cost no further GEMM.

    Returns:
        () float32 (float64 for float64 inputs); with reduction="none" (tokens,), 0 in rows that do not count. "mean"
        of no row is nan, as in torch. With return_stats: CrossEntropyStats(loss, stats), where stats is the
        TokenStats of `linear_token_stats`.

    Numerics: the bounds of `linear_token_stats`.

    Gradients and memory: hidden, weight and bias receive a gradient if they require grad. "mean" and "sum" compute
        the gradients in the forward, from the same logits, and keep them until the backward. That is one GEMM for the
        logits and two for the gradients. "none", return_stats, torch.compile and CUDA-graph capture save the inputs
        and (tokens,) vectors instead, and compute the logits again in the backward, as `linear_token_stats` does. The
        loss and the stats (logp, entropy, lse) share this backward. Peak extra memory: memory_budget, the gradients,
        and a float32 dW if weight is 16-bit. With label_smoothing, or when the forward computes the gradients, a GPU
        stores the logits of one chunk at a time in the workspace, for 16-bit heads too.

    Examples:
        >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8)
        >>> tokfuse.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]), label_smoothing=0.1)
        tensor(1.6094)
        >>> loss, stats = tokfuse.linear_cross_entropy(hidden, weight, torch.tensor([0, 1, -100]), return_stats=True)
        >>> stats.logp
        tensor([-1.6094, -1.6094,  0.0000])

    Raises:
        ValueError: wrong shape, dtype, device or range; class probabilities as target. On a GPU, targets are
            checked only with TOKFUSE_CHECK=1. Without the check, a target out of range makes its loss NaN.
        BackendUnavailable: the forced backend cannot run this call.

    Source: the options of torch 2.13. z-loss: PaLM (arXiv 2204.02311). Exact.
    """
    if checks.require_tensor(OP, "hidden", hidden).dim() < 1:
        raise refuse(OP, "hidden", "(..., hidden)", "shape ()", "Pass final hidden states.")
    remedy = (
        "Pass the teacher's head to tokfuse.linear_paired_divergence with kind='kl_forward': it has the same gradient, "
        "and the cross entropy is this divergence plus the entropy of the teacher."
    )
    target = check_labels(OP, target, remedy)
    to = Leading(OP, tuple(hidden.shape[:-1]), "hidden")
    h: Any = to.rows("hidden", hidden)
    target = to.vector("target", target)
    given: Any = without_ignored(OP, target, to.vector("mask", mask), -100 if ignore_index is None else ignore_index)
    options = LogitOptions(to.vector("temperature", temperature), softcap, logit_scale, given).floats()
    p = check_head(OP, h, weight, bias, target, options, memory_budget)
    spec = LossOptions(ClassLoss(class_weight, label_smoothing, z_loss), reduction, return_stats)
    spec = spec.checked(OP, "class_weight", p.vocab, h.device)
    smooth = spec.smooth
    p = probed(OP, p._replace(class_weight=class_weight if smooth else None))
    capability = select(OP, p.hidden.device.type, p.dtype, p.options.features())
    if capability.backend == "reference":
        hidden, weight = with_probes(p.hidden, p.weight, p.probes)
        tensors = (hidden, weight, p.bias, p.target, p.class_weight)
        found = reference.head_forward(*tensors, p.dtype, **p.options.without_bias())
        return spec.result(ClassSums.of(found, smooth), target, given, p.vocab, to)
    p = p._replace(class_weight=checks.plain(p.class_weight, torch.float32))
    if torch.compiler.is_compiling():
        tensors = (p.hidden, p.weight, p.bias, p.target, p.class_weight)
        out = _sums_op(*tensors, *p.options.flat()[:5], p.memory_budget, smooth)
    elif not torch.is_grad_enabled() or not any(wanted(p)):
        out = _forward(capability.run, p, smooth)
    elif spec.return_stats or spec.reduction == "none" or device_head.capturing(p.hidden):
        out = _SumsFunction.apply(p.hidden, p.weight, p.bias, p, smooth, capability.run)
    else:
        return _in_one_pass(capability.run, p, spec, given)
    return spec.result(ClassSums.of(out, smooth), target, given, p.vocab, to)


def _in_one_pass(run: HeadKernels, p: HeadProblem, spec: LossOptions, mask: torch.Tensor) -> torch.Tensor:
    """Return the reduced loss, and compute its gradients from the same logits.

    The backward only scales these gradients, because the loss is one number. With "none" or the statistics, each row
    has a separate incoming gradient, so the backward has to compute the logits again: one GEMM more than here.
    """
    dtype = torch.float32
    if spec.smooth:
        p = p._replace(logit_sum=torch.zeros(p.tokens, dtype=dtype, device=p.hidden.device))
    scale: float | torch.Tensor = 1.0
    if spec.reduction == "mean":
        scale = 1.0 / spec.loss.counts(p.target, mask, p.vocab, dtype).sum()
    rows = mask.nonzero().squeeze(1)
    units = Units(rows, range(rows.shape[0] + 1))

    def loss(stats: UnitStats, tokens: torch.Tensor, first: int, last: int) -> torch.Tensor:
        of_units = (stats.logp, stats.lse, stats.logit_sum, p.target[tokens], mask[tokens])
        return scale * spec.loss.losses(*of_units, p.vocab).sum()

    def compute() -> Computed:
        assert run.units is not None
        found = run.units(p, units, loss)
        sums = ClassSums(found.stats, p.logit_sum)
        return spec.reduced(sums, p.target, mask, p.vocab), (), found.gradients

    leaves = dict(zip(NAMES, (p.hidden, p.weight, p.bias), strict=True))
    return with_gradients(OP, leaves, compute, {}, functools.partial(deliver, p.probes))[0]


def _forward(run: HeadKernels, p: HeadProblem, smooth: bool) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, logit_sum, sum_sq, top1, row_max, inv_sum). The first four are differentiable.

    Unless `smooth`, the sum over the classes is not computed, and logit_sum is empty.
    """
    logit_sum = torch.zeros(p.tokens if smooth else 0, dtype=torch.float32, device=p.hidden.device)
    logp, entropy, lse, *rest = run.forward(p._replace(logit_sum=logit_sum if smooth else None))
    return logp, entropy, lse, logit_sum, *rest


def _backward(
    run: HeadKernels,
    p: HeadProblem,
    state: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...],
    needs: tuple[bool, ...],
) -> list[torch.Tensor | None]:
    """Return [grad_hidden, grad_weight, grad_bias].

    Args:
        state: (row_max, inv_sum, logp, entropy).
        grads: the gradients of logp, entropy, lse and logit_sum.
    """
    grad_logp, grad_entropy, grad_lse, grad_logit_sum = grads
    if grad_logit_sum is not None and grad_logit_sum.shape[0] == 0:
        grad_logit_sum = None  # of a call that is not `smooth`, inside torch.compile
    more = {"grad_lse": grad_lse, "grad_logit_sum": grad_logit_sum}
    return run.backward(p, *state, grad_logp, grad_entropy, needs, **more)


register_cpu(OP, cpu_runs.LINEAR, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_runs.CUDA_LINEAR, FLOAT_DTYPES, "softcap")
register_triton(OP, device_runs.TRITON_LINEAR, FLOAT_DTYPES, "softcap")
register_reference(OP, HeadKernels(rows.head_forward, rows.head_backward, rows.STATE), "softcap")


# ------------------------------------------------------------------------------- autograd, compile


class _SumsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        p: HeadProblem,
        smooth: bool,
        run: HeadKernels,
    ) -> tuple[torch.Tensor, ...]:
        out = _forward(run, p, smooth)
        save_sums(ctx, (hidden, weight, bias, p.target, p.class_weight), out, p.options)
        ctx.rest = run, p.memory_budget, p.probes
        ctx.mark_non_differentiable(*out[4:6])
        return out[:6]

    @staticmethod
    @first_order(OP)
    @ranged("linear_cross_entropy.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads[:4]):
            return (None,) * 6
        hidden, weight, bias, target, class_weight, vector, mask, *state = ctx.saved_tensors
        run, budget, probes = ctx.rest
        probes = tuple(probe.emptied() for probe in probes)
        o = ctx.options.joined(vector, mask, None)
        p = HeadProblem(OP, hidden, weight, bias, target, o, budget, probes=probes, class_weight=class_weight)
        found = _backward(run, p, tuple(state), grads[:4], tuple(ctx.needs_input_grad[:3]))
        deliver(probes)
        return (*found, None, None, None)


ARGUMENTS = f"{HEAD_SCHEMA}, Tensor? class_weight, {FLAT_SCHEMA_WITHOUT_BIAS}, int memory_budget"


def _problem(*arguments: Any) -> tuple[HeadProblem, HeadKernels]:
    hidden, weight, bias, target, class_weight, *flat, budget = arguments
    o = LogitOptions.from_flat(*flat)
    p = HeadProblem(OP, hidden, weight, bias, target, o, budget, class_weight=class_weight)
    return p, select(OP, p.hidden.device.type, p.dtype, p.options.features()).run


@graph_op("tokfuse::linear_cross_entropy_sums", f"({ARGUMENTS}, bool smooth) -> ({', '.join(['Tensor'] * 8)})")
@ranged("linear_cross_entropy.fwd")
def _sums_op(*arguments: Any) -> tuple[torch.Tensor, ...]:
    *problem, smooth = arguments
    p, run = _problem(*problem)
    return _forward(run, p, smooth)


@_sums_op.register_fake
def _(hidden: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fake_sums(hidden, rest[-1])


@graph_op(
    "tokfuse::linear_cross_entropy_sums_backward",
    f"({ARGUMENTS}, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy, Tensor? grad_logp"
    ", Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_logit_sum"
    ", bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("linear_cross_entropy.bwd")
def _sums_backward_op(*arguments: Any) -> list[torch.Tensor]:
    p, run = _problem(*arguments[:11])
    found = _backward(run, p, arguments[11:15], arguments[15:19], arguments[19:])
    return [p.hidden.new_empty(0) if x is None else x for x in found]


@_sums_backward_op.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:
    return fake_gradients(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    save_sums(ctx, inputs[:5], output, LogitOptions.from_flat(*inputs[5:10]))
    ctx.budget = inputs[10]
    ctx.mark_non_differentiable(*output[4:])


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(g is None for g in grads[:4]):
        return (None,) * 12
    *tensors, vector, mask, row_max, inv_sum, logp, entropy = ctx.saved_tensors
    state = row_max, inv_sum, logp, entropy
    flat = ctx.options.joined(vector, mask, None).flat()[:5]
    needs = tuple(ctx.needs_input_grad[:3])
    out = _sums_backward_op(*tensors, *flat, ctx.budget, *state, *grads[:4], *needs)
    return (*(x if need else None for x, need in zip(out, needs, strict=True)), *((None,) * 9))


_sums_op.register_autograd(_op_backward, setup_context=_setup_context)
