"""Probes: the limits of this machine, timed in the same rounds as the ops that they bound.

read: read every byte of the input once. copy: copy the same bytes to memory that was touched before.
exp: compute as many exponentials as there are logits, over data in L1. gemm: torch's matrix products
without any other work. On a GPU the probes are torch calls: a sum over the bytes as int32, a copy, the
products; there is no exp probe. `probes.cpp` is compiled at first use (g++, cached by content in the
user's cache folder). Without a compiler the probes are unsupported, and rows have no share of a limit.
"""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import torch

from tokfuse.bench.measure import Provider
from tokfuse.bench.problem import Unsupported

SOURCE = Path(__file__).with_name("probes.cpp")
FLAGS = (
    "-O3",
    "-march=native",
    "-mprefer-vector-width=512",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=fast",
    "-std=c++17",
    "-fopenmp",
    "-shared",
    "-fPIC",
)


def read_probe(data: torch.Tensor) -> Provider:
    """Return a probe that reads `data` once."""
    if data.device.type != "cpu":
        words = data.reshape(-1).view(torch.int32)
        return Provider(lambda: _nothing(words.sum()))
    library = _library()
    bytes_read = data.numel() * data.element_size() // 8 * 8
    threads = torch.get_num_threads()

    def run() -> dict[str, torch.Tensor]:
        library.tokfuse_probe_read(data.data_ptr(), bytes_read, threads)
        return {}

    return Provider(run, backend="c++")


def copy_probe(data: torch.Tensor) -> Provider:
    """Return a probe that copies `data` to memory that was touched before."""
    target = torch.empty_like(data)
    target.copy_(data)
    if data.device.type != "cpu":
        return Provider(lambda: _nothing(target.copy_(data)))
    library = _library()
    size = data.numel() * data.element_size()
    threads = torch.get_num_threads()

    def run() -> dict[str, torch.Tensor]:
        library.tokfuse_probe_copy(target.data_ptr(), data.data_ptr(), size, threads)
        return {}

    return Provider(run, backend="c++")


def exp_probe(elements: int, device: str = "cpu") -> Provider:
    """Return a probe that computes `elements` exponentials over data in L1."""
    if device != "cpu":
        raise Unsupported("the exp probe exists only for the CPU")
    library = _library()
    threads = torch.get_num_threads()

    def run() -> dict[str, torch.Tensor]:
        library.tokfuse_probe_exp(elements, threads)
        return {}

    return Provider(run, backend="c++")


def gemm_probe(
    hidden: torch.Tensor, weight: torch.Tensor, grad_rows: int, with_weight: bool, backward: bool
) -> Provider:
    """Return a probe of the products: logits = h W^T; dh = dz W and dW = dz^T h over `grad_rows` rows.

    Outputs are allocated and touched before the timing. Their dtype is float32 or the dtype of the inputs.
    """
    logits = hidden @ weight.T
    grad_logits = logits[:grad_rows]
    grad_hidden = torch.zeros_like(hidden[:grad_rows])
    grad_weight = torch.zeros_like(weight) if backward and with_weight else None
    rows = hidden[:grad_rows]

    def run() -> dict[str, torch.Tensor]:
        torch.mm(hidden, weight.T, out=logits)
        if backward:
            torch.mm(grad_logits, weight, out=grad_hidden)
        if grad_weight is not None:
            torch.mm(grad_logits.T, rows, out=grad_weight)
        return {}

    return Provider(run)


def _nothing(result: torch.Tensor) -> dict[str, torch.Tensor]:
    """Discard the result of a probe, which is not an output of the case."""
    del result
    return {}


@functools.cache
def _library() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        raise Unsupported("no g++ was found to compile the probes")
    if not SOURCE.exists():
        raise Unsupported(f"{SOURCE.name} is not installed")
    key = hashlib.sha256(SOURCE.read_bytes() + repr((compiler, FLAGS)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tokfuse"
    folder.mkdir(parents=True, exist_ok=True)
    built = folder / f"probes-{key}.so"
    if not built.exists():
        _compile(compiler, built)
    library = ctypes.CDLL(str(built))
    address, size, count = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    library.tokfuse_probe_read.argtypes = [address, size, count]
    library.tokfuse_probe_read.restype = ctypes.c_uint64
    library.tokfuse_probe_copy.argtypes = [address, address, size, count]
    library.tokfuse_probe_copy.restype = None
    library.tokfuse_probe_exp.argtypes = [size, count]
    library.tokfuse_probe_exp.restype = ctypes.c_float
    return library


def _compile(compiler: str, built: Path) -> None:
    partial = built.with_suffix(f".{os.getpid()}.tmp")
    command = [compiler, *FLAGS, str(SOURCE), "-o", str(partial)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        detail = getattr(error, "stderr", "") or str(error)
        raise Unsupported(f"the probes did not compile: {detail.strip()[:200]}") from error
    partial.replace(built)  # atomic, because two runs may build at the same time
