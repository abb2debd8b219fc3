"""Test `python -m tokfuse profile`: exact commands, the measured region, and a trace on the CPU."""

import json
import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tokfuse import __main__ as entry
from tokfuse.bench import profile
from tokfuse.runtime.core import ranges

TINY = ["token_stats", "--shapes", "4x33", "--dtype", "float32"]


def test_a_trace_on_the_cpu_has_our_ranges(tmp_path: Path, capsys) -> None:
    out = tmp_path / "trace"
    line = ["profile", *TINY, "--mode", "forward+backward", "--calls", "2", "-o", str(out)]
    assert entry.main(line) == 0
    printed = capsys.readouterr().out
    assert "Self CPU" in printed and f"trace: {out}.json" in printed
    names = [e.get("name") for e in json.loads(out.with_suffix(".json").read_text())["traceEvents"]]
    assert names.count("tokfuse::profile") == 1
    assert names.count("tokfuse::token_stats.fwd") == names.count("tokfuse::token_stats.bwd") == 2


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["--tool", "nsys", "--device", "cuda"],
            [
                "nsys profile -t cuda,nvtx,osrt,cublas -c cudaProfilerApi --capture-range-end=stop",
                "-o tokfuse-profile -f true",
            ],
        ),
        (["--tool", "nsys"], ["nsys profile -t nvtx,osrt -o tokfuse-profile"]),
        (
            ["--tool", "ncu", "--device", "cuda", "--kernel", "token.*", "-o", "r"],
            [
                "ncu --profile-from-start off --nvtx --nvtx-include tokfuse::token_stats.fwd/",
                "-k 'regex:token.*' -c 3 --set full -f -o r",
                "ncu --import r.ncu-rep",
            ],
        ),
        (
            ["--tool", "ncu", "--range", "token_stats.bwd", "--kernels", "7"],
            ["--nvtx-include tokfuse::token_stats.bwd/ -c 7"],
        ),
    ],
)
def test_the_exact_command_is_printed(arguments: list[str], wanted: list[str], capsys, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert profile.main([*TINY, *arguments, "--print"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("env TOKFUSE_NVTX=1 ")
    assert all(text in printed for text in wanted), printed
    inner = printed.splitlines()[0].split("-m tokfuse profile ")[1]
    assert inner.startswith("token_stats --shapes 4x33") and inner.endswith("--tool none")
    assert " -o " not in inner and "--print" not in inner


def test_an_absent_tool_says_what_to_install(monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    for tool, package in (("nsys", "nsight-systems-cli"), ("ncu", "nsight-compute")):
        assert profile.main([*TINY, "--tool", tool]) == 1
        said = capsys.readouterr()
        assert f"{tool} is not on the path" in said.err and package in said.err
        assert "--tool none" in said.out


def test_the_tool_runs_where_it_is(tmp_path: Path, monkeypatch, capfd) -> None:
    fake = tmp_path / "nsys"
    fake.write_text('#!/bin/sh\necho "NVTX=$TOKFUSE_NVTX $@"\nexit 3\n')
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert profile.main([*TINY, "--tool", "nsys"]) == 3
    assert "NVTX=1 profile -t nvtx,osrt" in capfd.readouterr().out


def test_the_region_lies_between_start_and_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    profiler = SimpleNamespace(start=lambda: seen.append("start"), stop=lambda: seen.append("stop"))
    monkeypatch.setattr(torch.cuda, "profiler", profiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: seen.append("wait"))
    config = SimpleNamespace(device="cuda")

    def failing() -> None:
        seen.append("work")
        raise RuntimeError("a kernel failed")

    with pytest.raises(RuntimeError):
        profile._region(failing, config)  # type: ignore[arg-type]
    assert seen == ["wait", "start", "work", "stop"]


def test_warm_up_stays_outside_the_region(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    fake = SimpleNamespace(range_push=seen.append, range_pop=lambda: seen.append("pop"))
    monkeypatch.setattr(ranges, "_nvtx", fake)
    assert profile.main([*TINY, "--tool", "none", "--calls", "2"]) == 0
    region = seen[seen.index("tokfuse::profile") :]
    assert region == ["tokfuse::profile", *["tokfuse::token_stats.fwd", "pop"] * 2, "pop"]
    assert len(seen) > len(region)


def test_what_cannot_be_profiled_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([*TINY, "--backend", "cuda", "--tool", "none"]) == 1
    assert "tokfuse cannot run this case" in capsys.readouterr().err
    assert profile.main([*TINY, "--provider", "tokfuse_", "--tool", "none"]) == 1
    assert "the case has tokfuse" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profile.main(["softmax"])
    assert "OP must be one of token_stats" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        profile.main([*TINY, "--mode", "backward"])
    assert "--mode must be one of forward, forward+backward" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit):
            profile.main([*TINY, "--device", "cuda"])
        assert "needs a CUDA device" in capsys.readouterr().err
