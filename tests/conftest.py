"""Settings of the whole test run. They are set before torch is imported."""

import gc
import importlib
import os
import sys
from pathlib import Path

# Idle OpenMP threads sleep instead of spinning. With several processes on few cores, spinning costs more than
# the work.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
# Modules that several test files import. importlib mode adds no test folder to the path.
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "support"))

import hypothesis
import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))

hypothesis.settings.register_profile("ci", derandomize=True, deadline=None)
hypothesis.settings.register_profile("dev", deadline=None)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "dev")


if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    importlib.import_module("fast_interpreter").install()
    importlib.import_module("interpreted_scan").install()
    # One example takes 0.2 s in the interpreter.
    hypothesis.settings.register_profile("interpreter", hypothesis.settings.default, max_examples=20)
    hypothesis.settings.load_profile("interpreter")


def pytest_report_header() -> str:
    """Report the instruction-set levels of torch and of the native kernels."""
    from tokfuse.runtime.core import native

    module = native.module()
    kernels = "not built" if module is None else module.active_isa()
    level = torch.backends.cpu.get_cpu_capability()
    return f"cpu: torch {level}, native kernels {kernels}, {torch.get_num_threads()} threads"


# KERNEL_TESTS of the Makefile: `make test` looks for tests with these marks in these folders only.
KERNEL_MARKS = {"interpreter", "cuda_host"}
KERNEL_FOLDERS = {"algorithms", "backends", "distributed", "ops"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Refuse a test of a kernel in a folder where `make test` would not find it."""
    tests = Path(__file__).parent
    for item in items:
        marks = KERNEL_MARKS.intersection(mark.name for mark in item.iter_markers())
        if marks and item.path.relative_to(tests).parts[0] not in KERNEL_FOLDERS:
            raise pytest.UsageError(
                f"{item.nodeid} has the mark {marks.pop()}; move it to one of {sorted(KERNEL_FOLDERS)}"
            )


def pytest_collection_finish() -> None:
    """Exclude the modules loaded so far from garbage collection.

    Trainers and compilers collect all garbage several times per test. Each collection took 0.9 s of the 1.9 s
    that a training run of the tiny model takes, because it walks everything that torch, TRL and pytest loaded.
    """
    gc.collect()
    gc.freeze()
