"""Draw the pictures of the report page with matplotlib, as SVG elements that follow the colours of the page.

A picture is drawn once with placeholder colours. The SVG then refers to the page's CSS variables, so the same
picture fits a light and a dark page. Its text stays text: the page's font applies, and it can be searched.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from tokfuse.bench import growth, pictures
from tokfuse.bench.row import Row

# Placeholder colour -> CSS variable of page.css.
THEME = pictures.Theme("page", text="#00f001", grid="#00f002", ours="#00f003", peer="#00f014")
VARIABLES = {THEME.text: "ink", THEME.grid: "line", THEME.ours: "ours"} | {f"#00f01{i}": f"s{i}" for i in range(8)}
# Inches. A picture of the page is about as wide as on a phone, so that its text of 10 points has the page's size.
WIDTH = 4.4
MARKERS = "os^DvPX*"
AXES = {
    "vocab": "vocabulary",
    "tokens": "tokens",
    "rows": "share of rows with gradient",
    "hidden": "hidden size",
    "threads": "threads",
}


@dataclass(frozen=True)
class Picture:
    """One picture: its title and its SVG element."""

    title: str
    svg: str


@dataclass
class Series:
    """The points of one line. `is_ours` selects the colour of tokfuse."""

    name: str
    is_ours: bool = False
    points: list[tuple[float, float]] = field(default_factory=list)


def comparisons(rows: Sequence[Row]) -> list[Picture]:
    """Return bars of time and memory of every provider, for the largest case of each op, mode and variant."""
    groups: dict[tuple[str, ...], dict[tuple[str, str], list[Row]]] = {}
    for row in rows:
        if row.status == "pass" and row.median_ms and row.role != "limit" and not row.sweep:
            cases = groups.setdefault((row.op, row.mode, row.variant), {})
            cases.setdefault((row.shape, row.dtype), []).append(row)
    out = []
    for (op, mode, variant), cases in groups.items():
        (shape, dtype), group = max(cases.items(), key=lambda case: (len(case[1]), case[1][0].bytes_moved))
        if any(row.role == "ours" for row in group) and any(row.role == "peer" for row in group):
            title = f"{op} ({mode}, {variant}): {shape.replace('x', ' x ')}, {dtype}"
            out.append(_bars(title, sorted(group, key=lambda row: row.median_ms or 0.0, reverse=True)))
    return out


def sweeps(rows: Sequence[Row]) -> list[Picture]:
    """Return lines of time against each axis of the sweeps, and of memory against tokens."""
    passed = [row for row in rows if row.status == "pass" and row.median_ms and row.sweep and row.role != "limit"]
    out: list[Picture | None] = []
    for op in dict.fromkeys(row.op for row in passed):
        for axis, label in AXES.items():
            series = _by_provider((r for r in passed if (r.op, r.sweep) == (op, axis)), lambda row: row.median_ms)
            is_log = axis not in ("rows", "threads")
            out.append(_lines(f"{op}: time against {label}", series, label, "ms", is_log, is_log))
        series = _by_provider((r for r in passed if (r.op, r.sweep) == (op, "tokens")), _mebibytes)
        out.append(_lines(f"{op}: memory against tokens", series, "tokens", "MiB", log_y=False))
    return [picture for picture in out if picture]


def rooflines(rows: Sequence[Row]) -> list[Picture]:
    """Return one roofline per dtype: GFLOP/s against FLOPs per byte, under the limits of this machine.

    The work of a point is the least work of its case, so a provider that moves or computes more is lower.
    """
    passed = [row for row in rows if row.status == "pass" and row.median_ms and not row.sweep]
    out = []
    for dtype in dict.fromkeys(row.dtype for row in passed):
        out.append(_roofline([row for row in passed if row.dtype == dtype], dtype))
    return [picture for picture in out if picture]


def predictions(rows: Sequence[Row]) -> list[Picture]:
    """Return one picture per kernel: predicted time against vocabulary, one line per GPU."""
    out = []
    chosen = [row for row in rows if row.dtype == "bfloat16" and row.median_ms]
    for op, mode in dict.fromkeys((row.op, row.mode) for row in chosen):
        series: dict[str, Series] = {}
        for row in (r for r in chosen if (r.op, r.mode) == (op, mode)):
            one = series.setdefault(row.gpu, Series(f"{row.gpu} (predicted)"))
            one.points.append((row.vocab, row.median_ms or 0.0))
        title = f"Predicted, nothing ran: {op} {mode}, bfloat16, {chosen[0].tokens} tokens"
        out.append(_lines(title, list(series.values()), "vocabulary", "ms"))
    return [picture for picture in out if picture]


def three_digits(value: float) -> str:
    """Format a number without exponent: whole from 100, otherwise three significant digits, and 0 below 0.01."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "0"


def _name(provider: str) -> str:
    return "tokfuse, in place" if provider == "tokfuse_" else provider


def _mebibytes(row: Row) -> float | None:
    return None if row.workspace_bytes is None else row.workspace_bytes / 2**20


def _by_provider(rows: Iterable[Row], value_of: Callable[[Row], float | None]) -> list[Series]:
    series: dict[str, Series] = {}
    for row in rows:
        value = value_of(row)
        if value is not None:
            one = series.setdefault(row.provider, Series(row.provider, row.role == "ours"))
            one.points.append((growth.value_of(row), value))
    return list(series.values())


def _bars(title: str, group: list[Row]) -> Picture:
    figure = pictures.figure(0.7 + 0.32 * len(group), WIDTH)
    panels = figure.subplots(1, 2, sharey=True)
    names = [_name(row.provider) for row in group]
    colours = [THEME.ours if row.role == "ours" else THEME.peer for row in group]
    sizes = [[row.median_ms or 0.0 for row in group], [_mebibytes(row) or 0.0 for row in group]]
    for axes, head, values in zip(panels, ("time (ms)", "memory (MiB)"), sizes, strict=True):
        bars = axes.barh(names, values, color=colours, height=0.7)
        axes.bar_label(bars, [three_digits(value) for value in values], padding=4, fontsize=10, color=THEME.text)
        axes.set_xlim(0, (max(values) or 1.0) * 1.35)
        axes.set_xticks([])
        pictures.style(axes, head, THEME)
        axes.spines["bottom"].set_visible(False)
    return _picture(title, figure)


def _lines(
    title: str, series: Sequence[Series], x: str, y: str, log_x: bool = True, log_y: bool = True
) -> Picture | None:
    if not any(one.points for one in series):
        return None
    figure, axes = _axes(x, y, log_x, log_y)
    peers = 0
    for one in series:
        peers += not one.is_ours
        colour = THEME.ours if one.is_ours else f"#00f01{peers % 8}"
        axes.plot(
            *zip(*sorted(one.points), strict=True),
            color=colour,
            marker=MARKERS[peers % len(MARKERS)],
            linestyle="--" if one.name.endswith("_") else "-",
            label=_name(one.name),
        )
    if log_x or x == AXES["threads"]:
        _label_positions(axes, sorted({point[0] for one in series for point in one.points}))
    return _picture(title, figure)


def _roofline(rows: Sequence[Row], dtype: str) -> Picture | None:
    usable = [r for r in rows if r.flops and r.bytes_moved and r.role != "limit"]
    points = [r for r in usable if r.op in ("policy_step", "policy_step_hidden", "token_stats")]
    copies = [r.bytes_moved / r.copy_ms / 1e6 for r in points if r.copy_ms and not r.hidden]
    products = [r.flops / r.gemm_ms / 1e6 for r in points if r.gemm_ms]
    if not points or not (copies or products):
        return None
    at = [r.flops / r.bytes_moved for r in points]
    low, high = min(at) / 2, max(at) * 2
    figure, axes = _axes("FLOP per byte", "GFLOP/s", True, True)
    if copies:
        bandwidth = max(copies)
        knee = min(max(products, default=bandwidth * high) / bandwidth, high)
        name = f"copy: {bandwidth:.1f} GB/s"
        axes.plot([low, knee], [bandwidth * low, bandwidth * knee], "--", color=THEME.peer, label=name)
    if products:
        start = max(low, max(products) / max(copies)) if copies else low
        name = f"matrix products: {max(products):.0f} GFLOP/s"
        axes.plot([min(start, high), high], [max(products)] * 2, ":", color="#00f017", label=name)
    for role, marker, name, colour in (("ours", "o", "tokfuse", THEME.ours), ("peer", "x", "others", "#00f012")):
        found = [r for r in points if r.role == role]
        speeds = [r.gflop_per_s for r in found]
        axes.plot([r.flops / r.bytes_moved for r in found], speeds, marker, color=colour, label=name)
    return _picture(f"Roofline, {dtype}", figure)


def _axes(x: str, y: str, log_x: bool, log_y: bool) -> tuple[Any, Any]:
    from matplotlib.ticker import LogLocator, NullLocator

    figure = pictures.figure(2.9, WIDTH)
    axes = figure.add_subplot()
    axes.set_xscale("log" if log_x else "linear")
    axes.set_yscale("log" if log_y else "linear")
    for axis, is_log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if is_log:
            axis.set_major_locator(LogLocator(10, (1.0, 2.0, 5.0), numticks=12))
            axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: f"{value:g}")  # plain numbers, which are faster than formulas
    axes.set_xlabel(x, fontsize=10)
    pictures.style(axes, y, THEME)
    axes.grid(color=THEME.grid, linewidth=0.5)
    return figure, axes


def _label_positions(axes: Any, positions: Sequence[float]) -> None:
    """Label the measured positions instead of powers of ten, if there is room for them."""
    if len(positions) <= 6:
        axes.set_xticks(positions, [f"{x:.0f}" if x < 1e4 else f"{x / 1000:.0f}k" for x in positions])
        axes.xaxis.minorticks_off()


def _picture(title: str, figure: Any) -> Picture:
    """Return the figure as an SVG element with the variables of the page instead of colours."""
    import matplotlib

    axes = figure.get_axes()[0]
    handles, labels = axes.get_legend_handles_labels()
    if labels:
        columns = 3 if max(map(len, labels)) < 18 else 2
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=columns,
            fontsize=10,
            frameon=False,
            labelcolor=THEME.text,
        )
    else:  # bars name themselves
        axes.set_ylim(-0.6, len(axes.get_yticks()) - 0.4)
    sink = StringIO()
    with matplotlib.rc_context({"svg.hashsalt": title, "svg.fonttype": "none"}):
        figure.savefig(sink, format="svg", transparent=True, metadata={"Date": None})
    text = sink.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    # The names inside a picture must not collide with those of another picture on the page.
    prefix = re.sub(r"\W+", "-", title)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{prefix}-", text)
    text = re.sub(r'<svg[^>]*viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" role="img">', text, count=1)
    return Picture(title, text)
