"""Tests against verl itself, in its own environment: `make test-verl`."""

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
    """verl, which loads the plug-in by its entry point; never imported by name here."""
    return pytest.importorskip("verl") and importlib.import_module("verl.trainer.ppo.core_algos")
