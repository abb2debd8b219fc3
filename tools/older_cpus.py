"""Run the tests that have numeric bounds as on older CPUs: `tools/older_cpus.py [PYTEST ARGUMENTS]`.

A bound that holds on one CPU may fail on an older CPU, because torch, MKL, oneDNN and the kernels of
tokfuse then sum in another order. Each setting restricts all four libraries and the number of threads.
`make test` uses the instruction sets of the machine, so together they cover every level. The script
prints the level of each library. A restriction without effect is an error.
"""

import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
MARKS = "not slow and not gpu and not interpreter and not cuda_host"
# Every op, the methods with their own formulas and the merge of vocabulary shards; TRAINERS: each trainer compared with
# its float64 result. All other tests compare structure, text, or bits on one machine.
TESTS = (
    "ops",
    "algorithms/test_algorithms.py",
    "algorithms/test_preference_losses.py",
    "algorithms/test_preference_step.py",
    "distributed/test_vocab_parallel.py",
)
# They take 40% of the time, and nobody trains on a CPU without AVX2: run with AVX2 only.
TRAINERS = (
    "integrations/test_call_shapes.py",
    "integrations/test_hf.py",
    "integrations/test_nemo_loss.py",
    "integrations/test_prime_rl_losses.py",
    "integrations/test_trl.py",
    "integrations/test_trl_losses.py",
)
# The reference computes in float64 and rounds once, so its bounds do not depend on the CPU. The options of
# TRL's trainers that only change which rollouts are used add no arithmetic. Peak memory, refusals and imports depend
# on no CPU.
EXCLUDED = (
    "not [reference and not -reference- and not -reference] and not reused and not vllm"
    " and not peak_memory and not refusals and not imports_no_host"
)


class Setting(NamedTuple):
    """Environment variables of a process, the levels that the libraries must then report, and the tests."""

    environment: dict[str, str]
    torch: str
    kernels: str
    onednn: str
    tests: tuple[str, ...] = TESTS


# MKL_CBWR works on processors of every vendor. MKL_ENABLE_INSTRUCTIONS works only on Intel processors.
# MKL_DEBUG_CPU_TYPE no longer has an effect.
SETTINGS = {
    "SSE4, 1 thread": Setting(
        {
            "ATEN_CPU_CAPABILITY": "default",
            "TOKFUSE_ISA": "v2",
            "ONEDNN_MAX_CPU_ISA": "SSE41",
            "MKL_CBWR": "COMPATIBLE",
            "OMP_NUM_THREADS": "1",
        },
        "DEFAULT",
        "x86-64-v2",
        "Intel SSE4.1",
    ),
    "AVX2, 2 threads": Setting(
        {
            "ATEN_CPU_CAPABILITY": "avx2",
            "TOKFUSE_ISA": "v3",
            "ONEDNN_MAX_CPU_ISA": "AVX2",
            "MKL_CBWR": "AVX2",
            "OMP_NUM_THREADS": "2",
        },
        "AVX2",
        "x86-64-v3",
        "Intel AVX2",
        (*TESTS, *TRAINERS),
    ),
}

PROBE = """
import torch
from tokfuse.runtime.core import native
x = torch.ones(64, 64)
x @ x
torch.nn.functional.gelu(x)
module = native.module()
kernels = "none" if module is None else module.active_isa()
print(f"LEVELS {torch.backends.cpu.get_cpu_capability()},{kernels},{torch.get_num_threads()}")
"""


def levels(environment: dict[str, str]) -> dict[str, str]:
    """Return the levels that torch, tokfuse's kernels, oneDNN and MKL report; "" if one reports nothing."""
    verbose = {"MKL_VERBOSE": "1", "ONEDNN_VERBOSE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd="/", env=os.environ | environment | verbose, capture_output=True, text=True
    )
    if done.returncode != 0:
        sys.exit(done.stderr)

    def found(pattern: str) -> str:
        match = re.search(pattern, done.stdout)
        return match.group(1).strip() if match else ""

    torch, kernels, threads = found(r"LEVELS (.*)").split(",")
    return {
        "torch": torch,
        "kernels": kernels,
        "oneDNN": found(r"info,cpu,isa:(.*)"),
        "MKL": found(r"MKL_VERBOSE .* for Intel\(R\) 64 architecture (.*?), Lnx"),
        "MKL_CBWR": found(r"CNR:(\S+)"),
        "threads": threads,
    }


def check(name: str, setting: Setting, seen: dict[str, str]) -> None:
    """Exit with an error if a restriction has no effect. A torch build may lack oneDNN or MKL."""
    want = {
        "torch": setting.torch,
        "kernels": setting.kernels,
        "oneDNN": setting.onednn,
        "MKL_CBWR": setting.environment["MKL_CBWR"],
        "threads": setting.environment["OMP_NUM_THREADS"],
    }
    for library, level in want.items():
        if seen[library] != level and not (seen[library] == "" and library in ("oneDNN", "MKL_CBWR")):
            sys.exit(f"{name}: {library} must run at {level}; got {seen[library] or 'no report'}")


def run(name: str, setting: Setting, arguments: list[str]) -> tuple[bool, str]:
    """Run the tests with one setting. Return (passed, one line with counts and seconds)."""
    began, counts = time.monotonic(), "no summary"
    command = [
        str(Path(sys.executable).with_name("pytest")),
        "-q",
        "-m",
        MARKS,
        "-k",
        EXCLUDED,
        *arguments,
        *(f"tests/{x}" for x in setting.tests),
    ]
    process = subprocess.Popen(
        command, cwd=ROOT, env=os.environ | setting.environment, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(line, end="", flush=True)
        match = re.search(r"\d+ (passed|failed|error).* in [\d.]+s", line)
        counts = match.group(0) if match else counts
    passed = process.wait() == 0
    return passed, f"{name}: {counts.partition(' in ')[0]}; {time.monotonic() - began:.0f} s"


def main(arguments: list[str]) -> int:
    """Run every setting that this CPU supports."""
    if platform.machine() not in ("x86_64", "AMD64"):
        print("test-cpus: skipped, because the settings are levels of x86-64")
        return 0
    here = levels({})
    print("this CPU:", ", ".join(f"{k} {v}" for k, v in here.items() if v))
    results = []
    for name, setting in SETTINGS.items():
        if here["kernels"] < setting.kernels:
            print(f"{name}: skipped, this CPU has {here['kernels']}")
            continue
        seen = levels(setting.environment)
        print(f"{name}:", ", ".join(f"{k} {v}" for k, v in seen.items() if v), flush=True)
        check(name, setting, seen)
        results.append(run(name, setting, arguments))
    print(*(line for _, line in results), sep="\n")
    return 0 if all(passed for passed, _ in results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
