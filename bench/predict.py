"""Predict the time of the compiled kernels on GPUs: `python -m tokfuse bench predict`.

Nothing runs. The prediction uses the committed table (`python -m tokfuse kernels`). The time of a kernel
on a GPU is the longer of two times: the bytes of the contract / memory bandwidth, and the instructions of
the hot loop / issue rate (4 warp instructions per clock and SM). Launches, tails and caches are ignored,
so a real run is slower. The rows have status "predicted", and tables of measured rows exclude them.
`python -m tokfuse.bench.predict` prints the table of distill_step in docs/distillation.md.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tokfuse.bench import machine
from tokfuse.bench.plan import MODELS
from tokfuse.bench.row import SCHEMA_VERSION, Row
from tokfuse.inspection import cuda_table, kernel_table, roofline
from tokfuse.runtime.core.codes import DIVERGENCES

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
    ("paired_divergence", "forward"): Kernels(("paired_divergence_fwd",), ("paired_divergence_fwd_kernel",), (2,)),
    ("paired_divergence", "forward+backward"): Kernels(
        ("paired_divergence_fwd", "paired_divergence_bwd"),
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
    if row.op == "distill_step":
        kind, _, wide = row.variant.partition(",")
        step = distill(gpu, kind, row.tokens, row.hidden, row.hidden * (2 if wide else 1), row.vocab, row.backend)
        return step.milliseconds if row.dtype == "bfloat16" else None
    kernels = ROW_KERNELS.get((row.op, row.mode))
    if kernels is None:
        return None
    kind = row.variant if row.op == "paired_divergence" else ""
    instructions = _instructions(kernels, row.backend, row.dtype, gpu, kind)
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


def _cuda(names: Sequence[str], dtype: str, gpu: str, kind: str) -> list[float]:
    """Return the instructions per element of each CUDA kernel. One exponential costs as much as eight instructions."""
    weight = roofline.ISSUE / roofline.EXPS
    code = str(DIVERGENCES.index(kind)) if kind else None  # the last template argument of paired_divergence
    found = {
        k.base: max(k.per_element, weight * k.exp_per_element)
        for k, name, _ in roofline.plain_rows(cuda_table.committed())
        if name == gpu and k.dtype[0] == dtype and (code is None or k.arguments[-1] == code)
    }
    return [found[name] for name in names]


def _instructions(kernels: Kernels, backend: str, dtype: str, gpu: str, kind: str) -> list[float]:
    """Return the instructions per element of the kernels of a case; kind: of divergence, or empty."""
    if backend == "cuda":
        return _cuda(kernels.cuda, dtype, gpu, kind)
    return _triton([f"{name}/{kind}" if kind else name for name in kernels.triton], dtype, gpu)


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


class Distilled(NamedTuple):
    """The predicted cost of distill_step from hidden states with 16-bit heads."""

    megabytes: float
    """Moved between memory and the chip, 10^6 bytes."""
    launches: int
    """All kernels, including torch's."""
    instructions: float
    """Instructions of the row kernels per logit of a side."""
    milliseconds: float
    limit_ms: float
    """Time of the four matrix products at the peak rate of the tensor cores."""

    @property
    def share(self) -> float:
        """The limit divided by the time."""
        return self.limit_ms / self.milliseconds


CHUNK = 1024  # rows of both sides' logits on a GPU, runtime/lm_head/problem.py
# Bytes per logit that the comparison of the two maxima moves: two maxima (4 each), two comparisons (4 read,
# 1 written), their conjunction (3) and its reduction (1).
MAXIMA_BYTES, MAXIMA_LAUNCHES = 22, 6


def distill(
    gpu: str, kind: str, tokens: int, hidden: int, teacher_hidden: int, vocab: int, backend: str = "triton"
) -> Distilled:
    """Predict a step of the chunks of runtime/lm_head/device_pair.py, bfloat16 heads, without bias and policy term.

    Args:
        gpu: one of `kernel_table.GPUS`.
        kind: a divergence.
        tokens, hidden, teacher_hidden, vocab: sizes; every token has a weight.
        backend: "cuda" or "triton".
    """
    chunks, logits = -(-tokens // CHUNK), tokens * vocab
    bandwidth = kernel_table.GPUS[gpu][3] * 1e9  # bytes per millisecond
    student, teacher = 2 * hidden * (tokens + vocab * chunks), 2 * teacher_hidden * (tokens + vocab * chunks)
    products = (
        (hidden, student + 4 * logits),
        (teacher_hidden, teacher + 4 * logits),
        (hidden, student + 2 * logits + 4 * tokens * hidden),  # grad_hidden
        (hidden, 2 * tokens * hidden + 2 * logits + 8 * vocab * hidden * chunks),  # grad_weight, in float32
    )
    times = [(2 * logits * columns / (TENSOR_TFLOPS[gpu] * 1e9), size / bandwidth) for columns, size in products]
    stats = _instructions(ROW_KERNELS["token_stats", "forward"], backend, "float32", gpu, "")
    compare = _instructions(ROW_KERNELS["paired_divergence", "forward+backward"], backend, "float32", gpu, kind)
    # (bytes, instructions) per logit: statistics of both sides, maxima, divergence, gradient, its rounding to 16 bits
    visits = [(4, stats[0]), (4, stats[0]), (MAXIMA_BYTES, 0.0), (8, compare[0]), (12, compare[1]), (6, 0.0)]
    rows_ms = sum(_longer(logits, size, count, gpu)[0] for size, count in visits)
    moved = sum(size for _, size in products) + logits * sum(size for size, _ in visits)
    launches = chunks * (len(products) + len(visits) - 1 + MAXIMA_LAUNCHES)
    instructions = sum(count for _, count in visits)
    milliseconds = rows_ms + sum(max(pair) for pair in times)
    return Distilled(moved / 1e6, launches, instructions, milliseconds, sum(at_peak for at_peak, _ in times))


def distill_table() -> str:
    """Return the Markdown table of docs/distillation.md."""
    lines = ["| GPU, predicted | divergence | GB | instructions per logit | ms | share of the limit |"]
    lines.append("| --- " * 6 + "|")
    for gpu in kernel_table.GPUS:
        for kind in ("kl_reverse", "kl_forward", "jsd"):
            d = distill(gpu, kind, TOKENS, 4096, 4096, 151936)
            figures = f"{d.megabytes / 1e3:.0f} | {d.instructions:.0f} | {d.milliseconds:.0f} | {d.share:.0%}"
            lines.append(f"| {gpu} | {kind} | {figures} |")
    return "\n".join(lines)


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


if __name__ == "__main__":
    print(distill_table())
