"""Heads that FSDP shards as a unit of their own.

The parameters of a unit are whole only inside its forward, and only gradients that come from there are reduced over the
ranks. `call_inside` therefore runs a function in place of that forward.
"""

from collections.abc import Callable
from typing import Any


def is_unit(layer: Any) -> bool:
    """Return whether FSDP1 or FSDP2 shards this layer apart from the model around it."""
    return _is_wrapper(layer) or hasattr(layer, "_get_fsdp_state")


def unwrapped(layer: Any) -> Any:
    """Return the layer inside FSDP1's wrapper. FSDP2 has none."""
    return layer.module if _is_wrapper(layer) else layer


def call_inside(unit: Any, function: Callable[..., Any], *args: Any) -> Any:
    """Return `function(*args)`, called while the parameters of the unit are whole.

    Args:
        unit: the sharded layer.
        function: reads the parameters. It returns tensors or a tuple of tensors, whose backward gathers them again.
        args: passed through the unit's call, so they are converted to its dtype under mixed precision.
    """
    layer = unwrapped(unit)

    def forward(*args: Any) -> Any:
        del layer.forward  # `function` finds the layer as it was
        return function(*args)

    layer.forward = forward
    try:
        return unit(*args)
    finally:
        vars(layer).pop("forward", None)


def is_hook(hook: Callable[..., Any]) -> bool:
    """Return whether FSDP2 has put this hook on a layer. These gather the parameters and change no value."""
    function = getattr(hook, "__func__", hook)
    return str(getattr(function, "__globals__", {}).get("__name__", "")).startswith("torch.distributed.fsdp.")


def _is_wrapper(layer: Any) -> bool:
    from torch.distributed.fsdp import FullyShardedDataParallel

    return isinstance(layer, FullyShardedDataParallel)
