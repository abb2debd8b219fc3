"""`python -m tokfuse tune`: launch records measured on a device, for those who ask for them.

Off by default and offline: no call of an op measures anything. For every kernel the candidates are
the shipped record and the valid ones near it (`launch.candidates`; validity is that of every
record, and what spills or does not fit is left out). They are timed on the kernel's compile case,
the call whose compilation the committed table describes. The fastest is kept if it beats the
shipped one by `MARGIN`. `load_tuned` reads the table that is written; nothing else does.
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

from tokfuse.inspection import kernel_table
from tokfuse.runtime.core.errors import refuse

OP = "load_tuned"
FORMAT = 1
# A record that is not measurably faster is noise; the shipped one is known to be tested.
MARGIN = 0.02
REPEATS = 20
# More than the L2 cache of any device: written between two timed calls.
FLUSH_BYTES = 256 << 20
# Shared memory that one program may have, by capability; ptxas does not check it, a launch does.
SHARED_BYTES = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}

Timer = Callable[[Callable[[], object]], float]


@dataclass(frozen=True)
class Candidate:
    """A launch record that could be used for a kernel.

    Args:
        config: the LaunchConfig.
        resources: of the kernels that it is compiled to.
        refused: why it is not timed; "" where it is.
    """

    config: Any
    resources: tuple[kernel_table.Resources, ...]
    refused: str


@dataclass(frozen=True)
class Choice:
    """What was measured for one kernel: seconds of each candidate, the shipped record first."""

    kernel: str
    configs: tuple[Any, ...]
    seconds: tuple[float, ...]

    @property
    def best(self) -> Any:
        """The fastest, or the shipped record where no other is faster by `MARGIN`."""
        fastest = min(range(len(self.seconds)), key=self.seconds.__getitem__)
        worth_it = self.seconds[fastest] < self.seconds[0] * (1.0 - MARGIN)
        return self.configs[fastest if worth_it else 0]


@functools.cache
def problems() -> dict[str, tuple[Any, torch.dtype]]:
    """kernel -> (compile case, dtype) that its records are timed on: the first that uses it.

    A case named like the kernel comes before others; bfloat16 before other dtypes.
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
    """The candidates of one kernel, compiled; the record in use first.

    A record under which the launches of the case stay the same is not a candidate.
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
            return f"{row.kernel} needs {row.shared_bytes} bytes of shared memory of {limit}"
    return ""


def measure(kernel: str, capability: int, timer: Timer, device: str = "cuda") -> Choice:
    """Times the admitted candidates of one kernel with `timer`, on tensors of one shape."""
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
    """Seconds of the kernels of one call, median of `REPEATS`, each launched with a cold L2 cache.

    A case makes its tensors anew, so events stand around its launches and not around the call.
    """
    from tokfuse.triton_kernels import compile_cases

    scratch = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: list[float] = []
    for _ in range(REPEATS + 3):  # the first ones compile and warm up
        with compile_cases.timed_launches(scratch.zero_) as events:
            call()
        torch.cuda.synchronize()
        times.append(sum(begin.elapsed_time(end) for begin, end in events) * 1e-3)
    return statistics.median(times[3:])


# ------------------------------------------------------------------------------------- the table


def default_path(device: str) -> Path:
    """Where the table of a device is kept: the user's cache, one file per device name."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    name = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    return Path(cache) / "tokfuse" / "tuned" / f"{name}.json"


def as_json(device: str, capability: int, choices: Sequence[Choice]) -> str:
    """The table: the best record of each kernel, and the seconds that speak for it."""
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
    """Launch this device's Triton kernels with the records that `python -m tokfuse tune` stored.

    For this process, from the next launch on. Every record passes the check that shipped ones pass.
    Which thread adds which elements follows from a record, so the last bits of results may change
    once, here; they stay independent of the batch and the same in every run.

    Args:
        path: a table. None: that of the current CUDA device in the user's cache.

    Returns:
        kernel -> its LaunchConfig.

    Raises:
        ValueError: no such table, one of another format or of another compute capability than the
            current device, a kernel that does not exist, a record that no kernel can be compiled
            with. Nothing is changed then.
    """
    from tokfuse.triton_kernels import compile_cases, launch

    where = Path(path) if path is not None else default_path(_device()[0])
    hint = "Run python -m tokfuse tune."
    try:
        table = json.loads(where.read_text())
    except OSError:
        raise refuse(OP, "path", "a readable table", str(where), hint) from None
    except ValueError:
        raise refuse(OP, "path", "a table in JSON", str(where), hint) from None
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
    compile_cases.cases()  # imports every kernel file, which declares its records
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
    """(name, capability) of the current CUDA device."""
    if not torch.cuda.is_available():
        raise refuse(OP, "path", "given where there is no CUDA device", None, "Name a table.")
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


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m tokfuse tune",
        description="Measure launch records of the Triton kernels on this device and store the"
        " fastest; tokfuse.load_tuned() uses them.",
    )
    parser.add_argument("kernels", nargs="*", help="names of launch records; all where left out")
    parser.add_argument("--output", type=Path, help="the table; default: in the user's cache")
    parser.add_argument("--dry-run", action="store_true", help="list what would be timed; no GPU")
    parser.add_argument("--capability", type=int, help="architecture of a dry run; default: 90")
    options = parser.parse_args(argv)
    kernel_table.require_compiler("tune")
    known = problems()
    if unknown := sorted(set(options.kernels) - known.keys()):
        parser.error(f"kernels must be among {', '.join(sorted(known))}; got {', '.join(unknown)}")
    kernels = options.kernels or sorted(known)
    if options.dry_run:
        if options.output is not None:
            parser.error("--output must be left out with --dry-run, which stores nothing")
        _dry_run(kernels, options.capability or 90)
        return 0
    if options.capability is not None:
        parser.error("--capability must be left out without --dry-run: it is the device's")
    if not torch.cuda.is_available():
        parser.error("there is no CUDA device; --dry-run lists what would be timed on one")
    return tune(kernels, *_device(), options.output, cuda_timer)


def tune(kernels: Sequence[str], device: str, capability: int, output: Path | None, timer: Timer) -> int:
    """Measures, reports and stores; 0."""
    choices = []
    for kernel in kernels:
        choice = measure(kernel, capability, timer)
        choices.append(choice)
        ours, best = choice.seconds[0], min(choice.seconds)
        kept = "shipped record kept" if choice.best == choice.configs[0] else f"{choice.best}"
        print(f"{kernel}: {ours * 1e6:.1f} us, best of {len(choice.seconds)} {best * 1e6:.1f} us; {kept}", flush=True)
    path = output or default_path(device)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(as_json(device, capability, choices))
    print(f"wrote {path}; use it with tokfuse.load_tuned()", file=sys.stderr)
    return 0
