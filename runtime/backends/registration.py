"""Declare the implementation of an op on each backend: devices, requirements, and when it is selected."""

from typing import Any

import torch

from tokfuse.runtime.backends import cuda_backend, triton_backend
from tokfuse.runtime.core import native
from tokfuse.runtime.core.dispatch import ALL_DEVICES, ALL_DTYPES, Capability, register


def register_cpu(op: str, run: Any, dtypes: frozenset[torch.dtype], *features: str) -> None:
    """Declare the native CPU implementation of `op`."""
    register(
        Capability(
            op,
            "cpu",
            run,
            frozenset({"cpu"}),
            dtypes,
            frozenset(features),
            native.why_unusable,
            lambda: native.module() is not None,
        )
    )


def register_triton(op: str, run: Any, dtypes: frozenset[torch.dtype], *features: str) -> None:
    """Declare the Triton implementation of `op`: CUDA tensors, or CPU tensors when interpreted.

    The interpreter is for tests; it is thousands of times slower than any other backend. With
    TRITON_INTERPRET=1 the backend takes CPU tensors, and only if it is forced.
    """
    interpreted = triton_backend.interpreting()
    register(
        Capability(
            op,
            "triton",
            run,
            frozenset({"cpu" if interpreted else "cuda"}),
            dtypes,
            frozenset(features),
            triton_backend.why_unusable,
            triton_backend.installed,
            only_forced=interpreted,
        )
    )


def register_cuda(op: str, run: Any, dtypes: frozenset[torch.dtype], *features: str) -> None:
    """Declare the CUDA implementation of `op`: CUDA tensors, compute capability 8.0 or newer.

    If the kernels run on the CPU, for tests, the backend takes CPU tensors, and only if it is forced.
    """
    hosted = cuda_backend.hosted()
    register(
        Capability(
            op,
            "cuda",
            run,
            frozenset({"cpu" if hosted else "cuda"}),
            dtypes,
            frozenset(features),
            cuda_backend.why_unusable,
            lambda: cuda_backend.module() is not None,
            only_forced=hosted,
        )
    )


def register_reference(op: str, run: Any, *features: str) -> None:
    """Declare the plain-torch implementation of `op`: any device, any float dtype."""
    register(Capability(op, "reference", run, ALL_DEVICES, ALL_DTYPES, frozenset(features)))
