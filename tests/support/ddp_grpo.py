"""One rank of a GRPO run with DistributedDataParallel on the CPU.

    ddp_grpo.py ARM FOLDER OPTIONS

ARM is "stock", "exact" (the stock trainer in float64) or "fused". OPTIONS is a JSON object of GRPOConfig.
Every rank writes its log and the sum of each of its parameters to FOLDER/ARM-RANK.json.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path

import ranks_end
import tiny_grpo
import torch
from host_parity import trl_in_float64
from trl import GRPOTrainer

from tokfuse.integrations.trl import FusedGRPOTrainer

ARMS = {"stock": GRPOTrainer, "exact": GRPOTrainer, "fused": FusedGRPOTrainer}
LOGGED = ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "reward")


def main(arm: str, folder: Path, options: dict) -> None:
    """Train and write the results."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    trainer = tiny_grpo.trainer(
        ARMS[arm],
        folder / f"{arm}-{rank}",
        ddp_backend="gloo",
        gradient_accumulation_steps=2,
        max_steps=3,
        beta=0.04,
        num_iterations=2,
        optim="sgd",
        learning_rate=0.3,
        max_grad_norm=0.0,
        **options,
    )
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"]) > 1
    with trl_in_float64() if arm == "exact" else nullcontext():
        trainer.train()
    logs = [{name: row[name] for name in LOGGED if name in row} for row in trainer.state.log_history if "loss" in row]
    sums = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    (folder / f"{arm}-{rank}.json").write_text(json.dumps({"logs": logs, "sums": sums}))
    ranks_end.now()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
