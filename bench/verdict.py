"""Verdicts about benchmark cases, for `bench targets` and `bench compare`."""

from collections.abc import Sequence
from dataclasses import dataclass

from tokfuse.inspection import tables


@dataclass(frozen=True)
class Verdict:
    """A judged case: the verdict as a word, the case, and the reached and required values as text."""

    word: str
    case: str
    text: str
    is_good: bool

    def line(self, width: int) -> str:
        """Return the verdict as one line of plain text; the case takes `width` columns."""
        return f"{self.word:<4} {self.case:<{width}} {self.text}"


def show(verdicts: Sequence[Verdict], empty: str, width: int) -> int:
    """Print the verdicts, or `empty` if there is none. Return the exit status: 1 unless there are only good ones."""
    if verdicts:
        rows = [(verdict.word, verdict.case, verdict.text) for verdict in verdicts]
        lines = "\n".join(verdict.line(width) for verdict in verdicts)
        tables.show(lines, tables.Table(("verdict", "case", "values"), rows))
    else:
        print(empty)
    return int(not verdicts or not all(verdict.is_good for verdict in verdicts))
