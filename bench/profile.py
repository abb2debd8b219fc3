"""Profile one benchmark case: `python -m tokfuse profile CASE`.

    python -m tokfuse profile policy_step --tool torch
    python -m tokfuse profile policy_step --tool nsys --device cuda --shapes 4096x151936
    python -m tokfuse profile policy_step --tool ncu --device cuda --kernel 'policy_step.*'

`torch` records with torch.profiler, also on a CPU. It prints where the time goes and writes a trace for
chrome://tracing or Perfetto. `nsys` and `ncu` print the exact command, and run it if the tool is
installed. They measure this same command with `--tool none`: warm-up calls, then the calls between
cudaProfilerStart and cudaProfilerStop, with the caches evicted before each call. Ranges in the timeline:
`tokfuse::profile`, and inside it `tokfuse::<op>.fwd` and `.bwd`.
"""

import argparse
import contextlib
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from tokfuse.bench import peers, plan
from tokfuse.bench.measure import ColdCache, Provider
from tokfuse.bench.problem import Config, Unsupported
from tokfuse.runtime.core import dispatch
from tokfuse.runtime.core.errors import BackendUnavailable
from tokfuse.runtime.core.ranges import ranged

TOOLS = ("torch", "nsys", "ncu", "none")
WARMUP_CALLS = 3
REGION = "profile"
INSTALL = {
    "nsys": "Nsight Systems is a package of NVIDIA's apt and yum repositories (nsight-systems-cli) "
    "and comes with the CUDA toolkit",
    "ncu": "Nsight Compute comes with the CUDA toolkit (package nsight-compute)",
}
# Commands that print a report without a GUI.
READ = {
    "nsys": "nsys stats --report cuda_gpu_kern_sum,nvtx_sum {out}.nsys-rep",
    "ncu": "ncu --import {out}.ncu-rep --page details",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the case of the command line. Return 1 if the tool or the provider is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    command_line = parser()
    options = command_line.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available() and options.tool not in READ:
        command_line.error("--device cuda needs a CUDA device and a CUDA build of torch; torch finds no CUDA device")
    try:
        config, names = _case(options)
    except ValueError as error:
        command_line.error(str(error))
    if options.tool in READ:
        return _run_tool(options, argv)
    with dispatch.backend(options.backend) if options.backend else contextlib.nullcontext():
        try:
            provider = _provider(config, names, options.provider)
        except (Unsupported, BackendUnavailable) as error:
            print(f"profile: {options.provider} cannot run this case: {error}", file=sys.stderr)
            return 1
        work = _work(provider, config, options.calls)
        if options.tool == "none":
            _region(work, config)
            return 0
        return _trace(work, options, config)


def command(options: argparse.Namespace, argv: Sequence[str]) -> list[str]:
    """Return the command line of nsys or ncu around `--tool none`, with the environment first.

    Without a CUDA device, nsys records the whole process and its NVTX ranges, because no CUDA profiler could
    start the capture.
    """
    kept = [word for word in _without(argv, "--tool", "-o", "--out") if word != "--print"]
    inner = [*kept, "--tool", "none"]
    here = [sys.executable, "-m", "tokfuse", "profile", *inner]
    environment = ["env", "TOKFUSE_NVTX=1"]
    if options.tool == "nsys":
        if options.device == "cuda":
            capture = ["-t", "cuda,nvtx,osrt,cublas", "-c", "cudaProfilerApi", "--capture-range-end=stop"]
        else:
            capture = ["-t", "nvtx,osrt"]
        return [*environment, "nsys", "profile", *capture, "-o", options.out, "-f", "true", *here]
    op = options.range or f"{options.case.removesuffix('_hidden')}.fwd"
    return [
        *environment,
        "ncu",
        "--profile-from-start",
        "off",
        "--nvtx",
        "--nvtx-include",
        f"tokfuse::{op}/",
        *(["-k", f"regex:{options.kernel}"] if options.kernel else []),
        "-c",
        str(options.kernels),
        "--set",
        "full",
        "-f",
        "-o",
        options.out,
        *here,
    ]


def _run_tool(options: argparse.Namespace, argv: Sequence[str]) -> int:
    """Print the command. Run it if the tool is installed, otherwise print how to install the tool."""
    line = command(options, argv)
    print(shlex.join(line))
    print(f"# then: {READ[options.tool].format(out=options.out)}")
    if options.print:
        return 0
    if shutil.which(options.tool) is None:
        print(
            f"profile: {options.tool} is not on the path. {INSTALL[options.tool]}. "
            "Then run the command above. `--tool torch` works without it.",
            file=sys.stderr,
        )
        return 1
    return subprocess.run(line).returncode


def _trace(work: Callable[[], None], options: argparse.Namespace, config: Config) -> int:
    """Record with torch.profiler, print the sums and write the trace."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if config.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    with profile(activities=activities, record_shapes=True, profile_memory=True) as recorded:
        work()
        if config.device == "cuda":
            torch.cuda.synchronize()
    order = "self_cuda_time_total" if config.device == "cuda" else "self_cpu_time_total"
    print(recorded.key_averages().table(sort_by=order, row_limit=options.rows))
    path = Path(f"{options.out}.json")
    recorded.export_chrome_trace(str(path))
    print(f"trace: {path} (for chrome://tracing or Perfetto)")
    return 0


def _region(work: Callable[[], None], config: Config) -> None:
    """Mark the calls between start and stop of the CUDA profiler, if there is CUDA."""
    if config.device != "cuda":
        work()
        return
    torch.cuda.synchronize()
    torch.cuda.profiler.start()
    try:
        work()
        torch.cuda.synchronize()
    finally:
        torch.cuda.profiler.stop()


def _work(provider: Provider, config: Config, calls: int) -> Callable[[], None]:
    """Make `calls` calls with cold caches in one range, after untimed warm-up calls."""
    cache = ColdCache(True, config.device)
    for _ in range(WARMUP_CALLS):
        provider.before()
        provider.run()

    @ranged(REGION)
    def work() -> None:
        for _ in range(calls):
            provider.before()
            cache.flush()
            provider.run()

    return work


def _provider(config: Config, peer_names: list[str], name: str) -> Provider:
    problem = plan.CASES[config.op].build(config, peer_names)
    known = {**problem.ours, **problem.peers}
    if name not in known:
        raise Unsupported(f"the case has {', '.join(known)}")
    provider = known[name]()
    provider.device = config.device
    return provider


def _case(options: argparse.Namespace) -> tuple[Config, list[str]]:
    """Return the first case that matches the options, and the peer if one is chosen instead of tokfuse.

    Raises:
        ValueError: no case matches.
    """
    names = [options.provider] if options.provider in peers.KNOWN else []
    options.names, options.peers = [options.case], ",".join(names) or "none"
    steps = plan.make_plan(options)
    chosen = [step.config for step in steps if options.mode in (None, step.config.mode)]
    if not chosen:
        known = ", ".join(dict.fromkeys(step.config.mode for step in steps))
        raise ValueError(f"profile: --mode must be one of {known}; got {options.mode!r}.")
    return chosen[0], names


def _without(argv: Sequence[str], *options: str) -> list[str]:
    """Return the arguments without some options and their values."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in options if name.startswith("--"))):
            kept.append(word)
    return kept


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse profile",
        description="Profile one benchmark case.",
        epilog="example: python -m tokfuse profile policy_step --quick",
    )
    out.add_argument("case", metavar="CASE", help="an op of `python -m tokfuse bench --list`")
    out.add_argument("--tool", choices=TOOLS, default="torch")
    out.add_argument("--provider", default="tokfuse", help="provider: tokfuse, tokfuse_, or a peer")
    out.add_argument("--shapes", help="shapes, in the format of bench; only the first one is profiled")
    out.add_argument("--dtype", help="float32, bfloat16 or float16")
    out.add_argument("--mode", help="a mode of the op's cases, for example forward+backward")
    out.add_argument("--variant", help="a variant of the op's cases")
    out.add_argument("--quick", action="store_true", help="use a small shape")
    out.add_argument("--backend", choices=dispatch.ORDER, help="force one tokfuse backend")
    out.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    out.add_argument("--calls", type=int, default=5, help="number of calls in the measured region")
    out.add_argument("--kernel", help="ncu: regular expression for kernel names")
    out.add_argument("--kernels", type=int, default=3, help="ncu: number of launches")
    out.add_argument("--range", help="ncu: another range instead of the op's OP.fwd")
    out.add_argument("--rows", type=int, default=15, help="torch: number of lines of the table")
    out.add_argument("--print", action="store_true", help="only print the command")
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("-o", "--out", default="tokfuse-profile", help="name of the report without extension")
    return out
