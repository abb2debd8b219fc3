"""Test TRL's GRPO and DPO on two ranks with DDP: the fused trainers against the stock ones with the same seeds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from host_parity import assert_no_farther

pytest.importorskip("trl", reason="needs the group `hosts`")

SUPPORT = Path(__file__).parents[1] / "support"


def run(name: str, folder: Path, options: dict, program: str) -> list[dict]:
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
            str(SUPPORT / program),
            name,
            str(folder),
            json.dumps(options),
        ],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_train_as_stock(tmp_path: Path):
    """dapo divides by the tokens of all ranks, grpo by the sequences of each rank."""
    ranks = run("grpo", tmp_path, {"dapo": {}, "grpo": {}}, "ddp_grpo.py")
    for loss_type in ("dapo", "grpo"):
        check_as_stock(
            loss_type, *(tuple(rank[loss_type][arm] for rank in ranks) for arm in ("fused", "stock", "exact"))
        )


def check_as_stock(loss_type: str, *runs: tuple[dict, dict]) -> None:
    """Compare the results of the fused, the stock and the exact trainer, of two ranks each."""
    fused, stock, exact = runs
    for ranks in runs:
        assert ranks[0]["sums"] == ranks[1]["sums"]
    assert len(stock[0]["logs"]) == len(fused[0]["logs"]) == len(exact[0]["logs"]) == 3
    assert {"loss", "grad_norm", "entropy", "kl"} <= stock[0]["logs"][0].keys() == fused[0]["logs"][0].keys()
    for name in stock[0]["logs"][0]:
        figures = [[row[name] for row in ranks[0]["logs"] if name in row] for ranks in runs]
        assert_no_farther(*figures, size=max(1.0, *map(abs, figures[2])), what=f"{name} of {loss_type}")
    assert all(row["grad_norm"] > 0 for row in exact[0]["logs"])
    assert_no_farther(*(ranks[0]["sums"] for ranks in runs), what=f"sums of the parameters of {loss_type}")


def test_two_ranks_of_dpo(tmp_path: Path):
    """DPO equals the stock trainer. `cpo` has one gradient in one process, in two, and in micro-batches."""
    import ddp_dpo

    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "max_steps": 2, "learning_rate": 0.1}
    ranks = run("dpo", tmp_path, options, "ddp_dpo.py")
    assert ranks[0]["fused"]["sums"] == ranks[1]["fused"]["sums"]
    alone = ddp_dpo.train(
        tmp_path / "alone", **{**options, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1}
    )
    for mine, other in (
        (ranks[0]["fused"], ranks[0]["stock"]),
        (ranks[0]["fused"], alone["fused"]),
        (ranks[0]["cpo"], alone["cpo"]),
    ):
        assert mine["sums"] == pytest.approx(other["sums"], rel=1e-5, abs=1e-5)
        for a, b in zip(mine["logs"], other["logs"], strict=True):
            keys = a.keys() - ({"entropy"} if other is not ranks[0]["stock"] else set())  # TRL averages micro-batches
            assert {k: a[k] for k in keys} == pytest.approx({k: b[k] for k in keys}, rel=1e-5, abs=1e-5)
    assert ranks[0]["cpo"]["sums"] != pytest.approx(ranks[0]["fused"]["sums"], rel=1e-5, abs=1e-5)
