"""Test the launchers of the CUDA kernels on pretended devices: which code runs, and the limits of a launch.

The runtime of tests/cuda_host pretends a device (TOKFUSE_HOST_ARCH) and the architectures that the kernels were
built for (TOKFUSE_HOST_CODE), writes launches to a file (TOKFUSE_HOST_LOG), and can check launches without running
them (TOKFUSE_HOST_DRY).
"""

from pathlib import Path
from typing import NamedTuple

import cuda_rows
import pytest
import torch
from harness import compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL, truth

from tokfuse import Objective
from tokfuse.runtime.backends import cuda_backend

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST")]

ALL = "80,90,100,120"
KIB = 1024


class Launch(NamedTuple):
    """One line of the log of launches."""

    grid: int
    threads: int
    cluster: int
    shared: int
    kernel: str

    @property
    def in_cluster(self) -> bool:
        """True for policy_step_cluster_kernel, the only one with this argument."""
        return "ClusterLayout" in self.kernel


class Log:
    """The launches since the last call of `take`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def take(self) -> list[Launch]:
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.path.write_text("")
        parts = (line.split(" ", 4) for line in lines)
        return [Launch(*map(int, part[:4]), part[4]) for part in parts]


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Log:
    monkeypatch.setenv("TOKFUSE_HOST_LOG", str(tmp_path / "launches"))
    return Log(tmp_path / "launches")


def step(rows: int, vocab: int, dtype: torch.dtype = torch.bfloat16, softcap: float | None = None):
    """Run policy_step on empty arrays, whose values do not matter; the pages are never touched in a dry run."""
    nan = torch.zeros(rows)
    inputs = {"old_logp": nan, "advantage": nan}
    logits = torch.empty(rows, vocab, dtype=dtype)
    target = torch.zeros(rows, dtype=torch.long)
    cuda_rows.policy_step(logits, target, Objective(), inputs, 1.0, torch.empty_like(logits), softcap=softcap)


def check_step(rows: int, vocab: int, dtype: torch.dtype) -> None:
    """Run policy_step and compare statistics and gradient with float64."""
    gen = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(rows, vocab, generator=gen) * 3).to(dtype)
    target = torch.randint(0, vocab, (rows,), generator=gen)
    inputs = {"old_logp": torch.full((rows,), -9.0), "advantage": torch.linspace(-1.0, 1.5, rows)}
    stats, results, grad = cuda_rows.policy_step(logits, target, Objective(entropy_coef=0.01), inputs)
    expected = truth(logits, target, results["d_logp"], results["d_entropy"])
    for name, got in zip(("logp", "entropy", "lse"), stats, strict=False):
        compare(got, getattr(expected, name), atol=FORWARD_ATOL, what=name)
    rounding = 0.0 if dtype == torch.float32 else half_ulp(expected.grad, dtype)
    compare(grad, expected.grad, atol=GRADIENT_RTOL * expected.term + rounding, what="gradient")


# ------------------------------------------------------------------------------ the code that runs

# Device, architectures of the build -> whether the kernel that keeps rows in shared memory runs.
DEVICES = {
    "8.0": ("80", ALL, False),
    "8.9": ("89", ALL, False),
    "9.0": ("90", ALL, True),
    "10.0": ("100", ALL, True),
    "10.3": ("103", ALL, True),
    "11.0": ("110", ALL, False),  # compiles the PTX of sm_80
    "12.0": ("120", ALL, False),  # a block has 99 KiB of shared memory
    "9.0_built_for_it_only": ("90", "90a", True),
    "9.0_built_for_80": ("90", "80", False),
    "10.0_built_by_an_old_nvcc": ("100", "80,90a", False),
    "10.0_built_for_it_only": ("100", "100a", True),
    "10.3_without_its_code": ("103", "80,90a,100a", False),
    "12.0_without_its_code": ("120", "80,90", False),
}


@pytest.mark.parametrize(("device", "built", "in_cluster"), DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_each_device_runs_a_kernel_that_its_code_has(
    device: str, built: str, in_cluster: bool, dtype: torch.dtype, log: Log, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", device)
    monkeypatch.setenv("TOKFUSE_HOST_CODE", built)
    check_step(5, 2064, dtype)
    assert [launch.in_cluster for launch in log.take()] == [in_cluster]


def test_a_build_without_code_for_the_device_is_an_error(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", "80")
    monkeypatch.setenv("TOKFUSE_HOST_CODE", "90,100")
    with pytest.raises(RuntimeError, match="policy_step: .*cudaErrorNoKernelImageForDevice"):
        step(2, 64)
