"""Ranges of the ops in profiles: stable names, both directions, eager and compiled, workers."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import tokfuse
from tokfuse.runtime.core import dispatch, ranges

TOKENS, VOCAB, HIDDEN = 6, 16, 8
LOGITS, HEAD = torch.randn(TOKENS, VOCAB), torch.randn(VOCAB, HIDDEN)
STATES, TARGET = torch.randn(TOKENS, HIDDEN), torch.arange(TOKENS)
CU = torch.tensor([0, 2, TOKENS], dtype=torch.int32)
POLICY = {
    "old_logp": torch.zeros(TOKENS),
    "advantage": torch.ones(TOKENS),
    "objective": tokfuse.Objective(),
    "normalizer": 6.0,
}


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_()


CALLS: dict[str, Callable[[], Any]] = {
    "token_stats": lambda: tokfuse.token_stats(leaf(LOGITS), TARGET).logp.sum(),
    "linear_token_stats": lambda: tokfuse.linear_token_stats(leaf(STATES), leaf(HEAD), TARGET).logp.sum(),
    "kept_token_stats": lambda: tokfuse.kept_token_stats(
        leaf(LOGITS), TARGET, TARGET, torch.arange(TOKENS + 1)
    ).logp.sum(),
    "paired_divergence": lambda: tokfuse.paired_divergence(leaf(LOGITS), LOGITS).sum(),
    "policy_loss": lambda: tokfuse.policy_loss(leaf(torch.zeros(TOKENS)), **POLICY).loss,
    "policy_step": lambda: tokfuse.policy_step(logits=leaf(LOGITS), target=TARGET, **POLICY).loss,
    "segment_moments": lambda: tokfuse.segment_moments(leaf(torch.ones(TOKENS)), cu_seqlens=CU).sum.sum(),
}
WITHOUT_BACKWARD: dict[str, Callable[[], Any]] = {
    "policy_step_": lambda: tokfuse.policy_step_(LOGITS.clone(), target=TARGET, **POLICY),
    "gae": lambda: tokfuse.gae(torch.ones(TOKENS), torch.ones(TOKENS), cu_seqlens=CU),
    "whiten": lambda: tokfuse.whiten(torch.randn(TOKENS)),
    "group_advantage": lambda: tokfuse.group_advantage(torch.ones(4), torch.tensor([0, 0, 1, 1]), kind="grpo"),
    "influence.head_norms": lambda: tokfuse.influence.head_norms(torch.ones(TOKENS), STATES),
}


def names_of(call: Callable[[], Any]) -> list[str]:
    """Names of our ranges while `call` runs, in the order of their starts."""
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as recorded:
        call()
    events = [e for e in recorded.events() if e.name.startswith(ranges.PREFIX)]
    return [e.name for e in sorted(events, key=lambda e: e.time_range.start)]


@pytest.mark.parametrize("op", CALLS)
def test_forward_and_backward_are_named(op: str) -> None:
    names = names_of(lambda: CALLS[op]().backward())
    assert [n for n in names if n.endswith((".fwd", ".bwd"))] == [f"tokfuse::{op}.fwd", f"tokfuse::{op}.bwd"]


@pytest.mark.parametrize("op", WITHOUT_BACKWARD)
def test_forward_is_named(op: str) -> None:
    assert f"tokfuse::{op}.fwd" in names_of(WITHOUT_BACKWARD[op])


def test_step_from_hidden_states_is_named() -> None:
    def step() -> None:
        arguments = {"hidden": leaf(STATES), "weight": leaf(HEAD), "target": TARGET}
        tokfuse.policy_step(**arguments, **POLICY).loss.backward()

    assert names_of(step)[0] == "tokfuse::policy_step.fwd"
    assert names_of(step)[-1] == "tokfuse::policy_step.bwd"


def test_every_backend_is_named() -> None:
    with dispatch.backend("reference"):
        assert "tokfuse::token_stats.fwd" in names_of(CALLS["token_stats"])


def test_compiled_code_has_the_ranges_of_its_custom_ops() -> None:
    def loss(logits: torch.Tensor) -> torch.Tensor:
        return tokfuse.token_stats(logits, TARGET).logp.sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    compiled(leaf(LOGITS)).backward()
    names = names_of(lambda: compiled(leaf(LOGITS)).backward())
    assert {"tokfuse::token_stats.fwd", "tokfuse::token_stats.bwd"} <= set(names)


def test_every_public_op_is_ranged() -> None:
    """An op without the decorator would be missing from every profile."""
    ops = [
        name for name, module in tokfuse._PUBLIC.items() if name.islower() and module.startswith("tokfuse.runtime.ops.")
    ]
    functions = {name: getattr(tokfuse, name) for name in ops}
    functions |= {
        f"influence.{n}": getattr(tokfuse.influence, n) for n in ("logit_norms", "head_norms", "hidden_norms", "sketch")
    }
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
    """A trainer's worker: a fresh process that imports by name and knows the environment only."""
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
    with pytest.warns(RuntimeWarning, match="NVTX ranges are asked for, but torch is a CPU build"):
        assert ranges._load_nvtx() is None
