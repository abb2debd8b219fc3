"""Build, test and benchmark on a machine with a GPU and without network, in 8 minutes.

    tools/first_gpu_run.sh
    tools/first_gpu_run.sh --only build,bench --minutes 5 --out "$OUT"
    tools/first_gpu_run.sh --dry-run

The script builds the native module with the interpreter that runs it, into a tree of links to the
sources (`typing_tree.py`). It installs nothing. Then it runs each step as a process with a time limit,
in this order: doctor, smoke test of every op on both backends, the tests marked `gpu`,
compute-sanitizer, benchmarks, CUDA graphs, Nsight Compute. A step that fails or exceeds its limit is
recorded, and the next step runs. Time that a step does not use is added to the later steps.

The results folder contains `steps.jsonl` (one line per step), `smoke.jsonl` (one per call),
`bench.jsonl` (one per measurement), one log per process, and `summary.md`. The exit status is 0 if
every step passed. Nsight Compute is optional: it may be missing or not permitted.

`--dry-run` runs the same steps on the CPU at tiny sizes, with CUDA kernels compiled for the CPU and
Triton's interpreter. It needs no GPU, and its times are not meaningful.
"""

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch_build
import typing_tree

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "first_gpu_run"
BACKENDS = ("cuda", "triton")
# Folders of the tests marked `gpu`. The tests of the kernels come first, in case the run is interrupted.
TESTS = ("backends", "ops", "distributed", "algorithms")
# A dry run uses only these two files.
FEW_TESTS = ("tests/ops/test_whiten.py", "tests/ops/test_ope.py")
# op -> (variant, shapes on a GPU, shape of a dry run). A model name means the sizes of that model.
SHAPES = "8192xqwen2.5,4096xllama3"  # 8192 x 151936 and 4096 x 128256
BENCHMARKS = {
    "token_stats": ("logp,entropy", SHAPES, "4x40"),
    "policy_step": ("entropy=0.01", SHAPES, "4x40"),
    "policy_step_hidden": ("rows=1", SHAPES, "16x8x40"),
    "paired_divergence": ("jsd", SHAPES, "4x40"),
}
# (op, backend) of the kernels that Nsight Compute profiles.
PROFILED = (("policy_step", "cuda"), ("policy_step", "triton"), ("token_stats", "cuda"))
NCU_METRICS = ("Duration", "DRAM Throughput", "Registers Per Thread", "Achieved Occupancy")
BUILD_MINUTES = {False: 4.0, True: 30.0}  # by dry run
MINUTES = {False: 8.0, True: 40.0}
GRACE_S = 5  # seconds from the interrupt (pytest then prints its results) to the kill
LEAST_S = 1  # a step with less time left is not started
SHOWN_GPU = "H200"  # a dry run prints the predictions for this GPU
OK = ("pass", "unavailable")


class Machine(NamedTuple):
    """The properties of the machine that the plan depends on; `gpu` is "" in a dry run."""

    gpu: str
    arch: str
    cores: int
    sanitizer: bool
    ncu: bool


class Step(NamedTuple):
    """One step of the plan.

    Args:
        name: unique name.
        group: name for `--only`.
        share: share of the time, relative to the other steps.
        scripts: bash scripts that run at the same time.
        needs: a required tool that is missing here, or "".
        optional: record a failure as "unavailable".
        by_default: False: the step runs only if `--only` names it.
    """

    name: str
    group: str
    share: int
    scripts: tuple[str, ...]
    needs: str = ""
    optional: bool = False
    by_default: bool = True


# ------------------------------------------------------------------------------------------- the plan


def plan(machine: Machine, out: Path) -> list[Step]:
    """Return every step after the build, in order. The shares are seconds of the default 8 minutes."""
    python, dry = shlex.quote(sys.executable), not machine.gpu
    hosted = f'export TOKFUSE_CUDA_HOST="$({python} tests/support/cuda_module.py)" OMP_NUM_THREADS=1 && '
    interpreted = "export TRITON_INTERPRET=1 OMP_NUM_THREADS=1 && "
    before = {"cuda": hosted if dry else "", "triton": interpreted if dry else ""}
    both = hosted + interpreted if dry else ""
    smoke = {b: f"{python} tests/support/smoke.py --backend {b}" for b in BACKENDS}
    lines = f"--json {shlex.quote(str(out / 'smoke.jsonl'))}"
    steps = [Step("doctor", "doctor", 15, (f"{both}{python} -m tokfuse doctor",))]
    # Only the CUDA kernels run every option: they are compiled already, while Triton compiles each one now.
    for backend, share, options in (("cuda", 20, "--options "), ("triton", 45, "")):
        steps.append(Step(f"smoke {backend}", "smoke", share, (f"{before[backend]}{smoke[backend]} {options}{lines}",)))
    steps.append(Step("tests", "tests", 100, tuple(_test_scripts(machine, python, hosted if dry else ""))))
    for tool in ("memcheck", "racecheck", "synccheck"):
        # The caching allocator would hide out-of-bounds accesses.
        prefix = f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --error-exitcode 1 "
        script = before["cuda"] + ("" if dry else prefix) + smoke["cuda"]
        needs = "" if dry or machine.sanitizer else "compute-sanitizer"
        steps.append(Step(tool, tool, 35, (script,), needs, by_default=tool != "synccheck"))
    for op in BENCHMARKS:
        # These two ops are measured in two modes (forward and backward), the others in one.
        share = 55 if op in ("token_stats", "paired_divergence") else 35
        steps.append(Step(f"bench {op}", "bench", share, (both + _bench(op, python, dry, out),)))
    graph = [f"{{ {before[b]}{smoke[b]} --graph {lines}; }}" for b in BACKENDS]
    # Run both. The step fails if either fails.
    steps.append(Step("graph", "graph", 20, (f"{graph[0]}; first=$?; ({graph[1]}) && exit $first",)))
    needs = "" if dry or machine.ncu else "ncu"
    ncu = " && ".join(_profile(op, backend, python, dry, out) for op, backend in PROFILED)
    steps.append(Step("ncu", "ncu", 30, (both + ncu,), needs, optional=True))
    return steps


def _test_scripts(machine: Machine, python: str, hosted: str) -> Iterator[str]:
    """Yield scripts that each run pytest on some of the files.

    pytest's exit status 5 means that no test has the mark. -P keeps the repository off the path.
    """
    files = [str(f.relative_to(ROOT)) for name in TESTS for f in sorted((ROOT / "tests" / name).glob("test_*.py"))]
    mark, count = "gpu", max(1, min(8, machine.cores // 2))
    if not machine.gpu:
        files, mark, count = list(FEW_TESTS), "cuda_host", 1
    for first in range(count):
        chosen = " ".join(files[first::count])
        pytest = f"{python} -P -m pytest -q --tb=short -p no:cacheprovider -m {shlex.quote(mark)} {chosen}"
        yield f"{hosted}{{ {pytest} || [ $? -eq 5 ]; }}"


def _bench(op: str, python: str, dry: bool, out: Path) -> str:
    variant, shapes, tiny = BENCHMARKS[op]
    place = f"--device cpu --shapes {tiny} --rounds 2" if dry else f"--device cuda --shapes {shapes} --budget 2"
    return (
        f"{python} -m tokfuse bench {op} --variant {variant} --dtype bfloat16 --backend {','.join(BACKENDS)} "
        f"--peers torch_compile {place} --no-energy --quiet --json {shlex.quote(str(out / 'bench.jsonl'))}"
    )


def _profile(op: str, backend: str, python: str, dry: bool, out: Path) -> str:
    report = shlex.quote(str(out / f"ncu-{op}-{backend}"))
    case = f"{python} -m tokfuse profile {op} --backend {backend} --dtype bfloat16 --calls 1"
    tool = f"{case} --tool ncu --device cuda --shapes 1024xqwen2.5 --kernels 1 --kernel '{op}.*' -o {report}"
    if dry:
        return f"{tool} --print && {case} --tool none --shapes 4x40"
    return f"{tool} && ncu --import {report}.ncu-rep --page details --csv > {report}.csv"


def build_script(machine: Machine, tree: Path) -> str:
    """Return the script that builds for this interpreter and the architecture of this GPU, into the tree."""
    python = shlex.quote(sys.executable)
    folder = shlex.quote(str(WORK / f"native-{sys.implementation.cache_tag}"))
    settings = {
        "CMAKE_BUILD_TYPE": "Release",
        "Python_EXECUTABLE": python,
        "pybind11_DIR": f'"$({python} -m pybind11 --cmakedir)"',
        "TOKFUSE_OUTPUT_DIR": shlex.quote(str(tree / "tokfuse")),
        "TOKFUSE_CUDA": "ON" if machine.gpu else "AUTO",
        "TOKFUSE_CUDA_ARCHITECTURES": machine.arch,
    }
    configure = " ".join(f"-D{name}={value}" for name, value in settings.items())
    script = f"cmake -S . -B {folder} {configure} && cmake --build {folder} -j {machine.cores}"
    return script if machine.gpu else f"{script} && {python} tests/support/cuda_module.py"


# ------------------------------------------------------------------------------------------ running


def detect(dry_run: bool) -> Machine:
    """Return the properties of this machine.

    Raises:
        SystemExit: the machine has a GPU, but torch cannot use it.
    """
    gpu, arch = "", "90"
    if not dry_run:
        code = "import torch; print('%d.%d' % torch.cuda.get_device_capability(), torch.cuda.get_device_name())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        if done.returncode == 0:
            capability, _, gpu = done.stdout.strip().partition(" ")
            arch = arch_of(capability)
        elif torch_build.machine_has_gpu():
            reason = done.stderr.strip().splitlines()[-1:]
            raise SystemExit(
                f"first_gpu_run: the torch of {sys.executable} must be able to use the GPU; got {' '.join(reason)!r}. "
                "Set PYTHON to an interpreter whose torch can."
            )
    cores = os.cpu_count() or 1
    sanitizer, ncu = (shutil.which(name) is not None for name in ("compute-sanitizer", "ncu"))
    return Machine(gpu, arch, cores, sanitizer, ncu)


def arch_of(capability: str) -> str:
    """Return the architecture to compile for. Code for X.0 runs on every X.y; other GPUs compile the PTX of sm_80."""
    major = capability.partition(".")[0]
    return f"{major}0" if major in ("9", "10", "12") else "80"


def run_step(step: Step, limit_s: float, out: Path, environment: dict[str, str]) -> dict[str, Any]:
    """Run the scripts of a step at the same time. Return the line for steps.jsonl."""
    line: dict[str, Any] = {"step": step.name, "limit_s": round(limit_s), "seconds": 0.0, "detail": ""}
    if step.needs:
        status = "unavailable" if step.optional else "missing"
        return line | {"status": status, "detail": f"{step.needs} is not on the path"}
    start = time.monotonic()
    name = step.name.replace(" ", "-")
    logs = [out / (f"{name}.log" if len(step.scripts) == 1 else f"{name}-{i}.log") for i in range(len(step.scripts))]
    running: list[subprocess.Popen[bytes]] = []
    try:
        for script, log in zip(step.scripts, logs, strict=True):
            with log.open("w") as sink:
                print(f"$ {script}", file=sink, flush=True)
                command = ["bash", "-c", script]
                streams = {"stdin": subprocess.DEVNULL, "stdout": sink, "stderr": subprocess.STDOUT}
                running.append(subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **streams))
        in_time = all([_ended(process, start + limit_s) for process in running])
    finally:  # also if this program is interrupted
        _stop([process for process in running if process.poll() is None])
    status = "timeout" if not in_time else "fail" if any(process.returncode for process in running) else "pass"
    if step.optional and status != "pass":
        status = "unavailable"
    detail = totals(logs) if step.group == "tests" else last_line(logs[0])
    return line | {"status": status, "seconds": round(time.monotonic() - start, 1), "detail": detail}


def _ended(process: "subprocess.Popen[bytes]", deadline: float) -> bool:
    """Wait for a process. Return whether it ended before the deadline."""
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _stop(running: "Sequence[subprocess.Popen[bytes]]") -> None:
    """Interrupt the process groups, then kill those that do not end."""
    for number, patience in ((signal.SIGINT, GRACE_S), (signal.SIGKILL, 60)):
        for process in running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        for process in running:
            _ended(process, deadline)


def last_line(log: Path) -> str:
    """Return the last non-empty line of a log after its first line, which is the command."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()[1:] if line.strip()]
    return lines[-1][:160] if lines else ""


def totals(logs: Iterable[Path]) -> str:
    """Return the sums of the counts in pytest's last lines: "12 passed, 1 failed"."""
    counts = {"passed": 0, "failed": 0, "error": 0, "skipped": 0}
    for log in logs:
        ends = [x for x in log.read_text(errors="replace").splitlines() if re.search(r" in [\d.]+s", x)]
        for count, what in re.findall(r"(\d+) (passed|failed|error|skipped)", ends[-1] if ends else ""):
            counts[what] += int(count)
    return ", ".join(f"{count} {what}" for what, count in counts.items() if count or what in ("passed", "failed"))


def run_all(steps: Sequence[Step], seconds: float, out: Path, environment: dict[str, str]) -> list[dict[str, Any]]:
    """Run the steps. Each step must end when the time for the shares up to it is used."""
    start, total, used, lines = time.monotonic(), sum(step.share for step in steps), 0, []
    for step in steps:
        used += step.share
        limit = start + seconds * used / total - time.monotonic() - GRACE_S
        if limit < LEAST_S:  # an earlier step could not be stopped in time
            line = {"step": step.name, "limit_s": 0, "seconds": 0.0, "detail": "", "status": "no time"}
        else:
            line = run_step(step, limit, out, environment)
        lines.append(record(line, out))
    return lines


def record(line: dict[str, Any], out: Path) -> dict[str, Any]:
    """Append a line to steps.jsonl, print it and return it."""
    with (out / "steps.jsonl").open("a") as sink:
        print(json.dumps(line), file=sink)
    print(f"{line['step']:<26}{line['status']:<12}{line['seconds']:>7.1f} s  {line['detail']}", flush=True)
    return line


# ------------------------------------------------------------------------------------------ summary


def summary(lines: Sequence[dict[str, Any]], out: Path, gpu: str) -> str:
    """Return Markdown: a table of steps, a table of measurements, and the metrics of Nsight Compute."""
    text = [f"# First GPU run: {gpu or 'dry run on the CPU, times are not meaningful'}", ""]
    text += ["| step | status | seconds | detail |", "| --- | --- | --- | --- |"]
    text += [f"| {x['step']} | {x['status']} | {x['seconds']} | {x['detail'].replace('|', '/')} |" for x in lines]
    if (out / "bench.jsonl").exists():
        text += ["", *measurements(out / "bench.jsonl", gpu)]
    for file in sorted(out.glob("ncu-*.csv")):
        text += ["", f"{file.stem}: {ncu_metrics(file.read_text(errors='replace'))}"]
    return "\n".join(text) + "\n"


def measurements(path: Path, gpu: str) -> list[str]:
    """Return a table of tokfuse's measurements: predicted, measured, share of a copy, and torch.compile."""
    from tokfuse.bench import predict
    from tokfuse.bench.row import Row

    rows = [Row.from_json(line) for line in path.read_text().splitlines()]
    known = predict.gpu_of(gpu) if gpu else SHOWN_GPU
    compiled = {_case(r): r.median_ms for r in rows if r.provider == "torch_compile"}
    head = ["case", "shape", "provider", f"predicted, {known}", "measured", "of copy", "torch.compile", "status"]
    table = ["| " + " | ".join(head) + " |", "| --- |" + " --- |" * (len(head) - 1)]
    for row in rows:
        if row.role != "ours":
            continue
        predicted = predict.milliseconds(row, known) if known else None
        peer = compiled.get(_case(row))
        cells = [
            f"{row.op} {row.mode} {row.variant}",
            row.shape,
            row.provider,
            _ms(predicted),
            _ms(row.median_ms),
            _share(row),
            f"{peer / row.median_ms:.2f}x tokfuse" if peer and row.median_ms else "-",
            f"{row.status} {row.note}".strip().replace("|", "/")[:80],
        ]
        table.append("| " + " | ".join(cells) + " |")
    return table


def _case(row: Any) -> tuple[str, ...]:
    return (row.op, row.mode, row.variant, row.shape, row.dtype)


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f} ms"


def _share(row: Any) -> str:
    """Return the bandwidth as a share of a copy's bandwidth; for a head, the share of the bare GEMMs."""
    if row.median_ms is None:
        return "-"
    if row.copy_ms is None:
        return "-" if row.limit_share is None else f"{row.limit_share:.0%} of {row.limit}"
    size = {"float32": 4, "bfloat16": 2, "float16": 2}[row.dtype]
    copied = 2 * row.tokens * row.vocab * size
    return f"{row.bytes_moved / row.median_ms / (copied / row.copy_ms):.0%}"


def ncu_metrics(text: str) -> str:
    """Return the metrics of `NCU_METRICS` from the output of `ncu --page details --csv`."""
    import csv

    start = text.find('"ID"')
    found = {
        r["Metric Name"]: f"{r['Metric Value']} {r['Metric Unit']}" for r in csv.DictReader(text[start:].splitlines())
    }
    return ", ".join(f"{name} {found[name]}" for name in NCU_METRICS if name in found) or "no metrics"


# -------------------------------------------------------------------------------------- command line


def chosen(steps: Sequence[Step], only: str | None) -> list[Step]:
    """Return the steps of the groups in `only`, or the default steps if it is None.

    Raises:
        ValueError: unknown group.
    """
    if only is None:
        return [step for step in steps if step.by_default]
    names = only.split(",")
    known = dict.fromkeys(["build", *(step.group for step in steps)])
    for name in names:
        if name not in known:
            raise ValueError(f"--only must name some of {', '.join(known)}; got {name!r}")
    return [step for step in steps if step.group in names]


def hear_interrupts() -> None:
    """Undo an ignored interrupt, which a job in a shell's background inherits and hands on to every step."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def main(argv: Sequence[str] | None = None) -> int:
    """Build, run the steps and print the summary. Return 0 if all steps passed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage="first_gpu_run.sh [OPTION...]"
    )
    parser.add_argument("--dry-run", action="store_true", help="run on the CPU at tiny sizes; needs no GPU")
    parser.add_argument(
        "--only",
        metavar="GROUPS",
        help="comma-separated: build, doctor, smoke, tests, memcheck, racecheck, synccheck, bench, graph, ncu",
    )
    parser.add_argument("--minutes", type=float, help="time for the steps after the build (default 8; dry run 40)")
    parser.add_argument("--out", type=Path, default=WORK / "results", help="results folder; it is emptied first")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # also ends the running step
    hear_interrupts()
    machine = detect(options.dry_run)
    out = options.out.absolute()
    try:
        steps = chosen(plan(machine, out), options.only)
    except ValueError as error:
        parser.error(str(error))
    dry = not machine.gpu
    out.mkdir(parents=True, exist_ok=True)
    for file in [*out.glob("*.jsonl"), *out.glob("*.log"), *out.glob("ncu-*")]:
        file.unlink()
    print(f"first_gpu_run: {machine.gpu or 'no GPU: dry run on the CPU'}; results in {out}", flush=True)

    tree = WORK / "tree"
    typing_tree.write_tree(tree)
    environment = run_environment(tree)
    lines = []
    if options.only is None or "build" in options.only.split(","):
        build = Step("build", "build", 0, (build_script(machine, tree),))
        lines.append(record(run_step(build, 60 * BUILD_MINUTES[dry], out, environment), out))
    lines += run_all(steps, 60 * (options.minutes or MINUTES[dry]), out, environment)
    sys.path.insert(0, str(tree))
    text = summary(lines, out, machine.gpu)
    (out / "summary.md").write_text(text)
    print(f"\n{text}", end="")
    return int(any(line["status"] not in OK for line in lines))


def run_environment(tree: Path) -> dict[str, str]:
    """Return the environment of every step. The tree is on PYTHONPATH, and caches are in the build folder."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("TOKFUSE_", "TRITON_INTERPRET"))}
    caches = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "XDG_CACHE_HOME": "xdg"}
    defaults = {"OMP_WAIT_POLICY": "passive"} | {k: str(WORK / "cache" / v) for k, v in caches.items()}
    return defaults | kept | {"PYTHONPATH": str(tree), "PYTHONUNBUFFERED": "1"}


if __name__ == "__main__":
    sys.exit(main())
