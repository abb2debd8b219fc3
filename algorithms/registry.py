"""The names of all methods, what may be claimed of each, and how one is made.

`label` is the strength of the claim: "exact" (formula verified in the paper or its authors' code),
"recon" (reconstructed from agreeing sources, assumptions named), "analogue" (our token-level
counterpart of a method from another domain).
"""

import dataclasses
import difflib
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from tokfuse.algorithms.base import Algorithm
from tokfuse.runtime.errors import refuse

LABELS = ("exact", "recon", "analogue")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method.

    Args:
        name: what `make` takes.
        cls: its class, a frozen dataclass whose fields are the options.
        preset: values of fields that make the method out of the class.
        required: options without a published default: they must be given.
        system: its row in the paper index.
        label: one of `LABELS`.
        source: paper, and the code it was read in.
        summary: one line.
        differs: where this is not the paper's or the released code's own way, and why; "" if
            nowhere.
    """

    name: str
    cls: type
    system: str
    label: str
    source: str
    summary: str
    differs: str = ""
    preset: dict[str, Any] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file in the repository that holds it."""
        stem = self.cls.__module__.rpartition(".")[2]
        return f"algorithms/{'table' if stem == 'standard' else stem}.py"

    def options(self) -> dict[str, Any]:
        """Option -> default; MISSING for one that must be given."""
        out = {}
        for f in dataclasses.fields(self.cls):
            default = f.default if f.default_factory is MISSING else f.default_factory()
            out[f.name] = self.preset.get(f.name, default)
        out |= dict.fromkeys(self.required, MISSING)
        out.pop("name", None)
        return out


ENTRIES: dict[str, Entry] = {}


def add(entry: Entry) -> None:
    """Put a method into the registry."""
    assert entry.label in LABELS and entry.name not in ENTRIES, entry.name
    ENTRIES[entry.name] = entry


def register(name: str, **facts: Any) -> Callable[[type[T]], type[T]]:
    """Class decorator: the class under `name`, with the facts of `Entry`."""

    def put(cls: type[T]) -> type[T]:
        add(Entry(name=name, cls=cls, **facts))
        return cls

    return put


def entry(name: str) -> Entry:
    """The entry of that name; an unknown name lists the known."""
    if name not in ENTRIES:
        near = difflib.get_close_matches(str(name), ENTRIES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else "Choose a listed name."
        known = ", ".join(sorted(ENTRIES))
        raise refuse("algorithms.make", "name", f"one of {known}", repr(name), hint)
    return ENTRIES[name]


def make(name: str, **options: Any) -> Any:
    """The method of that name, configured: a frozen object without state.

    Args:
        name: one of `tokfuse.algorithms.list()`.
        options: its fields, see `python -m tokfuse algorithms NAME`. Defaults are the paper's.

    Returns:
        An `Algorithm` (for "grpo_guard" a `GRPOGuard`, which works on latents, not on tokens).

    Raises:
        ValueError: an unknown name or option (the known are listed), an option without a published
            default that was left out, a value out of range.
    """
    one = entry(name)
    known = one.options()
    for option in options:
        if option not in known:
            raise refuse(f"algorithms.{name}", "options", f"among {', '.join(known)}",
                         repr(option), "Check the spelling.")  # fmt: skip
    missing = [o for o, default in known.items() if default is MISSING and o not in options]
    if missing:
        raise refuse(f"algorithms.{name}", ", ".join(missing), "given (no published default)",
                     "nothing", "Choose values for your run.")  # fmt: skip
    named = {"name": name} if issubclass(one.cls, Algorithm) else {}
    return one.cls(**{**named, **one.preset, **options})


def names() -> list[str]:
    """All names that `make` takes, sorted."""
    return sorted(ENTRIES)
