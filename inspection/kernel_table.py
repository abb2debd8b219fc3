"""Resource table of the compiled Triton kernels, and its comparison with a committed table.

Every compile case (`tokfuse.triton_kernels.compile_cases`) is cross-compiled for each architecture and
disassembled with the tools that Triton bundles. No GPU is needed. Per kernel, dtype and architecture the
table contains registers, spilled bytes, shared memory, and the widest load and the instructions per element
of the hot loop. Instructions per element are the instructions of one pass through the loop, divided by the
number of elements that the pass loads.

A row also contains its source: a digest of everything that determines the row. These are the code of the
kernel and of every device function that it calls, arguments, options, the analysis in this module and the
version of Triton. Rows whose source is in the committed table need no new compilation (`known`).
"""

import concurrent.futures
import functools
import hashlib
import importlib.metadata
import inspect
import json
import os
import re
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokfuse.inspection import progress, tables
from tokfuse.runtime.backends import triton_backend

# Stored in the folder of the kernels, so that an installed package can be checked too.
TABLE = Path(__file__).resolve().parent.parent / "triton_kernels" / "resources.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
# Tolerances of the comparison: other compiler versions use a few registers and instructions more or less.
REGISTERS_SLACK = 8
INSTRUCTIONS_SLACK = 0.02
# Thread instructions that an SM issues per clock, and those that its special-function units execute
# (exponentials, reciprocals, logarithms). They limit the memory bandwidth that a kernel can use.
ISSUED = 128
SPECIAL = 16
# (capability, SMs, GHz, TB/s); sustained clocks under load are lower than these boost clocks.
GPUS = {
    "A100": (80, 108, 1.41, 2.0),
    "H100": (90, 132, 1.755, 3.35),
    "H200": (90, 132, 1.755, 4.8),
    "B200": (100, 148, 1.85, 8.0),
}


@dataclass(frozen=True)
class Resources:
    """One compiled kernel."""

    case: str
    kernel: str
    dtype: str
    capability: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    threads: int
    load_bytes: int
    """Width in bytes of the widest global load of the hot loop."""
    per_element: float
    """Instructions of one thread per element of the hot loop."""
    special_per_element: float
    """The part of these instructions that the special-function units execute."""
    traffic_bytes: int
    """Bytes per element between memory and the chip; 0 if no bandwidth is predicted."""
    source: str
    """Digest of the compiled code, the compiler and the analysis."""

    @property
    def key(self) -> str:
        """Name of the row in the table."""
        return row_key(self.case, self.kernel, self.dtype, self.capability)


def compile_all(
    names: Sequence[str] = (),
    wanted: Callable[[torch.dtype, int], bool] = lambda dtype, capability: True,
    known: Sequence[Resources] = (),
) -> list[Resources]:
    """Return the resources of every case, or of the cases whose name starts with one of `names`.

    Args:
        names: prefixes of case names. Empty: all cases.
        wanted: function that tells whether a dtype is compiled for an architecture.
        known: rows to reuse if their source is unchanged.
    """
    require_compiler()
    from tokfuse.triton_kernels import compile_cases

    jobs = [
        (case, dtype, capability)
        for case in compile_cases.cases()
        if not names or case.name.startswith(tuple(names))
        for dtype in case.dtypes
        for capability in compile_cases.CAPABILITIES
        if wanted(dtype, capability)
    ]
    # Recorded sequentially, because recording replaces Triton's launch function for the whole process.
    work = [(*job, launch) for job in jobs for launch in compile_cases.record(*job)]
    # Kernels are also parsed sequentially (see _PARSING). The digests below reuse the parsed code.
    for *_, launch in work:
        compile_cases.code_of(launch.kernel)
    old = {(row.key, row.source): row for row in known}

    def resources(case: Any, dtype: torch.dtype, capability: int, launch: Any) -> Resources:
        key = row_key(case.name, launch.kernel.__name__, name_of(dtype), capability)
        found = old.get((key, source_of(case, dtype, capability, launch)))
        return found or resources_of(case, dtype, capability, launch)

    out = []
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool, progress.bar(len(work), "kernel") as shown:
        for row in pool.map(lambda w: resources(*w), work):
            out.append(row)
            shown.update()
    return out


def require_compiler(command: str = "kernels") -> None:
    """Exit with an error message if Triton cannot compile here."""
    if not triton_backend.installed():
        raise SystemExit(f"{command}: triton is not installed; pip install 'tokfuse[gpu]'.")
    if triton_backend.interpreting():
        raise SystemExit(f"{command}: TRITON_INTERPRET is set, which disables the compiler. Unset it.")


def row_key(case: str, kernel: str, dtype: str, capability: int) -> str:
    """Return the name of a row in the table."""
    return f"{case}:{kernel}:{dtype}:sm_{capability}"


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype without `torch.`."""
    return str(dtype).removeprefix("torch.")


def source_of(case: Any, dtype: torch.dtype, capability: int, launch: Any) -> str:
    """Return the digest of everything that determines a row."""
    from tokfuse.triton_kernels import compile_cases

    facts = (
        compile_cases.code_of(launch.kernel),
        launch.signature,
        launch.constexprs,
        launch.aligned,
        launch.options,
        (case.streams, case.visits, case.rare, case.traffic, dtype, capability),
        importlib.metadata.version("triton"),
        _analysis(),
    )
    return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


@functools.cache
def _analysis() -> str:
    read = (resources_of, _disassemble, hot_loops, _load_widths)
    return "".join(inspect.getsource(function) for function in read)


# CPython 3.11 counts the recursion depth of ast.parse globally for all threads (gh-106905). Two concurrent
# calls fail with "AST constructor recursion depth mismatch". Triton parses in the two methods of Source.
_PARSING = threading.RLock()


@functools.cache
def _source_type() -> Any:
    from triton.compiler import ASTSource

    class Source(ASTSource):  # type: ignore[misc]
        def hash(self) -> Any:
            with _PARSING:
                return super().hash()

        def make_ir(self, *args: Any, **kwargs: Any) -> Any:
            with _PARSING:
                return super().make_ir(*args, **kwargs)

    return Source


def resources_of(case: Any, dtype: torch.dtype, capability: int, launch: Any) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget

    position: dict[Any, tuple[int, ...]] = {k: (i,) for i, k in enumerate(launch.signature)}
    source = _source_type()(
        launch.kernel,
        signature=launch.signature,
        constexprs=launch.constexprs,
        attrs={position.get(k, k): [["tt.divisibility", 16]] for k in launch.aligned},
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.options)
    usage, sass = _disassemble(compiled.asm["cubin"])
    loops = []
    if case.streams:
        loops = [(loop, list(_load_widths(loop))) for loop in hot_loops(sass, case.visits, case.rare)]
    bytes_per_element = case.streams * dtype.itemsize
    # A loop over the bytes that one pass through it loads: passes per element.
    passes = [(loop, bytes_per_element / max(1, sum(widths))) for loop, widths in loops if widths]
    return Resources(
        case=case.name,
        kernel=launch.kernel.__name__,
        dtype=name_of(dtype),
        capability=capability,
        registers=int(_found(r"REG:(\d+)", usage)),
        # Spilled registers live on the stack, and these kernels keep nothing else there.
        spill_bytes=int(_found(r"STACK:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        threads=32 * launch.options.get("num_warps", 4),
        load_bytes=min((max(widths, default=0) for _, widths in loops), default=0),
        per_element=round(sum(len(loop) * share for loop, share in passes), 2),
        special_per_element=round(sum(share * sum("MUFU" in text for text in loop) for loop, share in passes), 2),
        traffic_bytes=case.traffic * dtype.itemsize,
        source=source_of(case, dtype, capability, launch),
    )


def _disassemble(cubin: bytes) -> tuple[str, str]:
    """(resource usage, SASS)."""
    import triton

    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        commands = ((tools / "cuobjdump", "-res-usage"), (tools / "nvdisasm", "-c"))
        usage, sass = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in commands
        )
    return usage, sass


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, f"no {pattern} in {text[:200]}"
    return match[1]


def hot_loops(sass: str, count: int = 1, rare: int = 0) -> list[list[str]]:
    """Return the `count` loops with the widest loads, longest first; all instructions if none loops.

    The longest `rare` of them are left out. The loops over the edges of a row are longer, and load
    element by element under a mask.
    """
    labels: dict[str, int] = {}
    body: list[str] = []
    loops: list[list[str]] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(body)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            body.append(instruction[1])
            target = re.search(r"\bBRA\b.*?(\.L_x_\d+)", instruction[1])
            # A branch to itself is the padding behind the last instruction.
            if target and labels.get(target[1], len(body)) < len(body) - 1:
                loops.append(body[labels[target[1]] :])
    loops.sort(key=lambda x: (max(_load_widths(x), default=0), len(x)), reverse=True)
    return loops[rare : rare + count] or [body]


def _load_widths(instructions: Sequence[str]) -> Iterator[int]:
    """Bytes of each load from global memory, straight or into shared memory."""
    for text in instructions:
        if match := re.search(r"\b(?:LDG|LDGSTS)\.([\w.]+)", text):
            suffixes = match[1].split(".")
            bits = [int(s.lstrip("US")) for s in suffixes if re.fullmatch(r"[US]?(8|16|64|128|256)", s)]
            yield bits[0] // 8 if bits else 4


# ------------------------------------------------------------------------------------- the table

ABOUT = """`python -m tokfuse kernels --write` generates this page. `--check` compiles the kernels again and
compares. No GPU is needed. Each cell contains the instructions per element of the hot loop (for one
thread), registers, shared memory and the widest load in bytes. Spills are listed if there are any.

## Memory access

The kernels that take most of the time read (tokens, vocab), about 300 KB per token: `token_stats`,
`policy_step`, `paired_divergence` and `linear_token_stats`. They load 16 bytes at a time. The
exception is a forward over rows at odd addresses (`odd_vocabulary`), because its sums must not
depend on the address of a row. The kernels over per-token vectors move only 8 to 44 bytes per
token. They work in float64 on pieces that end at the end of a sequence or group, at any address.
Their loads are therefore one element wide, or 16 bytes wide if a piece starts on whole vectors.

The figures of `paired_divergence_fwd` are for a row with a KL of at least 1e-4: one loop for the two
KLs, two loops for the other kinds. A row with a smaller KL, or with an excluded logit (-inf), takes
a further loop: 41 to 47 instructions per element for a KL, about 67 for a mixture.

## Gradient GEMMs without clipped rows

`head_gradient` contains the two gradient GEMMs of `policy_step(compact_clipped=True)`. They read
the list of rows with a gradient from device memory. cuBLAS needs the number of rows on the host. By
default, clipped rows therefore enter its GEMMs as zeros. The Triton GEMMs pay off if many rows are
clipped: at f times the throughput of cuBLAS, they are faster if the share of rows with a gradient is
below f. You must measure f on your device, so the option is not automatic.

## Triton versions

The table shows Triton 3.7.1. Every case also compiles with 3.6.0 and 3.9.0 (every dtype for sm_90,
bfloat16 for sm_80 and sm_100). Instructions per element in bfloat16, sm_90 / sm_100:

| Triton | `token_stats_fwd` | `token_stats_bwd` | `policy_step` | `policy_step` with softcap | spills |
| --- | --- | --- | --- | --- | --- |
| 3.6.0 | 12.1 / 9.1 | 9.5 / 9.4 | 22.4 / 19.1 | 45.1 / 35.4 | 8 bytes in `policy_step` (float32) and `policy_metrics` |
| 3.9.0 | 11.1 / 10.5 | 10.8 / 9.1 | 24.3 / 23.1 | 43.1 / 35.2 | none |

## Tuning on your GPU

`python -m tokfuse tune` measures other launch configurations on a GPU. `--dry-run` lists them with
their compiled resources. `tokfuse.load_tuned()` uses the stored results.

## Compiled resources
""".splitlines()


def as_json(rows: Sequence[Resources]) -> str:
    """Return the committed form: one line per row, so that a diff is easy to read."""
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.key)]
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"triton": {version}, "rows": [\n  ' + ",\n  ".join(lines) + "\n]}\n"


def committed() -> list[Resources]:
    """Return the rows of the committed table."""
    return [Resources(**row) for row in json.loads(TABLE.read_text())["rows"]]


def as_markdown(rows: Sequence[Resources]) -> str:
    """Return the page: the tables of `as_tables` with their explanation."""
    resources, shares = as_tables(rows)
    lines = ["# Compiled Triton kernels", "", *ABOUT, "", *resources.markdown(), "", *SHARES, "", *shares.markdown()]
    return "\n".join([*lines, ""])


def as_tables(rows: Sequence[Resources]) -> tuple[tables.Table, tables.Table]:
    """Return the resources of each kernel and dtype per architecture, and the bandwidth shares per GPU."""
    capabilities = sorted({row.capability for row in rows})
    table: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for row in rows:
        table.setdefault((row.case, row.kernel, row.dtype), {})[row.capability] = row
    head = ["case", "kernel", "dtype", *(f"sm_{c}" for c in capabilities)]
    lines = []
    for key, cells in sorted(table.items()):
        lines.append([*key, *(_cell(cells[c]) if c in cells else "-" for c in capabilities)])
    resources = tables.Table(head, lines, "instructions per element, registers, shared memory, widest load")
    return resources, tables.Table(["case", "dtype", *GPUS], _shares(table), "predicted share of the memory bandwidth")


def bandwidth_share(row: Resources, gpu: str) -> tuple[float, str]:
    """Return (share, limit): the predicted share of the memory bandwidth that the hot loop can use, and its limit.

    The limit is "memory", "issue" (instruction slots) or "special" (special-function units).
    """
    _, processors, gigahertz, terabytes = GPUS[gpu]
    clocks = row.traffic_bytes * processors * gigahertz / (1000 * terabytes)
    shares = [(1.0, "memory"), (clocks * ISSUED / row.per_element, "issue")]
    if row.special_per_element:
        shares.append((clocks * SPECIAL / row.special_per_element, "special"))
    return min(shares)


def _share(row: Resources, gpu: str) -> str:
    share, limit = bandwidth_share(row, gpu)
    return f"{share:.0%}{' s' if limit == 'special' else ''}"


SHARES = """\
The table shows the predicted share of the memory bandwidth, from the instructions of the hot
loop. It is an upper bound, because it ignores latency and clocks below boost. The limit is the
number of issue slots, or the special-function units (s), which need eight slots for an
exponential or a reciprocal.
""".splitlines()


def _shares(table: dict[tuple[str, str, str], dict[int, Resources]]) -> list[list[str]]:
    lines = []
    for (case, _, dtype), cells in sorted(table.items()):
        if all(row.traffic_bytes for row in cells.values()):
            shares = [_share(cells[row[0]], gpu) if row[0] in cells else "-" for gpu, row in GPUS.items()]
            lines.append([case, dtype, *shares])
    return lines


def _cell(row: Resources) -> str:
    count = f"{row.per_element:.1f}" if row.per_element else "-"
    cell = f"{count}, {row.registers} reg, {row.shared_bytes} B, {row.load_bytes} B"
    return cell + (f", **{row.spill_bytes} B spilled**" if row.spill_bytes else "")


def differences(now: Sequence[Resources], before: Sequence[Resources]) -> list[str]:
    """Return one sentence for each kernel that is worse than in the table, not in the table, or removed."""
    old, new = {row.key: row for row in before}, {row.key: row for row in now}
    found = [f"{key}: is not in the table" for key in sorted(new.keys() - old.keys())]
    found += [f"{key}: is in the table, but is no longer compiled" for key in sorted(old.keys() - new.keys())]
    for key in sorted(old.keys() & new.keys()):
        a, b = old[key], new[key]
        limits = {
            "registers": a.registers + REGISTERS_SLACK,
            "spill_bytes": a.spill_bytes,
            "shared_bytes": a.shared_bytes,
            "per_element": a.per_element * (1 + INSTRUCTIONS_SLACK),
        }
        found += [
            f"{key}: {name} {getattr(b, name)}, the table has {getattr(a, name)}"
            for name, limit in limits.items()
            if getattr(b, name) > limit
        ]
        if b.load_bytes < a.load_bytes:
            found.append(f"{key}: loads of {b.load_bytes} bytes, the table has {a.load_bytes}")
    return found
