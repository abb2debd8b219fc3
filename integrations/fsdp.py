"""Heads that FSDP shards as a separate unit.

The parameters of a unit are whole only inside its forward, and only gradients that come from there are reduced over the
ranks. `call_inside` therefore runs a function in place of that forward.
"""

import sys
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
        unit: the sharded layer. Afterwards it is as before.
        function: reads the parameters. It returns tensors or a tuple of tensors, whose backward gathers them again.
        args: passed through the unit's call, which converts them to its dtype under mixed precision.
    """
    layer = unwrapped(unit)
    attributes = vars(layer)
    own = {"forward": attributes["forward"]} if "forward" in attributes else {}

    def restore() -> None:
        attributes.pop("forward", None)
        attributes.update(own)

    def forward(*args: Any) -> Any:
        restore()  # `function` finds the layer as it was
        return function(*args)

    attributes["forward"] = forward
    try:
        return unit(*args)
    finally:
        restore()


def _is_wrapper(layer: Any) -> bool:
    # Without an import, because torch can be built without torch.distributed.
    module = sys.modules.get("torch.distributed.fsdp")
    return module is not None and isinstance(layer, module.FullyShardedDataParallel)
