"""Test `pytest bench --benchmark-only`: the same cases and rows, and that `compare` reads them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tokfuse.bench import cli, compare
from tokfuse.bench.row import Row

ROOT = Path(__file__).resolve().parents[2]
PYTEST = str(Path(sys.executable).with_name("pytest"))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("suite") / "saved.json"
    line = [
        "bench",
        "--benchmark-only",
        f"--benchmark-json={path}",
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "forward-all-float32 and (tokfuse or eager) and not linear",
    ]
    # In a worker of xdist, the child process would act as a worker and disable benchmarks.
    outside = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    done = subprocess.run(
        [PYTEST, *line],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env=outside | {"TOKFUSE_BENCH_FULL": "0"},
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    return path


def test_groups_and_extra_info_are_rows(saved: Path) -> None:
    whole = json.loads(saved.read_text())
    assert whole["machine_info"]["tokfuse"]["cpu_model"]
    groups = {bench["group"] for bench in whole["benchmarks"]}
    assert groups == {"token_stats forward all float32 64x8192"}
    rows = {b["extra_info"]["provider"]: b["extra_info"] for b in whole["benchmarks"]}
    assert set(rows) == {"tokfuse", "torch_eager"}
    ours = Row.from_json(json.dumps(rows["tokfuse"]))
    assert (
        ours.role == "ours" and ours.median_ms and ours.tokens_per_s == pytest.approx(rows["tokfuse"]["tokens_per_s"])
    )
    assert ours.read_ms and ours.limit in ("read", "exp") and ours.limit_share
    assert ours.error_logp is not None and ours.error_logp < 2e-5 and ours.rounds == 5


def test_compare_reads_what_the_suite_saved(saved: Path, capsys) -> None:
    assert len(compare.read(saved)) == 1  # tokfuse
    assert cli.main(["compare", str(saved), str(saved)]) == 0
    assert "kept token_stats forward all 64x8192" in capsys.readouterr().out
