"""Plot bars of the median with its 20th and 80th percentile, one panel per case: `bench --png FILE`."""

import importlib
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tokfuse.bench.row import Row

COLOURS = {"ours": "#1a7f5a", "peer": "#8a94a6", "limit": "#d9a441"}
COLUMNS = 2


def check_available(refuse: Callable[[str], Any], what: str, *packages: str) -> None:
    """Report a missing package (default: matplotlib) before anything is measured or drawn."""
    for name in packages or ("matplotlib",):
        try:
            importlib.import_module(name)
        except ImportError:
            refuse(f"{what} needs {name}: pip install 'tokfuse[bench]'")


def draw(rows: Iterable[Row], path: Path) -> None:
    """Write the plot. Rows without timing are left out, and a fallback is hatched."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    cases: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.median_ms:
            key = (row.op, row.shape, row.dtype, row.mode, row.variant)
            cases.setdefault(key, []).append(row)
    height = max((len(group) for group in cases.values()), default=1)
    lines = max(1, -(-len(cases) // COLUMNS))
    figure = Figure(figsize=(6.5 * COLUMNS, lines * (1.2 + 0.3 * height)), layout="constrained")
    FigureCanvasAgg(figure)
    for index, (key, group) in enumerate(cases.items()):
        axes = figure.add_subplot(lines, COLUMNS, index + 1)
        _bars(axes, sorted(group, key=lambda row: row.median_ms or 0.0, reverse=True))
        axes.set_title(" ".join(key), fontsize=9)
    figure.savefig(path, dpi=120)


def _bars(axes: Any, group: list[Row]) -> None:
    medians = [row.median_ms or 0.0 for row in group]
    low = [m - (r.p20_ms or m) for m, r in zip(medians, group, strict=True)]
    high = [(r.p80_ms or m) - m for m, r in zip(medians, group, strict=True)]
    names = [f"{r.provider} (fallback)" if r.status == "fallback" else r.provider for r in group]
    bars = axes.barh(
        names,
        medians,
        xerr=[low, high],
        color=[COLOURS[row.role] for row in group],
        error_kw={"elinewidth": 1, "ecolor": "#333333"},
    )
    for bar, row in zip(bars, group, strict=True):
        bar.set_hatch("//" if row.status == "fallback" else "")
    axes.set_xscale("log")
    axes.set_xlabel("ms, median and p20 to p80", fontsize=8)
    axes.tick_params(labelsize=8)
