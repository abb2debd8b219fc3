"""Test tune: the candidates, the choice, and the stored table.

Times are recorded values, so the test checks the choice and not a clock. Tests that compile candidates are
marked `compiler`; the whole command on a device is marked `gpu`.
"""

import dataclasses
import json
import re

import pytest
import torch

import tokfuse
from tokfuse.inspection import kernel_table, tune
from tokfuse.runtime.backends import triton_backend

pytest.importorskip("triton")
from tokfuse.triton_kernels import compile_cases, launch  # noqa: E402

needs_compiler = pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter is on: no compiler")
RECORD = launch.LaunchConfig(block_v=4096, num_warps=8)


@pytest.fixture(autouse=True)
def _untuned(monkeypatch):
    """Every kernel file declares its records. Records that a test loads are removed again."""
    compile_cases.cases()
    monkeypatch.setattr(launch, "TUNED", {})


def test_candidates_are_valid_and_near_the_record_in_use(monkeypatch):
    piped = launch.LaunchConfig(block_t=128, block_v=64, block_h=32, num_warps=8, num_stages=4)
    monkeypatch.setitem(launch.DEFAULTS, "plain_fwd", {80: RECORD})
    monkeypatch.setitem(launch.DEFAULTS, "piped_fwd", {80: piped})
    plain = launch.candidates("plain_fwd", 90)
    assert plain[0] == RECORD and len(plain) == len(set(plain))
    assert {c.block_v for c in plain} == {1024, 2048, 4096, 8192, 16384}
    assert {c.num_warps for c in plain} == {2, 4, 8, 16, 32}
    assert {(c.block_t, c.block_h, c.num_stages) for c in plain} == {(1, 1, 1)}
    assert all(launch.invalid(c) is None for c in plain)
    # 1024 elements are enough for 32 warps of 32 threads. Half of that would not be.
    assert launch.LaunchConfig(block_v=1024, num_warps=32) in plain
    assert {c.num_stages for c in launch.candidates("piped_fwd", 90)} == {2, 3, 4, 5}
    with launch.trial("plain_fwd", 90, plain[1]):
        assert launch.candidates("plain_fwd", 90)[0] == plain[1]
        assert launch.default("plain_fwd", 80) == RECORD
    assert launch.default("plain_fwd", 90) == RECORD


@needs_compiler
def test_every_record_has_a_case_to_be_timed_on():
    found = tune.problems()
    assert found.keys() == launch.DEFAULTS.keys()
    case, dtype = found["token_stats_fwd"]
    assert case.name.startswith("token_stats_fwd") and dtype == torch.bfloat16
    assert found["linear_merge"][0].name.startswith("linear_token_stats")


def test_a_case_with_real_tensors_has_valid_ids_and_borders():
    with compile_cases.on_device("cpu"):
        assert compile_cases.borders(4, 64).tolist() == [0, 16, 32, 48, 64]
        ids = compile_cases.meta(3000, dtype=torch.int64)
        assert (int(ids.min()), int(ids.max())) == (0, 1023)
        assert compile_cases.meta(16, dtype=torch.bool).sum() == 14
        assert compile_cases.meta(8, 8, dtype=torch.bfloat16).isfinite().all()
    assert compile_cases.meta(4).is_meta and compile_cases.borders(4, 64).is_meta


def recorded(monkeypatch, seconds):
    """Return a timer that knows the time of each record, and candidates that need no compiler."""
    records = [dataclasses.replace(RECORD, block_v=RECORD.block_v << i) for i in range(3)]

    def admitted(kernel, capability):
        for i, config in enumerate(records):
            yield tune.Candidate(config, (), "spills 8 bytes" if i == 2 else "")

    monkeypatch.setattr(tune, "admitted", admitted)
    monkeypatch.setattr(tune, "problems", lambda: {"token_stats_fwd": (None, torch.float32)})
    timed = []

    def timer(call):
        timed.append(launch.default("token_stats_fwd", 90))
        return seconds[records.index(timed[-1])]

    return records, timed, timer


@pytest.mark.parametrize(("seconds", "best"), [([1.0, 0.9], 1), ([1.0, 0.99], 0), ([1.0, 2.0], 0)])
def test_the_fastest_wins_if_it_is_faster_than_noise(seconds, best, monkeypatch):
    records, timed, timer = recorded(monkeypatch, [*seconds, 0.1])
    choice = tune.measure("token_stats_fwd", 90, timer, device="cpu")
    assert timed == records[:2]  # each with its own record; candidates with spills are not timed
    assert choice.best == records[best]
    assert launch.TUNED == {}


def test_what_is_stored_is_what_is_loaded(monkeypatch, tmp_path, capsys):
    records, _, timer = recorded(monkeypatch, [1.0, 0.5, 0.1])
    path = tmp_path / "deep" / "table.json"
    assert tune.tune(["token_stats_fwd"], "NVIDIA H100", 90, path, timer) == 0
    assert "1000000.0 us, best of 2 500000.0 us" in capsys.readouterr().out
    table = json.loads(path.read_text())
    assert (table["device"], table["capability"]) == ("NVIDIA H100", 90)
    assert table["records"]["token_stats_fwd"]["shipped_seconds"] == 1.0
    assert launch.default("token_stats_fwd", 90) == RECORD  # only on request
    assert tokfuse.load_tuned(path) == {"token_stats_fwd": records[1]}
    assert launch.default("token_stats_fwd", 90) == records[1]
    assert launch.default("token_stats_fwd", 80) == RECORD


def test_a_table_per_device_in_the_cache_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = tune.default_path("NVIDIA H100 80GB HBM3")
    assert path == tmp_path / "tokfuse" / "tuned" / "nvidia-h100-80gb-hbm3.json"
    monkeypatch.setattr(tune, "_device", lambda: ("NVIDIA H100 80GB HBM3", 90))
    path.parent.mkdir(parents=True)
    path.write_text(tune.as_json("NVIDIA H100 80GB HBM3", 90, []))
    assert tokfuse.load_tuned() == {}


GOOD = {"format": 1, "device": "NVIDIA H200", "capability": 90, "triton": "3.7.1"}
FIELDS = dataclasses.asdict(RECORD)
REFUSALS = [
    ("not json", "load_tuned: path must be a table in JSON"),
    ([1], "load_tuned: path must be a table of format 1; got "),
    (GOOD | {"format": 2}, "load_tuned: path must be a table of format 1; got 2"),
    (GOOD | {"records": {"no_such": FIELDS}}, "load_tuned: path must be a table of kernels among"),
    (
        GOOD | {"records": {"token_stats_fwd": FIELDS | {"block_v": 3000}}},
        "LaunchConfig: blocks and num_warps must be powers of two",
    ),
]


@pytest.mark.parametrize(("content", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_a_bad_table_is_refused_and_changes_nothing(content, message, tmp_path):
    path = tmp_path / "table.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError) as error:
        tokfuse.load_tuned(path)
    assert str(error.value).startswith(message) and launch.TUNED == {}


def test_a_table_that_is_missing_or_of_another_device_is_refused(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="path must be a readable table; got .*Run python -m"):
        tokfuse.load_tuned(tmp_path / "none.json")
    path = tmp_path / "table.json"
    path.write_text(json.dumps(GOOD | {"records": {}}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="path must be given if there is no CUDA device"):
        tokfuse.load_tuned()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tune, "_device", lambda: ("NVIDIA A100", 80))
    with pytest.raises(ValueError, match=r"capability 80, this device's; got 90 \(NVIDIA H200\)"):
        tokfuse.load_tuned(path)


@needs_compiler
@pytest.mark.compiler
def test_a_dry_run_lists_candidates_with_their_resources(monkeypatch, capsys):
    two = [launch.default("whiten", 90), launch.LaunchConfig(block_t=2048, num_warps=4)]
    same = dataclasses.replace(two[1], block_v=2)  # the kernel has no such axis
    monkeypatch.setattr(launch, "candidates", lambda kernel, capability: [*two, same])
    assert tune.main(["whiten", "--dry-run"]) == 0
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.startswith("whiten, timed on whiten") and head.endswith("in float32, sm_90:")
    assert "1024 x 1 x 1, 4 warps, 1 stages" in first and "in use" in first
    assert "2048 x 1 x 1" in second and "whiten_kernel: " in second and " reg, " in second


def test_what_spills_or_does_not_fit_is_not_tried():
    row = kernel_table.committed()[0]
    for capability, fields, reason in (
        (90, {"spill_bytes": 8}, "spills 8 bytes"),
        (80, {"shared_bytes": 200 << 10}, "needs 204800 bytes of shared memory, the limit is 166912"),
        (90, {"shared_bytes": 200 << 10, "spill_bytes": 0}, ""),
    ):
        found = tune._refusal([dataclasses.replace(row, **fields)], capability)
        assert found == (reason and f"{row.kernel} {reason}")


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no_such"], "kernels must be among .*got no_such"),
        (["--dry-run", "--output", "x"], "--output must be left out with --dry-run"),
        (["--capability", "90"], "--capability must be left out without --dry-run"),
        (["whiten"], "there is no CUDA device; use --dry-run to list"),
    ],
)
def test_the_command_refuses(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        tune.main(arguments)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tuning_on_a_device(tmp_path):
    """Every case runs on real tensors. Results with tuned records equal the results before."""
    x = torch.randn(5000, device="cuda")
    with tokfuse.backend("triton"):
        before = tokfuse.whiten(x)
        path = tmp_path / "table.json"
        assert tune.main(["whiten", "partial_moments", "--output", str(path)]) == 0
        assert tokfuse.load_tuned(path).keys() == {"whiten", "partial_moments"}
        torch.testing.assert_close(tokfuse.whiten(x), before)
    with compile_cases.on_device("cuda"):
        for case in compile_cases.cases():
            case.call(case.dtypes[0])
    torch.cuda.synchronize()
