"""Test the command line of the benchmark: each option, the written files, the errors."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from bench_rows import our_row

from tokfuse.bench import cli, compare, liger_csv, machine, numbers, ours, plan, plot, report
from tokfuse.bench.problem import Config, Problem
from tokfuse.bench.row import Row, check_one_machine
from tokfuse.runtime.core import dispatch

ROW = our_row(
    "policy_step",
    "step",
    "entropy=0",
    "4x16",
    median_ms=2.0,
    p20_ms=1.5,
    p80_ms=3.0,
    bytes_moved=8_000_000,
    flops=4_000_000,
    machine="Linux, 2 cores",
    cpu_model="a processor",
    isa="v3",
    timestamp="now",
    peak_extra_bytes=3 << 20,
    limit="copy",
    limit_share=0.5,
    tokfuse="0.1.0",
    threads=2,
)
TINY = ["policy_step", "--quick", "--rounds", "1", "--shapes", "4x33", "--dtype", "float32"]


def refusal(line: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        cli.main(line)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_rates_are_work_over_the_median() -> None:
    assert ROW.tokens_per_s == 2000.0 and ROW.gb_per_s == 4.0 and ROW.gflop_per_s == 2.0
    assert replace(ROW, median_ms=None).tokens_per_s is None
    line = report.line(ROW)
    assert all(text in line for text in ("1.5 - 3", "2000", "50%", " 4 ", " 2 "))
    fast = replace(ROW, median_ms=0.002, p20_ms=0.0015, p80_ms=0.003)
    assert "2.00 us" in report.line(fast) and "1.5 - 3 " in report.line(fast)
    text = report.markdown([replace(ROW, energy_mj=12.0)])
    assert "| tokens/s | GB/s | GFLOP/s | energy |" in text and "| 12 mJ |" in text


def test_files_are_written_as_rows_come(tmp_path: Path) -> None:
    rows, table, picture = (tmp_path / name for name in ("r.jsonl", "r.csv", "r.png"))
    files = ["--json", str(rows), "--csv", str(table), "--png", str(picture)]
    assert cli.main([*TINY, "--peers", "torch_eager,trl", *files]) == 0
    assert cli.main([*TINY, "--peers", "none", "--quiet", *files[:4]]) == 0  # appended
    kept = [Row.from_json(line) for line in rows.read_text().splitlines()]
    assert all("--json" not in row.command and str(tmp_path) not in row.command for row in kept)
    with table.open() as source:
        lines = list(csv.DictReader(source))
    assert tuple(lines[0]) == liger_csv.COLUMNS
    passed = [row for row in kept if row.status == "pass"]
    assert len([x for x in lines if x["metric_name"] == "speed"]) == len(passed)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_without_an_op_the_quick_sweep_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    assert cli.main(["--rounds", "1", "--peers", "none", "--no-errors", "--json", str(path)]) == 0
    assert "no op is named, so `bench all --quick` runs" in capsys.readouterr().err
    rows = [Row.from_json(line) for line in path.read_text().splitlines()]
    assert {(row.op, row.shape) for row in rows} == {
        (op, shape) for op, module in plan.CASES.items() for shape in module.QUICK_SHAPES
    }
    assert {row.command for row in rows} == {"python -m tokfuse bench all --quick --rounds 1 --peers none --no-errors"}


def test_several_backends_share_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.jsonl"
    line = [*TINY, "--backend", "cpu,reference", "--peers", "torch_eager", "--json", str(path)]
    assert cli.main(line) == 0
    rows = {row.provider: row for row in map(Row.from_json, path.read_text().splitlines())}
    for provider in ("tokfuse", "tokfuse_"):
        assert rows[f"cpu:{provider}"].backend == "cpu" and rows[f"cpu:{provider}"].status == "pass"
        assert rows[f"reference:{provider}"].backend == "reference"
        assert rows[f"reference:{provider}"].status == "fallback"
    assert "tokfuse" not in rows and rows["torch_eager"].baseline == "cpu:tokfuse_"
    assert rows["cpu:tokfuse_"].workspace_bytes is not None
    assert "must name some of cuda, triton, cpu, reference; got 'gpu'" in refusal(
        ["gae", "--backend", "cpu,gpu"], capsys
    )
    assert "must name one backend for errors; got cpu,reference" in refusal(
        ["errors", "--backend", "cpu,reference"], capsys
    )


def test_every_call_runs_on_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    monkeypatch.setattr(ours, "public", lambda name: lambda *a, **k: served.append(dispatch.forced_backend()))
    problem = Problem(Config("x", "y", "z", "float32", 1, 1), {}, {})
    problem.ours = {"tokfuse": lambda: ours.provider(lambda: ours.public("op")() or {})}
    for factory in ours.on_each_backend(problem, ("cpu", "reference")).ours.values():
        provider = factory()
        served.clear()
        provider.before()
        provider.run()
        assert served == [provider.backend]


def test_csv_has_ligers_columns_and_what_passed_only() -> None:
    speed, memory = liger_csv.lines(ROW)
    found = dict(zip(liger_csv.COLUMNS, speed, strict=True))
    assert (found["kernel_name"], found["kernel_operation_mode"]) == ("policy_step", "full")
    assert (found["y_value_50"], found["y_value_20"], found["y_value_80"]) == (2.0, 1.5, 3.0)
    assert (found["x_name"], found["x_value"], found["metric_unit"]) == ("V", 16, "ms")
    assert json.loads(str(found["extra_benchmark_config_str"]))["limit_share"] == 0.5
    assert memory[3:5] == ["memory", "MB"] and memory[8] == 3.0
    for status in ("fallback", "oom", "predicted"):
        assert liger_csv.lines(replace(ROW, status=status)) == []
    swept = liger_csv.lines(replace(ROW, sweep="rows", variant="rows=0.25"))[0]
    assert swept[5:8] == ["rows", "share of rows with gradient", "0.25"]


def test_a_fallback_is_marked_in_the_plot(tmp_path: Path, monkeypatch) -> None:
    seen: list[str] = []
    monkeypatch.setattr(plot, "_bars", lambda axes, group: seen.extend(r.status for r in group))
    plot.draw([ROW, replace(ROW, status="fallback"), replace(ROW, median_ms=None)], tmp_path / "p.png")
    assert sorted(seen) == ["fallback", "pass"]


def test_png_without_matplotlib_is_refused_before_anything_runs(monkeypatch, capsys) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "--png needs matplotlib" in refusal([*TINY, "--png", "x.png"], capsys)


def test_a_model_stands_for_its_sizes() -> None:
    assert plan.parse_shape("policy_step", "8xllama3", 2) == {"tokens": 8, "vocab": 128256}
    assert plan.parse_shape("policy_step_hidden", "8xgemma2", 3) == {"tokens": 8, "hidden": 2304, "vocab": 256000}
    with pytest.raises(ValueError, match="256x{smollm2, qwen2.5, llama3, gemma2}"):
        plan.parse_shape("policy_step", "8xgpt5", 2)


def test_a_forced_backend_serves_every_row_or_none(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    line = [*TINY, "--peers", "none", "--json", str(path), "--backend"]
    cli.main([*line, "reference"])
    cli.main([*line, "cuda"])
    rows = [Row.from_json(text) for text in path.read_text().splitlines()]
    ours = [row for row in rows if row.role == "ours"]
    assert [(r.status, r.backend) for r in ours] == [("fallback", "reference")] * 2 + [("unsupported", "")] * 2
    assert "cuda" in ours[-1].note


def test_a_gpu_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("a GPU is here")
    assert "--device cuda needs a CUDA device" in refusal([*TINY, "--device", "cuda"], capsys)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (["errors", "--csv", "x"], "--csv writes measured rows; errors measures none"),
        (["predict", "--png", "x"], "--png writes measured rows; predict measures none"),
        (["errors", "--device", "cuda"], "--device selects the device of measured rows; errors measures none"),
        (["predict", "--write", "x"], "--write is an option of numbers only"),
        (["predict", "gae"], "predict takes no further names; got gae"),
    ],
)
def test_what_would_be_ignored_is_refused(line: list[str], said: str, capsys) -> None:
    assert said in refusal(line, capsys)


def test_rows_of_two_machines_do_not_mix(tmp_path: Path, capsys) -> None:
    other = replace(ROW, cpu_model="another")
    with pytest.raises(ValueError, match="one machine; got 2: Linux, 2 cores / a processor / v3;"):
        check_one_machine([ROW, other], "x")
    check_one_machine([ROW, replace(other, status="predicted")], "x")  # belongs to no machine
    gpu = replace(ROW, device="cuda", gpu="H100")
    check_one_machine([ROW, gpu], "x")
    with pytest.raises(ValueError, match="one machine; got 2: H100; B200"):
        check_one_machine([ROW, gpu, replace(gpu, gpu="B200")], "x")
    path = tmp_path / "rows.jsonl"
    path.write_text(other.to_json() + "\n")
    assert "must be rows of one machine" in refusal([*TINY, "--json", str(path)], capsys)
    assert len(path.read_text().splitlines()) == 1
    path.write_text(other.to_json() + "\n" + ROW.to_json() + "\n")
    for command in ("numbers", "targets"):
        assert "must be rows of one machine" in refusal([command, str(path)], capsys)
    with pytest.raises(ValueError, match="one machine"):
        numbers.read([path])


def test_compare_goes_by_share_of_the_limit(tmp_path: Path, capsys) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(ROW.to_json() + "\n")
    # four times the seconds with a limit that is four times slower: a busy machine, not a regression
    new.write_text(replace(ROW, median_ms=8.0, limit_share=0.49).to_json() + "\n")
    assert cli.main(["compare", str(old), str(new)]) == 0
    assert "0.500 -> 0.490 of copy (-2.0%)" in capsys.readouterr().out
    new.write_text(replace(ROW, median_ms=2.0, limit_share=0.4).to_json() + "\n")
    assert cli.main(["compare", str(old), str(new)]) == 1 and "FELL" in capsys.readouterr().out
    assert cli.main(["compare", str(old), str(new), "--tolerance", "0.3"]) == 0
    new.write_text(replace(ROW, shape="8x16").to_json() + "\n")
    assert cli.main(["compare", str(old), str(new)]) == 1
    assert "no case is in both files" in capsys.readouterr().out


def test_compare_refuses(tmp_path: Path, capsys) -> None:
    old, new = tmp_path / "old.jsonl", tmp_path / "new.jsonl"
    old.write_text(ROW.to_json() + "\n")
    new.write_text("nonsense")
    assert "must be JSON lines of `bench --json`" in refusal(["compare", str(old), str(new)], capsys)
    assert "pass two files" in refusal(["compare", str(old)], capsys)
    new.write_text(replace(ROW, cpu_model="another").to_json())
    assert "one machine" in refusal(["compare", str(old), str(new)], capsys)


def test_compare_reads_pytest_benchmark(tmp_path: Path) -> None:
    path = tmp_path / "saved.json"
    extra = json.loads(ROW.to_json())
    path.write_text(json.dumps({"benchmarks": [{"extra_info": extra}, {"extra_info": {}}]}))
    assert list(compare.read(path).values()) == [ROW]


def test_facts_name_the_machine_and_its_versions() -> None:
    facts = machine.facts("a command")
    assert facts["gpu"] == facts["driver"] == "" and facts["torch"] and facts["cpu_model"]
    assert set(facts) <= set(Row.__dataclass_fields__)
