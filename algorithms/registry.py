"""Registry of all methods: names, the claim each makes about its paper, and the function that makes one.

`label` is the strength of the claim:

* "exact (paper)": the formula is the paper's.
* "exact (released code)": it computes the same as the code that `source` names.
* "exact (paper, released code)": the two differ; an option, usually `form`, selects one, and each is exact.
* "recon": reconstructed from sources that agree; the assumptions are named.
* "analogue": a token-level counterpart of a method from another domain.
* "utility": a small function that serves the paper's idea but does not implement the paper.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from dataclasses import MISSING, dataclass
from typing import Any, NamedTuple, TypeVar

from tokfuse.algorithms import host_words
from tokfuse.runtime.core.checks import check_choice
from tokfuse.runtime.core.errors import refuse

EXACT = ("exact (paper, released code)", "exact (paper)", "exact (released code)")
LABELS = (*EXACT, "recon", "analogue", "utility")
KINDS = {
    "policy": "Policy optimisation",
    "preference": "Preference losses",
    "distillation": "Distillation",
    "reward": "Reward models",
    "selection": "Selection, influence and curriculum",
    "causal": "Causal and off-policy estimators",
}
T = TypeVar("T")


class Preset(NamedTuple):
    """A published configuration of a method."""

    options: dict[str, Any]
    source: str
    """The file or page that publishes the values."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One method.

    Args:
        name: name that `make` takes.
        cls: class of the method, a frozen dataclass whose fields are the options; or a function whose
            keyword arguments are the options.
        kind: one of `KINDS`.
        table: module that contains the registration, if it differs from the module of `cls`.
        preset: field values that turn the class into this method.
        required: options that must be given, because no default was published.
        presets: published configurations by name; "authors" is the configuration of the released code.
        system: row in the paper index.
        label: one of `LABELS`.
        source: the paper, and the code that the formula was read from.
        summary: one line.
        differs: how and why the method differs from the paper or the released code; "" if it does not.
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
    presets: dict[str, Preset] = dataclasses.field(default_factory=dict)

    @property
    def file(self) -> str:
        """The file in the repository that defines the method."""
        module = self.table or self.cls.__module__
        return module.removeprefix("tokfuse.").replace(".", "/") + ".py"

    def options(self) -> dict[str, Any]:
        """Return option -> default. The value is MISSING for an option that must be given."""
        out = _defaults(self.cls) | self.preset | dict.fromkeys(self.required, MISSING)
        out.pop("name", None)
        return out


def _defaults(made: Callable[..., Any]) -> dict[str, Any]:
    """Return option -> default of a frozen dataclass, or of a function's keyword-only arguments."""
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


def exact(source: str) -> str:
    """Return the label of a formula that was read from `source`: code if it names any, else the paper."""
    code = ("verl", "TRL", "code", "github", "trainer", "Liger", "OpenRLHF", "NeMo-RL")
    return "exact (released code)" if any(word in source for word in code) else "exact (paper)"


def add(entry: Entry) -> None:
    """Add a method to the registry."""
    assert entry.label in LABELS, f"{entry.name}: label must be one of {LABELS}; got {entry.label!r}"
    assert entry.kind in KINDS, entry.name
    assert entry.name not in ENTRIES and entry.preset.keys() <= _defaults(entry.cls).keys()
    ENTRIES[entry.name] = entry


def add_preset(method: str, name: str, source: str, **options: Any) -> None:
    """Add a published configuration to a method of the registry."""
    one = ENTRIES[method]
    assert options.keys() <= one.options().keys() and name not in one.presets, (method, name)
    one.presets[name] = Preset(options, source)


def register(name: str, **facts: Any) -> Callable[[T], T]:
    """Register the decorated class or function under `name`, with the fields of `Entry`."""

    def put(cls: T) -> T:
        assert callable(cls)
        add(Entry(name=name, cls=cls, **facts))
        return cls

    return put


def entry(name: str) -> Entry:
    """Return the entry with that name. For an unknown name, the error names the nearest one."""
    if name not in ENTRIES:
        near = host_words.method_hint(name, ENTRIES)
        hint = f"Did you mean {near!r}? " if near else ""
        listed = "`python -m tokfuse algorithms` and tokfuse.algorithms.list() list all."
        raise refuse("algorithms.make", "name", "the name of a method", repr(name), hint + listed)
    return ENTRIES[name]


def make(name: str, *, preset: str | None = None, **options: Any) -> Any:
    """Return the method with that name, configured: a frozen object without state.

    Args:
        name: one of `tokfuse.algorithms.list()`.
        preset: a published configuration of the method, e.g. "authors" for the released code's. `options` replace its
            values. None: the defaults.
        options: fields of the method. `python -m tokfuse algorithms NAME` lists them and the presets. The defaults
            are the paper's.

    Returns:
        The type depends on the kind of the method. "policy": an `Algorithm`, or for "grpo_guard" a
        `GRPOGuard`, which works on latents and not on tokens. "preference": a `PreferenceLoss`. "distillation":
        a `Distillation`, or the schedule of one. All other kinds: a frozen object with the methods that its
        docstring names, or the function itself with the options filled in.

    Raises:
        ValueError: an unknown name, preset or option; a missing option that has no published default; a value out of
            range. For an unknown word, also one of TRL or verl, the message names the nearest known one.
    """
    one = entry(name)
    known = one.options()
    if preset is not None:
        options = _published(one, preset) | options
    for option in options:
        if option not in known:
            hint = host_words.option_hint(option, known)
            listed = f"`python -m tokfuse algorithms {name}` lists the options."
            raise refuse(
                f"algorithms.{name}", "every option", "one of the method's", repr(option), f"{hint} {listed}".strip()
            )
    missing = [o for o, default in known.items() if default is MISSING and o not in options]
    if missing:
        raise refuse(
            f"algorithms.{name}",
            ", ".join(missing),
            "given (no default was published)",
            "nothing",
            "Choose values for your run.",
        )
    given = one.preset | options
    if inspect.isfunction(one.cls):
        return functools.partial(one.cls, **given)
    named = {"name": name} if "name" in _defaults(one.cls) else {}
    return one.cls(**named, **given)


def _published(one: Entry, preset: str) -> dict[str, Any]:
    """Return the options of a preset."""
    if preset not in one.presets:
        known = ", ".join(map(repr, one.presets)) or "left out (this method has none)"
        near = host_words.nearest(preset, one.presets)
        raise refuse(
            f"algorithms.{one.name}",
            "preset",
            known,
            repr(preset),
            f"Did you mean {near!r}?" if near else "Use the defaults, or set the options.",
        )
    return one.presets[preset].options


def names(kind: str | None = None) -> list[str]:
    """Return all names that `make` takes, sorted. With `kind`, a key of `registry.KINDS`: only that kind."""
    if kind is not None:
        check_choice("algorithms.list", "kind", kind, KINDS)
    return sorted(name for name, one in ENTRIES.items() if kind in (None, one.kind))
