"""Run one problem: create the providers, check them against float64, time them and emit rows."""

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from tokfuse.bench import exact, machine
from tokfuse.bench.measure import ColdCache, Provider, interleave, peak_extra_bytes, percentile, tensor_bytes
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported
from tokfuse.bench.row import ERROR_NAMES, SCHEMA_VERSION, Row
from tokfuse.bench.telemetry import Sampler, Telemetry
from tokfuse.runtime.core.errors import BackendUnavailable

# Much larger than any rounding error, including bfloat16: a provider with a larger error computes something
# else. Log-probabilities in bfloat16 arithmetic are off by up to 0.1 at |logp| of 30.
GROSS_ERROR = 1.0
TELEMETRY_S = 1.0  # NVML updates its power reading at most ten times per second
NO_TELEMETRY = Telemetry("unavailable: the tensors are on the CPU")
COMPARED_WORK = tuple(name for name in ERROR_NAMES if not name.startswith("grad_"))
PROBE_NAMES = ("read", "copy", "exp", "gemm", "native")

Emit = Callable[[Row], None]


@dataclass
class Entry:
    """The state of a provider before its row is written."""

    name: str
    role: str
    provider: Provider | None = None
    status: str = "pass"
    note: str = ""
    outputs: frozenset[str] = frozenset()
    errors: dict[str, float] = field(default_factory=dict)
    peak: tuple[int | None, str] = (None, "")
    result_bytes: int | None = None
    times: list[float] = field(default_factory=list)
    cpu_times: list[float] = field(default_factory=list)
    telemetry: Telemetry | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of a measurement.

    Args:
        rounds: number of rounds per provider.
        facts: values that every row contains.
        budget_s: seconds that the rounds may take.
        compare: compare the results with float64.
        peak: measure the peak memory.
        energy: on a GPU, repeat each provider to read its energy.
        on_step: called with a description of each step.
        sampler: creates the object that reads the GPU.
    """

    rounds: int
    facts: dict[str, Any]
    budget_s: float = float("inf")
    compare: bool = True
    peak: bool = True
    energy: bool = True
    on_step: Callable[[str], None] = lambda text: None
    sampler: Callable[[], Sampler] = Sampler


def run_case(config: Config, build: Callable[[], Problem], settings: Settings, emit: Emit) -> None:
    """Create the inputs of one case and measure it. If the inputs do not fit into memory, emit a row that says so."""
    with machine.memory_guard():
        try:
            problem = build()
        except Exception as error:  # usually out of memory; the next case may still fit
            status, note = classify(error)
            entry = Entry("tokfuse", "ours", status=status, note=f"making the inputs: {note}")
            nothing = Problem(config, {}, {})
            emit(row_of(nothing, entry, [], settings))
            return
        run_problem(problem, settings, emit)


def run_problem(problem: Problem, settings: Settings, emit: Emit) -> None:
    """Measure one problem and emit one row per provider.

    Rows without timing (unsupported, out of memory, failed) are emitted at once. The other rows are emitted
    after the interleaved rounds.
    """
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()  # a previously compiled shape must not cause a recompilation
    entries = [Entry(name, role) for role, name, _ in _factories(problem)]
    for entry, (_, _, factory) in zip(entries, _factories(problem), strict=True):
        settings.on_step(f"{problem.config.shape} {entry.name}: first call")
        _prepare(entry, factory, problem, settings)
        if entry.provider is None:
            emit(row_of(problem, entry, [], settings))
    for entry in entries:
        if entry.role == "peer" and entry.provider is not None and not entry.note:
            entry.note = missing_outputs(entry.outputs, entries[0].outputs)
    problem.forget()  # the float64 answer may need gigabytes
    live = [entry for entry in entries if entry.provider is not None]
    load = machine.load_average()
    settings.on_step(f"{problem.config.shape}: {settings.rounds} rounds of {len(live)}")
    cpu_times: dict[str, list[float]] = {}
    times, failed = interleave(
        {e.name: e.provider for e in live if e.provider is not None},
        settings.rounds,
        ColdCache(problem.cold, problem.config.device),
        settings.budget_s,
        cpu_times,
    )
    for entry in live:
        entry.times, entry.cpu_times = times[entry.name], cpu_times.get(entry.name, [])
        if entry.name in failed:
            entry.status, entry.note = classify(failed[entry.name])
            entry.times = []
    for entry in live:
        if entry.times and settings.energy and problem.config.device != "cpu":
            entry.telemetry = _telemetry(entry, settings)
        emit(row_of(problem, entry, live, settings, load))


def _telemetry(entry: Entry, settings: Settings) -> Telemetry:
    """Return GPU readings while only one provider is repeated.

    Readings during the interleaved rounds could not be assigned to a provider.
    """
    assert entry.provider is not None
    settings.on_step(f"{entry.name}: energy")
    calls, start = 0, time.perf_counter()
    with settings.sampler() as sampler:
        while sampler.is_reading and time.perf_counter() - start < TELEMETRY_S:
            entry.provider.before()
            entry.provider.run()
            calls += 1
            if entry.provider.device == "cuda":
                torch.cuda.synchronize()
    sampler.result.calls = calls * entry.provider.calls
    return sampler.result


def missing_outputs(theirs: frozenset[str], ours: frozenset[str]) -> str:
    """Return a note that lists the outputs that a peer does not compute; "" if it computes all."""
    names = [name for name in COMPARED_WORK if name in ours - theirs]
    return f"computes no {', '.join(names)}" if names else ""


def classify(error: BaseException) -> tuple[str, str]:
    """Return status and note for an exception of a provider."""
    text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
    if isinstance(error, Unsupported):
        return "unsupported", str(error)
    if isinstance(error, (BackendUnavailable, NotImplementedError)):
        return "unsupported", text
    out_of_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    if out_of_memory or "can't allocate memory" in text or "out of memory" in text.lower():
        return "oom", text
    return "error", text


def _factories(problem: Problem) -> Iterator[tuple[str, str, Factory]]:
    groups = (("ours", problem.ours), ("limit", problem.limits), ("peer", problem.peers))
    for role, group in groups:
        for name, factory in group.items():
            yield role, name, factory


def _prepare(entry: Entry, factory: Factory, problem: Problem, settings: Settings) -> None:
    """Create the provider, run it once (this includes its compilation), compare it and measure its peak memory."""
    try:
        provider = factory()
        provider.device = problem.config.device
        provider.before()
        outputs = provider.run()
        entry.note, entry.outputs = provider.note, frozenset(outputs)
        if provider.fallback:
            entry.status = "fallback"
        if settings.compare and entry.role != "limit":
            entry.errors = exact.distances(outputs, problem.answer())
        entry.result_bytes = tensor_bytes(outputs)
        del outputs
        wrong = [n for n, value in entry.errors.items() if not value < GROSS_ERROR]
        if wrong:
            entry.status = "error"
            entry.note = f"wrong {', '.join(wrong)}; {entry.note}".rstrip("; ")
        if settings.peak:
            entry.peak = peak_extra_bytes(provider)
        entry.provider = provider
    except Exception as error:  # a peer may raise any exception; it becomes a row
        entry.status, entry.note = classify(error)


def row_of(problem: Problem, entry: Entry, live: list[Entry], settings: Settings, load: float | None = None) -> Row:
    config, provider = problem.config, entry.provider
    values: dict[str, Any] = {f"error_{n}": entry.errors.get(n) for n in ERROR_NAMES}
    unnamed = [error for name, error in entry.errors.items() if name not in ERROR_NAMES]
    values["error_output"] = max(unnamed, default=None)
    probes = {e.name.removeprefix("limit_"): e for e in live if e.role == "limit" and e.times}
    for name in PROBE_NAMES:
        if name in probes and f"{name}_ms" in Row.__dataclass_fields__:
            values[f"{name}_ms"] = _round(percentile(probes[name].times, 0.5))
    if entry.times:
        values |= _timing(entry)
        if entry.role != "limit":
            values |= _against_ours(entry, live)
        if entry.role == "ours" or (entry.role == "peer" and problem.bounds_peers):
            values |= _against_limit(problem, entry, probes)
    return Row(
        schema=SCHEMA_VERSION,
        op=config.op,
        mode=config.mode,
        variant=config.variant,
        shape=config.shape,
        tokens=config.tokens,
        hidden=config.hidden,
        vocab=config.vocab,
        dtype=config.dtype,
        device=config.device,
        provider=entry.name,
        role=entry.role,
        backend=provider.backend if provider else "",
        status=entry.status,
        note=entry.note,
        bytes_moved=problem.bytes_moved,
        bytes_formula=problem.bytes_formula,
        flops=problem.flops,
        flops_formula=problem.flops_formula,
        peak_extra_bytes=entry.peak[0],
        peak_method=entry.peak[1],
        result_bytes=entry.result_bytes,
        provider_version=provider.version if provider else "",
        load_average=load,
        **_readings(problem, entry),
        timestamp=machine.now(),
        **settings.facts,
        **values,
    )


def _readings(problem: Problem, entry: Entry) -> dict[str, Any]:
    """Return the telemetry columns."""
    if problem.config.device == "cpu":
        return {"telemetry": NO_TELEMETRY.status}
    if entry.telemetry is None:
        return {}
    got = entry.telemetry
    return {
        "telemetry": got.status,
        "throttle": ", ".join(got.throttle),
        "power_w": got.power_w,
        "sm_clock_mhz": got.sm_clock_mhz,
        "energy_mj": got.energy_per_call_mj,
    }


def _timing(entry: Entry) -> dict[str, Any]:
    return {
        "median_ms": _round(percentile(entry.times, 0.5)),
        "p20_ms": _round(percentile(entry.times, 0.2)),
        "p80_ms": _round(percentile(entry.times, 0.8)),
        "best_ms": _round(min(entry.times)),
        "cpu_ms": _round(percentile(entry.cpu_times, 0.5)) if entry.cpu_times else None,
        "rounds": len(entry.times),
    }


def _against_ours(entry: Entry, live: list[Entry]) -> dict[str, Any]:
    """Return the ratio to the first tokfuse provider, or nothing if that provider is a fallback."""
    base = next((e for e in live if e.role == "ours" and e.times), None)
    if base is None or base.status != "pass":
        return {}
    pairs = [a / b for a, b in zip(entry.times, base.times, strict=True)]
    ratio = percentile(entry.times, 0.5) / percentile(base.times, 0.5)
    return {
        "baseline": base.name,
        "ratio": _round(ratio),
        "ratio_p20": _round(percentile(pairs, 0.2)),
        "ratio_p80": _round(percentile(pairs, 0.8)),
    }


def _against_limit(problem: Problem, entry: Entry, probes: dict[str, Entry]) -> dict[str, Any]:
    """Return the slowest bound. "read+copy" is one bound that consists of two probes, one after the other."""
    bounds = {}
    for bound in problem.bounds:
        parts = bound.split("+")
        if all(part in probes for part in parts):
            bounds[bound] = sum(percentile(probes[part].times, 0.5) for part in parts)
    if not bounds:
        return {}
    name = max(bounds, key=bounds.__getitem__)
    share = bounds[name] / percentile(entry.times, 0.5)
    return {"limit": name, "limit_ms": _round(bounds[name]), "limit_share": _round(share)}


def _round(value: float) -> float:
    """Return six significant digits. More digits are noise and make rows hard to read."""
    return float(f"{value:.6g}")
