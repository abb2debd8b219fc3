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
        name: unique; "<launcher>" or "<launcher>/<options>".
        call: launches with its big tensors in the given dtype.
        dtypes: those that are shipped.
        streams: how many tensors of the big dtype the hot loop reads, element by element: divides
            the bytes that it loads when instructions per element are counted. 0: a gather, whose
            instructions are not counted.
        visits: hot loops that each visit every element, one after the other; their instructions
            add up.
        traffic: how many such tensors one pass moves between memory and the chip, read or written,
            where that is all its work: predicts the share of the memory's bandwidth. 0: no such
            prediction.
    """

    name: str
    call: Callable[[torch.dtype], object]
    dtypes: tuple[torch.dtype, ...]
    streams: int = 1
    visits: int = 1
    traffic: int = 0


# An argument by its name; a member of a tuple argument by positions.
Key = str | tuple[int, ...]


@dataclass(frozen=True)
class Launch:
    """One kernel launch as the compiler needs it."""

    kernel: Any
    signature: dict[str, Any]
    constexprs: dict[Key, Any]
    aligned: tuple[Key, ...]
    options: dict[str, int]


_CASES: dict[str, CompileCase] = {}


def compile_case(
    name: str, *, dtypes: tuple[torch.dtype, ...], streams: int = 1, visits: int = 1, traffic: int = 0
) -> Callable[[Callable[[torch.dtype], object]], Callable[[torch.dtype], object]]:
    """Declare the decorated call as a compile case."""

    def add(call: Callable[[torch.dtype], object]) -> Callable[[torch.dtype], object]:
        assert name not in _CASES, name
        _CASES[name] = CompileCase(name, call, dtypes, streams, visits, traffic)
        return call

    return add


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """A tensor without memory, for the arguments of a case; a real one inside `on_device`.

    Then integers are ids or columns below 1024, flags true but for every eighth, and floats of a
    normal distribution.
    """
    device = _DEVICES[-1]
    if device == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    if dtype.is_floating_point:
        return torch.randn(shape, device=device, dtype=dtype)
    count = torch.arange(torch.Size(shape).numel(), device=device).view(shape)
    return count % 8 > 0 if dtype == torch.bool else (count % 1024).to(dtype)


def borders(pieces: int, total: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """(pieces + 1,) cu_seqlens, or offsets, of pieces of equal length; like `meta`."""
    device = _DEVICES[-1]
    if device == "meta":
        return torch.empty(pieces + 1, dtype=dtype, device="meta")
    return torch.arange(0, total + 1, total // pieces, dtype=dtype, device=device)


_DEVICES = ["meta"]


@contextlib.contextmanager
def on_device(device: str) -> Iterator[None]:
    """Inside, cases have real tensors and can be run: what tuning times."""
    _DEVICES.append(device)
    try:
        yield
    finally:
        _DEVICES.pop()


def cases() -> list[CompileCase]:
    """Every case of every kernel file, by name."""
    package = importlib.import_module("tokfuse.triton_kernels")
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f"{package.__name__}.{module.name}")
    return [_CASES[name] for name in sorted(_CASES)]


@contextlib.contextmanager
def timed_launches(before: Callable[[], object]) -> Iterator[list[tuple[Any, Any]]]:
    """Inside, `before` runs ahead of every launch, and the launch lies between two CUDA events."""
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
            aligned.append(key)  # of torch's allocations; a view may differ
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
    """The code of a kernel, then of every device function and constant of ours that it reaches.

    Without comments, docstrings and places in their files: what is left decides what is compiled.
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
    """What a name, or an attribute of one of our modules, stands for; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        module = names.get(node.value.id)
        if isinstance(module, ModuleType) and module.__name__.startswith("tokfuse."):
            return getattr(module, node.attr, None)
    return None
