"""Test the report page: its content, its errors, and that it works in a real browser."""

import re
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_rows import our_row

from tokfuse import __main__ as entry
from tokfuse.bench import page, predict, svg
from tokfuse.inspection import kernel_table

ROW = our_row(
    "policy_step",
    "step",
    "entropy=0.01",
    "4x49152",
    median_ms=2.0,
    p20_ms=1.5,
    p80_ms=3.0,
    bytes_moved=8_000_000,
    flops=35_000_000,
    copy_ms=1.0,
    machine="Linux, 2 cores",
    cpu_model="a processor",
    isa="v3",
    limit="copy",
    limit_share=0.5,
    peak_extra_bytes=5 << 20,
    result_bytes=3 << 20,
    threads=2,
    command="python -m tokfuse bench policy_step",
)
PEER = replace(ROW, provider="trl", role="peer", median_ms=9.0, note="computes no <lse>")
SWEPT = [
    replace(ROW, sweep=axis, tokens=tokens, vocab=vocab, variant=variant, median_ms=ms, shape=f"{tokens}x{vocab}")
    for axis, tokens, vocab, variant, ms in [
        ("tokens", 4, 16, "v", 1.0),
        ("tokens", 8, 16, "v", 2.0),
        ("vocab", 4, 16, "v", 1.0),
        ("vocab", 4, 64, "v", 3.0),
        ("rows", 4, 16, "rows=0.25", 1.0),
        ("rows", 4, 16, "rows=1", 2.0),
    ]
]
ROWS = [
    replace(PEER, provider="absent", status="unsupported", median_ms=None, note="not installed"),
    ROW,
    PEER,
    replace(PEER, provider="verl", median_ms=30.0),
    replace(ROW, provider="tokfuse_", status="fallback", backend="reference", median_ms=1.0),
    *SWEPT,
    *predict.rows(),
]


class Outline(HTMLParser):
    """Collects open tags, table cells by table, and everything that the page would load from other servers."""

    VOID = {"meta", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self._table: list[list[str]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.loaded += [v for k, v in attributes if k in ("src", "href") and v]
        if tag == "table":
            self._table = self.tables[found["id"] or ""] = []
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        pass

    def handle_data(self, data: str) -> None:
        if self._table and self._table[-1] and "table" in self.open:
            self._table[-1][-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    return page.page(ROWS)


def test_it_is_one_well_formed_file(text: str) -> None:
    outline = Outline(text)
    assert outline.open == [] and outline.loaded == []
    assert "http" not in re.sub(r"<svg.*?</svg>", "", text)
    assert set(outline.tables) == {"summary", "rows", "growth", "predicted"}


def test_the_summary_compares_with_the_fastest_other_and_no_fallback(text: str) -> None:
    head, *lines = Outline(text).tables["summary"]
    assert len(lines) == 1
    found = dict(zip(head, lines[0], strict=True))
    assert found["tokfuse"] == "tokfuse (cpu)" and found["fastest other"] == "trl"
    assert found["speedup"] == "4.50" and found["of limit"] == "50%"
    assert found["shape"] == "4 x 49152 (smollm2)" and found["not computed by it"] == "computes no <lse>"


def test_every_measured_row_is_there_with_its_status(text: str) -> None:
    head, *lines = Outline(text).tables["rows"]
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert {r["provider"]: r["status"] for r in rows} == {
        "tokfuse": "pass",
        "trl": "pass",
        "verl": "pass",
        "absent": "unsupported",
        "tokfuse_": "fallback",
    }
    assert rows[0]["note"] == "not installed" and rows[0]["median"] == "-"
    assert rows[1]["GB/s"] == "4" and rows[1]["tokens/s"] == "2,000"
    assert len(Outline(text).tables["growth"]) == 1 + len(SWEPT)


def test_predicted_rows_stand_apart_and_say_so(text: str) -> None:
    head, *lines = Outline(text).tables["predicted"]
    assert len(lines) == len(list(predict.rows())) and "GPU" in head
    assert {line[head.index("status")] for line in lines} == {"predicted"}
    assert text.count('<tr class="predicted">') == len(lines)
    assert "Predicted for GPUs: nothing ran" in text and "H100 (predicted)" in text


def test_plots_are_drawn_from_the_sweeps_and_the_roofs(text: str) -> None:
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    for part in ("against tokens", "against vocabulary", "share of rows", "workspace", "Roofline"):
        assert any(part in title for title in titles), titles
    assert "copy: 8.0 GB/s" in text
    assert "<title>tokfuse: 4x64, 3</title>" in text


def test_a_later_row_of_a_case_replaces_an_earlier_one() -> None:
    assert page.latest([ROW, PEER, replace(ROW, median_ms=1.0)])[0].median_ms == 1.0


def test_axes_hold_every_point() -> None:
    points = [svg.Point(1.0, 3.0), svg.Point(1000.0, 0.02)]
    text = svg.plot("t", [svg.Series("a", points)], "x", "y")
    centres = re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', text)
    for x, y in centres:
        assert svg.LEFT <= float(x) <= svg.WIDTH and 0 <= float(y) <= svg.HEIGHT - svg.BOTTOM
    assert len(centres) == 2 and float(centres[0][1]) < float(centres[1][1])
    assert svg.plot("t", [svg.Series("a")], "x", "y") == ""


def test_command_writes_the_page(tmp_path: Path, capsys) -> None:
    rows, out = tmp_path / "r.jsonl", tmp_path / "p.html"
    rows.write_text("".join(f"{row.to_json()}\n" for row in ROWS))
    assert entry.main(["report", str(rows), "-o", str(out)]) == 0
    assert out.read_text() == page.page(ROWS) and f"wrote {out}" in capsys.readouterr().out


def test_command_refuses(tmp_path: Path, capsys) -> None:
    rows = tmp_path / "r.jsonl"
    for content, said in (
        ("", "must contain rows"),
        (ROW.to_json() + "\n" + replace(ROW, cpu_model="another").to_json(), "of one machine"),
    ):
        rows.write_text(content)
        with pytest.raises(SystemExit):
            page.main([str(rows), "-o", str(tmp_path / "p.html")])
        assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        page.main([str(tmp_path / "absent.jsonl")])
    assert "absent.jsonl" in capsys.readouterr().err and not (tmp_path / "p.html").exists()


def test_predictions_take_the_longer_of_bytes_and_instructions() -> None:
    found = {(r.op, r.mode, r.dtype, r.gpu, r.vocab): r for r in predict.rows()}
    row = found["token_stats", "forward", "bfloat16", "H100", 151936]
    assert row.status == "predicted" and row.role == "ours" and "nothing ran" in row.note
    assert row.limit_ms == pytest.approx(8192 * 151936 * 2 / 3.35e12 * 1e3, rel=1e-3)
    assert row.median_ms >= row.limit_ms and row.limit_share <= 1.0
    kernel = next(k for k in kernel_table.committed() if k.case == "policy_step")
    slow = predict._row(replace(kernel, per_element=320.0), "H100", 1000)
    assert slow.median_ms == pytest.approx(8192e3 * 10 / (132 * 4 * 1.755e9) * 1e3, rel=1e-2)
    assert slow.limit_share < 0.12


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--virtual-time-budget=3000",
]


@pytest.mark.skipif(not BROWSER, reason="no Chromium on the path")
def test_it_works_in_a_browser(text: str, tmp_path: Path) -> None:
    """Scripts run, a click sorts (missing numbers last), and a word filters."""
    probe = """<script>
      const heads = [...document.querySelectorAll("#rows th")];
      heads.find((h) => h.dataset.name === "median").querySelector("button").click();
      const box = document.querySelector("input.filter");
      const names = () => [...document.querySelectorAll("#rows tbody tr")]
        .filter((r) => !r.hidden).map((r) => r.cells[5].textContent).join(",");
      const sorted = names();
      heads.find((h) => h.dataset.name === "median").querySelector("button").click();
      const turned = names();
      box.value = "pass TRL"; box.dispatchEvent(new Event("input"));
      document.title = [sorted, turned, names(), document.documentElement.scrollWidth <=
        document.documentElement.clientWidth, document.querySelectorAll("svg").length].join("|");
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", probe))
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1300,900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert 'data-ready="yes"' in done.stdout, done.stderr[-2000:]
    title = re.search(r"<title>(.*?)</title>", done.stdout)
    assert title is not None
    ascending, descending, filtered, fits, plots = title[1].split("|")
    assert ascending == "tokfuse_,tokfuse,trl,verl,absent"
    assert descending == "verl,trl,tokfuse,tokfuse_,absent"
    assert filtered == "trl" and fits == "true" and int(plots) >= 5
