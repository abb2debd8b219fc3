"""The rows of an lm_head that one rank holds: what the passes over vocabulary shards add to `DeviceHead`."""

import torch

from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.pair_problem import Gradients
from tokfuse.runtime.lm_head.problem import HeadProblem
from tokfuse.runtime.reference.linear_token_stats import logits_of


class ExactHead:
    """As `DeviceHead`, in float64: the head of the reference."""

    def __init__(self, p: HeadProblem, needs: tuple[bool, bool, bool]) -> None:
        self.hidden, self.weight, self.bias = p.hidden, p.weight.double(), p.bias
        self.leaves = (p.hidden, p.weight, p.bias)
        shapes = (p.hidden.shape, p.weight.shape, p.weight.shape[:1])
        wide = {"dtype": torch.float64, "device": p.hidden.device}
        self.grads = [
            torch.zeros(shape, **wide) if need else None  # type: ignore[call-overload]
            for shape, need in zip(shapes, needs, strict=True)
        ]

    def logits(self, h: torch.Tensor) -> torch.Tensor:
        """Return the logits of hidden states."""
        return logits_of(h, self.weight, self.bias)

    def gradient_like(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the tensor for the gradient of `logits`."""
        return logits

    def add(self, index: torch.Tensor, h: torch.Tensor, dz: torch.Tensor) -> None:
        """Add the gradient rows of tokens `index` to the gradients."""
        hidden, weight, bias = self.grads
        if hidden is not None:
            hidden[index] = dz @ self.weight
        if weight is not None:
            weight += dz.t() @ h.double()
        if bias is not None:
            bias += dz.sum(0)

    def finish(self) -> Gradients:
        """Return the gradients of hidden, weight and bias in the dtypes of their tensors."""
        pairs = zip(self.grads, self.leaves, strict=True)
        return [None if x is None or leaf is None else x.to(leaf.dtype) for x, leaf in pairs]


def chunks_of(rows: device_head.RowClasses, size: int) -> tuple[torch.Tensor, ...]:
    """Return the tokens that need a forward, in parts of at most `size`, nearly equal ones."""
    order = rows.order[: rows.forward]
    parts = max(1, -(-rows.forward // size))
    return order.split(max(1, -(-rows.forward // parts))) if rows.forward else ()


def hidden_of(hidden: torch.Tensor, index: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return the hidden states of some tokens. A masked row may contain NaN, and 0 * NaN is NaN."""
    h = hidden[index]
    return h if keep is None else torch.where(keep[:, None], h, 0.0)
