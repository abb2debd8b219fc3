"""Compare two checkouts bitwise, by one SHA-256 per output of a fixed set of calls.

    cd OLD && .venv/bin/python NEW/tools/fingerprint.py --backend cpu -o old.json
    cd NEW && .venv/bin/python tools/fingerprint.py --backend cpu -o new.json
    python tools/fingerprint.py --compare old.json new.json

The checkout is the current folder. The calls come from tests/support/op_calls.py of the checkout that
contains this script. The table uses only public names, so one copy works for older checkouts too.
Every op runs with every option and dtype, in the forward only and with its backward, in place, from
hidden states, and over two ranks. No backend needs a GPU: `triton` runs in Triton's interpreter, and
`cuda` uses the checkout's build of the CUDA kernels for the CPU. Thread counts are fixed, because sums
depend on them. Outputs can be equal only on the same machine with the same version of torch.
"""

import argparse
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

SUPPORT = Path(__file__).resolve().parents[1] / "tests" / "support"
BACKENDS = ("reference", "cpu", "cuda", "triton")
THREADS = {"reference": 2, "cpu": 2, "cuda": 1, "triton": 1}
WORLD = 2
Digests = dict[str, dict[str, str]]


def prepare(backend: str) -> None:
    """Set the environment of the backend. Call this before torch and triton are imported."""
    sys.path.insert(0, str(SUPPORT))
    os.environ["OMP_NUM_THREADS"] = str(THREADS[backend])
    os.environ.pop("TOKFUSE_BACKEND", None)
    if backend == "triton":
        os.environ["TRITON_INTERPRET"] = "1"
    if backend == "cuda" and "TOKFUSE_CUDA_HOST" not in os.environ:
        built = subprocess.run(
            [sys.executable, "tests/support/cuda_module.py"], capture_output=True, text=True, check=True
        )
        os.environ["TOKFUSE_CUDA_HOST"] = built.stdout.strip()

    import torch

    torch.set_num_threads(THREADS[backend])
    if backend == "triton":
        import fast_interpreter
        import interpreted_scan

        fast_interpreter.install()
        interpreted_scan.install()
        warnings.filterwarnings("ignore", category=RuntimeWarning)  # numpy warns about overflow, a GPU does not


def digest(value: Any) -> str:
    """Return the SHA-256 of the dtype, shape and bits of a tensor."""
    import torch

    value = value.detach().cpu().contiguous()
    data = value.reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)}".encode() + data).hexdigest()


def digests(run: Callable[[], dict[str, Any]]) -> dict[str, str]:
    """Return the digest of every output, or the type of the error that the call raises."""
    try:
        return {name: digest(value) for name, value in run().items()}
    except Exception as error:
        return {"error": type(error).__name__}


def plan(backend: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield (label, call, problem) of every call to run. An interpreted backend gets fewer sizes."""
    import op_calls as table
    import torch

    sizes = {"small": table.SMALL, "wide": table.WIDE, "aligned": table.ALIGNED, "long": table.LONG}
    for call in table.calls():
        dtypes = call.row.dtypes
        if backend == "reference" and torch.float64 not in dtypes:
            dtypes = (*dtypes, torch.float64)
        for number, dtype in enumerate(dtypes):
            # The first dtype runs every option in every size. The other dtypes run the options in one size.
            labels = list(sizes) if number == 0 or not call.option else ["small"]
            if backend == "triton":  # the interpreter needs seconds per call
                labels = ["small", "wide"] if not call.option else labels[:1] if number == 0 else []
            for label in labels:
                name = f"{call.name} {label} {str(dtype).removeprefix('torch.')}"
                yield name, call, table.Problem(sizes[label], dtype=dtype)


def single(backend: str) -> Digests:
    """Return the digests of every call in this process."""
    import op_calls as table
    import torch

    def forward(call: Any, problem: Any) -> dict[str, Any]:
        with torch.no_grad():
            return table.tensors(call.function()(**call.arguments(problem)))

    found: Digests = {}
    for name, call, problem in plan(backend):
        found[name] = digests(partial(call.run, problem))
        if call.row.differentiable:
            found[f"{name} forward"] = digests(partial(forward, call, problem))
            if not call.option:
                found[f"{name} half"] = digests(partial(call.run, problem, 0.5))
        print(f"\r{len(found):5d} {name:80.80}", end="", file=sys.stderr)
    print(file=sys.stderr)
    return found


def one_rank(rank: int, folder: Path, backend: str) -> None:
    """Run one rank of the distributed calls: the ops that accept vocabulary shards."""
    import op_calls as table
    import torch
    import torch.distributed as dist

    from tokfuse import distributed

    store = dist.FileStore(str(folder / "store"), WORLD)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=WORLD, timeout=timedelta(seconds=300))
    sizes = table.SMALL
    shard = distributed.VocabShard.even(sizes.vocab)
    here = slice(shard.start, shard.start + shard.size)
    found: Digests = {}
    for name, function, cut in (
        ("token_stats", distributed.token_stats, {"logits": 1, "bias_logits": 1}),
        ("linear_token_stats", distributed.linear_token_stats, {"weight": 0, "bias": 0}),
        ("policy_step_hidden:policy_step", distributed.policy_step, {"weight": 0, "bias": 0}),
    ):
        for option in ("", "all", "softcap", "bias", "mask", "everything", "sequence", "quadratic", "bias_logits"):
            row = table.named(name).row
            if option and option not in row.options:
                continue
            call = table.Call(row, option)

            def run(call: Any = call, function: Any = function, cut: dict[str, int] = cut) -> dict[str, Any]:
                given = call.arguments(table.Problem(sizes))
                for key, axis in cut.items():
                    if given.get(key) is not None:
                        part = given[key].detach()[(slice(None),) * axis + (here,)].contiguous()
                        given[key] = part.requires_grad_(key in call.row.differentiable)
                out = function(**given, shard=shard)
                results = table.tensors(out)
                table.scalar(out).backward()
                grads = {f"grad {k}": v.grad for k, v in given.items() if getattr(v, "grad", None) is not None}
                return results | grads

            found[f"rank {rank} of {WORLD}: {call.name}"] = digests(run)
    metrics = distributed.merge_metrics(
        table.named("policy_loss").function()(**table.named("policy_loss").arguments(table.Problem(sizes))).metrics
    )
    found[f"rank {rank} of {WORLD}: merge_metrics"] = digests(lambda: table.tensors(metrics))
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


def distributed_digests(backend: str) -> Digests:
    """Return the digests of the distributed calls. Each of the two ranks is a separate process."""
    import torch

    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, __file__, "--backend", backend, "--rank-folder", text]
        ranks = [subprocess.Popen([*command, "--rank", str(rank)], env=environment) for rank in range(WORLD)]
        codes = [rank.wait() for rank in ranks]
        if any(codes):
            raise SystemExit(f"fingerprint: every rank must end with exit status 0; got {codes}.")
        found: Digests = {}
        for rank in range(WORLD):
            found |= torch.load(folder / f"{rank}.pt")
    return found


def about(backend: str) -> dict[str, str]:
    """Return the facts about the run that are stored with the digests. They are not compared."""
    import torch

    import tokfuse

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    return {
        "backend": backend,
        "commit": git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "-uno") else ""),
        "tokfuse": str(Path(tokfuse.__file__).parent),
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "threads": str(THREADS[backend]),
    }


def compare(first: Path, second: Path) -> int:
    """Print every difference between two files. Return 0 if there is none, otherwise 1."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    differences = 0
    for call in [*a["calls"], *(c for c in b["calls"] if c not in a["calls"])]:
        outputs = a["calls"].get(call, {}), b["calls"].get(call, {})
        for name in [*outputs[0], *(n for n in outputs[1] if n not in outputs[0])]:
            one, other = (side.get(name) for side in outputs)
            if one != other:
                differences += 1
                kind = "differs" if one and other else f"is only in {first if one else second}"
                print(f"{call}: {name} {kind}")
    total = sum(map(len, a["calls"].values()))
    print(f"{a['about']['commit']} and {b['about']['commit']}: {differences} of {total} outputs differ")
    return int(differences > 0)


def main() -> int:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backend", choices=BACKENDS)
    parser.add_argument("-o", "--output", type=Path)
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"))
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--rank-folder", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.compare:
        return compare(*arguments.compare)
    if arguments.backend is None or (arguments.output is None and arguments.rank is None):
        parser.error("give --backend and -o FILE, or --compare A B")
    prepare(arguments.backend)

    import tokfuse

    facts = about(arguments.backend)
    with tokfuse.backend(arguments.backend):
        if arguments.rank is not None:
            one_rank(arguments.rank, arguments.rank_folder, arguments.backend)
            return 0
        found = single(arguments.backend)
        found |= distributed_digests(arguments.backend)
    if about(arguments.backend) != facts:
        raise SystemExit("fingerprint: the checkout changed during the run, so no file is written. Run again.")
    refused = sorted(name for name, outputs in found.items() if "error" in outputs)
    arguments.output.write_text(json.dumps({"about": facts, "calls": found}, indent=1) + "\n")
    print(f"{len(found)} calls, {sum(map(len, found.values()))} outputs, {len(refused)} calls raised an error")
    for name in refused:
        print(f"error: {name}: {found[name]['error']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
