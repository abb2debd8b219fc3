"""Test that a quantity has one name: the tables of docs/names.md against C++, Python and Triton."""

import ast
import re
from pathlib import Path

import pytest

from tokfuse.runtime.backends import row_args
from tokfuse.runtime.core import native
from tokfuse.runtime.policy.metrics import SLOTS
from tokfuse.runtime.policy.objective import ObjectiveRecord

ROOT = Path(__file__).resolve().parents[2]
HEADERS = [ROOT / "csrc" / "common" / f"{name}_args.h" for name in ("row", "objective", "loss", "packed")]
has_native = pytest.mark.skipif(native.module() is None, reason="the native module is not built")


def table() -> list[str]:
    """Return the names of the tables, in order."""
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs" / "names.md").read_text(), re.MULTILINE)
    return [name for row in rows for name in re.findall(r"`(\w+)`", row)]


def structs() -> dict[str, dict[str, str]]:
    """Return the comment of every field of every struct of the headers, by struct and field, with base structs."""
    found: dict[str, dict[str, str]] = {}
    for header in HEADERS:
        for name, base, body in re.findall(
            r"^struct (\w+)(?: : (\w+))? \{\n(.*?)^\};", header.read_text(), re.M | re.S
        ):
            fields = dict(found.get(base, {}))
            for declared, comment in re.findall(
                r"^  (?:const )?\w+\*? ((?:\w+(?:\[\w+\])?(?:, )?)+);(.*)$", body, re.M
            ):
                fields |= {re.sub(r"\[.*", "", field): comment for field in declared.split(", ")}
            found[name] = fields
    return found


def records() -> dict[str, type]:
    """Return the structs that Python fills."""
    return {name: kind for name, kind in vars(native.module()).items() if hasattr(kind, "FIELDS")}


def test_every_name_stands_once():
    names = table()
    assert len(names) > 100 and len(names) == len(set(names))


@has_native
def test_a_field_of_a_struct_has_the_name_of_its_quantity():
    known = set(table())
    unknown = {name: set(kind.FIELDS) - known for name, kind in records().items()}
    assert not any(unknown.values()), {name: fields for name, fields in unknown.items() if fields}
    used = {field for kind in records().values() for field in kind.FIELDS}
    assert known == used, "a name of no struct has left docs/names.md behind"


@has_native
def test_python_gives_every_field_that_c_plus_plus_has():
    """Except the fields that the binding sets, according to the header."""
    declared = structs()
    assert set(records()) <= set(declared)
    for name, kind in records().items():
        own = {field for field, comment in declared[name].items() if "set by the binding" not in comment}
        assert set(kind.FIELDS) | {"num_rules"} == own | {"num_rules"}, name


@has_native
def test_constants_of_both_sides_are_equal():
    module = native.module()
    assert module.DIVERGENCE_STATE == row_args.DIVERGENCE_STATE
    sums = re.search(r"kMetricCount = (\d+)", (ROOT / "csrc" / "common" / "objective.h").read_text())
    assert sums is not None and int(sums[1]) == len(SLOTS)


def test_an_objective_has_the_fields_of_its_struct():
    source = (ROOT / "csrc" / "common" / "objective.h").read_text()
    body = re.search(r"^struct ObjectiveParams \{\n(.*?)^\};", source, re.M | re.S)
    assert body is not None
    fields = re.findall(r"^  \w+ (\w+)(?:\[\w+\])?;", body[1], re.M)
    assert fields == list(ObjectiveRecord._fields)


# Earlier names of these quantities.
OLD = {
    "shift": "row_max",
    "p2_logp": "sum_p2_logp",
    "p2_logp2": "sum_p2_logp2",
    "scale_value": "inv_normalizer",
    "p_stride": "stride_p",
    "q_stride": "stride_q",
}


@pytest.mark.parametrize("folder", ["runtime", "triton_kernels"])
def test_no_parameter_has_an_old_name(folder: str):
    old = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef):
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                old += [f"{file.name}: {node.name}({a.arg})" for a in given if a.arg.removesuffix("_ptr") in OLD]
    assert old == []


# Symbols and short forms that the kernels may use, but not their launchers.
LAUNCHER_NAMES = {"behavior": "behavior_logp", "dz": "grad_logits"}


def test_triton_launchers_use_the_names_of_the_table():
    assert set(LAUNCHER_NAMES.values()) <= set(table())
    short = []
    for file in sorted((ROOT / "triton_kernels").glob("*.py")):
        for node in ast.parse(file.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.decorator_list:
                given = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                short += [f"{file.name}: {node.name}({a.arg})" for a in given if a.arg in LAUNCHER_NAMES]
    assert short == []


def test_no_struct_has_an_old_name():
    assert not {field for fields in structs().values() for field in fields} & set(OLD)
