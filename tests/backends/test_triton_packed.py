"""What only the Triton kernels over packed vectors can get wrong.

Their values are tested with the other backends (test_gae.py and so on); here: the doubling scan
that stands in for the interpreter's, sizes that the compiler takes for constants, numbers that
float32 arguments would round, and on a GPU capture, repeatability and offsets.
"""

import pytest
import torch

import tokfuse
from tokfuse.inspection import kernel_table
from tokfuse.runtime.backends import triton_backend

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tokfuse.triton_kernels import compile_cases, packed  # noqa: E402
from tokfuse.triton_kernels.compile_cases import meta  # noqa: E402
from tokfuse.triton_kernels.gae import gae  # noqa: E402
from tokfuse.triton_kernels.group_advantage import group_advantage  # noqa: E402
from tokfuse.triton_kernels.offpolicy_weights import offpolicy_weights  # noqa: E402
from tokfuse.triton_kernels.ope import ope  # noqa: E402
from tokfuse.triton_kernels.segment_moments import parts_of, segment_moments  # noqa: E402
from tokfuse.triton_kernels.vtrace import vtrace  # noqa: E402
from tokfuse.triton_kernels.whiten import whiten  # noqa: E402

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
    with pytest.raises(ValueError, match="Triton kernels take numbers up to 3.40282e[+]38; got"):
        packed.pair(1e40)


def test_parts_follow_from_the_sizes_alone():
    assert parts_of(100, 10, 512) == parts_of(4096 * 512, 4096, 512) == 1
    assert parts_of(1 << 20, 1, 512) == 64 and parts_of(1 << 20, 64, 512) == 8
    assert parts_of(3 * 4 * 512, 1, 512) == 4


ONE = {
    "gae": lambda x, cu, flags, ids: gae(
        x, x, cu, gamma=0.9, lam=x, length_adaptive_alpha=None, mask=flags, finished=flags
    ),
    "vtrace": lambda x, cu, flags, ids: vtrace(
        x, x, x, cu, gamma=0.9, lam=1.0, rho_bar=1.0, c_bar=1.0, mask=flags, finished=flags
    ),
    "whiten": lambda x, cu, flags, ids: whiten(x, mask=flags, shift_mean=True, eps=0.0, mean=None, var=None),
    "group_advantage": lambda x, cu, flags, ids: group_advantage(
        x,
        ids,
        baseline="median",
        scale="batch_std",
        sample_std=True,
        eps=1e-6,
        singleton_reward=True,
        lengths=None,
        greedy_reward=None,
    ),
    "remax": lambda x, cu, flags, ids: group_advantage(
        x,
        None,
        baseline="greedy",
        scale="batch_std",
        sample_std=True,
        eps=1e-6,
        singleton_reward=True,
        lengths=None,
        greedy_reward=x,
    ),
    "ope": lambda x, cu, flags, ids: ope(x, x, x, x, flags),
    "segment_moments": lambda x, cu, flags, ids: segment_moments(x, ids, None, 1, flags),
    "long_segment": lambda x, cu, flags, ids: segment_moments(meta(1 << 20), None, cu, 1, None),
    "offpolicy_weights": lambda x, cu, flags, ids: offpolicy_weights(
        x,
        x,
        level="sequence",
        mode="ips",
        low=None,
        high=None,
        param=None,
        normalize="group",
        rules=(("k1", "mean", None, 0.1, True),),
        cu_seqlens=cu,
        mask=flags,
        group_ids=ids,
        advantage=x,
    ),
    "external": lambda x, cu, flags, ids: offpolicy_weights(
        x,
        None,
        level="external",
        mode="ips",
        low=None,
        high=None,
        param=None,
        normalize="group",
        rules=(),
        cu_seqlens=None,
        mask=None,
        group_ids=ids,
        advantage=None,
    ),
    "batch": lambda x, cu, flags, ids: offpolicy_weights(
        x,
        x,
        level="token",
        mode="keep",
        low=None,
        high=None,
        param=None,
        normalize="batch",
        rules=(("k3", "token", None, 0.1, False),),
        cu_seqlens=None,
        mask=None,
        group_ids=None,
        advantage=None,
    ),
}


@needs_compiler
@pytest.mark.compiler
@pytest.mark.parametrize("call", ONE.values(), ids=ONE)
def test_one_row_compiles(call):
    """The JIT makes a constant of an argument that equals 1, and a constant has no dtype."""

    def one(dtype: torch.dtype) -> None:
        call(meta(1, dtype=dtype), meta(2, dtype=torch.int32), meta(1, dtype=torch.bool), meta(1, dtype=torch.int64))

    case = compile_cases.CompileCase("one", one, (torch.float32,))
    for launch in compile_cases.record(case, torch.float32, 90):
        assert kernel_table.resources_of(case, torch.float32, 90, launch).spill_bytes == 0


def _calls(device):
    """name -> call on tensors of that device, each through the public function."""
    gen = torch.Generator().manual_seed(0)
    x, y, z = (torch.randn(5000, generator=gen).to(device) for _ in range(3))
    mask = (torch.rand(5000, generator=gen) < 0.8).to(device)
    cu = torch.tensor([0, 1, 1, 2000, 5000], dtype=torch.int32, device=device)
    ids = torch.randint(0, 99, (5000,), generator=gen).to(device)
    groups = torch.tensor([3, 3, 1, 3], device=device)
    return {
        "gae": lambda: tokfuse.gae(x, y, cu, gamma=0.99, lam=0.95, mask=mask),
        "vtrace": lambda: tokfuse.vtrace(x, y, z, cu, gamma=0.99, lam=0.95, mask=mask),
        "whiten": lambda: (tokfuse.whiten(x, mask),),
        "group_advantage": lambda: (tokfuse.group_advantage(x, ids, scale="batch_std"),),
        "median": lambda: (tokfuse.group_advantage(x, ids, "gbpo_target"),),
        "ope": lambda: tokfuse.ope(x.exp(), y, z, y, mask=mask),
        "segment_moments": lambda: tokfuse.segment_moments(x, ids, num_segments=99, mask=mask),
        "offpolicy_weights": lambda: tokfuse.offpolicy_weights(
            x, y, mode="snips", cu_seqlens=cu, group_ids=groups, rules=(tokfuse.KeepRule("k2", "mean", high=1e3),)
        ),
    }


@pytest.mark.gpu
@pytest.mark.parametrize("name", _calls("cpu"))
def test_captured_in_a_graph_and_the_same_bits_in_every_run(name):
    """No synchronisation and no read on the host: capture refuses both."""
    with tokfuse.backend("triton"):
        call = _calls("cuda")[name]
        first = call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for _ in range(3):
            graph.replay()
            torch.cuda.synchronize()
            for got, want in zip(captured, first, strict=True):
                assert torch.equal(got, want)


@pytest.mark.gpu
def test_more_programs_than_the_second_axis_of_a_grid_holds():
    ids = torch.arange(70_000, device="cuda").repeat_interleave(2)
    reward = torch.arange(140_000, device="cuda", dtype=torch.float32) % 2
    cu = torch.arange(0, 140_001, 2, device="cuda", dtype=torch.int32)
    with tokfuse.backend("triton"):
        gain = tokfuse.group_advantage(reward, ids, "dr_grpo")
        scan, _ = tokfuse.gae(reward, torch.zeros_like(reward), cu)
    assert torch.equal(gain, reward - 0.5) and torch.equal(scan, torch.ones_like(scan))
