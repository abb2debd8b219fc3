"""Run every case of every op through pytest-benchmark: `pytest bench`. suite.py contains the code."""

from types import ModuleType
from typing import Any

import pytest

from tokfuse.bench import plan, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("module", "config", "name"), suite.parameters(plan.CASES.values()))
def test_case(benchmark: Any, module: ModuleType, config: Config, name: str) -> None:
    suite.run(benchmark, module, config, name)
