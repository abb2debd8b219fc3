"""Loading of `tokfuse._native`, and conversion of tensors to the form that its kernels take."""

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import torch  # before _native, so that both share torch's OpenMP runtime

# dtype codes shared with csrc/common/dtype.h
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("tokfuse._native"), None
    except ImportError as error:
        # The message for a wrong environment variable already has the next step.
        step = "" if "TOKFUSE_" in str(error) else "; install g++ and cmake, then reinstall tokfuse"
        reason = f"the native module is not available ({error}){step}"
        # Warn once per process, so that nobody mistakes the slow fallback for the kernels.
        message = f"tokfuse falls back to the slow pure-torch reference: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None, reason


def module() -> ModuleType | None:
    """Return the native module, or None if it was not built or does not load."""
    return _load()[0]


def loaded() -> Any:
    """Return `module()`. Call it only if the registry declares the native module usable."""
    found = module()
    assert found is not None
    return found


def why_unusable() -> str | None:
    """Return None if the native module is loaded, else one sentence with the reason."""
    return _load()[1]


@functools.cache
def eager() -> Any | None:
    """Return the native module if its whole-call functions can read the tensors of this torch, else None."""
    return reader(module())


def reader(native: Any | None) -> Any | None:
    """Return the module if it is there and can read the tensors of this torch, else None."""
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or exchange is None:
        return None
    return native if native.use_tensors(exchange, torch.Tensor, torch.nn.Parameter) else None


def environment_sets(name: str) -> bool:
    """Return True if the environment contains the variable now. The native test is ten times faster."""
    native = module()
    return name in os.environ if native is None else bool(native.environment_sets(name))


@overload
def float_vector(x: torch.Tensor) -> torch.Tensor: ...


@overload
def float_vector(x: None) -> None: ...


@overload
def float_vector(x: torch.Tensor | None) -> torch.Tensor | None: ...


def float_vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return x as kernels take vectors: float32, contiguous, without gradient."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.detach().float().contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """Return a contiguous x."""
    return None if x is None else x.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a contiguous, uninitialised CPU tensor. A large tensor reuses cached memory.

    When such a tensor is freed, its memory is cached for the next one of about the same size. The first
    write to fresh pages would cost more than the kernels that write them (csrc/bindings/buffers.h).
    `release_workspace` returns the cached memory to the system.
    """
    native = eager()
    if native is None or dtype not in DTYPE_CODE:
        return torch.empty(shape, dtype=dtype, device="cpu")
    x: torch.Tensor = native.empty(tuple(shape), DTYPE_CODE[dtype])
    return x


def empty_like_rows(x: torch.Tensor) -> torch.Tensor:
    """Return a contiguous, uninitialised CPU tensor with the shape and dtype of x."""
    return empty(x.shape, x.dtype)


def empty_vectors(sizes: Sequence[int], device: torch.device) -> tuple[torch.Tensor, ...]:
    """Uninitialised float32 vectors of these sizes; on the CPU in half the time of `torch.empty`."""
    native = eager() if device.type == "cpu" else None
    if native is None:
        return tuple([torch.empty(size, dtype=torch.float32, device=device) for size in sizes])
    return tuple([native.empty((size,), 0) for size in sizes])


def release_workspace() -> None:
    """Return to the system the memory that the CPU kernels cache between calls.

    The cache holds freed results and workspaces of at least 1 MiB. Its limit is an eighth of the machine's
    memory and at most 4 GiB, or TOKFUSE_KEEP_MIB (0 disables the cache). Tensors in use are not touched.
    """
    native = module()
    if native is not None:
        native.release_buffers()
