"""Refuses to install a CUDA build of torch on a machine that has no NVIDIA GPU.

    python tools/no_cuda.py PYTHON REQUIREMENT...

Asks the pip of PYTHON what it would install (`pip install --dry-run --report -`), and exits with
one sentence if any of it belongs to the CUDA stack (gigabytes that this machine cannot use).
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

# Pure-Python bindings of a few kilobytes; they find a driver or say that there is none.
HARMLESS = frozenset({"nvidia-ml-py"})
CUDA_NAME = re.compile(r"^(nvidia|cuda|cupy)([-_.]|$)")
CUDA_LOCAL_VERSION = re.compile(r"\+cu\d+")


def machine_has_gpu() -> bool:
    """True where an NVIDIA driver is present; asks the file system only."""
    return Path("/dev/nvidiactl").exists() or shutil.which("nvidia-smi") is not None


def cuda_distributions(report: Mapping[str, Any]) -> list[str]:
    """`name==version` of every CUDA distribution in a report of `pip install --report`."""
    found = []
    for item in report.get("install", []):
        name = str(item["metadata"]["name"]).lower()
        version = str(item["metadata"]["version"])
        is_cuda = CUDA_NAME.match(name) and name not in HARMLESS
        if is_cuda or CUDA_LOCAL_VERSION.search(version):
            found.append(f"{name}=={version}")
    return sorted(found)


def refusal(found: list[str]) -> str:
    """The sentence for a person whose pip would bring CUDA wheels."""
    shown = ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
    return (
        f"tokfuse: this machine has no NVIDIA GPU, but pip would install CUDA wheels ({shown}); "
        "point pip at an index of CPU builds (`pip config set global.index-url ...` or the "
        "environment variable PIP_INDEX_URL), install a CPU build of torch into the virtual "
        "environment yourself, or accept the download with TOKFUSE_ALLOW_CUDA_WHEELS=1."
    )


def resolve(python: str, arguments: Iterable[str]) -> dict[str, Any]:
    """What `pip install ARGUMENTS` would install. pip's own errors go to stderr."""
    command = [python, "-m", "pip", "install", "--dry-run", "--quiet", "--report", "-", *arguments]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    return report


def check(python: str, arguments: Iterable[str]) -> None:
    """Exit with one sentence if pip would bring CUDA wheels that nothing here can use."""
    if machine_has_gpu() or os.environ.get("TOKFUSE_ALLOW_CUDA_WHEELS", "0") not in ("", "0"):
        return
    found = cuda_distributions(resolve(python, arguments))
    if found:
        raise SystemExit(refusal(found))


if __name__ == "__main__":
    check(sys.argv[1], sys.argv[2:])
