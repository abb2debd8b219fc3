"""`python -m tokfuse profile CASE`: where the time of one benchmark case goes.

    python -m tokfuse profile policy_step --tool torch
    python -m tokfuse profile policy_step --tool nsys --device cuda --shapes 4096x151936
    python -m tokfuse profile policy_step --tool ncu --device cuda --kernel 'policy_step.*'

`torch` records with torch.profiler, on a CPU too, prints where the time went and writes a trace for
chrome://tracing or Perfetto. `nsys` and `ncu` print the exact command and run it where the tool is
installed. Their measured region is this same command with `--tool none`: warm-up calls, then the
calls between cudaProfilerStart and cudaProfilerStop, with the caches evicted before each. Ranges in
the timeline: `tokfuse::profile`, and in it `tokfuse::<op>.fwd` and `.bwd`.
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
# What to type next, to read a report without its window.
READ = {
    "nsys": "nsys stats --report cuda_gpu_kern_sum,nvtx_sum {out}.nsys-rep",
    "ncu": "ncu --import {out}.ncu-rep --page details",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Profile the case of the command line; returns 1 when the tool or the provider is missing."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = _parser()
    options = parser.parse_args(argv)
    if options.device == "cuda" and not torch.cuda.is_available() and options.tool not in READ:
        parser.error("--device cuda needs a CUDA device and a CUDA build of torch; there is none")
    try:
        config, names = _case(options)
    except ValueError as error:
        parser.error(str(error))
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
    """The command line of nsys or ncu around `--tool none`, environment first.

    Without a CUDA device nsys records the whole process and its NVTX ranges: there is no CUDA
    profiler whose start it could wait for.
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
    """Print the command, and run it where the tool is; else say how to get it."""
    line = command(options, argv)
    print(shlex.join(line))
    print(f"# afterwards: {READ[options.tool].format(out=options.out)}")
    if options.print:
        return 0
    if shutil.which(options.tool) is None:
        print(
            f"profile: {options.tool} is not on the path. {INSTALL[options.tool]}. "
            "The command above is what runs then; `--tool torch` works without it.",
            file=sys.stderr,
        )
        return 1
    return subprocess.run(line).returncode


def _trace(work: Callable[[], None], options: argparse.Namespace, config: Config) -> int:
    """Record with torch.profiler, print the sums, write the trace."""
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
    """The calls between start and stop of the CUDA profiler, where there is CUDA."""
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
    """`calls` calls with cold caches in one range, after the untimed first ones."""
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
    """The first case that the options leave, and the peer that is wanted instead of ours.

    Raises:
        ValueError: no such case.
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
    """The arguments without some options and their values."""
    kept, skip = [], False
    for word in argv:
        if skip:
            skip = False
        elif word in options:
            skip = True
        elif not word.startswith(tuple(f"{name}=" for name in options if name.startswith("--"))):
            kept.append(word)
    return kept


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tokfuse profile", description="Where the time of one benchmark case goes."
    )
    parser.add_argument("case", metavar="CASE", help="an op of `python -m tokfuse bench --list`")
    parser.add_argument("--tool", choices=TOOLS, default="torch")
    parser.add_argument("--provider", default="tokfuse", help="tokfuse, tokfuse_, or a peer")
    parser.add_argument("--shapes", help="as in bench; the first one is profiled")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16")
    parser.add_argument("--mode", help="a mode of the op's cases, e.g. forward+backward")
    parser.add_argument("--variant", help="a variant of the op's cases")
    parser.add_argument("--quick", action="store_true", help="a small shape")
    parser.add_argument("--backend", choices=dispatch.ORDER, help="force one backend of ours")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--calls", type=int, default=5, help="calls in the measured region")
    parser.add_argument("--kernel", help="for ncu, a regular expression of kernel names")
    parser.add_argument("--kernels", type=int, default=3, help="for ncu, how many launches")
    parser.add_argument("--range", help="for ncu, another range than that of the op: OP.fwd")
    parser.add_argument("--rows", type=int, default=15, help="for torch, lines of the table")
    parser.add_argument("--print", action="store_true", help="print the command, run nothing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("-o", "--out", default="tokfuse-profile", help="report without its ending")
    return parser
