"""Install the build of torch that fits the machine: a CUDA build with an NVIDIA GPU, otherwise a CPU build.

    python tools/torch_build.py PYTHON REQUIREMENT...

Run this before `pip install REQUIREMENT...` in the environment of PYTHON. The script asks pip what
that command would install (`pip install --dry-run --report`). If pip would choose the wrong build of
torch, the script looks for the right build and installs it first, so that pip keeps it. If no index
offers the right build, the script prints one line and lets pip choose. Both builds run the tests.
"""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

# PyTorch's index of CPU builds. It is asked only if pip's configured index has no CPU build.
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# An index that does not answer must not delay the installation.
IMPATIENT = ["--retries", "1", "--timeout", "15"]
# Pure-Python bindings of a few kilobytes. A CPU build of torch may require them.
HARMLESS = frozenset({"nvidia-ml-py"})
CUDA_NAME = re.compile(r"^(nvidia|cuda)([-_.]|$)")

Report = Mapping[str, Any]
Resolver = Callable[[Sequence[str]], Report | None]


class Build(NamedTuple):
    """The torch version of a pip report without its local part, and whether it is a CUDA build."""

    version: str
    cuda: bool


class Choice(NamedTuple):
    """Arguments of the `pip install` to run first (empty: do not run one), and a message or ""."""

    arguments: list[str]
    remark: str


def machine_has_gpu() -> bool:
    """Return whether an NVIDIA driver is present. Only the file system is checked."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def build_of(report: Report | None) -> Build | None:
    """Return the torch that a report of `pip install --report` would install; None if torch stays as installed.

    The local version names the build (2.13.0+cpu, 2.13.0+cu130). Without a local version, a CUDA build
    is recognised by the CUDA packages that it requires.
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
        resolve: returns pip's report for some arguments; None if pip finds nothing.
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
        f"no CPU build of torch {plain.version} was found; installing the CUDA build. "
        "It also runs without a GPU, but needs several GB more.",
    )


def _alternatives(version: str, has_gpu: bool) -> list[list[str]]:
    """Return the arguments to ask pip for instead, best first."""
    if has_gpu:
        # If an index has both builds, pip prefers 2.13.0+cpu to 2.13.0. `===` excludes 2.13.0+cpu.
        return [[f"torch==={version}"]]
    return [[f"torch=={version}+cpu"], ["--extra-index-url", CPU_INDEX, f"torch=={version}+cpu"]]


def pip_resolver(python: str, requirements: Sequence[str]) -> Resolver:
    """Return a resolver that runs the pip of `python`."""

    def resolve(arguments: Sequence[str]) -> Report | None:
        patience = [] if arguments == requirements else IMPATIENT
        command = [python, "-m", "pip", "install", "--dry-run", "--quiet", *patience, "--report", "-", *arguments]
        # Errors are hidden here. If an error matters, the `pip install` that follows shows it.
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        return json.loads(done.stdout) if done.returncode == 0 else None

    return resolve


def prepare(python: str, requirements: Sequence[str]) -> None:
    """Install the right build of torch, unless pip keeps the installed one or already chooses the right one."""
    choice = choose(machine_has_gpu(), requirements, pip_resolver(python, requirements))
    if choice.remark:
        print(f"tokfuse: {choice.remark}", flush=True)
    if choice.arguments:
        done = subprocess.run([python, "-m", "pip", "install", "--quiet", *choice.arguments])
        if done.returncode != 0:
            failed = f"`pip install {' '.join(choice.arguments)}` failed"
            print(f"tokfuse: {failed}; pip will choose the build of torch.", flush=True)


if __name__ == "__main__":
    prepare(sys.argv[1], sys.argv[2:])
