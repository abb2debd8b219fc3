"""Test the merge of vocabulary shards, on every backend and without processes.

The shards run their row kernels one after the other, and the contents of the all-gather are stacked. Bounds are
those of token_stats. test_distributed.py uses several processes.
"""

import pytest
import torch
from confident_cases import COEFFICIENTS, check, check_statistics, problem
from confident_cases import truth as confident_truth
from harness import ROUNDED_ONCE, backends, compare, half_ulp
from logit_cases import FORWARD_ATOL, GRADIENT_RTOL, truth

import tokfuse
from tokfuse.inspection import doctor
from tokfuse.runtime.backends import cuda_rows, triton_rows
from tokfuse.runtime.core import dispatch
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.distributed import vocab_rows, vocab_shard
from tokfuse.runtime.reference import vocab_parallel as reference

INF = float("inf")
CUTS = {"two": (0, 700, 1001), "uneven": (0, 1, 1, 640, 1000, 1001)}
OPTIONS = {
    "plain": {},
    "scaled": {"temperature": 0.7, "logit_scale": 0.5},
    "softcap": {"softcap": 60.0, "logit_scale": 1.5},
}


class Shard:
    """The columns of a VocabShard, without a group."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop, self.size = start, stop, stop - start

    def owns(self, target: torch.Tensor) -> torch.Tensor:
        return (target >= self.start) & (target < self.stop)


def run(z, y, ga, gh, cuts, mask, options):
    """Return (statistics, gradient), merged from shards."""
    o = LogitOptions(options.get("temperature", 1.0), options.get("softcap"), options.get("logit_scale", 1.0), mask)
    kernels = vocab_rows.row_kernels(z.device, z.dtype, o)
    shards = [Shard(a, b) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    dtype = torch.float64 if z.dtype == torch.float64 else torch.float32
    records = []
    for s in shards:
        if s.size == 0:
            records.append(vocab_shard.empty_record(y, kernels.state.dtype))
            continue
        local = kernels.forward(z[:, s.start : s.stop], vocab_rows.column_of(y, s, 0), **o._asdict())
        records.append(vocab_shard.pack(local[:7], s.owns(y)))
    records = torch.stack(records)
    parts = []
    for rank, s in enumerate(shards):
        merged = vocab_shard.merge(records, rank, kernels.state.nats(o), mask, dtype)
        parts.append(
            vocab_rows.row_backward(
                z[:, s.start : s.stop].contiguous(),
                y,
                o,
                s,
                merged.row_max,
                merged.inv_sum,
                merged.logp,
                merged.entropy,
                ga,
                gh,
            )
        )
    return merged.stats, torch.cat(parts, 1)


def rows(dtype, device):
    """Return difficult rows: peaks and targets on both sides of the cuts, excluded columns, masked rows."""
    gen = torch.Generator().manual_seed(4)
    z = torch.randn(12, 1001, generator=gen) * 3
    z[0, [0, 699, 700, 1000]] = 20.0
    z[1] += 90.0
    z[2, :700] = -INF
    z[3, 640:] = -INF
    z[4] = -INF
    z[5, :690] -= 300.0  # the shard's part underflows and contains the target
    z[6, 300] = 80.0
    y = torch.tensor([700, 5, 800, 3, 9, 2, 300, -5, 0, 1000, 639, 640])
    mask = torch.ones(12, dtype=torch.bool)
    mask[7] = False
    z = z.to(dtype)
    z[7] = float("nan")
    ga, gh = torch.randn(12, generator=gen), torch.randn(12, generator=gen)
    gh[8] = ga[9] = 0.0
    ga[10] = gh[10] = 0.0
    return [x.to(device) for x in (z, y, ga, gh, mask)]


@pytest.mark.parametrize("backend", backends("token_stats"))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("cuts", CUTS)
def test_shards_merge_to_the_whole(backend, dtype, name, cuts):
    if dtype == torch.float64 and backend.name != "reference":
        pytest.skip(f"{backend.name} takes no float64")
    z, y, ga, gh, mask = rows(dtype, backend.device)
    with backend.forced():
        stats, grad = run(z, y, ga, gh, CUTS[cuts], mask, OPTIONS[name])
    want = truth(*(x.cpu() for x in (z, y, ga, gh)), mask=mask.cpu(), **OPTIONS[name])
    exact = backend.name == "reference"
    for field in stats._fields:
        given = ROUNDED_ONCE if exact else {"atol": FORWARD_ATOL, "rtol": FORWARD_ATOL}
        compare(getattr(stats, field), getattr(want, field), **given, what=field)
    bound = (1e-13 if exact else GRADIENT_RTOL) * want.term.reshape(12, -1).amax(1, keepdim=True)
    bound = bound.expand(want.grad.shape) + 1e-30
    if exact:
        bound = bound + half_ulp(want.grad, torch.float32)
    if dtype == torch.bfloat16:  # the interpreter truncates; hardware rounds
        bound = bound + half_ulp(want.grad, dtype) * (2 if backend.name == "triton" else 1)
    compare(grad, want.grad, atol=bound, what="gradient")


@pytest.mark.parametrize("backend", backends("token_stats"))
@pytest.mark.parametrize("cuts", [(0, 1, 150, 300), (0, 299, 300)], ids=["three", "last alone"])
def test_a_confident_token_keeps_its_digits(backend, cuts):
    """Its shard contains only the target, or also a part of the other tokens."""
    z, y = problem(300, torch.float32)
    for ga, gh in COEFFICIENTS.values():
        grads = (backend.put(torch.full((len(z),), x)) for x in (ga, gh))
        with backend.forced():
            stats, grad = run(backend.put(z), backend.put(y), *grads, cuts, None, {})
        want = confident_truth(z, y, ga, gh)
        check_statistics(stats.logp, stats.entropy, want)
        check(grad, want, torch.float32)


@pytest.mark.parametrize("backend", backends("token_stats"))
@pytest.mark.parametrize("poison", [float("nan"), INF])
def test_a_poisoned_shard_poisons_its_row_in_every_shard(backend, poison):
    z, y, ga, gh, mask = rows(torch.float32, backend.device)
    clean = z.clone()
    z[8, 1000] = poison
    ga[:], gh[:] = 1.0, 1.0
    with backend.forced():
        stats, grad = run(z, y, ga, gh, CUTS["uneven"], mask, {})
        before = run(clean, y, ga, gh, CUTS["uneven"], mask, {})
    assert bool(stats.logp[8].isnan()) and bool(stats.entropy[8].isnan())
    assert bool(grad[8].isnan().all())
    keep = torch.arange(12, device=z.device) != 8
    assert torch.equal(grad[keep], before[1][keep])
    for now, then in zip(stats, before[0], strict=True):
        assert torch.equal(now[keep], then[keep])


@pytest.mark.parametrize("backend", backends("token_stats", without="reference"))
def test_one_shard_is_the_op_itself(backend):
    z, y, ga, gh, mask = rows(torch.float32, backend.device)
    with backend.forced():
        stats, _ = run(z, y, ga, gh, (0, 1001), mask, {})
        whole = tokfuse.token_stats(z, y, mask=mask)
    for field in ("entropy", "sum_sq", "top1", "lse"):
        compare(getattr(stats, field), getattr(whole, field), atol=1e-6, rtol=2e-7, what=field)


def test_a_target_that_no_shard_owns_is_nan_where_values_are_not_read():
    z, y, ga, gh, mask = rows(torch.float32, "cpu")
    y[8] = 5000
    stats, _ = run(z, y, ga, gh, CUTS["two"], mask, {})
    assert bool(stats.logp[8].isnan()) and not bool(stats.entropy.isnan().any())


def test_backends_declare_the_unit_of_their_row_maximum():
    """Without the unit, no shard of a backend can be merged with another rank's shard."""
    options = LogitOptions(torch.tensor([0.5, 2.0]), None, 3.0, None)
    capped = options._replace(softcap=9.0)
    assert triton_rows.STATE.nats(options).tolist() == [6.0, 1.5]
    assert triton_rows.STATE.nats(capped).tolist() == [18.0, 4.5]
    assert cuda_rows.STATE.nats(options).tolist() == [6.0, 1.5]
    assert cuda_rows.STATE.nats(capped).tolist() == [2.0, 0.5]
    assert reference.STATE.nats(options) == 1.0
    doctor.import_ops()
    for op in ("token_stats", "linear_token_stats"):
        for backend in dispatch.ORDER:
            assert dispatch._REGISTRY[op][backend].run.state is not None, (op, backend)


@pytest.mark.parametrize("backend", backends("token_stats"))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_row_maximum_is_in_the_declared_unit(backend, name):
    """lse = row_max - log inv_sum, in nats."""
    z, y, _, _, mask = rows(torch.float32, backend.device)
    y = y.clamp(min=0)
    o = LogitOptions(1.0, None, 1.0, mask)._replace(**OPTIONS[name])
    with backend.forced():
        kernels = vocab_rows.row_kernels(z.device, z.dtype, o)
        _, _, lse, _, _, row_max, inv_sum = kernels.forward(z, y, **o._asdict())[:7]
    finite = lse.isfinite() & mask
    again = row_max.double() * kernels.state.nats(o) - inv_sum.double().log()
    assert int(finite.sum()) == 10
    torch.testing.assert_close(again[finite], lse.double()[finite], rtol=0, atol=2e-5)
