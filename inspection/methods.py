"""`python -m tokfuse algorithms`: list the methods and their options, and write the paper index."""

import argparse
import dataclasses
import inspect
import textwrap
from collections.abc import Sequence
from pathlib import Path

import tokfuse.algorithms  # noqa: F401  (fills the registry)
from tokfuse.algorithms import gallery
from tokfuse.algorithms.registry import ENTRIES, KINDS, Entry, entry, names
from tokfuse.inspection import tables

INDEX_BEGIN = "<!-- index: written by `python -m tokfuse algorithms --markdown docs/paper_index.md` -->"
INDEX_END = "<!-- /index -->"

# Systems of the project's reading list that have no code here, with the reason.
OUT = {
    "UMLC (arXiv 2502.15697)": "An uplift network architecture. Its loss is ordinary regression on the response.",
    "MPVA (2505.01652)": "A graph VAE for fair node classification. It needs a graph encoder.",
    "TCS (2506.02084)": "A time-series simulator and its model selection. It has no loss on tensors.",
    "AGEC causal bandits (2408.11240)": "Needs a causal graph and interventions on it.",
    "HDPO (2306.11246)": "Differentiates through a known simulator. Token sampling is not such a simulator.",
    "Domain counterfactuals / ILD (2306.11281)": "Invertible latent models of images.",
    "CausalDiffAE (2404.17735)": "A diffusion autoencoder of images.",
    "Steering the Herd (2504.02648)": "An analysis of sequential social learning. There is nothing to train.",
    "Invalid-IV ATE (1907.11882)": "An econometric estimator with four or more nuisance models to fit.",
    "S-CNFG (2511.06934)": "Defines an equilibrium without an estimator, and reports a negative result.",
}


def table(kind: str | None = None) -> str:
    """Return the name, label and summary of every method, aligned, with a heading for each kind."""
    width = max(map(len, ENTRIES))
    parts = []
    for one in by_kind(kind):
        rows = [f"  {name:<{width}}  {label:<28}  {summary}" for name, label, summary in one.rows]
        parts.append("\n".join([one.title, *rows]))
    return "\n\n".join(parts)


def by_kind(kind: str | None = None) -> list[tables.Table]:
    """Return one table with the name, label and summary of every method for each kind."""
    wanted = [each for each in KINDS if kind in (None, each) and names(each)]
    cells = {each: [(name, ENTRIES[name].label, ENTRIES[name].summary) for name in names(each)] for each in wanted}
    return [tables.Table(("name", "label", "summary"), cells[each], f"{each}: {KINDS[each]}") for each in wanted]


def describe(name: str) -> str:
    """Return the full description of one method."""
    one = entry(name)
    lines = [f"{one.name} ({one.kind}, {one.label}): {one.summary}", f"source: {one.source}", f"file: {one.file}"]
    if one.differs:
        lines += textwrap.wrap(f"differs: {one.differs}", 96, subsequent_indent="  ")
    lines += ["", inspect.getdoc(one.cls) or "", "", "options"]
    for option, default in one.options().items():
        shown = "must be given" if default is dataclasses.MISSING else repr(default)
        lines.append(f"  {option} = {shown}")
    if one.presets:
        lines += ["", "presets (make(name, preset=...))"]
    for preset, (options, source) in one.presets.items():
        values = ", ".join(f"{option}={value!r}" for option, value in options.items()) or "the defaults"
        lines += textwrap.wrap(f"  {preset}: {values} ({source})", 96, subsequent_indent="    ")
    return "\n".join(lines)


def markdown() -> str:
    """Return the tables of docs/paper_index.md, one for each kind of method."""
    lines: list[str] = []
    for kind, title in KINDS.items():
        systems: dict[str, list[Entry]] = {}
        for one in ENTRIES.values():
            if one.kind == kind:
                systems.setdefault(one.system, []).append(one)
        if systems:
            lines += [f"## {title}", "", *_rows(systems), ""]
    lines += ["## Without code", "", "| system | reason |", "| --- | --- |"]
    lines += [f"| {system} | {reason} |" for system, reason in OUT.items()]
    return "\n".join(lines)


def _rows(systems: dict[str, list[Entry]]) -> list[str]:
    lines = [
        "| system | name | label | file | source | what differs from the paper, and why |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for system, entries in sorted(systems.items()):
        for one in entries:
            cells = (system, f"`{one.name}`", one.label, f"`{one.file}`", one.source, one.differs or "-")
            lines.append("| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |")
    return lines


def write_markdown(path: Path) -> None:
    """Replace the text between the two index marks of a file with `markdown()`."""
    _write_between(path, INDEX_BEGIN, INDEX_END, markdown())


def write_gallery(path: Path) -> None:
    """Replace the text between the two gallery marks of a file with `gallery.page()`."""
    _write_between(path, gallery.BEGIN, gallery.END, gallery.page())


def _write_between(path: Path, begin: str, end: str, new: str) -> None:
    text = path.read_text()
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"algorithms: {path} must contain {begin!r} and {end!r} once each.")
    head, rest = text.split(begin)
    tail = rest.split(end)[1]
    path.write_text(f"{head}{begin}\n{new}\n{end}{tail}")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    out = argparse.ArgumentParser(
        prog="python -m tokfuse algorithms",
        description="List the methods of tokfuse.algorithms, or describe one of them with its options.",
        epilog="example: python -m tokfuse algorithms grpo",
    )
    out.add_argument("name", nargs="?", help="a method; without it, the table of all methods is printed")
    out.add_argument("--kind", choices=KINDS, help="only the methods of this kind")
    out.add_argument("--markdown", type=Path, metavar="FILE", help="write the paper index between the marks of FILE")
    out.add_argument("--gallery", type=Path, metavar="FILE", help="write the method gallery between the marks of FILE")
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit status."""
    command = parser()
    options = command.parse_args(argv)
    if options.markdown is not None:
        write_markdown(options.markdown)
    if options.gallery is not None:
        write_gallery(options.gallery)
    if options.markdown is not None or options.gallery is not None:
        return 0
    try:
        if options.name is None:
            tables.show(table(options.kind), *by_kind(options.kind))
        else:
            print(describe(options.name))
    except ValueError as error:
        command.error(str(error))
    return 0
