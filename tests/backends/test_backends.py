"""Test dispatch: which backend runs a call, how to force one, and the message if none can run it."""

import subprocess
import sys

import pytest
import torch

import tokfuse
from tokfuse.runtime.backends import cuda_backend
from tokfuse.runtime.core import dispatch, native

has_native = pytest.mark.skipif(native.module() is None, reason="the native module is not built: cpu backend missing")


def problem():
    return torch.randn(3, 7), torch.tensor([0, 3, 6])


@has_native
def test_cpu_tensors_take_the_cpu_backend_and_float64_the_reference():
    assert dispatch.select("token_stats", "cpu", torch.float32).backend == "cpu"
    assert dispatch.select("token_stats", "cpu", torch.float64).backend == "reference"


@has_native
def test_context_forces_and_restores():
    assert dispatch.forced_backend() is None
    with tokfuse.backend("reference"):
        assert dispatch.select("token_stats", "cpu", torch.float32).backend == "reference"
        with tokfuse.backend("cpu"):
            assert dispatch.select("token_stats", "cpu", torch.float32).backend == "cpu"
        assert dispatch.forced_backend() == "reference"
    assert dispatch.forced_backend() is None


def test_context_restores_after_an_error():
    with pytest.raises(KeyError), tokfuse.backend("reference"):
        raise KeyError
    assert dispatch.forced_backend() is None


def test_unknown_backend_lists_the_known():
    with pytest.raises(ValueError, match="one of cuda, triton, cpu, reference; got 'gpu'"):
        with tokfuse.backend("gpu"):
            pass


@pytest.mark.skipif(cuda_backend.hosted(), reason="the CUDA kernels run on the CPU here")
@pytest.mark.parametrize("name", ["cuda", "triton"])
def test_forced_backend_that_is_missing_raises_with_every_reason(name):
    logits, target = problem()
    with tokfuse.backend(name), pytest.raises(tokfuse.BackendUnavailable) as error:
        tokfuse.token_stats(logits, target)
    text = str(error.value)
    assert f"the forced backend {name!r} cannot run this call" in text
    for other in dispatch.ORDER:
        assert f"{other}: " in text
    assert f"{name}: runs on cuda, the tensors are on cpu" in text


@has_native
def test_forced_backend_that_lacks_the_dtype_is_not_replaced():
    logits, target = problem()
    with tokfuse.backend("cpu"), pytest.raises(tokfuse.BackendUnavailable, match="float64"):
        tokfuse.token_stats(logits.double(), target)


def test_refusals_name_device_dtype_and_features():
    row = dispatch.Capability("op", "cpu", None, frozenset({"cpu"}), frozenset({torch.float32}), frozenset({"a"}))
    none = frozenset()
    assert row.refusal("cpu", torch.float32, none) is None
    assert row.refusal("cuda", torch.float32, none) == "runs on cpu, the tensors are on cuda"
    assert row.refusal("cpu", torch.bfloat16, none) == "takes float32, the input is bfloat16"
    assert row.refusal("cpu", torch.float32, frozenset({"a", "b"})) == "does not support b"
    broken = dispatch.Capability("op", "cpu", None, row.devices, row.dtypes, none, lambda: "no compiler")
    assert broken.refusal("cpu", torch.float32, none) == "no compiler"


def run_with_environment(backend: str) -> subprocess.CompletedProcess:
    code = (
        "import torch, tokfuse\n"
        "from tokfuse.runtime.core import dispatch\n"
        "print(dispatch.select('token_stats', 'cpu', torch.float32).backend)"
    )
    # The import of the package must find the name too, so the variable is set from outside.
    return subprocess.run(
        [sys.executable, "-P", "-c", f"import tokfuse.runtime.ops.token_stats\n{code}"],
        env={"PATH": "", "TOKFUSE_BACKEND": backend},
        capture_output=True,
        text=True,
    )


def test_environment_variable_forces():
    assert run_with_environment("reference").stdout.strip() == "reference"


def test_environment_variable_with_an_unknown_name_raises():
    out = run_with_environment("fast")
    assert out.returncode != 0
    assert "TOKFUSE_BACKEND must be one of cuda, triton, cpu, reference; got 'fast'" in out.stderr


def test_table_covers_every_op_and_backend():
    rows = dispatch.table()
    ops = {row["op"] for row in rows}
    assert {"token_stats", "policy_loss"} <= ops
    assert len(rows) == len(ops) * len(dispatch.ORDER)
    for row in rows:
        assert row["usable"] == (row["why"] == "")
        assert row["built"] or not row["usable"]
