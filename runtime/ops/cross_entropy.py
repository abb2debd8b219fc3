"""`tokfuse.cross_entropy`: the loss of torch.nn.functional.cross_entropy over logits, from one read of them."""

from typing import Any, Literal, NamedTuple, overload

import torch

from tokfuse.runtime.backends import cpu_rows, cuda_rows, triton_rows
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.class_loss import ClassLoss
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, Kernels, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.leading import Leading, without_ignored
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_logits
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import CrossEntropyStats, TokenStats
from tokfuse.runtime.reference import cross_entropy as reference

OP = "cross_entropy"
REDUCTIONS = ("none", "mean", "sum")


class ClassSums(NamedTuple):
    """Statistics of the rows, (tokens,) each; 0 in masked rows."""

    stats: TokenStats
    logit_sum: torch.Tensor | None
    """sum_j class_weight_j u_j of the scaled logits u. None: no label smoothing, so it is not needed."""

    @classmethod
    def of(cls, out: tuple[torch.Tensor, ...], smooth: bool) -> "ClassSums":
        """Return the record of the outputs (logp, entropy, lse, logit_sum, sum_sq, top1, ...)."""
        logp, entropy, lse, logit_sum, sum_sq, top1 = out[:6]
        return cls(TokenStats(logp, entropy, lse, sum_sq, top1), logit_sum if smooth else None)


class LossOptions(NamedTuple):
    """The options that `cross_entropy` and `linear_cross_entropy` share."""

    loss: ClassLoss
    reduction: str
    return_stats: bool

    def checked(self, op: str, name: str, vocab: int, device: torch.device) -> "LossOptions":
        """Return the options with numbers as floats. Reads no values. Errors call the class weights `name`."""
        checks.check_choice(op, "reduction", self.reduction, REDUCTIONS)
        checks.check_flag(op, "return_stats", self.return_stats)
        return self._replace(loss=self.loss.checked(op, name, vocab, device))

    @property
    def smooth(self) -> bool:
        """Whether the loss needs the sum over the classes."""
        return self.loss.label_smoothing != 0.0

    def result(
        self, found: ClassSums, target: torch.Tensor, mask: torch.Tensor, vocab: int, to: Leading
    ) -> torch.Tensor | CrossEntropyStats:
        """Return what the user asked for, from the statistics of the rows."""
        loss = self.reduced(found, target, mask, vocab)
        if self.reduction == "none":
            loss = to.unpack(loss)
        return CrossEntropyStats(loss, to.unpack(found.stats)) if self.return_stats else loss

    def reduced(self, found: ClassSums, target: torch.Tensor, mask: torch.Tensor, vocab: int) -> torch.Tensor:
        """Return the loss, () or (tokens,), from the statistics of the rows."""
        stats = found.stats
        losses = self.loss.losses(stats.logp, stats.lse, found.logit_sum, target, mask, vocab)
        if self.reduction == "none":
            return losses
        if self.reduction == "sum":
            return losses.sum()
        return losses.sum() / self.loss.counts(target, mask, vocab, losses.dtype).sum()


def check_labels(op: str, target: object, remedy: str) -> torch.Tensor:
    """Return `target`. Raise ValueError if it contains class probabilities."""
    found = checks.require_tensor(op, "target", target)
    if found.is_floating_point():
        raise refuse(op, "target", "class indices (int64)", f"class probabilities ({found.dtype})", remedy)
    return found


@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    return_stats: Literal[False] = ...,
) -> torch.Tensor: ...


@overload
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = ...,
    *,
    ignore_index: int = ...,
    reduction: str = ...,
    label_smoothing: float = ...,
    z_loss: float = ...,
    temperature: float | torch.Tensor = ...,
    softcap: float | None = ...,
    logit_scale: float = ...,
    mask: torch.Tensor | None = ...,
    return_stats: Literal[True],
) -> CrossEntropyStats: ...


@ranged("cross_entropy.fwd")
def cross_entropy(
    logits: torch.Tensor,
    target: torch.Tensor,
    weight: torch.Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    return_stats: bool = False,
) -> torch.Tensor | CrossEntropyStats:
    """Return the cross entropy of torch.nn.functional.cross_entropy, with an optional z-loss, from one read.

    With log p = log_softmax(logits), y the target, V the vocabulary, w the class weights and lse the
    log-sum-exp, the loss of a token is

        (1 - label_smoothing) w_y (-log p_y) + label_smoothing / V sum_j w_j (-log p_j) + z_loss lse^2.

    "sum" adds the losses of all tokens that count. "mean" divides this sum by the sum of their w_y.

    The shapes below are for packed tokens. Leading dimensions work too: with logits of shape (..., vocab), every
    (tokens,) argument has shape (...). torch.nn.functional.cross_entropy expects the classes in dimension 1 instead.

    Args:
        logits: (tokens, vocab) float32, bfloat16, float16 or float64. Any row stride.
        target: (tokens,) int64 class indices, in [0, vocab) or equal to ignore_index.
        weight: (vocab,) class weights. Negative weights and NaN raise no error, as in torch. None: 1 for every class.
        ignore_index: rows with this target do not count. They have no loss, no gradient and are not read.
        reduction: "mean", "sum" or "none".
        label_smoothing: share of the uniform distribution in the target distribution, in [0, 1].
        z_loss: coefficient of the squared log-sum-exp, >= 0. It keeps the logits from drifting (PaLM).
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        mask: (tokens,) bool. False rows do not count, as with ignore_index. None: all rows count.
        return_stats: also returns the statistics of the rows, to add a policy term, an entropy bonus or an
            estimate of a KL to the loss. They cost no further read.

    Returns:
        () float32 (float64 for float64 logits); with reduction="none" (tokens,), 0 in rows that do not count. "mean"
        of no row is nan, as in torch. With return_stats: CrossEntropyStats(loss, stats), where stats is the
        TokenStats of `token_stats`. The loss is bitwise the same.

    Numerics: the bounds of `token_stats`. The loss is float32 for every input dtype; torch rounds the loss of 16-bit
        logits to 16 bits. -inf logits are excluded classes. With label_smoothing they make the loss infinite, as in
        torch. For padded vocabularies, pass `logits[..., :vocab]`, which is not copied.

    Gradients and memory: logits receive the gradient of the loss and of logp, entropy and lse of the stats. Saved:
        the logits and (tokens,) vectors. The forward reads the logits once. The backward reads them once and writes
        the gradient of all terms once.

    Examples:
        >>> logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [0.0, 0.0]])
        >>> tokfuse.cross_entropy(logits, torch.tensor([0, 0, -100]))
        tensor(1.1269)
        >>> tokfuse.cross_entropy(logits, torch.tensor([0, 0, -100]), label_smoothing=0.1, reduction="none")
        tensor([0.2269, 2.0269, 0.0000])
        >>> loss, stats = tokfuse.cross_entropy(logits, torch.tensor([0, 0, -100]), return_stats=True)
        >>> loss - 0.1 * stats.entropy.mean()
        tensor(1.1026)

    Raises:
        ValueError: wrong shape, dtype, device or range; class probabilities as target. On a GPU, targets are
            checked only with TOKFUSE_CHECK=1. Without the check, a target out of range makes its loss NaN.
        BackendUnavailable: the forced backend cannot run this call.

    Source: label smoothing: Szegedy et al. 2016 (arXiv 1512.00567). z-loss: PaLM (arXiv 2204.02311). Exact.
    """
    if checks.require_tensor(OP, "logits", logits).dim() < 1:
        raise refuse(OP, "logits", "(..., vocab)", "shape ()", "Pass the full vocabulary.")
    remedy = (
        "Pass the teacher's logits to tokfuse.paired_divergence with kind='kl_forward': it has the same gradient, and "
        "the cross entropy is this divergence plus the entropy of the teacher."
    )
    target = check_labels(OP, target, remedy)
    to = Leading(OP, tuple(logits.shape[:-1]), "logits")
    z: Any = to.rows("logits", logits)
    target = to.vector("target", target)
    if isinstance(ignore_index, bool) or not checks.is_integer(ignore_index):
        raise refuse(OP, "ignore_index", "an int", repr(ignore_index), "Pass -100 for labels of transformers.")
    given: Any = without_ignored(OP, target, to.vector("mask", mask), ignore_index)
    options = LogitOptions(to.vector("temperature", temperature), softcap, logit_scale, given).floats()
    check_logits(OP, z, target, options)
    vocab = z.shape[1]
    spec = LossOptions(ClassLoss(weight, label_smoothing, z_loss), reduction, return_stats)
    spec = spec.checked(OP, "weight", vocab, z.device)
    found = _stats(z, target, options, weight if spec.smooth else None, spec.smooth)
    return spec.result(found, target, given, vocab, to)


def _stats(
    z: torch.Tensor, target: torch.Tensor, o: LogitOptions, class_weight: torch.Tensor | None, smooth: bool
) -> ClassSums:
    """Compute the statistics, with the sum over the classes if `smooth`. The arguments are checked."""
    capability = select(OP, z.device.type, z.dtype, o.features())
    if capability.backend == "reference":
        return ClassSums.of(reference.forward(z, target, class_weight, OP, **o.without_bias()), smooth)
    class_weight = checks.plain(class_weight, torch.float32)
    if torch.compiler.is_compiling():
        return ClassSums.of(_sums_op(z, target, class_weight, *o.flat()[:5], smooth), smooth)
    if z.requires_grad and torch.is_grad_enabled():
        return ClassSums.of(_SumsFunction.apply(z, target, class_weight, o, smooth, capability.run), smooth)
    return ClassSums.of(_forward(capability.run, z, target, class_weight, o, smooth), smooth)


def _forward(
    run: Kernels,
    z: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    o: LogitOptions,
    smooth: bool,
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, logit_sum, sum_sq, top1, row_max, inv_sum). The first four are differentiable.

    Unless `smooth`, the sum over the classes is not computed, and logit_sum is empty.
    """
    logit_sum = torch.empty(z.shape[0] if smooth else 0, dtype=torch.float32, device=z.device)
    given = {"op": OP, "logit_sum": logit_sum if smooth else None, "class_weight": class_weight}
    logp, entropy, lse, *rest = run.forward(z, target, **given, **o.without_bias())
    return logp, entropy, lse, logit_sum, *rest


def _backward(
    run: Kernels,
    z: torch.Tensor,
    target: torch.Tensor,
    class_weight: torch.Tensor | None,
    o: LogitOptions,
    state: tuple[torch.Tensor, ...],
    grads: tuple[torch.Tensor | None, ...],
) -> torch.Tensor:
    """Return the gradient of the logits.

    Args:
        state: (row_max, inv_sum, logp, entropy).
        grads: the gradients of logp, entropy, lse and logit_sum.
    """
    assert run.backward is not None
    grad_logp, grad_entropy, grad_lse, grad_logit_sum = grads
    if grad_logit_sum is not None and grad_logit_sum.shape[0] == 0:
        grad_logit_sum = None  # of a call that is not `smooth`, inside torch.compile
    more = {"grad_lse": grad_lse, "grad_logit_sum": grad_logit_sum, "class_weight": class_weight}
    grad: torch.Tensor = run.backward(z, target, *state, grad_logp, grad_entropy, **more, **o.without_bias())
    return grad


register_cpu(OP, cpu_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_cuda(OP, cuda_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_triton(OP, triton_rows.TOKEN_STATS, FLOAT_DTYPES, "softcap")
register_reference(OP, Kernels(reference.forward, None), "softcap")


# ------------------------------------------------------------------------------- autograd, compile


class _SumsFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        z: torch.Tensor,
        target: torch.Tensor,
        class_weight: torch.Tensor | None,
        o: LogitOptions,
        smooth: bool,
        run: Kernels,
    ) -> tuple[torch.Tensor, ...]:
        out = _forward(run, z, target, class_weight, o, smooth)
        save_sums(ctx, (z, target, class_weight), out, o)
        ctx.run = run
        ctx.mark_non_differentiable(*out[4:6])
        return out[:6]

    @staticmethod
    @first_order(OP)
    @ranged("cross_entropy.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        if all(g is None for g in grads[:4]):
            return (None,) * 6
        z, target, class_weight, vector, mask, *state = ctx.saved_tensors
        o = ctx.options.joined(vector, mask, None)
        return (_backward(ctx.run, z, target, class_weight, o, tuple(state), grads[:4]),) + (None,) * 5


def save_sums(ctx: Any, tensors: tuple[Any, ...], outputs: tuple[torch.Tensor, ...], o: LogitOptions) -> None:
    """Save what the backward needs: the tensors, the options' tensors, and (row_max, inv_sum, logp, entropy)."""
    ctx.options, (vector, mask, _) = o.split()
    logp, entropy, _, _, _, _, row_max, inv_sum = outputs
    ctx.save_for_backward(*tensors, vector, mask, row_max, inv_sum, logp, entropy)
    ctx.set_materialize_grads(False)


def fake_sums(rows: torch.Tensor, smooth: bool) -> tuple[torch.Tensor, ...]:
    """Return the outputs of `_forward` without values, for the rows of logits or hidden states."""
    sizes = [rows.shape[0] if smooth or i != 3 else 0 for i in range(8)]
    return tuple(rows.new_empty(size, dtype=torch.float32) for size in sizes)


ARGUMENTS = f"Tensor logits, Tensor target, Tensor? class_weight, {FLAT_SCHEMA_WITHOUT_BIAS}"


@graph_op("tokfuse::cross_entropy_sums", f"({ARGUMENTS}, bool smooth) -> ({', '.join(['Tensor'] * 8)})")
@ranged("cross_entropy.fwd")
def _sums_op(
    z: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, *flat: Any
) -> tuple[torch.Tensor, ...]:
    *options, smooth = flat
    o = LogitOptions.from_flat(*options)
    return _forward(select(OP, z.device.type, z.dtype, o.features()).run, z, target, class_weight, o, smooth)


@_sums_op.register_fake
def _(z: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return fake_sums(z, rest[-1])


@graph_op(
    "tokfuse::cross_entropy_sums_backward",
    f"({ARGUMENTS}, Tensor row_max, Tensor inv_sum, Tensor logp, Tensor entropy"
    ", Tensor? grad_logp, Tensor? grad_entropy, Tensor? grad_lse, Tensor? grad_logit_sum) -> Tensor",
)
@ranged("cross_entropy.bwd")
def _sums_backward_op(
    z: torch.Tensor, target: torch.Tensor, class_weight: torch.Tensor | None, *rest: Any
) -> torch.Tensor:
    o = LogitOptions.from_flat(*rest[:5])
    run = select(OP, z.device.type, z.dtype, o.features()).run
    return _backward(run, z, target, class_weight, o, rest[5:9], rest[9:])


@_sums_backward_op.register_fake
def _(z: torch.Tensor, *_: Any) -> torch.Tensor:
    return z.new_empty(z.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    save_sums(ctx, inputs[:3], output, LogitOptions.from_flat(*inputs[3:8]))
    ctx.mark_non_differentiable(*output[4:])


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    if all(g is None for g in grads[:4]):
        return (None,) * 9
    z, target, class_weight, vector, mask, *state = ctx.saved_tensors
    flat = ctx.options.joined(vector, mask, None).flat()[:5]
    return (_sums_backward_op(z, target, class_weight, *flat, *state, *grads[:4]),) + (None,) * 8


_sums_op.register_autograd(_op_backward, setup_context=_setup_context)
