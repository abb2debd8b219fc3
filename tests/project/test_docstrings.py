"""Test the docstrings of the public names: every example runs as written, and every op has one.

The API reference of the documentation is generated from these docstrings.
"""

import doctest
import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import tokfuse
from tokfuse import bench
from tokfuse.bench import cli, plan, profile  # noqa: F401  attributes of `bench`

ROOT = Path(__file__).resolve().parents[2]
OPS = "tokfuse.runtime.ops."


def public() -> dict[str, object]:
    """Return every public name, including those of `tokfuse.influence`."""
    names = {n: getattr(tokfuse, n) for n in tokfuse._PUBLIC}
    return names | {f"influence.{n}": getattr(tokfuse.influence, n) for n in tokfuse.influence.__all__}


def examples() -> Iterator[doctest.DocTest]:
    parser = doctest.DocTestParser()
    for name, value in public().items():
        text = inspect.getdoc(value) or ""
        found = parser.get_doctest(text, {"torch": torch, "tokfuse": tokfuse}, name, name, 0)
        if found.examples:
            yield found


@pytest.mark.parametrize("example", list(examples()), ids=lambda example: example.name)
def test_examples_run_as_written(example: doctest.DocTest) -> None:
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE, verbose=False)
    runner.run(example, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_every_page_is_in_the_site() -> None:
    nav = (ROOT / "mkdocs.yml").read_text()
    assert [p.name for p in (ROOT / "docs").glob("*.md") if f": {p.name}\n" not in nav] == []


PARSERS = {"bench": bench.cli.parser, "profile": bench.profile.parser}


def commands() -> list[tuple[str, str]]:
    """Return (page, command line) of every command on the pages."""
    out = []
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for line in re.findall(r"python -m tokfuse (\w+[^\n`]*)", page.read_text()):
            if line.split()[0] in PARSERS:
                out.append((page.name, line))
    return out


@pytest.mark.parametrize(("page", "line"), commands())
def test_documented_command_lines_are_valid(page: str, line: str) -> None:
    command, *words = shlex.split(line)
    options = PARSERS[command]().parse_args(words)
    if command == "profile":
        bench.profile._case(options)
    elif options.names and options.names[0] not in bench.plan.ALONE:
        bench.plan.make_plan(options)


def test_every_op_has_an_example() -> None:
    ops = {n for n, module in tokfuse._PUBLIC.items() if n.islower() and module.startswith(OPS)}
    with_example = {example.name for example in examples()}
    assert ops - {"policy_step_"} <= with_example  # policy_step_ is policy_step in place


def test_every_public_name_is_in_the_reference() -> None:
    page = (ROOT / "docs" / "api.md").read_text()
    listed = set(re.findall(r"^::: (tokfuse\S+)$", page, re.MULTILINE))
    wanted = {f"{module}.{name}" for name, module in tokfuse._PUBLIC.items()}
    wanted |= {
        f"{value.__module__}.{value.__name__}" for name, value in public().items() if name.startswith("influence.")
    }
    assert wanted <= listed, sorted(wanted - listed)
    for name in listed:
        module, _, attribute = name.rpartition(".")
        assert hasattr(__import__(module, fromlist=[attribute]), attribute), name
