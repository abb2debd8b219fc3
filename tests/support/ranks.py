"""Run every distributed case in `world` processes over gloo, started once for all cases.

Starting a rank takes seconds, and a case takes milliseconds. `run(world)` returns the outcome of each case:
"" if it passed on every rank, otherwise the traceback of the first rank that failed. As a program it is one
rank: `python ranks.py RANK WORLD FOLDER`.
"""

import importlib
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

CASE_MODULES = ("vocab_parallel_cases", "vocab_pair_cases", "data_parallel_cases", "capture_cases")
TIMEOUT = 60  # seconds: timeout of a collective after other ranks failed


def cases() -> dict[str, Callable[[], None]]:
    """Return the functions whose name starts with `case_`, by name. Every rank runs them without arguments."""
    found = {}
    for module in map(importlib.import_module, CASE_MODULES):
        for name, function in vars(module).items():
            if name.startswith("case_"):
                found[name.removeprefix("case_")] = function
    return found


def run(world: int, folder: Path) -> dict[str, str]:
    """Return the outcome of every case with `world` ranks."""
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1", "TOKFUSE_BACKEND": ""}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(world), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        printed = [rank.communicate(timeout=300)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    outcome: dict[str, str] = {}
    for rank, text in enumerate(printed):
        file = folder / f"{rank}.json"
        assert file.exists(), f"rank {rank} wrote nothing:\n{text[-4000:]}"
        for name, problem in json.loads(file.read_text()).items():
            if problem and not outcome.get(name):
                problem = f"rank {rank}: {problem}"
            outcome[name] = outcome.get(name) or problem
    return outcome


def main(rank: int, world: int, folder: Path) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(folder / "store"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=TIMEOUT))
    outcome: dict[str, str] = {}
    for name, case in cases().items():
        torch.manual_seed(0)
        try:
            case()
            outcome[name] = ""
        except Exception:
            outcome[name] = traceback.format_exc()
        # After a failure inside a collective, all later collectives would be misaligned.
        failed = torch.tensor([bool(outcome[name])], dtype=torch.int32)
        try:
            dist.all_reduce(failed)
        except RuntimeError as error:
            outcome[name] = outcome[name] or f"other ranks failed: {error}"
            break
    (folder / f"{rank}.json").write_text(json.dumps(outcome))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
