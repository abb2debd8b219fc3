"""Load the CUDA launchers of the native module. The import does not touch a driver.

TOKFUSE_CUDA_HOST names a build of the launchers that runs on the CPU (tests/support/cuda_module.py).
The backend then takes CPU tensors, and only if it is forced. This is for tests.
"""

import functools
import importlib.machinery
import importlib.util
import os
from types import ModuleType
from typing import Any

import torch
from torch.autograd import forward_ad

from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.forced import forced_backend

HOST_VARIABLE = "TOKFUSE_CUDA_HOST"
MINIMUM_CAPABILITY = (8, 0)  # bfloat16 arithmetic


def hosted() -> bool:
    """Return True if the CUDA kernels of this process run on the CPU."""
    return bool(os.environ.get(HOST_VARIABLE))


@functools.cache
def module() -> ModuleType | None:
    """Return the launchers, or None if they were not built."""
    if not hosted():
        return getattr(native.module(), "cuda", None)
    path = os.environ[HOST_VARIABLE]
    loader = importlib.machinery.ExtensionFileLoader("_cuda_host", path)
    spec = importlib.util.spec_from_file_location("_cuda_host", path, loader=loader)
    assert spec is not None
    host = importlib.util.module_from_spec(spec)
    loader.exec_module(host)
    return host


def launchers() -> Any:
    """Return the launchers, for callers whose backend was selected because they are there."""
    found = module()
    assert found is not None
    return found


@functools.cache
def reader() -> Any | None:
    """Return the launchers if they are usable and can read the tensors of this torch, else None."""
    return native.reader(module()) if why_unusable() is None else None


def eager(main: Any) -> Any | None:
    """Return the launchers if one of their functions may run a whole call, checks and outputs included.

    `main` is the main input. Return None under torch.compile and forward-mode differentiation, for tensors on the CPU,
    if values must be checked (TOKFUSE_CHECK), if another backend is forced, and without usable kernels. The call then
    takes the general path. It also does so if the native function returns None for its arguments.
    """
    if torch.compiler.is_compiling() or not isinstance(main, torch.Tensor):
        return None
    if main.is_cuda:
        wanted = forced_backend() in (None, "cuda")
    else:
        wanted = forced_backend() == "cuda" and hosted()
    return reader() if wanted and not may_read(main) and forward_ad._current_level < 0 else None


@functools.cache
def why_unusable() -> str | None:
    """Return None if the CUDA kernels run here, else the reason. Calls the driver."""
    if module() is None:
        return native.why_unusable() or (
            "the native module was built without CUDA kernels; put nvcc on PATH and reinstall"
        )
    if hosted():
        return None
    return why_too_old() if torch.cuda.is_available() else "no CUDA device"


def why_too_old() -> str | None:
    """Return None if the current GPU has the compute capability that CUDA and Triton kernels need, else the reason."""
    capability = torch.cuda.get_device_capability()
    if capability >= MINIMUM_CAPABILITY:
        return None
    wanted, has = (".".join(map(str, x)) for x in (MINIMUM_CAPABILITY, capability))
    return f"needs compute capability {wanted}, the device has {has}"


def place(x: torch.Tensor) -> Any:
    """Return where work on `x` is launched: its device and torch's current stream."""
    if x.device.type != "cuda":
        return launchers().Place(device=0, stream=0)
    index = x.device.index
    # torch.cuda.current_stream makes a Python object, which takes as long as the launch.
    return launchers().Place(device=index, stream=torch._C._cuda_getCurrentRawStream(index))


def sorted_ids(ids: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor] | tuple[None, None]:
    """Return (sorted ids, the row of each) by torch's stable sort: equal ids stay in row order."""
    if ids is None:
        return None, None
    values, order = torch.sort(ids, stable=True)
    return values, order
