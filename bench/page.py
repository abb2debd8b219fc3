"""Write one HTML page of figures, plots and tables: `python -m tokfuse report ROWS... -o report.html`.

    python -m tokfuse report bench/results/*.jsonl -o report.html

The page is one file without references to other files or servers. It follows the light or dark setting of the
browser. jinja2 fills the template page.html.j2 and escapes its values; charts.py draws the plots. The rows come
from `bench --json`; rows of different machines raise an error. Predicted GPU rows are in a separate table and
plot, which are marked as predicted.
"""

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median_low
from typing import Any

from tokfuse.bench import charts, numbers, plot
from tokfuse.bench.plan import MODELS
from tokfuse.bench.report import worst_errors
from tokfuse.bench.row import Row

HERE = Path(__file__).parent
MODEL_OF = {vocab: name for name, (_, vocab) in MODELS.items()}
# Peers with these notes compute too little for a comparison. See `runner.missing_outputs`.
LESS_WORK = re.compile(r"another loss|computes no .*\b(logp|entropy)\b")


@dataclass(frozen=True)
class Cell:
    """One cell: its text, and its value if it sorts as a number. None as a number sorts last."""

    text: str
    value: float | None = None
    is_number: bool = False
    badge: bool = False
    kind: str = ""


@dataclass(frozen=True)
class Column:
    """One column. `more` hides it until the reader asks for all columns."""

    name: str
    cell: Callable[[Any], Cell]
    more: bool = False


@dataclass(frozen=True)
class Line:
    """One row of a table, with the class of its style."""

    kind: str
    cells: list[Cell]


@dataclass(frozen=True)
class Table:
    """One sortable table."""

    name: str
    columns: Sequence[Column]
    lines: list[Line]

    @property
    def has_more(self) -> bool:
        return any(column.more for column in self.columns)


@dataclass(frozen=True)
class Section:
    """One section: a heading, a text, pictures and a table. An empty section is left out."""

    title: str
    text: str
    pictures: Sequence[charts.Picture] = ()
    table: Table | None = None


@dataclass(frozen=True)
class Pair:
    """A row of tokfuse, and the fastest peer of the same case, if there is one."""

    ours: Row
    peer: Row | None

    @property
    def speedup(self) -> float | None:
        if self.peer is None or not self.peer.median_ms or not self.ours.median_ms:
            return None
        return self.peer.median_ms / self.ours.median_ms


@dataclass
class Headline:
    """The compared cases of one op and mode."""

    title: str
    pairs: list[Pair] = field(default_factory=list)

    @property
    def chosen(self) -> Pair:
        """The case with the median speedup; of two, the smaller."""
        middle = median_low(pair.speedup or 0.0 for pair in self.pairs)
        return next(pair for pair in self.pairs if pair.speedup == middle)

    def card(self) -> dict[str, str]:
        """Return the texts of the card."""
        ours, peer = self.chosen.ours, self.chosen.peer
        assert peer is not None
        speedups = [pair.speedup or 0.0 for pair in self.pairs]
        chosen = self.chosen.speedup or 0.0
        return {
            "title": self.title,
            "speedup": f"{_times(max(chosen, 1 / chosen))}",
            "direction": "faster" if chosen >= 1 else "slower",
            "case": f"{_shape(ours).text}, {ours.dtype}, {ours.variant}",
            "peer": peer.provider,
            "time": f"{_milliseconds(ours).text} ms, peer {_milliseconds(peer).text} ms",
            "memory": f"{_mebibytes(ours).text} MiB, peer {_mebibytes(peer).text} MiB",
            "spread": f"{len(speedups)}, from {_times(min(speedups))} to {_times(max(speedups))}"
            if len(speedups) > 1
            else "",
        }


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse report",
        description="Write one page of figures, plots and tables from saved rows.",
        epilog="example: python -m tokfuse report rows.jsonl -o report.html",
    )
    out.add_argument("rows", nargs="+", metavar="ROWS", help="files that `bench --json` wrote")
    out.add_argument("-o", "--out", default="report.html", metavar="FILE", help="the page")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(sys.argv[1:] if argv is None else argv)
    plot.check_available(command.error, "report", "jinja2", "matplotlib")
    try:
        rows, _ = numbers.read(options.rows)
        if not rows:
            raise ValueError(f"report: ROWS must contain rows of `bench --json`; got {options.rows}.")
    except (OSError, ValueError) as error:
        command.error(str(error))
    text = page(rows)
    Path(options.out).write_text(text, encoding="utf-8")
    print(f"wrote {options.out}: {len(rows)} rows, {len(text.encode()) / 2**20:.1f} MiB")
    return 0


def page(rows: Sequence[Row]) -> str:
    """Return the whole page."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    environment = Environment(
        loader=FileSystemLoader(HERE),
        autoescape=lambda name: name is not None and name.endswith(".html.j2"),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["zip"] = lambda cells, columns: zip(cells, columns, strict=True)
    environment.filters["markup"] = Markup  # the SVG of a picture is markup already
    measured = latest(row for row in rows if row.status != "predicted")
    measured.sort(key=lambda row: row.op == "advantage")  # last, because it takes little of a step
    predicted = latest(row for row in rows if row.status == "predicted")
    return environment.get_template("page.html.j2").render(
        facts=_facts(measured),
        commands=list(dict.fromkeys(row.command for row in measured if row.command)),
        headlines=[headline.card() for headline in headlines([row for row in measured if not row.sweep])],
        sections=[section for section in _sections(measured, predicted) if section.table or section.pictures],
    )


def _sections(measured: Sequence[Row], predicted: Sequence[Row]) -> list[Section]:
    plain = [row for row in measured if not row.sweep]
    swept = [row for row in measured if row.sweep]
    return [
        Section(
            "Time and memory of every library",
            "The largest case of each op in which most libraries ran. Smaller is better.",
            charts.comparisons(plain),
        ),
        Section("Scaling", "Time and memory along one axis. Dashed: in place.", charts.sweeps(swept)),
        Section(
            "Roofline",
            "Speed relative to the limits of this machine, from the least work and the least bytes of each case.",
            charts.rooflines(plain),
        ),
        Section(
            "Every case and its fastest peer",
            "Here a peer counts even if it computes less; all columns show what it does not compute. Click a "
            "column head to sort.",
            table=_table("summary", _SUMMARY, best(plain)),
        ),
        Section(
            "All measured rows",
            "Times are medians of interleaved rounds with cold caches. The ratio is the time relative to tokfuse. "
            "MiB is the peak memory of a call without the tensors that it returns. The limit was timed in the same "
            "rounds.",
            table=_table("rows", _COLUMNS, plain),
        ),
        Section(
            "All rows of the sweeps",
            "The axis is the size that varies.",
            table=_table("growth", [_AXIS, *_COLUMNS], swept),
        ),
        Section(
            "Predicted for GPUs: nothing ran",
            "Computed from the least bytes of the work, the instructions of the compiled kernels and data sheets. "
            "Launches, tails and caches are ignored, so real runs are slower.",
            charts.predictions(predicted),
            _table("predicted", _PREDICTED, predicted),
        ),
    ]


def latest(rows: Iterable[Row]) -> list[Row]:
    """Return the rows without duplicates. A later row of the same case and provider replaces an earlier one."""
    kept = {
        (r.op, r.mode, r.variant, r.shape, r.dtype, r.device, r.gpu, r.sweep, r.threads, r.provider): r for r in rows
    }
    return list(kept.values())


def best(rows: Sequence[Row]) -> list[Pair]:
    """Return the tokfuse rows that passed (never a fallback), with the fastest peer that passed in the same case."""
    out: list[Pair] = []
    for group in _cases(rows):
        fastest = _fastest(row for row in group if row.role == "peer")
        out += [Pair(row, fastest) for row in group if row.role == "ours"]
    return out


def headlines(rows: Sequence[Row]) -> list[Headline]:
    """Return the fastest tokfuse row of every case with the fastest peer that does as much work, by op and mode."""
    found: dict[str, Headline] = {}
    for group in _cases(rows):
        ours = _fastest(row for row in group if row.role == "ours")
        peer = _fastest(row for row in group if row.role == "peer" and not LESS_WORK.search(row.note))
        if ours is not None and peer is not None:
            where = f" on {ours.gpu}" if ours.gpu else ""
            title = ours.variant if ours.op == "advantage" else f"{ours.op}, {ours.mode}"
            found.setdefault(title + where, Headline(title + where)).pairs.append(Pair(ours, peer))
    return list(found.values())


def _cases(rows: Iterable[Row]) -> list[list[Row]]:
    """Return the rows with timing that passed, by case."""
    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.status == "pass" and row.median_ms:
            key = (row.op, row.mode, row.variant, row.shape, row.dtype, row.device)
            cases.setdefault(key, []).append(row)
    return list(cases.values())


def _fastest(rows: Iterable[Row]) -> Row | None:
    return min(rows, key=lambda row: row.median_ms or 0.0, default=None)


def _table(name: str, columns: Sequence[Column], items: Sequence[Any]) -> Table | None:
    lines = []
    for item in items:
        row = item.ours if isinstance(item, Pair) else item
        kind = row.role if row.status != "predicted" else "predicted"
        lines.append(Line(kind, [column.cell(item) for column in columns]))
    return Table(name, columns, lines) if lines else None


def _facts(rows: Sequence[Row]) -> list[str]:
    """Return machine, versions and commits, each listed once."""

    def all_of(name: str) -> str:
        found = dict.fromkeys(str(getattr(row, name)) for row in rows if getattr(row, name))
        return ", ".join(found) or "-"

    if not rows:
        return []
    loads = [row.load_average for row in rows if row.load_average is not None]
    busy = f"{min(loads):.1f} to {max(loads):.1f}" if loads else "-"
    return [
        f"{all_of('cpu_model')} ({all_of('machine')}), kernels at {all_of('isa')}, "
        f"threads {all_of('threads')}" + (f", GPU {all_of('gpu')}" if any(row.gpu for row in rows) else ""),
        f"tokfuse {all_of('tokfuse')} at {all_of('commit')}, torch {all_of('torch')}, Python {all_of('python')}",
        f"load average while measuring {busy}; telemetry {all_of('telemetry')}",
    ]


# ----------------------------------------------------------------------------------------- columns


def _number(value: float | None, form: str = ".3g") -> Cell:
    return Cell("-" if value is None else f"{value:{form}}", value, is_number=True, kind="n")


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _short(value: float | None) -> Cell:
    return Cell("-" if value is None else charts.three_digits(value), value, is_number=True, kind="n")


def _milliseconds(row: Row) -> Cell:
    return _short(row.median_ms)


def _mebibytes(row: Row) -> Cell:
    return _short(None if row.workspace_bytes is None else row.workspace_bytes / 2**20)


def _shape(row: Row) -> Cell:
    model = MODEL_OF.get(row.vocab)
    label = row.shape.replace("x", " x ") + (f" ({model})" if model else "")
    return Cell(label, float(row.tokens * row.vocab * max(1, row.hidden)), is_number=True)


def _text(name: str, kind: str = "") -> Callable[[Row], Cell]:
    return lambda row: Cell(str(getattr(row, name)) or "-", kind=kind)


def _of_ours(cell: Callable[[Row], Cell]) -> Callable[[Pair], Cell]:
    return lambda pair: cell(pair.ours)


def _of_peer(cell: Callable[[Row], Cell]) -> Callable[[Pair], Cell]:
    return lambda pair: replace(cell(pair.ours), text="-", value=None) if pair.peer is None else cell(pair.peer)


_CASE = [
    Column("op", lambda r: Cell(r.op if r.mode in ("step", "") else f"{r.op} ({r.mode})")),
    Column("variant", _text("variant")),
    Column("shape", _shape),
    Column("dtype", _text("dtype")),
]
_COLUMNS = [
    *_CASE,
    Column("provider", _text("provider")),
    Column("status", lambda r: Cell(r.status, badge=True)),
    Column("median ms", _milliseconds),
    Column("ratio", lambda r: _number(r.ratio, ".2f")),
    Column("of limit", lambda r: _number(r.limit_share, ".0%")),
    Column("MiB", _mebibytes),
    Column("backend", _text("backend"), more=True),
    Column("p20 ms", lambda r: _number(r.p20_ms), more=True),
    Column("p80 ms", lambda r: _number(r.p80_ms), more=True),
    Column("limit", _text("limit"), more=True),
    Column("tokens/s", lambda r: _number(r.tokens_per_s, ",.0f"), more=True),
    Column("GB/s", lambda r: _number(r.gb_per_s), more=True),
    Column("GFLOP/s", lambda r: _number(r.gflop_per_s), more=True),
    Column("CPU ms", lambda r: _number(r.cpu_ms), more=True),
    Column("energy mJ", lambda r: _number(r.energy_mj), more=True),
    Column("max error", lambda r: Cell(worst_errors(r) or "-"), more=True),
    Column("note", _text("note", kind="note"), more=True),
]
_AXIS = Column("axis", _text("sweep"))
_PREDICTED = [
    Column("GPU", _text("gpu")),
    *_CASE,
    Column("status", lambda r: Cell(r.status, badge=True)),
    Column("predicted ms", lambda r: _number(r.median_ms)),
    Column("memory only ms", lambda r: _number(r.limit_ms)),
    Column("tokens/s", lambda r: _number(r.tokens_per_s, ",.0f")),
    Column("note", _text("note", kind="note"), more=True),
]
_SUMMARY = [
    *(Column(column.name, _of_ours(column.cell)) for column in _CASE),
    Column("tokfuse", _of_ours(_text("provider"))),
    Column("ms", _of_ours(_milliseconds)),
    Column("fastest peer", _of_peer(_text("provider"))),
    Column("its ms", _of_peer(_milliseconds)),
    Column("speedup", lambda pair: _number(pair.speedup, ".2f")),
    Column("MiB", _of_ours(_mebibytes)),
    Column("its MiB", _of_peer(_mebibytes)),
    Column("of limit", lambda pair: _number(pair.ours.limit_share, ".0%"), more=True),
    Column("not computed by it", _of_peer(_text("note", kind="note")), more=True),
]
