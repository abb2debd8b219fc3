"""Map the repository's folders to the `tokfuse` packages and build `tokfuse._native` with CMake.

Environment variables:
    TOKFUSE_STRICT_BUILD=1    stop if the native build fails (default: install without it)
    TOKFUSE_CUDA=AUTO|ON|OFF  build CUDA kernels if nvcc is found (default), always, or never
    TOKFUSE_CMAKE_ARGS="..."  extra arguments for the CMake configure step
    TOKFUSE_KEEP_NATIVE=1     keep the module that an earlier editable install left in the sources (tools/bootstrap.py)
    MAX_JOBS=N                number of parallel compile jobs
"""

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).resolve().parent

# Packages are listed by hand: automatic discovery would install `runtime`, `bench`, ... as
# top-level packages.
PACKAGE_DIR = {
    "tokfuse": "api",
    "tokfuse.runtime": "runtime",
    "tokfuse.runtime.core": "runtime/core",
    "tokfuse.runtime.policy": "runtime/policy",
    "tokfuse.runtime.reference": "runtime/reference",
    "tokfuse.runtime.backends": "runtime/backends",
    "tokfuse.runtime.lm_head": "runtime/lm_head",
    "tokfuse.runtime.ops": "runtime/ops",
    "tokfuse.runtime.distributed": "runtime/distributed",
    "tokfuse.inspection": "inspection",
    "tokfuse.algorithms": "algorithms",
    "tokfuse.algorithms.causal": "algorithms/causal",
    "tokfuse.algorithms.curation": "algorithms/curation",
    "tokfuse.algorithms.distillation": "algorithms/distillation",
    "tokfuse.algorithms.preference": "algorithms/preference",
    "tokfuse.algorithms.reward": "algorithms/reward",
    "tokfuse.integrations": "integrations",
    "tokfuse.triton_kernels": "triton_kernels",
    "tokfuse.bench": "bench",
}

# CMake caches the effect of these variables, so each combination of values has its own build folder.
BUILD_SETTINGS = (
    "CC",
    "CXX",
    "CFLAGS",
    "CXXFLAGS",
    "LDFLAGS",
    "CUDACXX",
    "CMAKE_GENERATOR",
    "CUDA_HOME",
    "CUDA_PATH",
    "TOKFUSE_CMAKE_ARGS",
)


def native_build_dir(cuda: str) -> Path:
    """Return the build folder. It is kept between builds, so an unchanged file is not recompiled.

    CMake keeps the defaults of options in it. If the build files change, they may have other defaults.
    """
    files = [(ROOT / name).read_text() for name in ("CMakeLists.txt", "csrc/cuda/cuda.cmake")]
    tools = [shutil.which(name) for name in ("c++", "nvcc", "cmake")]
    settings = [sys.base_prefix, cuda, *map(str, tools), *(os.environ.get(name, "") for name in BUILD_SETTINGS)]
    settings += files
    key = hashlib.sha256("\0".join(settings).encode()).hexdigest()[:8]
    return ROOT / "build" / f"native-{sys.implementation.cache_tag}-{key}"


def _strict() -> bool:
    return os.environ.get("TOKFUSE_STRICT_BUILD", "0") not in ("", "0")


def _compiles_cuda(cuda: str) -> bool:
    """Return True if CMake enabled CUDA when it configured the build with this setting."""
    cache = native_build_dir(cuda) / "CMakeCache.txt"
    return cache.is_file() and "CMAKE_CUDA_COMPILER:" in cache.read_text()


class CMakeBuild(build_ext):
    """Builds `CMakeLists.txt` and places the module where setuptools expects it."""

    def build_extension(self, ext: Extension) -> None:
        if os.environ.get("TOKFUSE_KEEP_NATIVE") and self._in_sources(ext).is_file():
            target = Path(self.get_ext_fullpath(ext.name))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(self._in_sources(ext), target)
            return
        cuda = os.environ.get("TOKFUSE_CUDA") or "AUTO"
        try:
            try:
                self._run_cmake(ext, cuda)
            except subprocess.CalledProcessError as error:
                if cuda != "AUTO" or _strict() or not _compiles_cuda(cuda):
                    raise
                print(f"tokfuse: building the CUDA kernels failed ({error}); retrying without them.", file=sys.stderr)
                self._run_cmake(ext, "OFF")
        except (ImportError, OSError, subprocess.CalledProcessError) as error:
            self._remove_stale(ext)
            reason = f"tokfuse: the native module was not built ({error})."
            insists = "TOKFUSE_STRICT_BUILD" if _strict() else "TOKFUSE_CUDA"
            if _strict() or cuda == "ON":
                raise SystemExit(f"{reason} {insists} is set, so the installation stops.") from error
            print(
                f"{reason} Installing without it: on the CPU every op runs on the pure-torch reference. "
                "To build it, install g++ and cmake and reinstall; `python -m tokfuse doctor` shows the state.",
                file=sys.stderr,
            )
            # With `optional=True` setuptools ignores CompileError only.
            raise CompileError(reason) from error

    def _in_sources(self, ext: Extension) -> Path:
        """Return where an editable install leaves the module."""
        name = ext.name.rpartition(".")[2] + sysconfig.get_config_var("EXT_SUFFIX")
        return ROOT / PACKAGE_DIR["tokfuse"] / name

    def _remove_stale(self, ext: Extension) -> None:
        """Remove a module that an earlier build left in the tree, so that it is not installed."""
        self._in_sources(ext).unlink(missing_ok=True)
        Path(self.get_ext_fullpath(ext.name)).unlink(missing_ok=True)

    def _run_cmake(self, ext: Extension, cuda: str) -> None:
        import pybind11

        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build_dir = native_build_dir(cuda)
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
            f"-Dpybind11_DIR={Path(pybind11.get_cmake_dir()).resolve()}",
            f"-DTOKFUSE_OUTPUT_DIR={target.parent}",
            f"-DTOKFUSE_CUDA={cuda}",
            *shlex.split(os.environ.get("TOKFUSE_CMAKE_ARGS", "")),
        ]
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build_dir), "-j", jobs], check=True)


setup(
    packages=list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    include_package_data=False,  # MANIFEST.in is for the source distribution; it also names the rows of bench/results
    package_data={
        "tokfuse": ["py.typed", "*.pyi"],
        "tokfuse.bench": ["*.cpp", "*.txt", "*.css", "*.js", "*.j2"],
        "tokfuse.inspection": ["cuda_resources.json"],
        "tokfuse.triton_kernels": ["resources.json"],
    },
    ext_modules=[Extension("tokfuse._native", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
