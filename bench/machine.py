"""Facts that identify a measurement: machine, versions, commit, threads."""

import contextlib
import datetime
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import tokfuse
from tokfuse.bench import telemetry
from tokfuse.runtime.core import native

MEMINFO = Path("/proc/meminfo")


def facts(command: str, device: str = "cpu") -> dict[str, Any]:
    """Return the row fields that are the same for a whole run."""
    gpu = telemetry.describe() if device == "cuda" else telemetry.Telemetry("")
    return {
        "threads": torch.get_num_threads(),
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY", ""),
        "machine": _machine(),
        "cpu_model": _cpu_model(),
        "isa": _isa(),
        "gpu": gpu.name or (torch.cuda.get_device_name() if device == "cuda" else ""),
        "driver": gpu.driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": version_of("triton"),
        "tokfuse": tokfuse.__version__,
        "commit": _commit(),
        "command": command,
    }


def now() -> str:
    """Return the UTC time with a resolution of one second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load_average() -> float:
    """Return the load average of the last minute."""
    return round(os.getloadavg()[0], 2)


def version_of(distribution: str) -> str:
    """Return the installed version of a distribution, or "" if it is not installed."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return ""


def available_bytes() -> int:
    """Return the memory that a process can still allocate without swapping; 0 if the system does not report it."""
    return _kilobytes(MEMINFO, "MemAvailable")


@contextlib.contextmanager
def memory_guard() -> Iterator[None]:
    """Let an allocation beyond the free memory fail, so that the system does not kill the process.

    Lowers the soft limit of private writable memory to the used plus the free memory. Does nothing if the
    system does not report both.
    """
    used, free = status_bytes("VmData"), available_bytes()
    if not used or not free:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + free
    if soft != resource.RLIM_INFINITY:
        wanted = min(wanted, soft)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def status_bytes(key: str) -> int:
    """Return a size of this process (VmHWM, VmData, ...); 0 if the system does not report it."""
    return _kilobytes(Path("/proc/self/status"), key)


def last_level_cache_bytes() -> int:
    """Return the largest cache of core 0, or 32 MiB if the system does not report it."""
    sizes = [32 << 20]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        if text.endswith("K"):
            sizes.append(int(text[:-1]) << 10)
        elif text.endswith("M"):
            sizes.append(int(text[:-1]) << 20)
    return max(sizes)


def warn_about_waiting() -> None:
    """Warn if idle OpenMP threads will spin. With other load on the machine, spinning costs milliseconds."""
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        print(
            "tokfuse bench: OMP_WAIT_POLICY is not 'passive', so idle threads spin and take CPU time "
            "from other threads. This increases the time of small ops. Run `OMP_WAIT_POLICY=passive python -m "
            "tokfuse bench ...`.",
            file=sys.stderr,
        )


def _machine() -> str:
    gib = _kilobytes(MEMINFO, "MemTotal") / 2**30
    return f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {gib:.0f} GiB"


def _kilobytes(path: Path, key: str) -> int:
    try:
        for line in path.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) << 10
    except OSError:
        pass
    return 0


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _isa() -> str:
    """Return the instruction-set level of the native module, or why there is none."""
    module = native.module()
    if module is None:
        return "no native module"
    isa = getattr(module, "active_isa", None)
    return str(isa()) if callable(isa) else ""


def _commit() -> str:
    """Return the commit of the sources if they are a git checkout, with "-dirty" for local changes."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return ""
    try:
        out = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return out.stdout.strip()
