"""Run the same cases through pytest-benchmark: `pytest bench --benchmark-only`.

    OMP_WAIT_POLICY=passive pytest bench --benchmark-only --benchmark-json=new.json
    python -m tokfuse bench compare old.json new.json

The shapes are small by default; `TOKFUSE_BENCH_FULL=1` uses the published shapes. pytest-benchmark runs one
provider after the other, so a drift of the machine changes its ratios. `python -m tokfuse bench`
interleaves the providers.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterable, Iterator
from types import ModuleType
from typing import Any

import pytest

from tokfuse.bench import exact, machine, peers, runner
from tokfuse.bench.measure import ColdCache, Provider, peak_extra_bytes, tensor_bytes, time_once
from tokfuse.bench.problem import Config, Problem, Unsupported
from tokfuse.runtime.core.errors import BackendUnavailable

PEERS = ("torch_eager", "cross_entropy")


def parameters(modules: Iterable[ModuleType]) -> list[Any]:
    """Return one pytest parameter per op, case, dtype, shape and provider."""
    full = os.environ.get("TOKFUSE_BENCH_FULL", "0") not in ("", "0")
    return [
        pytest.param(module, config, name, id=f"{label}-{name}")
        for module in modules
        for label, config in _configs(module, module.SHAPES if full else module.QUICK_SHAPES)
        for name in (*getattr(module, "OURS", ("tokfuse",)), *PEERS)
    ]


def _configs(module: ModuleType, shapes: tuple[str, ...]) -> Iterator[tuple[str, Config]]:
    """Yield (label, configuration) of every case of an op with these shapes."""
    for shape in shapes:
        tokens, *hidden, vocab = (int(part) for part in shape.split("x"))
        for dtype in module.DTYPES:
            for mode, variant in module.CASES:
                config = Config(module.OP, mode, variant, dtype, tokens, vocab, hidden[0] if hidden else 0)
                yield f"{module.OP}-{mode}-{variant}-{dtype}-{shape}", config


def run(benchmark: Any, module: ModuleType, config: Config, name: str) -> None:
    """Time one provider of one case with pytest-benchmark, and restore the inputs before each round.

    The limits are timed once before each round, so that the share of the limit comes from the same seconds.
    `extra_info` is a whole `row.Row`, which `bench compare` reads.
    """
    problem = module.build(config, [name] if name in peers.KNOWN else [])
    factory = {**problem.ours, **problem.peers}[name]
    try:
        provider = factory()
    except (Unsupported, BackendUnavailable) as error:
        pytest.skip(str(error))
    entry = runner.Entry(name, "ours" if name in problem.ours else "peer", provider)
    entry.status = "fallback" if provider.fallback else "pass"
    provider.before()
    outputs = provider.run()
    entry.errors = exact.distances(outputs, problem.answer())
    entry.result_bytes = tensor_bytes(outputs)
    del outputs
    entry.peak = peak_extra_bytes(provider)
    limits = [runner.Entry(key, "limit", made) for key, made in _limits(problem).items()]
    cache = ColdCache(problem.cold)

    def setup() -> None:
        for limit in limits:
            assert limit.provider is not None
            limit.times.append(time_once(limit.provider, cache)[0])
        provider.before()
        cache.flush()

    benchmark.group = f"{config.op} {config.mode} {config.variant} {config.dtype} {config.shape}"
    benchmark.pedantic(provider.run, setup=setup, rounds=5, iterations=1, warmup_rounds=1)
    if benchmark.stats is not None:  # None with --benchmark-disable
        entry.times = [s * 1e3 / provider.calls for s in benchmark.stats.stats.data]
    row = runner.row_of(problem, entry, [entry, *limits], runner.Settings(5, _facts()))
    benchmark.extra_info.update(
        json.loads(row.to_json()), tokens_per_s=row.tokens_per_s, gb_per_s=row.gb_per_s, gflop_per_s=row.gflop_per_s
    )


def _limits(problem: Problem) -> dict[str, Provider]:
    """Return the limits that can be timed on this machine."""
    out = {}
    for name, factory in problem.limits.items():
        with contextlib.suppress(Unsupported):
            out[name] = factory()
    return out


@functools.cache
def _facts() -> dict[str, Any]:
    return machine.facts("pytest bench --benchmark-only")
