"""Test guarantees of the CUDA row kernels: repeatability, poison, distant rows, large offsets, extras."""

import cuda_rows as k
import pytest
import torch
from harness import FLOAT_DTYPES, bits, compare
from logit_cases import INF, transformed

from tokfuse import Objective
from tokfuse.runtime.backends import cuda_backend

pytestmark = [pytest.mark.cuda_host, pytest.mark.skipif(not cuda_backend.hosted(), reason="needs TOKFUSE_CUDA_HOST")]

NAN = float("nan")
OBJECTIVE = Objective(entropy_coef=0.02)


def problem(tokens: int, vocab: int, dtype: torch.dtype = torch.bfloat16):
    gen = torch.Generator().manual_seed(vocab)
    logits = (torch.randn(tokens, vocab, generator=gen) * 3).to(dtype)
    target = torch.randint(0, vocab, (tokens,), generator=gen)
    inputs = {"old_logp": torch.full((tokens,), -8.0), "advantage": torch.linspace(-1.0, 1.5, tokens)}
    return logits, target, inputs


def everything(logits: torch.Tensor, target, inputs) -> list[list[int]]:
    """Return the bits of each row's statistics and gradients, from both ways to a gradient."""
    stats = k.token_stats_fwd(logits, target)
    ones = torch.ones(len(target))
    grad = k.token_stats_bwd(logits, target, stats, ones, -ones)
    step, results, step_grad = k.policy_step(logits, target, OBJECTIVE, inputs)
    outputs = [*stats[:7], *step, *results.values()]
    rows = [[*(bits(x[t])[0] for x in outputs), *bits(grad[t]), *bits(step_grad[t])] for t in range(len(target))]
    return rows


@pytest.fixture(params=[80, 90], ids=["through_l2", "in_a_cluster"])
def arch(request, monkeypatch):
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", str(request.param))
    return request.param


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_a_row_does_not_depend_on_its_batch(dtype: torch.dtype, arch: int):
    logits, target, inputs = problem(6, 5008, dtype)
    whole = everything(logits, target, inputs)
    for rows in (slice(0, 1), slice(2, 5), torch.tensor([5, 0, 5])):
        part = everything(logits[rows], target[rows], {n: x[rows] for n, x in inputs.items()})
        assert part == torch.tensor(whole)[rows].tolist()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("offset", [1, 3, 4, 7])
def test_a_row_does_not_depend_on_where_it_lies(offset: int, dtype: torch.dtype, monkeypatch):
    """Also between multiples of 16 bytes. Rows in a cluster use another order of summation, so they are excluded."""
    monkeypatch.setenv("TOKFUSE_HOST_ARCH", "80")
    logits, target, inputs = problem(4, 5008, dtype)
    moved = torch.full((4, 5008 + 13), NAN, dtype=dtype)[:, offset : offset + 5008]
    moved.copy_(logits)
    assert everything(moved, target, inputs) == everything(logits, target, inputs)


@pytest.mark.parametrize("vocab", [1, 5, 8, 9, 15, 17, 33])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_narrow_rows_that_begin_anywhere(vocab: int, dtype: torch.dtype):
    """The in-place gradient, in aligned vectors, equals the out-of-place gradient, element by element."""
    logits, target, _ = problem(9, vocab, dtype)
    stats = k.token_stats_fwd(logits, target)
    ones = torch.ones(9)
    wide = torch.full((9, vocab + 5), NAN, dtype=dtype)
    beside = k.token_stats_bwd(logits, target, stats, ones, ones, wide[:, 2:-3])
    assert wide[:, :2].isnan().all() and wide[:, -3:].isnan().all()
    over = logits.clone()
    k.token_stats_bwd(over, target, stats, ones, ones, over)
    assert bits(over) == bits(beside)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("bad", [NAN, INF])
def test_nan_and_infinity_poison_their_row_only(bad: float, dtype: torch.dtype, arch: int):
    logits, target, inputs = problem(3, 2100, dtype)
    good = everything(logits, target, inputs)
    logits[1, 77] = bad
    with_bad = everything(logits, target, inputs)
    assert with_bad[0] == good[0] and with_bad[2] == good[2]
    stats, results, grad = k.policy_step(logits, target, OBJECTIVE, inputs)
    assert stats[0][1].isnan() and stats[1][1].isnan() and results["token_loss"][1].isnan()
    assert grad[1].isnan().all()


def test_a_target_or_temperature_out_of_range_poisons_its_row(arch: int):
    logits, _, inputs = problem(5, 300, torch.float32)
    target = torch.tensor([0, 300, -1, 299, 5])
    temperature = torch.tensor([1.0, 1.0, 1.0, 1.0, 0.0])
    stats, results, grad = k.policy_step(logits, target, OBJECTIVE, inputs, temperature=temperature)
    bad = [False, True, True, False, True]
    assert stats[0].isnan().tolist() == bad and results["d_logp"].isnan().tolist() == bad
    assert grad.isnan().all(1).tolist() == bad
    assert stats[1][:4].isfinite().all()
    stats = k.token_stats_fwd(logits, target)
    ones = torch.ones(5)
    grad = k.token_stats_bwd(logits, target, stats, ones, ones)
    assert grad.isnan().all(1).tolist() == [False, True, True, False, False]
    assert k.token_stats_bwd(logits, target, stats, None, ones).isfinite().all()


def test_magnitudes_that_only_a_fill_value_has(arch: int):
    """1e30 in all logits: d = u - m is exact, but u c - m c would not be."""
    logits, target, inputs = problem(3, 2100, torch.float32)
    far = torch.tensor([[1e30], [-1e30], [3e38]]).expand(3, 2100).clone()
    far[:, 7] *= 1 - 1e-6
    stats, _, grad = k.policy_step(far, torch.tensor([5, 5, 5]), OBJECTIVE, inputs)
    entropy = stats[1].double()
    compare(entropy[[0, 2]], torch.full((2,), 2099.0).log(), atol=2e-5)
    assert stats[0].isfinite().all() and grad.isfinite().all()


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [None, 9.0])
def test_second_temperature_and_moments(softcap: float | None, dtype: torch.dtype):
    logits, target, _ = problem(5, 3001, dtype)
    logits[1, 5:900] = -INF
    logits[3] = -INF
    options = {
        "softcap": softcap,
        "temperature": torch.linspace(0.6, 1.8, 5),
        "mask": torch.tensor([True, True, False, True, True]),
    }
    out = k.token_stats_fwd(logits, target, second_temperature=0.7, moments=True, **options)
    plain = k.token_stats_fwd(logits, target, **options)
    for got, want in zip(out[:7], plain[:7], strict=True):
        compare(got, want, atol=2e-6, rtol=2e-6)
    second, p2_logp, p2_logp2 = out[7:]
    u, _ = transformed(logits, 0.7, softcap)
    live = torch.tensor([True, True, False, False, True])
    want = torch.log_softmax(u, 1).gather(1, target[:, None])[:, 0]
    compare(second[live], want[live], atol=2e-5)
    assert second[2] == 0 and second[3] == -INF
    u, _ = transformed(logits, options["temperature"], softcap)
    log_p = torch.log_softmax(u, 1)
    p = log_p.exp()
    log_p = torch.where(p == 0, 0.0, log_p)
    for got, power in ((p2_logp, 1), (p2_logp2, 2)):
        compare(got[live], (p * p * log_p**power).sum(1)[live], rtol=2e-5, what=f"moment {power}")
        assert not got[~live].any()


def test_rows_beyond_two_gigabytes(arch: int):
    """Offsets are 64-bit: the second row starts 2^31 elements after the first."""
    stride, vocab = (1 << 31) + 64, 1003
    logits, target, inputs = problem(2, vocab)
    # Pages that are never touched use no memory.
    places = [torch.empty(stride + vocab, dtype=torch.bfloat16) for _ in range(2)]
    far, grad = (x.as_strided((2, vocab), (stride, 1)) for x in places)
    far.copy_(logits)
    stats, _, got = k.policy_step(far, target, OBJECTIVE, inputs, 1.0, grad)
    want = k.policy_step(logits, target, OBJECTIVE, inputs)
    compare(stats[0], want[0][0], atol=2e-6)
    compare(got, want[2], atol=1e-6, rtol=1e-2)
    state = k.token_stats_fwd(far, target)
    assert bits(state[0]) == bits(k.token_stats_fwd(logits, target)[0])
    ones = torch.ones(2)
    beside = k.token_stats_bwd(logits, target, state, ones, ones)
    assert bits(k.token_stats_bwd(far, target, state, ones, ones, grad)) == bits(beside)
