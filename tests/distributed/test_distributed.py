"""Test tokfuse.distributed over gloo in 1, 2 and 4 processes, against float64 and one process.

The cases are in support/*_parallel_cases.py. support/ranks.py starts the ranks of a world size once for all
cases. `test_vocab_parallel.py` checks the merge on every backend without processes.
"""

import functools
import tempfile
from pathlib import Path

import pytest
import ranks


@functools.cache
def outcome(world: int) -> dict[str, str]:
    with tempfile.TemporaryDirectory() as folder:
        return ranks.run(world, Path(folder))


@pytest.mark.parametrize("case", sorted(ranks.cases()))
@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks(world: int, case: str):
    problem = outcome(world).get(case, "not run: a case before it broke the group")
    assert not problem, problem
