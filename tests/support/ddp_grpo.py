"""One rank of a GRPO run under DistributedDataParallel on the CPU: `ddp_grpo.py ARM FOLDER`.

ARM is "stock" or "fused". Rank 0 writes what it logged, and its parameters' sums, to
FOLDER/ARM.json; the other ranks their sums, to see that all ranks hold the same model.
"""

import json
import os
import sys
from pathlib import Path

import tiny_grpo
import torch
from trl import GRPOTrainer

from tokfuse.integrations.trl import FusedGRPOTrainer

ARMS = {"stock": GRPOTrainer, "fused": FusedGRPOTrainer}
LOGGED = ("loss", "grad_norm", "entropy", "kl", "clip_ratio/region_mean", "reward")


def main(arm: str, folder: Path, options: dict) -> None:
    """Train and write."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    trainer = tiny_grpo.trainer(
        ARMS[arm], folder / f"{arm}-{rank}", ddp_backend="gloo", gradient_accumulation_steps=2,
        max_steps=3, beta=0.04, num_iterations=2, **options,
    )  # fmt: skip
    assert trainer.accelerator.num_processes == int(os.environ["WORLD_SIZE"]) > 1
    trainer.train()
    logs = [
        {name: row[name] for name in LOGGED if name in row}
        for row in trainer.state.log_history
        if "loss" in row
    ]
    sums = [float(p.detach().double().sum()) for p in trainer.model.parameters()]
    (folder / f"{arm}-{rank}.json").write_text(json.dumps({"logs": logs, "sums": sums}))


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
