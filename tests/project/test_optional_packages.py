"""Test that the tests can be collected without the packages of the trainers, which `make test` does not install."""

import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MENTIONS = re.compile(r"\b(trl|peft|accelerate|datasets|cloudpickle)\b", re.IGNORECASE)


def test_every_file_is_collected_without_the_trainers():
    files = [str(path) for path in sorted(TESTS.rglob("test_*.py")) if MENTIONS.search(path.read_text())]
    assert len(files) > 10
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "without_hosts", *files],
        cwd=TESTS.parent,
        env=os.environ | {"PYTHONPATH": str(TESTS / "support")},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-4000:] + found.stderr[-1000:]
