"""Argument checks shared by the ops.

Each error message has one sentence, the actual value and a next step. Checks that read the values of a
tensor always run for CPU tensors, because they need no synchronisation there. For other devices they run
only with `TOKFUSE_CHECK=1`.
"""

import math
import numbers
import os
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch._C._functorch import is_functorch_wrapped_tensor, is_gradtrackingtensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from tokfuse.runtime.core import native
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forced import forced_backend

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16, torch.float64})
INTS = frozenset({torch.int32, torch.int64})
INT32 = frozenset({torch.int32})
INT64 = frozenset({torch.int64})
BOOL = frozenset({torch.bool})
_CONVERSION = {FLOATS: "float", INTS: "long", INT32: "int", INT64: "long", BOOL: "bool"}
Runs = dict[str, Callable[..., Any]]  # backend -> implementation of one op


def may_read(tensor: torch.Tensor) -> bool:
    """Return True if the values of `tensor` may be read on the host here.

    Inside torch.compile the answer is False, because a read would break the graph. The native kernels
    repeat the check when they run.
    """
    if torch.compiler.is_compiling():
        return False
    if tensor.is_cpu:
        return True
    return native.environment_sets("TOKFUSE_CHECK") and os.environ.get("TOKFUSE_CHECK", "0") not in ("", "0")


# ----------------------------------------------------------------------------------------- tensors


PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)


def require_tensor(op: str, name: str, value: object) -> torch.Tensor:
    """Return `value`. Raise an error if it is not a tensor with values in its own memory."""
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor; got {type(value).__name__}. Convert it first.")
    if torch.compiler.is_compiling():  # tensors have no values there
        return value
    if type(value) not in PLAIN_TENSORS:
        _check_subclass(op, name, value)
    elif is_functorch_wrapped_tensor(value):
        _check_transform(op, name, value)
    if value.layout is not torch.strided or value.is_nested:
        raise _refuse_form(op, name, value)
    if forward_ad._current_level >= 0:
        _check_tangent(op, name, value)
    return value


def check_main(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError if the main input is a meta tensor. Other inputs must be on the device of the main input."""
    if x.is_meta and not torch.compiler.is_compiling():
        raise refuse(op, name, "a tensor with values", "a meta tensor", "Move it to a device first.")


def _check_subclass(op: str, name: str, value: torch.Tensor) -> None:
    """Raise ValueError for the subclasses that have no memory of their own."""
    kind = type(value).__name__
    if kind == "FakeTensor":
        step = "Call it with real tensors, or inside torch.compile, which knows the shapes of its results."
    elif kind == "DTensor":
        step = f"Pass {name}.to_local() inside a model's forward, or use tokfuse.distributed for a sharded vocabulary."
    elif is_traceable_wrapper_subclass(value):
        step = "Convert it first."
    else:
        return
    raise refuse(op, name, "a plain tensor", f"a {kind}", step)


def _refuse_form(op: str, name: str, value: torch.Tensor) -> ValueError:
    """Return the error for a tensor whose memory is not an array of its values."""
    if value.is_nested:
        return refuse(op, name, "a dense tensor", "a nested tensor", f"Pack its rows: torch.cat({name}.unbind()).")
    return refuse(op, name, "a dense tensor", f"layout {value.layout}", f"Call {name}.to_dense().")


def _check_tangent(op: str, name: str, value: torch.Tensor) -> None:
    """Raise ValueError for a dual tensor of forward-mode differentiation. The reference can be differentiated by it."""
    if forward_ad.unpack_dual(value).tangent is not None and forced_backend() != "reference":
        raise refuse(
            op,
            name,
            "a tensor without a tangent (the kernels have no forward-mode derivative)",
            "a dual tensor of torch.autograd.forward_ad",
            'Use torch.autograd.grad, or tokfuse.backend("reference").',
        )


def _check_transform(op: str, name: str, value: torch.Tensor) -> None:
    """Raise ValueError for a tensor of torch.func. The reference can be differentiated by torch.func.grad."""
    if is_gradtrackingtensor(value) and forced_backend() == "reference":
        return
    transform = "torch.func.grad" if is_gradtrackingtensor(value) else "torch.func.vmap"
    raise refuse(
        op,
        name,
        "a plain tensor (the kernels do not run under transforms of torch.func)",
        f"a tensor of {transform}",
        "Use torch.autograd.grad, and pack a batch into (tokens, ...) in place of vmap.",
    )


def is_integer(value: object) -> bool:
    """Return whether `value` is an integer of Python or numpy. A bool is one, too."""
    # numbers.Integral is tested last because torch.compile does not trace into it.
    return isinstance(value, int) or isinstance(value, numbers.Integral)


def number(value: Any) -> Any:
    """Return a real number of numpy or `fractions` as a float, and everything else unchanged."""
    if value is None or isinstance(value, int | float | torch.Tensor) or not isinstance(value, numbers.Real):
        return value
    return float(value)


def check_dtype(op: str, name: str, value: torch.Tensor, dtypes: frozenset[torch.dtype]) -> None:
    """Raise ValueError unless the dtype of `value` is one of `dtypes`."""
    if value.dtype not in dtypes:
        raise refuse(
            op,
            name,
            f"of dtype {names_of(dtypes)}",
            str(value.dtype).removeprefix("torch."),
            f"Call {name}.{_CONVERSION.get(dtypes, 'float')}().",
        )


def names_of(dtypes: Iterable[torch.dtype]) -> str:
    """Return the names of `dtypes` in one string."""
    return " or ".join(sorted(str(d).removeprefix("torch.") for d in dtypes))


def check_device(op: str, name: str, x: torch.Tensor, device: torch.device) -> None:
    """Raise ValueError unless `x` is on `device`, the device of the op's main input."""
    if x.device != device:
        raise refuse(op, name, f"on {device}, like the main input", str(x.device), f"Call {name}.to({str(device)!r}).")


def check_constant(op: str, name: str, x: torch.Tensor) -> None:
    """Raise ValueError if `x` requires a gradient: the op does not differentiate it."""
    if x.requires_grad and torch.is_grad_enabled():
        raise refuse(
            op, name, "detached (the op does not differentiate it)", "requires_grad=True", f"Call {name}.detach()."
        )


def check_matrix(op: str, name: str, x: torch.Tensor, axes: str) -> None:
    """Raise an error unless `x` is a two-dimensional floating-point tensor of a supported dtype."""
    require_tensor(op, name, x)
    if x.dim() != 2:
        raise refuse(
            op,
            name,
            f"two-dimensional {axes}",
            f"shape {tuple(x.shape)}",
            f"Call {name}.reshape(-1, {name}.shape[-1]).",
        )
    check_dtype(op, name, x, FLOATS)
    check_main(op, name, x)


class Rows(NamedTuple):
    """The size and the device that a vector must have.

    Args:
        size: number of elements.
        partner: the input that has this size, named in error messages.
        device: device of the op's main input.
    """

    size: int
    partner: str
    device: torch.device


def check_vector(
    op: str, name: str, value: object, rows: Rows | None = None, dtypes: frozenset[torch.dtype] = FLOATS
) -> torch.Tensor:
    """Return `value`. Raise an error unless it is a 1-D tensor of one of `dtypes` that matches `rows`."""
    x = require_tensor(op, name, value)
    if x.dim() != 1 or (rows is not None and x.shape[0] != rows.size):
        want = "a 1-D tensor"
        if rows is not None:
            want = f"of shape ({rows.size},) to match {rows.partner}"
        raise refuse(op, name, want, f"shape {tuple(x.shape)}", "Pass the packed vector, without padding.")
    check_dtype(op, name, x, dtypes)
    if rows is None:
        check_main(op, name, x)
    else:
        check_device(op, name, x, rows.device)
    return x


def check_optional(
    op: str, name: str, value: object, rows: Rows | None = None, dtypes: frozenset[torch.dtype] = FLOATS
) -> None:
    """Call `check_vector` unless the value is None."""
    if value is not None:
        check_vector(op, name, value, rows, dtypes)


def check_constant_vector(op: str, name: str, value: object, rows: Rows) -> None:
    """Raise an error unless `value` is a floating-point vector that matches `rows` and requires no gradient."""
    check_constant(op, name, check_vector(op, name, value, rows))


def check_cu_seqlens(op: str, value: object, num_tokens: int, device: torch.device, name: str = "cu_seqlens") -> int:
    """Return the number of sequences. Raise an error unless `value` is a valid `cu_seqlens`.

    It must be (seqs + 1,) int32, start at 0, never decrease, and end at `num_tokens`.
    """
    cu_seqlens = check_vector(op, name, value, dtypes=INT32)
    check_device(op, name, cu_seqlens, device)
    num_seqs = cu_seqlens.shape[0] - 1
    if num_seqs < 0:
        raise refuse(op, name, "of shape (num_seqs + 1,)", "shape (0,)", "Pass [0] for zero sequences.")
    if not may_read(cu_seqlens) or _borders_ok(cu_seqlens, num_seqs, num_tokens):
        return num_seqs
    if int(cu_seqlens[0]) != 0:
        raise refuse(op, name, "a prefix sum that starts at 0", int(cu_seqlens[0]), "Prepend 0.")
    if int(cu_seqlens[-1]) != num_tokens:
        want = f"a prefix sum that ends at num_tokens = {num_tokens}"
        raise refuse(op, name, want, int(cu_seqlens[-1]), "Pass the offsets of exactly these tokens.")
    if num_seqs > 0 and bool((cu_seqlens[1:] < cu_seqlens[:-1]).any()):
        place = int((cu_seqlens[1:] < cu_seqlens[:-1]).to(torch.uint8).argmax())
        actual = f"{int(cu_seqlens[place])} then {int(cu_seqlens[place + 1])} at {place}"
        raise refuse(op, name, "non-decreasing", actual, "Sequence lengths cannot be negative.")
    return num_seqs


def _borders_ok(cu_seqlens: torch.Tensor, num_seqs: int, num_tokens: int) -> bool:
    """Run the same test in one native call. For a small batch the five torch ops cost more than the scan."""
    module = native.module()
    if module is None or cu_seqlens.device.type != "cpu" or not cu_seqlens.is_contiguous():
        return False
    return bool(module.cu_seqlens_ok(cu_seqlens=cu_seqlens, seqs=num_seqs, tokens=num_tokens))


# ----------------------------------------------------------------------------------------- options


def check_choice(op: str, name: str, value: object, known: Iterable[str]) -> None:
    """Raise ValueError unless `value` is one of the known names. The message lists them."""
    known = tuple(known)
    if value not in known:
        raise refuse(op, name, f"one of {', '.join(known)}", repr(value), "Choose a listed name.")


def check_flag(op: str, name: str, value: object) -> None:
    """Raise TypeError unless `value` is a bool. Other objects have a truth value too: "no" is true."""
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be True or False; got {value!r}. Pass a bool.")


def check_number(
    op: str,
    name: str,
    value: object,
    low: float,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
) -> float:
    """Return `value` as a float. Raise an error unless it is finite and in [low, high].

    With `open_low` the range is (low, high], with `open_high` [low, high). Numbers of numpy are accepted. A bool is
    not a number.
    """
    # numbers.Real admits numpy's numbers. It is tested last because torch.compile does not trace into it.
    real = isinstance(value, int | float) or isinstance(value, numbers.Real)
    if isinstance(value, bool) or not real:
        raise TypeError(f"{op}: {name} must be a number; got {value!r}. Pass an int or a float.")
    number = float(value)  # type: ignore[arg-type]
    # Not math.isfinite: torch.compile can trace a comparison of a symbolic number, but not that function.
    finite = -math.inf < number < math.inf
    above = number > low if open_low else number >= low
    below = number < high if open_high else number <= high
    if not (finite and above and below):
        want = f"a finite number in {_interval(low, high, open_low, open_high)}"
        raise refuse(op, name, want, value, "Check its unit and sign.")
    return number


def check_integer(op: str, name: str, value: object, low: int, high: int | None = None) -> int:
    """Return `value` as an int. Raise an error unless it is an integer in [low, high]. None: no upper end.

    Integers of numpy are accepted. A bool or a float is not an integer, even if its value is whole.
    """
    whole = isinstance(value, int) or isinstance(value, numbers.Integral)
    if isinstance(value, bool) or not whole:
        raise TypeError(f"{op}: {name} must be an integer; got {value!r}. Pass an int.")
    number: int = int(value)  # type: ignore[call-overload]
    if number < low or (high is not None and number > high):
        want = f"an integer >= {low}" if high is None else f"an integer in [{low}, {high}]"
        raise refuse(op, name, want, value, "Check what it counts.")
    return number


def check_values(
    op: str,
    name: str,
    x: torch.Tensor,
    low: float = -math.inf,
    high: float = math.inf,
    *,
    open_low: bool = False,
    open_high: bool = False,
    where: torch.Tensor | None = None,
    always: bool = False,
) -> None:
    """Raise ValueError unless every element of `x` is finite and in the range, like `check_number`.

    Args:
        op: name of the op in the message.
        name: name of the argument in the message.
        x: the tensor.
        low: lower end of the range.
        high: upper end of the range.
        open_low: exclude `low`.
        open_high: exclude `high`.
        where: bool, same shape; elements that are False here are not checked. None: all are checked.
        always: also read a tensor on a GPU. Selectors and estimators do so: the caller reads their result anyway, and
            a NaN would come first in every ranking. False: as `may_read` says.
    """
    if not (always or may_read(x)):
        return
    above = x > low if open_low else x >= low
    below = x < high if open_high else x <= high
    bad = ~(x.isfinite() & above & below)
    if where is not None:
        bad = bad & where
    if bool(bad.any()):
        place = int(bad.flatten().to(torch.uint8).argmax())
        index = [int(i) for i in torch.unravel_index(torch.tensor(place, device="cpu"), x.shape)]
        actual = f"{x.flatten()[place].item()} at {index[0] if len(index) == 1 else index}"
        kind = "finite and " if x.dtype.is_floating_point else ""
        want = f"{kind}in {_interval(low, high, open_low, open_high)} in every element"
        raise refuse(op, name, want, actual, "Correct this element, or leave its sample out.")


def _interval(low: float, high: float, open_low: bool, open_high: bool) -> str:
    left = "(" if open_low or low == -math.inf else "["
    right = ")" if open_high or high == math.inf else "]"
    return f"{left}{low:g}, {high:g}{right}"


def check_positive(op: str, name: str, value: object) -> None:
    """Raise an error unless `value` is a finite number above zero."""
    check_number(op, name, value, 0.0, open_low=True)


FLOAT32_MIN, FLOAT32_MAX = 2.0**-126, 2.0**126
"""The numbers that are normal in float32 together with their inverse."""


def check_divisor(op: str, name: str, value: object) -> None:
    """Raise an error unless `value` is a number above zero that the kernels can divide by in float32."""
    check_positive(op, name, value)
    check_number(op, name, value, FLOAT32_MIN, FLOAT32_MAX)


def check_normalizer(op: str, value: object) -> None:
    """Raise an error unless `value` is None, or a finite number > 0, or a tensor with one such number."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise refuse(op, "normalizer", "a 0-dim tensor", f"shape {tuple(value.shape)}", "Pass one global count.")
        check_dtype(op, "normalizer", value, FLOATS | INTS)
        check_values(op, "normalizer", value, 0.0, open_low=True)
    elif value is not None:
        check_number(op, "normalizer", value, 0.0, open_low=True)


def check_given(op: str, needed_by: str, **options: object) -> None:
    """Raise ValueError if one of these options is None: `needed_by` needs it."""
    for name, value in options.items():
        if value is None:
            raise refuse(op, name, f"given with {needed_by}", "None", f"Pass it, or leave out {needed_by}")


def check_unused(op: str, used_by: str, **options: object) -> None:
    """Raise ValueError if one of these options is not None: `used_by` would ignore it."""
    for name, value in options.items():
        if value is not None:
            actual = "a tensor" if isinstance(value, torch.Tensor) else repr(value)
            raise refuse(op, name, f"left out with {used_by}", actual, "Remove it: it would have no effect.")


# ------------------------------------------------------------------------------------- conversions


def working_dtype(*tensors: torch.Tensor | None) -> torch.dtype:
    """Return float64 if one of the inputs is float64, else float32."""
    for x in tensors:
        if x is not None and x.dtype == torch.float64:
            return torch.float64
    return torch.float32


def head_dtype(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.dtype:
    """Return the dtype in which an lm_head is computed: the wider of hidden and weight, float64 for a float64 bias.

    Neither of bfloat16 and float16 contains the other; together they are computed in float32.
    """
    if bias is not None and bias.dtype == torch.float64:
        return torch.float64
    return torch.promote_types(hidden.dtype, weight.dtype)


def plain(tensor: torch.Tensor | None, dtype: torch.dtype | None = None) -> torch.Tensor | None:
    """Return the tensor detached, contiguous and, if `dtype` is given, converted.

    A tensor that already has these properties is returned as is.
    """
    if tensor is None:
        return None
    if tensor.requires_grad:
        tensor = tensor.detach()
    if dtype is not None and tensor.dtype != dtype:
        tensor = tensor.to(dtype)
    return tensor.contiguous()
