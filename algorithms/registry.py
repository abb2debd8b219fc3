"""The names of all methods, what may be claimed of each, and how one is made.

`label` is the strength of the claim: "exact" (formula verified in the paper or its authors' code),
"recon" (reconstructed from agreeing sources, assumptions named), "analogue" (our token-level
counterpart of a method from another domain), "utility" (a small function that serves the paper's
idea; it does not implement the paper).
"""

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, TypeVar

from tokfuse.runtime.core.checks import check_choice
from tokfuse.runtime.core.errors import refuse

LABELS = ("exact", "recon", "analogue", "utility")
KINDS = {
    "policy": "Policy optimisation",
    "preference": "Preference losses",
    "reward": "Reward models",
    "selection": "Selection, influence and curriculum",
    "causal": "Causal and off-policy estimators",
}
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method.

    Args:
        name: what `make` takes.
        cls: its class, a frozen dataclass whose fields are the options; or a function, whose
            keyword arguments are.
        kind: one of `KINDS`.
        table: module that holds the row, where that is not the one of `cls`.
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
    cls: Callable[..., Any]
    system: str
    label: str
    source: str
    summary: str
    differs: str = ""
    kind: str = "policy"
    table: str = ""
    preset: dict[str, Any] = dataclasses.field(default_factory=dict)
    required: tuple[str, ...] = ()

    @property
    def file(self) -> str:
        """The file in the repository that holds it."""
        module = self.table or self.cls.__module__
        return module.removeprefix("tokfuse.").replace(".", "/") + ".py"

    def options(self) -> dict[str, Any]:
        """Option -> default; MISSING for one that must be given."""
        out = _defaults(self.cls) | self.preset | dict.fromkeys(self.required, MISSING)
        out.pop("name", None)
        return out


def _defaults(made: Callable[..., Any]) -> dict[str, Any]:
    """Option -> default of a frozen dataclass, or of a function's keyword-only arguments."""
    if inspect.isfunction(made):
        return {
            name: MISSING if p.default is p.empty else p.default
            for name, p in inspect.signature(made).parameters.items()
            if p.kind is p.KEYWORD_ONLY
        }
    return {
        f.name: f.default if f.default_factory is MISSING else f.default_factory()
        for f in dataclasses.fields(made)  # type: ignore[arg-type]
    }


ENTRIES: dict[str, Entry] = {}


def add(entry: Entry) -> None:
    """Put a method into the registry."""
    assert entry.label in LABELS and entry.kind in KINDS, entry.name
    assert entry.name not in ENTRIES and entry.preset.keys() <= _defaults(entry.cls).keys()
    ENTRIES[entry.name] = entry


def register(name: str, **facts: Any) -> Callable[[T], T]:
    """Decorator: the class or function under `name`, with the facts of `Entry`."""

    def put(cls: T) -> T:
        assert callable(cls)
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
        By kind of the method: "policy" an `Algorithm` (for "grpo_guard" a `GRPOGuard`, which works
        on latents, not on tokens), "preference" a `PreferenceLoss`, otherwise a frozen object with
        the methods its docstring names, or the function itself with the options filled in.

    Raises:
        ValueError: an unknown name or option (the known are listed), an option without a published
            default that was left out, a value out of range.
    """
    one = entry(name)
    known = one.options()
    for option in options:
        if option not in known:
            raise refuse(
                f"algorithms.{name}", "options", f"among {', '.join(known)}", repr(option), "Check the spelling."
            )
    missing = [o for o, default in known.items() if default is MISSING and o not in options]
    if missing:
        raise refuse(
            f"algorithms.{name}",
            ", ".join(missing),
            "given (no published default)",
            "nothing",
            "Choose values for your run.",
        )
    given = one.preset | options
    if inspect.isfunction(one.cls):
        return functools.partial(one.cls, **given)
    named = {"name": name} if "name" in _defaults(one.cls) else {}
    return one.cls(**named, **given)


def names(kind: str | None = None) -> list[str]:
    """All names that `make` takes, sorted; those of one kind, a key of `registry.KINDS`."""
    if kind is not None:
        check_choice("algorithms.list", "kind", kind, KINDS)
    return sorted(name for name, one in ENTRIES.items() if kind in (None, one.kind))
