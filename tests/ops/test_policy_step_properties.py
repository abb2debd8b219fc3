"""Test policy_step and policy_step_: every objective and option against the composition of simple ops.

On a kernel, loss, metrics and statistics are bitwise those of the composition. Gradients agree within 2e-6
of the row's largest entry; 16-bit gradients within half an ulp more.
"""

import pytest
import torch
from harness import FLOAT_DTYPES, ROUNDED_ONCE, Backend, assert_untouched, backends, bits, compare, half_ulp
from policy_cases import LENGTHS, SHAPES

import tokfuse
from tokfuse import KL, Objective, TargetRatio
from tokfuse.runtime.policy.objective import LEVELS

TOKENS, VOCAB, HIDDEN = sum(LENGTHS), 2100, 12


@pytest.fixture(params=backends("policy_step", interpreted=False, hosted=False))
def backend(request):
    with request.param.forced():
        yield request.param


def problem(dtype: torch.dtype = torch.float32, kl: bool = False, signal: bool = False):
    """Return (logits, keywords): log-ratios on both sides of the clips, zero advantages, masked tokens."""
    gen = torch.Generator().manual_seed(17)

    def rand(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=gen)

    logits = (rand(TOKENS, VOCAB) * 2).to(dtype)
    target = torch.randint(0, VOCAB, (TOKENS,), generator=gen)
    old = logits.float().log_softmax(1).gather(1, target[:, None])[:, 0] + 0.3 * rand(TOKENS)
    advantage, mask = rand(TOKENS), torch.arange(TOKENS) % 7 != 2
    advantage[5::6] = 0.0
    keywords = {
        "target": target,
        "old_logp": old,
        "advantage": advantage,
        "mask": mask,
        "cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).int(),
        "normalizer": 4.0,
    }
    if kl:
        keywords["ref_logp"] = old + 0.2 * rand(TOKENS)
    if signal:
        keywords["signal"] = torch.rand(TOKENS, generator=gen)
    return logits, keywords


STATS = ("temperature", "softcap", "logit_scale", "mask")


def composed(logits, objective, **keywords):
    """Return (loss record, statistics, d loss / d logits) of policy_loss over token_stats with autograd."""
    z = logits.detach().clone().requires_grad_()
    inputs = dict(keywords)
    options = {k: inputs.pop(k) for k in STATS if k in inputs and k != "mask"}
    stats = tokfuse.token_stats(z, inputs.pop("target"), mask=inputs.get("mask"), **options)
    out = tokfuse.policy_loss(stats.logp, entropy=stats.entropy, objective=objective, **inputs)
    out.loss.backward()
    return out, stats, z.grad


def same(backend: Backend, fused, simple, what: str):
    """Check bitwise equality, with two exceptions.

    On a device the fused kernel sums a row in larger tiles. The reference rounds the float64 composition once.
    """
    if backend.name == "reference":
        compare(fused, simple, **ROUNDED_ONCE, what=what)
    elif backend.name in ("cuda", "triton"):
        scale = float(simple.double().nan_to_num(0, 0, 0).abs().max()) if simple.numel() else 0.0
        compare(fused, simple, atol=2e-6 * max(1.0, scale), what=what)
    else:
        assert bits(fused) == bits(simple), what


def doubled(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def check(backend: Backend, logits, objective, **keywords):
    logits = backend.put(logits)
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    step = tokfuse.policy_step(logits=logits, objective=objective, **keywords)
    given = logits, keywords
    if backend.name == "reference":
        given = logits.double(), {k: doubled(v) for k, v in keywords.items()}
    loss, stats, grad = composed(given[0], objective, **given[1])
    same(backend, step.loss, loss.loss, "loss")
    same(backend, step.token_loss, loss.token_loss, "token_loss")
    if backend.name == "reference":  # computed from the rounded loss
        compare(step.loss_sum, loss.loss_sum, rtol=4 * ROUNDED_ONCE["rtol"])
    else:
        same(backend, step.loss_sum, loss.loss_sum, "loss_sum")
    assert bits(step.count) == bits(loss.count)
    same(backend, step.metrics.sums, loss.metrics.sums, "metrics")
    for name, fused, simple in zip(stats._fields, step.stats, stats, strict=True):
        same(backend, fused, simple, name)
    atol = 2e-6 * grad.double().abs().amax(1, keepdim=True).cpu()
    if logits.dtype != torch.float32:
        atol = atol + half_ulp(grad.cpu(), logits.dtype)
    compare(step.grad_logits, grad, atol=atol)
    rows = step.grad_logits.abs().amax(1) > 0
    assert int(rows.sum()) == int(step.metrics.sums[-1])
    return step


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", SHAPES)
def test_every_objective_equals_the_composition(shape: str, level: str, backend: Backend):
    logits, keywords = problem(kl=True, signal=SHAPES[shape].needs_signal)
    objective = Objective(shape=SHAPES[shape], level=level, kl=KL(coef=0.05), aggregation="seq_mean_token_mean")
    check(backend, logits[:, :300].clone(), objective, **keywords | {"target": keywords["target"] % 300})


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_dtypes_and_entropy_bonus(dtype: torch.dtype, level: str, backend: Backend):
    logits, keywords = problem(dtype)
    step = check(backend, logits, Objective(level=level, entropy_coef=0.02), **keywords)
    assert step.grad_logits.dtype == dtype and step.loss.dtype == torch.float32


OPTIONS = {
    "temperature": 0.8,
    "softcap": 6.0,
    "logit_scale": 0.5,
    "temperature_rows": torch.linspace(0.5, 1.5, TOKENS),
    "token_weight": torch.linspace(0.0, 2.0, TOKENS),
    "kl_weight": torch.linspace(0.0, 1.0, TOKENS),
    "entropy_weight": torch.linspace(1.0, 0.0, TOKENS),
    "ref_logp": torch.full((TOKENS,), -5.0),
    "signal": torch.linspace(-2.0, 2.0, TOKENS),
    "normalizer": 9.0,
    "normalizer_batch": "batch",
    "mask": torch.arange(TOKENS) % 2 == 0,
    "old_logp": torch.full((TOKENS,), -6.0),
    "advantage": torch.linspace(-1.0, 1.0, TOKENS),
    "cu_seqlens": torch.tensor([0, 11, 22]).int(),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_honoured(name: str, backend: Backend):
    logits, keywords = problem(kl=True, signal=True)
    objective = Objective(shape=TargetRatio(), kl=KL(coef=0.1), entropy_coef=0.1, aggregation="seq_mean_token_mean")
    plain = check(backend, logits, objective, **keywords)
    key = name.removesuffix("_rows").removesuffix("_batch")
    step = check(backend, logits, objective, **keywords | {key: OPTIONS[name]})
    assert not torch.equal(step.grad_logits, plain.grad_logits)
    assert not torch.equal(step.loss, plain.loss)


def test_advantage_per_sequence_and_sampler_metric(backend: Backend):
    logits, keywords = problem()
    keywords["advantage"] = torch.tensor([1.5, 9.0, -0.75, -1.25, 0.5, 2.0])
    keywords["sampler_logp"] = keywords["old_logp"] + 0.1
    step = check(backend, logits, Objective(), advantage_level="sequence", **keywords)
    assert step.metrics["sampler_kl_k3"] == pytest.approx(0.1 + 2.718281828**-0.1 - 1, rel=1e-4)


def test_layouts_of_the_logits(backend: Backend):
    logits, keywords = problem()
    objective = Objective()
    plain = check(backend, logits, objective, **keywords)
    wide = torch.full((TOKENS, 2, VOCAB), float("nan"))
    wide[:, 1] = logits
    check(backend, wide[:, 1], objective, **keywords)
    check(backend, logits.t().contiguous().t(), objective, **keywords)
    step = check(backend, logits[:1].expand(TOKENS, -1), objective, **keywords)
    assert step.grad_logits.is_contiguous() and plain.grad_logits.is_contiguous()


def test_no_argument_is_written(backend: Backend):
    logits, keywords = problem(torch.bfloat16, kl=True)
    given = {"logits": logits.requires_grad_(), "temperature": torch.ones(TOKENS), **keywords}
    given = {k: backend.put(v) for k, v in given.items()}
    objective = Objective(kl=KL(coef=0.1), level="sequence", entropy_coef=0.1)
    for spec in (objective, Objective(kl=KL(coef=0.1))):
        assert_untouched(lambda s=spec: tokfuse.policy_step(objective=s, **given).loss.backward(), given)


# ----------------------------------------------------------------------------------------- autograd


def test_gradients_are_scaled_chained_and_handed_over_once(backend: Backend):
    logits, keywords = problem()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    z = backend.put(logits).requires_grad_()
    step = tokfuse.policy_step(logits=z * 1.0, objective=Objective(), **keywords)
    held = step.grad_logits.clone()
    (twice,) = torch.autograd.grad(2.0 * step.loss, z, retain_graph=True)
    (once,) = torch.autograd.grad(step.loss, z, retain_graph=True)
    assert bits(once) == bits(held) and bits(twice) == bits(2.0 * held)
    twice.zero_()
    (last,) = torch.autograd.grad(3.0 * step.loss, z)
    assert bits(last) == bits(3.0 * held) and step.grad_logits is None
    with pytest.raises(RuntimeError, match="backward"):
        torch.autograd.grad(step.loss, z)


def test_two_losses_share_a_graph(backend: Backend):
    logits, keywords = problem()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    z = backend.put(logits).requires_grad_()
    step = tokfuse.policy_step(logits=z, objective=Objective(), **keywords)
    held = step.grad_logits.clone()
    (step.loss + z.square().sum()).backward()
    compare(z.grad, held + 2 * z, rtol=1e-6)


def test_without_grad_there_is_a_gradient_but_no_graph(backend: Backend):
    logits, keywords = problem(kl=True)
    plain, keywords = backend.put(logits), {k: backend.put(v) for k, v in keywords.items()}
    for objective in (Objective(kl=KL(coef=0.1)), Objective(level="sequence", kl=KL(coef=0.1))):
        want = tokfuse.policy_step(logits=plain, objective=objective, **keywords)
        assert not want.loss.requires_grad
        for context in (torch.no_grad, torch.inference_mode):
            with context():
                made = {k: v.clone() if hasattr(v, "clone") else v for k, v in keywords.items()}
                step = tokfuse.policy_step(logits=plain.clone(), objective=objective, **made)
                over = plain.clone()
                tokfuse.policy_step_(over, objective=objective, **made)
            assert not step.loss.requires_grad
            assert bits(step.grad_logits) == bits(want.grad_logits) == bits(over)


def test_loss_of_frozen_logits_has_no_graph_but_their_producer_does(backend: Backend):
    logits, keywords = problem()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    scale = torch.tensor(1.0, device=backend.device, requires_grad=True)
    z = backend.put(logits) * scale
    step = tokfuse.policy_step(logits=z, objective=Objective(), **keywords)
    held = step.grad_logits.clone()
    step.loss.backward()
    assert float(scale.grad) == pytest.approx(float((held * z.detach()).sum()), rel=1e-4)


def test_second_derivative_is_refused_not_wrong(backend: Backend):
    logits, keywords = problem()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    z = backend.put(logits).requires_grad_()
    weight = torch.ones((), device=backend.device, requires_grad=True)
    step = tokfuse.policy_step(logits=z, objective=Objective(), **keywords)
    with pytest.raises(ValueError, match="policy_step: create_graph must be False"):
        torch.autograd.grad(step.loss * weight, z, create_graph=True)


# ----------------------------------------------------------------------------------------- in place


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("dtype", FLOAT_DTYPES, ids=str)
def test_in_place_writes_the_gradient_and_nothing_else(dtype, level: str, backend: Backend):
    logits, keywords = problem(dtype)
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    objective = Objective(level=level)
    want = tokfuse.policy_step(logits=backend.put(logits), objective=objective, **keywords)
    base = torch.full((TOKENS, 3, VOCAB + 7), 9.0, dtype=dtype, device=backend.device)
    view = base[:, 1, 4:-3]
    view.copy_(logits)
    view[~keywords["mask"]] = float("nan")  # masked rows are not read and become 0
    version = base._version
    step = tokfuse.policy_step_(view, objective=objective, **keywords)
    assert bits(view) == bits(want.grad_logits) == bits(step.grad_logits)
    assert base._version > version
    view.fill_(9.0)
    assert bool((base == 9.0).all())
    assert bits(step.loss) == bits(want.loss)


def test_in_place_is_noticed_by_who_saved_the_logits(backend: Backend):
    logits, keywords = problem()
    keywords = {k: backend.put(v) for k, v in keywords.items()}
    z = backend.put(logits).requires_grad_() * 1.0
    other = z.exp().sum()  # saves exp(z), not z
    square = z.square().sum()  # saves z
    step = tokfuse.policy_step_(z, objective=Objective(), **keywords)
    (step.loss + other).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()


TOO_LARGE = VOCAB + 3
BAD = {
    "target": torch.full((TOKENS,), TOO_LARGE),
    "temperature": torch.zeros(TOKENS),
    "advantage": torch.zeros(TOKENS - 1),
    "normalizer": -1.0,
    "softcap": 0.0,
    "logit_scale": -1.0,
    "cu_seqlens": torch.tensor([0, 5]).int(),
    "sampler_logp": torch.zeros(2),
    "objective": "ppo",
    "mask": torch.ones(TOKENS),
    "advantage_level": "batch",
    "kl_weight": torch.ones(TOKENS),
}


@pytest.mark.parametrize("name", BAD)
def test_nothing_is_written_when_a_check_fails(name: str, backend: Backend):
    logits, keywords = problem()
    logits = backend.put(logits)
    keywords = {k: backend.put(v) for k, v in keywords.items()} | {"objective": Objective()}
    before = bits(logits)
    with pytest.raises((ValueError, TypeError), match=f"^policy_step_?: {name} must be "):
        tokfuse.policy_step_(logits, **keywords | {name: backend.put(BAD[name])})
    assert bits(logits) == before and logits._version == 0


def test_rows_beyond_two_to_the_31_elements():
    """Two rows that are 2^31 bfloat16 apart. Untouched pages of the buffer use no memory."""
    logits, keywords = problem(torch.bfloat16)
    short = {k: v[:2] for k, v in keywords.items() if k not in ("cu_seqlens", "normalizer")}
    with tokfuse.backend("cpu"):
        want = tokfuse.policy_step(logits=logits[:2], objective=Objective(), **short)
        far = torch.empty((1 << 31) + 4096, dtype=torch.bfloat16).as_strided((2, VOCAB), (1 << 31, 1))
        far.copy_(logits[:2])
        tokfuse.policy_step_(far, objective=Objective(), **short)
    assert bits(far) == bits(want.grad_logits)
    assert bool((want.grad_logits[1] != 0).any())
