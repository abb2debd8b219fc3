"""`python -m tokfuse bench predict`: what the compiled Triton kernels should take on GPUs.

Nothing runs. Per kernel of the committed table (`python -m tokfuse kernels`) and GPU the time is
the longer of two: the bytes of the contract over the memory's bandwidth, and the instructions of
the hot loop over what the SMs issue (4 warp instructions per clock and SM). Launches, tails and
caches are left out, so a real run is slower. Rows have status "predicted", which every table of
measured rows leaves out.
"""

from collections.abc import Iterator

from tokfuse.bench import machine
from tokfuse.bench.plan import MODELS
from tokfuse.bench.row import SCHEMA_VERSION, Row
from tokfuse.inspection import kernel_table

TOKENS = 8192
DTYPES = ("float32", "bfloat16")
# case of the kernel table -> (op, mode, variant) of the benchmark
CASES = {
    "policy_step": ("policy_step", "step", "entropy=0.01"),
    "token_stats_fwd": ("token_stats", "forward", "all"),
    "token_stats_bwd": ("token_stats", "backward", "logp,entropy"),
}
LANES = 32  # a warp instruction works on this many elements
ISSUES = 4  # warp instructions per clock and SM


def rows() -> Iterator[Row]:
    """One row per kernel, dtype, GPU and vocabulary of a known model."""
    for kernel in kernel_table.committed():
        if kernel.case not in CASES or kernel.dtype not in DTYPES:
            continue
        for gpu, (capability, *_) in kernel_table.GPUS.items():
            if capability == kernel.capability:
                for _, vocab in MODELS.values():
                    yield _row(kernel, gpu, vocab)


def _row(kernel: kernel_table.Resources, gpu: str, vocab: int) -> Row:
    _, sms, ghz, tb_per_s = kernel_table.GPUS[gpu]
    op, mode, variant = CASES[kernel.case]
    elements = TOKENS * vocab
    memory_ms = elements * kernel.traffic_bytes / (tb_per_s * 1e9)
    issue_ms = elements * kernel.per_element / LANES / (sms * ISSUES * ghz * 1e6)
    median = max(memory_ms, issue_ms)
    return Row(
        schema=SCHEMA_VERSION,
        op=op,
        mode=mode,
        variant=variant,
        shape=f"{TOKENS}x{vocab}",
        tokens=TOKENS,
        hidden=0,
        vocab=vocab,
        dtype=kernel.dtype,
        device="cuda",
        provider="tokfuse",
        role="ours",
        backend="triton",
        status="predicted",
        note=f"nothing ran: {kernel.per_element:g} instructions and {kernel.traffic_bytes} bytes "
        f"per logit; {sms} SMs at {ghz:g} GHz, {tb_per_s:g} TB/s",
        median_ms=round(median, 4),
        limit="memory",
        limit_ms=round(memory_ms, 4),
        limit_share=round(memory_ms / median, 4),
        bytes_moved=elements * kernel.traffic_bytes,
        bytes_formula=f"{kernel.traffic_bytes} T V",
        gpu=gpu,
        timestamp=machine.now(),
        command="python -m tokfuse bench predict",
    )
