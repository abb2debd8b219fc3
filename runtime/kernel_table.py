"""`python -m tokfuse kernels`: what the Triton kernels compile to, held against a committed table.

Every compile case (`tokfuse.triton_kernels.compile_cases`) is cross-compiled for each architecture
and disassembled with the tools that Triton bundles; no GPU is needed. Per kernel, dtype and
architecture the table holds registers, spilled bytes, shared memory, and of the hot loop the widest
load and the instructions per element: those of one pass through it, over the bytes that it loads
divided by the bytes of an element.
"""

import argparse
import concurrent.futures
import functools
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokfuse.runtime import triton_backend

# Beside the kernels, so that an installed package can be checked too.
TABLE = Path(__file__).resolve().parent.parent / "triton_kernels" / "resources.json"
PAGE = Path(__file__).resolve().parent.parent / "docs" / "kernels.md"
# Other versions of the compiler allot a few registers and instructions more or less.
REGISTERS_SLACK = 8
INSTRUCTIONS_SLACK = 0.02
# Instructions that a GPU issues in the time in which its memory moves one byte: 4 per clock and SM.
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
    """Width of the widest global load of the hot loop."""
    per_element: float
    """Instructions per element of the hot loop, of one thread."""
    traffic_bytes: int
    """Bytes per element between memory and the chip; 0 where bandwidth is not predicted."""

    @property
    def key(self) -> str:
        return f"{self.case}:{self.kernel}:{self.dtype}:sm_{self.capability}"


def compile_all(
    names: Sequence[str] = (),
    wanted: Callable[[torch.dtype, int], bool] = lambda dtype, capability: True,
) -> list[Resources]:
    """The resources of every case, or of those whose name starts with one of `names`.

    `wanted` tells which dtypes are compiled for which architecture.
    """
    if not triton_backend.installed():
        raise SystemExit("kernels: triton is not installed; pip install 'tokfuse[gpu]'.")
    if triton_backend.interpreting():
        raise SystemExit("kernels: TRITON_INTERPRET is set, which leaves no compiler. Unset it.")
    from tokfuse.triton_kernels import compile_cases

    jobs = [
        (case, dtype, capability)
        for case in compile_cases.cases()
        if not names or case.name.startswith(tuple(names))
        for dtype in case.dtypes
        for capability in compile_cases.CAPABILITIES
        if wanted(dtype, capability)
    ]
    # Recorded one after the other: recording replaces Triton's launch for the whole process.
    work = [(*job, launch) for job in jobs for launch in compile_cases.record(*job)]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        return list(pool.map(lambda w: _resources(*w), work))


# CPython 3.11 counts the depth of ast.parse in one place for all threads (gh-106905): two that
# parse at once fail with "AST constructor recursion depth mismatch". Triton parses in these two
# methods.
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


def _resources(case: Any, dtype: torch.dtype, capability: int, launch: Any) -> Resources:
    import triton
    from triton.backends.compiler import GPUTarget

    position: dict[Any, tuple[int, ...]] = {k: (i,) for i, k in enumerate(launch.signature)}
    source = _source_type()(
        launch.kernel,
        signature=launch.signature,
        constexprs=launch.constexprs,
        attrs={position.get(k, k): [["tt.divisibility", 16]] for k in launch.aligned},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options=launch.options
    )
    usage, sass = _disassemble(compiled.asm["cubin"])
    loops = []
    if case.streams:
        loops = [(loop, list(_load_widths(loop))) for loop in hot_loops(sass, case.visits)]
    bytes_per_element = case.streams * dtype.itemsize
    per_element = sum(len(loop) * bytes_per_element / max(1, sum(w)) for loop, w in loops if w)
    return Resources(
        case=case.name,
        kernel=launch.kernel.__name__,
        dtype=str(dtype).removeprefix("torch."),
        capability=capability,
        registers=int(_found(r"REG:(\d+)", usage)),
        # Spilled registers live on the stack, and these kernels keep nothing else there.
        spill_bytes=int(_found(r"STACK:(\d+)", usage)),
        shared_bytes=compiled.metadata.shared,
        threads=32 * launch.options.get("num_warps", 4),
        load_bytes=min((max(widths, default=0) for _, widths in loops), default=0),
        per_element=round(per_element, 2),
        traffic_bytes=case.traffic * dtype.itemsize,
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


def hot_loops(sass: str, count: int = 1) -> list[list[str]]:
    """The `count` loops with the widest loads, longest first; all instructions if none loops.

    The loops over the edges of a row are longer, and load element by element under a mask.
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
    return loops[:count] or [body]


def _load_widths(instructions: Sequence[str]) -> Iterator[int]:
    """Bytes of each load from global memory, straight or into shared memory."""
    for text in instructions:
        if match := re.search(r"\b(?:LDG|LDGSTS)\.([\w.]+)", text):
            suffixes = match[1].split(".")
            bits = [
                int(s.lstrip("US")) for s in suffixes if re.fullmatch(r"[US]?(8|16|64|128|256)", s)
            ]
            yield bits[0] // 8 if bits else 4


# ------------------------------------------------------------------------------------- the table


def as_json(rows: Sequence[Resources]) -> str:
    """The committed form: one line per row, so that a difference reads as one."""
    lines = [json.dumps(asdict(row)) for row in sorted(rows, key=lambda row: row.key)]
    version = json.dumps(importlib.metadata.version("triton"))
    return f'{{"triton": {version}, "rows": [\n  ' + ",\n  ".join(lines) + "\n]}\n"


def committed() -> list[Resources]:
    """The rows of the committed table."""
    return [Resources(**row) for row in json.loads(TABLE.read_text())["rows"]]


def as_markdown(rows: Sequence[Resources]) -> str:
    """The table for people: one line per kernel and dtype, a column per architecture."""
    capabilities = sorted({row.capability for row in rows})
    table: dict[tuple[str, str, str], dict[int, Resources]] = {}
    for row in rows:
        table.setdefault((row.case, row.kernel, row.dtype), {})[row.capability] = row
    head = ["case", "kernel", "dtype", *(f"sm_{c}" for c in capabilities)]
    lines = [
        "# Triton kernels, compiled",
        "",
        "Written by `python -m tokfuse kernels --write`; `--check` compiles again and compares.",
        "No GPU is needed. Each cell: instructions per element of the hot loop (of one thread),",
        "registers, shared memory and widest load in bytes; spills are named where there are any.",
        "",
        "| " + " | ".join(head) + " |",
        "|" + " --- |" * len(head),
    ]
    for key, cells in sorted(table.items()):
        shown = [_cell(cells[c]) if c in cells else "-" for c in capabilities]
        lines.append("| " + " | ".join([*key, *shown]) + " |")
    lines += ["", *_shares(table)]
    return "\n".join(lines) + "\n"


def bandwidth_share(row: Resources, gpu: str) -> float:
    """The part of the memory's bandwidth that the hot loop can use before issue slots run out."""
    _, processors, gigahertz, terabytes = GPUS[gpu]
    slots = row.traffic_bytes * 32 * 4 * processors * gigahertz / (1000 * terabytes)
    return min(1.0, slots / row.per_element)


def _shares(table: dict[tuple[str, str, str], dict[int, Resources]]) -> Iterator[str]:
    yield "Predicted share of the memory's bandwidth, from issue slots alone: an upper bound, which"
    yield "ignores latency, the special-function unit and clocks below boost."
    yield ""
    yield "| case | dtype | " + " | ".join(GPUS) + " |"
    yield "| --- | --- |" + " --- |" * len(GPUS)
    for (case, _, dtype), cells in sorted(table.items()):
        if all(row.traffic_bytes for row in cells.values()):
            shares = [
                f"{bandwidth_share(cells[row[0]], gpu):.0%}" if row[0] in cells else "-"
                for gpu, row in GPUS.items()
            ]
            yield "| " + " | ".join([case, dtype, *shares]) + " |"


def _cell(row: Resources) -> str:
    count = f"{row.per_element:.1f}" if row.per_element else "-"
    cell = f"{count}, {row.registers} reg, {row.shared_bytes} B, {row.load_bytes} B"
    return cell + (f", **{row.spill_bytes} B spilled**" if row.spill_bytes else "")


def differences(now: Sequence[Resources], before: Sequence[Resources]) -> list[str]:
    """One sentence for each kernel that is worse than the table, missing from it, or gone."""
    old, new = {row.key: row for row in before}, {row.key: row for row in now}
    found = [f"{key}: is not in the table" for key in sorted(new.keys() - old.keys())]
    found += [
        f"{key}: is in the table and not compiled any more"
        for key in sorted(old.keys() - new.keys())
    ]
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokfuse kernels",
        description="Registers, spills and instructions per element of the kernels, no GPU.",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--check", action="store_true", help="compile, compare with the table")
    form.add_argument("--write", action="store_true", help="compile, replace the table")
    parser.add_argument("--cuda", action="store_true", help="the CUDA kernels of the native module")
    parser.add_argument("cases", nargs="*", help="only cases whose name starts like one of these")
    options = parser.parse_args(argv)
    if options.cuda:
        from tokfuse.runtime import cuda_table

        if options.cases:
            parser.error("--cuda reads the whole module; it takes no cases")
        return cuda_table.main(options.check, options.write)
    rows = compile_all(options.cases)
    if options.write:
        if options.cases:
            kept = [r for r in committed() if not r.case.startswith(tuple(options.cases))]
            rows = [*kept, *rows]
        TABLE.write_text(as_json(rows))
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(as_markdown(rows))
        print(f"wrote {TABLE} and {PAGE}")
        return 0
    print(as_markdown(rows), end="")
    if not options.check:
        return 0
    before = [
        r for r in committed() if not options.cases or r.case.startswith(tuple(options.cases))
    ]
    found = differences(rows, before)
    print("\n".join(found) or "as in the table", file=sys.stderr)
    return 1 if found else 0
