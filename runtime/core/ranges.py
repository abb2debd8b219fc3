"""Profiler ranges: `tokfuse::<op>.fwd` and `tokfuse::<op>.bwd` around every op.

Under torch.profiler a range is a `record_function`. Nsight Systems and Nsight Compute show NVTX ranges.
These are pushed if `TOKFUSE_NVTX=1`, or if nsys started the process (nsys sets `NVTX_INJECTION64_PATH`).
Child processes inherit both variables, so ranges also appear in the workers of a trainer. In all other
cases an op only tests two flags. The names are stable: scripts and ncu filters may rely on them.

Inside a graph of torch.compile the range encloses the custom op, which runs outside the traced code. There
the ops over packed vectors (`gae`, `whiten`, ...) have no range. The backward of the `reference` backend is
torch's autograd and has no tokfuse range.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ParamSpec, TypeVar

import torch
from torch.autograd.profiler import record_function

P = ParamSpec("P")
R = TypeVar("R")

PREFIX = "tokfuse::"
_profiling: Callable[[], bool] = torch._C._autograd._profiler_enabled


def nvtx_wanted() -> bool:
    """Return True if the environment requests NVTX ranges: by `TOKFUSE_NVTX`, else by running under nsys."""
    asked = os.environ.get("TOKFUSE_NVTX", "")
    return asked != "0" if asked else "NVTX_INJECTION64_PATH" in os.environ


def _load_nvtx() -> Any | None:
    """Return torch's NVTX in a CUDA build, else the `nvtx` package. Warn and return None if there is neither."""
    if not nvtx_wanted():
        return None
    if torch.version.cuda is not None:
        return torch.cuda.nvtx
    try:
        package = importlib.import_module("nvtx")
    except ImportError:
        warnings.warn(
            "tokfuse: NVTX ranges are requested but disabled: torch is a CPU build and the package nvtx is "
            "not installed. Install nvtx, or unset TOKFUSE_NVTX.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return SimpleNamespace(range_push=package.push_range, range_pop=package.pop_range)


_nvtx = _load_nvtx()


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Return a decorator that encloses each call of a function in the profiler range `tokfuse::<name>`."""
    label = PREFIX + name

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # is_compiling comes first, so that torch.compile never traces the flags.
            if torch.compiler.is_compiling() or (_nvtx is None and not _profiling()):
                return function(*args, **kwargs)
            return _in_range(label, function, *args, **kwargs)

        return call

    return decorate


def _in_range(label: str, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
    if _nvtx is not None:
        _nvtx.range_push(label)
    try:
        if not _profiling():
            return function(*args, **kwargs)
        with record_function(label):
            return function(*args, **kwargs)
    finally:
        if _nvtx is not None:
            _nvtx.range_pop()
