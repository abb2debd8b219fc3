"""The norms of a model, whose weight multiplies each number of a token, and the gradient of that weight per sequence.

`tokfuse.influence.capture` uses them. A norm computes y = (w + c) * f(x) + b with vectors w and b, so the gradient of w
on a sequence is the sum over its tokens of dY * (y - b) / (w + c). It needs y, which autograd keeps for the next layer.
"""

from collections.abc import Callable
from typing import Any

import torch

from tokfuse.algorithms.captured_projection import OP, Projection, is_dtensor, seed_of, whole
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.reference.token_stats import result_dtype

# Their weight multiplies an axis that is not the last one, or their forward changes a state.
OTHER_NORMS = (torch.nn.modules.batchnorm._NormBase, torch.nn.GroupNorm)
SAMPLES = 3  # rows of the input that `norm_offset` tries

_offsets: dict[Any, float | None] = {}  # by class and options of a module, because a model has many equal norms


class Norm:
    """One captured weight of a norm, or of several norms that share it.

    Args:
        name: name of the module in the model.
        module: the norm.

    Raises:
        ValueError: the weight has an entry that multiplies by 0.
    """

    projection: Projection

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        offset = norm_offset(module)
        assert offset is not None and isinstance(module.weight, torch.Tensor)
        self.name, self.modules, self.offset = name, [module], offset
        self.weight = module.weight
        self.size = self.weight.shape[0]
        self.reached = False  # whether a gradient arrived
        own = self.weight.to_local() if is_dtensor(self.weight) else self.weight  # type: ignore[attr-defined]
        if bool((own.detach() + offset == 0).any()):
            raise refuse(
                OP,
                f"the weight of {name}",
                "without entries that multiply by 0 (they hide the input of the weight)",
                "such an entry",
                "Leave the norm out with modules=.",
            )

    def make_projections(self, rank: int, seed: int, scales: tuple[torch.Tensor, torch.Tensor] | None) -> None:
        """Draw the projection to rank^2 numbers. scales: their product multiplies the gradient."""
        scale = None if scales is None else scales[0] * scales[1]
        own = seed_of(seed, self.name, "norm")
        self.projection = Projection(self.size, rank * rank, own, self.weight.device, scale)

    def same_use(self, module: torch.nn.Module) -> bool:
        """Return whether a module with the same weight is a norm of the same kind."""
        return norm_offset(module) == self.offset

    @property
    def shape(self) -> tuple[int]:
        """Shape of the feature of one sequence."""
        return (self.projection.rows,)

    @property
    def factor(self) -> float:
        """Factor of the projected sums."""
        return float(self.projection.factor)

    def tap(self, module: Any, y: torch.Tensor, record: Callable[[torch.Tensor], None]) -> torch.Tensor:
        """Return y. `record` takes the gradient of the weight by token, (rows, size), in the backward."""
        dtype = result_dtype(y.dtype)
        inverse = (whole(module.weight).to(dtype) + self.offset).reciprocal()
        bias = getattr(module, "bias", None)
        tapped: torch.Tensor = _Tap.apply(y, inverse, None if bias is None else whole(bias).to(dtype), record)
        return tapped


class _Tap(torch.autograd.Function):
    """The identity. Its saved tensor obeys gradient checkpointing, which a hook's closure does not."""

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, inverse: torch.Tensor, bias: torch.Tensor | None, record: Any) -> Any:
        ctx.save_for_backward(y)
        ctx.inverse, ctx.bias, ctx.record = inverse, bias, record
        return y.detach()  # no view of y, which could not be changed in place

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        (grad,), (y,) = grads, ctx.saved_tensors
        with torch.no_grad():
            inner = y if ctx.bias is None else y - ctx.bias
            ctx.record((inner * ctx.inverse * grad).reshape(-1, y.shape[-1]))
        return grad, None, None, None


def norm_offset(module: torch.nn.Module) -> float | None:
    """Return c if a module computes (w + c) * f(x) + b on the last axis, with a vector w; None for other modules.

    The forward is tried with three weights on a copy, so classes of every library are recognised.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    own = dict(module.named_parameters(recurse=False))
    if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not weight.is_floating_point():
        return None
    alone = own.keys() <= {"weight", "bias"} and not list(module.children())
    if not alone or weight.numel() == 0 or isinstance(module, OTHER_NORMS):
        return None
    options = [(name, value) for name, value in vars(module).items() if isinstance(value, int | float | str | tuple)]
    kind = (type(module), getattr(module.forward, "__func__", None), bias is None, repr(options))
    key = (*kind, weight.shape, weight.dtype, weight.device)
    if key not in _offsets:
        _offsets[key] = _tried_offset(module, weight, bias is not None)
    return _offsets[key]


def _tried_offset(module: torch.nn.Module, weight: torch.Tensor, biased: bool) -> float | None:
    """Return `norm_offset`, found by running a copy of the module."""
    twin = object.__new__(type(module))  # copy.copy does not work with the classes of FSDP2
    twin.__dict__ = module.__dict__ | {"_parameters": {}}
    forward = getattr(module.forward, "__func__", type(module).forward)
    size = weight.shape[0]
    x = (
        torch.arange(SAMPLES * size, dtype=torch.float64, device="cpu")
        .sin()
        .view(SAMPLES, size)
        .to(weight.device, weight.dtype)
    )
    mixed = 0.5 + (torch.arange(size, device="cpu") % 3).to(weight.device, weight.dtype)

    twin.__dict__["bias"] = torch.zeros_like(mixed) if biased else None

    def run(value: torch.Tensor) -> torch.Tensor:
        twin.__dict__["weight"] = value
        out: torch.Tensor = forward(twin, x)
        return out.double()

    try:
        with torch.no_grad():
            zero, one, other = (run(w) for w in (torch.zeros_like(mixed), torch.ones_like(mixed), mixed))
    except Exception:  # a forward with other arguments, or a module that is no norm
        return None
    inner, bound = one - zero, 0.02 if weight.dtype.itemsize < 4 else 1e-4

    def close(a: torch.Tensor, b: torch.Tensor) -> bool:
        return torch.allclose(a, b, rtol=bound, atol=bound)

    if zero.shape != x.shape or not close(other, zero + mixed.double() * inner):
        return None
    if bool((zero == 0).all()) and bool((inner != 0).any()):
        return 0.0
    return 1.0 if close(zero, inner) else None
