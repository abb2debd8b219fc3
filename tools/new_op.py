"""Write the stubs of a new op in every layer.

    python tools/new_op.py NAME [--root FOLDER]

The op maps a vector to a vector: NAME(x, mask=None, *, scale=1.0), all of shape (tokens,). Change the
signature when you fill in the stubs. Kernels write NaN and the reference raises an error. A mark shows
every place to fill in; `tests/project/test_new_op.py` fails until no mark is left. docs/adding_an_op.md
lists the files and describes their contents.
"""

import argparse
import re
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
# The templates use the op name `toy_op`. Only the templates and their test contain the words of MARK.
NAME, CAMEL = "toy_op", "ToyOp"
MARK = " ".join(("stub", "of", "a", "new", "op"))
MARKED = "@MARK@"

REFERENCE = '''"""toy_op in plain torch: the specification of `tokfuse.toy_op`. @MARK@"""

import torch


def toy_op(x: torch.Tensor, *, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """@MARK@: the formula, computed in float64 and rounded once; 0 for rows with mask False."""
    raise NotImplementedError("toy_op: the reference is not written")
'''

OP = '''"""`tokfuse.toy_op`: @MARK@."""

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    Runs,
    check_number,
    check_optional,
    check_vector,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.toy_op import toy_op as reference

OP = "toy_op"


@ranged("toy_op.fwd")
def toy_op(x: torch.Tensor, mask: torch.Tensor | None = None, *, scale: float = 1.0) -> torch.Tensor:
    """@MARK@: one line, then the formula.

    Args:
        x: (tokens,), float.
        mask: (tokens,), bool. True for the rows that count. None: all rows count.
        scale: @MARK@, >= 0.

    Returns:
        (tokens,), float32 (float64 for float64 input), detached; 0 for rows with mask False.

    Numerics:
        @MARK@: accumulation, order, special values.

    Gradients and memory:
        No gradients. One (tokens,) output.

    Examples:
        >>> tokfuse.toy_op(torch.tensor([1.0, 2.0]))  # @MARK@
        tensor([])

    Raises:
        ValueError: an argument has a wrong shape or dtype, or scale is negative.

    Source:
        @MARK@: paper and equation, and whether the op follows them exactly.
    """
    num_tokens = check_vector(OP, "x", x).shape[0]
    check_optional(OP, "mask", mask, Rows(num_tokens, "x", x.device), BOOL)
    check_number(OP, "scale", scale, 0.0)
    dtype = working_dtype(x)
    run = _RUNS[backend_of(OP, x.device.type, dtype)]
    out: torch.Tensor = run(plain(x, dtype), mask=plain(mask), scale=float(scale))
    return out


_FORM = GraphForm("(Tensor x, *, Tensor? mask, float scale) -> Tensor", lambda x, **_: torch.empty_like(x))
# A table by name, because torch.compile can trace a module's table, but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.toy_op, _FORM),
    "triton": traceable(OP, "triton", triton_packed.toy_op, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.toy_op, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
'''

CPU = """// toy_op: @MARK@: formula, and the bytes read and written per row.
#include <cmath>

#include "cpu/packed_kernels.h"

namespace tokfuse {
namespace TOKFUSE_ISA {
namespace {

constexpr int64_t kSerialTokens = 16384;

}  // namespace

void toy_op(const ToyOpArgs& a) {
#pragma omp parallel for schedule(static) num_threads(a.tokens < kSerialTokens ? 1 : a.threads)
  for (int64_t t = 0; t < a.tokens; t++) a.out[t] = NAN;  // @MARK@
}

}  // namespace TOKFUSE_ISA
}  // namespace tokfuse
"""

CUDA_HEADER = """// toy_op: @MARK@: formula, and the bytes read and written per row.
#pragma once

#include <cmath>

#include "cuda/grid.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

__global__ void __launch_bounds__(kBlock) toy_op_kernel(const ToyOpArgs a) {
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t t = blockIdx.x * int64_t{kBlock} + threadIdx.x; t < a.tokens; t += threads) {
    a.out[t] = NAN;  // @MARK@
  }
}

}  // namespace cuda
}  // namespace tokfuse
"""

CUDA_LAUNCHER = """#include "cuda/toy_op.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t toy_op(const ToyOpArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  return launch_grid(&toy_op_kernel, (a.tokens + kBlock - 1) / kBlock, kBlock, stream, a);
}

}  // namespace cuda
}  // namespace tokfuse
"""

TRITON = '''"""toy_op: @MARK@: formula, launches, bytes per row. Legend: T rows."""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare
from tokfuse.triton_kernels.packed import is_valid, joined, pair


@triton.jit
def toy_op_fwd_kernel(
    x_ptr,  # (T,) float
    mask_ptr,  # (T,) bool, or None
    out_ptr,  # (T,) float
    num_rows,
    scale,  # a pair
    BLOCK: tl.constexpr,
):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < num_rows
    valid = is_valid(mask_ptr, offs, inside)
    x = tl.load(x_ptr + offs, mask=valid, other=0.0).to(tl.float64)
    y = x * joined(scale) + float("nan")  # @MARK@
    tl.store(out_ptr + offs, tl.where(valid, y, 0.0).to(out_ptr.dtype.element_ty), mask=inside)


declare("toy_op", {80: LaunchConfig(block_t=1024, num_warps=4)})


def toy_op(x: torch.Tensor, *, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return (tokens,) in the dtype of `x`. The caller has checked the arguments."""
    out = torch.empty_like(x)
    if x.shape[0]:
        config = choose("toy_op", x)
        grid = (triton.cdiv(x.shape[0], config.block_t),)
        toy_op_fwd_kernel[grid](x, mask, out, x.shape[0], pair(scale), BLOCK=config.block_t, **config.options)
    return out


@compile_case("toy_op", dtypes=(torch.float32, torch.float64))
def _(dtype: torch.dtype) -> None:
    toy_op(meta(1 << 20, dtype=dtype), mask=meta(1 << 20, dtype=torch.bool), scale=0.5)
'''

TEST = '''"""Test toy_op on every backend: the paper's formula, the float64 reference, repeatability. @MARK@"""

import op_calls
import pytest
import torch
from harness import Backend, backends, bits, compare, thread_counts

import tokfuse

X = (0.5, -1.25, 3.0, 0.0)
EXPECTED: tuple[float, ...] | None = None  # @MARK@: result for X, by Python arithmetic on the paper's formula
CALLS = [call for call in op_calls.calls() if call.row.op == "toy_op"]


@pytest.fixture(params=backends("toy_op"))
def backend(request):
    with request.param.forced():
        yield request.param


def test_formula(backend: Backend):
    assert EXPECTED is not None, "set EXPECTED to the result of the formula for X"
    got = tokfuse.toy_op(backend.put(torch.tensor(X)))
    compare(got, torch.tensor(EXPECTED, dtype=torch.float64), atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.name)
def test_values_are_those_of_float64(call: op_calls.Call, backend: Backend):
    with tokfuse.backend("reference"):
        want = call.run(op_calls.Problem(op_calls.WIDE, dtype=torch.float64))
    got = call.run(op_calls.Problem(op_calls.WIDE, backend.device))
    for name, value in want.items():
        compare(got[name], value, atol=2e-6, rtol=2e-6, what=name)


def test_results_repeat_with_any_number_of_threads(backend: Backend):
    before = torch.get_num_threads()
    x = backend.put(torch.randn(40_000, generator=torch.Generator().manual_seed(0)))
    try:
        results = []
        for threads in thread_counts():
            torch.set_num_threads(threads)
            results.append(bits(tokfuse.toy_op(x)))
    finally:
        torch.set_num_threads(before)
    assert all(result == results[0] for result in results)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"x": torch.zeros(2, 2)}, "toy_op: x must be"),
        ({"x": torch.zeros(2), "mask": torch.zeros(3, dtype=torch.bool)}, "toy_op: mask must be"),
        ({"x": torch.zeros(2), "scale": -1.0}, "toy_op: scale must be"),
    ],
)
def test_refusals(arguments: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tokfuse.toy_op(**arguments)


def test_no_rows(backend: Backend):
    assert tokfuse.toy_op(backend.put(torch.zeros(0))).shape == (0,)
'''

BENCH = '''"""Case `toy_op`: @MARK@."""

import torch

from tokfuse.bench import ours, peers, probes
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Factory, Problem, Unsupported, generator

OP = "toy_op"
SHAPES = ("4194304x1",)
QUICK_SHAPES = ("65536x1",)
DTYPES = ("float32",)
CASES = (("forward", "all"),)
BYTES = 8  # per row: 4 read, 4 written; @MARK@


def build(config: Config, peer_names: list[str]) -> Problem:
    """Return the problem of one configuration."""
    x = torch.randn(config.tokens, generator=generator(config), device=config.device)
    op = ours.public(OP)

    def peer(name: str) -> Factory:
        def factory() -> Provider:
            if name != "torch_eager":
                raise Unsupported("toy_op has only the peer torch_eager")
            return peers.provider(name, lambda: _torch_form(x))

        return factory

    return Problem(
        config,
        ours={"tokfuse": lambda: ours.provider(lambda: {"out": op(x)})},
        peers={name: peer(name) for name in peer_names},
        limits={"limit_copy": lambda: probes.copy_probe(torch.empty_like(x))},
        exact=lambda: _torch_form(x.double()),
        bounds=("copy",),
        bytes_moved=BYTES * config.tokens,
        bytes_formula=f"{BYTES} per row",
    )


def _torch_form(x: torch.Tensor) -> Outputs:
    """@MARK@: the same result in vectorised torch."""
    raise Unsupported("toy_op: the torch form is not written")
'''

FILES = {
    "runtime/reference/toy_op.py": REFERENCE,
    "runtime/ops/toy_op.py": OP,
    "csrc/cpu/toy_op.cpp": CPU,
    "csrc/cuda/toy_op.cuh": CUDA_HEADER,
    "csrc/cuda/toy_op.cu": CUDA_LAUNCHER,
    "triton_kernels/toy_op.py": TRITON,
    "tests/ops/test_toy_op.py": TEST,
    "bench/toy_op.py": BENCH,
}


class Entry(NamedTuple):
    """Text to insert above the only line of a file that starts with `line` (including its indentation)."""

    file: str
    line: str
    text: str


ENTRIES = (
    Entry(
        "csrc/common/packed_args.h",
        "struct OpeArgs {",
        """struct ToyOpArgs {
  int64_t tokens;
  const float* x;       // (T)
  const uint8_t* mask;  // (T) or null
  float* out;           // (T)
  double scale;
  int threads;  // CPU
};

""",
    ),
    Entry("csrc/cpu/packed_kernels.h", "  void ope(", "  void toy_op(const ToyOpArgs& args);                     \\\n"),
    Entry(
        "csrc/cuda/packed_kernels.h",
        "cudaError_t ope(",
        "cudaError_t toy_op(const ToyOpArgs& args, cudaStream_t stream);\n",
    ),
    Entry(
        "csrc/bindings/records.cpp",
        "FIELDS_OF(OpeArgs,",
        """FIELDS_OF(ToyOpArgs, REQUIRED(tokens), REQUIRED(x), REQUIRED(mask), REQUIRED(out), REQUIRED(scale),
          OPTIONAL(threads))

""",
    ),
    Entry("csrc/bindings/records.cpp", "  each(KeepRule)", "  each(ToyOpArgs) \\\n"),
    Entry(
        "csrc/bindings/bind_packed.cpp",
        "void ope(OpeArgs a) {",
        """void toy_op(ToyOpArgs a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  require_pointers({a.x, a.out}, a.tokens, "x or out");
  require(a.scale >= 0, "scale must be >= 0");
  require_threads(a.threads);
  py::gil_scoped_release release;
  TOKFUSE_CALL(toy_op, a);
}

""",
    ),
    Entry("csrc/bindings/bind_packed.cpp", '  m.def("ope",', '  m.def("toy_op", &toy_op);\n'),
    Entry(
        "csrc/bindings/bind_cuda_packed.cpp",
        "void bind_ope(",
        """void bind_toy_op(const Place& place, const ToyOpArgs& a) {
  require(a.tokens >= 0, "tokens must be >= 0");
  run("toy_op", "toy_op_kernel", place, [&](cudaStream_t stream) { return toy_op(a, stream); });
}

""",
    ),
    Entry("csrc/bindings/bind_cuda_packed.cpp", '  m.def("ope",', '  m.def("toy_op", &bind_toy_op);\n'),
    Entry(
        "runtime/backends/packed_args.py",
        "def ope_args(",
        '''def toy_op_args(
    native: Any, *, x: torch.Tensor, mask: torch.Tensor | None, scale: float, out: torch.Tensor
) -> Any:
    """Return the arguments of the kernels, which write to `out`."""
    return native.ToyOpArgs(
        tokens=x.shape[0], x=x, mask=mask, out=out, scale=scale, threads=torch.get_num_threads()
    )


''',
    ),
    Entry(
        "runtime/backends/cpu_packed.py",
        "def ope(",
        '''def toy_op(x: torch.Tensor, *, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return (tokens,); 0 for masked rows."""
    module, out = native.loaded(), native.empty_like_rows(x)
    module.toy_op(packed_args.toy_op_args(module, x=x, mask=mask, scale=scale, out=out))
    return out


''',
    ),
    Entry(
        "runtime/backends/cuda_packed.py",
        "def ope(",
        '''def toy_op(x: torch.Tensor, *, mask: torch.Tensor | None, scale: float) -> torch.Tensor:
    """Return (tokens,); 0 for masked rows."""
    native, out = launchers(), torch.empty_like(x)
    native.toy_op(place(x), packed_args.toy_op_args(native, x=x, mask=mask, scale=scale, out=out))
    return out


''',
    ),
    Entry("runtime/backends/triton_packed.py", "ope = launcher(", 'toy_op = launcher("toy_op", "toy_op")\n'),
    Entry("api/__init__.py", '    "whiten":', '    "toy_op": "tokfuse.runtime.ops.toy_op",\n'),
    Entry(
        "api/__init__.py",
        "    from tokfuse.runtime.ops.vtrace import VTrace",
        "    from tokfuse.runtime.ops.toy_op import toy_op as toy_op\n",
    ),
    Entry("docs/api.md", "::: tokfuse.runtime.ops.whiten.whiten", "::: tokfuse.runtime.ops.toy_op.toy_op\n\n"),
    Entry(
        "tests/support/op_calls.py",
        "    # The next row goes here.",
        """    Row(
        "toy_op",
        "toy_op",
        "packed",
        lambda p: {"x": _x(p)},
        options={"mask": MASK, "scale": _constant(scale=0.5)},
        dtypes=PACKED,
        rich=("mask",),
    ),
""",
    ),
    Entry(
        "tests/cuda_host/packed_main.cpp",
        "  OpeArgs o = {};",
        """  ToyOpArgs toy_op_args = {};
  toy_op_args.tokens = kTokens;
  toy_op_args.x = b.x;
  toy_op_args.mask = b.mask;
  toy_op_args.out = b.out();
  toy_op_args.scale = 0.5;
  report("toy_op", toy_op(toy_op_args, nullptr), {toy_op_args.out}, kTokens);
""",
    ),
    Entry("bench/plan.py", "    token_stats,\n", "    toy_op,\n"),
    Entry("bench/plan.py", "        overhead,\n", "        toy_op,\n"),
    Entry(
        "inspection/roofline.py",
        '    "ope_kernel":',
        '    "toy_op_kernel": (8, "token; 4 read, 4 written"),  # @MARK@\n',
    ),
    Entry("CHANGELOG.md", "* ", "* `tokfuse.toy_op`: @MARK@.\n"),
)


def named(text: str, name: str) -> str:
    """Return a template with the name of the op `name`."""
    camel = "".join(word.capitalize() for word in name.split("_"))
    return text.replace(MARKED, MARK).replace(NAME, name).replace(CAMEL, camel)


def inserted(before: str, entry: Entry) -> str:
    """Return the text of a file with the entry inserted above its line; in the changelog, above the first such line.

    Raises:
        ValueError: the file has no such line, or more than one.
    """
    lines = before.splitlines(keepends=True)
    at = [i for i, line in enumerate(lines) if line.startswith(entry.line)]
    if not at or (len(at) > 1 and entry.file != "CHANGELOG.md"):
        raise ValueError(f"{entry.file} has {len(at)} lines that start with {entry.line!r}; it must have one.")
    return "".join([*lines[: at[0]], entry.text, *lines[at[0] :]])


def scaffold(name: str, root: Path) -> list[str]:
    """Write the stubs. Return the files, new files first.

    Raises:
        ValueError: the name is not a valid module name, the name is taken, or a file does not contain the line of an
            entry.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name):
        raise ValueError(f"NAME must be lower case words joined by _, for example token_stats; got {name!r}.")
    new = {named(file, name): named(text, name) for file, text in FILES.items()}
    taken = [file for file in new if (root / file).exists()]
    if taken:
        raise ValueError(f"NAME {name!r} is taken: {', '.join(taken)} exists.")
    changed: dict[str, str] = {}
    for entry in ENTRIES:
        before = changed.get(entry.file) or (root / entry.file).read_text()
        changed[entry.file] = inserted(before, entry._replace(text=named(entry.text, name)))
    for file, text in {**new, **changed}.items():
        (root / file).write_text(text)
    return [*new, *changed]


def marks(root: Path, files: list[str]) -> list[str]:
    """Return `file:line` of every remaining mark."""
    return [
        f"{file}:{number}"
        for file in files
        for number, line in enumerate((root / file).read_text(errors="replace").splitlines(), 1)
        if MARK in line
    ]


def main() -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", metavar="NAME", help="name of the op in every layer, for example token_stats")
    parser.add_argument(
        "--root", type=Path, default=ROOT, help="checkout to write to (default: the one of this script)"
    )
    options = parser.parse_args()
    try:
        files = scaffold(options.name, options.root)
    except ValueError as error:
        parser.error(str(error))
    print("\n".join(files))
    print(
        f"\nFill in the {len(marks(options.root, files))} places that are marked {MARK!r}. Then run `make format` and"
    )
    print("the commands at the end of docs/adding_an_op.md.")


if __name__ == "__main__":
    main()
