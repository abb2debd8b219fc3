"""`python -m tokfuse tune`: offline tuning of the launch records of the Triton kernels on a device.

A launch record contains the block sizes, warps and stages of a kernel. Tuning is off by default: no call of
an op measures anything. For every kernel the candidates are the shipped record and the valid records near it
(`launch.candidates`). Candidates that spill or exceed the shared memory are excluded. Each candidate is timed
on the compile case of the kernel, which is also the case of the committed resource table. The fastest
candidate is kept if it is faster than the shipped record by `MARGIN`. Only `load_tuned` reads the stored table.
"""

import argparse
import functools
import importlib.metadata
import json
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tokfuse.inspection import kernel_table, progress
from tokfuse.runtime.core.errors import refuse

OP = "load_tuned"
FORMAT = 1
# A smaller speedup may be noise, and the shipped record is the tested one.
MARGIN = 0.02
REPEATS = 20
# Larger than the L2 cache of any device. This buffer is written between two timed calls to flush the cache.
FLUSH_BYTES = 256 << 20
# Maximum shared memory of one program in bytes, by capability. ptxas does not check it, but a launch does.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Candidate:
    """A launch record that can be tried for a kernel.

    Args:
        config: the LaunchConfig.
        resources: resources of the kernels that are compiled with it.
        refused: reason why it is not timed, or "" if it is timed.
    """

    config: Any
    resources: tuple[kernel_table.Resources, ...]
    refused: str


@dataclass(frozen=True)
class Choice:
    """The measurement of one kernel: seconds of each candidate, the shipped record first."""

    kernel: str
    configs: tuple[Any, ...]
    seconds: tuple[float, ...]

    @property
    def best(self) -> Any:
        """The fastest record, or the shipped record if no other is faster by `MARGIN`."""
        fastest = min(range(len(self.seconds)), key=self.seconds.__getitem__)
        worth_it = self.seconds[fastest] < self.seconds[0] * (1.0 - MARGIN)
        return self.configs[fastest if worth_it else 0]


@functools.cache
def problems() -> dict[str, tuple[Any, torch.dtype]]:
    """Return kernel -> (compile case, dtype) on which its records are timed.

    It is the first case that launches the kernel, but a case with the name of the kernel has priority. The
    dtype is bfloat16 if the case supports it.
    """
    from tokfuse.triton_kernels import compile_cases, launch

    found: dict[str, tuple[Any, torch.dtype]] = {}
    for case in compile_cases.cases():
        dtype = torch.bfloat16 if torch.bfloat16 in case.dtypes else case.dtypes[0]
        with launch.choices() as chosen:
            compile_cases.record(case, dtype, launch.DEFAULT_CAPABILITY)
        for kernel in chosen:
            named = case.name.split("/")[0] == kernel
            if kernel not in found or (named and found[kernel][0].name.split("/")[0] != kernel):
                found[kernel] = (case, dtype)
    return found


def admitted(kernel: str, capability: int) -> Iterator[Candidate]:
    """Yield the compiled candidates of one kernel, the record in use first.

    A record that does not change the launches of the case is not a candidate.
    """
    from tokfuse.triton_kernels import compile_cases, launch

    case, dtype = problems()[kernel]
    compiled: dict[str, kernel_table.Resources] = {}
    seen: set[tuple[str, ...]] = set()
    for config in launch.candidates(kernel, capability):
        with launch.trial(kernel, capability, config):
            launches = compile_cases.record(case, dtype, capability)
        sources = [kernel_table.source_of(case, dtype, capability, one) for one in launches]
        if tuple(sources) in seen:
            continue
        seen.add(tuple(sources))
        for source, one in zip(sources, launches, strict=True):
            if source not in compiled:
                compiled[source] = kernel_table.resources_of(case, dtype, capability, one)
        rows = tuple(compiled[source] for source in sources)
        yield Candidate(config, rows, _refusal(rows, capability))


def _refusal(rows: Sequence[kernel_table.Resources], capability: int) -> str:
    limit = SHARED_BYTES[max(c for c in SHARED_BYTES if c <= max(capability, 80))]
    for row in rows:
        if row.spill_bytes:
            return f"{row.kernel} spills {row.spill_bytes} bytes"
        if row.shared_bytes > limit:
            return f"{row.kernel} needs {row.shared_bytes} bytes of shared memory, the limit is {limit}"
    return ""


def measure(kernel: str, capability: int, timer: Timer, device: str = "cuda") -> Choice:
    """Return the times of the admitted candidates of one kernel, measured with `timer` on tensors of one shape."""
    from tokfuse.triton_kernels import compile_cases, launch

    case, dtype = problems()[kernel]
    configs, seconds = [], []
    for candidate in admitted(kernel, capability):
        if candidate.refused:
            continue
        with launch.trial(kernel, capability, candidate.config):
            with compile_cases.on_device(device):
                seconds.append(timer(lambda: case.call(dtype)))
        configs.append(candidate.config)
    return Choice(kernel, tuple(configs), tuple(seconds))


def cuda_timer(call: Callable[[], object]) -> float:
    """Return the seconds of the kernels of one call: the median of `REPEATS` runs with a cold L2 cache.

    A case creates its tensors in the call, so the CUDA events enclose the launches, not the call.
    """
    from tokfuse.triton_kernels import compile_cases

    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(REPEATS + 3):  # the first three runs compile and warm up
        with compile_cases.timed_launches(scratch.zero_) as events:
            call()
        torch.cuda.synchronize()
        times.append(sum(begin.elapsed_time(end) for begin, end in events) * 1e-3)
    return statistics.median(times[3:])


# ------------------------------------------------------------------------------------- the table


def default_path(device: str) -> Path:
    """Return the path of the table of a device: one file per device name in the user's cache."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / "tokfuse" / "tuned" / f"{name}.json"


def as_json(device: str, capability: int, choices: Sequence[Choice]) -> str:
    """Return the table: the best record of each kernel, its seconds and the seconds of the shipped record."""
    records = {
        choice.kernel: {
            **asdict(choice.best),
            "seconds": choice.seconds[choice.configs.index(choice.best)],
            "shipped_seconds": choice.seconds[0],
        }
        for choice in choices
    }
    head = {"format": FORMAT, "device": device, "capability": capability}
    head["triton"] = importlib.metadata.version("triton")
    return json.dumps(head | {"records": records}, indent=2) + "\n"


def load_tuned(path: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Use the launch records that `python -m tokfuse tune` stored for the Triton kernels of this device.

    The records apply to this process, from the next launch on. Every record passes the same check as a
    shipped record. A record determines which thread adds which elements, so this call may change the last
    bits of results. Results stay independent of the batch and equal in every run.

    Args:
        path: a stored table. None: the table of the current CUDA device in the user's cache.

    Returns:
        A dict kernel -> LaunchConfig.

    Raises:
        ValueError: no table; a table of another format, or for another compute capability than the
            current device; an unknown kernel; an invalid record. No record is changed in these cases.
    """
    from tokfuse.triton_kernels import compile_cases, launch

    where = Path(path) if path is not None else default_path(_device()[0])
    hint = "Run python -m tokfuse tune."
    try:
        table = json.loads(where.read_text())
    except OSError:
        raise refuse(OP, "path", "a readable table", str(where), hint) from None
    except ValueError:
        raise refuse(OP, "path", "a table in JSON format", str(where), hint) from None
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else table
        raise refuse(OP, "path", f"a table of format {FORMAT}", repr(found), hint)
    capability = table["capability"]
    if torch.cuda.is_available() and capability != _device()[1]:
        raise refuse(
            OP,
            "path",
            f"a table for compute capability {_device()[1]}, this device's",
            f"{capability} ({table['device']})",
            hint,
        )
    compile_cases.cases()  # imports every kernel file, so that it declares its records
    records = {}
    for kernel, fields in table["records"].items():
        if kernel not in launch.DEFAULTS:
            known = ", ".join(sorted(launch.DEFAULTS))
            raise refuse(OP, "path", f"a table of kernels among {known}", repr(kernel), hint)
        axes = {k: v for k, v in fields.items() if k in launch.LaunchConfig.__dataclass_fields__}
        records[kernel] = launch.LaunchConfig(**axes)
    launch.TUNED.update({(kernel, capability): record for kernel, record in records.items()})
    return records


def _device() -> tuple[str, int]:
    """Return (name, capability) of the current CUDA device."""
    if not torch.cuda.is_available():
        raise refuse(OP, "path", "given if there is no CUDA device", None, "Pass the path of a table.")
    major, minor = torch.cuda.get_device_capability()
    return torch.cuda.get_device_name(), 10 * major + minor


# ------------------------------------------------------------------------------- the command line


def _line(candidate: Candidate, note: str) -> str:
    c = candidate.config
    shape = f"{c.block_t} x {c.block_v} x {c.block_h}, {c.num_warps} warps, {c.num_stages} stages"
    cells = [
        f"{r.kernel}: {r.per_element} per element, {r.registers} reg, {r.shared_bytes} B, loads of {r.load_bytes} B"
        for r in candidate.resources
    ]
    return f"  {shape:44} {note:14} {'; '.join(cells)}"


def _dry_run(kernels: Sequence[str], capability: int) -> None:
    for kernel in kernels:
        case, dtype = problems()[kernel]
        print(f"{kernel}, timed on {case.name} in {kernel_table.name_of(dtype)}, sm_{capability}:")
        for i, candidate in enumerate(admitted(kernel, capability)):
            note = candidate.refused or ("in use" if i == 0 else "candidate")
            print(_line(candidate, note), flush=True)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse tune",
        description="Measure launch records of the Triton kernels on this device and store the"
        " fastest. tokfuse.load_tuned() uses them.",
        epilog="example: python -m tokfuse tune whiten --dry-run",
    )
    out.add_argument("kernels", nargs="*", help="names of launch records; default: all")
    out.add_argument("--output", type=Path, metavar="FILE", help="path of the table; default: in the user's cache")
    out.add_argument("--dry-run", action="store_true", help="list the candidates without timing; needs no GPU")
    out.add_argument("--capability", type=int, help="architecture of a dry run; default: 90")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(argv)
    kernel_table.require_compiler("tune")
    known = problems()
    if unknown := sorted(set(options.kernels) - known.keys()):
        command.error(f"kernels must be among {', '.join(sorted(known))}; got {', '.join(unknown)}")
    kernels = options.kernels or sorted(known)
    if options.dry_run:
        if options.output is not None:
            command.error("--output must be left out with --dry-run, which stores nothing")
        _dry_run(kernels, options.capability or 90)
        return 0
    if options.capability is not None:
        command.error("--capability must be left out without --dry-run: the capability of the device is used")
    if not torch.cuda.is_available():
        command.error("there is no CUDA device; use --dry-run to list the candidates")
    return tune(kernels, *_device(), options.output, cuda_timer)


def tune(kernels: Sequence[str], device: str, capability: int, output: Path | None, timer: Timer) -> int:
    """Measure the kernels, print the times, store the table, and return the exit status 0."""
    choices = []
    with progress.bar(len(kernels), "kernel") as shown:
        for kernel in kernels:
            shown.set_postfix_str(kernel)
            choice = measure(kernel, capability, timer)
            choices.append(choice)
            ours, best = choice.seconds[0], min(choice.seconds)
            kept = "shipped record kept" if choice.best == choice.configs[0] else f"{choice.best}"
            shown.clear()
            times = f"{ours * 1e6:.1f} us, best of {len(choice.seconds)} {best * 1e6:.1f} us"
            print(f"{kernel}: {times}; {kept}", flush=True)
            shown.update()
    path = output or default_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(device, capability, choices))
    print(f"wrote {path}; use it with tokfuse.load_tuned()", file=sys.stderr)
    return 0
