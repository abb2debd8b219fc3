"""Ranges in profiles: `tokfuse::<op>.fwd` and `tokfuse::<op>.bwd` around every op.

Under torch.profiler a range is a `record_function`. NVTX ranges, which Nsight Systems and Nsight
Compute show, are pushed where `TOKFUSE_NVTX=1`, or where nsys started the process (it sets
`NVTX_INJECTION64_PATH`); child processes inherit both, so ranges appear in trainer workers that
never saw our command line. Otherwise an op pays one test of two flags. Names are stable: scripts
and ncu filters may rely on them.

Inside a graph of torch.compile the range is around the custom op, which runs outside the traced
code; the scans and moments, which break the graph, have none there. The backward of the `reference`
backend is torch's own autograd and has no range of ours.
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
    """Whether the environment asks for NVTX ranges: `TOKFUSE_NVTX`, else a process under nsys."""
    asked = os.environ.get("TOKFUSE_NVTX", "")
    return asked != "0" if asked else "NVTX_INJECTION64_PATH" in os.environ


def _load_nvtx() -> Any | None:
    """torch's NVTX in a CUDA build, else the `nvtx` package; None (with a warning) without both."""
    if not nvtx_wanted():
        return None
    if torch.version.cuda is not None:
        return torch.cuda.nvtx
    try:
        package = importlib.import_module("nvtx")
    except ImportError:
        warnings.warn(
            "tokfuse: NVTX ranges are asked for, but torch is a CPU build and the package nvtx is "
            "not installed: there are none. Install nvtx, or unset TOKFUSE_NVTX.",
            RuntimeWarning,
            stacklevel=2,
        )
        return None
    return SimpleNamespace(range_push=package.push_range, range_pop=package.pop_range)


_nvtx = _load_nvtx()


def ranged(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: calls of the function are the range `tokfuse::<name>` of whoever profiles."""
    label = PREFIX + name

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            # First, so that torch.compile never traces the flags.
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
