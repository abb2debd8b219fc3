"""Test docs/adding_a_shape.md: insert its blocks into a copy of the repository and run the tests of the new shape."""

import re
from pathlib import Path

import pytest
import repo_copy
from repo_copy import ROOT, python

PAGE = ROOT / "docs" / "adding_a_shape.md"
# First line of a block: the file, and the line above which the rest of the block is inserted.
PLACE = re.compile(r"(?:#|//) (\S+), above `(.+)`\n")


def blocks() -> list[tuple[str, str, str]]:
    """Return (file, line, text) of every block that names a place."""
    found = re.findall(r"^```\w+\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    places = [(PLACE.match(block), block) for block in found]
    return [(*place.groups(), block[place.end() :]) for place, block in places if place]


def insert(root: Path, file: str, line: str, text: str) -> None:
    before = (root / file).read_text().splitlines(keepends=True)
    at = [i for i, one in enumerate(before) if one.strip().startswith(line)]
    assert len(at) == 1, f"{file} has {len(at)} lines that start with {line!r}"
    (root / file).write_text("".join([*before[: at[0]], text, *before[at[0] :]]))


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Return a copy of the repository with the shape of the page, without the native module."""
    root = tmp_path_factory.mktemp("copy")
    repo_copy.copied(root)
    for file, line, text in blocks():
        insert(root, file, line, text)
    repo_copy.linked(root)
    assert "python tools/write_shapes.py\n" in PAGE.read_text()
    python(root, "tools/write_shapes.py")
    return root


def test_the_page_has_at_most_six_steps():
    assert 1 <= len(re.findall(r"^## \d", PAGE.read_text(), re.MULTILINE)) <= 6


def test_the_tests_of_the_copy_hold_the_new_shape(copy: Path):
    """Formula, flags, C++ and CUDA header, public name, documentation; the Triton kernels in the interpreter."""
    tests = ["tests/ops/test_shapes.py", "tests/project/test_layering.py", "tests/project/test_docstrings.py"]
    tests.append("tests/backends/test_triton_policy.py")
    chosen = "target_penalty or public or reference or files or TargetPenalty"
    out = repo_copy.tests(copy, "-k", chosen, *tests, TRITON_INTERPRET="1")
    passed = {key(line.split("::", 1)[1]) for line in out.splitlines() if line.startswith("PASSED")}
    for name in (
        "test_the_header_has_the_formula[target_penalty]",
        "test_token_objectives_with_every_estimator[target_penalty-triton]",
        "test_zero_without_advantage_is_what_it_says[target_penalty-triton]",
        "test_the_signal_changes_the_loss[target_penalty-triton]",
        "test_a_call_without_the_signal_is_refused[target_penalty-policy_step]",
        "test_no_kernel_runs_without_the_signal[target_penalty-policy_loss-triton]",
        "test_every_public_name_is_in_the_reference",
        "test_public_names_are_documented[TargetPenalty]",
        "test_public_names_are_known_to_type_checkers",
    ):
        assert key(name) in passed, f"{name} did not run\n{out[-3000:]}"


def key(case: str) -> tuple[str, frozenset[str]]:
    """Return a test and the parts of its case, which pytest orders by the scope of their fixtures."""
    name, _, parts = case.partition("[")
    return name, frozenset(parts.rstrip("]").split("-"))
