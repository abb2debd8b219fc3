"""Test `bench growth` and the case `influence`: plans, tables, and memory that includes the kept workspace."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from bench_rows import our_row

from tokfuse.bench import cli, growth, measure
from tokfuse.bench import plan as planning
from tokfuse.bench.row import Row

ROW = our_row(
    "policy_step_hidden",
    "step",
    "rows=1",
    "8x4x16",
    sweep="tokens",
    threads=2,
    median_ms=2.0,
    cpu_ms=3.0,
    flops=4_000_000_000,
    peak_extra_bytes=5 << 20,
    result_bytes=3 << 20,
)


def plan(*arguments: str) -> list[planning.Step]:
    return planning.make_growth_plan(cli.parser().parse_args(["growth", *arguments]))


def test_a_sweep_varies_one_axis() -> None:
    for sweep in growth.sweeps():
        points = list(sweep.points())
        for config, threads in points:
            same = replace(
                config, **{n: getattr(sweep.base, n) for n in ("variant", sweep.axis) if hasattr(sweep.base, n)}
            )
            assert same == sweep.base and (threads is None) == (sweep.axis != "threads")
        assert len({(config, threads) for config, threads in points}) == len(sweep.values) >= 2


def test_every_axis_has_a_sweep_and_axes_choose() -> None:
    assert {step.sweep for step in plan()} == set(growth.AXES)
    assert {step.sweep for step in plan("--axes", "threads,rows")} == {"threads", "rows"}
    assert {step.threads for step in plan("--axes", "threads")} == {1, 2}
    assert {step.config.variant for step in plan("--axes", "rows")} >= {"rows=1", "rows=0.25"}


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--axes", "tokens,time"], "tokens, vocab, hidden, threads, rows; got 'time'"),
        (["--shapes", "4x4"], "growth chooses its own cases, so --shapes must not be given"),
        (["--variant", "rows=1"], "--variant must not be given"),
        (["policy_step"], "growth takes no further names; got policy_step"),
    ],
)
def test_growth_refuses(arguments: list[str], text: str, capsys) -> None:
    with pytest.raises(SystemExit):
        cli.main(["growth", *arguments])
    assert text in capsys.readouterr().err


def test_axes_belong_to_growth(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["policy_step", "--axes", "tokens"])
    assert "--axes is an option of growth only" in capsys.readouterr().err


def test_several_ops_in_one_run() -> None:
    options = cli.parser().parse_args(["gae", "token_stats", "--quick"])
    assert [step.config.op for step in planning.make_plan(options)] == ["advantage"] + ["token_stats"] * 2
    options.names = ["gae", "softmax"]
    with pytest.raises(ValueError, match="one of token_stats, .*predict; got 'softmax'"):
        planning.make_plan(options)


def test_growth_rows_and_tables(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    path, before = tmp_path / "rows.jsonl", torch.get_num_threads()
    line = ["growth", "--quick", "--axes", "threads,rows", "--rounds", "1", "--md"]
    assert cli.main([*line, "--json", str(path)]) == 0
    assert torch.get_num_threads() == before
    rows = [Row.from_json(text) for text in path.read_text().splitlines()]
    assert {row.threads for row in rows if row.sweep == "threads"} == {1, 2}
    assert {row.variant for row in rows if row.sweep == "rows"} >= {"rows=0.25", "rows=1"}
    text = capsys.readouterr().out
    assert text.strip() == growth.tables(rows)
    assert "### policy_step_hidden: rows" in text and "### policy_step: threads" in text


def test_table_shows_time_per_work_and_workspace() -> None:
    larger = replace(ROW, tokens=16, median_ms=4.0, cpu_ms=6.0, flops=8_000_000_000, limit_share=0.5)
    peer = replace(ROW, provider="torch_eager", role="peer", ratio=3.0, result_bytes=0)
    lines = growth.tables([ROW, larger, peer, replace(ROW, sweep="")]).splitlines()
    assert lines[2] == "hidden 4, vocab 16, threads 2, float32, step, rows=1."
    assert lines[4].startswith("| tokens | tokfuse | CPU ms / GFLOP | of limit | workspace |")
    assert lines[6] == "| 8 | 2.00 ms | 0.750 | - | 2.0 MiB | 3.0 | 5.0 MiB |"
    assert lines[7] == "| 16 | 4.00 ms | 0.750 | 50% | 2.0 MiB | - | - |"


def test_workspace_of_an_op_in_place_is_its_whole_peak() -> None:
    assert ROW.workspace_bytes == 2 << 20
    assert replace(ROW, provider="tokfuse_").workspace_bytes == 5 << 20
    assert replace(ROW, result_bytes=None).workspace_bytes is None


def test_results_count_a_shared_storage_once() -> None:
    whole = torch.zeros(100)
    assert measure.tensor_bytes({"a": whole[:10], "b": whole, "c": torch.zeros(5)}) == 420


def test_peak_counts_the_kept_workspace_and_is_flat_in_tokens(tmp_path) -> None:
    """4096 rows of logits would be 128 MiB; the workspace holds at most 64 MiB of them.

    Runs in a separate process, because memory that other tests left in malloc's arenas could serve the workspace.
    """
    path = tmp_path / "rows.jsonl"
    command = "policy_step_hidden --shapes 512x16x8192,4096x16x8192 --variant rows=1 --rounds 1"
    options = ["--peers", "none", "--no-errors", "--json", str(path)]
    subprocess.run(
        [sys.executable, "-m", "tokfuse", "bench", *command.split(), *options],
        cwd=tmp_path,
        check=True,
        timeout=120,
        capture_output=True,
    )
    rows = [Row.from_json(line) for line in path.read_text().splitlines()]
    few, many = (row for row in rows if row.role == "ours")
    if few.workspace_bytes is None or few.status != "pass":
        pytest.skip(few.peak_method if few.status == "pass" else few.note)
    assert 8 << 20 < few.workspace_bytes < 24 << 20  # 512 x 8192 float32 are 16 MiB
    assert many.workspace_bytes < 72 << 20


def test_influence_agrees_with_float64(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    line = ["influence", "--shapes", "32x24x257", "--rounds", "1", "--peers", "none"]
    assert cli.main([*line, "--json", str(path)]) == 0
    rows = {row.provider: row for row in map(Row.from_json, path.read_text().splitlines())}
    assert rows["tokfuse"].error_output is None
    for name in ("tokfuse_norms", "tokfuse_sketches"):
        assert rows[name].error_output is not None and rows[name].error_output < 2e-5
        assert rows[name].baseline == "tokfuse" and rows[name].ratio is not None
