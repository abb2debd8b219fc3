"""`docs/roofline.md`: the predicted limits of the CUDA kernels on several GPUs, from the committed table.

    time per element = max(bytes / bandwidth, instructions / issue rate, exps / exp rate)
    predicted share of the bandwidth = (bytes / bandwidth) / time per element

Per clock, an SM issues 4 warp instructions, that is 128 thread instructions, and computes 16 exps. Clocks
are boost clocks. The formula ignores latency; the page lists the occupancy separately.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from tokfuse.inspection.cuda_table import ROW_KERNELS, Kernel

PAGE = Path(__file__).resolve().parent.parent / "docs" / "roofline.md"

ISSUE, EXPS = 128, 16  # thread instructions and exps per SM and clock
REGISTERS, WARPS, SHARED = 65536, 64, 227 * 1024  # per SM; an A100 has only 163 KiB of shared memory
# Dynamic shared memory of a policy_step block at 151,936 bfloat16 logits, in bytes. A cluster of four blocks
# holds two rows; with a softcap, one row and its tangents.
CLUSTER_SHARED, CLUSTER_SHARED_SOFTCAP = 152064, 228096


class Gpu(NamedTuple):
    """Data of one GPU."""

    arch: str
    """Architecture without the prefix sm_."""
    processors: int
    """Number of SMs."""
    gigahertz: float
    """Boost clock, GHz."""
    terabytes: float
    """Nominal memory bandwidth, TB/s."""


GPUS = {
    "A100": Gpu("80", 108, 1.41, 2.0),
    "H100": Gpu("90", 132, 1.755, 3.35),
    "H200": Gpu("90", 132, 1.755, 4.8),
    "B200": Gpu("100", 148, 1.85, 8.0),
}

DIVERGENCES = ("JSD", "forward KL", "reverse KL", "skew forward KL", "skew reverse KL", "total variation")
# Kernels over packed vectors: bytes per token (or row) between memory and the chip, float32.
PACKED = {
    "policy_loss_kernel": (48, "token; 36 read, 12 written"),
    "policy_metrics_kernel": (36, "token"),
    "gae_kernel": (16, "token; 17 with a mask"),
    "vtrace_kernel": (24, "token; 25 with a mask"),
    "whiten_kernel": (8, "token; a second read of 4 from L2"),
    "segment_moments_kernel": (4, "row with `cu_seqlens`; 20 with ids, after torch's sort"),
    "group_advantage_kernel": (28, "sequence, after torch's sort of the ids"),
    "offpolicy_weights_kernel": (13, "token; 9 more in L2 if normalised"),
    "ope_kernel": (17, "row; a second read from L2"),
    "sketch_kernel": (512, "token at rank 64; 4 KFLOP, float32"),
}


def share(kernel: Kernel, gpu: Gpu) -> float:
    """Return the predicted share of the bandwidth."""
    rate = gpu.processors * gpu.gigahertz / 1000  # clocks of all SMs, in 10^12 per second
    size = kernel.dtype[1]
    memory = ROW_KERNELS[kernel.base].traffic * size / gpu.terabytes
    issue = kernel.per_element / (ISSUE * rate)
    exps = kernel.exp_per_element / (EXPS * rate)
    return memory / max(memory, issue, exps)


def occupancy(kernel: Kernel) -> float:
    """Return the occupancy: resident warps divided by the maximum number of warps."""
    warps = kernel.threads // 32
    registers = -(-kernel.registers // 8) * 8 * 32
    dynamic = 0
    if kernel.base == "policy_step_cluster_kernel":
        dynamic = CLUSTER_SHARED_SOFTCAP if kernel.arguments[-1] == "true" else CLUSTER_SHARED
    blocks = min(REGISTERS // (registers * warps), WARPS // warps, SHARED // (kernel.shared_bytes + dynamic + 1024))
    return blocks * warps / WARPS


def as_markdown(kernels: Sequence[Kernel]) -> str:
    """Return the page."""
    return "\n".join(_lines(kernels)) + "\n"


def _lines(kernels: Sequence[Kernel]) -> Iterator[str]:
    gpus = "; ".join(f"{name} {g.processors}, {g.gigahertz}, {g.terabytes}" for name, g in GPUS.items())
    yield HEAD.format(gpus=gpus)
    for kernel, name, gpu in (*plain_rows(kernels), *softcap_rows(kernels)):
        dtype, size = kernel.dtype
        yield (
            "| "
            + " | ".join(
                [
                    _label(kernel),
                    dtype,
                    name,
                    str(ROW_KERNELS[kernel.base].traffic * size),
                    f"{kernel.per_element:.1f}",
                    f"{kernel.exp_per_element:.2f}",
                    str(kernel.registers),
                    f"{occupancy(kernel):.0%}",
                    f"{share(kernel, gpu):.0%}",
                ]
            )
            + " |"
        )
    yield PACKED_HEAD
    by_base = {k.base: k for k in kernels if k.arch == "90" and k.dtype[0] == "float32"}
    for base, (size, unit) in PACKED.items():
        k = by_base[base]
        yield (f"| `{base}` | {size} | {unit} | {k.threads} | {k.registers} | {occupancy(k):.0%} |")


HEAD = """\
# Roofline of the CUDA kernels (predicted)

`python -m tokfuse kernels --cuda --write` generates this page from `inspection/cuda_resources.json`.
Registers and instruction counts come from the compiled module. All other figures are computed from
them and from data sheets. Nothing was measured on a GPU.

    time per element = max(bytes / bandwidth, instructions / issue rate, exps / exp rate)
    predicted share  = (bytes / bandwidth) / time per element

Issue rate: 128 thread instructions per SM and clock. Exp rate: 16 per SM and clock; reciprocals and
logarithms are counted as exps, because the same unit computes them.
SMs, boost GHz, TB/s: {gpus}.

The share is the predicted fraction of the nominal memory bandwidth. At 100% the memory is the
bottleneck. The model ignores latency, clocks below boost, and the achievable bandwidth of a
streaming kernel (about 90% of nominal on Hopper). Real kernels are therefore slower.

## Kernels over rows of logits

These figures are for calls without bias and extra statistics, and without softcap except for the
last rows. Bytes per token are the bytes per element times the vocabulary. `policy_step_cluster_kernel`
holds its row in the shared memory of a cluster and runs on sm_90 and sm_100; its occupancy is given
for 151,936 bfloat16 logits. With a softcap it computes the tanh of a logit once and keeps the result
in shared memory, up to a vocabulary of 305,664 in 16 bits and 229,376 in float32.
`policy_step_kernel` reads the row twice. The second read comes from L2 and is not counted.

| kernel | dtype | GPU | bytes per element | instructions | exps | registers | occupancy | share |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |"""

PACKED_HEAD = """
## Kernels over packed vectors

Each op is one launch, with float64 sums in a fixed order. With a few thousand tokens, the launch
overhead dominates. Registers and occupancy are given for sm_90.

| kernel | bytes | per | threads | registers | occupancy |
| --- | --- | --- | --- | --- | --- |"""


def plain_rows(kernels: Sequence[Kernel]) -> Iterator[tuple[Kernel, str, Gpu]]:
    """Return the kernels without options, by kernel, dtype and GPU. Gradients have the dtype of the logits."""
    for base in ROW_KERNELS:
        for dtype in ("bfloat16", "float32"):
            for name, gpu in GPUS.items():
                for k in kernels:
                    if k.base == base and k.dtype[0] == dtype and k.arch == gpu.arch and _plain(k):
                        if base != "policy_step_cluster_kernel" or gpu.arch != "80":
                            yield k, name, gpu


def softcap_rows(kernels: Sequence[Kernel]) -> Iterator[tuple[Kernel, str, Gpu]]:
    """Return the kernels of policy_step with a softcap, for bfloat16."""
    for base in ("policy_step_kernel", "policy_step_cluster_kernel"):
        for name, gpu in GPUS.items():
            for k in kernels:
                if k.base == base and k.arguments == ["BFloat16", "BFloat16", "true"] and k.arch == gpu.arch:
                    if base != "policy_step_cluster_kernel" or gpu.arch != "80":
                        yield k, name, gpu


def _plain(kernel: Kernel) -> bool:
    types = {a for a in kernel.arguments if not a.isdigit() and a not in ("true", "false")}
    return len(types) == 1 and "true" not in kernel.arguments


def _label(kernel: Kernel) -> str:
    kinds = [a for a in kernel.arguments if a.isdigit()]
    if kernel.arguments[-1] == "true":
        return f"`{kernel.base}` with softcap"
    return f"`{kernel.base}`" + "".join(f" {DIVERGENCES[int(kind)]}" for kind in kinds)
