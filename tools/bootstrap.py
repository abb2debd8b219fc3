"""Bring the virtual environment up to date: `python3 tools/bootstrap.py [--no-native | --only] GROUP...`.

A GROUP is an optional-dependency table of pyproject.toml (`test`, `lint`, `demo`, ...). The script
creates the environment, installs the groups at the versions of constraints.txt, and builds the native
module by an editable install. Each step stores a hash of its inputs, so a second run repeats only the
steps whose inputs changed. The script uses only the standard library, because it runs before any
package is installed.

`--versions oldest` installs the lower bounds of pyproject.toml instead. `--versions newest` installs
the newest versions of the package index, and upgrades to them in every run.

Environment:
    VENV=PATH                the virtual environment (default .venv)
    TOKFUSE_STRICT_BUILD=1   a failed native build is an error
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

import torch_build

ROOT = Path(__file__).resolve().parent.parent
CONSTRAINTS = ROOT / "constraints.txt"
# Inputs of the native module. A change of one of them rebuilds it.
NATIVE_INPUTS = ("setup.py", "CMakeLists.txt", "pyproject.toml", "csrc")
# Environment variables that change the build.
NATIVE_ENVIRONMENT = (
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "CPPFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CMAKE_GENERATOR",
    "TOKFUSE_CMAKE_ARGS",
    "TOKFUSE_CUDA",
    "CUDA_HOME",
    "CUDA_PATH",
)


def say(message: str) -> None:
    print(f"tokfuse: {message}", flush=True)


def requirements(group: str) -> tuple[list[str], list[str]]:
    """Return the requirements of a group, and the requirements to install without dependencies."""
    import tomllib  # not at the top, so that an older Python reaches the message in __main__

    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    if group == "core":
        return [*project["dependencies"], *table["build-system"]["requires"]], []
    if group not in project["optional-dependencies"]:
        known = ", ".join(sorted(project["optional-dependencies"]))
        raise SystemExit(f"bootstrap: GROUP must be one of {known}; got {group!r}.")
    without_dependencies = table["tool"]["tokfuse"]["no-dependencies"].get(group, [])
    return project["optional-dependencies"][group], without_dependencies


def pins() -> dict[str, str]:
    """Return the line of constraints.txt for each package name."""
    lines = (line.split("#")[0].strip() for line in CONSTRAINTS.read_text().splitlines())
    return {line.split("==")[0]: line for line in lines if line}


def pinned(wanted: Iterable[str]) -> list[str]:
    """Return the exact requirement of each package; a package without a pin raises an error."""
    table = pins()
    names = [re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in wanted]
    missing = [name for name in names if name not in table]
    if missing:
        raise SystemExit(f"bootstrap: constraints.txt must pin {', '.join(missing)}. Add an exact version.")
    return [table[name] for name in names]


def oldest(wanted: Iterable[str]) -> list[str]:
    """Return the requirements at their lower bounds: `torch>=2.11` becomes `torch==2.11.*`."""
    return [re.sub(r"^([A-Za-z0-9._-]+)>=([0-9.]+)$", r"\1==\2.*", requirement) for requirement in wanted]


def arguments_of(wanted: Iterable[str], versions: str) -> list[str]:
    """Return the arguments of `pip install` for requirements at pinned, oldest or newest versions."""
    if versions == "pinned":
        return ["--constraint", str(CONSTRAINTS), *pinned(wanted)]
    return oldest(wanted) if versions == "oldest" else ["--upgrade", *wanted]


def digest_of_files(inputs: Iterable[str], extra: str = "") -> str:
    """Return a hash of the relative names and the contents of files and folders."""
    total = hashlib.sha256(extra.encode())
    for name in inputs:
        path = ROOT / name
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        for file in files:
            if file.is_file():
                total.update(f"{file.relative_to(ROOT)}\0".encode())
                total.update(file.read_bytes())
    return total.hexdigest()


class Environment:
    """One virtual environment and its stamps."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.python = folder / "bin" / "python"

    def create(self) -> None:
        # An environment without pip is left over from a failed attempt: Debian's python3 without python3-venv.
        if self.python.exists() and self.has("pip"):
            return
        say(f"creating {self.folder}")
        try:
            subprocess.run([sys.executable, "-m", "venv", str(self.folder)], check=True)
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                "tokfuse: `python3 -m venv` failed. Install the venv package of your system "
                "(Debian and Ubuntu: python3-venv) and run the command again."
            ) from error

    def stamp(self, name: str) -> Path:
        return self.folder / ".tokfuse" / name

    def is_fresh(self, name: str, digest: str) -> bool:
        stamp = self.stamp(name)
        return stamp.is_file() and stamp.read_text() == digest

    def mark(self, name: str, digest: str) -> None:
        self.stamp(name).parent.mkdir(exist_ok=True)
        self.stamp(name).write_text(digest)

    def tag(self) -> str:
        """Return the tag of extension modules of this Python, e.g. cpython-311."""
        code = "import sys; print(sys.implementation.cache_tag)"
        return subprocess.run([str(self.python), "-c", code], check=True, capture_output=True, text=True).stdout.strip()

    def has(self, module: str) -> bool:
        code = f"import importlib.util as u, sys; sys.exit(u.find_spec({module!r}) is None)"
        return subprocess.run([str(self.python), "-c", code], cwd=self.folder).returncode == 0

    def pip(self, *arguments: str, **variables: str) -> None:
        # --no-compile: Python compiles a module when it is first imported. pip would compile 15,000, for a minute.
        command = [str(self.python), "-m", "pip", "install", "--disable-pip-version-check", "--no-compile"]
        if not sys.stdout.isatty():
            command += ["--quiet"]
        try:
            subprocess.run([*command, *arguments], check=True, cwd=ROOT, env=os.environ | variables)
        except subprocess.CalledProcessError as error:
            raise SystemExit(f"tokfuse: `pip install {' '.join(arguments)}` failed.") from error


def install_group(environment: Environment, group: str, versions: str) -> None:
    """Install one group, unless its stamp says that these versions are installed."""
    wanted, without_dependencies = requirements(group)
    arguments, alone = arguments_of(wanted, versions), arguments_of(without_dependencies, versions)
    digest = hashlib.sha256("\n".join([*arguments, "--no-deps", *alone]).encode()).hexdigest()
    if versions != "newest" and environment.is_fresh(group, digest):
        return
    torch_build.prepare(str(environment.python), arguments)
    names = ", ".join(re.split(r"[^A-Za-z0-9._-]", requirement)[0] for requirement in [*wanted, *without_dependencies])
    say(f"installing {group}{'' if versions == 'pinned' else f' ({versions} versions)'}: {names}")
    environment.pip(*arguments)
    if without_dependencies:
        environment.pip("--no-deps", *alone)
    environment.mark(group, digest)


def build_native(environment: Environment) -> None:
    """Build the native module by an editable install, if one of its inputs changed.

    An editable install writes the module into the sources, so all environments of one Python version share it. Its own
    stamp holds the digest of the last build, in whichever environment that was. The module does not link to torch, so
    it also works in an environment with another torch.
    """
    settings = "\n".join(f"{name}={os.environ.get(name, '')}" for name in NATIVE_ENVIRONMENT)
    digest = digest_of_files(NATIVE_INPUTS, extra=settings)
    built = ROOT / "build" / f"native-{environment.tag()}.stamp"
    is_current = built.is_file() and built.read_text() == digest
    if is_current and environment.is_fresh("native", digest) and environment.has("tokfuse._native"):
        return
    environment.stamp("native").unlink(missing_ok=True)
    if is_current:
        say("installing tokfuse with the native module of another environment")
        environment.pip("--no-build-isolation", "--no-deps", "--editable", ".", TOKFUSE_KEEP_NATIVE="1")
    else:
        say("building the native module (C++)")
        built.unlink(missing_ok=True)
        environment.pip("--no-build-isolation", "--no-deps", "--editable", ".")
    if not environment.has("tokfuse._native"):
        say(
            "the native module was not built, so every op runs on the pure-torch reference. "
            "Install g++ and cmake and run the command again. "
            "TOKFUSE_STRICT_BUILD=1 shows the compiler's error."
        )
        return  # write no stamp, so that the next run tries again
    environment.mark("native", digest)
    built.parent.mkdir(exist_ok=True)
    built.write_text(digest)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="tools/bootstrap.py", description=__doc__.split("\n")[0])
    parser.add_argument("--no-native", action="store_true", help="install packages only")
    parser.add_argument("--only", action="store_true", help="install the named groups only, without torch")
    parser.add_argument("--versions", choices=("pinned", "oldest", "newest"), default="pinned")
    parser.add_argument("groups", nargs="*", metavar="GROUP")
    options = parser.parse_args(argv)
    environment = Environment((ROOT / os.environ.get("VENV", ".venv")).absolute())
    environment.create()
    for group in options.groups if options.only else ["core", *options.groups]:
        install_group(environment, group, options.versions)
    if not (options.no_native or options.only):
        build_native(environment)
    return 0


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036  an older Python can run the script up to this line
        raise SystemExit(f"tokfuse: Python must be 3.11 or newer; got {sys.version.split()[0]}.")
    sys.exit(main(sys.argv[1:]))
