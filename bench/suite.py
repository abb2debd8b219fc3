"""Lets `pytest bench --benchmark-only` run the same cases through pytest-benchmark.

    OMP_WAIT_POLICY=passive pytest bench --benchmark-only --benchmark-group-by=group

Small shapes by default; `TOKFUSE_BENCH_FULL=1` takes the published ones. pytest-benchmark runs one
provider after the other, so its ratios carry the machine's drift; `python -m tokfuse bench`
interleaves them.
"""

import os
from types import ModuleType
from typing import Any

import pytest

from tokfuse.bench import exact, peers
from tokfuse.bench.measure import ColdCache
from tokfuse.bench.problem import Config, Unsupported
from tokfuse.runtime.errors import BackendUnavailable

PEERS = ("torch_eager", "cross_entropy")


def parameters(module: ModuleType) -> list[Any]:
    """One pytest parameter per case, dtype and provider of an op."""
    full = os.environ.get("TOKFUSE_BENCH_FULL", "0") not in ("", "0")
    out = []
    for shape in module.SHAPES if full else module.QUICK_SHAPES:
        sizes = [int(part) for part in shape.split("x")]
        for dtype in module.DTYPES:
            for mode, variant in module.CASES:
                config = Config(
                    module.OP, mode, variant, dtype, sizes[0], sizes[-1],
                    sizes[1] if len(sizes) == 3 else 0,
                )  # fmt: skip
                for name in (*getattr(module, "OURS", ("tokfuse",)), *PEERS):
                    label = f"{mode}-{variant}-{dtype}-{shape}-{name}"
                    out.append(pytest.param(config, name, id=label))
    return out


def run(benchmark: Any, module: ModuleType, config: Config, name: str) -> None:
    """Time one provider of one case with pytest-benchmark, restoring inputs before each round."""
    problem = module.build(config, [name] if name in peers.KNOWN else [])
    factory = {**problem.ours, **problem.peers}[name]
    try:
        provider = factory()
    except (Unsupported, BackendUnavailable) as error:
        pytest.skip(str(error))
    provider.before()
    errors = exact.distances(provider.run(), problem.answer())
    cache = ColdCache(problem.cold)

    def setup() -> None:
        provider.before()
        cache.flush()

    benchmark.group = f"{config.op} {config.mode} {config.variant} {config.dtype} {config.shape}"
    benchmark.extra_info.update(
        backend=provider.backend,
        status="fallback" if provider.fallback else "pass",
        calls=provider.calls,
        bytes_moved=problem.bytes_moved,
        flops=problem.flops,
        **{f"error_{key}": value for key, value in errors.items()},
    )
    benchmark.pedantic(provider.run, setup=setup, rounds=5, iterations=1, warmup_rounds=1)
