"""Interleaved timing with cold caches, and the peak memory of one call."""

import contextlib
import ctypes
import functools
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tokfuse.bench.machine import last_level_cache_bytes, status_bytes

Outputs = dict[str, torch.Tensor]

MIN_ROUNDS = 3
CLEAR_REFS_FILE = Path("/proc/self/clear_refs")


GPU_CACHE_BYTES = 128 << 20  # larger than the L2 cache of every current GPU


@functools.cache
def _eviction_buffer(device: str) -> torch.Tensor:
    cache_bytes = last_level_cache_bytes() if device == "cpu" else GPU_CACHE_BYTES
    return torch.zeros(2 * cache_bytes // 8, dtype=torch.int64, device=device)


def _nothing() -> None:
    return None


@dataclass
class Provider:
    """One implementation of the work.

    Args:
        run: the timed call. It returns its outputs by name (names of `row.ERROR_NAMES`).
        before: untimed work before each call, for example restoring the input of an in-place op.
        release: frees the memory that the library keeps between calls, so that the peak includes it.
        backend, version, note: see `row.Row`.
        calls: number of calls that `run` makes; the time is divided by it.
        fallback: True if this is tokfuse on the pure-torch reference.
        device: "cpu" or "cuda". On "cuda", events of the current stream measure the time.
    """

    run: Callable[[], Outputs]
    before: Callable[[], None] = _nothing
    release: Callable[[], None] = _nothing
    backend: str = "torch"
    version: str = ""
    note: str = ""
    calls: int = 1
    fallback: bool = False
    device: str = "cpu"


class ColdCache:
    """Evicts the caches before a call. It writes twice the last-level cache, for every provider alike."""

    def __init__(self, enabled: bool = True, device: str = "cpu") -> None:
        self._buffer = _eviction_buffer(device) if enabled else None

    def flush(self) -> None:
        if self._buffer is not None:
            self._buffer.add_(1)


def time_once(provider: Provider, cache: ColdCache) -> tuple[float, float]:
    """Return the milliseconds of one call, and the milliseconds of CPU time of its threads.

    The results are freed outside the timed region. On a GPU the start event follows the cache eviction in
    the stream. The eviction therefore hides the launch overhead of short work.
    """
    provider.before()
    cache.flush()
    if provider.device != "cpu":
        return _time_on_device(provider)
    cpu_start, start = time.process_time(), time.perf_counter()
    outputs = provider.run()
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu_start
    del outputs
    return seconds * 1e3 / provider.calls, cpu_seconds * 1e3 / provider.calls


def _time_on_device(provider: Provider) -> tuple[float, float]:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cpu_start = time.process_time()
    start.record()
    outputs = provider.run()
    end.record()
    end.synchronize()
    cpu_ms = (time.process_time() - cpu_start) * 1e3
    del outputs
    return start.elapsed_time(end) / provider.calls, cpu_ms / provider.calls


def interleave(
    providers: dict[str, Provider],
    rounds: int,
    cache: ColdCache,
    budget_s: float = float("inf"),
    cpu_times: dict[str, list[float]] | None = None,
) -> tuple[dict[str, list[float]], dict[str, Exception]]:
    """Time every provider once per round, so that noise affects all providers equally.

    The order rotates from round to round. A provider that raises an exception is not run again, and its
    exception is returned. After `MIN_ROUNDS` rounds, no round starts if `budget_s` seconds are used.
    `cpu_times` receives the milliseconds of CPU time, which other load on the machine affects least.

    Returns:
        milliseconds per provider and round, and the exceptions by provider.
    """
    times: dict[str, list[float]] = {name: [] for name in providers}
    failed: dict[str, Exception] = {}
    names = list(providers)
    gc.collect()
    with _no_collection():
        start = time.perf_counter()
        for i in range(rounds):
            if i >= MIN_ROUNDS and time.perf_counter() - start > budget_s:
                break
            shift = i % max(1, len(names))
            for name in names[shift:] + names[:shift]:
                if name in failed:
                    continue
                try:
                    wall, cpu = time_once(providers[name], cache)
                except Exception as error:  # a peer may raise any exception; it becomes a row
                    failed[name] = error
                    continue
                times[name].append(wall)
                if cpu_times is not None:
                    cpu_times.setdefault(name, []).append(cpu)
    return times, failed


def percentile(values: list[float], share: float) -> float:
    """Return a percentile by linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def peak_extra_bytes(provider: Provider) -> tuple[int | None, str]:
    """Return the peak resident memory of one call minus the resident memory before it, and how it was read.

    The kernel's high-water mark (VmHWM) is reset to the current size just before the call. Free heap memory
    and the memory that `release` frees are returned to the system first, so that they cannot hide an
    allocation. Packing buffers that a GEMM library keeps between calls are already resident and do not
    count. The result is exact to about 1 MiB, because the kernel batches its page counters per thread.
    After a failed allocation, malloc may use an arena that it cannot trim, and the peak is too small.
    """
    provider.before()
    provider.release()
    if provider.device != "cpu":
        return _peak_on_device(provider)
    _trim_heap()
    try:
        CLEAR_REFS_FILE.write_text("5")
    except OSError:
        return None, "unavailable: the high-water mark cannot be reset"
    before = status_bytes("VmHWM")
    with _no_collection():
        outputs = provider.run()
    peak = status_bytes("VmHWM")
    del outputs
    if not before or not peak:
        return None, "unavailable: no VmHWM in the process status"
    return max(0, peak - before), "VmHWM reset before the call"


def _peak_on_device(provider: Provider) -> tuple[int, str]:
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    outputs = provider.run()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    del outputs
    return peak, "peak of torch's CUDA allocator above what was allocated before the call"


def tensor_bytes(outputs: Outputs) -> int:
    """Return the bytes of the storages of some tensors. Each storage is counted once."""
    storages = (value.untyped_storage() for value in outputs.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Disable Python's garbage collector in the measured region, because it could free memory there."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _trim_heap() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):  # not glibc
        pass
