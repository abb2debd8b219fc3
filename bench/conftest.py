"""Let `pytest bench` collect bench_ops.py. `pytest tests` does not use this file."""

import os
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    if file_path.suffix == ".py" and file_path.name.startswith("bench_"):
        return pytest.Module.from_parent(parent, path=file_path)
    return None


@pytest.hookimpl(optionalhook=True)  # a hook of pytest-benchmark, which may not be installed
def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    from tokfuse.bench import machine  # not at the top: OMP_WAIT_POLICY must be set before torch is imported

    machine_info["tokfuse"] = machine.facts("pytest bench --benchmark-only")
