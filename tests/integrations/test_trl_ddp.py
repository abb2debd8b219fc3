"""Test TRL's GRPO on two ranks with DDP: FusedGRPOTrainer against the stock trainer with the same seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_parity import assert_no_farther

pytest.importorskip("trl", reason="needs the group `hosts`")

PROGRAM = Path(__file__).parents[1] / "support" / "ddp_grpo.py"


def run(arm: str, folder: Path, options: dict) -> list[dict]:
    """Return the results of each of two ranks."""
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
    """dapo divides by the tokens of all ranks, grpo by the sequences of each rank."""
    options = {"loss_type": loss_type}
    runs = fused, stock, exact = [run(arm, tmp_path, options) for arm in ("fused", "stock", "exact")]
    for ranks in runs:
        assert ranks[0]["sums"] == ranks[1]["sums"]
    assert len(stock[0]["logs"]) == len(fused[0]["logs"]) == len(exact[0]["logs"]) == 3
    assert {"loss", "grad_norm", "entropy", "kl"} <= stock[0]["logs"][0].keys() == fused[0]["logs"][0].keys()
    for name in stock[0]["logs"][0]:
        figures = [[row[name] for row in ranks[0]["logs"] if name in row] for ranks in runs]
        assert_no_farther(*figures, size=max(1.0, *map(abs, figures[2])), what=name)
    assert all(row["grad_norm"] > 0 for row in exact[0]["logs"])
    assert_no_farther(*(ranks[0]["sums"] for ranks in runs), what="sums of the parameters")
