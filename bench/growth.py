"""Measure how time and memory grow along one axis at a time: `python -m tokfuse bench growth`.

A sweep varies tokens, vocabulary, hidden size, threads, or the share of rows with gradient, and keeps the
rest of a base shape. Each point is an ordinary case, so its rows are ordinary rows with the axis in
`sweep`. The tables show the quantities that must stay constant: CPU time per unit of work, and workspace
(the peak memory of one call minus the memory that it returns).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from tokfuse.bench.problem import Config
from tokfuse.bench.report import mebibytes, milliseconds
from tokfuse.bench.row import Row

AXES = ("tokens", "vocab", "hidden", "threads", "rows")
PEERS = "torch_eager"


@dataclass(frozen=True)
class Sweep:
    """The case `base` with `axis` set to each of `values`.

    On the axis "rows" the values are shares of rows with gradient.
    """

    axis: str
    values: tuple[float, ...]
    base: Config

    def points(self) -> Iterator[tuple[Config, int | None]]:
        """Return (case, threads) per value. None keeps the number of threads."""
        for value in self.values:
            yield at(self.base, self.axis, value), int(value) if self.axis == "threads" else None


def at(base: Config, axis: str, value: float) -> Config:
    """Return the base case with one axis set."""
    sizes = {"tokens": base.tokens, "vocab": base.vocab, "hidden": base.hidden}
    if axis in sizes:
        sizes[axis] = int(value)
    variant = f"rows={value:g}" if axis == "rows" else base.variant
    return replace(base, variant=variant, **sizes)


def sweeps(seed: int = 0, quick: bool = False, device: str = "cpu") -> list[Sweep]:
    """Return every sweep. `quick` uses small shapes, which only check that it works."""
    tokens, hidden, vocab = (32, 32, 4096) if quick else (512, 576, 49152)
    common = {"seed": seed, "device": device}
    head = Config("policy_step_hidden", "step", "rows=1", "float32", tokens, vocab, hidden, **common)
    given = Config("policy_step", "step", "entropy=0.01", "float32", tokens, vocab, **common)
    out = []
    for base in (given, head):
        out += [
            Sweep("tokens", tuple(tokens * f for f in (0.25, 0.5, 1, 2, 4)), base),
            Sweep("vocab", tuple(vocab * f for f in (0.25, 0.5, 1, 2, 3)), base),
        ]
        if base.hidden:
            out.append(Sweep("hidden", tuple(hidden * f for f in (0.5, 1, 2, 4)), base))
        out.append(Sweep("threads", (1, 2), base))
    return [*out, Sweep("rows", (0.0625, 0.25, 0.5, 0.75, 1.0), head)]


def choose(axes: str | None) -> tuple[str, ...]:
    """Return the axes of `--axes`; all axes if it is None.

    Raises:
        ValueError: unknown axis.
    """
    if axes is None:
        return AXES
    wanted = tuple(name.strip() for name in axes.split(","))
    for name in wanted:
        if name not in AXES:
            raise ValueError(f"bench: --axes must name some of {', '.join(AXES)}; got {name!r}.")
    return wanted


def value_of(row: Row) -> float:
    """Return the position of a row on its axis."""
    if row.sweep == "rows":
        return float(row.variant.removeprefix("rows=").partition(",")[0])
    return float(getattr(row, row.sweep))


def unit_of(row: Row) -> tuple[float, str]:
    """Return the work that CPU time should be proportional to, and the name of the quotient."""
    logits = row.tokens * row.vocab
    if row.hidden:
        return row.flops * 1e-9, "CPU ms / GFLOP"
    return logits * 1e-6, "CPU ms / M logits"


def tables(rows: Iterable[Row]) -> str:
    """Return one Markdown table per op and axis."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        if row.sweep and row.role != "limit" and row.status == "pass":
            groups.setdefault((row.op, row.sweep), []).append(row)
    return "\n\n".join(_table(op, axis, group) for (op, axis), group in groups.items())


def _table(op: str, axis: str, group: list[Row]) -> str:
    ours = [name for name in _names(group, "ours")]
    others = _names(group, "peer")
    unit = unit_of(group[0])[1]
    heads = [axis]
    for name in ours:
        heads += [name, unit, "of limit", "workspace"]
    for name in others:
        heads += [f"{name} / {ours[0]}" if ours else name, f"{name} workspace"]
    lines = [heads, ["---"] * len(heads)]
    for value in sorted({value_of(row) for row in group}):
        found = {row.provider: row for row in group if value_of(row) == value}
        cells = [f"{value:g}" if value < 1e6 else f"{value:.0f}"]
        for name in ours:
            cells += _ours_cells(found.get(name))
        for name in others:
            row = found.get(name)
            ratio = "-" if row is None or row.ratio is None else f"{row.ratio:.1f}"
            cells += [ratio, mebibytes(row.workspace_bytes if row else None)]
        lines.append(cells)
    body = "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
    return f"#### {op}: {axis}\n\n{_fixed(axis, group)}\n\n{body}"


def _names(group: list[Row], role: str) -> list[str]:
    return list(dict.fromkeys(row.provider for row in group if row.role == role))


def _ours_cells(row: Row | None) -> list[str]:
    if row is None or row.median_ms is None:
        return ["-"] * 4
    share = "-" if row.limit_share is None else f"{row.limit_share:.0%}"
    per_work = "-" if row.cpu_ms is None else f"{row.cpu_ms / unit_of(row)[0]:.3f}"
    return [milliseconds(row.median_ms), per_work, share, mebibytes(row.workspace_bytes)]


def _fixed(axis: str, group: list[Row]) -> str:
    """Return the constant properties as one line."""
    first = group[0]
    parts = {"tokens": first.tokens, "hidden": first.hidden, "vocab": first.vocab, "threads": first.threads}
    kept = [f"{name} {value}" for name, value in parts.items() if name != axis and value]
    variant = [] if axis == "rows" else [first.variant]
    return ", ".join([*kept, first.dtype, first.mode, *variant]) + "."
