"""The backend that the caller forces, and the native module for plain CPU calls, if it forces none."""

import os
from contextvars import ContextVar
from typing import Any

import torch
from torch.autograd import forward_ad

from tokfuse.runtime.core import native

ORDER = ("cuda", "triton", "cpu", "reference")
FORCED: ContextVar[str | None] = ContextVar("tokfuse_backend", default=None)


def forced_backend() -> str | None:
    """Return the backend of the innermost `backend(...)` context, else of `TOKFUSE_BACKEND`, else None."""
    forced = FORCED.get()
    if forced is None and native.environment_sets("TOKFUSE_BACKEND"):
        forced = os.environ.get("TOKFUSE_BACKEND") or None
        if forced is not None and forced not in ORDER:
            raise ValueError(
                f"TOKFUSE_BACKEND must be one of {', '.join(ORDER)}; got {forced!r}. "
                "Unset it to select a backend automatically."
            )
    return forced


def eager_cpu(main: Any) -> Any | None:
    """Return the native module if one of its functions may run a whole CPU call, checks and outputs included.

    Return None under torch.compile and forward-mode differentiation, if another backend is forced, without the module,
    and if `main`, the main input, is on a GPU. The call then takes the general path. It also does so if the native
    function returns None for its arguments.
    """
    if torch.compiler.is_compiling() or forced_backend() not in (None, "cpu") or getattr(main, "is_cuda", False):
        return None
    return native.eager() if forward_ad._current_level < 0 else None
