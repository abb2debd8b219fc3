"""One rank of GRPO runs with DistributedDataParallel on the CPU.

    ddp_grpo.py NAME FOLDER OPTIONS

OPTIONS is {loss type: options of GRPOConfig}. For each loss type, every rank trains the stock trainer, the stock
trainer in float64 and the fused one. It writes {loss type: {trainer: {"logs", "sums"}}} to FOLDER/NAME-RANK.json;
`sums` holds the sum of each parameter. One process runs them all, because importing TRL takes longer than training.
"""

import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import ranks_end
import tiny_grpo
import torch
from host_parity import trl_in_float64
from trl import GRPOTrainer

from tokfuse.integrations.trl import FusedGRPOTrainer

TRAINERS = {"stock": GRPOTrainer, "exact": GRPOTrainer, "fused": FusedGRPOTrainer}
LOGGED = ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "reward")


def train(name: str, folder: Path, **options: Any) -> dict[str, Any]:
    """Train one trainer and return its logs and sums."""
    trainer = tiny_grpo.trainer(
        TRAINERS[name],
        folder,
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
    with trl_in_float64() if name == "exact" else nullcontext():
        trainer.train()
    logs = [{key: row[key] for key in LOGGED if key in row} for row in trainer.state.log_history if "loss" in row]
    return {"logs": logs, "sums": [float(p.detach().double().sum()) for p in trainer.model.parameters()]}


def main(name: str, folder: Path, options: dict[str, dict[str, Any]]) -> None:
    """Train and write the results."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    out = {
        loss_type: {
            arm: train(arm, folder / f"{loss_type}-{arm}-{rank}", loss_type=loss_type, **more) for arm in TRAINERS
        }
        for loss_type, more in options.items()
    }
    (folder / f"{name}-{rank}.json").write_text(json.dumps(out))
    ranks_end.now()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
