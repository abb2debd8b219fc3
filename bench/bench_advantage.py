"""pytest-benchmark suite of the case `advantage`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import advantage, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(advantage))
def test_advantage(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, advantage, config, name)
