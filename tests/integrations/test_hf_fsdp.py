"""Test `hf.install` under FSDP1 and FSDP2."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the group `hosts`")


def test_two_ranks_train_as_without_tokfuse():
    program = Path(__file__).parents[1] / "support" / "fsdp_hf.py"
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    limits = {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, *launch, str(program)], env=os.environ | limits, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-4000:]
