"""Test cross_entropy on every backend against torch's function in float64.

Bounds: those of token_stats, 2e-5 nats in log p and the log-sum-exp, so 2e-5 in the loss of a token. Gradients within
2e-6 of the row's largest term. 16-bit gradients are rounded once.
"""

import pytest
import torch
import torch.nn.functional as F
from harness import Backend, backends, bits, compare, half_ulp
from logit_cases import INF

import tokfuse

V = 2100
DTYPES = [torch.float32, torch.bfloat16]
SMOOTHING = [0.0, 0.15, 1.0]


@pytest.fixture(params=backends("cross_entropy"))
def backend(request):
    with request.param.forced():
        yield request.param


def batch(tokens: int = 5, vocab: int = V, dtype: torch.dtype = torch.float32):
    gen = torch.Generator().manual_seed(tokens + vocab)
    logits = (torch.randn(tokens, vocab, generator=gen) * 4).to(dtype)
    logits[0, 7 % vocab] = 60.0  # a confident row
    target = torch.randint(0, vocab, (tokens,), generator=gen)
    target[0] = 7 % vocab
    target[1] = -100
    return logits, target, torch.rand(vocab, generator=gen) + 0.1


def truth(logits, target, weight, z_loss, reduction, **options):
    """Return the loss of torch in float64, with the z-loss, and the gradient of its logits."""
    z = logits.double().requires_grad_()
    w = None if weight is None else weight.double()
    losses = F.cross_entropy(z, target, w, reduction="none", **options)
    counts = target != options.get("ignore_index", -100)
    losses = losses + torch.where(counts, z_loss * z.logsumexp(-1) ** 2, 0.0)
    share = counts.double() if w is None else torch.where(counts, w[target.clamp_min(0)], 0.0)
    loss = {"none": losses, "sum": losses.sum(), "mean": losses.sum() / share.sum()}[reduction]
    if z_loss == 0.0:
        compare(loss, F.cross_entropy(z, target, w, reduction=reduction, **options), rtol=1e-14)
    loss.backward(factor(loss))
    return loss, z.grad


def factor(loss: torch.Tensor) -> torch.Tensor:
    return torch.cos(torch.arange(loss.numel())).reshape(loss.shape).to(loss)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smoothing", SMOOTHING)
@pytest.mark.parametrize(
    ("weighted", "z_loss", "reduction"),
    [(False, 0.0, "mean"), (True, 0.3, "none"), (True, 0.0, "mean"), (False, 0.1, "sum")],
)
def test_values_and_gradients_are_those_of_torch(weighted, z_loss, reduction, smoothing, dtype, backend: Backend):
    logits, target, weight = batch(dtype=dtype)
    weight = weight if weighted else None
    options = {"label_smoothing": smoothing}
    want, want_grad = truth(logits, target, weight, z_loss, reduction, **options)
    z = backend.put(logits.clone()).requires_grad_()
    loss = tokfuse.cross_entropy(
        z, backend.put(target), backend.put(weight), z_loss=z_loss, reduction=reduction, **options
    )
    assert loss.dtype == torch.float32
    lse = float(logits.double().logsumexp(-1).max())  # the error of lse^2 grows with it
    compare(loss, want, atol=2e-5 * (1 + 2 * z_loss * lse) * (5 if reduction == "sum" else 1))
    loss.backward(backend.put(factor(loss.detach().cpu())))
    term = want_grad.abs().amax(1, keepdim=True) + 2 * z_loss * lse + 1.0
    compare(z.grad, want_grad, atol=2e-6 * term + (half_ulp(want_grad, dtype) if dtype != torch.float32 else 0.0))
    assert bits(z.grad[1]) == bits(torch.zeros_like(z.grad[1]))


@pytest.mark.parametrize("vocab", [1, 33, 4099])
@pytest.mark.parametrize("cap", [None, 20.0])
def test_options_of_the_logits(cap, vocab: int, backend: Backend):
    """temperature per row, softcap, scale, a mask and rows that begin at any element."""
    logits, target, weight = batch(vocab=vocab + 3)
    logits, weight, target = logits[:, 3:], weight[3:], target.clamp(max=vocab - 1)
    temperature = torch.linspace(0.5, 1.5, 5)
    mask = torch.tensor([True, True, False, True, True])
    x = logits.double().requires_grad_()
    u = x * 0.5 if cap is None else cap * torch.tanh(x * 0.5 / cap)
    labels = torch.where(mask, target, -100)
    given = {"label_smoothing": 0.3, "reduction": "sum"}
    want = F.cross_entropy(u / temperature.double().unsqueeze(1), labels, weight.double(), **given)
    want.backward()
    wide = backend.put(torch.cat([torch.full((5, 3), float("nan")), logits], 1)).requires_grad_()
    loss = tokfuse.cross_entropy(
        wide[:, 3:],
        backend.put(target),
        backend.put(weight),
        temperature=backend.put(temperature),
        softcap=cap,
        logit_scale=0.5,
        mask=backend.put(mask),
        **given,
    )
    compare(loss, want, atol=1e-4, rtol=1e-6)
    loss.backward()
    compare(wide.grad[:, 3:], x.grad, atol=5e-6)


def test_excluded_logits_make_the_smoothed_loss_infinite_as_in_torch(backend: Backend):
    logits, target, _ = batch()
    logits[3, 40:60] = logits[2, 2099] = -INF
    z, x = backend.put(logits.clone()).requires_grad_(), logits.double().requires_grad_()
    loss = tokfuse.cross_entropy(z, backend.put(target), label_smoothing=0.1, reduction="none")
    want = F.cross_entropy(x, target, label_smoothing=0.1, reduction="none")
    compare(loss, want, atol=2e-5)
    assert loss[2] == loss[3] == INF
    plain = tokfuse.cross_entropy(z, backend.put(target), reduction="none")
    compare(plain, F.cross_entropy(x, target, reduction="none"), atol=2e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_row_that_counts(smoothing: float, backend: Backend):
    logits, target, weight = (backend.put(x) for x in batch())
    none = torch.full_like(target, -100)
    for z, y in ((logits, none), (logits[:0], none[:0])):
        z = z.clone().requires_grad_()
        loss = tokfuse.cross_entropy(z, y, weight, label_smoothing=smoothing, z_loss=0.1)
        assert loss.isnan() and F.cross_entropy(z, y, weight).isnan()
        total = tokfuse.cross_entropy(z, y, weight, label_smoothing=smoothing, z_loss=0.1, reduction="sum")
        total.backward()
        assert total == 0.0 and not z.grad.any()


def test_leading_dimensions_and_single_rows():
    logits, target, _ = batch(6, 50)
    flat = tokfuse.cross_entropy(logits, target, label_smoothing=0.1, reduction="none")
    shaped = tokfuse.cross_entropy(logits.view(2, 3, 50), target.view(2, 3), label_smoothing=0.1, reduction="none")
    assert shaped.shape == (2, 3) and bits(shaped) == bits(flat)
    one = tokfuse.cross_entropy(logits[0], target[0], label_smoothing=0.1)
    assert one.shape == () and bits(one) == bits(flat[0])
    assert (
        tokfuse.cross_entropy(logits, target, ignore_index=int(target[0]), mask=target != -100, reduction="none")[0]
        == 0
    )


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("first", [float("nan"), -2.0, 0.0])
def test_class_weights_of_any_value_give_what_torch_gives(first: float, smoothing: float, backend: Backend):
    logits, target = torch.randn(4, 5, generator=torch.Generator().manual_seed(3)), torch.tensor([1, 0, -100, 2])
    weight = torch.tensor([first, 1.0, -0.5, 2.0, 0.0])
    for reduction in ("none", "mean"):
        z, x = backend.put(logits.clone()).requires_grad_(), logits.double().requires_grad_()
        given = {"label_smoothing": smoothing, "reduction": reduction}
        loss = tokfuse.cross_entropy(z, backend.put(target), backend.put(weight), **given)
        want = F.cross_entropy(x, target, weight.double(), **given)
        compare(loss, want, atol=2e-5)
        loss.sum().backward()
        want.sum().backward()
        compare(z.grad[[0, 3]], x.grad[[0, 3]], atol=5e-6)  # torch's gradient of the ignored row is NaN, too
        assert not z.grad[2].any()


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_a_target_out_of_range_is_an_error_of_this_op(smoothing: float, grad: bool, backend: Backend, monkeypatch):
    monkeypatch.setenv("TOKFUSE_CHECK", "1")  # reads the targets on a GPU
    put, target = backend.put, backend.put(torch.tensor([1, 5, -100]))
    logits, hidden = (put(torch.zeros(3, n)).requires_grad_(grad) for n in (5, 2))
    with pytest.raises(ValueError, match=r"^cross_entropy: target must be in \[0, 5\).*got 5 in row 1"):
        tokfuse.cross_entropy(logits, target, label_smoothing=smoothing)
    with pytest.raises(ValueError, match=r"^linear_cross_entropy: target must be in \[0, 5\).*got 5 in row 1"):
        tokfuse.linear_cross_entropy(hidden, put(torch.zeros(5, 2)), target, label_smoothing=smoothing)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_errors_inside_torch_compile_name_this_op(smoothing: float):
    target = torch.tensor([1, 5, -100])
    with tokfuse.backend("cpu"):
        for op, inputs in (
            (tokfuse.cross_entropy, (torch.zeros(3, 5),)),
            (tokfuse.linear_cross_entropy, (torch.zeros(3, 2), torch.zeros(5, 2))),
        ):
            compiled = torch.compile(op, backend="aot_eager", fullgraph=True)
            with pytest.raises(ValueError, match=rf"^{op.__name__}: target must be in \[0, 5\).*got 5 in row 1"):
                compiled(*inputs, target, label_smoothing=smoothing)


def test_second_derivatives_are_an_error_of_this_op():
    logits = torch.zeros(3, 5, requires_grad=True)
    loss = tokfuse.cross_entropy(logits, torch.tensor([1, 2, -100]))
    with pytest.raises(ValueError, match="^cross_entropy: create_graph must be False"):
        torch.autograd.grad(loss, logits, create_graph=True)


def test_the_target_may_not_be_a_distribution():
    logits, target, _ = batch(4, 9)
    with pytest.raises(ValueError, match=r"class probabilities.*tokfuse\.paired_divergence"):
        tokfuse.cross_entropy(logits, logits.softmax(-1))
    with pytest.raises(ValueError, match=r"class probabilities.*tokfuse\.linear_paired_divergence"):
        tokfuse.linear_cross_entropy(torch.ones(4, 3), torch.ones(9, 3), logits.softmax(-1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduction": "batchmean"}, "reduction"),
        ({"label_smoothing": 1.5}, "label_smoothing"),
        ({"z_loss": -1.0}, "z_loss"),
        ({"weight": torch.ones(8)}, "weight"),
        ({"weight": torch.ones(9, requires_grad=True)}, "detached"),
        ({"ignore_index": None}, "ignore_index"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_errors_name_the_argument(options, message):
    with pytest.raises(ValueError, match=message):
        tokfuse.cross_entropy(torch.zeros(2, 9), torch.tensor([0, 1]), **options)


# ------------------------------------------------------------------------- several losses, one pass


def test_token_stats_gives_cross_entropy_z_loss_entropy_and_a_policy_term_at_once(backend: Backend):
    """lse is differentiable beside logp and entropy, so one forward and one backward serve all of them."""
    logits, target, _ = batch()
    mask = target != -100
    labels = torch.where(mask, target, 0)
    old, advantage = torch.linspace(-6.0, -1.0, 5), torch.linspace(-1.0, 1.0, 5)

    def loss(logp, entropy, lse, put):
        ratio = (logp - put(old).to(logp)).exp().clamp(0.8, 1.2)
        return (-logp + 0.1 * lse.square() - 0.2 * entropy - put(advantage).to(logp) * ratio).sum()

    z, x = backend.put(logits.clone()).requires_grad_(), logits.double().requires_grad_()
    stats = tokfuse.token_stats(z, backend.put(labels), mask=backend.put(mask))
    total = loss(stats.logp, stats.entropy, stats.lse, backend.put)
    total.backward()
    log_p = x.log_softmax(-1)
    rows = [log_p.gather(-1, labels.unsqueeze(1)).squeeze(1), -(log_p.exp() * log_p).sum(-1), x.logsumexp(-1)]
    want = loss(*(torch.where(mask, r, 0.0) for r in rows), lambda t: t)
    want.backward()
    compare(total, want, atol=1e-3)
    compare(z.grad, x.grad, atol=2e-5)
