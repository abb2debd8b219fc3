"""TRL's GRPO on two ranks under DDP: FusedGRPOTrainer beside the stock trainer, same seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl", reason="needs the group `hosts`")

PROGRAM = Path(__file__).parents[1] / "support" / "ddp_grpo.py"


def run(arm: str, folder: Path, options: dict) -> list[dict]:
    """What each of two ranks wrote."""
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node",
            "2",
            "--standalone",
            str(PROGRAM),
            arm,
            str(folder),
            json.dumps(options),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{arm}-{rank}.json").read_text()) for rank in range(2)]


@pytest.mark.parametrize("loss_type", ["dapo", "grpo"])
def test_two_ranks_train_as_stock(loss_type: str, tmp_path: Path):
    """dapo divides by the tokens of all ranks, grpo by each rank's sequences."""
    options = {"loss_type": loss_type}
    stock, fused = (run(arm, tmp_path, options) for arm in ("stock", "fused"))
    for ranks in (stock, fused):
        assert ranks[0]["sums"] == ranks[1]["sums"]
    assert len(stock[0]["logs"]) == len(fused[0]["logs"]) == 3
    for step, (want, got) in enumerate(zip(stock[0]["logs"], fused[0]["logs"], strict=True)):
        rel = 1e-6 if step == 0 else 1e-5  # SGD carries roundings of the first step on
        assert want.keys() == got.keys() and {"loss", "grad_norm", "entropy", "kl"} <= want.keys()
        for name, value in want.items():
            assert got[name] == pytest.approx(value, rel=rel, abs=1e-6), name
        assert want["grad_norm"] > 0
    assert fused[0]["sums"] == pytest.approx(stock[0]["sums"], rel=1e-5, abs=1e-4)
