"""pytest-benchmark suite of the case `policy_step_hidden`; see suite.py."""

from typing import Any

import pytest

from tokfuse.bench import policy_step_hidden, suite
from tokfuse.bench.problem import Config


@pytest.mark.parametrize(("config", "name"), suite.parameters(policy_step_hidden))
def test_policy_step_hidden(benchmark: Any, config: Config, name: str) -> None:
    suite.run(benchmark, policy_step_hidden, config, name)
