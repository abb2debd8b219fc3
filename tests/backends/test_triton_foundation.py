"""Test the basis of every Triton kernel: launch records, device helpers, dispatch, and recording.

Tests marked `interpreter` run kernels of this file with TRITON_INTERPRET=1. Tests marked `compiler` need a
process without it.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from harness import bits

import tokfuse
from tokfuse.inspection import kernel_table
from tokfuse.runtime.backends import registration, triton_backend
from tokfuse.runtime.core import dispatch

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tokfuse.triton_kernels import compile_cases, launch, tile  # noqa: E402

needs_compiler = pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter is on: no compiler")


@triton.jit
def round_fwd_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    tile.store(out_ptr + offs, tile.load(x_ptr + offs, mask=inside, other=0.0), mask=inside)


@triton.jit
def pairwise_max_kernel(x_ptr, y_ptr, out_ptr, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    tl.store(out_ptr + offs, tile.maximum(tl.load(x_ptr + offs), tl.load(y_ptr + offs)))


# ------------------------------------------------------------------------------------- launch.py


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"block_v": 3000}, "powers of two"),
        ({"block_v": 4096, "num_warps": 6}, "powers of two"),
        ({"block_t": 2048, "block_v": 2048}, "at most 1048576 elements"),
        ({"block_v": 4096, "num_warps": 64}, "num_warps must be at most 32"),
        ({"block_v": 128, "num_warps": 8}, "one for each thread"),
        ({"block_v": 4096, "num_stages": 0}, "num_stages"),
    ],
)
def test_a_record_that_cannot_be_compiled_is_refused(fields, reason):
    with pytest.raises(ValueError, match=reason):
        launch.LaunchConfig(**fields)


def test_a_device_takes_the_newest_record_that_is_not_above_it(monkeypatch):
    old, new = launch.LaunchConfig(block_v=1024), launch.LaunchConfig(block_v=4096)
    monkeypatch.setitem(launch.DEFAULTS, "some_fwd", {80: old, 90: new})
    wanted = {75: old, 80: old, 89: old, 90: new, 120: new}
    assert {c: launch.default("some_fwd", c) for c in wanted} == wanted
    x = torch.empty(1)
    with launch.assume(80):
        assert launch.choose("some_fwd", x) == old
    assert launch.choose("some_fwd", x) == new
    monkeypatch.setitem(launch.TUNED, ("some_fwd", 89), new)
    assert launch.default("some_fwd", 89) == new and launch.default("some_fwd", 86) == old


def test_no_default_that_triton_3_6_refuses():
    """A plain string as a default of a device function fails with Triton 3.6; a constexpr works."""
    folder = Path(compile_cases.__file__).parent
    wrong = [
        f"{file.name}: {line.strip()}"
        for file in sorted(folder.glob("*.py"))
        for line in file.read_text().splitlines()
        if re.search(r"tl\.constexpr = [\"']", line)
    ]
    assert wrong == []


# ------------------------------------------------------------------------------------- dispatch


def test_cpu_tensors_never_take_the_interpreter_by_themselves():
    """Without the interpreter they cannot run on triton."""
    code = """
import torch, tokfuse
from tokfuse.runtime.backends import registration
from tokfuse.runtime.core import dispatch
registration.register_triton("only", "run", dispatch.FLOAT_DTYPES, "softcap")
for name in (None, "triton"):
    try:
        with dispatch.backend(name) if name else torch.no_grad():
            print(dispatch.select("only", "cpu", torch.bfloat16).backend)
    except tokfuse.BackendUnavailable as error:
        print(error)
"""
    lines = {}
    for interpret in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-P", "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "TRITON_INTERPRET": interpret},
        )
        assert done.returncode == 0, done.stderr
        lines[interpret] = done.stdout.splitlines()
    assert [("runs on cuda, the tensors are on cpu" in line) for line in lines["0"]] == [True] * 2
    assert "triton: usable, but selected only if it is forced" in lines["1"][0]
    assert lines["1"][1] == "triton"


def test_cuda_tensors_take_triton_where_there_is_no_cuda_kernel(monkeypatch):
    monkeypatch.setitem(dispatch._REGISTRY, "only", {})
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    monkeypatch.setattr(triton_backend, "why_unusable", lambda: None)
    registration.register_triton("only", "run", dispatch.FLOAT_DTYPES)
    registration.register_reference("only", "plain")
    none: frozenset[str] = frozenset()
    assert dispatch._choose("only", "cuda", torch.bfloat16, none, None).backend == "triton"
    assert dispatch._choose("only", "cuda", torch.float64, none, None).backend == "reference"
    assert dispatch._choose("only", "cpu", torch.bfloat16, none, None).backend == "reference"


def test_a_machine_without_a_gpu_says_so(monkeypatch):
    monkeypatch.setattr(triton_backend, "interpreting", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no CUDA device" in triton_backend.why_unusable.__wrapped__()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert triton_backend.why_unusable.__wrapped__() == ("needs compute capability 8.0, the device has 7.5")
    monkeypatch.setattr(triton_backend, "installed", lambda: False)
    assert "triton is not installed" in triton_backend.why_unusable.__wrapped__()


# --------------------------------------------------------------------------------------- tile.py


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore:overflow encountered in cast")  # a numpy warning about float16
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_store_rounds_to_nearest_even_bit_for_bit(dtype):
    words = torch.randint(-(2**31), 2**31, (4096,), generator=torch.Generator().manual_seed(0))
    x = words.to(torch.int32).view(torch.float32)
    halfway = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.4e38, -3.4e38, 0.0, -0.0, 1e-40])
    x = torch.cat([x[~x.isnan()], halfway, torch.tensor([float("inf"), -float("inf")])])
    out = torch.empty(len(x), dtype=dtype)
    round_fwd_kernel[(triton.cdiv(len(x), 1024),)](x, out, len(x), BLOCK=1024)
    assert bits(out) == bits(x.to(dtype))
    nan = torch.full((8,), float("nan"))
    round_fwd_kernel[(1,)](nan, out, 8, BLOCK=1024)
    assert out[:8].isnan().all()


@pytest.mark.interpreter
def test_maximum_keeps_nan():
    nan = float("nan")
    x, y = torch.tensor([1.0, nan, 2.0, nan]), torch.tensor([nan, 1.0, 3.0, nan])
    out = torch.empty(4)
    pairwise_max_kernel[(1,)](x, y, out, BLOCK=4)
    assert out.isnan().tolist() == [True, True, False, True] and out[2] == 3.0


# ------------------------------------------------------------------------------ recording, SASS


@needs_compiler
def test_recording_specialises_as_the_jit_does():
    def call(dtype: torch.dtype) -> None:
        x = compile_cases.meta(100, 64, dtype=dtype)
        round_fwd_kernel[(1,)](x, x, 6400, BLOCK=1024, num_warps=8)
        round_fwd_kernel[(1,)](x, x, 1, BLOCK=1024)
        round_fwd_kernel[(1,)](x, None, 2**31 + 1, BLOCK=1024)

    case = compile_cases.CompileCase("round", call, (torch.bfloat16,))
    first, second, third = compile_cases.record(case, torch.bfloat16, 90)
    assert first.signature == {"x_ptr": "*bf16", "out_ptr": "*bf16", "n": "i32", "BLOCK": "constexpr"}
    assert first.aligned == ("x_ptr", "out_ptr", "n") and first.options == {"num_warps": 8}
    assert second.constexprs == {"n": 1, "BLOCK": 1024}
    assert third.signature["n"] == "i64" and third.aligned == ("x_ptr",)
    assert third.constexprs == {"out_ptr": None, "BLOCK": 1024}


@needs_compiler
@pytest.mark.compiler
@pytest.mark.parametrize("capability", compile_cases.CAPABILITIES)
def test_resources_of_a_copy(capability):
    """A kernel with known resources: 16-byte loads, no shared memory, no spills."""

    def call(dtype: torch.dtype) -> None:
        x = compile_cases.meta(1 << 20, dtype=dtype)
        round_fwd_kernel[(1,)](x, x, 1 << 20, BLOCK=2048)

    case = compile_cases.CompileCase("round", call, (torch.bfloat16,))
    (one,) = compile_cases.record(case, torch.bfloat16, capability)
    row = kernel_table.resources_of(case, torch.bfloat16, capability, one)
    assert (row.spill_bytes, row.shared_bytes, row.threads, row.load_bytes) == (0, 0, 128, 16)
    assert 1.5 < row.per_element < 8.0 and 8 <= row.registers < 64


ROW = kernel_table.Resources(
    "op",
    "k",
    "bfloat16",
    90,
    registers=40,
    spill_bytes=0,
    shared_bytes=0,
    threads=256,
    load_bytes=16,
    per_element=10.0,
    special_per_element=1.0,
    traffic_bytes=2,
    source="",
)
SASS = """
.text.k:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, desc[UR4][R2.64] ;
        /*0020*/              @P1  LDG.E.U16.CONSTANT R5, desc[UR4][R2.64] ;
        /*0030*/                   FADD R0, R0, R4 ;
        /*0040*/              @!P0 BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""


def test_hot_loop_and_load_widths_of_a_listing():
    (loop,) = kernel_table.hot_loops(SASS)
    assert len(loop) == 4 and loop[-1].strip().endswith("(.L_x_1)")
    assert list(kernel_table._load_widths(loop)) == [16, 2]
    assert [len(x) for x in kernel_table.hot_loops(SASS.replace("`(.L_x_1)", "`(.L_x_9)"))] == [7]


def test_differences_are_named():
    row = ROW

    def changed(**fields):
        return kernel_table.Resources(**{**row.__dict__, **fields})

    assert kernel_table.differences([row], [row]) == []
    assert kernel_table.differences([changed(registers=41, per_element=9.0)], [row]) == []
    for fields, text in (
        ({"registers": 60}, "registers 60, the table has 40"),
        ({"spill_bytes": 8}, "spill_bytes 8, the table has 0"),
        ({"shared_bytes": 64}, "shared_bytes 64, the table has 0"),
        ({"per_element": 10.3}, "per_element 10.3, the table has 10.0"),
        ({"load_bytes": 4}, "loads of 4 bytes, the table has 16"),
        ({"case": "new"}, "is not in the table"),
    ):
        assert text in "\n".join(kernel_table.differences([changed(**fields)], [row]))
    assert "no longer compiled" in kernel_table.differences([], [row])[0]


def test_bandwidth_is_predicted_from_issue_slots_and_special_functions():
    """17.7 slots per 2-byte element on an H100, 12.35 on an H200; special functions have an eighth of these."""
    row = dataclasses.replace(ROW, per_element=13.0)
    assert kernel_table.bandwidth_share(row, "H100") == (1.0, "memory")
    share, limit = kernel_table.bandwidth_share(row, "H200")
    assert (share, limit) == (pytest.approx(12.35 / 13.0, rel=1e-3), "issue")
    row = dataclasses.replace(row, special_per_element=2.0)
    share, limit = kernel_table.bandwidth_share(row, "H200")
    assert (share, limit) == (pytest.approx(12.35 / 16.0, rel=1e-3), "special")


def test_forced_triton_on_the_cpu_is_refused_without_the_interpreter():
    if triton_backend.interpreting():
        pytest.skip("the interpreter is on")
    with tokfuse.backend("triton"), pytest.raises(tokfuse.BackendUnavailable, match="cuda"):
        tokfuse.token_stats(torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
