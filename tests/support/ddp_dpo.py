"""One rank of DPO runs with DistributedDataParallel on the CPU.

    ddp_dpo.py NAME FOLDER OPTIONS

Every rank trains stock DPO, fused DPO and `cpo`, and writes the logs and the sum of each parameter of each run to
FOLDER/NAME-RANK.json. `cpo` has a mean over all chosen tokens of the optimizer step.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import ranks_end
import tiny_dpo
import torch
from trl import DPOTrainer

from tokfuse.integrations.trl import FusedDPOTrainer

RUNS: dict[str, tuple[type, dict[str, Any]]] = {
    "stock": (DPOTrainer, {}),
    "fused": (FusedDPOTrainer, {}),
    "cpo": (FusedDPOTrainer, {"algorithm": "cpo"}),
}
LOGGED = ("loss", "grad_norm", "entropy", "rewards/margins")


def train(folder: Path, **options: Any) -> dict[str, Any]:
    """Return {run: {"logs", "sums"}}."""
    out = {}
    for name, (cls, extra) in RUNS.items():
        trainer = tiny_dpo.trainer(cls, folder / name, extra=dict(extra), **options)
        trainer.train()
        logs = [{key: row[key] for key in LOGGED} for row in trainer.state.log_history if "loss" in row]
        out[name] = {"logs": logs, "sums": [float(p.detach().double().sum()) for p in trainer.model.parameters()]}
    return out


def main(name: str, folder: Path, options: dict[str, Any]) -> None:
    """Train and write the results."""
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    out = train(folder / f"{name}-{rank}", ddp_backend="gloo", **options)
    (folder / f"{name}-{rank}.json").write_text(json.dumps(out))
    ranks_end.now()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3]))
