"""A copy of the project, and clean virtual environments that borrow the packages of this environment.

Nothing is downloaded: an environment gets a symbolic link to every installed package except `tokfuse`.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Without a CUDA compiler: nvcc takes minutes.
QUICK_BUILD = (
    f"-DCMAKE_CUDA_COMPILER=NOTFOUND -DCMAKE_CXX_COMPILER_LAUNCHER={ROOT / 'tests/packaging/compile_quickly.sh'}"
)
# Variables of the test run. The builds under test must not see them.
NOT_INHERITED = ("TOKFUSE_", "PYTHONPATH", "CXX", "LD_PRELOAD", "VENV", "MAKE")


@pytest.fixture(scope="session")
def files() -> list[str]:
    return project_files()


def project_files() -> list[str]:
    """Return the files of a fresh clone, and new files that git does not ignore."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in sorted(set(done.stdout.splitlines())) if (ROOT / name).is_file()]


def path_without(tool: str, path: str, folder: Path) -> str:
    """Return a PATH with every program of `path` except `tool`."""
    folder.mkdir()
    for directory in path.split(os.pathsep):
        for program in Path(directory).iterdir() if Path(directory).is_dir() else ():
            if program.name != tool and not (folder / program.name).is_symlink():
                (folder / program.name).symlink_to(program)
    return str(folder)


class CleanEnvironment:
    """A virtual environment with the packages of this environment, without `tokfuse`. `path` is the PATH of pip."""

    def __init__(self, folder: Path, path: str) -> None:
        self.folder, self.path = folder, path
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
        self.python = folder / "bin" / "python"
        self.site = next((folder / "lib").glob("python3*")) / "site-packages"
        for entry in Path(sysconfig.get_path("purelib")).iterdir():
            if not entry.name.startswith(("tokfuse", "__editable__")):
                (self.site / entry.name).symlink_to(entry)

    def path_without(self, tool: str) -> str:
        """Return the PATH of pip without one more program."""
        return path_without(tool, self.path, self.folder / f"without_{tool}")

    def run(
        self, *arguments: str, cwd: Path | None = None, check: bool = True, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run the python of this environment. `env` is added to a cleaned environment."""
        base = {k: v for k, v in os.environ.items() if not k.startswith(NOT_INHERITED)}
        done = subprocess.run(
            [str(self.python), *arguments],
            cwd=cwd or self.folder,
            env={**base, **env},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert not check or done.returncode == 0, done.stdout[-4000:]
        return done

    def pip(self, command: str, *arguments: str, check: bool = True, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `pip install` or `pip wheel` of the project without downloads and, by default, without nvcc."""
        offline = ["--no-build-isolation", "--no-deps", "--no-index", "--verbose"]
        env = {"TOKFUSE_CMAKE_ARGS": QUICK_BUILD, "PATH": self.path, **env}
        return self.run("-m", "pip", command, *offline, *arguments, check=check, **env)


@pytest.fixture(scope="session")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source distribution."""
    folder, copy = tmp_path_factory.mktemp("sdist"), _copy(tmp_path_factory.mktemp("copy"))
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=copy, check=True, capture_output=True)
    return next(folder.glob("*.tar.gz"))


@pytest.fixture(scope="session")
def source(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked source distribution. Its build folder is shared, so that the native code is compiled once."""
    folder = tmp_path_factory.mktemp("source")
    shutil.unpack_archive(sdist, folder, filter="data")
    return next(folder.iterdir())


@pytest.fixture
def own_source(tmp_path: Path) -> Path:
    """A copy of the project that one test may change."""
    return _copy(tmp_path / "own_source")


def _copy(folder: Path) -> Path:
    for name in project_files():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="session")
def without_nvcc(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PATH. One for the session, because another one would compile the native code again."""
    return path_without("nvcc", os.environ["PATH"], tmp_path_factory.mktemp("path") / "bin")


@pytest.fixture
def new_environment(tmp_path: Path, without_nvcc: str) -> Iterator[Callable[[], CleanEnvironment]]:
    """Creates clean environments, which are removed after the test."""
    made: list[CleanEnvironment] = []

    def make() -> CleanEnvironment:
        made.append(CleanEnvironment(tmp_path / f"env{len(made)}", without_nvcc))
        return made[-1]

    yield make
    for environment in made:
        shutil.rmtree(environment.folder)


@pytest.fixture
def environment(new_environment: Callable[[], CleanEnvironment]) -> CleanEnvironment:
    return new_environment()
