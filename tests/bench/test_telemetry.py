"""Test telemetry with a driver that replays recorded answers, and on a machine without a driver."""

import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from tokfuse.bench import runner, telemetry
from tokfuse.bench.measure import Provider
from tokfuse.bench.problem import Config, Problem
from tokfuse.bench.row import Row
from tokfuse.bench.telemetry import Sampler


class NVMLError(Exception):
    pass


class RecordedDriver:
    """pynvml with the answers of one driver. Every call of a series returns the next value."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
    nvmlClocksThrottleReasonSwPowerCap = 0x4
    nvmlClocksThrottleReasonHwSlowdown = 0x8
    UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2")

    def __init__(self, missing: tuple[str, ...] = ()) -> None:
        self.missing, self.is_open, self.asked = missing, False, ""
        self.series: dict[str, list[Any]] = {
            "nvmlDeviceGetTotalEnergyConsumption": [1000, 1700],
            "nvmlDeviceGetPowerUsage": [400_000, 600_000],
            "nvmlDeviceGetCurrentClocksThrottleReasons": [0x1, 0x4],
            "nvmlDeviceGetTemperature": [50, 61],
        }

    def nvmlInit(self) -> None:
        self.is_open = True

    def nvmlShutdown(self) -> None:
        self.is_open = False

    def nvmlSystemGetDriverVersion(self) -> bytes:
        return b"580.1"

    def nvmlDeviceGetCount(self) -> int:
        return len(self.UUIDS)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:
        self.asked = self.UUIDS[index]
        return self.asked

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        self.asked = uuid
        return uuid

    def nvmlDeviceGetUUID(self, handle: str) -> str:
        return handle

    def nvmlDeviceGetClockInfo(self, handle: str, kind: int) -> int:
        return {1: 1755, 2: 2619}[kind]

    def nvmlDeviceGetName(self, handle: str) -> str:
        return "NVIDIA H100"

    def nvmlDeviceGetMemoryInfo(self, handle: str) -> Any:
        return SimpleNamespace(used=3 << 30)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: str) -> int:
        return 700_000

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("nvmlDevice") and name in object.__getattribute__(self, "missing"):
            raise NVMLError("not supported")
        return object.__getattribute__(self, name)

    def __getattr__(self, name: str) -> Any:
        values = self.series[name] if name in self.series else None
        if values is None:
            raise AttributeError(name)
        return lambda handle, *rest: values.pop(0) if len(values) > 1 else values[0]


@pytest.fixture(autouse=True)
def every_gpu_visible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_what_the_driver_said_is_in_the_result() -> None:
    driver = RecordedDriver()
    with Sampler(nvml=driver, interval_s=60.0) as sampler:
        assert driver.is_open
    got = sampler.result
    assert not driver.is_open and got.status == "nvml" and got.samples == 2
    assert got.energy_mj == 700.0 and got.energy_per_call_mj is None
    got.calls = 7
    assert got.energy_per_call_mj == 100.0
    assert got.power_w == 500.0 and got.power_limit_w == 700.0
    assert (got.sm_clock_mhz, got.memory_clock_mhz, got.temperature_c) == (1755, 2619, 61)
    assert got.memory_used_bytes == 3 << 30 and got.throttle == ("power cap",)
    assert (got.name, got.uuid, got.driver) == ("NVIDIA H100", "GPU-aaaa-1", "580.1")


def test_the_thread_samples_while_work_is_done() -> None:
    with Sampler(nvml=RecordedDriver(), interval_s=0.001) as sampler:
        time.sleep(0.1)
    assert sampler.result.samples > 5 and sampler.result.seconds >= 0.1


def test_a_reading_that_the_gpu_lacks_is_none_and_not_zero() -> None:
    missing = (
        "nvmlDeviceGetTotalEnergyConsumption",
        "nvmlDeviceGetPowerUsage",
        "nvmlDeviceGetMemoryInfo",
        "nvmlDeviceGetClockInfo",
    )
    with Sampler(nvml=RecordedDriver(missing), interval_s=60.0) as sampler:
        pass
    got = sampler.result
    assert got.status == "nvml" and got.temperature_c == 61
    got.calls = 3
    assert got.energy_mj is None and got.energy_per_call_mj is None
    assert got.power_w is None and got.memory_used_bytes is None and got.sm_clock_mhz is None


def test_without_a_driver_it_is_unavailable() -> None:
    class NoDriver(RecordedDriver):
        def nvmlInit(self) -> None:
            raise NVMLError("NVML Shared Library Not Found")

    with Sampler(nvml=NoDriver()) as sampler:
        pass
    assert sampler.result.status == "unavailable: NVMLError: NVML Shared Library Not Found"
    assert sampler.result.power_w is None and sampler.result.energy_mj is None


def test_without_the_package_it_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(telemetry.importlib, "import_module", absent)
    with Sampler() as sampler:
        pass
    assert sampler.result.status.startswith("unavailable: ModuleNotFoundError: No module named")


@pytest.mark.parametrize(
    ("visible", "device", "uuid"),
    [
        ("1", 0, "GPU-bbbb-2"),
        ("1,0", 1, "GPU-aaaa-1"),
        ("GPU-bbbb", 0, "GPU-bbbb-2"),
        ("GPU-bbbb-2,GPU-aaaa-1", 1, "GPU-aaaa-1"),
        ("MIG-7", 0, "MIG-7"),
        (None, 1, "GPU-bbbb-2"),
    ],
)
def test_visible_devices_are_mapped(
    visible: str | None, device: int, uuid: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = RecordedDriver()
    assert telemetry.handle_of(driver, device) == uuid


@pytest.mark.parametrize(
    ("visible", "text"), [("0", "hides device 1"), ("", "hides device 1"), ("0,GPU-cc", "names GPU-cc, which is not")]
)
def test_a_hidden_device_is_unavailable(visible: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    with Sampler(1, nvml=RecordedDriver()) as sampler:
        pass
    assert sampler.result.status.startswith("unavailable: ValueError") and text in (sampler.result.status)


def test_an_error_in_the_work_is_passed_on_and_the_driver_closed() -> None:
    driver = RecordedDriver()
    with pytest.raises(KeyError), Sampler(nvml=driver):
        raise KeyError("work")
    assert not driver.is_open


def test_energy_is_of_one_call_and_of_the_gpu_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TELEMETRY_S", 0.01)
    entry = runner.Entry("tokfuse", "ours", Provider(lambda: {}, calls=5))
    settings = runner.Settings(1, {}, sampler=lambda: Sampler(nvml=RecordedDriver()))
    got = runner._telemetry(entry, settings)
    assert got.calls >= 5 and got.energy_per_call_mj == 700.0 / got.calls
    entry.telemetry = got
    problem = Problem(Config("token_stats", "forward", "all", "float32", 4, 16, device="cuda"), {}, {})
    readings = runner._readings(problem, entry)
    assert readings["throttle"] == "power cap" and readings["sm_clock_mhz"] == 1755
    problem.config = replace(problem.config, device="cpu")
    assert runner._readings(problem, entry) == {"telemetry": "unavailable: the tensors are on the CPU"}


@pytest.mark.parametrize("energy", [False, True])
def test_energy_is_read_unless_it_is_not_wanted(energy: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(runner, "_telemetry", lambda entry, settings: asked.append(entry.name))
    monkeypatch.setattr(runner, "interleave", lambda *_: ({"tokfuse": [1.0]}, {}))
    config = Config("token_stats", "forward", "all", "float32", 4, 16, device="cuda")
    problem = Problem(config, {"tokfuse": lambda: Provider(lambda: {})}, {}, cold=False)
    rows: list[Row] = []
    runner.run_problem(problem, runner.Settings(1, {}, compare=False, peak=False, energy=energy), rows.append)
    assert asked == (["tokfuse"] if energy else []) and rows[0].median_ms == 1.0
