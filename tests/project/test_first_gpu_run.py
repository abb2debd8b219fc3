"""Test tools/first_gpu_run.py: the plan for a GPU, time limits, the recorded lines, and the summary."""

import dataclasses
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from bench_rows import our_row

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("first_gpu_run")
    for name in ("first_gpu_run", "torch_build", "typing_tree"):
        sys.modules.pop(name, None)


@pytest.fixture
def hopper(run):
    return run.Machine("NVIDIA H200", "90", cores=16, sanitizer=True, ncu=True)


def step(run, name: str, *scripts: str, share: int = 1, **options: object):
    return run.Step(name, options.pop("group", name), share, scripts, **options)


def test_the_plan_of_a_gpu(run, hopper, tmp_path):
    steps = {s.name: s for s in run.chosen(run.plan(hopper, tmp_path), None)}
    benchmarks = [f"bench {op}" for op in ("token_stats", "policy_step", "policy_step_hidden", "paired_divergence")]
    order = ["doctor", "smoke cuda", "smoke triton", "tests", "memcheck", "racecheck", *benchmarks, "graph", "ncu"]
    assert list(steps) == order
    assert sum(s.share for s in steps.values()) == 480  # seconds: the default 8 minutes
    assert run.MINUTES[False] == 8
    for tool in ("memcheck", "racecheck"):
        (script,) = steps[tool].scripts
        assert f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool {tool} --error-exitcode 1" in script
        assert script.endswith("tests/support/smoke.py --backend cuda")
    for name in benchmarks:
        (script,) = steps[name].scripts
        for words in ("--device cuda", "--backend cuda,triton", "--peers torch_compile", "--dtype bfloat16"):
            assert words in script
        assert "--shapes 8192xqwen2.5,4096xllama3" in script
    (graph,) = steps["graph"].scripts
    assert graph.count("--graph") == 2
    assert steps["ncu"].scripts[0].count("ncu --import") == len(run.PROFILED) == 3
    everything = " ".join(" ".join(s.scripts) for s in steps.values())
    assert "TOKFUSE_CUDA_HOST" not in everything and "TRITON_INTERPRET" not in everything and "pip" not in everything


def test_every_test_file_of_the_kernels_is_in_one_shard(run, hopper, tmp_path):
    (tests,) = (s for s in run.plan(hopper, tmp_path) if s.name == "tests")
    assert len(tests.scripts) == 8 and all("-m gpu" in script for script in tests.scripts)
    named = [word for script in tests.scripts for word in script.split() if word.startswith("tests/")]
    assert len(named) == len(set(named))
    # integrations/ has a GPU test only if its trainers are installed.
    wanted = {
        str(file.relative_to(ROOT))
        for file in (ROOT / "tests").rglob("test_*.py")
        if ("from harness import" in file.read_text() or "mark.gpu" in file.read_text())
        and not {"integrations", "project"} & set(file.parts)
    }
    assert len(wanted) > 20
    assert wanted <= set(named), wanted - set(named)


def test_a_dry_run_has_the_same_steps_on_the_cpu(run, hopper, tmp_path):
    dry = run.plan(run.Machine("", "90", cores=2, sanitizer=False, ncu=False), tmp_path)
    assert [s.name for s in dry] == [s.name for s in run.plan(hopper, tmp_path)]
    assert not any(s.needs for s in dry)
    scripts = " ".join(script for s in dry for script in s.scripts)
    assert "compute-sanitizer" not in scripts and "--device cuda --shapes 1024" in scripts and "--print" in scripts


def test_what_is_not_installed_is_recorded(run, hopper, tmp_path):
    bare = hopper._replace(sanitizer=False, ncu=False)
    steps = {s.name: s for s in run.plan(bare, tmp_path)}
    sanitizer, ncu = (run.run_step(steps[name], 5, tmp_path, {}) for name in ("memcheck", "ncu"))
    assert sanitizer["status"] == "missing" and "compute-sanitizer is not on the path" in sanitizer["detail"]
    assert ncu["status"] == "unavailable"
    assert "missing" not in run.OK and "unavailable" in run.OK


def test_groups(run, hopper, tmp_path):
    steps = run.plan(hopper, tmp_path)
    assert [s.name for s in run.chosen(steps, "build,synccheck,ncu")] == ["synccheck", "ncu"]
    assert len(run.chosen(steps, "bench")) == 4
    with pytest.raises(ValueError, match="--only must name some of build, doctor, .*; got 'benches'"):
        run.chosen(steps, "bench,benches")


def test_the_build_is_for_this_interpreter_and_this_gpu(run, hopper, tmp_path):
    script = run.build_script(hopper, tmp_path / "tree")
    assert f"-DPython_EXECUTABLE={sys.executable}" in script and "-DTOKFUSE_CUDA_ARCHITECTURES=90" in script
    assert f"-DTOKFUSE_OUTPUT_DIR={tmp_path}/tree/tokfuse" in script and "-DTOKFUSE_CUDA=ON" in script
    dry = run.build_script(hopper._replace(gpu=""), tmp_path / "tree")
    assert "-DTOKFUSE_CUDA=AUTO" in dry and dry.endswith("tests/support/cuda_module.py")
    assert "cuda_module" not in script
    architectures = {"8.0": "80", "8.9": "80", "9.0": "90", "10.3": "100", "11.0": "80", "12.1": "120"}
    assert {capability: run.arch_of(capability) for capability in architectures} == architectures


def test_a_failing_step_does_not_stop_the_others(run, tmp_path):
    steps = [
        step(run, "one", "echo said; exit 0"),
        step(run, "two", "exit 0", "echo bad; exit 3"),
        step(run, "three", "exit 1", optional=True),
        step(run, "four", "echo $MARK"),
    ]
    lines = run.run_all(steps, 60, tmp_path, {**os.environ, "MARK": "from the environment"})
    assert [line["status"] for line in lines] == ["pass", "fail", "unavailable", "pass"]
    assert lines[0]["detail"] == "said" and lines[3]["detail"] == "from the environment"
    written = [json.loads(text) for text in (tmp_path / "steps.jsonl").read_text().splitlines()]
    assert written == lines
    assert "bad" in (tmp_path / "two-1.log").read_text()


def test_a_step_ends_at_its_limit_with_its_children(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 1)
    # Shell and child ignore the interrupt, so both are killed.
    stubborn = f"trap '' INT; {sys.executable} -c 'import time; time.sleep(60)' & echo $! > {tmp_path}/pid; wait"
    start = time.monotonic()
    line = run.run_step(step(run, "slow", stubborn), 3.0, tmp_path, dict(os.environ))
    assert line["status"] == "timeout" and time.monotonic() - start < 30
    child = int((tmp_path / "pid").read_text())
    assert _holds(lambda: _ended(child), within_s=10)  # a process handles a signal only when it is scheduled


def test_who_stops_the_run_stops_its_step(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "_ended", lambda process, deadline: (_ for _ in ()).throw(KeyboardInterrupt))
    stopped = []
    monkeypatch.setattr(run, "_stop", stopped.extend)
    with pytest.raises(KeyboardInterrupt):
        run.run_step(step(run, "slow", "sleep 60"), 30, tmp_path, dict(os.environ))
    (process,) = stopped
    process.kill()
    process.wait()


def _holds(condition, within_s: float) -> bool:
    deadline = time.monotonic() + within_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return condition()


def _ended(pid: int) -> bool:
    """Return whether a process has ended or is a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except FileNotFoundError:
        return True


def test_an_interrupted_pytest_still_reports(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 120)
    test, log, started = (tmp_path / name for name in ("test_slow.py", "log", "started"))
    slow = f"open({str(started)!r}, 'w').close(); time.sleep(300)"
    test.write_text(f"import time\ndef test_a(): pass\ndef test_b(): {slow}\n")
    script = f"{sys.executable} -P -m pytest -q -p no:cacheprovider --rootdir {tmp_path} -c /dev/null {test}"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as in a job in the background
    try:
        run.hear_interrupts()
        with log.open("w") as sink:
            process = subprocess.Popen(
                ["bash", "-c", script], stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
            )
    finally:
        signal.signal(signal.SIGINT, before)
    assert _holds(started.exists, within_s=120)
    run._stop([process])
    assert run.totals([log]) == "1 passed, 0 failed"


def test_time_that_is_not_used_goes_to_the_later_steps(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 0)
    lines = run.run_all([step(run, "a", "true", share=3), step(run, "b", "true", share=1)], 40, tmp_path, {})
    assert lines[0]["limit_s"] == 30 and lines[1]["limit_s"] >= 39


def test_without_time_a_step_is_recorded_and_not_started(run, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "GRACE_S", 0)
    (line,) = run.run_all([step(run, "a", f"touch {tmp_path}/started")], 0.5, tmp_path, {})
    assert line["status"] == "no time" and not (tmp_path / "started").exists()
    assert "no time" not in run.OK


def test_the_totals_of_pytest_are_summed(run, tmp_path):
    texts = ["F\n2 failed, 10 passed, 3 skipped in 4.21s\n", "1 passed in 0.3s\n", "killed\n"]
    logs = [tmp_path / f"{i}.log" for i in range(3)]
    for log, text in zip(logs, texts, strict=True):
        log.write_text(text)
    assert run.totals(logs) == "11 passed, 2 failed, 3 skipped"
    assert run.totals(logs[2:]) == "0 passed, 0 failed"


ROW = our_row(
    "policy_step",
    "step",
    "entropy=0.01",
    "8192x151936",
    dtype="bfloat16",
    device="cuda",
    provider="cuda:tokfuse_",
    backend="cuda",
    median_ms=1.3,
    copy_ms=1.17,
    bytes_moved=2 * 2 * 8192 * 151936,
)


def test_the_summary_says_predicted_measured_and_share(run, tmp_path):
    head = {"op": "policy_step_hidden", "variant": "rows=1", "hidden": 896, "copy_ms": None, "backend": "triton"}
    rows = [
        ROW,
        dataclasses.replace(ROW, provider="torch_compile", role="peer", backend="torch", median_ms=5.2),
        dataclasses.replace(ROW, provider="limit_copy", role="limit", backend="torch", median_ms=1.17),
        dataclasses.replace(ROW, **head, limit="gemm", limit_share=0.75),
        dataclasses.replace(ROW, provider="triton:tokfuse", backend="triton", status="oom", median_ms=None, note="big"),
    ]
    (tmp_path / "bench.jsonl").write_text("".join(row.to_json() + "\n" for row in rows))
    (tmp_path / "ncu-policy_step-cuda.csv").write_text(NCU)
    lines = [{"step": "doctor", "status": "pass", "seconds": 1.0, "detail": "a | b"}]
    text = run.summary(lines, tmp_path, "NVIDIA H200")
    assert "| doctor | pass | 1.0 | a / b |" in text and "predicted, H200" in text
    ours, head, failed = (line for line in text.splitlines() if line.startswith("| policy_step"))
    # 2 T V of two bytes at 4.8 TB/s; 1.17 ms of a copy that moves as much.
    assert "| 1.037 ms | 1.300 ms | 90% | 4.00x tokfuse | pass |" in ours
    assert "| 75% of gemm |" in head
    assert "| 1.037 ms | - | - | - | oom big |" in failed
    assert text.endswith("ncu-policy_step-cuda: Duration 1.2 ms, DRAM Throughput 88.1 %\n")


def test_metrics_that_are_not_there(run):
    assert run.ncu_metrics("==ERROR== not permitted") == "no metrics"


NCU = """==PROF== Connected
"ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","policy_step_cluster_kernel","Duration","ms","1.2"
"0","policy_step_cluster_kernel","DRAM Throughput","%","88.1"
"""


def test_make_uses_the_same_path_without_network():
    for target, groups in (("test-gpu", "smoke,tests,memcheck,racecheck,synccheck,graph"), ("bench-gpu", "bench")):
        command = ["make", "-n", target, "OFFLINE=1"]
        done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
        assert f"tools/first_gpu_run.sh --only build,{groups}" in done.stdout and "bootstrap" not in done.stdout
