"""Run Triton ops on tensors of the meta device: launches are recorded, and nothing runs."""

import contextlib
import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton

import tokfuse
from tokfuse.runtime.backends import triton_backend
from tokfuse.runtime.core import checks, dispatch
from tokfuse.runtime.lm_head import device_head

if torch.__version__.startswith("2.11."):
    # There the product with out_dtype runs on CUDA, and raises on tensors without values.
    _LIBRARY = torch.library.Library("aten", "IMPL", "Meta")
    _LIBRARY.impl("addmm.dtype_out", lambda *_, out, **__: out, allow_override=True)


@contextlib.contextmanager
def on_meta() -> Iterator[None]:
    """Inside, the Triton backend accepts tensors without values, as under graph capture."""
    importlib.import_module("tokfuse.inspection.doctor").import_ops()
    table = {}
    for op, rows in dispatch._REGISTRY.items():
        row = dataclasses.replace(rows["triton"], devices=frozenset({"meta"}), unusable=lambda: None, only_forced=False)
        table[op] = rows | {"triton": row}
    with (
        mock.patch.object(dispatch, "_REGISTRY", table),
        mock.patch.object(dispatch, "_CHOICES", {}),
        mock.patch.object(checks, "check_main", lambda *_: None),
        mock.patch.object(device_head, "capturing", lambda x: True),
        mock.patch.object(triton_backend, "why_unusable", lambda: None),
        mock.patch.object(torch, "autocast", lambda *_, **__: contextlib.nullcontext()),
        tokfuse.backend("triton"),
    ):
        yield


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[str, Any]]]:
    """Return [(kernel, grid)] of the launches inside."""
    found: list[tuple[str, Any]] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        found.append((kernel.__name__, grid))

    with on_meta(), mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        yield found
