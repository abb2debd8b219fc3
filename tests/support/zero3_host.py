"""A stand-in for DeepSpeed ZeRO-3: parameters without data that are gathered on request.

It has what the integrations use of DeepSpeed: `ds_id`, `ds_shape` and `ds_status` of a parameter, the status enum,
`GatheredParameters`, and a hook that takes a gradient away as soon as it is there, as the reduction over ranks does.
"""

import contextlib
import enum
import sys
import types
from collections.abc import Iterator
from unittest import mock

import torch


class ZeroParamStatus(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class GatheredParameters:
    gathers = 0

    def __init__(self, params):
        self.params = list(params)
        assert len({p.ds_id for p in self.params}) == len(self.params), "DeepSpeed mishandles duplicates"
        assert all(p.ds_status is ZeroParamStatus.NOT_AVAILABLE for p in self.params)

    def __enter__(self):
        type(self).gathers += 1
        for p in self.params:
            p.data = p.ds_tensor.clone().view(p.ds_shape)
            p.ds_status = ZeroParamStatus.AVAILABLE

    def __exit__(self, *_):
        for p in self.params:
            release(p)


def release(p: torch.nn.Parameter) -> None:
    p.data = torch.empty(0, dtype=p.dtype, device=p.device)
    p.ds_status = ZeroParamStatus.NOT_AVAILABLE


def partition(p: torch.nn.Parameter, number: int) -> None:
    """Make a parameter one of ZeRO-3. Its gradients are moved to `ds_grads`, with the shape of the whole parameter."""
    p.ds_id, p.ds_shape, p.ds_tensor, p.ds_grads = number, p.shape, p.detach().flatten().clone(), []

    def reduce(p):
        assert p.grad.shape == p.ds_shape, "Cannot reduce scatter gradients whose size is not same as the params"
        p.ds_grads.append(p.grad)
        p.grad = None

    if p.requires_grad:
        p.register_post_accumulate_grad_hook(reduce)
    release(p)


@contextlib.contextmanager
def deepspeed() -> Iterator[type[GatheredParameters]]:
    """Context manager: `import deepspeed` finds the stand-in. Gives GatheredParameters, which counts the gathers."""
    names = ("deepspeed", "deepspeed.runtime", "deepspeed.runtime.zero", "deepspeed.runtime.zero.partition_parameters")
    modules = {name: types.ModuleType(name) for name in names}
    modules["deepspeed"].zero = types.SimpleNamespace(GatheredParameters=GatheredParameters)
    modules[names[-1]].ZeroParamStatus = ZeroParamStatus
    GatheredParameters.gathers = 0
    with (
        mock.patch.dict(sys.modules, modules),
        mock.patch("transformers.integrations.deepspeed.is_deepspeed_zero3_enabled", lambda: True),
    ):
        yield GatheredParameters
