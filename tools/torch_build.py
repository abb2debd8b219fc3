"""Installs the build of torch that fits the machine: a CPU build without an NVIDIA GPU, else a CUDA build.

    python tools/torch_build.py PYTHON REQUIREMENT...

Runs before `pip install REQUIREMENT...`, for the environment of PYTHON. It asks pip what that command
would install (`pip install --dry-run --report`). If that is another build of torch than the machine
needs, it looks for the right one and installs it first, so that pip keeps it. If no index offers the
right one, it says so in one line and leaves the choice to pip: either build runs the tests.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's own index of CPU builds; asked only if the index that pip is configured for has none.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# An index that does not answer must not hold up the installation.
IMPATIENT = ["--retries", "1", "--timeout", "15"]
# Pure-Python bindings of a few kilobytes; they find a driver or say that there is none.
HARMLESS = frozenset({"nvidia-ml-py"})
CUDA_NAME = re.compile(r"^(nvidia|cuda)([-_.]|$)")

Report = Mapping[str, Any]
Resolver = Callable[[Sequence[str]], Report | None]


class Build(NamedTuple):
    """The torch of a report: its version without the local part, and whether it is a CUDA build."""

    version: str
    cuda: bool


class Choice(NamedTuple):
    """Arguments of the `pip install` to run first (empty: none), and a sentence for the user, or ""."""

    arguments: list[str]
    remark: str


def machine_has_gpu() -> bool:
    """Whether an NVIDIA driver is present; asks the file system only."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def build_of(report: Report | None) -> Build | None:
    """The torch that a report of `pip install --report` would install; None if it keeps what is installed.

    The local version names the build (2.13.0+cpu, 2.13.0+cu130). Without one, a CUDA build is known
    by the CUDA packages that it requires.
    """
    items = [item["metadata"] for item in (report or {}).get("install", ())]
    found = {str(item["name"]).lower(): str(item["version"]) for item in items}
    if "torch" not in found:
        return None
    version, _, local = found["torch"].partition("+")
    if local:
        return Build(version, local.startswith("cu"))
    return Build(version, any(CUDA_NAME.match(name) and name not in HARMLESS for name in found))


def choose(has_gpu: bool, requirements: Sequence[str], resolve: Resolver) -> Choice:
    """Decide what to install before the requirements.

    Args:
        has_gpu: whether the machine has an NVIDIA GPU.
        requirements: arguments of the `pip install` that follows.
        resolve: answers what pip would install for some arguments; None if it finds nothing.
    """
    plain = build_of(resolve(requirements))
    if plain is None or plain.cuda == has_gpu:
        return Choice([], "")
    for arguments in _alternatives(plain.version, has_gpu):
        if build_of(resolve(arguments)) == (plain.version, has_gpu):
            return Choice(arguments, "")
    if has_gpu:
        return Choice([], f"pip finds only a CPU build of torch {plain.version}; the GPU of this machine is not used.")
    return Choice(
        [],
        f"no CPU build of torch {plain.version} was found; installing the CUDA build, "
        "which runs without a GPU too and is larger than needed (several GB).",
    )


def _alternatives(version: str, has_gpu: bool) -> list[list[str]]:
    """What to ask pip for instead, best first."""
    if has_gpu:
        # An index with both builds: pip takes 2.13.0+cpu before 2.13.0, and === excludes it.
        return [[f"torch==={version}"]]
    return [[f"torch=={version}+cpu"], ["--extra-index-url", CPU_INDEX, f"torch=={version}+cpu"]]


def pip_resolver(python: str, requirements: Sequence[str]) -> Resolver:
    """A resolver that asks the pip of `python`."""

    def resolve(arguments: Sequence[str]) -> Report | None:
        patience = [] if arguments == requirements else IMPATIENT
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", *patience, "--report", "-", *arguments]
        # Errors are not shown: where they matter, the `pip install` that follows shows them.
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    return resolve


def prepare(python: str, requirements: Sequence[str]) -> None:
    """Install the right build of torch, unless pip keeps the installed one or picks the right one anyway."""
    choice = choose(machine_has_gpu(), requirements, pip_resolver(python, requirements))
    if choice.remark:
        print(f"tokfuse: {choice.remark}", flush=True)
    if choice.arguments:
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *choice.arguments])
        if done.returncode != 0:
            failed = f"`pip install {' '.join(choice.arguments)}` failed"
            print(f"tokfuse: {failed}; installing the build that pip prefers.", flush=True)


if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2:])
