"""Compile cases: the kernels that are compiled ahead of time for each architecture.

A kernel file declares its cases after its launchers. A case is a call of a launcher, with tensors
of realistic size on the meta device:

    @compile_case("token_stats_fwd", dtypes=(torch.bfloat16, torch.float32))
    def _(dtype: torch.dtype) -> None:
        token_stats_fwd(meta(4096, 151936, dtype=dtype), meta(4096, dtype=torch.int64))

`record` runs the call with Triton's launch function replaced. The replacement records the kernel,
its signature, compile-time values, alignment and options, as the JIT would specialise them. So the
compiled kernels are always those that the launcher launches. A launcher of two kernels gives two
rows.

`python -m tokfuse kernels` compiles every case and compares registers, spills, load widths and
instructions per element with the committed table. It needs a process without TRITON_INTERPRET,
because the interpreter has no compiler.
"""

import ast
import contextlib
import functools
import importlib
import inspect
import pkgutil
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import triton.language as tl
import triton.runtime.jit

from tokfuse.triton_kernels import launch

CAPABILITIES = (80, 90, 100)
POINTER = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.bool: "*i1",
    torch.uint8: "*u8",
}


@dataclass(frozen=True)
class CompileCase:
    """A named launch.

    Args:
        name: unique name, "<launcher>" or "<launcher>/<options>".
        call: function that launches with its large tensors in the given dtype.
        dtypes: dtypes to compile.
        streams: number of large tensors that the hot loop reads per element. The bytes that the
            loop loads are divided by it to count instructions per element. 0: a gather, whose
            instructions are not counted.
        visits: number of hot loops that each process every element. Their instructions add up.
        rare: number of loops that are longer than the hot ones and that only some rows take. They are
            not counted.
        traffic: number of large tensors that the kernel reads from or writes to memory. It predicts
            the share of the memory bandwidth. 0: no prediction, because the kernel does other work.
    """

    name: str
    call: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...]
    streams: int = 1
    visits: int = 1
    rare: int = 0
    traffic: int = 0


# An argument by its name, or a member of a tuple argument by its positions.
Key = str | tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """Everything that the compiler needs for one kernel launch."""

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[Key, Any]
    aligned: tuple[Key, ...]
    options: dict[str, int]


_CASES: dict[str, CompileCase] = {}


def compile_case(
    name: str, *, dtypes: tuple[torch.dtype, ...], streams: int = 1, visits: int = 1, rare: int = 0, traffic: int = 0
) -> Callable[[Callable[[torch.dtype], object]], Callable[[torch.dtype], object]]:
    """Declare the decorated call as a compile case."""

    def add(call: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
        assert name not in _CASES, name
        _CASES[name] = CompileCase(name, call, dtypes, streams, visits, rare, traffic)
        return call

    return add


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a tensor on the meta device for the arguments of a case.

    Inside `on_device` it is a real tensor: integers are below 1024 (ids or columns), every eighth
    flag is false, and floats have a normal distribution.
    """
    device = _DEVICES[-1]
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if dtype.is_floating_point:
        return torch.randn(shape, device=device, dtype=dtype)
    count = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    return count % 8 > 0 if dtype == torch.bool else (count % 1024).to(dtype)


def borders(pieces: int, total: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """Return (pieces + 1,) cu_seqlens or offsets of pieces of equal length, on the device of `meta`."""
    device = _DEVICES[-1]
    if device == "meta":
        return torch.empty(pieces + 1, dtype=dtype, device="meta")
    return torch.arange(0, total + 1, total // pieces, dtype=dtype, device=device)


_DEVICES = ["meta"]


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Give cases real tensors inside the context, so that tuning can run and time them."""
    _DEVICES.append(device)
    try:
        yield
    finally:
        _DEVICES.pop()


def cases() -> list[CompileCase]:
    """Return the cases of all kernel files, sorted by name."""
    package = importlib.import_module("tokfuse.triton_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return [_CASES[name] for name in sorted(_CASES)]


@contextlib.contextmanager
def timed_launches(before: Callable[[], object]) -> Iterator[list[tuple[Any, Any]]]:
    """Record two CUDA events around every launch inside the context; call `before` first."""
    events: list[tuple[Any, Any]] = []
    launched = triton.runtime.jit.JITFunction.run

    def run(kernel: Any, *args: Any, **kwargs: Any) -> Any:
        before()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        out = launched(kernel, *args, **kwargs)
        end.record()
        events.append((begin, end))
        return out

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        yield events


def record(case: CompileCase, dtype: torch.dtype, capability: int) -> list[Launch]:
    """Return the launches of a case on one architecture, in order. Nothing is run."""
    launches: list[Launch] = []

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launches.append(_specialise(kernel, args, kwargs))

    with mock.patch.object(triton.runtime.jit.JITFunction, "run", run):
        with launch.assume(capability):
            case.call(dtype)
    assert launches, f"{case.name} launches nothing"
    return launches


def _specialise(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """Apply the rules of the JIT: None and 1 become constants, multiples of 16 are marked."""
    names = set(kernel.arg_names)
    options = {name: value for name, value in kwargs.items() if name not in names}
    given = {name: value for name, value in kwargs.items() if name in names}
    bound = inspect.signature(kernel.fn).bind(*args, **given)
    bound.apply_defaults()
    signature: dict[str, Any] = {}
    constexprs: dict[Key, Any] = {}
    aligned: list[Key] = []

    def kind(parameter: Any, value: Any, key: Key, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple) and not parameter.is_constexpr:
            members = [kind(parameter, v, (*path, i), (*path, i)) for i, v in enumerate(value)]
            return type(value)(*members) if hasattr(value, "_fields") else tuple(members)
        if parameter.is_constexpr or value is None:
            constexprs[key] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            aligned.append(key)  # true for torch's allocations, not for every view
            return POINTER[value.dtype]
        if isinstance(value, bool):
            return "i1"
        if not isinstance(value, int):
            return "fp32"
        if value == 1 and not parameter.do_not_specialize:
            constexprs[key] = 1
            return "constexpr"
        if value % 16 == 0 and not parameter.do_not_specialize:
            aligned.append(key)
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    for i, (parameter, (name, value)) in enumerate(zip(kernel.params, bound.arguments.items(), strict=True)):
        signature[name] = kind(parameter, value, name, (i,))
    return Launch(kernel, signature, constexprs, tuple(aligned), options)


@functools.cache
def code_of(kernel: Any) -> str:
    """Return the code of a kernel and of all tokfuse functions and constants that it uses.

    Comments, docstrings and line numbers are removed. The rest determines the compiled kernel.
    """
    found: dict[str, str] = {}
    _collect(kernel, found)
    return "\n".join(found.values())


def _collect(kernel: Any, found: dict[str, str]) -> None:
    name = f"{kernel.fn.__module__}.{kernel.__name__}"
    if name in found:
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(kernel.fn)))
    body = tree.body[0].body  # type: ignore[attr-defined]
    if isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
        del body[0]
    found[name] = ast.unparse(tree)
    for node in ast.walk(tree):
        value = _value_of(node, kernel.fn.__globals__)
        if isinstance(value, triton.runtime.jit.JITFunction):
            _collect(value, found)
        elif isinstance(value, tl.constexpr | int | float | str):
            found[f"{name}: {ast.unparse(node)}"] = f"{ast.unparse(node)} = {value!r}"


def _value_of(node: ast.AST, names: dict[str, Any]) -> Any:
    """Return the value of a name or of an attribute of a tokfuse module; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = names.get(node.value.id)
        if isinstance(module, ModuleType) and module.__name__.startswith("tokfuse."):
            return getattr(module, node.attr, None)
    return None
