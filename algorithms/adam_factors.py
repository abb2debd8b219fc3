"""Adam's second moment of a weight as row and column factors, which commute with a projection of each side.

Adam divides each number of a gradient by its own sqrt(v_ij). A random projection mixes the numbers, so it cannot be
divided afterwards. With v_ij = R_i C_j / M, the division is one factor per output and one per input of the layer.
"""

from typing import Any

import torch

from tokfuse.algorithms.captured_layers import Layer
from tokfuse.algorithms.captured_norms import Norm
from tokfuse.algorithms.captured_projection import OP, whole
from tokfuse.runtime.core.errors import refuse

# Names of row and column factors: transformers' and torch's Adafactor.
FACTORS = (("exp_avg_sq_row", "exp_avg_sq_col"), ("row_var", "col_var"))
SMALLEST = 1e-60  # of a second moment, if the optimizer's eps is not one number


def layer_scales(layer: Layer | Norm, optimizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the factors of a layer's output gradients and inputs, (outputs,) and (inputs,).

    Their product is sqrt(1 - b2^step) / sqrt(v), with v_ij replaced by R_i C_j / M: R and C are the means over the
    rows and columns of v, and M is the mean of all. This is exact if v has rank 1. R and C are at least eps^2.

    Args:
        layer: the layer. Of a norm the factors are (size,) and (1,), and exact, because its moment is a vector.
        optimizer: Adam, AdamW or Adafactor after its first step, or a wrapper with its `state` and `param_groups`.

    Raises:
        ValueError: the optimizer has no second moment of the weight.
    """
    if not hasattr(optimizer, "state") or not hasattr(optimizer, "param_groups"):
        kind = type(optimizer).__name__
        raise refuse(OP, "optimizer", "an optimizer with its state", kind, "Pass the torch.optim.Optimizer itself.")
    state = optimizer.state.get(layer.weight, {})
    rows, columns = _factors(layer, state)
    group: dict[str, Any] = next((g for g in optimizer.param_groups if any(p is layer.weight for p in g["params"])), {})
    eps, betas = group.get("eps"), group.get("betas")
    smallest = max(SMALLEST, eps * eps) if isinstance(eps, float) else SMALLEST
    rows, columns = rows.clamp_min(smallest), columns.clamp_min(smallest)
    out, inner = rows.rsqrt(), columns.rsqrt() * rows.mean().sqrt()
    if betas is not None and "step" in state:
        out = out * (1.0 - betas[1] ** float(state["step"])) ** 0.5
    return out, inner


def _factors(layer: Layer | Norm, state: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means over the rows and the columns of the second moment, (outputs,) and (inputs,) float64."""
    moment = state.get("exp_avg_sq", state.get("variance"))  # torch's Adafactor has a "variance" of a vector
    if moment is not None and isinstance(layer, Norm):
        pair = [whole(moment), whole(moment).mean().view(1)]
    elif moment is not None:
        pair = [whole(moment.mean(dim)) for dim in (1, 0)]
    else:
        named = next((names for names in FACTORS if names[0] in state), None)
        if named is None:
            raise refuse(
                OP,
                "optimizer",
                "one with a second moment of every captured weight",
                f"none for {layer.name}",
                'Pass Adam, AdamW or Adafactor after its first step, or modules="trainable".',
            )
        pair = [whole(state[name]).flatten() for name in named]
    first, second = (x.detach().double() for x in pair)
    return (second, first) if isinstance(layer, Layer) and layer.transposed else (first, second)
