"""Resource table of the compiled CUDA kernels, and its comparison with a committed table.

The tools that Triton bundles (cuobjdump, nvdisasm) read the native module itself, so the table describes
the shipped code, and nothing is compiled. Per kernel and architecture it contains registers, spills, static
shared memory, threads, and the instructions per element of the hot loops.
"""

import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from tokfuse.inspection.kernel_table import INSTRUCTIONS_SLACK, REGISTERS_SLACK
from tokfuse.runtime.backends import cuda_backend
from tokfuse.runtime.core import native

# Not stored in csrc/, because writing a source file would make the module out of date.
TABLE = Path(__file__).resolve().parent / "cuda_resources.json"
# Template argument -> (dtype, size in bytes).
DTYPES = {"float": ("float32", 4), "BFloat16": ("bfloat16", 2), "Float16": ("float16", 2), "double": ("float64", 8)}


@dataclass(frozen=True)
class Loops:
    """Description of the hot loops of a kernel: the loops over a row in vectors of 16 bytes.

    Args:
        reads: number of loops that only read the row.
        writes: number of loops that read the row and write another one.
        source: load instruction: "LDG" for global memory, "LDS" for shared memory.
        traffic: elements moved between memory and the chip per element of a row.
        streams: rows that a loop reads side by side.
        one_pass: last template arguments of the instances with one loop less that reads: only rare
            rows take it.
        tangents: with a softcap, the loop that writes loads float32 tangents instead of logits.
    """

    reads: int
    writes: int
    source: str = "LDG"
    traffic: int = 1
    streams: int = 1
    one_pass: tuple[str, ...] = ()
    tangents: bool = False


ROW_KERNELS = {
    "token_stats_fwd_kernel": Loops(1, 0),
    "token_stats_bwd_kernel": Loops(0, 1, traffic=2),
    "token_stats_sum_fwd_kernel": Loops(1, 0),
    "token_stats_sum_bwd_kernel": Loops(0, 1, traffic=2),
    "policy_step_kernel": Loops(1, 1, traffic=2),
    "policy_step_cluster_kernel": Loops(1, 1, "LDS", traffic=2, tangents=True),
    # 1 and 2 are the two KLs: a row that is apart takes the first pass only. Under a softcap, the
    # longest loops are those of close rows, and of rows on and between vectors: an upper bound.
    "paired_divergence_fwd_kernel": Loops(2, 0, traffic=2, streams=2, one_pass=("1", "2")),
    "paired_divergence_bwd_kernel": Loops(0, 1, traffic=3, streams=2),
}


@dataclass(frozen=True)
class Kernel:
    """One compiled kernel on one architecture."""

    name: str
    """Name with template arguments, e.g. token_stats_fwd_kernel<BFloat16, false, false>."""
    arch: str
    """Architecture without the prefix sm_, e.g. "90"."""
    registers: int
    """Registers per thread."""
    stack_bytes: int
    """Bytes of stack per thread: spilled registers, and arrays that are indexed by a variable."""
    shared_bytes: int
    """Static shared memory per block."""
    threads: int
    """Threads per block, the launch bound; 0 without one."""
    per_element: float
    """Instructions of one thread per element of the hot loops; 0 if the kernel does not read rows of logits."""
    exp_per_element: float
    """Exponentials, reciprocals and logarithms of one thread per element of the hot loops: they share one unit."""

    @property
    def key(self) -> str:
        """Name of the row in the table."""
        return f"{self.name}:sm_{self.arch}"

    @property
    def base(self) -> str:
        """Name without template arguments."""
        return self.name.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Template arguments."""
        return [a for a in self.name.partition("<")[2].rstrip(">").split(", ") if a]

    @property
    def dtype(self) -> tuple[str, int]:
        """(name, bytes) of its elements; float32 if the dtype is not a template argument."""
        return DTYPES.get((self.arguments or ["float"])[0], DTYPES["float"])


# -------------------------------------------------------------------------------- reading the file


def tools() -> Path | None:
    """Return the folder of cuobjdump and nvdisasm, or None if triton does not have them."""
    try:
        import triton
    except ImportError:
        return None
    folder = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    return folder if (folder / "nvdisasm").exists() else None


def nvcc_version() -> str:
    """Return the version of the compiler of the native module's CUDA kernels, or "" if it has none."""
    return str(getattr(native.module(), "cuda_version", ""))


def why_not() -> str | None:
    """Return None if the table can be made on this machine, else one sentence with the reason."""
    if not nvcc_version():
        return cuda_backend.why_unusable() or "the CUDA kernels run on the CPU here"
    if tools() is None or shutil.which("c++filt") is None:
        return "needs triton, whose wheel contains cuobjdump and nvdisasm, and c++filt"
    reads, built = (int(version.split(".")[0]) for version in (tools_version(), nvcc_version()))
    if reads < built:
        # cuobjdump 12.8 finds no kernel in a module of nvcc 13.0 and reports no error.
        return f"the cuobjdump of this triton reads CUDA {reads}, and the module was built with CUDA {built}"
    return None


@functools.cache
def tools_version() -> str:
    """Return the CUDA version of the cuobjdump that triton bundles, for example "12.8"."""
    folder = tools()
    assert folder is not None
    found = re.search(r"release ([\d.]+)", _run(folder / "cuobjdump", "--version"))
    assert found is not None
    return found[1]


def _run(*command: str | Path, cwd: Path | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


def read_module(arch: str = "") -> list[Kernel]:
    """Return every kernel of the native module, for one architecture, or for all that it was built for."""
    reason, module, folder = why_not(), native.module(), tools()
    if reason is not None:
        raise SystemExit(f"kernels: {reason}.")
    assert module is not None and module.__file__ is not None and folder is not None
    with tempfile.TemporaryDirectory() as scratch:
        _run(folder / "cuobjdump", "-xelf", "all", module.__file__, cwd=Path(scratch))
        files = sorted(Path(scratch).glob(f"*.sm_{arch or '*'}.cubin"))
        with ThreadPoolExecutor() as pool:
            found = pool.map(lambda file: list(_read_cubin(folder, file)), files)
            return sorted((k for kernels in found for k in kernels), key=lambda k: k.key)


def _read_cubin(folder: Path, file: Path) -> Iterator[Kernel]:
    arch = re.search(r"\.sm_(\w+)\.cubin$", file.name)
    assert arch is not None, file
    usage = _run(folder / "cuobjdump", "-res-usage", file)
    threads = _threads(_run(folder / "cuobjdump", "-elf", file))
    code = _functions(_run(folder / "nvdisasm", "-c", file))
    for mangled, registers, stack, shared in re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", usage):
        name = readable(mangled)
        instructions, exps = _per_element(name, code[mangled])
        yield Kernel(
            name, arch[1], int(registers), int(stack), int(shared), threads.get(mangled, 0), instructions, exps
        )


def _threads(elf: str) -> dict[str, int]:
    """Return the launch bound of each function."""
    found = {}
    for part in elf.split(".nv.info.")[1:]:
        bound = re.search(r"EIATTR_MAX_THREADS.*?Value:\s*0x([0-9a-f]+) ", part, re.DOTALL)
        if bound is not None:
            found[part.split()[0]] = int(bound[1], 16)
    return found


def _functions(sass: str) -> dict[str, str]:
    """Return the SASS listing of each function."""
    parts = re.split(r"^//-+ \.text\.(\S+) -+$", sass, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@functools.lru_cache(maxsize=4096)
def readable(mangled: str) -> str:
    """Return the name of a kernel with template arguments, without namespaces and parameters."""
    text = _run("c++filt", mangled).strip()
    text = re.sub(r"\b(tokfuse|cuda)::", "", text.removeprefix("void "))
    depth = 0
    for i, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:i]
            break
    return re.sub(r"\(\w+\)(\d)", r"\1", text)


# ---------------------------------------------------------------------------------- counting loops


def _loops(listing: str) -> list[list[str]]:
    """Return the innermost loops: the instructions between a label and a branch back to it."""
    labels: dict[str, int] = {}
    body: list[str] = []
    spans: list[tuple[int, int]] = []
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            body.append(instruction[1])
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            if target and labels.get(target[1], len(body)) < len(body) - 1:
                spans.append((labels[target[1]], len(body)))
    inner = [(a, b) for a, b in spans if not any(a <= c and d <= b and (c, d) != (a, b) for c, d in spans)]
    return [body[a:b] for a, b in inner]


def _vectors(loop: Sequence[str], instruction: str) -> int:
    """Return the number of 16-byte accesses by `instruction` in one pass through the loop."""
    return sum(bool(re.search(rf"\b{instruction}\.[\w.]*\b128\b", text)) for text in loop)


def _per_element(name: str, listing: str) -> tuple[float, float]:
    """Return (instructions, exps) per element of the hot loops, which are the longest of their kind."""
    base, _, rest = name.partition("<")
    hot = ROW_KERNELS.get(base)
    if hot is None:
        return 0.0, 0.0
    arguments = rest.rstrip(">").split(", ")
    size, last = DTYPES[arguments[0]][1], arguments[-1]
    found: dict[bool, list[tuple[float, int, int]]] = {False: [], True: []}
    for loop in _loops(listing):
        writes = "STG" in " ".join(loop)
        read = 4 if writes and hot.tangents and last == "true" else size
        elements = 16 * _vectors(loop, hot.source) / read / hot.streams
        if elements:
            exps = sum("MUFU" in text for text in loop)
            found[writes].append((elements, len(loop), exps))
    reads = hot.reads - (last in hot.one_pass)
    chosen = sorted(found[False], reverse=True)[:reads]
    chosen += sorted(found[True], reverse=True)[: hot.writes]
    return (
        round(sum(length / elements for elements, length, _ in chosen), 2),
        round(sum(exps / elements for elements, _, exps in chosen), 2),
    )


# ---------------------------------------------------------------------------------------- the table


def as_json(kernels: Sequence[Kernel]) -> str:
    """Return the committed form: one line per kernel, so that a diff is easy to read."""
    lines = [json.dumps(asdict(kernel)) for kernel in sorted(kernels, key=lambda k: k.key)]
    return f'{{"nvcc": "{nvcc_version()}", "kernels": [\n  ' + ",\n  ".join(lines) + "\n]}\n"


def committed() -> list[Kernel]:
    """Return the rows of the committed table."""
    return [Kernel(**row) for row in json.loads(TABLE.read_text())["kernels"]]


def differences(now: Sequence[Kernel], before: Sequence[Kernel]) -> list[str]:
    """Return one sentence for each kernel that is worse than in the table, not in the table, or removed."""
    old, new = {k.key: k for k in before}, {k.key: k for k in now}
    found = [f"{key}: is not in the table" for key in sorted(new.keys() - old.keys())]
    found += [f"{key}: is in the table, not in the module" for key in sorted(old.keys() - new)]
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        limits = {
            "registers": a.registers + REGISTERS_SLACK,
            "stack_bytes": a.stack_bytes,
            "shared_bytes": a.shared_bytes,
            "threads": a.threads,
            "per_element": a.per_element * (1 + INSTRUCTIONS_SLACK),
        }
        found += [
            f"{key}: {name} {getattr(b, name)}, the table has {getattr(a, name)}"
            for name, limit in limits.items()
            if getattr(b, name) > limit
        ]
    return found
