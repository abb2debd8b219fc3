"""Print rows as text: one line per row during the run, and one Markdown table per case at the end."""

from collections.abc import Callable, Iterable, Sequence

from tokfuse.bench.row import ERROR_NAMES, Row
from tokfuse.inspection import tables

HEADER = (
    f"{'op':<25}{'shape':<17}{'dtype':<9}{'mode':<17}{'variant':<18}{'provider':<25}"
    f"{'backend':<18}{'status':<12}{'median':>10}{'p20 - p80':>17}{'ratio':>8}{'limit':>7}"
    f"{'tokens/s':>10}{'GB/s':>8}{'GFLOP/s':>9}{'energy':>10}{'peak':>10}  max error"
)


def milliseconds(value: float | None) -> str:
    """Format a time in milliseconds, or in microseconds below 0.1 ms."""
    if value is None:
        return "-"
    return f"{value * 1e3:.2f} us" if value < 0.1 else f"{value:.2f} ms"


def mebibytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 2**20:.1f} MiB"


def number(value: float | None) -> str:
    """Format a number with three significant digits, in thousands or millions if that is shorter."""
    if value is None:
        return "-"
    for low, scale, unit in ((1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if value >= low:
            return f"{value / scale:.3g}{unit}"
    return f"{value:.3g}" if value < 1e3 else f"{value:.0f}"


def spread(row: Row) -> str:
    """Format the 20th and 80th percentile, in the unit of the median."""
    if row.p20_ms is None or row.p80_ms is None or row.median_ms is None:
        return "-"
    scale = 1e3 if row.median_ms < 0.1 else 1.0
    return f"{row.p20_ms * scale:.3g} - {row.p80_ms * scale:.3g}"


def energy(row: Row) -> str:
    """Format the energy of one call; "-" if no driver reported it."""
    return "-" if row.energy_mj is None else f"{row.energy_mj:.3g} mJ"


def worst_errors(row: Row) -> str:
    """Return the largest error of an output (absolute) and of a gradient (relative), with their names."""
    values = {n: getattr(row, f"error_{n}") for n in (*ERROR_NAMES, "output")}
    texts = []
    for is_grad, sign in ((False, ""), (True, "rel ")):
        known = {n: v for n, v in values.items() if v is not None and n.startswith("grad_") == is_grad}
        if known:
            name = max(known, key=known.__getitem__)
            texts.append(f"{name} {sign}{known[name]:.1e}")
    return ", ".join(texts)


def line(row: Row) -> str:
    """Format one row as one line, with the columns of `HEADER`."""
    ratio = "-" if row.ratio is None else f"{row.ratio:.2f}"
    share = "-" if row.limit_share is None else f"{row.limit_share:.0%}"
    text = (
        f"{row.op:<25}{row.shape:<17}{row.dtype:<9}{row.mode:<17}{row.variant:<18}"
        f"{row.provider:<25}{row.backend:<18}{row.status:<12}{milliseconds(row.median_ms):>10}"
        f"{spread(row):>17}{ratio:>8}{share:>7}{number(row.tokens_per_s):>10}"
        f"{number(row.gb_per_s):>8}{number(row.gflop_per_s):>9}{energy(row):>10}"
        f"{mebibytes(row.peak_extra_bytes):>10}  {worst_errors(row)}"
    )
    return f"{text}  ({row.note})" if row.note else text.rstrip()


# Columns of a table on a terminal. A column without values is left out.
_CASE = ("op", "shape", "dtype", "mode", "variant", "gpu")
_CELLS: dict[str, Callable[[Row], str]] = {
    **{name: lambda row, name=name: str(getattr(row, name)) for name in (*_CASE, "provider", "backend", "status")},
    "median": lambda row: milliseconds(row.median_ms),
    "p20 - p80": spread,
    "ratio": lambda row: "-" if row.ratio is None else f"{row.ratio:.2f}",
    "limit": lambda row: "-" if row.limit_share is None else f"{row.limit_share:.0%}",
    "tokens/s": lambda row: number(row.tokens_per_s),
    "GB/s": lambda row: number(row.gb_per_s),
    "GFLOP/s": lambda row: number(row.gflop_per_s),
    "energy": energy,
    "peak": lambda row: mebibytes(row.peak_extra_bytes),
    "max error": worst_errors,
    "note": lambda row: row.note,
}
_TEXTS = (*_CASE, "provider", "backend", "status", "max error", "note")


def table(rows: Sequence[Row], title: str = "") -> tables.Table:
    """Return the rows as a table for a terminal. What all rows of a case have in common is in its title."""
    columns = {name: [cell(row) for row in rows] for name, cell in _CELLS.items()}
    common = [values[0] for name, values in columns.items() if name in _CASE and len(set(values)) == 1]
    shown = {
        name: values
        for name, values in columns.items()
        if not set(values) <= {"", "-"} and (name not in _CASE or len(set(values)) > 1)
    }
    heads = list(shown)
    cells = list(zip(*shown.values(), strict=True))
    return tables.Table(heads, cells, title or " ".join(filter(None, common)), set(heads) - set(_TEXTS))


def markdown(rows: Iterable[Row]) -> str:
    """Return one table per case, with one ratio column per tokfuse provider."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        key = (row.op, row.shape, row.dtype, row.mode, row.variant)
        groups.setdefault(key, []).append(row)
    parts = [_facts(next(iter(groups.values()))[0])] if groups else []
    parts += [_table(key, group) for key, group in groups.items()]
    return "\n\n".join(parts) + "\n"


def _facts(row: Row) -> str:
    return (
        f"{row.cpu_model} ({row.machine}), {row.threads} threads, OMP_WAIT_POLICY="
        f"{row.omp_wait_policy or 'unset'}, ISA {row.isa}, torch {row.torch}, tokfuse "
        f"{row.tokfuse} at {row.commit or 'unknown commit'}, {row.timestamp}. `{row.command}`"
    )


def _table(key: tuple[str, ...], group: list[Row]) -> str:
    ours = [r for r in group if r.role == "ours" and r.status == "pass" and r.median_ms]
    heads = ["provider", "status", "median", "p20 - p80", *(f"/ {r.provider}" for r in ours)]
    heads += ["of limit", "tokens/s", "GB/s", "GFLOP/s", "energy", "peak extra", "max error", "note"]
    rows = [heads, ["---"] * len(heads)]
    for row in sorted(group, key=lambda row: row.median_ms is None):  # timed rows come first
        name = row.provider if row.role == "limit" else f"{row.provider} ({row.backend or '-'})"
        ratios = [f"{row.median_ms / base.median_ms:.2f}" if row.median_ms and base.median_ms else "-" for base in ours]
        share = f"{row.limit_share:.0%} of {row.limit}" if row.limit_share is not None else "-"
        rows.append(
            [
                name,
                row.status,
                milliseconds(row.median_ms),
                spread(row),
                *ratios,
                share,
                number(row.tokens_per_s),
                number(row.gb_per_s),
                number(row.gflop_per_s),
                energy(row),
                mebibytes(row.peak_extra_bytes),
                worst_errors(row),
                row.note.replace("|", "/"),
            ]
        )
    first = group[0]
    title = f"### {' '.join(key)}\n\nLeast work: {first.bytes_formula}; {first.flops_formula}.\n\n"
    return title + "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
