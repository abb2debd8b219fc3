"""pytest-benchmark suite of the case `overhead`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import overhead, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(overhead))
def test_overhead(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, overhead, config, name)
