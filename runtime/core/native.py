"""Loads `tokfuse._native` once, and brings tensors into the form its kernels take."""

import functools
import importlib
import os
import warnings
from collections.abc import Sequence
from types import ModuleType
from typing import Any, overload

import torch  # before _native: both then share torch's OpenMP runtime

# dtype codes shared with csrc/common/dtype.h
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("tokfuse._native"), None
    except ImportError as error:
        reason = f"the native module is not available ({error}); install g++ and cmake, then reinstall tokfuse"
        # Once in a process, so that nobody takes the slow path for the fast one.
        message = f"tokfuse runs on the pure-torch reference: {reason}"
        warnings.warn(message, RuntimeWarning, stacklevel=3)
        return None, reason


def module() -> ModuleType | None:
    """The native module, or None when it was not built or does not load."""
    return _load()[0]


def loaded() -> Any:
    """`module()`, if a record of the registry says that it is there."""
    found = module()
    assert found is not None
    return found


def why_unusable() -> str | None:
    """None when the native module is loaded, else one sentence."""
    return _load()[1]


@functools.cache
def eager() -> Any | None:
    """The native module when its whole-call functions can read the tensors of this torch."""
    native = module()
    exchange = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if native is None or exchange is None:
        return None
    return native if native.use_tensors(exchange, torch.Tensor, torch.nn.Parameter) else None


def environment_sets(name: str) -> bool:
    """True when the environment has the variable, as it is now; native in a tenth of the time."""
    native = module()
    return name in os.environ if native is None else bool(native.environment_sets(name))


@overload
def float_vector(x: torch.Tensor) -> torch.Tensor: ...


@overload
def float_vector(x: None) -> None: ...


@overload
def float_vector(x: torch.Tensor | None) -> torch.Tensor | None: ...


def float_vector(x: torch.Tensor | None) -> torch.Tensor | None:
    """x as the kernels take vectors: float32, contiguous, without gradient."""
    if x is None or (x.dtype == torch.float32 and x.is_contiguous()):
        return x
    return x.detach().float().contiguous()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    """x without strides."""
    return None if x is None else x.contiguous()


def empty(shape: Sequence[int], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A contiguous, unwritten CPU tensor of a kernel's dtype; a large one reuses kept memory.

    When such a tensor is freed, its memory serves the next one of about its size, because the
    first write to fresh pages costs more than the kernels that write (csrc/bindings/buffers.h).
    `release_workspace` gives what is kept back to the system.
    """
    native = eager()
    if native is None or dtype not in DTYPE_CODE:
        return torch.empty(shape, dtype=dtype)
    x: torch.Tensor = native.empty(tuple(shape), DTYPE_CODE[dtype])
    return x


def empty_like_rows(x: torch.Tensor) -> torch.Tensor:
    """A contiguous, unwritten tensor of x's shape and dtype."""
    return empty(x.shape, x.dtype)


def release_workspace() -> None:
    """Give back to the system the memory that the CPU kernels keep between calls.

    Kept are freed results and workspaces of 1 MiB and more, up to an eighth of the machine's
    memory and at most 2 GiB, or what TOKFUSE_KEEP_MIB says (0 keeps nothing). Tensors in use are
    not touched.
    """
    native = module()
    if native is not None:
        native.release_buffers()
