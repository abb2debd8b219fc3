"""Read power, energy, clocks, throttling and memory from the NVIDIA driver during some work.

A thread samples through nvidia-ml-py (module pynvml). Energy is the difference of the driver's energy
counter if the GPU has one; power is not integrated. Without a driver, package or reading, the result is
None with a status that states the reason, never zero. The readings are for the whole GPU, including
other processes.
"""

import importlib
import os
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

INTERVAL_S = 0.02

# NVML's names of the reasons for lowered clocks. Idle is not a reason.
THROTTLE_REASONS = {
    "power cap": "nvmlClocksThrottleReasonSwPowerCap",
    "hardware slowdown": "nvmlClocksThrottleReasonHwSlowdown",
    "thermal (software)": "nvmlClocksThrottleReasonSwThermalSlowdown",
    "thermal (hardware)": "nvmlClocksThrottleReasonHwThermalSlowdown",
    "power brake": "nvmlClocksThrottleReasonHwPowerBrakeSlowdown",
    "clocks set by an application": "nvmlClocksThrottleReasonApplicationsClocksSetting",
}


@dataclass
class Telemetry:
    """Readings of one period; None means "not read".

    Args:
        status: "nvml", or "unavailable: " and the reason.
        calls: number of calls of the work; the caller fills it in.
        samples: number of samples.
        seconds: length of the period.
        energy_mj: millijoules that the GPU used, from its energy counter.
        power_w: mean of the sampled power draw, watts; power_limit_w: the enforced limit.
        sm_clock_mhz, memory_clock_mhz: lowest sampled clocks.
        temperature_c: highest sampled temperature.
        memory_used_bytes: largest sampled memory use of the GPU, including other processes.
        throttle: all reasons that were seen, as in `THROTTLE_REASONS`.
        name, uuid, driver: the GPU and its driver.
    """

    status: str
    calls: int = 0
    samples: int = 0
    seconds: float = 0.0
    energy_mj: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    sm_clock_mhz: int | None = None
    memory_clock_mhz: int | None = None
    temperature_c: int | None = None
    memory_used_bytes: int | None = None
    throttle: tuple[str, ...] = ()
    name: str = ""
    uuid: str = ""
    driver: str = ""

    @property
    def energy_per_call_mj(self) -> float | None:
        """Millijoules per call; None if the energy is not known."""
        return None if self.energy_mj is None or self.calls < 1 else self.energy_mj / self.calls


@dataclass
class _Seen:
    """The values that the thread collects."""

    power_w: list[float] = field(default_factory=list)
    sm_clock_mhz: list[int] = field(default_factory=list)
    memory_clock_mhz: list[int] = field(default_factory=list)
    temperature_c: list[int] = field(default_factory=list)
    memory_used_bytes: list[int] = field(default_factory=list)
    throttle: set[str] = field(default_factory=set)
    samples: int = 0


class Sampler:
    """Sampler of the GPU: `with Sampler(0) as sampler: work()`, then `sampler.result`.

    Args:
        device: index of a CUDA device in torch's numbering; `CUDA_VISIBLE_DEVICES` is applied.
        interval_s: seconds between two samples.
        nvml: the module to ask; None imports pynvml.
    """

    def __init__(self, device: int = 0, interval_s: float = INTERVAL_S, nvml: Any | None = None) -> None:
        self.result = Telemetry("unavailable: not started")
        self._device, self._interval_s, self._nvml = device, interval_s, nvml
        self._handle: Any = None
        self._seen = _Seen()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._start_s = 0.0
        self._start_mj: float | None = None

    @property
    def is_reading(self) -> bool:
        """True inside the `with` block if the driver answers."""
        return self._thread is not None and not self._stop.is_set()

    def __enter__(self) -> "Sampler":
        try:
            self._open()
        except Exception as error:  # the package, the driver or the device is missing
            self.result = Telemetry(f"unavailable: {type(error).__name__}: {error}"[:200])
            return self
        self._start_s, self._start_mj = time.perf_counter(), self._energy()
        self._sample()  # so that a period shorter than the interval has one reading
        self._thread = threading.Thread(target=self._loop, name="tokfuse-telemetry", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._thread is None:
            return
        self._stop.set()
        self._thread.join()
        self._sample()
        self.result = self._summary(time.perf_counter() - self._start_s)
        self._nvml.nvmlShutdown()

    def _open(self) -> None:
        if self._nvml is None:
            self._nvml = importlib.import_module("pynvml")
        self._nvml.nvmlInit()
        self._handle = handle_of(self._nvml, self._device)

    def _loop(self) -> None:
        while not self._stop.wait(self._interval_s):
            self._sample()

    def _read(self, name: str, *args: Any) -> Any | None:
        """Return one reading; None if this GPU or driver does not have it."""
        try:
            return getattr(self._nvml, name)(self._handle, *args)
        except (self._nvml.NVMLError, AttributeError):
            return None

    def _energy(self) -> float | None:
        value = self._read("nvmlDeviceGetTotalEnergyConsumption")
        return None if value is None else float(value)

    def _sample(self) -> None:
        seen, nvml = self._seen, self._nvml
        seen.samples += 1
        readings: tuple[tuple[list[Any], Any], ...] = (
            (seen.power_w, _scaled(self._read("nvmlDeviceGetPowerUsage"), 1e-3)),
            (seen.sm_clock_mhz, self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_SM)),
            (seen.memory_clock_mhz, self._read("nvmlDeviceGetClockInfo", nvml.NVML_CLOCK_MEM)),
            (seen.temperature_c, self._read("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU)),
            (seen.memory_used_bytes, getattr(self._read("nvmlDeviceGetMemoryInfo"), "used", None)),
        )
        for kept, value in readings:
            if value is not None:
                kept.append(value)
        reasons = self._read("nvmlDeviceGetCurrentClocksThrottleReasons") or 0
        for text, constant in THROTTLE_REASONS.items():
            if reasons & getattr(nvml, constant, 0):
                seen.throttle.add(text)

    def _summary(self, seconds: float) -> Telemetry:
        seen, end_mj = self._seen, self._energy()
        known = end_mj is not None and self._start_mj is not None
        return Telemetry(
            "nvml",
            samples=seen.samples,
            seconds=seconds,
            energy_mj=(end_mj or 0.0) - (self._start_mj or 0.0) if known else None,
            power_w=sum(seen.power_w) / len(seen.power_w) if seen.power_w else None,
            power_limit_w=_scaled(self._read("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            sm_clock_mhz=min(seen.sm_clock_mhz, default=None),
            memory_clock_mhz=min(seen.memory_clock_mhz, default=None),
            temperature_c=max(seen.temperature_c, default=None),
            memory_used_bytes=max(seen.memory_used_bytes, default=None),
            throttle=tuple(sorted(seen.throttle)),
            name=_text(self._read("nvmlDeviceGetName")),
            uuid=_text(self._read("nvmlDeviceGetUUID")),
            driver=_text(self._nvml.nvmlSystemGetDriverVersion()),
        )


def describe(device: int = 0, nvml: Any | None = None) -> Telemetry:
    """Return one reading of an idle GPU: its name, driver, limits and clocks."""
    with Sampler(device, nvml=nvml) as sampler:
        pass
    return sampler.result


def handle_of(nvml: Any, device: int) -> Any:
    """Return NVML's handle of the CUDA device `device`. NVML's numbering ignores CUDA_VISIBLE_DEVICES.

    An entry of `CUDA_VISIBLE_DEVICES` is a UUID (or a prefix of one, or a MIG UUID), which NVML accepts, or an
    index in PCI order, as with `CUDA_DEVICE_ORDER=PCI_BUS_ID`. CUDA's default order is fastest first. It can
    differ from PCI order if a machine has different GPUs.

    Raises:
        ValueError: the variable hides this device.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return nvml.nvmlDeviceGetHandleByIndex(device)
    entries = [entry.strip() for entry in visible.split(",") if entry.strip()]
    if device >= len(entries):
        raise ValueError(f"CUDA_VISIBLE_DEVICES={visible} hides device {device}")
    entry = entries[device]
    if entry.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(entry))
    if entry.startswith("MIG-"):
        return nvml.nvmlDeviceGetHandleByUUID(entry)
    for index in range(nvml.nvmlDeviceGetCount()):  # NVML needs whole UUIDs; CUDA accepts a prefix
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        if _text(nvml.nvmlDeviceGetUUID(handle)).startswith(entry):
            return handle
    raise ValueError(f"CUDA_VISIBLE_DEVICES names {entry}, which is not a GPU of this machine")


def _scaled(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor


def _text(value: Any) -> str:
    """Decode a text, because older bindings return bytes."""
    return value.decode() if isinstance(value, bytes) else str(value or "")
