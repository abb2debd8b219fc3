"""Test `bench numbers` and `bench targets`: every statement about the rows is in the rows."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from bench_rows import our_row

from tokfuse.bench import cli, numbers, pictures, targets

ROOT = Path(__file__).resolve().parents[2]
RESULTS = sorted((ROOT / "bench" / "results").glob("*.jsonl"))
ROW = our_row(
    "policy_step_hidden",
    "step",
    "rows=1",
    "8x4x16",
    threads=2,
    median_ms=2.0,
    cpu_ms=4.0,
    peak_extra_bytes=5 << 20,
    result_bytes=3 << 20,
    cpu_model="a processor",
    command="tokfuse bench x --json r.jsonl",
)
PEER = replace(ROW, provider="trl", role="peer", median_ms=5.0, cpu_ms=6.0, note="computes no lse")
STUDY = {
    "data": "answers",
    "samples": 4,
    "kind": "direction",
    "score": "sketch",
    "slice": "all",
    "spearman": 0.5,
    "spearman_low": 0.25,
    "spearman_high": 0.75,
    "seeds": 8,
    "model": "a model",
}


COMMAND = (
    "run `python -m tokfuse bench numbers bench/results/*.jsonl --write README.md --write docs/performance.md "
    "--pictures docs/pictures`"
)


def test_pages_are_current() -> None:
    rows, study = numbers.read(RESULTS)
    readme, performance = (numbers.blocks((ROOT / name).read_text()) for name in ("README.md", "docs/performance.md"))
    assert rows and readme == {"headline": numbers.headline(rows)}, COMMAND
    assert performance == {"numbers": numbers.section(rows, study)}, COMMAND
    assert len(readme["headline"].splitlines()) == 2 + len(numbers.HEADLINES) + 4, "a headline has no rows"


@pytest.mark.parametrize("name", pictures.PICTURES)
def test_pictures_are_current(name: str) -> None:
    values = pictures.PICTURES[name][0](numbers.read(RESULTS)[0])
    assert values, "a picture shows nothing"
    for theme in pictures.THEMES:
        assert pictures.drawn(ROOT / "docs" / "pictures" / f"{name}-{theme.name}.svg") == values, COMMAND


def test_every_recorded_peer_of_the_case_is_in_the_picture() -> None:
    """Liger's GRPO loss is 10 times slower on a CPU and would hide the others; its row is in the tables."""
    rows = [row for row in numbers.read(RESULTS)[0] if pictures._case(row) == pictures.CASE and row.role != "limit"]
    shown = {row.provider for row in rows} - {"liger", "liger_compile", "cross_entropy"}
    assert shown == set(pictures.PROVIDERS)


def test_the_description_of_a_picture_is_its_values(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    op, variant, shape, dtype = pictures.CASE
    ours = replace(ROW, op=op, variant=variant, shape=shape, dtype=dtype, ratio=1.0)
    rows = [ours, replace(ours, provider="trl", role="peer", ratio=2.5), replace(ours, sweep="tokens", median_ms=9.0)]
    files = pictures.write(rows, tmp_path)
    assert len(files) == 2 * len(pictures.THEMES)
    assert pictures.drawn(tmp_path / "comparison-dark.svg") == {"tokfuse": [2.0, 1.0, 2.0], "TRL": [2.0, 2.5, 2.0]}
    assert pictures.drawn(tmp_path / "scaling-light.svg")["policy_step_hidden tokens ms"] == {"tokfuse": [[8.0, 9.0]]}
    first = files[0].read_bytes()
    assert pictures.write(rows, tmp_path)[0].read_bytes() == first
    (tmp_path / "other.svg").write_text("<svg/>")
    with pytest.raises(ValueError, match="write it again"):
        pictures.drawn(tmp_path / "other.svg")


def test_the_page_on_distillation_is_current() -> None:
    rows, study = numbers.read(sorted((ROOT / "bench" / "results" / "distillation").glob("*.jsonl")))
    assert rows and not study
    page = numbers.blocks((ROOT / "docs" / "distillation.md").read_text())
    assert page == {"numbers": numbers.section(rows, study)}, (
        "run `python -m tokfuse bench numbers bench/results/distillation/*.jsonl --write docs/distillation.md`"
    )


def test_the_table_of_distillation_compares_with_our_row() -> None:
    ours = replace(ROW, op="distill_step", variant="jsd,teacher=2x", median_ms=200.0)
    others = [
        replace(ours, provider="limit_gemm", role="limit", median_ms=180.0),
        replace(ours, provider="liger", role="peer", median_ms=500.0, peak_extra_bytes=13 << 20),
    ]
    text = numbers.section([ours, *others])
    assert "| 8 x 4 x 16 | jsd, teacher=2x | 200 ms, 2.0 MiB | 0.90x | - | 2.5x, 10.0 MiB | - | - | - |" in text


def test_tables_hold_what_the_rows_hold() -> None:
    gemm = replace(ROW, provider="limit_gemm", role="limit", median_ms=1.5)
    text = numbers.section([ROW, PEER, gemm, replace(PEER, provider="liger", status="error")], [STUDY])
    assert "| 8 x 4 x 16 | float32 | rows=1 | matrix products only | 1.5 (0.8x) | 1.0x | - | - |" in text
    assert "| tokfuse | 2.0 (1.0x) | 1.0x | 2.0 MiB | - |" in text
    assert "| trl | 5.0 (2.5x) | 1.5x | 2.0 MiB | computes no lse |" in text and "liger" not in text
    assert "| answers (4) | sketch | 0.50 (0.25 to 0.75) |" in text
    assert "a processor" in text and "- `tokfuse bench x`" in text


def test_the_study_is_read_next_to_its_controls() -> None:
    scores = {numbers.SKETCH: 0.5, numbers.HEAD: 0.75, numbers.NO_GRADIENT: 0.125}
    study = [STUDY | {"score": name, "spearman": v, "seeds": 1} for name, v in scores.items()]
    text = numbers.section([], study)
    assert "all layers. Sketch of rank 64: 0.50; true gradient of the lm_head: 0.75;" in text
    assert "mean hidden state (no gradient): 0.12." in text
    assert "correlation with" not in numbers.section([], study[:1])


def test_a_busy_machine_is_said_under_its_table() -> None:
    calm, busy = (numbers.section([replace(ROW, load_average=x)]) for x in (1.5, 12.0))
    assert "measuring: 1.5 to 1.5." in calm
    assert "measuring: 12.0 to 12.0; other work increased these times." in busy


def test_targets_pass_over_the_study(tmp_path, capsys) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(STUDY) + "\n" + ROW.to_json() + "\n")
    assert cli.main(["targets", str(path)]) == 0  # checks the workspace of 2 MiB
    assert "beyond its results" in capsys.readouterr().out


def test_the_price_of_influence_is_a_ratio_in_one_run() -> None:
    alone = replace(ROW, op="influence", variant="rank=64")
    sketches = replace(alone, provider="tokfuse_sketches", median_ms=2.5, cpu_ms=4.2)
    text = numbers.section([sketches, alone])
    assert "| rank=64 | with norms and sketches | 2.5 | 1.250x | 1.050x |" in text


def test_recorded_command_does_not_say_where_rows_go() -> None:
    line = cli.recorded_command(["gae", "--json", "/a/b", "--quick", "--json=/c"])
    assert line == "python -m tokfuse bench gae --quick"


def test_rows_of_a_sweep_stay_out_of_the_other_tables() -> None:
    swept = replace(ROW, sweep="tokens", median_ms=99.0, flops=1)
    text = numbers.section([ROW, swept])
    assert text.count("99.00 ms") == 1 and "### policy_step_hidden: tokens" in text


def test_numbers_are_written_between_the_markers(tmp_path, capsys) -> None:
    rows, page = tmp_path / "rows.jsonl", tmp_path / "page.md"
    rows.write_text(ROW.to_json() + "\n\n" + json.dumps(STUDY) + "\n")
    begin, end = numbers.MARKERS["numbers"]
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    assert cli.main(["numbers", str(rows), "--write", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert cli.main(["numbers", str(rows)]) == 0
    assert capsys.readouterr().out.strip() in text
    for text in ("no markers", f"{begin} without end", f"{begin}{end}{begin}{end}"):
        page.write_text(text)
        with pytest.raises(SystemExit):
            cli.main(["numbers", str(rows), "--write", str(page)])
        assert page.read_text() == text
    for line in (["numbers"], ["policy_step", "--write", str(page)], ["policy_step", "--pictures", str(tmp_path)]):
        with pytest.raises(SystemExit):
            cli.main(line)


def test_a_headline_compares_with_the_faster_baseline() -> None:
    ours = replace(
        ROW, op="policy_step_hidden", shape="128x896x151936", variant="rows=1", baseline="tokfuse", ratio=1.0
    )
    base = replace(ours, provider="torch_compile", role="peer", median_ms=150.0, ratio=3.25)
    text = numbers.headline([ours, base, replace(base, provider="torch_compile_f32", median_ms=160.0)])
    assert "| 128 x 896 x 151936, float32 | 2.0 ms, 2.0 MiB | torch.compile: 150 ms, 2.0 MiB | 3.2x |" in text
    assert "a processor" in text and numbers.headline([ours]) == ""


@pytest.mark.parametrize(
    ("goal", "row", "text", "met"),
    [
        (
            targets.Ceiling("o", "m", "v", "tokfuse", ("none", "base"), 2.0),
            {"median_ms": 3.0},
            "tokfuse / base = 1.500 (at most 2)",
            True,
        ),
        (
            targets.Ceiling("o", "m", "v", "tokfuse", ("base",), 1.2),
            {"median_ms": 3.0},
            "tokfuse / base = 1.500 (at most 1.2)",
            False,
        ),
        (
            targets.Floor("o", "m", "v", "tokfuse", 0.7),
            {"limit_share": 0.6, "limit": "read"},
            "tokfuse reaches 0.60 of read (at least 0.7)",
            False,
        ),
        (
            targets.Budget("o", "m", "v", "tokfuse", 1 << 20),
            {},
            "tokfuse uses 2.0 MiB beyond its results (at most 1)",
            False,
        ),
        (targets.Target("o", "m", "v", "tokfuse", "base", 0.5), {}, "base / tokfuse = 1.00 (at least 0.5)", True),
    ],
)
def test_every_kind_of_goal(goal: targets.Goal, row: dict, text: str, met: bool) -> None:
    ours = replace(ROW, op="o", mode="m", variant="v", **row)
    base = replace(ours, provider="base", role="peer", median_ms=2.0)
    (verdict,) = targets.judge([ours, base], [goal])
    assert verdict.text == text and verdict.is_good is met
    assert targets.judge([replace(ours, sweep="tokens")], [goal]) == []


def test_a_goal_without_rows_is_silent() -> None:
    goals = (
        targets.Ceiling("o", "m", "v", "tokfuse", ("base",), 1.0),
        targets.Floor("o", "m", "v", "tokfuse", 0.7),
        targets.Budget("o", "m", "v", "tokfuse", 1),
    )
    bare = replace(ROW, op="o", mode="m", variant="v", peak_extra_bytes=None)
    assert targets.judge([bare], goals) == []
