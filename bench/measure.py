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


GPU_CACHE_BYTES = 128 << 20  # more than the second-level cache of any GPU so far


@functools.cache
def _eviction_buffer(device: str) -> torch.Tensor:
    cache_bytes = last_level_cache_bytes() if device == "cpu" else GPU_CACHE_BYTES
    return torch.zeros(2 * cache_bytes // 8, dtype=torch.int64, device=device)


def _nothing() -> None:
    return None


@dataclass
class Provider:
    """One way to do the work.

    Args:
        run: the timed call; returns its outputs by name (names of `row.ERROR_NAMES`).
        before: untimed work before each call, e.g. restoring what an in-place op overwrote.
        release: frees what the library keeps between calls, so that a peak counts it.
        backend, version, note: see `row.Row`.
        calls: how many calls `run` makes; the time is divided by it.
        fallback: True when this is ours but on the pure-torch reference.
        device: "cpu", or "cuda": timed by events of the current stream.
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
    """Evicts the caches by writing twice the last-level cache; the same for every provider."""

    def __init__(self, enabled: bool = True, device: str = "cpu") -> None:
        self._buffer = _eviction_buffer(device) if enabled else None

    def flush(self) -> None:
        if self._buffer is not None:
            self._buffer.add_(1)


def time_once(provider: Provider, cache: ColdCache) -> tuple[float, float]:
    """Milliseconds of one call, and of its threads' CPU time.

    Freeing the results is outside the timed region for everyone. On a GPU the events stand behind
    the cache's eviction in the stream, so the launch of the work is hidden by it where it is short.
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
    """Time every provider once per round, round after round, so that noise hits all alike.

    The order rotates from round to round. A provider that raises leaves the rounds; its exception
    is returned. After `MIN_ROUNDS`, no round begins once `budget_s` seconds are spent. `cpu_times`
    is filled with the milliseconds of CPU time, which a busy neighbour inflates least.

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
                except Exception as error:  # a peer may raise anything; it becomes a row
                    failed[name] = error
                    continue
                times[name].append(wall)
                if cpu_times is not None:
                    cpu_times.setdefault(name, []).append(cpu)
    return times, failed


def percentile(values: list[float], share: float) -> float:
    """Linear interpolation between the closest ranks."""
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def peak_extra_bytes(provider: Provider) -> tuple[int | None, str]:
    """Peak resident memory of one call above what was resident before it, and how it was read.

    The kernel's high-water mark (VmHWM) is reset to the present size just before the call. Freed
    heap and what `release` frees are given back first, so they cannot hide an allocation; the
    packing buffers that a GEMM library keeps between calls are resident already and do not count.
    Exact to about 1 MiB: the kernel batches its page counters per thread. After an allocation that
    failed, malloc may serve from an arena that it cannot trim, and the peak comes out too small.
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
    """Bytes of the storages behind some tensors, each counted once."""
    storages = (value.untyped_storage() for value in outputs.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """Keep Python's collector, which may free someone's memory, out of the measured region."""
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
