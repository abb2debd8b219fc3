"""Loads `tokfuse._native` once, and turns tensors into the raw arguments it takes."""

import functools
import importlib
from types import ModuleType

import torch  # noqa: F401  before _native: both then share torch's OpenMP runtime

# dtype codes shared with csrc/common/dtype.h
DTYPE_CODE = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


@functools.cache
def _load() -> tuple[ModuleType | None, str | None]:
    try:
        return importlib.import_module("tokfuse._native"), None
    except ImportError as error:
        return None, (
            f"the native module is not available ({error}); "
            "install g++ and cmake, then reinstall tokfuse"
        )


def module() -> ModuleType | None:
    """The native module, or None when it was not built or does not load."""
    return _load()[0]


def why_unusable() -> str | None:
    """None when the native module is loaded, else one sentence."""
    return _load()[1]


def pointer(tensor: torch.Tensor | None) -> int:
    """Address of the first element; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
