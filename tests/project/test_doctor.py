"""Test `python -m tokfuse doctor`: the report is complete, and correct as far as this machine can check."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import tokfuse
from tokfuse.inspection import doctor
from tokfuse.runtime.core import dispatch, native

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def data() -> dict:
    return doctor.report()


def test_report_survives_json(data):
    assert json.loads(json.dumps(data)) == data


def test_every_op_module_imports(data):
    assert data["failures"] == {}


def test_versions(data):
    assert data["versions"]["tokfuse"] == tokfuse.__version__
    assert data["versions"]["torch"] == torch.__version__
    assert data["versions"]["python"] == ".".join(map(str, sys.version_info[:3]))


def test_every_op_and_backend_has_a_row(data):
    modules = {file.stem for file in (ROOT / "runtime" / "ops").glob("[!_]*.py")}
    modules -= {"unit_step", "distill_terms"}  # run on the records of other ops
    ops = {row["op"] for row in data["ops"]}
    assert modules <= ops, "a module of runtime/ops registered no op of its name"
    pairs = [(row["op"], row["backend"]) for row in data["ops"]]
    assert sorted(pairs) == sorted({(op, name) for op in ops for name in dispatch.ORDER})
    for row in data["ops"]:
        assert row["usable"] or row["why"], f"{row} does not say why not"


def test_usable_means_that_the_backend_can_be_forced(data):
    logits, target = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
    for row in data["ops"]:
        if row["op"] != "token_stats":
            continue
        on_cpu = "*" in row["devices"] or "cpu" in row["devices"]
        with tokfuse.backend(row["backend"]):
            if row["usable"] and on_cpu:
                tokfuse.token_stats(logits, target)
            else:
                with pytest.raises(tokfuse.BackendUnavailable):
                    tokfuse.token_stats(logits, target)


def test_native_module(data):
    assert data["native"]["built"] is (native.module() is not None)
    if native.module() is not None:
        assert Path(data["native"]["file"]).is_file()
        assert data["native"]["active_isa"] in ("x86-64-v2", "x86-64-v3", "x86-64-v4", "baseline")


def test_one_openmp_runtime(data):
    """The native module uses torch's thread pool and loads no second one."""
    if native.module() is None or not data["threads"]["openmp_runtimes"]:
        pytest.skip("no native module, or no OpenMP runtime to look at")
    assert len(data["threads"]["openmp_runtimes"]) == 1


def test_text_has_one_line_per_op(data):
    text = doctor.render(data)
    for op in {row["op"] for row in data["ops"]}:
        assert len(re.findall(rf"^  {op} .*$", text, re.MULTILINE)) == 1
    assert all(name in text for name in doctor.ENVIRONMENT)


def test_text_numbers_the_reasons():
    """A declared backend that cannot run is marked, and its reason is listed below."""
    common = {"op": "halve", "dtypes": ["float32"], "features": []}
    rows = [
        {**common, "backend": "cuda", "built": False, "usable": False, "devices": ["cuda"], "why": "no nvcc"},
        {**common, "backend": "triton", "built": True, "usable": False, "devices": ["cuda"], "why": "no GPU"},
        {**common, "backend": "cpu", "built": False, "usable": False, "devices": [], "why": "not implemented"},
        {**common, "backend": "reference", "built": True, "usable": True, "devices": ["*"], "why": ""},
    ]
    table, reasons = doctor._ops(rows, "cpu")
    assert table.rows == [["halve", "not built [1]", "unusable [2]", "-", "yes", "reference"]]
    assert reasons == ["no nvcc", "no GPU"]


def test_environment_lists_every_variable_that_the_code_reads():
    read = set()
    for folder in (
        "api",
        "runtime",
        "inspection",
        "integrations",
        "algorithms",
        "triton_kernels",
        "bench",
        "csrc",
        "tools",
        "setup.py",
        "tests/conftest.py",
    ):
        path = ROOT / folder
        for file in [path] if path.is_file() else path.rglob("*.*"):
            if file.suffix in (".py", ".cpp", ".h", ".cu", ".cuh"):
                pattern = r"(?:environ\b[^\n]{0,12}|getenv\()\"(TOKFUSE_\w+)\""
                read |= set(re.findall(pattern, file.read_text()))
    assert "TOKFUSE_BACKEND" in read
    assert read <= set(doctor.ENVIRONMENT), "add it to doctor.ENVIRONMENT"


def test_markdown_is_the_same_on_every_machine(monkeypatch):
    here = doctor.markdown()
    monkeypatch.setattr(native, "module", lambda: None)
    monkeypatch.setattr(native, "why_unusable", lambda: "not built")
    assert doctor.markdown() == here


def test_write_markdown(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{doctor.SUPPORT_BEGIN}\nold\n{doctor.SUPPORT_END}\nafter\n")
    doctor.write_markdown(page)
    once = page.read_text()
    assert once.startswith("before\n") and once.endswith("\nafter\n") and "old" not in once
    doctor.write_markdown(page)
    assert page.read_text() == once
    page.write_text("no marks")
    with pytest.raises(ValueError, match="once each"):
        doctor.write_markdown(page)


@pytest.mark.parametrize("arguments", [["doctor"], ["doctor", "--json"], ["doctor", "--help"]])
def test_command_line(arguments):
    done = subprocess.run([sys.executable, "-m", "tokfuse", *arguments], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    assert done.stdout
    if "--json" in arguments:
        assert json.loads(done.stdout)["versions"]["tokfuse"] == tokfuse.__version__


def test_unknown_command_names_the_known_ones():
    done = subprocess.run([sys.executable, "-m", "tokfuse", "doktor"], capture_output=True, text=True, cwd="/")
    assert done.returncode == 2
    assert "doctor" in done.stderr and "bench" in done.stderr
