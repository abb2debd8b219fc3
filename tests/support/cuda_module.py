"""Build `_cuda_host`: the launchers and bindings of the CUDA backend, on the CPU.

    python tests/support/cuda_module.py     build it and print the file

If TOKFUSE_CUDA_HOST is set to that file, a process can force the backend "cuda" on CPU tensors.
"""

import functools
import os
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from cuda_host import COMPILER, CUDA, FLAGS, HOST, OPTIMIZED, ROOT, _made, compiled

BINDINGS = ROOT / "csrc" / "bindings"


def _binding(source: Path) -> Path:
    """Return the object of a file that includes pybind11, whose headers do not compile with -Wextra -Werror."""
    flags = [f for f in FLAGS if f not in ("-Werror", "-Wextra")]
    includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]
    command = [COMPILER, *flags, "-O0", "-fvisibility=hidden", *includes, "-c", str(source), "-o"]
    return _made(f"{source.stem}-binding.o", command)


@functools.cache
def build(jobs: int = 1) -> Path:
    """Return the module's file. It is rebuilt if a source changed."""
    shared = [BINDINGS / f"{name}.cpp" for name in ("buffers", "checks", "eager_args", "records", "tensors")]
    bindings = [*sorted(BINDINGS.glob("bind_cuda*.cpp")), *shared]
    with ThreadPoolExecutor(jobs) as pool:
        objects = [
            *pool.map(lambda path: compiled(path, OPTIMIZED), [*sorted(CUDA.glob("*.cu")), HOST / "machine.cpp"]),
            *pool.map(_binding, [*bindings, HOST / "module.cpp"]),
        ]
    return _made("_cuda_host.so", [COMPILER, "-shared", *map(str, objects), "-o"])


if __name__ == "__main__":
    print(build(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)))
