"""Measure the committed benchmark rows again: `make bench-release`, on an idle machine.

    python tools/bench_release.py [--minutes 20] [--quick] [--out bench/results]

Each step is one benchmark command in one of three environments: .venv, and those of `make peers` and
`make peers PEERS=verl`. The most important steps run first. A step that cannot start in time is listed
at the end, and the exit status is 1. New rows replace the file of their kind only if all of its steps
ran, so an interrupted run keeps the old file. `--quick` runs every step at small sizes to check that
the commands work.
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
TWO_HEADS = f"{FEW} --peers torch_eager,torch_compile,trl,liger,liger_compile"
EVERY = "torch_eager,torch_compile,cross_entropy,trl,liger,liger_flsce,cut_cross_entropy"
CROSS_ENTROPY = "torch_eager,torch_compile,torch_linear_cross_entropy"


@dataclass(frozen=True)
class Step:
    """One benchmark command.

    Args:
        kind: stem of the file that receives the rows.
        venv: the environment, a key of `VENVS`.
        arguments: of `python -m tokfuse bench`.
    """

    kind: str
    venv: str
    arguments: str


# Large vocabulary x hidden sizes use few tokens, because a step of every peer takes seconds there.
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
    Step("logits", "ours", f"cross_entropy --shapes 256xsmollm2 {FEW} --peers torch_eager,torch_compile"),
    Step("hidden", "ours", f"linear_cross_entropy --shapes 256xsmollm2 {FEW} --peers {CROSS_ENTROPY}"),
    Step("advantage", "ours", "advantage --rounds 5 --budget 10 --peers torch_eager"),
    Step("influence", "ours", "influence --rounds 5 --budget 20 --no-errors --peers none"),
    Step("growth", "ours", f"growth --axes tokens,vocab,rows {FEW} --peers torch_eager"),
    Step("growth", "ours", f"growth --axes hidden,threads {FEW} --peers none"),
    Step("predicted", "ours", "predict"),
    # Rows of their own folder, because their table stands on the page about distillation.
    Step("distillation/cpu", "peers", f"distill_step --shapes 512x576x49152,256x896x151936 {TWO_HEADS}"),
    Step("distillation/cpu", "peers", f"distill_step --variant jsd --shapes 256x2048x151936 {TWO_HEADS}"),
    Step(
        "distillation/cpu",
        "peers",
        f"distill_step --variant kl_reverse,teacher=2x --shapes 256x2048x151936 {TWO_HEADS}",
    ),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the steps. Return 1 if one failed or was skipped, otherwise 0."""
    parser = argparse.ArgumentParser(prog="tools/bench_release.py", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=20.0, help="no step starts after this time")
    parser.add_argument("--quick", action="store_true", help="small sizes, to check that the commands work")
    parser.add_argument("--out", default="bench/results", help="folder for the rows")
    options = parser.parse_args(argv)
    out = (ROOT / options.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    start, bad = time.monotonic(), []
    deadline = start + options.minutes * 60
    for kind in dict.fromkeys(step.kind for step in STEPS):
        fresh = out / f"{kind}.jsonl.new"
        fresh.parent.mkdir(parents=True, exist_ok=True)
        fresh.unlink(missing_ok=True)
        steps = [step for step in STEPS if step.kind == kind]
        problems = [said for step in steps if (said := attempt(step, fresh, options.quick, deadline))]
        if not problems:
            fresh.replace(out / f"{kind}.jsonl")
        bad += problems
    print("\n".join([f"release: {time.monotonic() - start:.0f} s", *bad]))
    return int(bool(bad))


def attempt(step: Step, fresh: Path, quick: bool, deadline: float) -> str:
    """Run one step if there is time left. Return "" if it completed, otherwise the reason.

    A peer that fails gives a row with status `error`; the step still completes.
    """
    line = command(step, fresh, quick)
    if time.monotonic() > deadline:
        return f"skipped, no time left: {step.arguments}"
    if not Path(line[0]).exists():
        return f"{VENVS[step.venv]} is missing, `make bench-release` creates it: {step.arguments}"
    print(f"release: bench {step.arguments}", flush=True)
    environment = os.environ | {"OMP_WAIT_POLICY": "passive"}
    code = subprocess.run(line, env=environment, cwd=ROOT).returncode
    return "" if code == 0 else f"exit status {code}: {step.arguments}"


def command(step: Step, fresh: Path, quick: bool) -> list[str]:
    """Return the command line of a step."""
    python = ROOT / VENVS[step.venv] / "bin" / "python"
    words = shlex.split(step.arguments)
    if quick and "--shapes" in words:
        at = words.index("--shapes")
        del words[at : at + 2]
    quick_words = ["--quick"] if quick and step.kind != "predicted" else []
    return [str(python), "-m", "tokfuse", "bench", *words, *quick_words, "--json", str(fresh)]


if __name__ == "__main__":
    sys.exit(main())
