"""Capability records and the selection of a backend.

A `Capability` declares one implementation of an op: its devices, dtypes and supported features. `select`
tries the backends in the order of `ORDER` and returns the first implementation whose record covers the
call. A forced backend (`with backend("cpu"):` or `TOKFUSE_BACKEND=cpu`) is never replaced by another. If
it cannot serve the call, `BackendUnavailable` lists every backend with its reason.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.errors import BackendUnavailable
from tokfuse.runtime.core.forced import FORCED
from tokfuse.runtime.core.forced import ORDER as ORDER
from tokfuse.runtime.core.forced import forced_backend as forced_backend
from tokfuse.runtime.core.logit_options import LogitOptions

FLOAT_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})
ALL_DTYPES = FLOAT_DTYPES | {torch.float64}
ALL_DEVICES = frozenset({"*"})


class RowState(NamedTuple):
    """The unit and the dtype of the row maxima that the forward of a kernel keeps for its backward.

    They are `row_max`, the sixth output of token_stats kernels, and the maxima in the state of
    paired_divergence: the largest exponent of a row, in the unit that the backward of the same kernels takes.
    A conversion to nats and back would lose bits. Only another rank needs the value in nats.
    """

    nats: Callable[[LogitOptions], float | torch.Tensor]
    """options -> nats per unit of a maximum, () or (tokens,)."""
    dtype: torch.dtype = torch.float32
    """Dtype of all outputs of the kernels."""


class Kernels(NamedTuple):
    """The `run` of an op over rows of logits whose backends bring their own backward."""

    forward: Callable[..., tuple[torch.Tensor, ...]]
    backward: Callable[..., torch.Tensor] | None
    """None if autograd differentiates `forward`."""
    state: RowState | None = None
    """Set for token_stats and paired_divergence."""


@dataclass(frozen=True)
class Capability:
    """The declaration of one implementation of one op.

    Args:
        op: public op name, e.g. "token_stats".
        backend: one of `ORDER`.
        run: the callable, or a record of callables. All backends of an op have the same form.
        devices: supported device types; {"*"} means any.
        dtypes: supported dtypes of the op's large input.
        features: names of the supported optional behaviours ("softcap", "bias_logits", ...).
        unusable: function that returns None if this machine can run it, else one sentence with the reason.
        built: function that tells whether the implementation is installed, even if this machine cannot run it.
        only_forced: True if only `backend(...)` or `TOKFUSE_BACKEND` selects it.
    """

    op: str
    backend: str
    run: Any
    devices: frozenset[str]
    dtypes: frozenset[torch.dtype]
    features: frozenset[str] = frozenset()
    unusable: Callable[[], str | None] = field(default=lambda: None)
    built: Callable[[], bool] = field(default=lambda: True)
    only_forced: bool = False

    def refusal(self, device: str, dtype: torch.dtype, features: frozenset[str]) -> str | None:
        """Return None if this record covers the call, else the reason in a few words."""
        # Tested before `unusable`, which may query a driver: a call with CPU tensors must not.
        if "*" not in self.devices and device not in self.devices:
            return f"runs on {'/'.join(sorted(self.devices))}, the tensors are on {device}"
        reason = self.unusable()
        if reason is not None:
            return reason
        if dtype not in self.dtypes:
            names = ", ".join(sorted(str(d).removeprefix("torch.") for d in self.dtypes))
            return f"takes {names}, the input is {str(dtype).removeprefix('torch.')}"
        missing = features - self.features
        if missing:
            return f"does not support {', '.join(sorted(missing))}"
        return None


_REGISTRY: dict[str, dict[str, Capability]] = {}
_CHOICES: dict[tuple[object, ...], Capability] = {}


def register(capability: Capability) -> None:
    """Add one record. An op has at most one implementation per backend."""
    rows = _REGISTRY.setdefault(capability.op, {})
    assert capability.backend in ORDER and capability.backend not in rows
    rows[capability.backend] = capability


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Force one backend inside a `with` block: `with tokfuse.backend("reference"): ...`.

    Args:
        name: one of "cuda", "triton", "cpu", "reference".

    Raises:
        ValueError: unknown name. If a known backend cannot serve a call, that call raises
            `BackendUnavailable` with the reason of every backend.
    """
    if name not in ORDER:
        raise ValueError(f"backend: name must be one of {', '.join(ORDER)}; got {name!r}. Choose a listed name.")
    token = FORCED.set(name)
    try:
        yield
    finally:
        FORCED.reset(token)


def select(op: str, device: str, dtype: torch.dtype, features: frozenset[str] = frozenset()) -> Capability:
    """Return the implementation that serves this call. The result is cached: a repeated call costs one lookup."""
    forced = forced_backend()
    key = (op, device, dtype, features, forced)
    choice = _CHOICES.get(key)
    if choice is None:
        choice = _CHOICES[key] = _choose(op, device, dtype, features, forced)
    return choice


# torch.compile calls `select` while it traces and stores the result as a constant, as with assume_constant_result.
select._dynamo_marked_constant = True  # type: ignore[attr-defined]


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def backend_of(op: str, device: str, dtype: torch.dtype, features: frozenset[str] = frozenset()) -> str:
    """Return the name of the backend that `select` chooses. Inside torch.compile it is a constant."""
    name: str = select(op, device, dtype, features).backend
    return name


def _choose(op: str, device: str, dtype: torch.dtype, features: frozenset[str], forced: str | None) -> Capability:
    rows = _REGISTRY[op]
    reasons = {}
    for name in ORDER:
        row = rows.get(name)
        reason = "not implemented" if row is None else row.refusal(device, dtype, features)
        if reason is None and row is not None:
            if forced == name or (forced is None and not row.only_forced):
                return row
            reason = f"usable, but {'another backend is forced' if forced else 'selected only if it is forced'}"
        reasons[name] = reason or ""
    listing = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    wanted = "no backend" if forced is None else f"the forced backend {forced!r}"
    verb = "can" if forced is None else "cannot"
    raise BackendUnavailable(f"{op}: {wanted} {verb} run this call ({listing}).")


def table() -> list[dict[str, object]]:
    """Return one row per op and backend: built, usable here, why not, devices, dtypes, features."""
    rows: list[dict[str, object]] = []
    for op in sorted(_REGISTRY):
        for name in ORDER:
            row = _REGISTRY[op].get(name)
            if row is None:
                rows.append(
                    {
                        "op": op,
                        "backend": name,
                        "built": False,
                        "usable": False,
                        "why": "not implemented",
                        "devices": [],
                        "dtypes": [],
                        "features": [],
                    }
                )
                continue
            why = row.unusable()
            rows.append(
                {
                    "op": op,
                    "backend": name,
                    "built": row.built(),
                    "usable": why is None,
                    "why": why or "",
                    "devices": sorted(row.devices),
                    "dtypes": sorted(str(d).removeprefix("torch.") for d in row.dtypes),
                    "features": sorted(row.features),
                }
            )
    return rows
