"""The set-up scripts: pins are complete, nothing is done twice, no CUDA wheels without a GPU."""

import importlib
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of `tools/` the way a script there sees it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("bootstrap", "no_cuda", "typing_tree"):
        sys.modules.pop(name, None)


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """A wheel with nothing in it but its metadata."""
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = [f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}"]
    metadata += [f"Requires-Dist: {requirement}" for requirement in requires]
    file = folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


def test_every_named_package_is_pinned_and_every_pin_is_named(tools):
    bootstrap = tools("bootstrap")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = set()
    for group in ("core", *project["optional-dependencies"]):
        for wanted in bootstrap.requirements(group):
            named |= {pin.split("==")[0] for pin in bootstrap.pinned(wanted)}
    assert named == set(bootstrap.pins())
    assert all(line.count("==") == 1 for line in bootstrap.pins().values())


def test_a_package_without_a_pin_is_refused(tools):
    with pytest.raises(SystemExit, match="constraints.txt must pin leftpad"):
        tools("bootstrap").pinned(["torch>=2.11", "leftpad"])


def test_an_unknown_group_is_refused(tools):
    with pytest.raises(SystemExit, match="GROUP must be one of bench, demo"):
        tools("bootstrap").requirements("everything")


def test_cuda_distributions_are_recognised(tools):
    names = {
        "nvidia-cublas": "13.0.2",
        "cuda-bindings": "13.0",
        "torch": "2.13.0+cu130",
        "nvidia-ml-py": "13.615.71",
        "numpy": "2.3.5",
        "cudadecimal": "1.0",
    }
    report = {"install": [{"metadata": {"name": n, "version": v}} for n, v in names.items()]}
    found = tools("no_cuda").cuda_distributions(report)
    assert found == ["cuda-bindings==13.0", "nvidia-cublas==13.0.2", "torch==2.13.0+cu130"]


@pytest.mark.parametrize("with_cuda", [False, True])
def test_no_cuda_wheels_without_a_gpu(with_cuda, tools, tmp_path, monkeypatch):
    """End to end with pip, on two made-up indexes: one serves a CPU build, one a CUDA build."""
    no_cuda = tools("no_cuda")
    monkeypatch.setattr(no_cuda, "machine_has_gpu", lambda: False)
    monkeypatch.delenv("TOKFUSE_ALLOW_CUDA_WHEELS", raising=False)
    wheel(tmp_path, "tokfuse-fake-torch", "2.13.0", *(["nvidia-fake-blas"] if with_cuda else []))
    wheel(tmp_path, "nvidia-fake-blas", "13.0")
    arguments = ["--no-index", "--find-links", str(tmp_path), "tokfuse-fake-torch==2.13.0"]
    if not with_cuda:
        no_cuda.check(sys.executable, arguments)
        return
    with pytest.raises(SystemExit) as caught:
        no_cuda.check(sys.executable, arguments)
    message = str(caught.value.code)
    assert "nvidia-fake-blas==13.0" in message and "PIP_INDEX_URL" in message
    assert "\n" not in message
    monkeypatch.setenv("TOKFUSE_ALLOW_CUDA_WHEELS", "1")
    no_cuda.check(sys.executable, arguments)


def test_a_machine_with_a_gpu_installs_what_pip_resolves(tools, monkeypatch):
    no_cuda = tools("no_cuda")
    monkeypatch.setattr(no_cuda, "machine_has_gpu", lambda: True)
    monkeypatch.setattr(no_cuda, "resolve", lambda *_: pytest.fail("pip was asked"))
    no_cuda.check(sys.executable, ["torch"])


def test_typing_tree_has_every_package(tools, tmp_path):
    typing_tree = tools("typing_tree")
    typing_tree.write_tree(tmp_path / "tree")
    for package in typing_tree.package_dirs():
        assert (tmp_path / "tree" / package.replace(".", "/") / "__init__.py").is_file()


TINY_MODULE = "#include <pybind11/pybind11.h>\nPYBIND11_MODULE(_native, module) { (void)module; }\n"


@pytest.mark.packaging
def test_second_run_does_nothing_and_a_changed_source_rebuilds(own_source, environment):
    for file in (own_source / "csrc").rglob("*.cpp"):
        file.write_text("")
    module = own_source / "csrc" / "bindings" / "module.cpp"
    module.write_text(TINY_MODULE)

    def bootstrap() -> str:
        done = environment.run(
            "tools/bootstrap.py", cwd=own_source, VENV=str(environment.folder), PIP_NO_INDEX="1", TOKFUSE_CUDA="OFF"
        )
        return done.stdout

    first = bootstrap()
    assert "installing core" in first and "building the native module" in first
    assert (environment.folder / ".tokfuse" / "native").is_file()
    assert bootstrap() == ""
    module.write_text(module.read_text() + "\n// changed\n")
    assert bootstrap() == "tokfuse: building the native module (C++)\n"
    assert bootstrap() == ""


def test_makefile_names_only_targets_that_exist():
    """`make -n` of each documented target: the recipe can be written out."""
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        line.split(":")[0]
        for line in makefile.splitlines()
        if line.startswith(("test", "lint", "demo", "bench", "doctor"))
    ]
    assert {"test", "lint", "demo", "bench", "doctor", "test-gpu"} <= set(targets)
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
