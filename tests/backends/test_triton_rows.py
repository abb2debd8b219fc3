"""Test properties that only the Triton row kernels have: poison instead of an error, parts of rows, alignment.

The first half runs in the interpreter. The second half, marked `gpu`, repeats the cases of the other test files
on a device and adds CUDA graphs, offsets beyond 2^31 and bandwidth.
"""

import numpy as np
import pytest
import torch
from gpu_time import median_ms
from harness import bits, compare
from logit_cases import CASES

import tokfuse
from tokfuse.runtime.backends import triton_rows
from tokfuse.runtime.core.codes import DIVERGENCES

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402

from tokfuse.triton_kernels import rows  # noqa: E402

OPTIONS = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0, "mask": None}


@triton.jit
def capped_kernel(z_ptr, out_ptr, softcap, logit_scale, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(out_ptr + offs, rows.capped(tl.load(z_ptr + offs), softcap, logit_scale))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_tangent_of_a_softcap():
    """With a cap of 30 the error of cap * tanh is an error of d: 2e-6 for most logits, 3.3e-6 for all."""
    z = torch.linspace(-100.0, 100.0, 1 << 14)
    out = torch.empty_like(z)
    capped_kernel[(1,)](z, out, 30.0, 0.75, N=1 << 14)
    error = (out.double() - torch.tanh(z.double() * 0.75 / 30.0)).abs()
    assert error.max() < 1.1e-7 and error[z.abs() < 8.0].max() < 7e-8
    assert torch.equal(out, -out.flip(0))
    z = torch.tensor([float("inf"), -float("inf"), float("nan"), 0.0])
    capped_kernel[(1,)](z, out, 30.0, 0.75, N=4)
    assert out[:2].tolist() == [1.0, -1.0] and bool(out[2].isnan()) and out[3] == 0.0


@triton.jit
def capped_by_fours_kernel(z_ptr, out_ptr, softcap, logit_scale, LANES: tl.constexpr, ITEMS: tl.constexpr):
    offs = rows.tile_offsets(1, LANES, ITEMS)
    tl.store(out_ptr + offs, rows.capped_by_fours(tl.load(z_ptr + offs), softcap, logit_scale))


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_tangents_that_share_a_reciprocal():
    """A NaN reaches its neighbours, and an infinity does not."""
    z = torch.linspace(-200.0, 200.0, 1 << 14)[torch.randperm(1 << 14, generator=torch.Generator().manual_seed(0))]
    z[:5] = torch.tensor([float("inf"), -float("inf"), 0.0, 3.0e38, float("nan")])
    for items in (4, 8):
        out = torch.empty_like(z)
        capped_by_fours_kernel[(1,)](z, out, 30.0, 0.75, LANES=(1 << 14) // items, ITEMS=items)
        error = (out.double() - torch.tanh(z.double() * 0.75 / 30.0)).abs()
        assert error[8:].max() < 1.4e-7
        assert out[:4].tolist() == [1.0, -1.0, 0.0, 1.0] and bool(out[4:8].isnan().all())
    out = torch.empty_like(z)
    capped_by_fours_kernel[(1,)](z, out, 30.0, 0.75, LANES=1 << 14, ITEMS=1)
    assert torch.isnan(out).sum() == 1


@pytest.mark.interpreter
def test_a_number_of_numpy():
    logits, target = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)), torch.tensor([1, 2])
    shape = tokfuse.PPOClip(low=np.float32(0.25), high=np.float32(0.25))
    given = {"old_logp": torch.full((2,), -2.0), "advantage": torch.ones(2), "target": target}
    with tokfuse.backend("triton"):
        for kind in (np.float32, np.int64):
            got = tokfuse.token_stats(logits, target, temperature=kind(2), softcap=kind(8), logit_scale=kind(1))
            want = tokfuse.token_stats(logits, target, temperature=2.0, softcap=8.0, logit_scale=1.0)
            assert bits(got.logp) == bits(want.logp)
        objective = tokfuse.Objective(shape=shape, kl=None, entropy_coef=np.float32(0.5))
        step = tokfuse.policy_step(logits=logits, objective=objective, temperature=np.float32(2), **given)
        objective = tokfuse.Objective(shape=tokfuse.PPOClip(low=0.25, high=0.25), entropy_coef=0.5)
        assert bits(step.loss) == bits(
            tokfuse.policy_step(logits=logits, objective=objective, temperature=2.0, **given).loss
        )


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_target_out_of_range_poisons_its_row_where_values_are_not_read():
    from tokfuse.triton_kernels import token_stats as kernels

    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 300, -1, 299])
    out = kernels.token_stats_fwd(logits, target, **OPTIONS)
    assert out[0].isnan().tolist() == [False, True, True, False]
    assert all(x.isfinite().all() for x in out[1:])
    one = torch.ones(4)
    grad = kernels.token_stats_bwd(logits, target, out[5], out[6], *out[:2], one, one, **OPTIONS)
    assert grad.isnan().all(1).tolist() == [False, True, True, False]
    only_entropy = kernels.token_stats_bwd(logits, target, out[5], out[6], *out[:2], None, one, **OPTIONS)
    assert only_entropy.isfinite().all()


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("programs", [1, 8])
def test_the_gradient_does_not_depend_on_the_parts_of_a_row(dtype, programs, monkeypatch):
    """Nor on whether it is in place. The row does not start at a multiple of 16 bytes."""
    from tokfuse.triton_kernels import token_stats as kernels

    logits = torch.randn(2, 5003, generator=torch.Generator().manual_seed(1)).to(dtype)
    target = torch.tensor([5002, 2050])
    out = kernels.token_stats_fwd(logits, target, **OPTIONS)
    state = (out[5], out[6], *out[:2], torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0]))
    whole = kernels.token_stats_bwd(logits, target, *state, **OPTIONS)
    monkeypatch.setattr(rows, "ENOUGH_PROGRAMS", programs)
    over = logits.clone()
    assert kernels.token_stats_bwd(over, target, *state, over, **OPTIONS) is over
    assert bits(over) == bits(whole)


@pytest.mark.interpreter
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_an_id_out_of_range_poisons_its_row_where_values_are_not_read():
    from tokfuse.triton_kernels import kept_token_stats as kernels

    logits, target = torch.zeros(3, 10), torch.tensor([1, 1, 12])
    ids, offsets = torch.tensor([1, 2, 1, 10, 3, 4]), torch.tensor([0, 2, 4, 6])
    out = kernels.kept_token_stats_fwd(logits, target, ids, offsets, **OPTIONS)
    assert out[0].isnan().tolist() == [False, True, True]
    assert out[1].isnan().tolist() == [False, True, False]
    # Offsets beyond the end of the ids read nothing there.
    out = kernels.kept_token_stats_fwd(logits, target, ids, torch.tensor([0, 2, 4, 1 << 40]), **OPTIONS)
    assert out[1][2].isfinite()


# ---------------------------------------------------------------------------------- on a device


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def on(device: str, arguments: dict) -> dict:
    return {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_divergences_on_a_device_are_those_of_the_reference(case, kind):
    p, _, options = case.make(torch.float32)
    q = torch.roll(p, 1, 0) if len(p) > 1 else p + 0.5
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "triton")):
        z = p.to(device).detach().requires_grad_()
        with tokfuse.backend(backend):
            out = tokfuse.paired_divergence(z, q.to(device), kind=kind, **on(device, options))
            out.nan_to_num(posinf=0.0).sum().backward()
        results.append((out, z.grad))
    compare(results[1][0], results[0][0], atol=2e-5, rtol=2e-5)
    compare(results[1][1], results[0][1], atol=5e-6, rtol=1e-5)


@pytest.mark.gpu
@needs_cuda
def test_kept_supports_on_a_device_are_those_of_the_reference():
    gen = torch.Generator().manual_seed(0)
    logits, target = torch.randn(5, 3000, generator=gen), torch.tensor([7, 1, 2999, 5, 0])
    ids = torch.cat([torch.randperm(3000, generator=gen)[:n] for n in (700, 1, 0, 2048, 3)])
    offsets = torch.tensor([0, 700, 701, 701, 2749, 2752])
    results = []
    for device, backend in (("cpu", "reference"), ("cuda", "triton")):
        z = logits.to(device).requires_grad_()
        given = [x.to(device) for x in (target, ids, offsets)]
        with tokfuse.backend(backend):
            out = tokfuse.kept_token_stats(z, *given, temperature=0.8)
            out.entropy.sum().backward()
        results.append((*out, z.grad))
    for got, want in zip(results[1], results[0], strict=True):
        compare(got, want, atol=2e-5)


@pytest.mark.gpu
@needs_cuda
def test_a_cuda_graph_replays_forward_and_backward():
    """No host synchronisation, and every allocation comes from the graph's pool."""
    logits = torch.randn(64, 5003, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 5003, (64,), device="cuda")

    def step() -> tuple[torch.Tensor, torch.Tensor]:
        stats = tokfuse.token_stats(logits, target, temperature=0.7)
        (grad,) = torch.autograd.grad((stats.logp + 0.1 * stats.entropy).sum(), logits)
        return stats.logp, grad

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm-up compiles the kernels
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        logits.mul_(0.5)
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert torch.equal(got, want)


@pytest.mark.gpu
@needs_cuda
def test_rows_beyond_2_to_the_31_elements():
    vocab = 151936
    tokens = 2**31 // vocab + 3
    if torch.cuda.mem_get_info()[0] < 3 * tokens * vocab * 2:
        pytest.skip("needs 14 GB of device memory")
    logits = torch.zeros(tokens, vocab, device="cuda", dtype=torch.bfloat16)
    logits[-1, 5] = 20.0
    target = torch.full((tokens,), 5, device="cuda")
    z = logits.requires_grad_()
    stats = tokfuse.token_stats(z, target)
    stats.logp[-1].backward()
    assert abs(float(stats.logp[-1])) < 1e-3 and abs(float(stats.logp[0]) + 11.931) < 1e-3
    assert float(z.grad[-1, 6]) < 0.0 and float(z.grad[0].abs().sum()) == 0.0


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("gradient", [False, True])
def test_bandwidth_is_that_of_a_copy(gradient, record_property):
    """The hot loops fit the issue rate, so a pass takes the time of its bytes, or 1.6x of it.

    The test compares two medians of one process, with a wide margin: a loop that spills or loads 2 bytes at a time
    is slower by 3x or more.
    """
    logits = torch.randn(4096, 128256, device="cuda", dtype=torch.bfloat16)
    target = torch.randint(0, 128256, (4096,), device="cuda")
    other = torch.empty_like(logits)

    run = triton_rows.TOKEN_STATS
    options = {**OPTIONS, "bias_logits": None, "bias_scale": 1.0}
    out = run.forward(logits, target, **options)
    one = torch.ones(4096, device="cuda")

    def passes() -> object:
        if not gradient:
            return run.forward(logits, target, **options)
        return run.backward(logits, target, out[5], out[6], *out[:2], one, one, other, **options)

    copy = median_ms(lambda: other.copy_(logits))
    share = copy / median_ms(passes) * (1.0 if gradient else 0.5)
    record_property("share_of_copy_bandwidth", share)
    assert share > 1 / 1.6, f"{share:.2f} of the bandwidth of a copy"
