"""pytest-benchmark suite of the case `linear_token_stats`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import linear_token_stats, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(linear_token_stats))
def test_linear_token_stats(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, linear_token_stats, config, name)
