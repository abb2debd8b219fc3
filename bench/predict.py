"""Predict the time of the compiled kernels on GPUs: `python -m tokfuse bench predict`.

Nothing runs. The prediction uses the committed table (`python -m tokfuse kernels`). The time of a kernel
on a GPU is the longer of two times: the bytes of the contract / memory bandwidth, and the instructions of
the hot loop / issue rate (4 warp instructions per clock and SM). Launches, tails and caches are ignored,
so a real run is slower. The rows have status "predicted", and tables of measured rows exclude them.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokfuse.bench import machine
from tokfuse.bench.plan import MODELS
from tokfuse.bench.row import SCHEMA_VERSION, Row
from tokfuse.inspection import cuda_table, kernel_table, roofline

TOKENS = 8192
DTYPES = ("float32", "bfloat16")
# case of the kernel table -> (op, mode, variant) of the benchmark
CASES = {
    "policy_step": ("policy_step", "step", "entropy=0.01"),
    "token_stats_fwd": ("token_stats", "forward", "all"),
    "token_stats_bwd": ("token_stats", "backward", "logp,entropy"),
}
LANES = 32  # elements per warp instruction
ISSUES = 4  # warp instructions per clock and SM


class Kernels(NamedTuple):
    """The kernels of one benchmark case: their names in both tables, and how many logit tensors they read and write."""

    triton: tuple[str, ...]
    cuda: tuple[str, ...]
    streams: tuple[int, ...]


# (op, mode) of the benchmark -> its kernels. Variants differ only in the objective.
ROW_KERNELS = {
    ("token_stats", "forward"): Kernels(("token_stats_fwd",), ("token_stats_fwd_kernel",), (1,)),
    ("token_stats", "forward+backward"): Kernels(
        ("token_stats_fwd", "token_stats_bwd"), ("token_stats_fwd_kernel", "token_stats_bwd_kernel"), (1, 2)
    ),
    ("policy_step", "step"): Kernels(("policy_step",), ("policy_step_kernel",), (2,)),
    ("paired_divergence", "forward"): Kernels(("paired_divergence_fwd/jsd",), ("paired_divergence_fwd_kernel",), (2,)),
    ("paired_divergence", "forward+backward"): Kernels(
        ("paired_divergence_fwd/jsd", "paired_divergence_bwd/jsd"),
        ("paired_divergence_fwd_kernel", "paired_divergence_bwd_kernel"),
        (2, 3),
    ),
}
# Tera-operations per second of the tensor cores in 16-bit formats, without sparsity, from data sheets.
TENSOR_TFLOPS = {"A100": 312.0, "H100": 989.0, "H200": 989.0, "B200": 2250.0}


def gpu_of(name: str) -> str | None:
    """Return the GPU of the tables for a device name: "NVIDIA H100 80GB HBM3" -> "H100"; None if it is not listed."""
    return next((gpu for gpu in kernel_table.GPUS if gpu in name), None)


def milliseconds(row: Row, gpu: str) -> float | None:
    """Return the predicted time of a measured case on a GPU of the tables; None without a prediction.

    Args:
        row: its op, mode, variant, backend ("cuda" or "triton"), dtype and sizes are used.
        gpu: one of `kernel_table.GPUS`.
    """
    if row.dtype not in DTYPES or row.backend not in ("cuda", "triton"):
        return None
    if (row.op, row.variant) == ("policy_step_hidden", "rows=1"):
        return _head(row, gpu)
    kernels = ROW_KERNELS.get((row.op, row.mode))
    if kernels is None or (row.op == "paired_divergence" and row.variant != "jsd"):
        return None
    names = kernels.cuda if row.backend == "cuda" else kernels.triton
    instructions = (_cuda if row.backend == "cuda" else _triton)(names, row.dtype, gpu)
    elements, size = row.tokens * row.vocab, 4 if row.dtype == "float32" else 2
    return sum(
        _longer(elements, size * streams, count, gpu)[0]
        for streams, count in zip(kernels.streams, instructions, strict=True)
    )


def _triton(names: Sequence[str], dtype: str, gpu: str) -> list[float]:
    """Return the instructions per element of the hot loop of each Triton kernel."""
    wanted = (dtype, kernel_table.GPUS[gpu][0])
    found = {k.case: k.per_element for k in kernel_table.committed() if (k.dtype, k.capability) == wanted}
    return [found[name] for name in names]


def _cuda(names: Sequence[str], dtype: str, gpu: str) -> list[float]:
    """Return the instructions per element of each CUDA kernel. One exponential costs as much as eight instructions."""
    weight = roofline.ISSUE / roofline.EXPS
    found = {
        k.base: max(k.per_element, weight * k.exp_per_element)
        for k, name, _ in roofline.plain_rows(cuda_table.committed())
        if name == gpu and k.dtype[0] == dtype and not {"1", "2"} & set(k.arguments)  # 0: the JSD
    }
    return [found[name] for name in names]


def _longer(elements: int, element_bytes: float, instructions: float, gpu: str) -> tuple[float, float]:
    """Return (milliseconds, milliseconds of the bytes alone). The first is the longer of bytes and instructions."""
    _, sms, ghz, tb_per_s = kernel_table.GPUS[gpu]
    memory = elements * element_bytes / (tb_per_s * 1e9)
    issue = elements * instructions / LANES / (sms * ISSUES * ghz * 1e6)
    return max(memory, issue), memory


def _head(row: Row, gpu: str) -> float | None:
    """Return the time of the launches in docs/cuda.md, "A chunk of the head", for a 16-bit head with all rows live."""
    if row.dtype != "bfloat16":
        return None
    t, h, v = row.tokens, row.hidden, row.vocab
    product = 2 * t * h * v / (TENSOR_TFLOPS[gpu] * 1e9)
    logits, gradient, states, head = 4 * t * v, 2 * t * v, 2 * t * h, 2 * v * h  # bytes
    moved = {
        "logits": states + head + logits,
        "grad_hidden": gradient + head + 2 * states,
        "grad_weight": gradient + states + 2 * head,
    }
    bandwidth = kernel_table.GPUS[gpu][3] * 1e9
    products = sum(max(product, size / bandwidth) for size in moved.values())
    return products + (logits + gradient) / bandwidth


def rows() -> Iterator[Row]:
    """Yield one row per kernel, dtype, GPU and vocabulary of a known model."""
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
    median, memory_ms = _longer(elements, kernel.traffic_bytes, kernel.per_element, gpu)
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
