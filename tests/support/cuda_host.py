"""Build the CUDA kernels for the CPU: csrc/cuda with tests/cuda_host, using only g++.

Objects are stored in build/cuda_host, one per source and set of flags. They are rebuilt if a file of csrc
or tests/cuda_host changes.
"""

import functools
import hashlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
HOST = ROOT / "tests" / "cuda_host"
CUDA = ROOT / "csrc" / "cuda"
BUILD = ROOT / "build" / "cuda_host"
COMPILER = os.environ.get("CXX", "g++")
FLAGS = (
    "-std=c++17",
    "-fPIC",
    "-g1",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",
    "-Wno-maybe-uninitialized",
    "-DTOKFUSE_CUDA_HOST",
    f"-I{ROOT / 'csrc'}",
    f"-I{ROOT / 'tests'}",
)
OPTIMIZED = ("-O2",)
SANITIZED = ("-O0", "-fno-omit-frame-pointer", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined")
# Compile with ThreadSanitizer's instrumentation. checker.cpp implements its functions, so its library is
# not linked.
CHECKED = ("-O1", "-fsanitize=thread", "-Wno-tsan")
KINDS = {OPTIMIZED: "fast", SANITIZED: "sanitized", CHECKED: "checked"}

# rows_main.cpp runs the kernels over logits, packed_main.cpp the kernels over vectors.
ROW_KERNELS = [
    CUDA / f"{op}.cu"
    for op in ("token_stats", "token_stats_at", "policy_step", "kept_token_stats", "paired_divergence")
]
PACKED_KERNELS = sorted(set(CUDA.glob("*.cu")) - set(ROW_KERNELS))

needs_host = pytest.mark.skipif(
    platform.machine() != "x86_64" or shutil.which(COMPILER) is None,
    reason=f"kernels run on the CPU of an x86-64 with {COMPILER}",
)


@functools.cache
def _sources() -> bytes:
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "csrc").rglob("*.*"), *HOST.iterdir()]):
        if path.is_file():
            digest.update(path.name.encode() + path.read_bytes())
    return digest.digest()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stderr}"


def _made(name: str, command: Sequence[str]) -> Path:
    """Return the file that `command` writes to its last argument. The command runs only if the file is missing."""
    key = hashlib.sha256(_sources() + "\0".join(command).encode()).hexdigest()[:16]
    target = BUILD / f"{name}-{key}"
    if not target.exists():
        BUILD.mkdir(parents=True, exist_ok=True)
        for old in BUILD.glob(f"{name}-*"):
            if _days_old(old) > 1:  # another test run may use newer files
                old.unlink(missing_ok=True)
        part = target.with_suffix(f".{os.getpid()}")
        _run([*command, str(part)])
        part.replace(target)
    return target


def _days_old(path: Path) -> float:
    return (time.time() - path.stat().st_mtime) / 86400


def compiled(source: Path, flags: tuple[str, ...]) -> Path:
    """Return the object of one source."""
    kind = KINDS[flags]
    language = ["-x", "c++"] if source.suffix == ".cu" else []
    command = [COMPILER, *FLAGS, *flags, *language, "-c", str(source), "-o"]
    return _made(f"{source.stem}-{kind}.o", command)


def program(name: str, sources: Sequence[Path], flags: tuple[str, ...]) -> Path:
    """Return an executable of kernels, a main and the simulated machine; with the checker for CHECKED."""
    objects = [compiled(source, flags) for source in sources]
    objects += [compiled(HOST / "machine.cpp", OPTIMIZED if flags is CHECKED else flags)]
    link = [] if flags is CHECKED else [f for f in flags if f.startswith("-fsanitize")]
    if flags is CHECKED:
        objects += [compiled(HOST / "checker.cpp", OPTIMIZED)]
    return _made(name, [COMPILER, *map(str, objects), *link, "-ldl", "-o"])


@dataclass(frozen=True)
class Run:
    """The output of a program."""

    status: int
    out: str
    err: str


def run(path: Path, *arguments: str, **variables: str) -> Run:
    """Run an executable of `program`."""
    env = {**os.environ, "ASAN_OPTIONS": "detect_leaks=0", **variables}
    done = subprocess.run([path, *arguments], capture_output=True, text=True, env=env)
    return Run(done.returncode, done.stdout, done.stderr)
