"""Tables that commands print: with rich on a terminal, otherwise as plain text that scripts can read.

Plain text is printed if stdout is not a terminal, if NO_COLOR is set, or if rich is not installed
(`pip install 'tokfuse[cli]'`). Every command prints its tables through `show`, so all of them follow this rule.
"""

import importlib.util
import os
import sys
from collections.abc import Container, Sequence
from dataclasses import dataclass

# Styles of cells that start with these words.
GOOD, BAD, POOR = "green", "red", "yellow"
STYLES = dict.fromkeys(("pass", "yes", "met", "kept"), GOOD)
STYLES |= dict.fromkeys(("error", "oom", "MISS", "FELL"), BAD)
STYLES |= dict.fromkeys(("fallback", "unsupported", "unusable", "not", "predicted"), POOR)


@dataclass(frozen=True)
class Table:
    """One table. The columns named in `numbers` are aligned to the right on a terminal."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    numbers: Container[str] = ()

    def markdown(self) -> list[str]:
        """Return the lines of the table in Markdown."""
        lines = [self.heads, ["---"] * len(self.heads), *self.rows]
        return ["| " + " | ".join(cells) + " |" for cells in lines]

    def aligned(self, indent: str = "", heads: bool = True) -> list[str]:
        """Return lines with left-aligned columns, separated by two blanks."""
        rows = [*([self.heads] if heads else []), *self.rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return [
            (indent + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))).rstrip()
            for row in rows
        ]


def is_rich() -> bool:
    """Return True if `show` prints tables with rich."""
    is_terminal = sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
    return is_terminal and not os.environ.get("NO_COLOR") and importlib.util.find_spec("rich") is not None


def show(plain: str, *parts: Table | str) -> None:
    """Print `parts` with rich, or `plain` where rich does not print."""
    if not is_rich():
        print(plain, flush=True)
        return
    from rich.console import Console

    console = Console(file=sys.stdout, highlight=False)
    for part in parts:
        # markup=False: cells such as "[1]" are text.
        console.print(part if isinstance(part, str) else _drawn(part), markup=False)


def _drawn(table: Table) -> object:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    out = RichTable(box=box.SIMPLE_HEAD, title=table.title or None, title_justify="left", title_style="bold")
    for head in table.heads:
        # A narrow terminal breaks cells and shortens none. The names in the first column differ at their ends, so they
        # are broken last.
        first = head == table.heads[0]
        out.add_column(Text(head), justify="right" if head in table.numbers else "left", overflow="fold", no_wrap=first)
    for row in table.rows:
        out.add_row(*(Text(cell, style=STYLES.get(cell.partition(" ")[0], "")) for cell in row))
    return out
