"""Measures the committed rows anew: `make bench-release`, on a machine that does nothing else.

    python tools/bench_release.py [--minutes 20] [--quick] [--out bench/results]

Each step is one command line of the benchmark in one of three environments: ours, and those of
`make peers` and `make peers PEERS=verl`. Steps come in the order of their worth; one that cannot
begin within the minutes is named at the end, and the exit status says so. New rows replace the file
of their kind only when all of its steps ran, so that an interrupted run leaves what was there.
`--quick` runs every step at small sizes, to see that the commands work.
"""

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENVS = {"ours": ".venv", "peers": ".venv-peers", "verl": ".venv-verl"}
FEW = "--rounds 3 --budget 1 --no-errors"
EVERY = "torch_eager,torch_compile,cross_entropy,trl,liger,liger_flsce,cut_cross_entropy"


@dataclass(frozen=True)
class Step:
    """One run: the file its rows go to, the environment, and the arguments of the benchmark."""

    kind: str
    venv: str
    arguments: str


# Tokens are few where vocabulary x hidden is large: a step of every peer takes seconds there.
STEPS = (
    Step(
        "logits",
        "peers",
        "policy_step --variant entropy=0.01 --shapes 512xsmollm2,256xqwen2.5 "
        "--rounds 7 --budget 10 --no-errors --peers torch_eager,torch_compile,torch_eager_f32,"
        "torch_compile_f32,cross_entropy,trl",
    ),
    Step(
        "logits",
        "peers",
        "policy_step --variant entropy=0.01 --shapes 256xllama3,128xgemma2 "
        "--dtype float32 --rounds 5 --budget 8 --no-errors --peers torch_eager,torch_compile,"
        "cross_entropy,trl",
    ),
    Step(
        "logits",
        "ours",
        "token_stats --variant logp,entropy --shapes 512xsmollm2 --rounds 5 "
        "--budget 5 --no-errors --peers torch_compile",
    ),
    Step(
        "hidden",
        "ours",
        "policy_step_hidden --shapes 512xsmollm2 --rounds 3 --budget 8 --no-errors --peers torch_eager,torch_compile",
    ),
    Step(
        "hidden", "ours", "policy_step_hidden --shapes 256x2048x151936 --rounds 3 --budget 20 --no-errors --peers none"
    ),
    Step(
        "peers",
        "peers",
        f"policy_step_hidden --variant rows=1 --shapes 256xsmollm2 {FEW} --peers {EVERY},liger_compile",
    ),
    Step(
        "peers",
        "peers",
        f"policy_step_hidden --variant rows=1 --shapes 128xqwen2.5,128xllama3,32xgemma2 {FEW} --peers {EVERY}",
    ),
    Step("peers", "verl", f"policy_step_hidden --variant rows=1 --shapes 256xsmollm2 {FEW} --peers verl"),
    Step("advantage", "ours", "advantage --rounds 5 --budget 10 --peers torch_eager"),
    Step("influence", "ours", "influence --rounds 5 --budget 20 --no-errors --peers none"),
    Step("growth", "ours", f"growth --axes tokens,vocab,rows {FEW} --peers torch_eager"),
    Step("growth", "ours", f"growth --axes hidden,threads {FEW} --peers none"),
    Step("predicted", "ours", "predict"),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps; 1 when one failed or was left out."""
    parser = argparse.ArgumentParser(prog="tools/bench_release.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=20.0, help="no step begins after them")
    parser.add_argument("--quick", action="store_true", help="small sizes, for a trial")
    parser.add_argument("--out", default="bench/results", help="folder of the rows")
    options = parser.parse_args(argv)
    out = (ROOT / options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, bad = time.monotonic(), []
    deadline = start + options.minutes * 60
    for kind in dict.fromkeys(step.kind for step in STEPS):
        fresh = out / f"{kind}.jsonl.new"
        fresh.unlink(missing_ok=True)
        steps = [step for step in STEPS if step.kind == kind]
        problems = [said for step in steps if (said := attempt(step, fresh, options.quick, deadline))]
        if not problems:
            fresh.replace(out / f"{kind}.jsonl")
        bad += problems
    print("\n".join([f"release: {time.monotonic() - start:.0f} s", *bad]))
    return int(bool(bad))


def attempt(step: Step, fresh: Path, quick: bool, deadline: float) -> str:
    """Run one step unless the time is over; "" when it came to its end, else what happened. A peer
    that failed is a row and no failure."""
    line = command(step, fresh, quick)
    if time.monotonic() > deadline:
        return f"left out, the time was over: {step.arguments}"
    if not Path(line[0]).exists():
        return f"{VENVS[step.venv]} is missing, `make bench-release` makes it: {step.arguments}"
    print(f"release: bench {step.arguments}", flush=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    code = subprocess.run(line, env=environment, cwd=ROOT).returncode
    return "" if code == 0 else f"exit status {code}: {step.arguments}"


def command(step: Step, fresh: Path, quick: bool) -> list[str]:
    """The command line of a step."""
    python = ROOT / VENVS[step.venv] / "bin" / "python"
    words = shlex.split(step.arguments)
    if quick and "--shapes" in words:
        at = words.index("--shapes")
        del words[at : at + 2]
    quick_words = ["--quick"] if quick and step.kind != "predicted" else []
    return [str(python), "-m", "tokfuse", "bench", *words, *quick_words, "--json", str(fresh)]


if __name__ == "__main__":
    sys.exit(main())
