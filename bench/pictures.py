"""Draw the pictures of the documentation from recorded rows: `bench numbers FILES --pictures docs/pictures`.

Each picture is written for a light and a dark page, with a transparent background. Text is at least 10 points
at a width of 6 inches, so it is readable on a phone. The description inside the SVG file contains the values
that were drawn. A test compares it with the rows in `bench/results`.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from tokfuse.bench import growth
from tokfuse.bench.row import Row

# The case in which every peer ran: loss and both gradients from hidden states and the lm_head.
CASE = ("policy_step_hidden", "rows=1", "256x576x49152", "float32")
# Providers of the picture, with their names in it. CCE computes the log-probability only.
PROVIDERS = {
    "tokfuse": "tokfuse",
    "cut_cross_entropy": "CCE (no entropy)",
    "torch_compile": "torch.compile",
    "torch_eager": "torch eager",
    "trl": "TRL",
    "liger_flsce": "Liger",
    "verl": "verl",
}
WIDTH = 6.0
Values = dict[str, Any]


@dataclass(frozen=True)
class Theme:
    """Colours of one version of a picture."""

    name: str
    text: str
    grid: str
    ours: str
    peer: str


THEMES = (
    Theme("light", "#1f2933", "#d5dbe1", "#00796b", "#9aa5b1"),
    Theme("dark", "#e4e7eb", "#3e4c59", "#2dd4bf", "#7b8794"),
)


def comparison(rows: Sequence[Row]) -> Values:
    """Return the values of the bars, fastest first: milliseconds, time relative to tokfuse, MiB of workspace."""
    found = {row.provider: row for row in rows if _case(row) == CASE and row.status == "pass" and not row.sweep}
    bars: Values = {}
    for provider, name in PROVIDERS.items():
        row = found.get(provider)
        if row is not None and row.median_ms and row.workspace_bytes is not None:
            bars[name] = [row.median_ms, row.ratio, round(row.workspace_bytes / 2**20, 1)]
    return dict(sorted(bars.items(), key=lambda bar: bar[1][0]))


def scaling(rows: Sequence[Row]) -> Values:
    """Return the points of the lines: per panel and provider, [position, milliseconds or MiB] in order."""
    panels: Values = {}
    for op, axis, kind in PANELS:
        lines: Values = {}
        for row in rows:
            if (row.op, row.sweep) != (op, axis) or row.role == "limit" or row.status != "pass":
                continue
            value = row.median_ms if kind == "ms" else (row.workspace_bytes or 0) / 2**20
            lines.setdefault(row.provider, []).append([growth.value_of(row), round(value or 0.0, 3)])
        if lines:
            panels[f"{op} {axis} {kind}"] = {name: sorted(points) for name, points in lines.items()}
    return panels


PANELS = (
    ("policy_step", "tokens", "ms"),
    ("policy_step_hidden", "tokens", "ms"),
    ("policy_step", "vocab", "ms"),
    ("policy_step_hidden", "vocab", "ms"),
    ("policy_step_hidden", "rows", "ms"),
    ("policy_step_hidden", "tokens", "MiB"),
)
AXES = {"tokens": "tokens", "vocab": "vocabulary", "rows": "share of tokens with gradient"}
SOURCES = {"policy_step": "Logits", "policy_step_hidden": "Hidden states"}


def write(rows: Sequence[Row], folder: Path) -> list[Path]:
    """Write every picture in every theme. Return the files."""
    folder.mkdir(parents=True, exist_ok=True)
    out = []
    for name, (values_of, draw) in PICTURES.items():
        values = values_of(rows)
        if values:
            out += [_save(draw, values, theme, folder / f"{name}-{theme.name}.svg") for theme in THEMES]
    return out


def drawn(file: Path) -> Values:
    """Return the values that a picture shows, from its description."""
    for element in ElementTree.parse(file).iter():
        if element.tag.endswith("}description") and element.text:
            values: Values = json.loads(element.text)
            return values
    raise ValueError(f"pictures: {file} must contain the description that write() stores; write it again.")


def _case(row: Row) -> tuple[str, ...]:
    return row.op, row.variant, row.shape, row.dtype


def _save(draw: Callable[[Values, Theme], Any], values: Values, theme: Theme, path: Path) -> Path:
    import matplotlib

    # Fixed ids and no date: the same rows and the same matplotlib give the same file.
    with matplotlib.rc_context({"svg.hashsalt": "tokfuse", "svg.fonttype": "path"}):
        picture = draw(values, theme)
        metadata = {"Date": None, "Creator": None, "Description": json.dumps(values)}
        picture.savefig(path, format="svg", transparent=True, metadata=metadata)
    return path


def figure(height: float, width: float = WIDTH) -> Any:
    """Return an empty figure of matplotlib that is saved as SVG."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasSVG(out)
    return out


def style(axes: Any, title: str, theme: Theme) -> None:
    """Set the colours and the font sizes of one panel."""
    axes.set_title(title, fontsize=11, color=theme.text, loc="left")
    axes.tick_params(labelsize=10, colors=theme.text, which="both", color=theme.grid)
    axes.xaxis.label.set_color(theme.text)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(theme.grid)


def _draw_comparison(values: Values, theme: Theme) -> Any:
    names = list(values)[::-1]
    picture = figure(1.1 + 0.62 * len(names))
    axes = picture.subplots(2, 1)
    for panel, title, column in ((axes[0], "Time (ms), smaller is better", 0), (axes[1], "Memory (MiB)", 2)):
        sizes = [values[name][column] for name in names]
        colours = [theme.ours if name == "tokfuse" else theme.peer for name in names]
        bars = panel.barh(names, sizes, color=colours, height=0.72)
        if column == 0:
            labels = [f"{values[n][0]:.0f}  ({values[n][1]:.1f}x)" for n in names]
        else:
            labels = [f"{size:.0f}" for size in sizes]
        panel.bar_label(bars, labels, padding=4, fontsize=10, color=theme.text)
        panel.set_xlim(0, max(sizes) * 1.3)
        panel.set_xticks([])
        style(panel, title, theme)
        panel.spines["bottom"].set_visible(False)
    return picture


def _draw_scaling(values: Values, theme: Theme) -> Any:
    lines = -(-len(values) // 2)
    picture = figure(2.3 * lines)
    handles: dict[str, Any] = {}
    for index, (panel, series) in enumerate(values.items()):
        op, axis, kind = panel.split()
        axes = picture.add_subplot(lines, 2, index + 1)
        for provider, points in series.items():
            ours = provider.startswith("tokfuse")
            label = "tokfuse, in place" if provider == "tokfuse_" else PROVIDERS[provider]
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=theme.ours if ours else theme.peer,
                marker="o",
                linestyle="--" if provider == "tokfuse_" else "-",
                markersize=4,
                label=label,
            )
        is_share = axis == "rows"
        axes.set_yscale("linear" if is_share else "log")
        axes.set_xscale("linear" if is_share else "log", **({} if is_share else {"base": 2}))
        if is_share:
            axes.set_ylim(bottom=0)
        else:
            ticks = [x for x, _ in next(iter(series.values()))]
            axes.set_xticks(ticks, [f"{x:.0f}" if x < 1e4 else f"{x / 1024:.0f}k" for x in ticks])
            axes.minorticks_off()
        axes.set_xlabel(AXES[axis], fontsize=10)
        style(axes, f"{SOURCES[op]}: {'time (ms)' if kind == 'ms' else 'memory (MiB)'}", theme)
        axes.grid(color=theme.grid, linewidth=0.5)
        handles |= {line.get_label(): line for line in axes.get_lines()}
    picture.legend(
        handles.values(),
        handles,
        loc="outside upper left",
        ncols=len(handles),
        fontsize=10,
        frameon=False,
        labelcolor=theme.text,
    )
    return picture


PICTURES: dict[str, tuple[Callable[[Sequence[Row]], Values], Callable[[Values, Theme], Any]]] = {
    "comparison": (comparison, _draw_comparison),
    "scaling": (scaling, _draw_scaling),
}
