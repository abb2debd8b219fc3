"""Test the launchers of the CUDA kernels on pretended devices: which code runs, and the limits of a launch.

The runtime of tests/cuda_host pretends a device (TOKFUSE_HOST_ARCH) and the architectures that the kernels were
built for (TOKFUSE_HOST_CODE), writes launches to a file (TOKFUSE_HOST_LOG), and can check launches without running
them (TOKFUSE_HOST_DRY).
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cuda_rows
import pytest
import torch
from harness import compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL, truth
from torch.utils._python_dispatch import TorchDispatchMode

import tokfuse
from tokfuse import Objective
from tokfuse.runtime.backends import cuda_backend, policy_runs, value_checks
from tokfuse.runtime.core import checks
from tokfuse.runtime.lm_head import device_runs

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


# -------------------------------------------------------------------------- limits of shared memory

# The largest vocabularies of two rows in the 224 KiB of 1, 2, 4 and 8 blocks, then of one row. With the static
# shared memory of the kernel these are 227 KiB, all that a block has.
TWO_ROWS = {torch.bfloat16: (57_344, 114_688, 229_376, 458_752), torch.float32: (28_672, 57_344, 114_688, 229_376)}
ONE_ROW = {dtype: 2 * vocabs[-1] for dtype, vocabs in TWO_ROWS.items()}
# With a softcap: one row and its float32 tangents.
WITH_TANGENTS = {torch.bfloat16: (38_208, 76_416, 152_832, 305_664), torch.float32: TWO_ROWS[torch.float32]}
INSTANCES = [(dtype, softcap) for dtype in (torch.bfloat16, torch.float32) for softcap in (None, 30.0)]


def sizes(dtype: torch.dtype) -> Iterator[int]:
    """Return vocabularies around every change of the layout, and around 48 KiB of shared memory."""
    step_of = 16 // dtype.itemsize
    edges = [*TWO_ROWS[dtype], *WITH_TANGENTS[dtype], ONE_ROW[dtype], 48 * KIB // 2 // dtype.itemsize]
    edges.append(48 * KIB // 6 // dtype.itemsize)
    for edge in edges:
        yield from range(edge - 200 * step_of, edge + 80 * step_of, step_of)


def expected_cluster(vocab: int, dtype: torch.dtype, softcap: bool) -> int:
    """Return the blocks of a cluster, or 0 if the portable kernel runs."""
    limits = (WITH_TANGENTS if softcap else TWO_ROWS)[dtype]
    found = [2**i for i, largest in enumerate(limits) if vocab <= largest]
    return found[0] if found else (8 if not softcap and vocab <= ONE_ROW[dtype] else 0)


@pytest.mark.parametrize(("dtype", "softcap"), INSTANCES, ids=str)
@pytest.mark.parametrize("device", ["90", "100"])
def test_every_layout_of_rows_can_be_launched(
    dtype: torch.dtype, softcap: float | None, device: str, log: Log, monkeypatch: pytest.MonkeyPatch
):
    """Also between 46 and 48 KiB of dynamic shared memory, where the sum with the static one counts."""
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", device)
    step(1, 64, dtype, softcap)  # shows the static shared memory of the kernel
    log.take()
    monkeypatch.setenv("TOKFUSE_HOST_DRY", "1")
    vocabs = list(sizes(dtype))
    for vocab in vocabs:
        step(3, vocab, dtype, softcap)
    launches = log.take()
    got = [launch.cluster if launch.in_cluster else 0 for launch in launches]
    assert got == [expected_cluster(vocab, dtype, softcap is not None) for vocab in vocabs]
    full = {vocab: launch.shared for vocab, launch in zip(vocabs, launches, strict=True)}
    if softcap is None:
        assert {full[vocab] for vocab in (*TWO_ROWS[dtype], ONE_ROW[dtype])} == {224 * KIB}
    else:  # slices are multiples of 128 bytes
        assert all(224 * KIB - 384 < full[vocab] <= 224 * KIB for vocab in WITH_TANGENTS[dtype])


@pytest.mark.parametrize(
    ("rows", "vocab", "dtype"),
    [(5, 11_784, torch.bfloat16), (5, 12_288, torch.bfloat16), (5, 5_892, torch.float32), (3, 57_344, torch.bfloat16)],
    ids=["48_kib", "just_48_kib", "48_kib_float32", "227_kib"],
)
def test_rows_at_a_limit_of_shared_memory(rows: int, vocab: int, dtype: torch.dtype, log: Log):
    check_step(rows, vocab, dtype)
    (launch,) = log.take()
    assert launch.in_cluster and launch.cluster == 1


# ---------------------------------------------------------------------------- limits of the grid


def test_a_grid_that_is_too_large_is_an_error(log: Log, monkeypatch: pytest.MonkeyPatch):
    """A number of blocks that 32 bits do not hold must not become a small grid."""
    monkeypatch.setenv("TOKFUSE_HOST_DRY", "1")
    module, x = cuda_backend.launchers(), torch.zeros(4)
    place = module.Place(device=0, stream=0)

    def sketch(seqs: int) -> None:
        module.sketch(place, module.SketchArgs(tokens=4, seqs=seqs, rank=8, left=x, right=x, cu_seqlens=x, out=x))

    sketch(2**31 - 1)
    assert [launch.grid for launch in log.take()] == [2**31 - 1]
    for seqs in (2**31, 2**32 + 1):
        with pytest.raises(RuntimeError, match="cudaErrorInvalidConfiguration"):
            sketch(seqs)
    assert log.take() == []


def test_rows_of_two_billion_columns_are_refused():
    """The kernels count the columns of a row in int."""
    logits = torch.empty(1, 2**31, dtype=torch.bfloat16)  # pages that are never touched
    with pytest.raises(ValueError, match="vocab must be < 2"):
        cuda_rows.token_stats_fwd(logits, torch.zeros(1, dtype=torch.long))


# -------------------------------------------------------------------------------- small batches

# Operations of torch that launch no kernel.
FREE = {"detach", "empty", "empty_like", "new_empty", "view", "t", "slice", "alias", "select", "promote_types"}


class Operations(TorchDispatchMode):
    """Record the operations of torch that launch a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        self.names += [] if name in FREE else [name]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("whole", [True, False], ids=["whole_call", "general_path"])
@pytest.mark.parametrize("tokens", [1, 256])
def test_launches_of_a_small_batch(tokens: int, whole: bool, log: Log, monkeypatch: pytest.MonkeyPatch):
    """The numbers of docs/cuda.md. Checks of values, which a GPU does not make, are left out."""
    for module in (value_checks, policy_runs, device_runs, checks):
        monkeypatch.setattr(module, "may_read", lambda tensor: False)
    if whole:
        monkeypatch.setattr(cuda_backend, "may_read", lambda tensor: False)
    monkeypatch.setenv("TOKFUSE_HOST_DRY", "1")
    z, target = torch.zeros(tokens, 64, dtype=torch.bfloat16), torch.zeros(tokens, dtype=torch.long)
    hidden, weight = (torch.zeros(n, 16, dtype=torch.bfloat16, requires_grad=True) for n in (tokens, 64))
    given = {"target": target, "old_logp": torch.zeros(tokens), "advantage": torch.ones(tokens)}
    given |= {"objective": Objective(), "normalizer": 8.0}
    borders = torch.tensor([0, tokens], dtype=torch.int32)
    sequences = given | {"objective": Objective(level="sequence"), "cu_seqlens": borders}
    masked = given | {"mask": torch.ones(tokens, dtype=torch.bool), "normalizer": "batch"}
    no_target = {name: x for name, x in given.items() if name != "target"}
    leaf = z.clone().requires_grad_()
    calls = {
        "token_stats": lambda: tokfuse.token_stats(z, target),
        "token_stats_bwd": lambda: tokfuse.token_stats(leaf, target).logp.backward(torch.ones(tokens)),
        "policy_loss": lambda: tokfuse.policy_loss(given["old_logp"], **no_target),
        "policy_step": lambda: tokfuse.policy_step(logits=z, **given),
        "policy_step_bwd": lambda: tokfuse.policy_step(logits=leaf, **given).loss.backward(),
        "batch": lambda: tokfuse.policy_step(logits=z, **masked),
        "sequences": lambda: tokfuse.policy_step(logits=z, **sequences),
        "hidden": lambda: tokfuse.policy_step(hidden=hidden, weight=weight, **given),
    }
    found = {}
    for name, call in calls.items():
        leaf.grad = None
        with tokfuse.backend("cuda"), Operations() as operations:
            call()
        found[name] = (len(log.take()), operations.names)
    assert found["token_stats"] == (1, [])
    assert found["policy_loss"] == (1, [])
    assert found["policy_step"] == (2, [])
    assert found["batch"] == (3, [])
    assert found["sequences"] == (3, [])
    assert found["token_stats_bwd"] == (2, ["ones"])  # those of this test
    # On a GPU the gradient of the loss is not read: it multiplies in place.
    assert found["policy_step_bwd"] == (2, ["ones_like", "_local_scalar_dense"])
    own, names = found["hidden"]
    assert own == 2 and len(names) <= 24 and names.count("mm") == 3 and "zeros_like" not in names


# ------------------------------------------------------------------------------------- threads


def test_two_threads_with_two_vocabularies(log: Log, monkeypatch: pytest.MonkeyPatch):
    """Each launch runs without the GIL. The limit of shared memory is set once, and no thread lowers it."""
    step(1, 64)
    monkeypatch.setenv("TOKFUSE_HOST_DRY", "1")
    log.take()
    vocabs = (57_344, 2_048, 28_672, 12_288)
    with ThreadPoolExecutor(4) as pool:
        for done in [pool.submit(step, 3, vocab) for _ in range(50) for vocab in vocabs]:
            done.result()
    launches = log.take()
    assert sorted({launch.shared for launch in launches}) == [4 * vocab for vocab in sorted(vocabs)]
    assert len(launches) == 200 and all(launch.in_cluster for launch in launches)
