"""Test the binding layer with hypothesis: invalid records raise an error, accepted records stay in their buffers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokfuse.runtime.core import native

SCRIPT = Path(__file__).parents[1] / "support" / "native_fuzz.py"


@pytest.mark.skipif(native.module() is None, reason="cpu: the native module is not built")
def test_spoilt_records_raise_and_never_crash():
    env = {**os.environ, "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-P", str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"exit {done.returncode}: {done.stderr[-3000:]}"
