"""Heads under DeepSpeed ZeRO-3, which keeps every parameter partitioned over the ranks.

A parameter has its data only while it is gathered. `gathered` returns the data of a head as tensors that stay valid
until the backward, so the head is gathered once per step. The gradient goes to the parameter, and DeepSpeed reduces it
over the ranks as for any other layer. The gathered head stays in memory from the forward to the backward.

Call it inside the forward of the model that DeepSpeed wraps: DeepSpeed reduces the gradients of such a forward.
"""

import contextlib
from typing import Any, cast

import torch

Parameters = tuple[torch.Tensor | None, ...]


def is_partitioned(x: torch.Tensor | None) -> bool:
    """Return whether DeepSpeed ZeRO-3 manages this parameter."""
    return hasattr(x, "ds_id")


def shape_of(x: torch.Tensor) -> torch.Size:
    """Return the shape of a parameter, also while it is partitioned."""
    return torch.Size(getattr(x, "ds_shape", x.shape))


def gathered(*parameters: torch.Tensor | None) -> Parameters:
    """Return the parameters with their whole data. Parameters that are not partitioned are returned as they are.

    A collective of all ranks, except for what is already gathered: a tied embedding, or a head inside
    `deepspeed.zero.GatheredParameters`.
    """
    partitioned = [p for p in parameters if is_partitioned(p)]
    if not partitioned:
        return parameters
    with _gathering(partitioned):
        return tuple(_Whole.apply(p) if is_partitioned(p) else p for p in parameters)


def _gathering(parameters: list[Any]) -> contextlib.AbstractContextManager[Any]:
    import deepspeed
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    missing = {id(p): p for p in parameters if p.ds_status != ZeroParamStatus.AVAILABLE}  # each once
    if not missing:
        return contextlib.nullcontext()
    return cast(contextlib.AbstractContextManager[Any], deepspeed.zero.GatheredParameters(list(missing.values())))


class _Whole(torch.autograd.Function):
    """The data of a gathered parameter. DeepSpeed gives the parameter other data afterwards, so the storage stays."""

    @staticmethod
    def forward(ctx: Any, parameter: torch.Tensor) -> torch.Tensor:
        ctx.parameter = parameter
        return parameter.data

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        if ctx.parameter.shape != grad.shape:
            _take_shape(ctx.parameter, grad)
        return grad


def _take_shape(parameter: torch.Tensor, grad: torch.Tensor) -> None:
    """Give a partitioned parameter the shape of its gradient, without memory, until the gradient has been accumulated.

    torch compares the two shapes. DeepSpeed reduces the gradient in a hook right after that, from `parameter.grad`.
    """
    empty, shaped = parameter.data, parameter.data.new_empty(1).expand(grad.shape)
    parameter.data = shaped

    def restore(parameter: torch.Tensor) -> None:
        handle.remove()
        if parameter.data_ptr() == shaped.data_ptr():  # DeepSpeed has not gathered it meanwhile
            parameter.data = empty

    handle = parameter.register_post_accumulate_grad_hook(restore)
