"""The backward that returns gradients computed in the forward pass, and the results that show them."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.ranges import ranged

Gradients = dict[str, torch.Tensor | None]


class HeldGradients:
    """The gradients of a step by name, until its last backward."""

    _gradients: Gradients
    _leading: tuple[int, ...] | None = None  # leading dimensions of the input in place of (tokens,)

    # The last `loss.backward()` moves the gradients out of this object. If this object kept them,
    # autograd would have to copy a (vocab, hidden) tensor into `weight.grad`.

    @property
    def grad_logits(self) -> torch.Tensor | None:
        """d loss / d logits, (tokens, vocab).

        None for a step from hidden states, after the last backward, and on the reference backend inside
        torch.compile, where autograd computes the gradient in the backward.
        """
        return self._of_rows("logits")

    @property
    def grad_hidden(self) -> torch.Tensor | None:
        """d loss / d hidden, (tokens, hidden). None if hidden requires no gradient, or after the last backward."""
        return self._of_rows("hidden")

    def _of_rows(self, name: str) -> torch.Tensor | None:
        grad = self._gradients.get(name)
        return grad if grad is None or self._leading is None else grad.view(*self._leading, grad.shape[-1])

    @property
    def grad_weight(self) -> torch.Tensor | None:
        """d loss / d weight, (vocab, hidden). None if weight requires no gradient, or after the last backward."""
        return self._gradients.get("weight")

    @property
    def grad_bias(self) -> torch.Tensor | None:
        """d loss / d bias, (vocab,). None if bias requires no gradient, or after the last backward."""
        return self._gradients.get("bias")


def _keeps_graph() -> bool:
    """Return True inside a backward that may run again (retain_graph=True)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


Computed = tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor | None]]
"""Loss, further results without a gradient, gradients of the loss."""


Deliver = Callable[[torch.Tensor], None]


def with_gradients(
    op: str,
    leaves: Mapping[str, torch.Tensor | None],
    compute: Callable[[], Computed],
    gradients: Gradients,
    deliver: Deliver | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the loss and the further results of `compute`. The backward of the loss returns its gradients.

    Args:
        op: name of the op, for the profiler range of the backward and for errors.
        leaves: the inputs that the gradients belong to, by name, in the order of the gradients.
        compute: called once. Its gradients are stored in `gradients` by name until the last backward.
        gradients: empty; `HeldGradients` shows its content.
        deliver: called in every backward with the gradient of the loss: it passes on what else the forward
            computed, the probes of an lm_head. None: nothing else.
    """
    rest = (op, tuple(leaves), compute, gradients, deliver)
    out: tuple[torch.Tensor, ...] = _ForwardGradients.apply(*rest, *leaves.values())
    return out


class _ForwardGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        names: tuple[str, ...],
        compute: Callable[[], Computed],
        gradients: Gradients,
        deliver: Deliver | None,
        *leaves: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        loss, others, grads = compute()
        gradients.update(zip(names, grads, strict=True))
        ctx.op, ctx.names, ctx.gradients, ctx.deliver = op, names, gradients, deliver
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        grads = _hand_over_of(ctx.op)(ctx.gradients, grad_loss, ctx.op)
        if ctx.deliver is not None:
            ctx.deliver(grad_loss)
        return None, None, None, None, None, *(grads[name] for name in ctx.names)


@functools.cache
def _hand_over_of(op: str) -> Callable[[Gradients, torch.Tensor, str], Gradients]:
    """Return `_hand_over` for an op: inside the profiler range of its backward, with an error under create_graph."""
    return first_order(op)(ranged(f"{op}.bwd")(_hand_over))


def _hand_over(gradients: Gradients, grad_loss: torch.Tensor, op: str) -> Gradients:
    """Return the stored gradients times grad_loss. The last backward moves them instead of copying them."""
    if not any(x is not None for x in gradients.values()):
        raise RuntimeError(
            f"{op}: backward ran twice, but the first backward has already returned the stored gradients. "
            "Pass retain_graph=True to the first backward."
        )
    last = not _keeps_graph()
    # On a CPU, reading the scalar needs no synchronisation and can save a pass over every gradient.
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    out: Gradients = {}
    for name, grad in gradients.items():
        if grad is not None and not is_one:
            grad = grad.mul_(grad_loss) if last else grad * grad_loss.to(grad.dtype)
        elif grad is not None and not last:
            grad = grad.clone()  # its receiver may write into it, e.g. an accumulation into .grad
        out[name] = grad
    if last:
        gradients.update(dict.fromkeys(gradients))
    return out
