"""Test kept_token_stats: it equals token_stats of logits that are -inf outside the support.

Bounds: those of token_stats against float64 (logp, entropy, lse 2e-5 at |logit| <= 100; gradients 2e-6 of
the row's largest term), on every backend.
"""

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import ROUNDED_ONCE, compare, half_ulp, host_backends, thread_counts
from hypothesis import strategies as st

from tokfuse.runtime.core import dispatch
from tokfuse.runtime.ops.kept_token_stats import kept_token_stats
from tokfuse.runtime.ops.token_stats import token_stats

INF = float("inf")


@pytest.fixture(params=host_backends("kept_token_stats"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.backend(request.param):
        yield request.param


def support(sizes, vocab, gen):
    """Return (kept_ids, kept_offsets) with that many random ids in each row, unsorted."""
    ids = [torch.randperm(vocab, generator=gen)[:size] for size in sizes]
    offsets = torch.tensor([0, *sizes]).cumsum(0)
    return torch.cat(ids) if ids else torch.zeros(0, dtype=torch.int64), offsets


def batch(sizes=(1, 7, 50, 2047, 2048, 2049, 4500, 3), vocab=5003, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(len(sizes), vocab, generator=gen) * 3).to(dtype)
    ids, offsets = support(sizes, vocab, gen)
    places = offsets[:-1] + torch.tensor([int(s * 0.7) for s in sizes])
    return logits, ids[places], ids, offsets


def restricted(logits, ids, offsets):
    """Return the same logits, with -inf outside the support."""
    rows = torch.repeat_interleave(torch.arange(logits.shape[0]), offsets.diff())
    out = torch.full_like(logits, -INF)
    out[rows, ids] = logits[rows, ids]
    return out


def truth(logits, target, ids, offsets, **options):
    """Return float64 token_stats of the restricted logits and the gradients of logp, entropy and lse.

    The last result is the size of the entropy gradient's largest term, before p (log p + H) cancels.
    """
    z = restricted(logits.detach().double(), ids, offsets).requires_grad_()
    with dispatch.backend("reference"):
        out = token_stats(z, target, **options)
    kept = [ids[a:b] for a, b in zip(offsets[:-1], offsets[1:], strict=True)]
    found = [bool((row == y).any()) for row, y in zip(kept, target, strict=True)]
    valid = (out.logp > -INF) & torch.tensor(found, dtype=torch.bool)
    summed = out.logp[valid], out.entropy, out.lse[out.lse > -INF]
    grads = [torch.autograd.grad(x.sum(), z, retain_graph=True)[0] for x in summed]
    log_p = torch.where(z == -INF, -1e4, z.detach() - out.lse.detach().nan_to_num().unsqueeze(1))
    size = log_p.clamp(max=0).exp() * (log_p.abs() + out.entropy.detach().unsqueeze(1))
    return out, [torch.where(z == -INF, 0.0, g) for g in grads], size.amax(1, keepdim=True)


def check(logits, target, ids, offsets, rtol=2e-6, atol=1e-9, **options):
    scale = options.get("logit_scale", 1.0) / torch.as_tensor(options.get("temperature", 1.0))
    scale = scale.reshape(-1, 1).double()
    z = logits.clone().requires_grad_()
    out = kept_token_stats(z, target, ids, offsets, **options)
    wanted, grads, term = truth(logits, target, ids, offsets, **options)
    exact = dispatch.forced_backend() == "reference"
    for name in out._fields:
        bound = ROUNDED_ONCE if exact else {"atol": 2e-5}
        compare(getattr(out, name), getattr(wanted, name), **bound, what=name)
    weights = [torch.linspace(*ends, len(target)) for ends in ((-1, 2), (1, -1), (0.5, -2))]
    logp, lse = (torch.where(x > -INF, x, 0.0) for x in (out.logp, out.lse))
    sum(w * x for w, x in zip(weights, (logp, out.entropy, lse), strict=True)).sum().backward()
    want = sum(g * w.double().unsqueeze(1) for g, w in zip(grads, weights, strict=True))
    of_logp, of_entropy, of_lse = (w.abs().unsqueeze(1) for w in weights)
    # If p is near 1, log p + H is a difference of float32 numbers near 0, each rounded at 6e-8.
    bound = atol + scale * (rtol * (of_logp + of_lse) + of_entropy * (rtol * term + 3e-7))
    if exact:
        bound = half_ulp(want, logits.dtype) + half_ulp(want, torch.float32) + 1e-14
    worst = ((z.grad.double() - want).abs() / bound).nan_to_num(INF).amax(1)
    assert (worst <= 1).all(), worst
    outside = restricted(torch.zeros_like(logits), ids, offsets) == -INF
    assert (z.grad[outside] == 0).all()


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "per_token": {"temperature": torch.linspace(0.5, 2.0, 8)},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.3},
    "mask": {"mask": torch.arange(8) % 3 > 0},
    "all": {
        "temperature": torch.linspace(0.5, 2.0, 8),
        "softcap": 4.0,
        "logit_scale": 2.0,
        "mask": torch.arange(8) % 2 == 0,
    },
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_equals_token_stats_of_restricted_logits(options):
    check(*batch(), **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_round_the_gradient_once(dtype):
    check(*batch(dtype=dtype), rtol=torch.finfo(dtype).eps, atol=3e-8)


def test_whole_vocabulary_kept_is_token_stats():
    logits, target, _, _ = batch(vocab=300, sizes=(1, 2, 3))
    ids = torch.arange(300).repeat(3)
    out = kept_token_stats(logits, target, ids, torch.arange(4) * 300)
    plain = token_stats(logits, target)
    for a, b in zip(out, plain, strict=False):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


def test_kept_mass_from_the_two_lse():
    logits, target, ids, offsets = batch()
    out = kept_token_stats(logits, target, ids, offsets)
    mass = (out.lse - token_stats(logits, target).lse).exp()
    p = logits.double().softmax(1)
    want = torch.stack([p[t, ids[offsets[t] : offsets[t + 1]]].sum() for t in range(8)])
    torch.testing.assert_close(mass.double(), want, rtol=1e-5, atol=0)


def test_the_kept_mass_has_a_gradient():
    """A penalty on the probability outside the kept ids, from the two log-sum-exps."""
    logits, target, ids, offsets = batch()
    z = logits.requires_grad_()
    log_mass = kept_token_stats(z, target, ids, offsets).lse - token_stats(z, target).lse
    (grad,) = torch.autograd.grad(log_mass.sum(), z)
    exact = logits.detach().double().requires_grad_()
    log_p = restricted(exact.log_softmax(1), ids, offsets)
    (want,) = torch.autograd.grad(log_p.logsumexp(1).sum(), exact)
    torch.testing.assert_close(grad.double(), want, rtol=1e-5, atol=1e-6)


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_support(data):
    vocab = data.draw(st.integers(1, 12))
    tokens = data.draw(st.integers(0, 4))
    numbers = st.one_of(st.floats(-40, 40, width=32), st.just(-INF))
    rows = [data.draw(st.lists(numbers, min_size=vocab, max_size=vocab)) for _ in range(tokens)]
    kept = [data.draw(st.lists(st.integers(0, vocab - 1), unique=True)) for _ in range(tokens)]
    target = [data.draw(st.integers(0, vocab - 1)) for _ in range(tokens)]
    check(
        torch.tensor(rows).reshape(tokens, vocab),
        torch.tensor(target, dtype=torch.int64),
        torch.tensor([i for row in kept for i in row], dtype=torch.int64),
        torch.tensor([0, *map(len, kept)]).cumsum(0),
    )


def test_target_outside_its_support():
    logits, target, ids, offsets = batch(sizes=(3, 3), vocab=10)
    target[0] = next(i for i in range(10) if i not in ids[:3])
    z = logits.requires_grad_()
    out = kept_token_stats(z, target, ids, offsets)
    assert out.logp[0] == -INF and out.entropy[0] > 0 and out.lse[0] > -INF
    (grad,) = torch.autograd.grad(out.logp.sum(), z, retain_graph=True)
    assert (grad[0] == 0).all() and (grad[1] != 0).any()
    (grad,) = torch.autograd.grad(out.entropy.sum(), z, retain_graph=True)
    assert (grad[0] != 0).any()
    (grad,) = torch.autograd.grad(out.lse.sum(), z)  # p over the kept ids
    torch.testing.assert_close(grad.sum(1), torch.ones(2))


def test_rows_without_a_distribution():
    logits = torch.tensor([[1.0, 2.0], [-INF, -INF], [-INF, 3.0]], requires_grad=True)
    ids, offsets = torch.tensor([0, 1, 0]), torch.tensor([0, 0, 2, 3])
    out = kept_token_stats(logits, torch.tensor([0, 1, 0]), ids, offsets)
    for field in (out.logp, out.lse):
        assert (field == -INF).all()
    assert (out.entropy == 0).all()
    (out.entropy + sum(torch.where(x > -INF, x, 0.0) for x in (out.logp, out.lse))).sum().backward()
    assert (logits.grad == 0).all()


def test_nan_poisons_its_own_row_and_only_where_it_is_kept():
    logits, target, ids, offsets = batch(sizes=(3, 4, 5), vocab=20)
    logits[1, ids[3]] = float("nan")
    outside = next(i for i in range(20) if i not in ids[7:])
    logits[2, outside] = float("nan")
    logits.requires_grad_()
    out = kept_token_stats(logits, target, ids, offsets)
    assert out.entropy[1].isnan() and out.lse[1].isnan()
    for field in out:
        assert field[[0, 2]].isfinite().all()
    (out.logp + out.entropy).sum().backward()
    assert logits.grad[[0, 2]].isfinite().all() and logits.grad[1].isnan().any()


def test_masked_rows_are_not_read():
    logits, target, ids, offsets = batch()
    mask = torch.arange(8) % 2 == 0
    logits[~mask], target[~mask] = float("nan"), -100
    ids[offsets[1] : offsets[2]] = 10**9
    logits.requires_grad_()
    out = kept_token_stats(logits, target, ids, offsets, mask=mask)
    for field in out:
        assert (field[~mask] == 0).all() and field[mask].isfinite().all()
    (out.logp + out.entropy).sum().backward()
    assert logits.grad.isfinite().all() and (logits.grad[~mask] == 0).all()


def test_order_of_the_ids_only_rounds():
    logits, target, ids, offsets = batch()
    out = kept_token_stats(logits, target, ids, offsets)
    ordered = torch.cat([r.sort().values for r in ids.split(offsets.diff().tolist())])
    for a, b in zip(out, kept_token_stats(logits, target, ordered, offsets), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-5)


def test_integer_widths_and_row_strides():
    logits, target, ids, offsets = batch()
    out = kept_token_stats(logits, target, ids, offsets)
    wide = torch.full((8, 5100), float("nan"))
    wide[:, 17:5020] = logits
    for z in (wide[:, 17:5020], logits.t().contiguous().t()):
        again = kept_token_stats(z, target, ids.int(), offsets.int())
        assert all(map(torch.equal, out, again))


def test_zero_tokens():
    empty = torch.zeros(0, dtype=torch.int64)
    z = torch.zeros(0, 5, requires_grad=True)
    out = kept_token_stats(z, empty, empty, torch.zeros(1, dtype=torch.int64))
    assert [x.shape for x in out] == [(0,)] * 3
    (out.logp.sum() + out.entropy.sum()).backward()
    assert z.grad.shape == (0, 5)


def test_gradcheck(backend):
    if backend != "reference":
        pytest.skip("gradcheck needs float64, which only the reference takes")
    logits, target, ids, offsets = batch(sizes=(2, 5, 1), vocab=7, dtype=torch.float64)
    mask = torch.tensor([True, True, False])

    def stats(z):
        return kept_token_stats(z, target, ids, offsets, mask=mask, softcap=5.0, temperature=0.8)

    assert torch.autograd.gradcheck(stats, (logits.requires_grad_(),))


def test_only_one_output_used():
    logits, target, ids, offsets = batch()
    for index, name in enumerate(("logp", "entropy", "lse")):
        z = logits.clone().requires_grad_()
        getattr(kept_token_stats(z, target, ids, offsets), name).sum().backward()
        want = truth(logits, target, ids, offsets)[1][index]
        torch.testing.assert_close(z.grad.double(), want, rtol=1e-4, atol=2e-6)


def test_a_row_does_not_depend_on_batch_or_threads(backend):
    if backend == "reference":
        pytest.skip("torch's scatter kernels promise nothing here")
    logits, target, ids, offsets = batch(sizes=(300,) * (8 if backend == "triton" else 40), vocab=2000)
    before, results = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            z = logits.clone().requires_grad_()
            out = kept_token_stats(z, target, ids, offsets)
            (out.logp + out.entropy).sum().backward()
            results.append((*out, z.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    part = kept_token_stats(logits[5:7], target[5:7], ids[1500:2100], torch.tensor([0, 300, 600]))
    assert all(torch.equal(a[5:7], b) for a, b in zip(results[0][:3], part, strict=True))


Z, Y = torch.zeros(2, 4), torch.zeros(2, dtype=torch.int64)
IDS, OFFSETS = torch.tensor([0, 1, 0]), torch.tensor([0, 2, 3])
REFUSALS = [
    ((Z, Y, IDS.float(), OFFSETS), {}, "kept_ids must be of dtype int32 or int64"),
    ((Z, Y, IDS, OFFSETS[:2]), {}, r"kept_offsets must be of shape \(3,\) to match tokens \+ 1"),
    ((Z, Y, IDS[:2], OFFSETS), {}, r"kept_offsets must be a prefix sum from 0 to kept_ids.numel\(\) = 2; got 0 to 3"),
    ((Z, Y, IDS, OFFSETS.flip(0)), {}, "kept_offsets must be a prefix sum from 0"),
    ((Z, Y, IDS, torch.tensor([0, 4, 3])), {}, "kept_offsets must be non-decreasing"),
    ((Z, Y, IDS + 3, OFFSETS), {}, r"kept_ids must be in \[0, 4\) .*got 4 in row 0"),
    ((Z, Y, IDS - 1, OFFSETS), {}, r"kept_ids must be in \[0, 4\) .*got -1 in row 0"),
    ((Z, Y, IDS * 0, OFFSETS), {}, "kept_ids must be different .*got 0 twice in row 0"),
    ((Z, Y + 4, IDS, OFFSETS), {}, r"target must be in \[0, 4\) .*got 4 in row 0"),
    ((Z, Y, IDS, OFFSETS), {"temperature": torch.zeros(2)}, "temperature must be > 0 in every row"),
    ((Z, Y, IDS, OFFSETS), {"temperature": 0.0}, "temperature must be a finite number"),
    ((Z, Y, IDS, OFFSETS), {"softcap": -1.0}, "softcap must be a finite number"),
    ((Z, Y, IDS, OFFSETS), {"mask": Y}, "mask must be of dtype bool"),
    ((Z[0], Y, IDS, OFFSETS), {}, "logits must be two-dimensional"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^kept_token_stats: {message}"):
        kept_token_stats(*args, **kwargs)


def test_the_kernel_checks_what_it_indexes_by(backend):
    if backend != "cpu":
        pytest.skip("about the native module")
    from tokfuse.runtime.backends import row_args
    from tokfuse.runtime.core import native
    from tokfuse.runtime.core.logit_options import LogitOptions

    module = native.loaded()
    logits = row_args.logits_args(module, Z, Y, LogitOptions(1.0, None, 1.0, None))
    logp, entropy, lse, row_max, inv_sum = (torch.zeros(2) for _ in range(5))
    out = row_args.token_stats_out(module, row_args.RowStats(logp, entropy, lse, row_max=row_max, inv_sum=inv_sum))
    for offsets, num_ids in ((OFFSETS, 2), (OFFSETS + 1, 3), (torch.tensor([0, 4, 3]), 3)):
        with pytest.raises(ValueError, match="offsets must"):
            module.kept_token_stats_fwd(row_args.kept_args(module, logits, IDS[:num_ids], offsets), out)
