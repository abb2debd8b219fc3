"""token_stats and linear_token_stats with ids and top_k, on every backend against float64 formulas.

Bounds: those of token_stats. logp_at 2e-5 nats at |logit| <= 100; gradients within 2e-6 of the row's
largest term; 16-bit gradients are rounded once, so half an ulp more; a confident id keeps its digits.
"""

import functools

import numpy as np
import pytest
import torch
from confident_cases import OPTIONS as CONFIDENT_OPTIONS
from confident_cases import STEPS, problem, rtol_of
from confident_cases import truth as confident_truth
from harness import FLOAT_DTYPES, ROUNDED_ONCE, Backend, backends, bits, compare, half_ulp
from head_cases import HeadCase, peak_growth
from logit_cases import CASES, FORWARD_ATOL, GRADIENT_RTOL, INF, Case, coefficients, transformed, truth
from torch import Tensor

import tokfuse
from tokfuse.runtime.reference import token_stats_at as reference

WIDTH = 7


@pytest.fixture(params=backends("token_stats_at"))
def backend(request):
    with request.param.forced():
        yield request.param


def some_ids(logits: Tensor, target: Tensor, width: int = WIDTH) -> Tensor:
    """(tokens, width): the likeliest, the target, duplicates, padding, any others."""
    tokens, vocab = logits.shape
    ids = torch.randint(0, vocab, (tokens, width), generator=torch.Generator().manual_seed(vocab))
    if tokens and width >= 5:
        ids[:, 0] = logits.float().argmax(1)
        ids[::2, 1] = target[::2]
        ids[:, 3] = ids[:, 2]
        ids[1::2, 4] = -1
    return ids


def incoming(ids: Tensor) -> Tensor:
    """d loss / d logp_at: both signs, and rows with none."""
    g = torch.cos(torch.arange(ids.numel()) * 0.9).view(ids.shape)
    g[torch.arange(len(ids)) % 4 == 1] = 0.0
    return g


def truth_at(logits: Tensor, ids: Tensor, g: Tensor, mask: Tensor | None = None, **options):
    """(logp_at, its gradient, each row's largest term) in float64."""
    u, slope = transformed(logits, **options)
    keep = torch.ones(len(u), dtype=torch.bool) if mask is None else mask
    dead = (u == -INF).all(1, keepdim=True)
    usable = keep.unsqueeze(1) & ~dead
    u = torch.where(usable, u, 0.0)
    log_p = torch.log_softmax(u, 1)
    counts = keep.unsqueeze(1) & (ids >= 0)
    places = torch.where(counts, ids, 0)
    logp_at = torch.where(counts, torch.where(dead, -INF, log_p.gather(1, places)), 0.0)
    g = torch.where(counts, g.double(), 0.0)
    onehot = torch.zeros_like(u).scatter_add_(1, places, g)
    size = torch.zeros_like(u).scatter_add_(1, places, g.abs())
    p, slope = log_p.exp(), torch.where(usable, slope, 0.0)
    grad = slope * (onehot - p * g.sum(1, keepdim=True))
    slope_term = 0.0 if options.get("softcap") is None else 0.1 * options.get("logit_scale", 1.0)
    term = (slope + slope_term) * (size + p * g.abs().sum(1, keepdim=True))
    return logp_at, grad, term.amax(1, keepdim=True)


def lse_gradient(logits: Tensor, gl: Tensor, mask: Tensor | None = None, **options) -> Tensor:
    """Gradient of sum gl lse in float64; 0 in rows without a distribution."""
    u, slope = transformed(logits, **options)
    usable = (u != -INF).any(1, keepdim=True)
    usable = usable if mask is None else usable & mask.unsqueeze(1)
    grad = gl.double().unsqueeze(1) * slope * torch.where(usable, u, 0.0).softmax(1)
    return torch.where(usable, grad, 0.0)


def evaluate(backend: Backend, logits, target, ids, g, ga=None, gh=None, gl=None, **options):
    """(statistics, gradient of the logits) of one call; ga, gh, gl are gradients of logp, entropy, lse."""
    z = backend.put(logits).detach().requires_grad_()
    options = {name: backend.put(value) for name, value in options.items()}
    out = tokfuse.token_stats(z, backend.put(target), ids=backend.put(ids), **options)
    given = [(out.logp_at, g), (out.logp, ga), (out.entropy, gh), (out.lse, gl)]
    given = [(x, backend.put(dx.to(x.dtype))) for x, dx in given if dx is not None]
    torch.autograd.backward([x for x, _ in given], [dx for _, dx in given])
    return out, z.grad


def check(backend: Backend, logits, target, ids=None, **options) -> None:
    """One call against the float64 formulas: logp_at alone, then with logp, entropy and lse."""
    ids = some_ids(logits, target) if ids is None else ids
    g, (ga, gh) = incoming(ids), coefficients(len(logits))
    # An excluded logit has a log-prob of -inf: no loss sends a finite gradient there.
    logp_at, _, _ = truth_at(logits, ids, g, **options)
    g = torch.where(logp_at == -INF, 0.0, g)
    _, grad_at, term_at = truth_at(logits, ids, g, **options)
    gl = 0.5 * ga.flip(0)
    stats = truth(logits, target, ga, gh, **options)
    of_lse = lse_gradient(logits, gl, **options)
    grad_stats = grad_at + stats.grad + of_lse
    term_stats = term_at + stats.term + of_lse.abs().amax(1, keepdim=True)
    exact = backend.name == "reference"
    for with_stats in (False, True):
        out, grad = evaluate(backend, logits, target, ids, g, *((ga, gh, gl) if with_stats else ()), **options)
        want, term = (grad_stats, term_stats) if with_stats else (grad_at, term_at)
        assert out.logp_at.dtype == torch.float32 and out.logp_at.shape == ids.shape and out.top_ids is None
        compare(out.logp_at, logp_at, **(ROUNDED_ONCE if exact else {"atol": FORWARD_ATOL}), what="logp_at")
        for name in ("logp", "entropy", "lse"):
            compare(getattr(out, name), getattr(stats, name), atol=FORWARD_ATOL, what=name)
        atol = (1e-14 if exact else GRADIENT_RTOL) * term
        if exact or logits.dtype != torch.float32:
            atol = atol + half_ulp(want, logits.dtype)
        if exact and logits.dtype != torch.float32:  # torch rounds float64 to 16 bits by way of float32
            atol = atol + half_ulp(want, torch.float32)
        assert grad.dtype == logits.dtype
        compare(grad, want, atol=atol, what="gradient")


CASE = {case.name: case for case in CASES}
# For kernels that are simulated: one column, a tail, no rows, a confident id that is not the target,
# -inf, a dead row, rows that begin anywhere, strides, every option.
SOME_CASES = (
    "vocab_1",
    "vocab_17",
    "no_tokens",
    "one_large_is_not_target",
    "one_row_excluded",
    "every_second_column",
    "mask_some_excluded",
)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("case", [c for c in CASES if c.vocab <= 5003], ids=lambda c: c.name)
@pytest.mark.parametrize("every", backends("token_stats_at", interpreted=False, hosted=False))
def test_every_difficult_row(every: Backend, case: Case, dtype: torch.dtype):
    logits, target, options = case.make(dtype)
    with every.forced():
        check(every, logits, target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", SOME_CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype, backend: Backend):
    logits, target, options = CASE[name].make(dtype)
    check(backend, logits, target, **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bias_logits_are_subtracted(dtype: torch.dtype, backend: Backend):
    gen = torch.Generator().manual_seed(2)
    logits, bias = torch.randn(2, 5, 700, generator=gen).mul(3).to(dtype)
    target = torch.tensor([3, 5, 699, 0, 77])
    check(backend, logits, target, bias_logits=bias, bias_scale=0.5, temperature=1.3)
    check(backend, logits, target, bias_logits=bias, softcap=8.0)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
@pytest.mark.parametrize("option", CONFIDENT_OPTIONS)
@pytest.mark.parametrize("is_target", [True, False], ids=["target", "other"])
def test_a_confident_id_keeps_its_digits(backend: Backend, dtype, option, is_target):
    """p = 1 - 10^-k: log p and the gradient 1 - p are within 2e-6 of themselves, target or not."""
    options = CONFIDENT_OPTIONS[option]
    z, sure = problem(300, dtype, **options)
    target = sure if is_target else (sure + 11) % 300
    ids = torch.stack([(sure + 5) % 300, sure, sure, torch.full_like(sure, -1)], 1)
    g = torch.tensor([0.0, 0.75, 0.25, 9.0]).expand(len(STEPS), 4)
    want = confident_truth(z, sure, 1.0, 0.0, **options)
    out, grad = evaluate(backend, z, target, ids, g, **options)
    rtol = rtol_of(options, backend.name)
    for column in (1, 2):
        compare(out.logp_at[:, column], want.logp, rtol=rtol, what="logp_at")
    bound = rtol * want.term.expand(want.grad.shape)
    if dtype != torch.float32:
        bound = bound + 2 * half_ulp(want.grad, dtype)
    compare(grad, want.grad, atol=bound, what="gradient")


def test_lse_alone_has_a_gradient(backend: Backend):
    logits, target, _ = CASE["temperature"].make(torch.float32)
    gl = torch.tensor([1.0, -2.0, 0.0, 3.0, 0.5])
    z = backend.put(logits).requires_grad_()
    tokfuse.token_stats(z, backend.put(target), ids=backend.put(some_ids(logits, target))).lse.backward(backend.put(gl))
    want = lse_gradient(logits, gl)
    compare(z.grad, want, atol=GRADIENT_RTOL * want.abs().amax(1, keepdim=True), what="gradient")


def test_what_arrives_elsewhere_reaches_a_confident_id(backend: Backend):
    """At p = 1 - 1e-7, the gradient p G of the other ids is below the rounding of their sum with its own."""
    z, sure = problem(300, torch.float32)
    ids = torch.stack([(sure + 5) % 300, sure, (sure + 9) % 300], 1)
    g = torch.tensor([3e-8, 1.0, 2e-8]).expand(len(sure), 3)
    _, grad = evaluate(backend, z, sure, ids, g)
    with tokfuse.backend("reference"):
        leaf = z.double().requires_grad_()
        tokfuse.token_stats(leaf, sure, ids=ids).logp_at.backward(g.double())
    term = leaf.grad.abs().amax(1, keepdim=True) + 5e-8  # before p G is subtracted
    compare(grad, leaf.grad, atol=GRADIENT_RTOL * term, what="gradient")


def test_the_statistics_are_those_of_token_stats_to_the_bit(backend: Backend):
    logits, target, options = CASE["one_large_is_not_target"].make(torch.float32)
    z, y = backend.put(logits), backend.put(target)
    plain = tokfuse.token_stats(z, y)
    out = tokfuse.token_stats(z, y, ids=backend.put(some_ids(logits, target)))
    for name in plain._fields:
        assert bits(getattr(plain, name)) == bits(getattr(out, name)), name


def test_offsets_give_what_padding_gives(backend: Backend):
    logits, target, _ = CASE["temperature"].make(torch.float32)
    ids = some_ids(logits, target)
    sizes = torch.tensor([0, 7, 3, 1, 5])
    padded = torch.where(torch.arange(WIDTH) < sizes.unsqueeze(1), ids, -1)
    flat = ids[torch.arange(WIDTH) < sizes.unsqueeze(1)]
    g = incoming(padded)
    want, want_grad = evaluate(backend, logits, target, padded, g)
    inside = torch.arange(WIDTH) < sizes.unsqueeze(1)
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    z = backend.put(logits).requires_grad_()
    out = tokfuse.token_stats(
        z, backend.put(target), ids=backend.put(flat.int()), ids_offsets=backend.put(offsets.int())
    )
    out.logp_at.backward(backend.put(g[inside]))
    assert bits(out.logp_at) == bits(want.logp_at.cpu()[inside])
    compare(z.grad, want_grad, rtol=1e-6, atol=1e-9)


def test_a_row_with_far_more_ids_than_the_others(backend: Backend):
    logits, target, _ = CASE["temperature"].make(torch.float32)
    sizes = torch.tensor([2, 300, 0, 1, 5])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)])
    ids = torch.randint(-1, logits.shape[1], (308,), generator=torch.Generator().manual_seed(0))
    grads = []
    for name, dtype in (("reference", torch.float64), (backend.name, torch.float32)):
        z = backend.put(logits.to(dtype)).detach().requires_grad_()
        with tokfuse.backend(name):
            out = tokfuse.token_stats(z, backend.put(target), ids=backend.put(ids), ids_offsets=backend.put(offsets))
            out.logp_at.backward(backend.put(torch.cos(torch.arange(308) * 0.9).to(out.logp_at.dtype)))
        grads.append(z.grad.cpu())
    compare(grads[1], grads[0], atol=1e-5 * grads[0].abs().amax(1, keepdim=True) + 1e-30, what="gradient")


def test_rows_do_not_depend_on_their_batch_and_repeat_to_the_bit(backend: Backend):
    logits, target, _ = CASE["padded_rows"].make(torch.float32)
    ids = some_ids(logits, target)
    g = incoming(ids)
    out, grad = evaluate(backend, logits, target, ids, g)
    again, grad_again = evaluate(backend, logits, target, ids, g)
    one, grad_one = evaluate(backend, logits[2:3].contiguous(), target[2:3], ids[2:3], g[2:3])
    assert bits(out.logp_at) == bits(again.logp_at) and bits(grad) == bits(grad_again)
    assert bits(out.logp_at[2:3]) == bits(one.logp_at) and bits(grad[2:3]) == bits(grad_one)


def test_a_poisoned_row_stays_alone(backend: Backend):
    logits, target, _ = CASE["temperature"].make(torch.float32)
    bad = logits.clone()
    bad[2, 7], bad[3, 9] = float("nan"), INF
    ids = some_ids(logits, target)
    g = torch.ones(ids.shape)
    want, want_grad = evaluate(backend, logits, target, ids, g)
    out, grad = evaluate(backend, bad, target, ids, g)
    clean = torch.tensor([True, True, False, False, True])
    assert bits(out.logp_at[clean]) == bits(want.logp_at[clean])
    assert bits(grad[clean]) == bits(want_grad[clean])
    counts = ids[~clean] >= 0
    assert out.logp_at[~clean].cpu()[counts].isnan().all() and grad[~clean].isnan().all()


def test_rows_that_nothing_arrives_at_are_not_read(backend: Backend):
    if backend.name == "reference":
        pytest.skip("plain torch reads every row")
    logits, target, _ = CASE["temperature"].make(torch.float32)
    bad = logits.clone()
    bad[1] = float("nan")
    ids = some_ids(logits, target)
    g = torch.ones(ids.shape)
    g[1] = 0.0
    g[1, ids[1] == -1] = 1.0  # padding
    _, grad = evaluate(backend, bad, target, ids, g)
    assert not grad[1].any() and grad.isfinite().all()


def test_coefficients_that_cancel_leave_their_ids(backend: Backend):
    """The sum of what arrives is 0, so that only the ids have a gradient."""
    logits, target, _ = CASE["temperature"].make(torch.float32)
    ids = torch.tensor([[1, 2]]).expand(len(target), 2).contiguous()
    g = torch.tensor([[1.0, -1.0]]).expand(len(target), 2)
    _, grad = evaluate(backend, logits, target, ids, g)
    want = torch.zeros_like(logits)
    want[:, 1:3] = g
    assert torch.equal(grad.cpu(), want)


@pytest.mark.parametrize("width", [0, 1, 140])
def test_any_number_of_ids(backend: Backend, width: int):
    logits, target, _ = CASE["vocab_17"].make(torch.float32)
    check(backend, logits, target, some_ids(logits, target, width))


def test_top_k(backend: Backend):
    logits, target, options = CASE["mask"].make(torch.float32)
    mask = options["mask"]
    z = backend.put(logits).requires_grad_()
    out = tokfuse.token_stats(z, backend.put(target), top_k=5, softcap=30.0, mask=backend.put(mask))
    top = logits.topk(5).indices
    assert torch.equal(out.top_ids.cpu(), torch.where(mask.unsqueeze(1), top, -1))
    given, want_grad = evaluate(backend, logits, target, top, incoming(top), softcap=30.0, mask=mask)
    assert bits(out.logp_at) == bits(given.logp_at)
    out.logp_at.backward(backend.put(incoming(top)))
    assert bits(z.grad) == bits(want_grad)
    assert (out.logp_at.diff(dim=1) <= 0).all()


def test_top_k_is_of_what_is_left_after_the_bias(backend: Backend):
    logits = torch.tensor([[3.0, 2.0, 1.0, -INF]])
    bias = torch.tensor([[0.0, 0.0, -4.0, -9.0]])
    given = {name: backend.put(x) for name, x in (("logits", logits), ("bias_logits", bias))}
    out = tokfuse.token_stats(**given, target=backend.put(torch.tensor([0])), top_k=4)
    assert out.top_ids.tolist() == [[2, 0, 1, 3]] and out.logp_at[0, 3] == -INF


REFUSED = {
    "float": ({"ids": torch.zeros(3, 2)}, "ids must be of dtype int32 or int64; got float32"),
    "shape": ({"ids": torch.zeros(2, 2, dtype=torch.int64)}, r"ids must be of shape \(3, K\), or \(ids,\)"),
    "flat": ({"ids": torch.zeros(3, dtype=torch.int64)}, r"ids must be of shape \(3, K\), or \(ids,\)"),
    "device": ({"ids": torch.zeros(3, 2, dtype=torch.int64, device="meta")}, "ids must be on cpu"),
    "high": ({"ids": torch.tensor([[0], [9], [0]])}, r"ids must be in \[0, 9\), or -1 for padding.*got 9 in row 1"),
    "low": ({"ids": torch.tensor([[0], [0], [-2]])}, r"ids must be in \[0, 9\), or -1 for padding.*got -2 in row 2"),
    "offsets": (
        {"ids": torch.tensor([1]), "ids_offsets": torch.tensor([0, 1, 1, 2])},
        r"ids_offsets must be a prefix sum from 0 to ids.numel\(\) = 1; got 0 to 2",
    ),
    "no_ids": ({"ids_offsets": torch.tensor([0, 1, 1, 2])}, "ids_offsets must be left out without ids"),
    "both": ({"ids": torch.zeros(3, 2, dtype=torch.int64), "top_k": 2}, "top_k must be left out with ids"),
    "no_k": ({"top_k": 0}, r"top_k must be a whole number in \[1, vocab = 9\]; got 0"),
    "large_k": ({"top_k": 10}, r"top_k must be a whole number in \[1, vocab = 9\]; got 10"),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
def test_refusals(op: str, name: str, backend: Backend, monkeypatch):
    monkeypatch.setenv("TOKFUSE_CHECK", "1")
    if name == "device" and backend.device != "cpu":
        pytest.skip("the message names the device")
    given, message = REFUSED[name]
    given = {key: x if name == "device" else backend.put(x) for key, x in given.items()}
    target = backend.put(torch.tensor([0, 1, 2]))
    rows = (torch.zeros(3, 9),) if op == "token_stats" else (torch.zeros(3, 4), torch.zeros(9, 4))
    with pytest.raises(ValueError, match=f"{op}: {message}"):
        getattr(tokfuse, op)(*map(backend.put, rows), target, **given)


@pytest.mark.parametrize("op", ["token_stats", "linear_token_stats"])
def test_top_k_with_a_target_or_temperature_out_of_range(op: str, backend: Backend, monkeypatch):
    monkeypatch.setenv("TOKFUSE_CHECK", "1")
    rows = (torch.zeros(2, 9),) if op == "token_stats" else (torch.zeros(2, 4), torch.zeros(9, 4))
    call = functools.partial(getattr(tokfuse, op), *map(backend.put, rows), top_k=2)
    with pytest.raises(ValueError, match=rf"{op}: target must be in \[0, 9\).*got 9 in row 1"):
        call(backend.put(torch.tensor([0, 9])))
    with pytest.raises(ValueError, match=f"{op}: temperature must be > 0.*got 0.0 in row 0"):
        call(backend.put(torch.tensor([0, 1])), temperature=backend.put(torch.tensor([0.0, 1.0])))


def test_top_k_is_any_integer(backend: Backend):
    z, target = backend.put(torch.arange(6.0).view(2, 3)), backend.put(torch.tensor([0, 1]))
    assert torch.equal(tokfuse.token_stats(z, target, top_k=np.int64(2)).top_ids.cpu(), torch.tensor([[2, 1]] * 2))


def test_a_masked_row_may_hold_any_id(backend: Backend):
    mask = torch.tensor([True, False])
    ids = torch.tensor([[1], [99]])
    out, grad = evaluate(backend, torch.zeros(2, 4), torch.tensor([0, -100]), ids, torch.ones(2, 1), mask=mask)
    assert out.logp_at[1] == 0 and not grad[1].any() and grad[0].any()


@pytest.mark.parametrize("extra", [{"moments": True}, {"second_temperature": 0.5}], ids=str)
def test_ids_and_the_optional_statistics_are_two_calls(extra):
    with pytest.raises(ValueError, match="must be left out with ids or top_k"):
        tokfuse.token_stats(torch.zeros(1, 4), torch.tensor([0]), ids=torch.tensor([[1]]), **extra)


# -------------------------------------------------------------------------------- from hidden states


HEAD_TOKENS, HEAD_VOCAB = 11, 130


def head_case(dtype: torch.dtype = torch.float32) -> HeadCase:
    """A head that simulated kernels go through in a second."""
    gen = torch.Generator().manual_seed(3)
    return HeadCase(
        torch.randn(HEAD_TOKENS, 8, generator=gen).to(dtype),
        torch.randn(HEAD_VOCAB, 8, generator=gen).to(dtype),
        torch.randn(HEAD_VOCAB, generator=gen).to(dtype),
        torch.randint(0, HEAD_VOCAB, (HEAD_TOKENS,), generator=gen),
    )


FOUR_ROWS = 3_000  # bytes of logits


def head_loss(out, weights):
    return sum((x.nan_to_num(0, 0, 0) * w.to(x)).sum() for x, w in zip(out, weights, strict=True))


def check_head(backend: Backend, case: HeadCase, *, top_k=None, frozen=False, **options) -> None:
    """Against the composition of the same formulas in float64."""
    gen = torch.Generator().manual_seed(5)
    vocab, tokens = case.weight.shape[0], len(case.target)
    ids = torch.randint(-1, vocab, (tokens, WIDTH), generator=gen)
    ids[:, 3] = ids[:, 2]
    width = WIDTH if top_k is None else top_k
    weights = [torch.randn(*shape, generator=gen) for shape in ((tokens, width), (tokens,), (tokens,))]
    for w in weights:
        w[torch.arange(tokens) % 3 == 1] = 0.0  # rows of no gradient
    results = []
    for exact in (True, False):
        given = {name: getattr(case, name) for name in ("hidden", "weight", "bias")}
        given = {name: backend.put(x.double() if exact else x).detach() for name, x in given.items()}
        for name, x in given.items():
            x.requires_grad_(not frozen or name == "hidden")
        given |= {name: backend.put(x) for name, x in options.items() if not (exact and name == "memory_budget")}
        given |= {"ids": backend.put(ids)} if top_k is None else {"top_k": top_k}
        with tokfuse.backend("reference" if exact else backend.name):
            out = tokfuse.linear_token_stats(target=backend.put(case.target), **given)
            head_loss((out.logp_at, out.entropy, out.lse), weights).backward()
        results.append((out, {n: given[n].grad for n in ("hidden", "weight", "bias")}))
    (want, want_grads), (out, grads) = results
    if top_k is not None:
        assert torch.equal(want.top_ids, out.top_ids)
    for name in ("logp_at", "logp", "entropy", "lse"):
        compare(getattr(out, name), getattr(want, name), atol=FORWARD_ATOL, what=name)
    for name, grad in grads.items():
        if frozen and name != "hidden":
            assert grad is None
            continue
        wanted = want_grads[name].cpu()
        atol = 1e-5 * wanted.abs().amax() + (half_ulp(wanted, grad.dtype) if grad.dtype != torch.float32 else 0.0)
        if grad.dtype != torch.float32 and backend.name in ("triton", "cuda"):
            atol = atol + 4e-3 * wanted.abs().amax()  # the gradient of the logits is rounded for the GEMMs
        compare(grad, wanted, atol=atol, what=name)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_linear(dtype: torch.dtype, backend: Backend):
    check_head(backend, head_case(dtype))


HEAD_OPTIONS = {
    "chunks": {"memory_budget": FOUR_ROWS},
    "temperatures": {"temperature": torch.linspace(0.6, 1.8, HEAD_TOKENS), "softcap": 9.0, "logit_scale": 0.8},
    "mask": {"mask": torch.arange(HEAD_TOKENS) % 4 != 2, "memory_budget": FOUR_ROWS},
    "frozen": {"frozen": True},
    "top_k": {"top_k": 6, "memory_budget": FOUR_ROWS, "mask": torch.arange(HEAD_TOKENS) % 4 != 2},
}


@pytest.mark.parametrize("name", HEAD_OPTIONS)
def test_linear_options(name: str, backend: Backend):
    check_head(backend, head_case(), **HEAD_OPTIONS[name])


def test_linear_with_offsets_and_no_tokens(backend: Backend):
    case = head_case()
    given = [backend.put(x) for x in (case.hidden, case.weight, case.target)]
    ids = torch.randint(0, HEAD_VOCAB, (HEAD_TOKENS, 3), generator=torch.Generator().manual_seed(1))
    want = tokfuse.linear_token_stats(*given, ids=backend.put(ids))
    offsets = backend.put(torch.arange(HEAD_TOKENS + 1) * 3)
    flat = tokfuse.linear_token_stats(*given, ids=backend.put(ids.view(-1)), ids_offsets=offsets)
    assert bits(flat.logp_at) == bits(want.logp_at)
    none = tokfuse.linear_token_stats(given[0][:0], given[1], given[2][:0], ids=backend.put(ids[:0]))
    assert none.logp_at.shape == (0, 3) and none.logp.shape == (0,)


def test_linear_ids_in_a_16_bit_head_under_autocast(backend: Backend):
    case = head_case()
    given = [backend.put(x) for x in (case.hidden, case.weight, case.target)]
    ids = backend.put(torch.arange(HEAD_TOKENS * 3).view(HEAD_TOKENS, 3))
    plain = tokfuse.linear_token_stats(*given, ids=ids)
    with torch.autocast(backend.device, torch.bfloat16):
        under = tokfuse.linear_token_stats(*given, ids=ids)
    assert bits(plain.logp_at) == bits(under.logp_at)


def test_linear_rows_that_nothing_arrives_at_enter_no_product(backend: Backend):
    """NaN hidden states there would reach the gradient of the weight."""
    if backend.name == "reference":
        pytest.skip("plain torch multiplies every row")
    case = head_case()
    hidden = case.hidden.clone()
    hidden[2] = float("nan")
    weight = backend.put(case.weight).clone().requires_grad_()
    ids = torch.zeros(HEAD_TOKENS, 2, dtype=torch.int64)
    ids[2, 1] = -1
    out = tokfuse.linear_token_stats(backend.put(hidden), weight, backend.put(case.target), ids=backend.put(ids))
    g = torch.ones(HEAD_TOKENS, 2)
    g[2, 0] = 0.0  # and 1 at padding
    out.logp_at.backward(backend.put(g))
    assert weight.grad.isfinite().all() and weight.grad.any()


PEAK = """
y = torch.zeros(tokens, dtype=torch.int64)
for given in ({"ids": torch.zeros(tokens, 16, dtype=torch.int64)}, {"top_k": 16}):
    out = tokfuse.linear_token_stats(h, w, y, memory_budget=8 << 20, **given)
    out.logp_at.sum().backward()
"""


def test_peak_memory_does_not_grow_with_the_tokens():
    """1024 rows of 30000 float32 logits are 117 MiB; the workspace holds 8 MiB of them."""
    assert peak_growth(PEAK) < 40


# ------------------------------------------------------------------------------ the reference itself


def test_reference_in_float64_is_the_formula_and_passes_gradcheck():
    z = torch.randn(4, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 3, 3], [6, -1, 2], [1, 1, 1], [5, 4, -1]])
    options = {
        "mask": torch.tensor([True, True, False, True]),
        "softcap": 4.0,
        "logit_scale": 1.2,
        "temperature": torch.tensor([0.7, 1.0, 2.0, 1.5], dtype=torch.float64),
    }
    y = torch.tensor([0, 2, 6, 3])
    g = incoming(ids).double()
    leaf = z.clone().requires_grad_()
    out = reference.forward(leaf, y, ids.view(-1), torch.arange(5) * 3, **options)[5].view(4, 3)
    logp_at, grad, _ = truth_at(z, ids, g, **options)
    out.backward(g)
    compare(out, logp_at, atol=1e-13)
    compare(leaf.grad, grad, atol=1e-13)
    for field in ("logp_at", "lse"):
        call = lambda x: getattr(tokfuse.token_stats(x, y, ids=ids, **options), field)  # noqa: B023, E731
        assert torch.autograd.gradcheck(call, (leaf,))
    h, w = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.randn(7, 3, dtype=torch.float64)
    w.requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: tokfuse.linear_token_stats(*x, y, ids=ids).logp_at, (h, w))
    assert tokfuse.token_stats(z, y, ids=ids).logp_at.dtype == torch.float64
