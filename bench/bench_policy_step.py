"""pytest-benchmark suite of the case `policy_step`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import policy_step, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(policy_step))
def test_policy_step(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, policy_step, config, name)
