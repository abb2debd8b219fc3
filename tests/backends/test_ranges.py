"""Test the profiler ranges of the ops: stable names, forward and backward, eager and compiled, worker processes."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from op_calls import SMALL, Problem, calls
from torch.profiler import ProfilerActivity, profile

import tokfuse
from tokfuse.runtime.core import dispatch, ranges

LOGITS, TARGET = torch.randn(6, 16), torch.arange(6)
CALLS = {call.name: call for call in calls(options="rich") if call.row.ranged and call.option in ("", "stats")}


def names_of(call: Callable[[], Any]) -> list[str]:
    """Return the names of tokfuse's ranges while `call` runs, in the order of their starts."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        call()
    events = [e for e in recorded.events() if e.name.startswith(ranges.PREFIX)]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


@pytest.mark.parametrize("name", CALLS)
def test_forward_and_backward_are_named(name: str) -> None:
    call = CALLS[name]
    given = call.arguments(Problem(SMALL))
    outer = f"tokfuse::{call.row.function}"
    names = [n for n in names_of(lambda: call.apply(given)) if n.startswith(outer)]
    assert names == ([f"{outer}.fwd", f"{outer}.bwd"] if call.row.differentiable else [f"{outer}.fwd"])


def test_every_backend_is_named() -> None:
    with dispatch.backend("reference"):
        assert "tokfuse::token_stats.fwd" in names_of(lambda: CALLS["token_stats"].run(Problem(SMALL)))


def test_compiled_code_has_the_ranges_of_its_custom_ops() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return tokfuse.token_stats(logits, TARGET).logp.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(LOGITS.clone().requires_grad_()).backward()
    names = names_of(lambda: compiled(LOGITS.clone().requires_grad_()).backward())
    assert {"tokfuse::token_stats.fwd", "tokfuse::token_stats.bwd"} <= set(names)


def test_every_public_op_is_ranged() -> None:
    """An op without the decorator would be missing in every profile."""
    functions = {call.row.function: call.function() for call in CALLS.values()}
    assert len(functions) > 15
    for name, function in functions.items():
        while isinstance(function, type(names_of)) and hasattr(function, "__wrapped__"):
            labels = [c.cell_contents for c in function.__closure__ or ()]
            if f"tokfuse::{name}.fwd" in labels:
                break
            function = function.__wrapped__
        else:
            pytest.fail(f"{name} has no range")


def test_nvtx_ranges_nest_and_close_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fake = SimpleNamespace(range_push=seen.append, range_pop=lambda: seen.append("pop"))
    monkeypatch.setattr(ranges, "_nvtx", fake)
    with pytest.raises(ValueError):
        tokfuse.token_stats(LOGITS, TARGET[:2])
    assert seen == ["tokfuse::token_stats.fwd", "pop"]


@pytest.mark.parametrize(
    ("environment", "wanted"),
    [
        ({}, False),
        ({"TOKFUSE_NVTX": "1"}, True),
        ({"NVTX_INJECTION64_PATH": "/x.so"}, True),
        ({"NVTX_INJECTION64_PATH": "/x.so", "TOKFUSE_NVTX": "0"}, False),
    ],
)
def test_the_environment_decides_about_nvtx(
    environment: dict[str, str], wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TOKFUSE_NVTX", "NVTX_INJECTION64_PATH"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ranges.nvtx_wanted() is wanted


WORKER = """
import multiprocessing, torch
def work(queue):
    import tokfuse
    tokfuse.token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    import nvtx
    queue.put(nvtx.seen)
if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    worker = context.Process(target=work, args=(queue,))
    worker.start()
    print(queue.get(timeout=60))
    worker.join()
"""


def test_a_worker_inherits_the_ranges(tmp_path: Path) -> None:
    """A trainer's worker is a new process that imports by name and gets only the environment."""
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch brings its own NVTX")
    (tmp_path / "nvtx.py").write_text(
        "seen = []\ndef push_range(name): seen.append(name)\ndef pop_range(): seen.append('pop')\n"
    )
    (tmp_path / "main.py").write_text(WORKER)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"TOKFUSE_NVTX": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(
        [sys.executable, "main.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "['tokfuse::token_stats.fwd', 'pop']", done.stderr[-2000:]


def test_a_missing_nvtx_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    if torch.version.cuda is not None:
        pytest.skip("a CUDA build of torch brings its own NVTX")
    monkeypatch.setenv("TOKFUSE_NVTX", "1")
    monkeypatch.setitem(sys.modules, "nvtx", None)
    with pytest.warns(RuntimeWarning, match="NVTX ranges are requested but disabled: torch is a CPU build"):
        assert ranges._load_nvtx() is None
