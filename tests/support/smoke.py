"""Call every op of the registry once per dtype on one backend, and compare with the reference.

    python tests/support/smoke.py --backend cuda
    python tests/support/smoke.py --backend cuda --options
    python tests/support/smoke.py --backend triton --graph --json smoke.jsonl
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/support/smoke.py --backend cuda

Needs a GPU, TOKFUSE_CUDA_HOST (backend cuda) or TRITON_INTERPRET=1 (backend triton). The exit status is 1
if a result differs from the reference, if a call fails, or if an op of the registry has no call in
`op_calls.py`. The script does not use pytest, so that it starts fast under a tool.

`--options` adds every option of every call. `--graph` instead records each call in a CUDA graph, changes its
inputs, replays it and requires bitwise the result of a direct call. With an lm_head it compares values,
because the chunks differ during capture.
"""

import argparse
import importlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import op_calls
import torch
from op_calls import Call, Problem, Sizes

from tokfuse.inspection.doctor import import_ops
from tokfuse.runtime.backends import cuda_backend, triton_backend
from tokfuse.runtime.core import dispatch

Results = dict[str, torch.Tensor]

# Rows that are not aligned, and aligned rows.
SIZES = (op_calls.WIDE, op_calls.ALIGNED)
# On sm_90 and sm_100, policy_step holds 16-bit rows of these vocabularies in the shared memory of a cluster of
# so many blocks.
CLUSTERS = {1: 32_000, 2: 65_536, 4: 151_936, 8: 262_144}
# Blocks of the largest GPU with such a kernel (B200). A cluster holds two rows, so from three rows per cluster on
# it uses its memory again.
PROCESSORS, ROWS_PER_CLUSTER = 148, 3
# Rows with NaN and infinities: the smoke test only runs them. The tests of each op check their results.
NOT_COMPARED = ("difficult",)
# Relative to the largest expected value: far above the bounds of every op, far below a wrong result.
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def long_rows(on_cpu: bool) -> list[Sizes]:
    """Return sizes for which policy_step forms clusters of 1, 2, 4 and 8 blocks, with more rows than clusters.

    On the CPU, two clusters share the rows (TOKFUSE_HOST_PROCESSORS).
    """
    rows = {cluster: 12 if on_cpu else ROWS_PER_CLUSTER * (PROCESSORS // cluster) + 4 for cluster in CLUSTERS}
    return [Sizes(tokens=rows[n] // 4 * 4, vocab=vocab, hidden=8, sequences=4) for n, vocab in CLUSTERS.items()]


def cases(options: bool, on_cpu: bool) -> Iterator[tuple[Call, Sizes, torch.dtype]]:
    """Return every call of an op at both sizes and in each dtype.

    The first dtype has all options; on the CPU at one size, which halves a minute. The step also has long rows.
    """
    for call in op_calls.calls(options="every" if options else "none"):
        if call.needs_triton and cuda_backend.hosted():
            continue
        for sizes in SIZES[:1] if call.row.family != "rows" or (on_cpu and call.option) else SIZES:
            for dtype in call.row.dtypes[:1] if call.option else call.row.dtypes:
                yield call, sizes, dtype
    for sizes in long_rows(on_cpu):
        yield op_calls.named("policy_step"), sizes, torch.bfloat16


def missing() -> list[str]:
    """Return the ops of the registry without a call in the table."""
    import_ops()
    return sorted({str(row["op"]) for row in dispatch.table()} - {call.row.op for call in op_calls.calls()})


def device_of(backend: str) -> str:
    """Return the device for tensors: the CPU if the kernels run on the CPU or in the interpreter."""
    on_cpu = cuda_backend.hosted() if backend == "cuda" else triton_backend.interpreting()
    return "cpu" if on_cpu else "cuda"


def compared(call: Call, sizes: Sizes, dtype: torch.dtype, backend: str) -> float:
    """Return the largest error relative to the reference, divided by the largest value of each output.

    Raises:
        AssertionError: an output is missing, has another shape, or differs too much.
    """
    with dispatch.backend("reference"):
        wanted = call.run(Problem(sizes, dtype=dtype))
    with dispatch.backend(backend):
        got = call.run(Problem(sizes, device_of(backend), dtype))
    if call.option in NOT_COMPARED:
        return 0.0
    assert got.keys() == wanted.keys(), f"returned {sorted(got)}, the reference {sorted(wanted)}"
    worst = 0.0
    for name, value in wanted.items():
        error = distance(got[name], value)
        assert error <= TOLERANCE[dtype], f"{name}: {error:.1e} of the largest value away from the reference"
        worst = max(worst, error)
    return worst


def distance(got: torch.Tensor, wanted: torch.Tensor) -> float:
    """Return the largest absolute difference / the largest finite value. Equal infinities and NaN are equal."""
    assert got.shape == wanted.shape, f"shape {tuple(got.shape)}, the reference {tuple(wanted.shape)}"
    got, wanted = got.detach().cpu().double(), wanted.detach().cpu().double()
    finite = wanted.isfinite()
    if not torch.equal(got[~finite].nan_to_num(nan=0.5), wanted[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    if not bool(finite.any()):
        return 0.0
    difference = (got[finite] - wanted[finite]).abs().max().nan_to_num(nan=float("inf"))
    return float(difference / wanted[finite].abs().max().clamp_min(1.0))


def replayed(call: Call, sizes: Sizes, dtype: torch.dtype, backend: str) -> float:
    """Record the call in a CUDA graph, change its float inputs, replay it, and compare with a direct call.

    Raises:
        AssertionError: a replay differs from a direct call with the same inputs.
    """
    device = device_of(backend)
    given = call.arguments(Problem(sizes, device, dtype))
    leaves = call.differentiable(given)

    def run() -> Results:
        for name in leaves:
            given[name].grad = None
        out = call.function()(**given)
        if leaves:
            op_calls.scalar(out).backward()
        results = op_calls.tensors(out) | {f"grad {name}": given[name].grad for name in leaves}
        return {name: value.detach() for name, value in results.items() if value is not None}

    with dispatch.backend(backend):
        replay, recorded = recorder(device)(run)
        for value in given.values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.detach().mul_(0.75)
        replay()
        got = {name: value.clone() for name, value in recorded.items()}
        wanted = run()
    worst = max(distance(got[name], value) for name, value in wanted.items())
    bound = TOLERANCE[dtype] if call.row.family == "head" else 0.0
    assert worst <= bound, f"a replayed graph is {worst:.1e} of the largest value away from a direct call"
    return worst


def recorder(device: str) -> Callable[[Callable[[], Results]], tuple[Callable[[], None], Results]]:
    """Return a function that records a call and returns (replay, the tensors that a replay writes)."""
    return _record_graph if device == "cuda" else _record_nothing


def _record_graph(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile kernels and create workspaces outside of the graph
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


def _record_nothing(run: Callable[[], Results]) -> tuple[Callable[[], None], Results]:
    """The CPU has no graphs, so a replay is another call."""
    out = run()

    def replay() -> None:
        for name, value in run().items():
            out[name].copy_(value)

    return replay, out


def run_all(backend: str, graph: bool, options: bool, sink: TextIO | None) -> int:
    """Run every case. Return the number of failures."""
    failed, count, start = 0, 0, time.perf_counter()
    for call, sizes, dtype in graph_cases() if graph else cases(options, device_of(backend) == "cpu"):
        line: dict[str, Any] = {"call": call.name, "op": call.row.op, "backend": backend}
        line |= {"dtype": str(dtype).removeprefix("torch."), "vocab": sizes.vocab, "graph": graph, "status": "pass"}
        try:
            line["worst"] = (replayed if graph else compared)(call, sizes, dtype, backend)
        except Exception as error:  # the next call may still work
            line |= {"status": "fail", "note": f"{type(error).__name__}: {error}"[:500]}
            print(f"smoke: {call.name} {line['dtype']} x {sizes.vocab}: {line['note']}", flush=True)
        count, failed = count + 1, failed + (line["status"] == "fail")
        if sink is not None:
            print(json.dumps(line), file=sink, flush=True)
    seconds = time.perf_counter() - start
    print(f"smoke: {backend}{', graphs' if graph else ''}: {count - failed} of {count} calls pass, {seconds:.1f} s")
    return failed


def graph_cases() -> Iterator[tuple[Call, Sizes, torch.dtype]]:
    """Return one call per op. Excluded: ops that overwrite an input, have no backend, or read values on the host."""
    for call in op_calls.calls(options="none"):
        if call.row.registered and not call.row.in_place and not call.row.reads_host:
            yield call, op_calls.WIDE, call.row.dtypes[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the smoke test of the command line. Return 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), required=True)
    parser.add_argument("--options", action="store_true", help="with every option of every call")
    parser.add_argument("--graph", action="store_true", help="replay CUDA graphs instead")
    parser.add_argument("--json", metavar="FILE", help="append a JSON line per call")
    options = parser.parse_args(argv)
    absent = missing()
    if absent:
        print(f"smoke: op_calls.py has no call of {', '.join(absent)}")
    sink = open(options.json, "a", encoding="utf-8") if options.json else None  # noqa: SIM115
    failed = run_all(options.backend, options.graph, options.options, sink)
    if device_of(options.backend) == "cuda":
        torch.cuda.synchronize()
    return int(bool(failed or absent))


if __name__ == "__main__":
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        for helper in ("fast_interpreter", "interpreted_scan"):
            importlib.import_module(helper).install()
    sys.exit(main())
