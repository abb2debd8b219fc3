"""Test tools/new_op.py in a copy of the repository: its stubs are in place and fail until they are filled in."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import repo_copy
from cuda_host import FLAGS, needs_host
from repo_copy import FILES, FOLDERS, ROOT

sys.path.insert(0, str(ROOT / "tools"))
import new_op  # noqa: E402

OP = "soft_gain"
PAGE = ROOT / "docs" / "adding_an_op.md"
SOURCES = {".py", ".cpp", ".h", ".cu", ".cuh", ".md"}


def sources(root: Path) -> list[str]:
    """Return every file of the project that can contain a stub."""
    found = [file for folder in FOLDERS for file in (root / folder).rglob("*") if file.suffix in SOURCES]
    return [str(file.relative_to(root)) for file in found] + [file for file in FILES if (root / file).exists()]


def test_no_stub_is_left():
    left = new_op.marks(ROOT, sources(ROOT))
    assert not left, "fill in:\n" + "\n".join(left)


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Path:
    """Return a copy of the repository with an op whose stubs are not filled in."""
    root = tmp_path_factory.mktemp("copy")
    repo_copy.copied(root)
    printed = repo_copy.python(root, "tools/new_op.py", OP).splitlines()
    assert printed[: printed.index("")] == list(files())
    repo_copy.linked(root)
    return root


def files() -> dict[str, None]:
    """Return the files that the scaffold writes, in order: new files, then changed files."""
    new = [new_op.named(file, OP) for file in new_op.FILES]
    return dict.fromkeys([*new, *(entry.file for entry in new_op.ENTRIES)])


def test_the_page_lists_every_file_of_the_scaffold():
    text = PAGE.read_text()
    wanted = {file.replace(OP, "<op>") for file in files()}
    named = {word for word in re.findall(r"`([\w./<>]+\.\w+)`", text) if "/" in word or word == "CHANGELOG.md"}
    assert named >= wanted, sorted(wanted - named)
    assert f"{len(files())} files" in text


@pytest.mark.parametrize(
    ("name", "message"),
    [("Gain", "lower case words"), ("gain_", "lower case words"), ("whiten", "is taken: runtime/reference/whiten.py")],
)
def test_a_name_that_cannot_be_a_stem_is_refused(name: str, message: str):
    with pytest.raises(ValueError, match=message):
        new_op.scaffold(name, ROOT)


def test_a_file_that_lost_its_line_is_named(tmp_path: Path):
    entry = new_op.Entry("a.h", "struct A {", "text\n")
    assert new_op.inserted("x\nstruct A {\n", entry) == "x\ntext\nstruct A {\n"
    for text in ("x\n", "struct A {\nstruct A {\n"):
        with pytest.raises(ValueError, match="a.h has [02] lines that start with 'struct A {'"):
            new_op.inserted(text, entry)


def test_the_stubs_are_where_the_layers_want_them(copy: Path):
    table = "tests/backends/test_op_calls.py"
    chosen = "every_op or every_public or every_keyword or every_backend or public_names or kernel_files"
    out = repo_copy.tests(
        copy, "-k", chosen, table, "tests/project/test_layering.py", "tests/project/test_docstrings.py"
    )
    outcomes(
        out,
        "PASSED",
        "test_every_op_has_a_reference_and_a_test_of_its_name",
        "test_every_op_is_public",
        "test_kernel_files_are_named_after_their_op[csrc/cuda-*.cu]",
        "test_public_names_are_known_to_type_checkers",
        f"test_public_names_are_documented[{OP}]",
        "test_every_op_of_the_registry_has_a_row",
        f"test_every_keyword_of_a_function_is_given[{OP}]",
        f"test_every_backend_takes_the_dtypes_of_a_row[{OP}]",
    )


@needs_host
def test_the_stubs_compile(copy: Path):
    """The kernels and the program for the CUDA checkers. The bindings have the same syntax as those of other ops."""
    flags = [flag for flag in FLAGS if not flag.startswith("-I")] + ["-Icsrc", "-Itests", "-fsyntax-only"]
    for file in (f"csrc/cuda/{OP}.cu", "tests/cuda_host/packed_main.cpp", f"csrc/cpu/{OP}.cpp"):
        kind = ["-DTOKFUSE_ISA=isa_base", "-fopenmp"] if "cpu/" in file else ["-x", "c++"]
        done = subprocess.run(["g++", *flags, *kind, file], cwd=copy, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_tests_fail_until_the_stubs_are_filled(copy: Path):
    """First no stub is filled in, then formula and expected values, then the Triton kernel and the rest."""
    op_test, example = f"tests/ops/test_{OP}.py", f"{OP} and examples_run_as_written"
    every = (op_test, "tests/project/test_new_op.py::test_no_stub_is_left")
    out = repo_copy.tests(copy, *every, fails=True, TRITON_INTERPRET="1")
    outcomes(out, "FAILED", "test_formula[reference]", "test_formula[triton]", "test_no_stub_is_left")
    repo_copy.tests(copy, "tests/project/test_docstrings.py", "-k", example, fails=True)

    fill(copy, f"runtime/reference/{OP}.py", r"    raise NotImplementedError.*\n", FORMULA)
    fill(copy, op_test, r"\| None = None", "= (0.5, -1.25, 3.0, 0.0)")
    out = repo_copy.tests(copy, op_test, fails=True, TRITON_INTERPRET="1")
    outcomes(out, "PASSED", "test_formula[reference]", f"test_values_are_those_of_float64[reference-{OP}]")
    outcomes(out, "FAILED", "test_formula[triton]", f"test_values_are_those_of_float64[triton-{OP}/mask]")

    fill(copy, f"triton_kernels/{OP}.py", r' \+ float\("nan"\)', "")
    fill(copy, f"runtime/ops/{OP}.py", r"tensor\(\[\]\)", "tensor([1., 2.])")
    for file in sources(copy):
        fill(copy, file, re.escape(new_op.MARK), "filled")
    repo_copy.tests(copy, *every, TRITON_INTERPRET="1")
    repo_copy.tests(copy, "tests/project/test_docstrings.py", "-k", example)


def outcomes(report: str, outcome: str, *names: str) -> None:
    for name in names:
        assert re.search(rf"^{outcome} \S*{re.escape(name)}", report, re.MULTILINE), f"{name}: not {outcome}\n{report}"


FORMULA = """    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    return torch.where(keep, x.double() * scale, 0.0).to(x.dtype)
"""


def fill(root: Path, file: str, pattern: str, text: str) -> None:
    before = (root / file).read_text()
    (root / file).write_text(re.sub(pattern, text.replace("\\", r"\\"), before))
