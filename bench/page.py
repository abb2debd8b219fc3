"""Write one HTML page of tables and plots: `python -m tokfuse report ROWS... -o report.html`.

    python -m tokfuse report bench/results/*.jsonl -o report.html

The page is one file with sortable and filterable tables and inline SVG plots. It loads nothing from other
servers. The rows come from `bench --json`; rows of different machines raise an error. Predicted GPU rows
are in a separate table and plot, which are marked as predicted.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from tokfuse.bench import growth, numbers, svg
from tokfuse.bench.plan import MODELS
from tokfuse.bench.report import mebibytes, milliseconds, worst_errors
from tokfuse.bench.row import Row
from tokfuse.bench.svg import Point, Series

HERE = Path(__file__).parent
Cell = Callable[[Row], tuple[str, float | None]]
MODEL_OF = {vocab: name for name, (_, vocab) in MODELS.items()}


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse report",
        description="Write one page of tables and plots from saved rows.",
        epilog="example: python -m tokfuse report rows.jsonl -o report.html",
    )
    out.add_argument("rows", nargs="+", metavar="ROWS", help="files that `bench --json` wrote")
    out.add_argument("-o", "--out", default="report.html", metavar="FILE", help="the page")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(sys.argv[1:] if argv is None else argv)
    try:
        rows, _ = numbers.read(options.rows)
        if not rows:
            raise ValueError(f"report: ROWS must contain rows of `bench --json`; got {options.rows}.")
    except (OSError, ValueError) as error:
        command.error(str(error))
    Path(options.out).write_text(page(rows), encoding="utf-8")
    print(f"wrote {options.out}: {len(rows)} rows")
    return 0


def page(rows: Sequence[Row]) -> str:
    """Return the whole page."""
    measured = latest(row for row in rows if row.status != "predicted")
    predicted = latest(row for row in rows if row.status == "predicted")
    plain = [row for row in measured if not row.sweep]
    sections = [
        (
            "Summary",
            "tokfuse compared with the fastest other library in the same rounds.",
            _table("summary", _SUMMARY, _best(plain)),
        ),
        (
            "Plots",
            "Points have tooltips. A plot appears only if there are rows of its sweep.",
            f'<div class="plots">{"".join(plots(measured))}</div>',
        ),
        (
            "All measured rows",
            "Click a column head to sort. Times are medians of interleaved rounds with "
            "cold caches. The limit was timed in the same rounds.",
            _filter("rows") + _table("rows", _COLUMNS, plain),
        ),
        (
            "Scaling along one axis",
            "Rows of the sweeps.",
            _table("growth", [("axis", lambda r: (r.sweep, None)), *_COLUMNS], [row for row in measured if row.sweep]),
        ),
        (
            "Predicted for GPUs: nothing ran",
            "Computed from the least bytes of the work, the instructions of the compiled kernels and "
            "data sheets. Launches, tails and caches are ignored, so real runs are slower.",
            _table("predicted", _PREDICTED, predicted) + "".join(_predicted_plot(predicted)),
        ),
    ]
    body = "".join(
        f"<section><h2>{escape(title)}</h2><p>{escape(text)}</p>{content}</section>"
        for title, text, content in sections
        if content not in ("", '<div class="plots"></div>')
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>tokfuse: measured</title><style>{_asset('page.css')}</style></head><body>"
        f"<h1>tokfuse: measured</h1>{_facts(measured)}{body}"
        f"<script>{_asset('page.js')}</script></body></html>\n"
    )


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows without duplicates. A later row of the same case and provider replaces an earlier one."""
    kept = {
        (r.op, r.mode, r.variant, r.shape, r.dtype, r.device, r.gpu, r.sweep, r.threads, r.provider): r for r in rows
    }
    return list(kept.values())


# ------------------------------------------------------------------------------------------ tables


def _number(value: float | None, form: str = ".3g") -> tuple[str, float | None]:
    return ("-" if value is None else f"{value:{form}}"), value


def _shape(row: Row) -> tuple[str, float | None]:
    model = MODEL_OF.get(row.vocab)
    label = row.shape.replace("x", " x ") + (f" ({model})" if model else "")
    return label, float(row.tokens * row.vocab * max(1, row.hidden))


def _workspace(row: Row) -> tuple[str, float | None]:
    value = row.workspace_bytes
    return mebibytes(value), None if value is None else float(value)


def _text(name: str) -> Cell:
    return lambda row: (str(getattr(row, name)), None)


def _status(row: Row) -> tuple[str, float | None]:
    return f'<span class="badge {row.status}">{row.status}</span>', None


_CASE: list[tuple[str, Cell]] = [
    ("op", _text("op")),
    ("mode", _text("mode")),
    ("variant", _text("variant")),
    ("shape", _shape),
    ("dtype", _text("dtype")),
]
_COLUMNS: list[tuple[str, Cell]] = [
    *_CASE,
    ("provider", _text("provider")),
    ("backend", _text("backend")),
    ("status", _status),
    ("median", lambda r: (milliseconds(r.median_ms), r.median_ms)),
    ("p20 ms", lambda r: _number(r.p20_ms)),
    ("p80 ms", lambda r: _number(r.p80_ms)),
    ("ratio", lambda r: _number(r.ratio, ".2f")),
    ("of limit", lambda r: _number(r.limit_share, ".0%")),
    ("limit", _text("limit")),
    ("tokens/s", lambda r: _number(r.tokens_per_s, ",.0f")),
    ("GB/s", lambda r: _number(r.gb_per_s)),
    ("GFLOP/s", lambda r: _number(r.gflop_per_s)),
    ("CPU ms", lambda r: _number(r.cpu_ms)),
    ("workspace", _workspace),
    ("energy mJ", lambda r: _number(r.energy_mj)),
    ("max error", lambda r: (escape(worst_errors(r)) or "-", None)),
    ("note", _text("note")),
]
_PREDICTED: list[tuple[str, Cell]] = [
    ("GPU", _text("gpu")),
    *_CASE,
    ("status", _status),
    ("predicted ms", lambda r: _number(r.median_ms)),
    ("memory only ms", lambda r: _number(r.limit_ms)),
    ("tokens/s", lambda r: _number(r.tokens_per_s, ",.0f")),
    ("note", _text("note")),
]
Best = tuple[Row, Row | None]


def _peer_cell(of: Cell) -> Any:
    return lambda pair: ("-", None) if pair[1] is None else of(pair[1])


def _gain(pair: Best) -> tuple[str, float | None]:
    ours, peer = pair
    return _number(peer.median_ms / ours.median_ms, ".2f") if peer and peer.median_ms else ("-", None)


_SUMMARY: list[tuple[str, Any]] = [
    ("op", lambda pair: (f"{pair[0].op} ({pair[0].mode})", None)),
    *((name, lambda pair, cell=cell: cell(pair[0])) for name, cell in _CASE[2:]),
    ("tokfuse", lambda pair: (f"{pair[0].provider} ({pair[0].backend})", None)),
    ("median", lambda pair: (milliseconds(pair[0].median_ms), pair[0].median_ms)),
    ("of limit", lambda pair: _number(pair[0].limit_share, ".0%")),
    ("fastest other", _peer_cell(lambda r: (r.provider, None))),
    ("its median", _peer_cell(lambda r: (milliseconds(r.median_ms), r.median_ms))),
    ("speedup", _gain),
    ("workspace", lambda pair: _workspace(pair[0])),
    ("its workspace", _peer_cell(_workspace)),
    ("not computed by it", _peer_cell(lambda r: (escape(r.note) or "-", None))),
]


def _best(rows: Sequence[Row]) -> list[Best]:
    """Return the tokfuse rows that passed (never a fallback), with the fastest peer that passed in the same case."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.status == "pass" and row.median_ms:
            key = (row.op, row.mode, row.variant, row.shape, row.dtype, row.device)
            cases.setdefault(key, []).append(row)
    out: list[Best] = []
    for group in cases.values():
        others = [row for row in group if row.role == "peer"]
        fastest = min(others, key=lambda row: row.median_ms or 0.0, default=None)
        out += [(row, fastest) for row in group if row.role == "ours"]
    return out


def _table(name: str, columns: Sequence[tuple[str, Any]], rows: Sequence[Any]) -> str:
    """Return a sortable table. Cells with numbers contain their value."""
    if not rows:
        return ""
    heads = "".join(
        f'<th data-name="{escape(head)}" aria-sort="none"><button>{escape(head)}</button></th>' for head, _ in columns
    )
    lines = []
    for row in rows:
        cells = []
        for head, of in columns:
            text, value = of(row)
            if head not in ("status", "max error", "not computed by it"):  # these columns escape their text themselves
                text = escape(text)
            kind = ' class="note"' if head in ("note", "not computed by it") else ""
            if value is not None or text == "-":
                kind = f' class="n" data-v="{"" if value is None else value}"'
            cells.append(f"<td{kind}>{text}</td>")
        first = row if isinstance(row, Row) else row[0]
        kinds = first.role if first.status != "predicted" else "predicted"
        lines.append(f'<tr class="{kinds}">{"".join(cells)}</tr>')
    return (
        f'<div class="scroll"><table class="sortable" id="{name}"><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def _filter(table: str) -> str:
    return (
        f'<input class="filter" data-table="{table}" type="search" aria-label="filter rows" '
        'placeholder="filter: policy_step bfloat16 pass">'
    )


def _facts(rows: Sequence[Row]) -> str:
    """Return machine, versions, commits and commands, each listed once."""

    def all_of(name: str) -> str:
        found = dict.fromkeys(str(getattr(row, name)) for row in rows if getattr(row, name))
        return ", ".join(found) or "-"

    loads = [row.load_average for row in rows if row.load_average is not None]
    busy = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    lines = [
        f"{all_of('cpu_model')} ({all_of('machine')}), kernels at {all_of('isa')}, "
        f"threads {all_of('threads')}, GPU {all_of('gpu')}",
        f"tokfuse {all_of('tokfuse')} at {all_of('commit')}, torch {all_of('torch')}, Python {all_of('python')}",
        f"load average while measuring {busy}; telemetry {all_of('telemetry')}",
    ]
    commands = "".join(f"<li><code>{escape(c)}</code></li>" for c in _commands(rows))
    facts = "".join(f"<li>{escape(line)}</li>" for line in lines)
    return f'<ul class="facts">{facts}<li><details><summary>commands</summary><ul>{commands}</ul></details></li></ul>'


def _commands(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.command for row in rows if row.command))


def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


# ------------------------------------------------------------------------------------------- plots


def plots(rows: Sequence[Row]) -> list[str]:
    """Return plots of speed and memory against each axis, and one roofline per dtype."""
    passed = [row for row in rows if row.status == "pass" and row.median_ms]
    out = []
    labels = {
        "vocab": "vocabulary",
        "tokens": "tokens",
        "rows": "share of rows with gradient",
        "hidden": "hidden size",
        "threads": "threads",
    }
    for op in dict.fromkeys(row.op for row in passed if row.sweep):
        for axis, label in labels.items():
            swept = [r for r in passed if r.op == op and r.sweep == axis and r.role != "limit"]
            series = _by_provider(swept, growth.value_of, lambda r: r.median_ms)
            is_log = axis not in ("rows", "threads")
            out.append(svg.plot(f"{op}: time against {label}", series, label, "ms", is_log, is_log))
        swept = [r for r in passed if r.op == op and r.sweep == "tokens" and r.role != "limit"]
        series = _by_provider(swept, growth.value_of, _mebibytes)
        out.append(svg.plot(f"{op}: workspace against tokens", series, "tokens", "MiB", log_y=False))
    for dtype in dict.fromkeys(row.dtype for row in passed):
        out.append(_roofline([r for r in passed if r.dtype == dtype and not r.sweep], dtype))
    return [text for text in out if text]


def _mebibytes(row: Row) -> float | None:
    return None if row.workspace_bytes is None else row.workspace_bytes / 2**20


def _by_provider(rows: Sequence[Row], x: Callable[[Row], float], y: Callable[[Row], float | None]) -> list[Series]:
    series: dict[str, Series] = {}
    for row in rows:
        value = y(row)
        if value is not None:
            one = series.setdefault(row.provider, Series(row.provider))
            one.points.append(Point(x(row), value, f"{row.provider}: {row.shape}, {value:.4g}"))
    return list(series.values())


def _roofline(rows: Sequence[Row], dtype: str) -> str:
    """Plot GFLOP/s against FLOPs per byte, with the bandwidth and the matrix products of this machine as limits.

    The work of a point is the least work of its case, so a provider that moves or computes more is lower.
    """
    usable = [r for r in rows if r.flops and r.bytes_moved and r.role != "limit"]
    points = [r for r in usable if r.op in ("policy_step", "policy_step_hidden", "token_stats")]
    copies = [r.bytes_moved / r.copy_ms / 1e6 for r in points if r.copy_ms and not r.hidden]
    products = [r.flops / r.gemm_ms / 1e6 for r in points if r.gemm_ms]
    if not points or not (copies or products):
        return ""
    at = [r.flops / r.bytes_moved for r in points]
    low, high = min(at) / 2, max(at) * 2
    series = []
    if copies:
        bandwidth = max(copies)
        peak = max(products, default=bandwidth * high)
        knee = min(peak / bandwidth, high)
        name = f"copy: {bandwidth:.1f} GB/s"
        roof = [Point(low, bandwidth * low), Point(knee, bandwidth * knee)]
        series.append(Series(name, roof, "roof", 4))
    if products:
        start = max(low, max(products) / max(copies)) if copies else low
        top = max(products)
        name = f"matrix products: {top:.0f} GFLOP/s"
        series.append(Series(name, [Point(min(start, high), top), Point(high, top)], "roof", 7))
    for role, style, name, colour in (("ours", "dot", "tokfuse", 0), ("peer", "cross", "others", 2)):
        found = [
            Point(
                r.flops / r.bytes_moved,
                r.gflop_per_s or 0.0,
                f"{r.provider}: {r.op} {r.shape} {r.variant}, {milliseconds(r.median_ms)}",
            )
            for r in points
            if r.role == role
        ]
        series.append(Series(name, found, style, colour))
    return svg.plot(f"Roofline, {dtype}", series, "FLOP per byte", "GFLOP/s")


def _predicted_plot(rows: Sequence[Row]) -> list[str]:
    """Return one plot per kernel: predicted time against vocabulary, one line per GPU."""
    out = []
    chosen = [r for r in rows if r.dtype == "bfloat16" and r.median_ms]
    for op, mode in dict.fromkeys((r.op, r.mode) for r in chosen):
        series: dict[str, Series] = {}
        for row in (r for r in chosen if (r.op, r.mode) == (op, mode)):
            one = series.setdefault(row.gpu, Series(f"{row.gpu} (predicted)"))
            one.points.append(Point(row.vocab, row.median_ms or 0.0, f"{row.gpu}: {row.shape}"))
        title = f"Predicted, nothing ran: {op} {mode}, bfloat16, {chosen[0].tokens} tokens"
        out.append(svg.plot(title, list(series.values()), "vocabulary", "ms"))
    return [f'<div class="plots">{"".join(out)}</div>'] if out else []
