"""Test every way to install, each in a clean environment.

In every case `import tokfuse` must work, the doctor must report the native module correctly, and no folder of the
repository may become a top-level name.
"""

import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.packaging

QUICKLY = Path(__file__).resolve().parent / "compile_quickly.sh"
# With nvcc.
CUDA_BUILD = f"-DTOKFUSE_CUDA_ARCHITECTURES=80 -DCMAKE_CXX_COMPILER_LAUNCHER={QUICKLY}"

FOLDERS = ("api", "runtime", "inspection", "algorithms", "integrations", "triton_kernels", "bench", "tests")
FALLBACK = "every op runs on the pure-torch reference"

# Runs in the environment under test, in a folder outside the repository.
PROBE = f"""
import importlib.util, json
import tokfuse
for name in tokfuse.__all__:
    getattr(tokfuse, name)
taken = [name for name in {FOLDERS!r} if importlib.util.find_spec(name) is not None]
from tokfuse.inspection import doctor
report = doctor.report()
print(json.dumps(dict(report, taken=taken, file=tokfuse.__file__, text=doctor.render(report))))
"""
RUN_TWICE = """
import torch, tokfuse
for _ in range(2):
    stats = tokfuse.token_stats(torch.zeros(3, 8), torch.zeros(3, dtype=torch.int64))
assert torch.allclose(stats.entropy, torch.full((3,), 8.0).log())
"""


def check_installed(environment, *, native: bool) -> dict[str, Any]:
    """Import everything in the environment. Check the doctor's report and return it."""
    report = json.loads(environment.run("-c", PROBE).stdout.splitlines()[-1])
    assert report["taken"] == [], "folders became top-level names"
    assert report["versions"]["tokfuse"]
    assert report["native"]["built"] is native
    assert ("native module  not available" in report["text"]) is not native
    warned = environment.run("-c", RUN_TWICE).stdout.count("tokfuse falls back to the slow pure-torch reference")
    assert warned == (0 if native else 1), "the fall-back is said once"
    rows = {(row["op"], row["backend"]): row for row in report["ops"]}
    assert rows
    for (_, backend), row in rows.items():
        if backend == "reference":
            assert row["usable"], row
        if backend == "cpu" and row["devices"]:
            assert row["usable"] is native, row
            assert native or "not available" in row["why"]
    return report


def test_sdist_holds_everything_a_build_reads(sdist: Path, files: list[str]):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    for needed in ("CMakeLists.txt", "setup.py", "pyproject.toml", "LICENSE", "api/py.typed"):
        assert needed in names
    csrc = {name for name in files if name.startswith("csrc/")}
    assert csrc and csrc <= names
    assert not [name for name in names if name.endswith((".so", ".pyc"))]


def test_install_without_nvcc(source: Path, environment):
    """Without a CUDA compiler on PATH or in CMake's other search paths. The other tests build in the same way."""
    output = environment.pip("install", str(source)).stdout
    assert "tokfuse: no CUDA kernels (no working nvcc was found" in output
    assert check_installed(environment, native=True)["native"]["cuda_version"] == ""


@pytest.mark.slow  # two minutes of nvcc; `make test-packaging` runs it
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_install_with_nvcc(sdist: Path, environment):
    """Builds the CUDA kernels without a GPU, for one architecture, because three take minutes."""
    build = {"TOKFUSE_CUDA": "ON", "TOKFUSE_CMAKE_ARGS": CUDA_BUILD, "PATH": os.environ["PATH"]}
    environment.pip("install", str(sdist), **build)
    report = check_installed(environment, native=True)
    assert report["native"]["cuda_version"] and report["native"]["cuda_archs"] == ["80"]
    assert "CUDA kernels by nvcc" in report["text"]
    rows = [row for row in report["ops"] if row["backend"] == "cuda"]
    assert rows and all(row["built"] for row in rows)


@pytest.mark.slow  # it compiles the CPU kernels twice; `make test-packaging` runs it
def test_a_broken_nvcc_leaves_the_cuda_kernels_out(source: Path, environment):
    environment.pip("install", str(source), TOKFUSE_CMAKE_ARGS="", CUDACXX="/bin/false")
    assert check_installed(environment, native=True)["native"]["cuda_version"] == ""


def test_cuda_kernels_that_are_asked_for_are_no_option(source: Path, environment):
    done = environment.pip("install", str(source), check=False, TOKFUSE_CUDA="ON", CUDACXX="/bin/false")
    assert done.returncode != 0
    assert "TOKFUSE_CUDA=ON needs a working nvcc; none was found" in done.stdout
    assert "TOKFUSE_CUDA is set, so the installation stops" in done.stdout


def test_wheel_contents(source: Path, files: list[str], environment, tmp_path: Path):
    environment.pip("wheel", "--wheel-dir", str(tmp_path), str(source))
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        names = wheel.namelist()
        (module,) = [wheel.read(n) for n in names if n.startswith("tokfuse/_native") and n.endswith(".so")]
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tokfuse"}
    assert {"tokfuse/py.typed", "tokfuse/_native.pyi"} <= set(names)
    assert "tokfuse/inspection/doctor.py" in names
    assert "tokfuse/bench/page.html.j2" in names and "tokfuse/triton_kernels/resources.json" in names
    assert not any(name.endswith(".jsonl") for name in names), "rows of one machine are not part of the package"
    assert b"\0libgomp.so.1\0" in module, "the kernels share torch's OpenMP runtime, which has this name"
    assert any(name.endswith("licenses/LICENSE") for name in names)
    installed = {name for name in names if name.endswith(".py")}
    written = {
        f"tokfuse/{name}".replace("tokfuse/api/", "tokfuse/")
        for name in files
        if name.endswith(".py") and name.split("/")[0] in FOLDERS and not name.startswith("tests/")
    }
    assert written == installed, "a package is missing from PACKAGE_DIR of setup.py"


def test_editable_install(source: Path, environment):
    environment.pip("install", "--editable", str(source))
    report = check_installed(environment, native=True)
    assert report["file"] == str(source / "api" / "__init__.py")


@pytest.mark.parametrize("broken", ["compiler", "cmake"])
def test_fallback_without_a_working(broken, source: Path, environment):
    if broken == "compiler":
        env = {"CXX": "/bin/false"}
    else:
        env = {"PATH": environment.path_without("cmake")}
    output = environment.pip("install", str(source), **env).stdout
    assert output.count(FALLBACK) == 1, "the fall-back is said once"
    check_installed(environment, native=False)


def test_strict_build_is_fatal(source: Path, environment):
    done = environment.pip("install", str(source), check=False, CXX="/bin/false", TOKFUSE_STRICT_BUILD="1")
    assert done.returncode != 0
    assert "TOKFUSE_STRICT_BUILD is set, so the installation stops" in done.stdout
    assert environment.run("-c", "import tokfuse", check=False).returncode != 0


def test_failed_editable_build_removes_the_old_module(own_source: Path, environment):
    """Calls with raw pointers must never reach a module that was built from other sources."""
    name = subprocess.run(
        [sys.executable, "-c", "import sysconfig; print(sysconfig.get_config_var('EXT_SUFFIX'))"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    old = own_source / "api" / f"_native{name}"
    old.write_bytes(b"built from other sources")
    environment.pip("install", "--editable", str(own_source), CXX="/bin/false")
    assert not old.exists()
    check_installed(environment, native=False)
