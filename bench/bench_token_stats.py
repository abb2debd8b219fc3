"""pytest-benchmark suite of the case `token_stats`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import suite, token_stats
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(token_stats))
def test_token_stats(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, token_stats, config, name)
