"""Test the report page: its content, its errors, and that it works in a real browser."""

import re
import shutil
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from bench_rows import our_row

from tokfuse import __main__ as entry
from tokfuse.bench import charts, page, predict
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
PEER = replace(ROW, provider="trl", role="peer", median_ms=9.0, peak_extra_bytes=53 << 20, note="computes no <lse>")
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
    replace(PEER, provider="cce", median_ms=2.5, note="computes no entropy, lse"),
    replace(ROW, provider="tokfuse_", status="fallback", backend="reference", median_ms=1.0),
    *SWEPT,
    *predict.rows(),
]


class Outline(HTMLParser):
    """Collects open tags, ids, table cells by table, hidden columns, and everything that the page would load."""

    VOID = {"meta", "input"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.loaded: list[str] = []
        self.ids: list[str] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.hidden: set[str] = set()
        self._table: list[list[str]] | None = None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self._note(found)
        if tag == "table":
            self._table = self.tables[found["id"] or ""] = []
        if tag == "tr" and self._table is not None:
            self._table.append([])
        if tag in ("td", "th") and self._table is not None:
            self._table[-1].append("")
        if tag == "th" and "more" in (found.get("class") or ""):
            self.hidden.add(found["data-name"] or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def _note(self, found: dict[str, str | None]) -> None:
        self.loaded += [v for k, v in found.items() if k in ("src", "href", "xlink:href") and v and v[0] != "#"]
        self.ids += [v for k, v in found.items() if k == "id" and v]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self._note(dict(attributes))

    def handle_data(self, data: str) -> None:
        if self._table and {"td", "th"} & set(self.open):
            self._table[-1][-1] += data


@pytest.fixture(scope="module")
def text() -> str:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    return page.page(ROWS)


def test_it_is_one_well_formed_file(text: str) -> None:
    outline = Outline(text)
    assert outline.open == [] and outline.loaded == [] and "@import" not in text and "url(http" not in text
    assert len(outline.ids) == len(set(outline.ids)), "pictures and tables have ids of their own"
    assert set(outline.tables) == {"summary", "rows", "growth", "predicted"}
    assert not set(re.findall(r"#00f0\w\w", text)), "a picture has a colour of its own instead of the page's"


def test_the_headline_is_the_median_speedup_over_peers_that_do_as_much() -> None:
    cases = [(ROW, PEER), (replace(ROW, shape="8x16"), replace(PEER, shape="8x16", median_ms=3.0))]
    cases.append((replace(ROW, shape="9x16"), replace(PEER, shape="9x16", median_ms=90.0)))
    rows = [row for case in cases for row in case]
    less = [replace(PEER, median_ms=0.1, note=note) for note in ("computes no logp", "F.cross_entropy, another loss")]
    (headline,) = page.headlines([*rows, *less])
    assert [pair.speedup for pair in headline.pairs] == [4.5, 1.5, 45.0]
    card = headline.card()
    assert card["speedup"] == "4.5x" and card["direction"] == "faster" and card["peer"] == "trl"
    assert card["time"] == "2 ms, peer 9 ms" and card["memory"] == "2 MiB, peer 50 MiB"
    assert card["spread"] == "3, from 1.5x to 45x" and "4 x 49152 (smollm2)" in card["case"]
    (slower,) = page.headlines([ROW, replace(PEER, median_ms=1.0)])
    assert slower.card()["speedup"] == "2.0x" and slower.card()["direction"] == "slower"


def test_the_summary_compares_with_the_fastest_other_and_no_fallback(text: str) -> None:
    head, *lines = Outline(text).tables["summary"]
    assert len(lines) == 1
    found = dict(zip(head, lines[0], strict=True))
    assert found["tokfuse"] == "tokfuse" and found["fastest peer"] == "cce"
    assert found["speedup"] == "1.25" and found["of limit"] == "50%" and found["its MiB"] == "50"
    assert found["shape"] == "4 x 49152 (smollm2)" and found["not computed by it"] == "computes no entropy, lse"


def test_every_measured_row_is_there_with_its_status(text: str) -> None:
    outline = Outline(text)
    head, *lines = outline.tables["rows"]
    rows = [dict(zip(head, line, strict=True)) for line in lines]
    assert {r["provider"]: r["status"] for r in rows} == {
        "tokfuse": "pass",
        "trl": "pass",
        "verl": "pass",
        "cce": "pass",
        "absent": "unsupported",
        "tokfuse_": "fallback",
    }
    assert rows[0]["note"] == "not installed" and rows[0]["median ms"] == "-"
    assert rows[1]["GB/s"] == "4" and rows[1]["tokens/s"] == "2,000"
    assert rows[2]["note"] == "computes no <lse>", "text is escaped once"
    assert outline.hidden >= {"note", "GB/s"} and not outline.hidden & {"provider", "median ms", "ratio", "MiB"}
    assert len(outline.tables["growth"]) == 1 + len(SWEPT)


def test_predicted_rows_stand_apart_and_say_so(text: str) -> None:
    head, *lines = Outline(text).tables["predicted"]
    assert len(lines) == len(list(predict.rows())) and "GPU" in head
    assert {line[head.index("status")] for line in lines} == {"predicted"}
    assert text.count('<tr class="predicted">') == len(lines)
    assert "Predicted for GPUs: nothing ran" in text and "H100 (predicted)" in text


def test_plots_are_drawn_from_the_cases_the_sweeps_and_the_roofs(text: str) -> None:
    titles = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    for part in ("4 x 49152", "against tokens", "against vocabulary", "share of rows", "memory", "Roofline"):
        assert any(part in title for title in titles), titles
    assert "copy: 8.0 GB/s" in text
    (bars,) = charts.comparisons([ROW, PEER, replace(ROW, shape="8x16")])
    for shown in ("tokfuse", "trl", ">2<", ">9<", ">50<"):
        assert shown in bars.svg, f"the case with most libraries shows {shown}"
    assert charts.sweeps([ROW]) == []


def test_a_later_row_of_a_case_replaces_an_earlier_one() -> None:
    assert page.latest([ROW, PEER, replace(ROW, median_ms=1.0)])[0].median_ms == 1.0


def test_command_writes_the_page(tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows, out = tmp_path / "r.jsonl", tmp_path / "p.html"
    rows.write_text(f"{ROW.to_json()}\n{PEER.to_json()}\n")
    assert entry.main(["report", str(rows), "-o", str(out)]) == 0
    assert out.read_text() == page.page([ROW, PEER]), "the same rows give the same page"
    assert f"wrote {out}: 2 rows, " in capsys.readouterr().out


def test_command_refuses(tmp_path: Path, capsys, monkeypatch) -> None:
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
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(SystemExit):
        page.main([str(rows)])
    assert "report needs jinja2: pip install 'tokfuse[bench]'" in capsys.readouterr().err


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
    """A click sorts (missing numbers last), a word filters, a box shows all columns, and 1200 pixels suffice."""
    probe = """<script>
      const heads = [...document.querySelectorAll("#rows th")];
      heads.find((h) => h.dataset.name === "median ms").querySelector("button").click();
      const box = document.querySelector("input.filter[data-table=rows]");
      const names = () => [...document.querySelectorAll("#rows tbody tr")]
        .filter((r) => !r.hidden).map((r) => r.cells[4].textContent).join(",");
      const sorted = names();
      heads.find((h) => h.dataset.name === "median ms").querySelector("button").click();
      const turned = names();
      box.value = "pass TRL"; box.dispatchEvent(new Event("input"));
      const scroll = document.querySelector("#rows").parentElement;
      document.querySelector("input.more").click();
      document.title = [sorted, turned, names(), document.documentElement.scrollWidth <=
        document.documentElement.clientWidth, scroll.scrollWidth <= scroll.clientWidth,
        getComputedStyle(document.querySelector("#summary th.more")).display].join("|");
    </script></body>"""
    file = tmp_path / "page.html"
    file.write_text(text.replace("</body>", probe))
    done = subprocess.run(
        [
            BROWSER,
            *FLAGS,
            f"--user-data-dir={tmp_path / 'profile'}",
            "--window-size=1200,900",
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
    ascending, descending, filtered, page_fits, table_fits, more = title[1].split("|")
    assert ascending == "tokfuse_,tokfuse,cce,trl,verl,absent"
    assert descending == "verl,trl,cce,tokfuse,tokfuse_,absent"
    assert filtered == "trl" and page_fits == table_fits == "true" and more == "table-cell"
