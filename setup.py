"""Maps the repository's folders to the `tokfuse` packages and drives CMake for `tokfuse._native`.

Environment:
    TOKFUSE_STRICT_BUILD=1   a failed native build is an error (default: install without it, say so once)
    TOKFUSE_CMAKE_ARGS="..." extra arguments for the CMake configure step
    MAX_JOBS=N               parallel compile jobs
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# Every package by hand: automatic discovery would publish `runtime`, `bench`, ... as top-level names.
PACKAGE_DIR = {
    "tokfuse": "api",
    "tokfuse.runtime": "runtime",
    "tokfuse.runtime.ops": "runtime/ops",
    "tokfuse.runtime.reference": "runtime/reference",
    "tokfuse.algorithms": "algorithms",
    "tokfuse.integrations": "integrations",
    "tokfuse.triton_kernels": "triton_kernels",
    "tokfuse.bench": "bench",
}


class CMakeBuild(build_ext):
    """Configures and builds `CMakeLists.txt`, and puts the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            self._run_cmake(ext)
        except (OSError, subprocess.CalledProcessError) as error:
            reason = f"tokfuse: the native module was not built ({error})."
            if os.environ.get("TOKFUSE_STRICT_BUILD", "0") not in ("", "0"):
                raise SystemExit(f"{reason} TOKFUSE_STRICT_BUILD is set, so this is fatal.") from error
            print(
                f"{reason} Installing without it: every op runs on the pure-torch reference. "
                "`python -m tokfuse doctor` reports this; install g++ and cmake and reinstall.",
                file=sys.stderr,
            )
            # `optional=True` swallows CompileError only.
            raise CompileError(reason) from error

    def _run_cmake(self, ext: Extension) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = Path(self.build_temp).resolve() / "cmake"
        build_dir.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build_dir),
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DTOKFUSE_OUTPUT_DIR={target.parent}",
            *shlex.split(os.environ.get("TOKFUSE_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)


setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"tokfuse": ["py.typed", "*.pyi"]},
    ext_modules=[Extension("tokfuse._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
