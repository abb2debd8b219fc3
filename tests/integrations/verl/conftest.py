"""Settings for the tests against verl, in a separate environment: `make test-verl`."""

import importlib
import os
import sys

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..", "support"))

import pytest
import torch

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(scope="session", autouse=True)
def _verl():
    """Import verl, which loads the plug-in through its entry point. The tests do not import the plug-in by name."""
    return pytest.importorskip("verl") and importlib.import_module("verl.trainer.ppo.core_algos")
