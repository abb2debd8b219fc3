"""`python -m tokfuse doctor`: installed versions, devices, and the backends that each op can use.

`report()` returns plain data that can be written as JSON. `render()` formats it as text. `markdown()`
returns the support table of docs/backends.md, which depends only on the declared capabilities, not on the
machine. Only a report queries a GPU driver.
"""

import argparse
import importlib
import importlib.metadata
import json
import os
import pkgutil
import platform
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tokfuse.inspection import tables
from tokfuse.runtime.core import dispatch, native

PACKAGES = ("tokfuse", "torch", "triton", "transformers", "numpy", "nvidia-ml-py")

# Every environment variable that the project reads, or that changes its behaviour.
ENVIRONMENT = {
    "TOKFUSE_BACKEND": "force one backend for every op: cuda, triton, cpu or reference",
    "TOKFUSE_CUDA_HOST": "path of a build of the CUDA kernels that runs on the CPU, for tests",
    "TOKFUSE_ISA": "x86-64 level of the CPU kernels: v2, v3 or v4; default: the best that the CPU supports",
    "TOKFUSE_KEEP_MIB": "MiB of freed CPU memory kept for later calls; 0: none; default: 1/8 of the memory, up to 4096",
    "TOKFUSE_CHECK": "1 also checks values on a GPU, which synchronises the device",
    "TOKFUSE_NVTX": "1 pushes NVTX ranges around every op, 0 disables them; default: only under nsys",
    "OMP_NUM_THREADS": "CPU threads, shared with torch (torch.set_num_threads overrides it)",
    "OMP_WAIT_POLICY": "`passive` lets idle CPU threads sleep; set it on a shared machine",
    "TOKFUSE_VERL_HEADS": "1 replaces verl's fused heads with tokfuse when verl is imported",
    "NO_COLOR": "1 prints plain text instead of tables and colours on a terminal",
    "TRITON_INTERPRET": "1 runs the Triton kernels on the CPU, for tests; set it before the import",
    "TOKFUSE_CUDA": "AUTO builds the CUDA kernels if nvcc is found, ON requires them, OFF disables them",
    "TOKFUSE_STRICT_BUILD": "1 makes a failed native build an error instead of a fallback",
    "TOKFUSE_CMAKE_ARGS": "extra arguments for the CMake configure step",
    "TOKFUSE_KEEP_NATIVE": "1 makes an editable install keep an existing native module instead of building it",
    "MAX_JOBS": "parallel compile jobs of the native build",
    "TOKFUSE_BENCH_FULL": "1 makes `pytest bench` use the published shapes",
}

SHORT_DTYPE = {"float32": "f32", "bfloat16": "bf16", "float16": "f16", "float64": "f64"}
SUPPORT_BEGIN = "<!-- support: written by `python -m tokfuse doctor --markdown docs/backends.md` -->"
SUPPORT_END = "<!-- /support -->"


def import_ops() -> dict[str, str]:
    """Import every module of `tokfuse.runtime.ops`, which registers the ops. Return the errors by module name."""
    package = importlib.import_module("tokfuse.runtime.ops")
    failures = {}
    for module in pkgutil.iter_modules(package.__path__):
        name = f"{package.__name__}.{module.name}"
        try:
            importlib.import_module(name)
        except ImportError as error:
            failures[name] = str(error)
    return failures


def _versions() -> dict[str, str | None]:
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    versions["torch"] = torch.__version__  # contains the build tag, which the metadata of some builds omits
    return versions


def _native() -> dict[str, Any]:
    module = native.module()
    info: dict[str, Any] = {"built": module is not None, "why": native.why_unusable() or ""}
    if module is not None:
        info["file"] = module.__file__
        info["active_isa"] = module.active_isa()
        info["cuda_version"], info["cuda_archs"] = module.cuda_version, module.cuda_archs.split(",")
    return info


def _openmp_runtimes() -> list[str]:
    """Return the files of the OpenMP runtimes in this process. More than one means two thread pools."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return []
    files = {line.split(maxsplit=5)[-1] for line in lines if "/" in line}
    return sorted(f for f in files if Path(f).name.startswith(("libgomp", "libomp", "libiomp")))


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _cuda() -> dict[str, Any]:
    if torch.version.cuda is None:
        return {"devices": [], "why": "torch is a CPU build"}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        why = str(caught[0].message).splitlines()[0] if caught else "no GPU or no driver"
        return {"devices": [], "why": why}
    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "capability": f"{properties.major}.{properties.minor}",
                "memory_gib": round(properties.total_memory / 2**30, 1),
            }
        )
    return {"devices": devices, "why": ""}


def report() -> dict[str, Any]:
    """Return the full report as plain data.

    Returns:
        A dict with the keys `versions`, `native`, `devices`, `threads`, `environment`, `failures`
        (op modules that cannot be imported) and `ops`. `ops` has one row per op and backend: op,
        backend, built, usable, why, devices, dtypes, features.
    """
    failures = import_ops()
    return {
        "versions": _versions(),
        "native": _native(),
        "devices": {"cpu": _cpu_name(), "cuda": _cuda()},
        "threads": {"torch": torch.get_num_threads(), "cores": os.cpu_count(), "openmp_runtimes": _openmp_runtimes()},
        "environment": {name: os.environ.get(name) for name in ENVIRONMENT},
        "failures": failures,
        "ops": dispatch.table(),
    }


def _default_backend(rows: Sequence[dict[str, Any]], device: str) -> str:
    """Return the first usable backend, in dispatch order, that supports tensors on `device`."""
    for row in rows:
        if row["usable"] and ("*" in row["devices"] or device in row["devices"]):
            return str(row["backend"])
    return "none"


def _ops(rows: Sequence[dict[str, Any]], device: str) -> tuple[tables.Table, list[str]]:
    """Return a table with one row per op and one column per backend, and the reasons that it numbers."""
    reasons: list[str] = []
    lines = []
    for op in sorted({row["op"] for row in rows}):
        of_op = [row for row in rows if row["op"] == op]
        cells = []
        for row in of_op:
            if row["usable"]:
                cells.append("yes")
            elif not row["devices"]:  # no capability record
                cells.append("-")
            else:
                if row["why"] not in reasons:
                    reasons.append(row["why"])
                state = "unusable" if row["built"] else "not built"
                cells.append(f"{state} [{reasons.index(row['why']) + 1}]")
        lines.append([op, *cells, _default_backend(of_op, device)])
    heads = ["op", *dispatch.ORDER, f"{device} tensors run on"]
    return tables.Table(heads, lines, "ops  (yes: usable here; -: not implemented)"), reasons


def _native_lines(info: dict[str, Any]) -> list[str]:
    if not info["built"]:
        return [f"native module  not available: {info['why']}"]
    cuda = "no CUDA kernels"
    if info["cuda_version"]:
        archs = " ".join(f"sm_{arch}" for arch in info["cuda_archs"])
        cuda = f"CUDA kernels by nvcc {info['cuda_version']} for {archs}"
    return [f"native module  built, isa {info['active_isa']}, {cuda}"]


def render(data: dict[str, Any]) -> str:
    """Return the report as text."""
    settings, ops, notes = _parts(data)
    lines = [*_facts(data), "", settings.title, *settings.aligned("  ", heads=False), "", ops.title]
    return "\n".join([*lines, *ops.aligned("  "), *notes])


def _parts(data: dict[str, Any]) -> tuple[tables.Table, tables.Table, list[str]]:
    """Return the environment variables, the ops, and the notes below them."""
    values = data["environment"].items()
    cells = [[name, "unset" if value is None else value, ENVIRONMENT[name]] for name, value in values]
    ops, reasons = _ops(data["ops"], "cuda" if data["devices"]["cuda"]["devices"] else "cpu")
    notes = [f"  [{number}] {reason}" for number, reason in enumerate(reasons, 1)]
    notes += [f"  {name} cannot be imported: {why}" for name, why in data["failures"].items()]
    return tables.Table(("variable", "value", "meaning"), cells, "environment"), ops, notes


def _facts(data: dict[str, Any]) -> list[str]:
    """Return one line per fact about the versions and the machine."""
    present = [f"{name} {version}" for name, version in data["versions"].items() if version]
    absent = [name for name, version in data["versions"].items() if not version]
    lines = ["versions       " + ", ".join(present)]
    if absent:
        lines.append("not installed  " + ", ".join(absent))
    lines += _native_lines(data["native"])
    threads, cuda = data["threads"], data["devices"]["cuda"]
    runtimes = len(threads["openmp_runtimes"])
    note = "" if runtimes < 2 else f"; {runtimes} OpenMP runtimes are loaded, expect contention"
    lines.append(f"threads        {threads['torch']} of {threads['cores']} cores{note}")
    lines.append(f"cpu            {data['devices']['cpu']}")
    gpus = [f"{d['name']} (sm_{d['capability'].replace('.', '')}, {d['memory_gib']} GiB)" for d in cuda["devices"]]
    return [*lines, "cuda           " + ("; ".join(gpus) or f"none: {cuda['why']}")]


def markdown() -> str:
    """Return the support table of docs/backends.md: the declared dtypes and options per op and backend."""
    import_ops()
    rows = dispatch.table()
    lines = ["| op | " + " | ".join(dispatch.ORDER) + " |", "| --- |" + " --- |" * len(dispatch.ORDER)]
    for op in sorted({str(row["op"]) for row in rows}):
        cells = [_markdown_cell(row) for row in rows if row["op"] == op]
        lines.append(f"| `{op}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _markdown_cell(row: dict[str, Any]) -> str:
    if not row["devices"]:
        return "-"
    dtypes = [SHORT_DTYPE.get(name, name) for name in row["dtypes"]]
    cell = " ".join(sorted(dtypes, key=lambda name: list(SHORT_DTYPE.values()).index(name)))
    return cell + "".join(f", {feature}" for feature in row["features"])


def write_markdown(path: Path) -> None:
    """Replace the text between the two support marks of a file by `markdown()`."""
    text = path.read_text()
    if text.count(SUPPORT_BEGIN) != 1 or text.count(SUPPORT_END) != 1:
        counts = f"{text.count(SUPPORT_BEGIN)} and {text.count(SUPPORT_END)}"
        raise ValueError(
            f"doctor: {path} must contain {SUPPORT_BEGIN!r} and {SUPPORT_END!r} once each; got {counts}. Add the marks."
        )
    head, rest = text.split(SUPPORT_BEGIN)
    tail = rest.split(SUPPORT_END)[1]
    path.write_text(f"{head}{SUPPORT_BEGIN}\n{markdown()}\n{SUPPORT_END}{tail}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse doctor",
        description="Show installed versions, devices, and the backends that each op can use.",
        epilog="example: python -m tokfuse doctor --json > report.json",
    )
    form = out.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print the full report as JSON")
    form.add_argument(
        "--markdown",
        nargs="?",
        const="-",
        metavar="FILE",
        help="print the support table, or write it between its marks in FILE",
    )
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    options = parser().parse_args(argv)
    if options.markdown == "-":
        print(markdown())
    elif options.markdown:
        write_markdown(Path(options.markdown))
    elif options.json:
        print(json.dumps(report(), indent=2, default=str))
    else:
        data = report()
        settings, ops, notes = _parts(data)
        tables.show(render(data), *_facts(data), settings, ops, *notes)
    return 0
