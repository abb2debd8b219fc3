"""A progress bar on stderr for commands that take more than a few seconds."""

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


class _NoBar:
    """Replacement for the tqdm bar if tqdm is not installed."""

    def update(self) -> None: ...

    def clear(self) -> None: ...

    def set_postfix_str(self, text: str) -> None: ...


@contextlib.contextmanager
def bar(total: int, unit: str, quiet: bool = False) -> Iterator[Any]:
    """Yield a bar with `update`, `clear` and `set_postfix_str`.

    It is silent with `quiet`, without tqdm, or if stderr is not a terminal.
    """
    try:
        from tqdm import tqdm
    except ImportError:
        yield _NoBar()
        return
    disable = quiet or not sys.stderr.isatty()
    with tqdm(total=total, file=sys.stderr, disable=disable, unit=unit, dynamic_ncols=True) as shown:
        yield shown
