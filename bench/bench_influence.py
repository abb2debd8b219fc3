"""pytest-benchmark suite of the case `influence`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import influence, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(influence))
def test_influence(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, influence, config, name)
