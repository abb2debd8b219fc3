"""Draw plots as inline SVG: lines and points on linear or logarithmic axes, with a legend and tooltips.

The plots are drawn in Python, so the report is one file and works without scripts. Colours are CSS classes
of page.css: `s0`, `s1`, ... in the order of the series.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, HEIGHT = 520, 320
LEFT, RIGHT, TOP, BOTTOM = 64, 14, 16, 46
COLOURS = 8


@dataclass(frozen=True)
class Point:
    """One point; `text` is its tooltip."""

    x: float
    y: float
    text: str = ""


@dataclass
class Series:
    """Points with one name.

    `style` is "line", "dot", "cross" or "roof" (a line without marks). `colour` is the number of a class; None
    uses the position among the series.
    """

    name: str
    points: list[Point] = field(default_factory=list)
    style: str = "line"
    colour: int | None = None

    def css(self, index: int) -> str:
        return f"s{(index if self.colour is None else self.colour) % COLOURS}"


def number(value: float) -> str:
    """Format a tick label: 0.5, 12, 3k, 49k, 1.5M."""
    for scale, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}"


class _Axis:
    """Maps values to pixels."""

    def __init__(self, values: Sequence[float], low_px: float, high_px: float, log: bool) -> None:
        self.log, self.low_px, self.high_px = log, low_px, high_px
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
            pad = max(0.06 * (high - low), 0.06)
            self.low, self.high = low - pad, high + pad
        else:
            self.low, self.high = min(0.0, low), high * 1.06 or 1.0

    def at(self, value: float) -> float:
        place = math.log10(value) if self.log else value
        share = (place - self.low) / (self.high - self.low)
        return round(self.low_px + share * (self.high_px - self.low_px), 1)

    def ticks(self) -> list[float]:
        if not self.log:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
            step *= 2 if (self.high - self.low) / step > 8 else 1
            return [i * step for i in range(int(self.high / step) + 1)]
        decades = range(math.floor(self.low), math.ceil(self.high) + 1)
        factors = (1.0,) if self.high - self.low > 3 else (1.0, 2.0, 5.0)
        candidates = [f * 10.0**d for d in decades for f in factors]
        return [t for t in candidates if self.low <= math.log10(t) <= self.high]


def plot(
    title: str, series: Sequence[Series], x_label: str, y_label: str, log_x: bool = True, log_y: bool = True
) -> str:
    """Return a figure element; "" if there is nothing to draw."""
    drawn = [s for s in series if s.points]
    if not drawn:
        return ""
    x = _Axis([p.x for s in drawn for p in s.points], LEFT, WIDTH - RIGHT, log_x)
    y = _Axis([p.y for s in drawn for p in s.points], HEIGHT - BOTTOM, TOP, log_y)
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick in x.ticks():
        at = x.at(tick)
        parts.append(f'<path class="grid" d="M{at} {TOP}V{HEIGHT - BOTTOM}"/>')
        parts.append(_text(at, HEIGHT - BOTTOM + 15, number(tick), "middle"))
    for tick in y.ticks():
        at = y.at(tick)
        parts.append(f'<path class="grid" d="M{LEFT} {at}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, at + 4, number(tick), "end"))
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 10, x_label, "middle"))
    turned = f'transform="rotate(-90 14 {HEIGHT / 2})"'
    parts.append(_text(14, HEIGHT / 2, y_label, "middle", turned))
    for index, one in enumerate(drawn):
        parts += _marks(one, one.css(index), x, y)
    parts.append("</svg>")
    return f"<figure><figcaption>{escape(title)}</figcaption>{''.join(parts)}{_legend(drawn)}</figure>"


def _marks(one: Series, colour: str, x: _Axis, y: _Axis) -> list[str]:
    points = sorted(one.points, key=lambda p: p.x)
    out = []
    if one.style in ("line", "roof"):
        path = "L".join(f"{x.at(p.x)} {y.at(p.y)}" for p in points)
        out.append(f'<path class="{one.style} {colour}" d="M{path}"/>')
    if one.style == "roof":
        return out
    for p in points:
        at_x, at_y = x.at(p.x), y.at(p.y)
        tip = f"<title>{escape(p.text or one.name)}</title>"
        if one.style == "cross":
            shape = f'd="M{at_x - 4} {at_y - 4}l8 8m0-8l-8 8"'
            out.append(f'<path class="cross {colour}" {shape}>{tip}</path>')
        else:
            out.append(f'<circle class="{colour}" cx="{at_x}" cy="{at_y}" r="4">{tip}</circle>')
    return out


def _legend(series: Sequence[Series]) -> str:
    items = "".join(f'<li><i class="{one.css(index)}"></i>{escape(one.name)}</li>' for index, one in enumerate(series))
    return f'<ul class="legend">{items}</ul>'


def _text(x: float, y: float, text: str, anchor: str, more: str = "") -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" {more}>{escape(text)}</text>'
