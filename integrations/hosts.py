"""Shared by all adapters: the tested versions of a host, and attributes that can be replaced and restored."""

import functools
import importlib.metadata
import inspect
import re
import threading
import warnings
from dataclasses import dataclass
from typing import Any

import torch

from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.core.errors import BackendUnavailable, refuse
from tokfuse.runtime.core.forced import forced_backend

Version = tuple[int, int]


@dataclass(frozen=True)
class Host:
    """A library that an adapter plugs into.

    Args:
        name: name of its distribution.
        low: first (major, minor) version that works. An older one is known to break and raises an error.
        high: last (major, minor) version that was tested. A newer one works with a warning.
    """

    name: str
    low: Version
    high: Version

    @property
    def installed(self) -> str | None:
        """The version that is installed, or None."""
        try:
            return importlib.metadata.version(self.name)
        except importlib.metadata.PackageNotFoundError:
            return None

    @property
    def tested(self) -> str:
        """The range of tested versions, for messages."""
        low, high = (".".join(map(str, v)) for v in (self.low, self.high))
        return f"{low}.*" if low == high else f"{low} to {high}"

    def require(self, op: str) -> str:
        """Return the installed version. Raise an error if it is too old; warn once if it was not tested."""
        version = self.installed
        next_step = f"Install {self.name} {self.tested}."
        if version is None:
            raise refuse(op, self.name, "installed", "nothing", next_step)
        found = re.match(r"(\d+)\.(\d+)", version)
        if found is None or (int(found[1]), int(found[2])) < self.low:
            raise refuse(op, self.name, f"{self.tested} (the adapter uses its internals)", version, next_step)
        if (int(found[1]), int(found[2])) > self.high:
            _warn_untested(f"tokfuse was tested with {self.name} {self.tested}; version {version} is installed.")
        return version


@functools.cache
def _warn_untested(message: str) -> None:
    warnings.warn(message, stacklevel=4)


class Rebinding:
    """Attributes of a host that are replaced together and restored together."""

    def __init__(self, op: str) -> None:
        self._op = op
        self.lock = threading.Lock()  # two threads that install at once would save each other's replacements
        self._saved: list[tuple[object, str, object, object, bool]] = []

    @property
    def active(self) -> bool:
        """Whether attributes are replaced, between the first `set` and `restore`."""
        return bool(self._saved)

    def set(self, owner: object, name: str, value: object) -> None:
        """Set owner.name = value and remember the old value. Raise an error if there is no such attribute.

        The static value is kept, so that a staticmethod of a class is restored as one.
        """
        before, inherited = inspect.getattr_static(owner, name), name not in vars(owner)
        setattr(owner, name, value)
        self._saved.append((owner, name, before, value, inherited))

    def restore(self) -> None:
        """Restore every attribute. Raise an error, and restore none, if another patch replaced one later."""
        for owner, name, _, ours, _ in self._saved:
            if inspect.getattr_static(owner, name) is not ours:
                raise refuse(
                    self._op,
                    f"{_label(owner)}.{name}",
                    "the one that tokfuse installed",
                    repr(getattr(owner, name)),
                    "Undo the later patch first.",
                )
        while self._saved:
            owner, name, before, _, inherited = self._saved.pop()
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, before)


def _label(owner: object) -> str:
    return str(getattr(owner, "__name__", type(owner).__name__))


def defined_in(function: Any) -> str:
    """Return the name of the module whose code a function runs, unlike `__module__` also for a wrapper."""
    function = getattr(function, "__func__", function)
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def runs_on(op: str, device: str, dtype: torch.dtype) -> str:
    """Return the backend that `op` uses for a tensor on this device, or why there is none."""
    try:
        return select(op, device, dtype, frozenset()).backend
    except BackendUnavailable as error:
        return f"unavailable ({error})"


def has_kernels(op: str, device: str, dtype: torch.dtype) -> bool:
    """Return whether tokfuse runs `op` on kernels there, or the caller forces a backend.

    The reference computes all logits in float64. An adapter that would call it leaves the host's own code in place.
    """
    if device == "meta" or forced_backend() is not None:
        return device != "meta"
    return select(op, device, dtype).backend != "reference"


@functools.cache
def tell_unchanged(host: str, device: str, dtype: torch.dtype) -> None:
    """Warn once that the host's own code runs for tensors of this device and dtype."""
    name = str(dtype).removeprefix("torch.")
    warnings.warn(f"tokfuse has no kernels for {name} on {device}: {host}'s own code runs there.", stacklevel=4)


def on_kernels(host: str, op: str, x: torch.Tensor) -> bool:
    """Return whether tokfuse runs `op` on kernels for this tensor. If not, warn once that the host's own code runs."""
    found = has_kernels(op, x.device.type, x.dtype)
    if not found:
        tell_unchanged(host, x.device.type, x.dtype)
    return found


def devices() -> list[str]:
    """Return the types of this machine's devices: cpu and, if there is one, the accelerator (cuda, xpu, npu, ...)."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return ["cpu", *([] if accelerator is None else [accelerator.type])]


def where(op: str) -> str:
    """Return `op (cpu: cpu, cuda: triton, xpu: unchanged)`: the backend for bfloat16 on each device of this machine.

    "unchanged" means that tokfuse has no kernels for the device, and that the adapter leaves the host's code in place.
    """
    kernels = {device: has_kernels(op, device, torch.bfloat16) for device in devices()}
    rows = [
        f"{device}: {runs_on(op, device, torch.bfloat16) if found else 'unchanged'}"
        for device, found in kernels.items()
    ]
    return f"{op} ({', '.join(rows)})"
