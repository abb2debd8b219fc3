"""The backend that the caller forces, with `tokfuse.backend(...)` or `TOKFUSE_BACKEND`."""

import os
from contextvars import ContextVar

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
