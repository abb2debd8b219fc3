"""pytest-benchmark suite of the case `paired_divergence`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import paired_divergence, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(paired_divergence))
def test_paired_divergence(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, paired_divergence, config, name)
