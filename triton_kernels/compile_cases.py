"""What is compiled ahead of time for each architecture: the registry of compile cases.

A kernel file declares its cases after its launchers. A case is a call of the launcher, on tensors
of the meta device and of realistic size:

    @compile_case("token_stats_fwd", dtypes=(torch.bfloat16, torch.float32))
    def _(dtype: torch.dtype) -> None:
        token_stats_fwd(meta(4096, 151936, dtype=dtype), meta(4096, dtype=torch.int64))

`record` runs the call with Triton's launch replaced by one that writes down kernel, signature,
compile-time values, alignment and options, as the JIT would specialise them. So what is compiled is
what is launched, and a launcher that changes cannot leave its case behind. A launcher that starts
two kernels gives two rows. `python -m tokfuse kernels` compiles every case and holds registers,
spills, load widths and instructions per element against the committed table; it does not work in a
process with TRITON_INTERPRET set, where there is no compiler.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import triton.runtime.jit

from tokfuse.triton_kernels import launch

CAPABILITIES = (80, 90, 100)
POINTER = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float64: "*fp64",
    torch.int64: "*i64", torch.int32: "*i32", torch.bool: "*i1", torch.uint8: "*u8",
}  # fmt: skip


@dataclass(frozen=True)
class CompileCase:
    """A named launch.

    Args:
        name: unique; "<launcher>" or "<launcher>/<options>".
        call: launches with its big tensors in the given dtype.
        dtypes: those that are shipped.
        streams: how many tensors of the big dtype the hot loop reads, element by element: divides
            the bytes that it loads when instructions per element are counted.
        traffic: how many such tensors one pass moves between memory and the chip, read or written,
            where that is all its work: predicts the share of the memory's bandwidth. 0: no such
            prediction.
    """

    name: str
    call: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...]
    streams: int = 1
    traffic: int = 0


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the compiler needs it."""

    kernel: Any
    signature: dict[str, str | tuple[str, ...]]
    constexprs: dict[str, Any]
    aligned: tuple[str, ...]
    options: dict[str, int]


_CASES: dict[str, CompileCase] = {}


def compile_case(
    name: str, *, dtypes: tuple[torch.dtype, ...], streams: int = 1, traffic: int = 0
) -> Callable[[Callable[[torch.dtype], object]], Callable[[torch.dtype], object]]:
    """Declare the decorated call as a compile case."""

    def add(call: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
        assert name not in _CASES, name
        _CASES[name] = CompileCase(name, call, dtypes, streams, traffic)
        return call

    return add


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for the arguments of a case."""
    return torch.empty(shape, dtype=dtype, device="meta")


def cases() -> list[CompileCase]:
    """Every case of every kernel file, by name."""
    package = importlib.import_module("tokfuse.triton_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return [_CASES[name] for name in sorted(_CASES)]


def record(case: CompileCase, dtype: torch.dtype, capability: int) -> list[Launch]:
    """The launches of a case on one architecture, in order; nothing is run."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(kernel, args, kwargs))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        with launch.assume(capability):
            case.call(dtype)
    assert launches, f"{case.name} launches nothing"
    return launches


def _specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """The rules of the JIT: None and 1 become constants, multiples of 16 are known as such."""
    names = set(kernel.arg_names)
    options = {name: value for name, value in kwargs.items() if name not in names}
    given = {name: value for name, value in kwargs.items() if name in names}
    bound = inspect.signature(kernel.fn).bind(*args, **given)
    bound.apply_defaults()
    signature: dict[str, str | tuple[str, ...]] = {}
    constexprs, aligned = {}, []
    for parameter, (name, value) in zip(kernel.params, bound.arguments.items(), strict=True):
        if parameter.is_constexpr or value is None:
            signature[name], constexprs[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = POINTER[value.dtype]
            aligned.append(name)  # of torch's allocations; a view may differ
        elif isinstance(value, bool):
            signature[name] = "i1"
        elif isinstance(value, int):
            if value == 1 and not parameter.do_not_specialize:
                signature[name], constexprs[name] = "constexpr", 1
                continue
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                aligned.append(name)
        elif isinstance(value, tuple):  # of numbers; triton_kernels.packed.pair makes them
            assert all(isinstance(x, float) for x in value), name
            signature[name] = ("fp32",) * len(value)
        else:
            signature[name] = "fp32"
    return Launch(kernel, signature, constexprs, tuple(aligned), options)
