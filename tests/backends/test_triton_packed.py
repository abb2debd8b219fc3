"""Test errors that only the Triton kernels over packed vectors can have.

Their values are tested with the other backends (test_gae.py and so on). This file tests the doubling scan that
replaces the interpreter's scan, sizes that the compiler treats as constants, numbers that float32 arguments
would round, and on a GPU capture, repeatability and offsets.
"""

import pytest
import torch
from harness import bits
from op_calls import ONE, Problem, Sizes, calls, tensors

import tokfuse
from tokfuse.inspection import kernel_table
from tokfuse.runtime.backends import triton_backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from meta_launches import on_meta  # noqa: E402

from tokfuse.triton_kernels import compile_cases, packed  # noqa: E402
from tokfuse.triton_kernels.segment_moments import parts_of  # noqa: E402

needs_compiler = pytest.mark.skipif(triton_backend.interpreting(), reason="the interpreter is on: no compiler")


@triton.jit
def scans_kernel(coef_ptr, inject_ptr, carry_ptr, out_ptr, least_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    coef, inject = tl.load(coef_ptr + offs), tl.load(inject_ptr + offs)
    carry = tl.load(carry_ptr)
    tl.store(out_ptr + offs, packed.reverse_recurrence(coef, inject, carry))
    tl.store(least_ptr + offs, packed.reverse_minimum(inject, carry))


@triton.jit
def number_kernel(out_ptr, number):
    tl.store(out_ptr, packed.joined(number))


@pytest.mark.interpreter
def test_scans_equal_a_loop_from_the_end():
    gen = torch.Generator().manual_seed(0)
    coef, inject = torch.rand(2, 64, generator=gen, dtype=torch.float64)
    carry = torch.tensor(0.5, dtype=torch.float64)
    out, least = torch.empty(2, 64, dtype=torch.float64)
    scans_kernel[(1,)](coef, inject, carry, out, least, N=64)
    y, smallest, wanted = float(carry), float(carry), []
    for a, b in zip(reversed(coef.tolist()), reversed(inject.tolist()), strict=True):
        y, smallest = b + a * y, min(smallest, b)
        wanted.append((y, smallest))
    want = torch.tensor(wanted[::-1], dtype=torch.float64)
    torch.testing.assert_close(out, want[:, 0], rtol=1e-14, atol=0)
    assert torch.equal(least, want[:, 1])


@pytest.mark.interpreter
@pytest.mark.parametrize("x", [0.99, 1 / 3, -1e-6, 1e30, 0.0, float("inf"), -float("inf")])
def test_numbers_keep_their_digits(x):
    out = torch.empty(1, dtype=torch.float64)
    number_kernel[(1,)](out, packed.pair(x))
    assert out.item() == pytest.approx(x, rel=1e-14, abs=0)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="Triton kernels accept finite numbers up to 3.40282e[+]38; got"):
        packed.pair(1e40)


def test_parts_follow_from_the_sizes_alone():
    assert parts_of(100, 10, 512) == parts_of(4096 * 512, 4096, 512) == 1
    assert parts_of(1 << 20, 1, 512) == 64 and parts_of(1 << 20, 64, 512) == 8
    assert parts_of(3 * 4 * 512, 1, 512) == 4


PACKED = {call.name: call for call in calls("packed")}
# A segment that several programs share.
LONG_SEGMENT = Sizes(tokens=1 << 20, vocab=1, hidden=1, sequences=1)
ROWS_OF_ONE = [(call, ONE) for call in calls("packed", options="rich")]
ROWS_OF_ONE += [(PACKED["segment_moments/sequences"], LONG_SEGMENT)]


@needs_compiler
@pytest.mark.compiler
@pytest.mark.parametrize(("call", "sizes"), ROWS_OF_ONE, ids=lambda x: getattr(x, "name", ""))
def test_one_row_compiles(call, sizes):
    """The JIT turns an argument that equals 1 into a constant, which has no dtype."""
    case = compile_cases.CompileCase(call.name, lambda _: call.run(Problem(sizes, "meta")), (torch.float32,))
    with on_meta():
        launches = compile_cases.record(case, torch.float32, 90)
    for launch in launches:
        assert kernel_table.resources_of(case, torch.float32, 90, launch).spill_bytes == 0


@pytest.mark.gpu
@pytest.mark.parametrize("name", PACKED)
def test_captured_in_a_graph_and_the_same_bits_in_every_run(name):
    """No synchronisation and no read on the host, because both fail under capture."""
    call = PACKED[name]
    given = call.arguments(Problem(Sizes(tokens=5000, vocab=1, hidden=1, sequences=60), "cuda"))
    with tokfuse.backend("triton"), torch.no_grad():
        first = tensors(call.function()(**given))
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = tensors(call.function()(**given))
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            for name, want in first.items():
                assert bits(captured[name]) == bits(want), name


@pytest.mark.gpu
def test_more_programs_than_the_second_axis_of_a_grid_holds():
    ids = torch.arange(70_000, device="cuda").repeat_interleave(2)
    reward = torch.arange(140_000, device="cuda", dtype=torch.float32) % 2
    cu = torch.arange(0, 140_001, 2, device="cuda", dtype=torch.int32)
    with tokfuse.backend("triton"):
        gain = tokfuse.group_advantage(reward, ids, "dr_grpo")
        scan, _ = tokfuse.gae(reward, torch.zeros_like(reward), cu)
    assert torch.equal(gain, reward - 0.5) and torch.equal(scan, torch.ones_like(scan))
