"""Test paired_divergence against float64 definitions and closed-form gradients, on every backend.

Bounds: values 2e-6 absolute and relative. Gradients 4e-6 of the row's largest term p (1 + |log(p / q)|),
because the sum over a row cancels.
"""

import math
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from harness import ROUNDED_ONCE, compare, half_ulp, host_backends, thread_counts
from hypothesis import strategies as st

from tokfuse.runtime.core import dispatch
from tokfuse.runtime.core.codes import DIVERGENCES, SKEW
from tokfuse.runtime.ops.paired_divergence import paired_divergence

KINDS = DIVERGENCES
INF = float("inf")


@pytest.fixture(params=host_backends("paired_divergence"), autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with dispatch.backend(request.param):
        yield request.param


def batch(tokens=6, vocab=5003, scale=3.0, apart=1.0, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    p = torch.randn(tokens, vocab, generator=gen) * scale
    q = p + torch.randn(tokens, vocab, generator=gen) * apart
    return p.to(dtype), q.to(dtype)


def log_probs(z, temperature=1.0, softcap=None, logit_scale=1.0):
    u, slope = z.double() * logit_scale, torch.full_like(z, logit_scale, dtype=torch.float64)
    if softcap is not None:
        t = torch.tanh(torch.where(u == -INF, 0.0, u) / softcap)
        u, slope = torch.where(u == -INF, -INF, softcap * t), slope * (1 - t * t)
    divisor = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    return torch.log_softmax(u / divisor, -1), slope / divisor


def truth(p, q, kind="jsd", beta=0.5, alpha=0.1, **options):
    """Return (divergence, its gradient, size of the gradient's largest term), in float64."""
    (log_p, slope), (log_q, _) = log_probs(p, **options), log_probs(q, **options)
    p, q = log_p.exp(), log_q.exp()
    mix = {"skew_forward": alpha * q + (1 - alpha) * p, "skew_reverse": alpha * p + (1 - alpha) * q}.get(
        kind, beta * q + (1 - beta) * p
    )

    def centred(s):
        return torch.where(p == 0, 0.0, p * (s - torch.where(p == 0, 0.0, p * s).sum(-1, keepdim=True)))

    def kl(a, b):
        return torch.where(a == 0, 0.0, a * (a / b).log()).sum(-1, keepdim=True)

    gap = torch.where(p == 0, 0.0, log_p - log_q)
    if kind == "kl_forward":
        value, grad = kl(q, p), p - q
    elif kind == "kl_reverse":
        value = kl(p, q)
        grad = torch.where(p == 0, 0.0, p * (gap - value))
    elif kind == "skew_forward":
        value, grad = kl(q, mix), centred(-(1 - alpha) * q / mix)
    elif kind == "skew_reverse":
        value, grad = kl(p, mix), centred((p / mix).log() - alpha * p / mix)
    elif kind == "tvd":
        value, grad = 0.5 * (p - q).abs().sum(-1, keepdim=True), centred(0.5 * torch.sign(p - q))
    else:
        value = beta * kl(q, mix) + (1 - beta) * kl(p, mix)
        grad = (1 - beta) * torch.where(p == 0, 0.0, p * ((p / mix).log() - kl(p, mix)))
    term = slope * (torch.maximum(p, q) + p * gap.abs())
    return value.squeeze(-1), slope * grad, term.amax(-1, keepdim=True)


def jumps(p, q, weight, kind, **options):
    """What the gradient of "tvd" may be off by: the p of all entries with |log(p / q)| < 1e-5."""
    (log_p, slope), (log_q, _) = log_probs(p, **options), log_probs(q, **options)
    tied = torch.where((log_p - log_q).abs() < 1e-5, log_p.exp(), 0.0)
    shares = tied + log_p.exp() * tied.sum(-1, keepdim=True)
    return slope * shares * weight.abs().unsqueeze(1)


def check(p, q, rtol=4e-6, atol=1e-9, mask=None, **options):
    z = p.clone().requires_grad_()
    out = paired_divergence(z, q, mask=mask, **options)
    keep = torch.ones(len(p), dtype=torch.bool) if mask is None else mask
    value, grad, term = truth(p, q, **options)
    exact = dispatch.forced_backend() == "reference"
    compare(out, torch.where(keep, value, 0.0), **(ROUNDED_ONCE if exact else {"rtol": 2e-6, "atol": 2e-6}))
    weight = torch.linspace(-1, 2, len(p)) if len(p) > 1 else torch.ones(len(p))
    (out * weight).sum().backward()
    want = torch.where(keep.unsqueeze(1), grad * weight.double().unsqueeze(1), 0.0)
    bound = atol + rtol * term * weight.abs().unsqueeze(1)
    if options.get("kind") == "tvd":  # s jumps where p = q: entries that rounding puts on either side
        bound = bound + jumps(p, q, weight, **options)
    if exact:
        bound = half_ulp(want, z.dtype) + half_ulp(want, torch.float32) + 1e-13 * term
    compare(z.grad, want, atol=bound, what="gradient")


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "per_token": {"temperature": torch.linspace(0.5, 2.0, 6)},
    "softcap": {"softcap": 4.0},
    "scale": {"logit_scale": 0.3},
    "mask": {"mask": torch.arange(6) % 3 > 0},
    "all": {
        "temperature": torch.linspace(0.5, 2.0, 6),
        "softcap": 4.0,
        "logit_scale": 2.0,
        "mask": torch.arange(6) % 2 == 0,
    },
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_against_float64(kind, options):
    check(*batch(), kind=kind, **options)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("apart", [0.1, 10.0])
def test_weights_of_the_mixture(beta, apart):
    check(*batch(apart=apart), beta=beta)


@pytest.mark.parametrize("kind", SKEW)
@pytest.mark.parametrize("alpha", [1e-4, 0.1, 0.9, 0.999])
@pytest.mark.parametrize("apart", [0.1, 10.0])
def test_weights_of_the_skew(kind, alpha, apart):
    check(*batch(apart=apart), kind=kind, alpha=alpha)


def test_skew_kinds_are_the_kls_in_the_limit():
    p, q = batch(apart=0.5)
    for skew, kl in zip(SKEW, ("kl_forward", "kl_reverse"), strict=True):
        torch.testing.assert_close(
            paired_divergence(p, q, kind=skew, alpha=1e-6), paired_divergence(p, q, kind=kl), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_inputs_round_the_gradient_once(kind, dtype):
    check(*batch(dtype=dtype), kind=kind, rtol=torch.finfo(dtype).eps, atol=6e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("vocab", [1, 2, 15, 17, 2047, 2048, 2049, 6145])
@pytest.mark.parametrize("apart", [1e-3, 30.0])
def test_widths_and_distances(kind, vocab, apart):
    check(*batch(4, vocab, apart=apart), kind=kind)


@pytest.mark.parametrize("kind", KINDS)
def test_close_rows_keep_relative_precision(kind, backend):
    """At a distance of 1e-4 the divergence is 1e-9, far below the rounding of the log-probs."""
    p, q = batch(vocab=2000, apart=1e-4)
    out = paired_divergence(p, q, kind=kind)
    assert (out > 0).all()
    compare(out, truth(p, q, kind)[0], rtol=1e-5 if backend == "reference" else 0.02)


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_zero_where_the_streams_are_equal(kind, backend):
    p, q = batch(vocab=3001, scale=20.0)
    q[[0, 2]] = p[[0, 2]]
    p[2, 5:900] = q[2, 5:900] = -INF
    z = p.requires_grad_()
    for options in ({}, {"temperature": 0.37}, {"softcap": 3.0}):
        out = paired_divergence(z, q, kind=kind, **options)
        assert (out[[0, 2]] == 0).all() and (out >= 0).all() and out.sum() > 0
        (grad,) = torch.autograd.grad(out.sum(), z)
        limit = 1e-15 if backend == "reference" else 0.0  # autograd's p sums to 1 + 1e-16
        assert grad[[0, 2]].abs().max() <= limit and grad.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_middling_distance(kind):
    """Divergences of 3e-6 to 3e-2 in one batch: a KL below 1e-4 is computed by the second pass."""
    p, q = batch(8, 1500)
    steps = torch.tensor([3e-3, 5e-3, 7e-3, 1e-2, 2e-2, 3e-2, 0.1, 0.3]).unsqueeze(1)
    check(p, p + (q - p) * steps + 7.0, kind=kind)


LIMITS = [("jsd", {"beta": beta}, -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)) for beta in (0.1, 0.5, 0.7)]
LIMITS += [(kind, {"alpha": alpha}, -math.log(alpha)) for kind in SKEW for alpha in (0.1, 0.7)]
LIMITS += [("tvd", {}, 1.0)]


@pytest.mark.parametrize(("kind", "weight", "limit"), LIMITS)
def test_a_bounded_divergence_attains_its_bound(kind, weight, limit):
    p, q = torch.zeros(3, 400), torch.zeros(3, 400)
    p[0, :200], q[0, 200:] = -INF, -INF
    p[1, 3], q[1, 4] = 1e4, 1e4
    out = paired_divergence(p, q, kind=kind, **weight)
    assert (out <= limit * (1 + 1e-6)).all() and out[2] == 0
    wanted = torch.full((2,), limit, dtype=torch.float64)
    compare(out[:2], wanted, atol=1e-6, rtol=1e-6)
    if weight == {"beta": 0.5}:
        assert (out <= math.log(2) + 6e-8).all()


def test_jsd_is_symmetric_at_one_half_and_swaps_with_beta():
    p, q = batch()
    for a, b in ((0.5, 0.5), (0.2, 0.8)):
        torch.testing.assert_close(
            paired_divergence(p, q, beta=a), paired_divergence(q, p, beta=b), rtol=2e-6, atol=2e-6
        )


def test_forward_and_reverse_are_each_other_swapped():
    p, q = batch()
    torch.testing.assert_close(paired_divergence(p, q, kind="kl_forward"), paired_divergence(q, p, kind="kl_reverse"))


def test_forward_kl_is_the_target_against_the_learner():
    p, q = torch.tensor([[0.0, 0.0]]), torch.tensor([[math.log(0.9), math.log(0.1)]])
    want = 0.9 * math.log(1.8) + 0.1 * math.log(0.2)
    assert abs(float(paired_divergence(p, q, kind="kl_forward")) - want) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_entries_excluded_in_both_streams_count_for_nothing(kind):
    p, q = batch(3, 900)
    out = paired_divergence(p, q, kind=kind)
    wide_p, wide_q = torch.full((3, 2700), -INF), torch.full((3, 2700), -INF)
    wide_p[:, 700:1600], wide_q[:, 700:1600] = p, q
    z = wide_p.requires_grad_()
    wide = paired_divergence(z, wide_q, kind=kind)
    torch.testing.assert_close(out, wide, rtol=2e-6, atol=2e-7)
    wide.sum().backward()
    assert (z.grad[:, :700] == 0).all() and z.grad.isfinite().all()


def test_an_entry_excluded_by_one_stream_only():
    p = torch.tensor([[0.0, 1.0, -INF], [0.0, 1.0, 2.0]], requires_grad=True)
    # Excluded: p's logits where both are kept. KL(P || Q) of a restriction has no gradient there.
    q = torch.tensor([[0.0, 1.5, 2.0], [0.0, 1.5, -INF]])
    forward = paired_divergence(p, q, kind="kl_forward")
    reverse = paired_divergence(p, q, kind="kl_reverse")
    bounded = {kind: paired_divergence(p, q, kind=kind) for kind in KINDS if not kind.startswith("kl")}
    assert forward[0] == INF and 0 < forward[1] < INF
    assert reverse[1] == INF and 0 < reverse[0] < INF
    for out, row in ((forward, 0), (reverse, 1)):
        (grad,) = torch.autograd.grad(out.sum(), p)
        assert (grad[row] == 0).all() and (grad[1 - row] != 0).any() and grad.isfinite().all()
    for kind, out in bounded.items():
        value, wanted, _ = truth(p.detach(), q, kind)
        torch.testing.assert_close(out.detach().double(), value, rtol=2e-6, atol=0)
        (grad,) = torch.autograd.grad(out.sum(), p)
        torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_without_a_distribution_and_poisoned_rows(kind):
    p, q = batch(5, 3000)
    p[1], q[2] = -INF, -INF
    p[3, 2500], q[4, 7] = float("nan"), INF
    z = p.requires_grad_()
    out = paired_divergence(z, q, kind=kind)
    assert out[1] == 0 and out[2] == 0 and out[0] > 0
    assert out[3].isnan() and out[4].isnan()
    out.sum().backward()
    assert (z.grad[1:3] == 0).all() and z.grad[0].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_any_magnitude(kind):
    p, q = batch(vocab=300)
    out = paired_divergence(p + 3e4, q - 3e4, kind=kind)
    torch.testing.assert_close(out, paired_divergence(p, q, kind=kind), rtol=0.02, atol=1e-3)
    p[0, :100], q[0, :100] = -3e38, -3e38  # a mask that uses the lowest finite number
    assert paired_divergence(p, q, kind=kind).isfinite().all()
    if not kind.startswith("kl"):  # in one of the two only, as an excluded entry
        p[1, :100], q[2, :100] = -3e38, -3e38
        check(p[1:], q[1:], kind=kind)


def test_masked_rows_are_not_read():
    p, q = batch()
    mask = torch.arange(6) % 2 == 0
    p[~mask], q[~mask] = float("nan"), INF
    z = p.requires_grad_()
    out = paired_divergence(z, q, mask=mask, temperature=torch.where(mask, 1.0, float("nan")))
    assert (out[~mask] == 0).all() and (out[mask] > 0).all()
    out.sum().backward()
    assert (z.grad[~mask] == 0).all() and z.grad.isfinite().all()


@hypothesis.given(st.data())
@hypothesis.settings(suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture])
def test_any_pair_of_rows(data):
    vocab, tokens = data.draw(st.integers(1, 12)), data.draw(st.integers(0, 3))
    numbers = st.floats(-60, 60, width=32, allow_subnormal=False)
    row = st.lists(numbers, min_size=vocab, max_size=vocab)
    p, q = (torch.tensor([data.draw(row) for _ in range(tokens)]).reshape(tokens, vocab) for _ in range(2))
    excluded = data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab))
    if not all(excluded):
        p[:, excluded], q[:, excluded] = -INF, -INF
    kind = data.draw(st.sampled_from(KINDS))
    check(p, q, kind=kind, rtol=1e-5, atol=1e-6)


def test_row_strides():
    p, q = batch()
    out = paired_divergence(p, q)
    wide = torch.full((6, 5100), float("nan"))
    wide[:, 17:5020] = p
    for z in (wide[:, 17:5020], p.t().contiguous().t()):
        torch.testing.assert_close(paired_divergence(z, q), out, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind, backend):
    if backend != "reference":
        pytest.skip("gradcheck needs float64, which only the reference takes")
    p, q = batch(3, 7, dtype=torch.float64)
    p[0, 3] = q[0, 3] = -INF
    mask = torch.tensor([True, True, False])

    def divergence(z):
        return paired_divergence(z, q, kind=kind, mask=mask, softcap=6.0, temperature=0.8)

    finite = p.clone()
    finite[0, 3] = 0.0

    def without_excluded(z):
        z = torch.where(p == -INF, p, z)
        return divergence(z)

    assert torch.autograd.gradcheck(without_excluded, (finite.requires_grad_(),))


def test_a_row_does_not_depend_on_batch_or_threads(backend):
    if backend == "reference":
        pytest.skip("torch's own reductions promise nothing here")
    p, q = batch(8 if backend == "triton" else 40, 1500)
    before, results = torch.get_num_threads(), []
    try:
        for threads in thread_counts():
            torch.set_num_threads(threads)
            z = p.clone().requires_grad_()
            out = paired_divergence(z, q)
            out.sum().backward()
            results.append((out, z.grad))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))
    assert torch.equal(paired_divergence(p[5:7], q[5:7]), results[0][0][5:7])


Z = torch.zeros(2, 4)
REFUSALS = [
    ((Z, Z[:1]), {}, r"logits_q must be \(2, 4\) torch.float32 like logits_p"),
    ((Z, Z.bfloat16()), {}, r"logits_q must be \(2, 4\) torch.float32 like logits_p"),
    ((Z[0], Z), {}, "logits_p must be two-dimensional"),
    ((Z[:, :0], Z[:, :0]), {}, "logits_p must be at least one column wide"),
    ((Z, Z.clone().requires_grad_()), {}, r"logits_q must be free of gradient \(only P learns\)"),
    ((Z, Z), {"kind": "kl"}, f"kind must be one of {', '.join(DIVERGENCES)}; got 'kl'"),
    ((Z, Z), {"beta": 0.0}, r"beta must be in \(0, 1\); got 0.0"),
    ((Z, Z), {"beta": 1.0}, r"beta must be in \(0, 1\); got 1.0"),
    ((Z, Z), {"kind": "kl_forward", "beta": 0.1}, 'beta must be left out with kind="kl_forward"'),
    ((Z, Z), {"kind": "skew_forward", "beta": 0.1}, 'beta must be left out with kind="skew_forward"'),
    ((Z, Z), {"kind": "skew_forward", "alpha": 0.0}, r"alpha must be in \(0, 1\); got 0.0"),
    ((Z, Z), {"kind": "skew_reverse", "alpha": 1.0}, r"alpha must be in \(0, 1\); got 1.0"),
    ((Z, Z), {"alpha": 0.2}, 'alpha must be left out with kind="jsd"'),
    ((Z, Z), {"kind": "tvd", "alpha": 0.2}, 'alpha must be left out with kind="tvd"'),
    ((Z, Z), {"temperature": 0.0}, "temperature must be a finite number"),
    ((Z, Z), {"temperature": torch.zeros(2)}, "temperature must be > 0 in every row .* in row 0"),
    ((Z, Z), {"softcap": -1.0}, "softcap must be a finite number"),
    ((Z, Z), {"mask": torch.ones(2)}, "mask must be of dtype bool"),
]


@pytest.mark.parametrize(("args", "kwargs", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(args, kwargs, message):
    with pytest.raises(ValueError, match=f"^paired_divergence: {message}"):
        paired_divergence(*args, **kwargs)


def test_a_target_stream_that_requires_grad_is_taken_without_grad_mode():
    with torch.no_grad():
        assert (paired_divergence(Z, Z.clone().requires_grad_()) == 0).all()
