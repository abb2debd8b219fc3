"""Load the Triton launchers of an op. Triton is imported at the first call, not before."""

import functools
import importlib
import importlib.util
import os
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from tokfuse.runtime.backends.cuda_backend import why_too_old


def interpreting() -> bool:
    """Return True if the kernels run in Triton's interpreter, on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def installed() -> bool:
    """Return True if triton is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None


@functools.cache
def why_unusable() -> str | None:
    """Return None if Triton kernels run here, on a GPU or interpreted; else the reason. Calls the driver."""
    if not installed():
        return "triton is not installed; pip install 'tokfuse[gpu]'"
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device; TRITON_INTERPRET=1 runs the kernels on the CPU, for tests"
    return why_too_old()


@functools.cache
def kernels(op: str) -> ModuleType:
    """Import the module `tokfuse.triton_kernels.<op>`."""
    return importlib.import_module(f"tokfuse.triton_kernels.{op}")


def launcher(op: str, name: str) -> Callable[..., Any]:
    """Return a function that calls `name` of `tokfuse.triton_kernels.<op>`. Its first call imports the module.

    Triton launches on the current device, whatever the device of the tensors is. So the call makes the
    device of its first argument current.
    """

    def call(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        function = getattr(kernels(op), name)
        if x.device.type != "cuda":
            return function(x, *args, **kwargs)
        with torch.cuda.device_of(x):
            return function(x, *args, **kwargs)

    call.__name__ = name
    return call
