"""The end of a rank that trained with DistributedDataParallel on gloo."""

import os
import sys

import torch


def now() -> None:
    """End this process without clean-up, after all ranks arrived here.

    With clean-up, a rank now and then aborts ("terminate called without an active exception") if the process group
    lives on, or hangs if it was destroyed: DDP's reducer then joins gloo's threads while it holds the GIL, and one of
    these threads waits for the GIL to release a tensor.
    """
    torch.distributed.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
