"""Calls every op of the backend "cuda", with every option and dtype, on small inputs; for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/support/cuda_smoke.py

Runs on a GPU, or on the CPU where TOKFUSE_CUDA_HOST is set.
"""

import torch
from op_calls import ALIGNED, WIDE, Call, Problem, calls

import tokfuse
from tokfuse.runtime.backends import cuda_backend

DEVICE = "cpu" if cuda_backend.hosted() else "cuda"


def smoke(call: Call) -> None:
    """One call in each of its dtypes: options only in the first one."""
    if call.needs_triton and cuda_backend.hosted():
        return
    dtypes = call.row.dtypes[:1] if call.option else call.row.dtypes
    for dtype in dtypes:
        # Rows that are not aligned, and rows that are.
        for sizes in (WIDE, ALIGNED) if call.row.family == "rows" else (WIDE,):
            call.run(Problem(sizes, DEVICE, dtype))


def main() -> None:
    count = 0
    with tokfuse.backend("cuda"):
        for call in calls():
            smoke(call)
            count += 1
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print(f"cuda_smoke: {count} calls done")


if __name__ == "__main__":
    main()
