"""Helpers for the tests of every op: the backends to test, and the comparison of two tensors."""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

from tokfuse.inspection import doctor
from tokfuse.runtime.backends import cuda_backend, triton_backend
from tokfuse.runtime.core import dispatch, native

doctor.import_ops()  # the import registers the implementations

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# The reference computes in float64, so its only error is one rounding to float32.
ROUNDED_ONCE = {"rtol": 2.0**-24, "atol": 1e-12}


class Backend(NamedTuple):
    """One implementation of an op, and the device of its tensors."""

    name: str
    device: str

    @contextmanager
    def forced(self) -> Iterator[None]:
        """Run every op inside on this backend, or raise an error."""
        with dispatch.backend(self.name):
            yield

    def put(self, value: Any) -> Any:
        """Move a tensor to the device of the backend. Other values are returned unchanged."""
        return _moved(value, self.device)


def backends(op: str, without: str = "", interpreted: bool = True, hosted: bool = True) -> list[Any]:
    """Return pytest parameters from the capability records of `op`. A skip names the missing part.

    Parameters on a GPU have the mark `gpu`, and parameters of Triton's interpreter have `interpreter`. Without
    `interpreted` the interpreter is left out: it needs 0.2 ms per operation, and test_triton_* contains small
    cases. CUDA kernels on the CPU have the mark `cuda_host`, and are left out without `hosted`.
    """
    out = []
    known = [row for row in dispatch.table() if row["op"] == op]
    assert known, f"no implementation of {op} is registered: import its module first"
    for row in known:
        if not row["built"] or row["backend"] == without:
            continue
        if row["backend"] == "triton" and triton_backend.interpreting() and not interpreted:
            continue
        if row["backend"] == "cuda" and cuda_backend.hosted() and not hosted:
            continue
        devices = row["devices"]
        device = "cpu" if {"cpu", "*"} & set(devices) else "cuda"
        missing = row["why"]
        if not missing and device == "cuda" and not torch.cuda.is_available():
            missing = "needs a CUDA device"
        marks = [pytest.mark.skip(reason=f"{row['backend']}: {missing}")] if missing else []
        if device == "cuda":
            marks.append(pytest.mark.gpu)
        elif row["backend"] == "cuda":
            marks.append(pytest.mark.cuda_host)
        elif row["backend"] == "triton":
            marks.append(pytest.mark.interpreter)
            # numpy warns about log2(0) and 1 / 0; a GPU does not.
            marks.append(pytest.mark.filterwarnings("ignore::RuntimeWarning"))
        backend = Backend(row["backend"], device)
        out.append(pytest.param(backend, id=row["backend"], marks=marks))
    return out


def crossed(op: str, cases: Mapping[str, tuple[Any, ...]], interpreted: Collection[str]) -> list[Any]:
    """Return a pytest parameter for each pair of case and backend: the values of the case, then the `Backend`.

    Triton's interpreter runs only the cases that `interpreted` names.
    """
    return [
        pytest.param(*case, p.values[0], marks=p.marks, id=f"{p.id}-{name}")
        for p in backends(op)
        for name, case in cases.items()
        if name in interpreted or not (p.id == "triton" and triton_backend.interpreting())
    ]


def host_backends(op: str, without: str = "") -> list[Any]:
    """Return `backends` by name, for tests that keep their tensors on the CPU."""
    return [
        pytest.param(parameter.values[0].name, id=parameter.id, marks=parameter.marks)
        for parameter in backends(op, without)
        if parameter.values[0].device == "cpu"
    ]


def thread_counts() -> tuple[int, ...]:
    """Return the CPU thread counts for a call. Interpreted kernels use one thread, so they run twice."""
    interpreted = dispatch.forced_backend() == "triton" and triton_backend.interpreting()
    return (1, 2) if interpreted else (1, 2, 3)


def on_its_device(op: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap `op` for tests that create tensors on the CPU: arguments move to the device of the forced backend.

    Results are moved back to the CPU. Both moves are differentiable. Without a GPU nothing moves.
    """

    @functools.wraps(op)
    def call(*args: Any, **kwargs: Any) -> Any:
        forced = dispatch.forced_backend()
        cuda = (forced == "cuda" and not cuda_backend.hosted()) or (
            forced == "triton" and not triton_backend.interpreting()
        )
        device = "cuda" if cuda else "cpu"
        args = tuple(_moved(x, device) for x in args)
        # On a GPU, values of ids and borders are checked only on request.
        with mock.patch.dict(os.environ, {"TOKFUSE_CHECK": "1"} if cuda else {}):
            out = op(*args, **{name: _moved(x, device) for name, x in kwargs.items()})
        if not isinstance(out, tuple):
            return _moved(out, "cpu")
        fields = (_moved(x, "cpu") for x in out)
        return type(out)(*fields) if hasattr(out, "_fields") else tuple(fields)

    return call


def _moved(value: Any, device: str) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


def compare(
    actual: torch.Tensor,
    expected: torch.Tensor,
    *,
    atol: float | torch.Tensor = 0.0,
    rtol: float = 0.0,
    what: str = "value",
) -> None:
    """Check that NaN and infinity sets are equal, and |actual - expected| <= atol + rtol |expected| elsewhere.

    atol may be a tensor that broadcasts with expected, for example one bound per row.
    """
    actual, expected = actual.detach().cpu().double(), expected.detach().cpu().double()
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape} != {expected.shape}"
    finite = expected.isfinite()
    same = torch.equal(actual[~finite].nan_to_num(nan=0.5), expected[~finite].nan_to_num(nan=0.5))
    assert same, f"{what}: not finite where expected {expected[~finite]}; got {actual[~finite]}"
    bound = torch.as_tensor(atol, dtype=torch.float64) + rtol * expected.nan_to_num(0, 0, 0).abs()
    bound = bound * unvectorised_slack()
    error = (actual - expected).abs()
    wrong = finite & ~(error <= bound)
    if bool(wrong.any()):
        at = tuple(int(i) for i in wrong.nonzero()[0])
        limit = float(bound.expand(error.shape)[at])
        raise AssertionError(
            f"{what}: {int(wrong.sum())} of {wrong.numel()} beyond the bound; first at {at}: got "
            f"{float(actual[at])!r}, expected {float(expected[at])!r}, error {float(error[at]):.3g}"
            f" > {limit:.3g}"
        )


@functools.cache
def unvectorised_slack() -> float:
    """Return 4 for a sanitized build, which sums in one lane; other builds sum in 4 to 16 lanes."""
    module = native.module()
    return 4.0 if module is not None and module.sanitizers else 1.0


def half_ulp(expected: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return the largest error of one rounding of `expected` to `dtype`."""
    info = torch.finfo(dtype)
    magnitude = expected.double().abs()
    return torch.maximum(magnitude * info.eps / 2, torch.tensor(info.tiny * info.eps / 2))


def bits(x: torch.Tensor) -> list[int]:
    """Return the bit patterns of a tensor, so that NaN equals NaN and -0.0 differs from 0.0."""
    view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()]
    return x.detach().cpu().contiguous().view(view).flatten().tolist()


def assert_untouched(call: Callable[[], Any], tensors: dict[str, Any]) -> Any:
    """Run `call` and check that it changed no bit of its arguments. Return its result."""
    given = {k: v for k, v in tensors.items() if isinstance(v, torch.Tensor)}
    before = {k: (bits(v), v._version) for k, v in given.items()}
    out = call()
    for name, tensor in given.items():
        assert (bits(tensor), tensor._version) == before[name], f"{name} was written"
    return out
