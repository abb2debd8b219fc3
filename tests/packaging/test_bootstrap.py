"""Test the installation scripts: pins are complete, a second run does nothing, torch's build fits the machine."""

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
    """Import a module of `tools/` as a script in that folder does."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in ("bootstrap", "torch_build", "typing_tree"):
        sys.modules.pop(name, None)


def wheel(folder: Path, name: str, version: str, *requires: str) -> None:
    """Create a wheel that contains only its metadata."""
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


def test_the_oldest_versions_are_the_lower_bounds(tools):
    bootstrap = tools("bootstrap")
    assert bootstrap.oldest(["torch>=2.11", "numpy>=1.26", "pytest"]) == ["torch==2.11.*", "numpy==1.26.*", "pytest"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for group in ("core", *project["optional-dependencies"]):
        bounded = [x for x in bootstrap.requirements(group)[0] if x.partition(">=")[0] != "setuptools" and ">=" in x]
        assert all(x.endswith(".*") and x.count(".") >= 2 for x in bootstrap.oldest(bounded)), group


def test_versions_decide_what_pip_is_given(tools):
    bootstrap = tools("bootstrap")
    wanted = ["torch>=2.11", "pytest"]
    pins = bootstrap.pins()
    constraint = ["--constraint", str(bootstrap.CONSTRAINTS)]
    assert bootstrap.arguments_of(wanted, "pinned") == [*constraint, pins["torch"], pins["pytest"]]
    assert bootstrap.arguments_of(wanted, "oldest") == ["torch==2.11.*", "pytest"]
    assert bootstrap.arguments_of(wanted, "newest") == ["--upgrade", *wanted]


def test_only_the_newest_versions_are_looked_up_again(tools, tmp_path, monkeypatch):
    bootstrap = tools("bootstrap")
    monkeypatch.setattr(bootstrap.torch_build, "prepare", lambda python, arguments: None)
    runs: list[tuple[str, ...]] = []
    monkeypatch.setattr(bootstrap.Environment, "pip", lambda self, *arguments: runs.append(arguments))
    for versions, count in (("pinned", 1), ("oldest", 1), ("newest", 2)):
        environment = bootstrap.Environment(tmp_path / versions)
        environment.folder.mkdir()
        runs.clear()
        for _ in range(2):
            bootstrap.install_group(environment, "selection", versions)
        assert len(runs) == count


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        (["--only", "release"], ["release"]),
        (["--no-native", "lint"], ["core", "lint"]),
        (["test"], ["core", "test", "native"]),
    ],
)
def test_options_choose_the_steps(arguments, steps, tools, monkeypatch):
    bootstrap = tools("bootstrap")
    done = []
    monkeypatch.setattr(bootstrap.Environment, "create", lambda self: None)
    monkeypatch.setattr(bootstrap, "install_group", lambda environment, group, versions: done.append(group))
    monkeypatch.setattr(bootstrap, "build_native", lambda environment: done.append("native"))
    assert bootstrap.main(arguments) == 0 and done == steps


def test_an_unknown_group_is_refused(tools):
    with pytest.raises(SystemExit, match="GROUP must be one of bench, cli, demo"):
        tools("bootstrap").requirements("everything")


# -------------------------------------------------------------------- choice of the torch build


def report(**packages: str) -> dict[str, object]:
    """Return a report of `pip install --report`. An underscore in a name means a hyphen."""
    return {"install": [{"metadata": {"name": n.replace("_", "-"), "version": v}} for n, v in packages.items()]}


CPU, CUDA = report(torch="2.13.0+cpu"), report(torch="2.13.0", nvidia_cublas="13.0.2")
WANTED = ["torch==2.13.0", "numpy==2.3.5"]
LOCAL = ["torch==2.13.0+cpu"]
TORCH_INDEX = ["--extra-index-url", "INDEX", *LOCAL]


@pytest.mark.parametrize(
    ("packages", "cuda"),
    [
        ({"torch": "2.13.0+cpu", "numpy": "2.3.5"}, False),
        ({"torch": "2.13.0+cpu", "nvidia_fake_nccl": "2.0"}, False),  # CUDA requirement of another package
        ({"torch": "2.13.0+cu130"}, True),
        ({"torch": "2.13.0", "nvidia_cublas": "13.0.2"}, True),
        ({"torch": "2.13.0", "cuda_bindings": "13.0"}, True),
        ({"torch": "2.13.0", "nvidia_ml_py": "13.615.71", "cudadecimal": "1.0"}, False),
    ],
)
def test_a_build_of_torch_is_recognised(packages, cuda, tools):
    assert tools("torch_build").build_of(report(**packages)) == ("2.13.0", cuda)


def test_no_torch_no_build(tools):
    torch_build = tools("torch_build")
    assert torch_build.build_of(report(numpy="2.3.5")) is None
    assert torch_build.build_of(None) is None


@pytest.mark.parametrize(
    ("gpu", "answers", "arguments", "remark"),
    [
        pytest.param(False, [CPU], [], "", id="the index gives a CPU build"),
        pytest.param(False, [CUDA, CPU], LOCAL, "", id="the index has a CPU build beside the CUDA build"),
        pytest.param(False, [CUDA, None, CPU], TORCH_INDEX, "", id="torch's index has the CPU build"),
        pytest.param(False, [CUDA, None, None], [], "needs several GB more", id="torch's index is unreachable"),
        pytest.param(False, [CUDA, CUDA, CUDA], [], "needs several GB more", id="CUDA builds everywhere"),
        pytest.param(False, [report(numpy="2.3.5")], [], "", id="the installed torch is kept"),
        pytest.param(False, [None], [], "", id="pip finds nothing and says so itself"),
        pytest.param(True, [CUDA], [], "", id="GPU, and the index gives a CUDA build"),
        pytest.param(True, [CPU, CUDA], ["torch===2.13.0"], "", id="GPU, and the index has both"),
        pytest.param(True, [CPU, None], [], "the GPU of this machine is not used", id="GPU, and CPU builds only"),
    ],
)
def test_the_build_of_torch_that_is_installed(gpu, answers, arguments, remark, tools, monkeypatch):
    asked = []

    def resolve(question):
        asked.append(list(question))
        return answers[len(asked) - 1]

    torch_build = tools("torch_build")
    assert torch_build.CPU_INDEX.endswith("pytorch.org/whl/cpu")
    monkeypatch.setattr(torch_build, "CPU_INDEX", "INDEX")
    choice = torch_build.choose(gpu, WANTED, resolve)
    assert choice.arguments == arguments
    assert remark in choice.remark and bool(remark) == bool(choice.remark) and "\n" not in choice.remark
    assert asked == [WANTED, *([["torch===2.13.0"]] if gpu else [LOCAL, TORCH_INDEX])][: len(answers)]


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("has_cpu_build", [False, True])
def test_pip_is_asked(gpu, has_cpu_build, tools, tmp_path, monkeypatch):
    """With real pip on folders of generated wheels: a CUDA build, and optionally a CPU build."""
    wheel(tmp_path, "torch", "2.13.0", "nvidia-fake-blas")
    wheel(tmp_path, "nvidia-fake-blas", "13.0")
    if has_cpu_build:
        wheel(tmp_path, "torch", "2.13.0+cpu")
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path), "IGNORE_INSTALLED": "1"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    torch_build = tools("torch_build")
    wanted = ["torch==2.13.0"]
    choice = torch_build.choose(gpu, wanted, torch_build.pip_resolver(sys.executable, wanted))
    # With both in one index pip takes the CPU build, because its version is higher.
    assert choice.arguments == (["torch===2.13.0"] if gpu and has_cpu_build else [])
    assert bool(choice.remark) == (not gpu and not has_cpu_build)


@pytest.mark.parametrize("works", [False, True])
def test_the_choice_is_installed_and_a_failure_is_no_dead_end(works, tools, tmp_path, monkeypatch, capsys):
    torch_build = tools("torch_build")
    python = tmp_path / "python"
    # An interpreter whose pip records its arguments.
    script = f"""#!/bin/sh
        echo "$*" >> {tmp_path}/log
        exit {int(not works)}"""
    python.write_text(script)
    python.chmod(0o755)
    monkeypatch.setattr(torch_build, "choose", lambda *_: torch_build.Choice(LOCAL, "a remark."))
    torch_build.prepare(str(python), WANTED)
    assert (tmp_path / "log").read_text() == "-m pip install --quiet torch==2.13.0+cpu\n"
    out = capsys.readouterr().out.splitlines()
    assert out[0] == "tokfuse: a remark." and len(out) == (1 if works else 2)


def test_an_environment_without_pip_is_completed(tools, tmp_path):
    """`python -m venv` without ensurepip fails and leaves a folder with an interpreter."""
    bootstrap = tools("bootstrap")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "env")], check=True)
    environment = bootstrap.Environment(tmp_path / "env")
    assert not environment.has("pip")
    environment.create()
    assert environment.has("pip")


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
    # Another environment writes the same file, perhaps with other settings.
    (stamp,) = (own_source / "build").glob("native-*.stamp")
    stamp.write_text("built elsewhere")
    assert bootstrap() == "tokfuse: building the native module (C++)\n"
    assert bootstrap() == ""
    # Another environment of this Python takes the module that the sources hold.
    (built,) = (own_source / "api").glob("_native*.so")
    content = built.read_bytes()
    (environment.folder / ".tokfuse" / "native").unlink()
    assert bootstrap() == "tokfuse: installing tokfuse with the native module of another environment\n"
    assert built.read_bytes() == content
    assert bootstrap() == ""
    built.unlink()  # and builds it if somebody removed it
    (environment.folder / ".tokfuse" / "native").unlink()
    bootstrap()
    assert built.is_file()


def test_makefile_names_only_targets_that_exist():
    """`make -n` of each documented target: its recipe can be printed."""
    makefile = (ROOT / "Makefile").read_text()
    targets = [
        line.split(":")[0]
        for line in makefile.splitlines()
        if line.startswith(("test", "lint", "demo", "wheel", "bench", "doctor"))
    ]
    assert {"test", "lint", "demo", "bench", "doctor", "test-gpu"} <= set(targets)
    subprocess.run(["make", "-n", *targets], cwd=ROOT, check=True, capture_output=True)
