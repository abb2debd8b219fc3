"""Test gradient norms and sketches against float64 autograd, as separate ops and as part of policy_step."""

import math

import hypothesis
import pytest
import torch
from harness import host_backends
from hypothesis import strategies as st

from tokfuse import algorithms
from tokfuse.runtime.core import dispatch
from tokfuse.runtime.ops import influence
from tokfuse.runtime.ops.distill_step import distill_step
from tokfuse.runtime.ops.influence import InfluenceSpec
from tokfuse.runtime.ops.linear_token_stats import linear_token_stats
from tokfuse.runtime.ops.policy_loss import policy_loss
from tokfuse.runtime.ops.policy_step import policy_step
from tokfuse.runtime.ops.token_stats import token_stats
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import PPOClip
from tokfuse.runtime.reference.influence import logit_gradients

INF = float("inf")
PPO = Objective(shape=PPOClip())


@pytest.fixture(params=["cpu", "reference"])
def backend(request):
    usable = {r["backend"]: r["why"] for r in dispatch.table() if r["op"] == "token_stats"}
    if usable[request.param]:
        pytest.skip(f"{request.param}: {usable[request.param]}")
    with dispatch.backend(request.param):
        yield request.param


def batch(tokens=12, vocab=4001, scale=2.0, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    logits = (torch.randn(tokens, vocab, generator=gen) * scale).to(dtype)
    c, b = torch.randn(2, tokens, generator=gen)
    return logits, torch.randint(0, vocab, (tokens,), generator=gen), c, 0.1 * b


def true_norms(logits, target, c, b=None, **options):
    b = None if b is None else b.double()
    grad = logit_gradients(logits.double(), target, c.double(), b, **options)
    return torch.linalg.vector_norm(grad, dim=1)


# ------------------------------------------------------------------------------------- logit norms

OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.6},
    "per_token": {"temperature": torch.linspace(0.5, 2.0, 12)},
    "scale": {"logit_scale": 0.3},
}


@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logit_norms_are_those_of_the_gradient(options, with_entropy, backend):
    logits, target, c, b = batch()
    c[3], b[3] = 0.0, 0.0
    b = b if with_entropy else None
    stats = token_stats(logits, target, moments=with_entropy, **options)
    norms = influence.logit_norms(stats, c, entropy_coefficient=b, **options)
    want = true_norms(logits, target, c, b, **options)
    torch.testing.assert_close(norms.double(), want, rtol=2e-5, atol=1e-7)
    assert norms[3] == 0 and norms.dtype == torch.float32


def test_with_a_coefficient_of_one_it_is_el2n(backend):
    logits, target, _, _ = batch()
    norms = influence.logit_norms(token_stats(logits, target), torch.ones(12))
    error = logits.double().softmax(1)
    error[torch.arange(12), target] -= 1
    torch.testing.assert_close(norms.double(), error.norm(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("lead", [2.0, 6.0, 12.0, 16.0, 25.0, 200.0])
def test_confident_tokens_keep_the_size_of_their_norm(lead, backend):
    """If the target leads by 17 nats or more, 1 - 2 p + sum_sq in float32 is 0 or negative."""
    logits, target, _, _ = batch(vocab=50, scale=0.5)
    logits[torch.arange(12), target] += lead
    norms = influence.logit_norms(token_stats(logits, target), torch.ones(12)).double()
    want = true_norms(logits, target, torch.ones(12))
    rest = torch.expm1(torch.log_softmax(logits.double(), 1)[torch.arange(12), target]).abs()
    # logp itself has an error of 2e-6 at these logits
    bound = torch.minimum(0.42 * want, 2e-7 / rest) + 1e-5 * want + 3e-6
    assert ((norms - want).abs() <= bound).all()


def test_rows_without_probability_for_the_target(backend):
    logits = torch.tensor([[0.0, -INF, 1.0], [-INF, -INF, -INF], [0.0, 0.0, 0.0]])
    stats = token_stats(logits, torch.tensor([1, 0, 2]), moments=True)
    norms = influence.logit_norms(stats, torch.ones(3), entropy_coefficient=torch.ones(3))
    assert norms.isfinite().all() and norms[0] > 1
    mask = torch.tensor([True, False, True])
    stats = token_stats(logits, torch.tensor([0, 0, 2]), mask=mask)
    norms = influence.logit_norms(stats, torch.ones(3))
    assert norms[1] == 0 and norms[0] > 0


@hypothesis.given(st.data())
def test_logit_norms_of_any_row(data):
    row = data.draw(st.lists(st.floats(-30, 30, width=32), min_size=2, max_size=12))
    y = data.draw(st.integers(0, len(row) - 1))
    c, b = (data.draw(st.floats(-2, 2, width=32)) for _ in range(2))
    logits, target = torch.tensor([row], dtype=torch.float64), torch.tensor([y])
    c, b = torch.tensor([c]), torch.tensor([b])
    with dispatch.backend("reference"):
        stats = token_stats(logits, target, moments=True)
    norms = influence.logit_norms(stats, c.double(), entropy_coefficient=b.double())
    want = true_norms(logits, target, c, b)
    torch.testing.assert_close(norms, want, rtol=1e-6, atol=1e-6)


def test_head_norms_are_those_of_the_weight_gradient(backend):
    gen = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(5, 8, generator=gen), torch.randn(50, 8, generator=gen)
    target, c = torch.arange(5), torch.randn(5, generator=gen)
    stats = linear_token_stats(hidden, weight, target)
    norms = influence.head_norms(influence.logit_norms(stats, c), hidden)
    for t in range(5):
        w = weight.double().requires_grad_()
        logp = torch.log_softmax(w @ hidden[t].double(), 0)[target[t]]
        (grad,) = torch.autograd.grad(c[t].double() * logp, w)
        torch.testing.assert_close(norms[t].double(), grad.norm(), rtol=1e-5, atol=1e-7)
    silent = influence.head_norms(torch.zeros(5), torch.full((5, 8), INF))
    assert (silent == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_hidden_norms(dtype):
    x = torch.randn(6, 300, generator=torch.Generator().manual_seed(2)).to(dtype) * 100
    norms = influence.hidden_norms(x)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(norms.double(), x.double().norm(dim=1), rtol=1e-6, atol=0)


# ---------------------------------------------------------------------------------------- sketches


def packed(lengths=(3, 0, 7, 1, 5), size=24, seed=0, dtype=torch.float32):
    gen = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    grad, hidden = torch.randn(2, int(cu[-1]), size, generator=gen).to(dtype)
    return grad, hidden, cu


def by_definition(grad, hidden, cu, rank, seed):
    out = []
    if rank is not None:
        p_out, p_in = influence.projections(rank, hidden.shape[1], seed, hidden.device)
        grad, hidden = grad.double() @ p_out.double().t(), hidden.double() @ p_in.double().t()
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        total = torch.zeros(grad.shape[1], hidden.shape[1], dtype=torch.float64)
        for t in range(int(a), int(b)):
            total += torch.outer(grad[t].double(), hidden[t].double())
        out.append(total)
    return torch.stack(out)


@pytest.fixture(params=host_backends("influence"))
def sketching(request):
    with dispatch.backend(request.param):
        yield request.param


@pytest.mark.parametrize("rank", [1, 4, 64, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_sketches_by_their_definition(rank, dtype, sketching):
    if sketching in ("cuda", "triton") and dtype == torch.float64:
        pytest.skip(f"{sketching}: takes float32 and 16 bits")
    grad, hidden, cu = packed(dtype=dtype)
    out = influence.sketch(grad, hidden, cu, rank=rank, seed=3)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    want = by_definition(grad, hidden, cu, rank, 3)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    assert (out[1] == 0).all()
    again = influence.sketch(grad, hidden, cu, rank=rank, seed=3, max_seqlen=9)
    torch.testing.assert_close(again, out, rtol=1e-6, atol=1e-6)


def test_without_projection_it_is_the_gradient_of_an_adapter_at_zero(backend):
    gen = torch.Generator().manual_seed(4)
    hidden = torch.randn(9, 6, generator=gen, dtype=torch.float64)
    weight = torch.randn(20, 6, generator=gen, dtype=torch.float64)
    target, cu = torch.arange(9), torch.tensor([0, 4, 9], dtype=torch.int32)
    c = torch.randn(9, generator=gen, dtype=torch.float64)

    def loss(h):
        return c * torch.log_softmax(h @ weight.t(), 1)[torch.arange(9), target]

    h = hidden.clone().requires_grad_()
    (grad_hidden,) = torch.autograd.grad(loss(h).sum(), h)
    out = influence.sketch(grad_hidden, hidden, cu, rank=None)
    for s, (a, b) in enumerate(((0, 4), (4, 9))):
        adapter = torch.zeros(6, 6, dtype=torch.float64, requires_grad=True)
        per_token = loss(hidden + hidden @ adapter.t())
        (grad,) = torch.autograd.grad(per_token[a:b].sum(), adapter)
        torch.testing.assert_close(out[s], grad)


def test_projections_keep_inner_products_on_average():
    grad, hidden, cu = packed((4, 6, 5), size=16, dtype=torch.float64)
    whole = influence.sketch(grad, hidden, cu, rank=None).flatten(1)
    total = torch.zeros(3, 3, dtype=torch.float64)
    for seed in range(400):
        some = influence.sketch(grad, hidden, cu, rank=8, seed=seed).flatten(1)
        total += some @ some.t() / 400
    size = whole.norm(dim=1)
    error = (total - whole @ whole.t()).abs() / (size[:, None] * size[None, :])
    assert error.max() < 0.1  # relative spread 0.5 at rank 8, over sqrt(400) draws: 0.025


def test_sketches_of_one_seed_compare_and_of_two_do_not():
    grad, hidden, cu = packed()
    one, same, other = (influence.sketch(grad, hidden, cu, rank=8, seed=s) for s in (1, 1, 2))
    assert torch.equal(one, same) and not torch.allclose(one, other)


def test_projections_are_the_same_on_every_machine():
    p_out, p_in = influence.projections(4, 8, 0, torch.device("cpu"))
    assert p_out.abs().unique().tolist() == [0.5] and not torch.equal(p_out, p_in)
    signs = (p_out > 0).flatten().int().tolist()
    assert signs == [0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1, 0, 1, 1, 0, 0, 1, 1, 1, 1, 0, 1, 0]


def test_splitting_a_sequence_splits_its_sketch(sketching):
    grad, hidden, _ = packed((16,))
    whole = influence.sketch(grad, hidden, torch.tensor([0, 16], dtype=torch.int32), rank=8)
    parts = influence.sketch(grad, hidden, torch.tensor([0, 5, 16], dtype=torch.int32), rank=8)
    torch.testing.assert_close(parts.sum(0), whole[0], rtol=1e-5, atol=1e-5)


def test_no_tokens_and_no_sequences(sketching):
    none = torch.zeros(0, 6)
    two = influence.sketch(none, none, torch.zeros(3, dtype=torch.int32), rank=4)
    assert two.shape == (2, 4, 4) and (two == 0).all()
    assert influence.sketch(none, none, torch.zeros(1, dtype=torch.int32)).shape == (0, 64, 64)
    assert influence.hidden_norms(none).shape == (0,)


# -------------------------------------------------------------------------- by-product of the step


def step_inputs(dtype=torch.float32, vocab=301, size=16, seed=0):
    gen = torch.Generator().manual_seed(seed)
    cu = torch.tensor([0, 6, 6, 13, 20], dtype=torch.int32)
    hidden = torch.randn(20, size, generator=gen).to(dtype)
    weight = (torch.randn(vocab, size, generator=gen) / math.sqrt(size) * 3).to(dtype)
    target = torch.randint(0, vocab, (20,), generator=gen)
    old_logp = linear_token_stats(hidden, weight, target).logp.float()
    old_logp = old_logp + 0.3 * torch.randn(20, generator=gen)
    mask = torch.arange(20) % 5 > 0
    advantage = torch.randn(20, generator=gen)
    advantage[7] = 0.0
    return {
        "hidden": hidden,
        "weight": weight,
        "target": target,
        "old_logp": old_logp,
        "mask": mask,
        "advantage": advantage,
        "cu_seqlens": cu,
        "normalizer": "batch",
    }


def gradients_in_float64(given, objective, **options):
    """Return d loss / d logits and d loss / d hidden of the same loss, by autograd over all logits."""
    hidden = given["hidden"].double().requires_grad_()
    bias = options.pop("bias", None)
    logits = hidden @ given["weight"].double().t()
    logits = logits if bias is None else logits + bias.double()
    logits.retain_grad()
    with dispatch.backend("reference"):
        stats = token_stats(logits, given["target"], mask=given["mask"], **options)
        names = ("old_logp", "advantage", "mask", "cu_seqlens", "normalizer", "ref_logp")
        rest = {k: given[k] for k in names if k in given}
        wide = {k: v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in rest.items()}
        entropy = stats.entropy if objective.entropy_coef else None
        policy_loss(stats.logp, objective=objective, entropy=entropy, **wide).loss.backward()
    return logits.grad, hidden.grad


STEPS = {
    "token": (PPO, {}),
    "entropy": (Objective(shape=PPOClip(), entropy_coef=0.05), {}),
    "sequence": (Objective(shape=PPOClip(low=0.05, high=0.05), level="sequence"), {}),
    "softcap": (PPO, {"softcap": 5.0, "temperature": 0.8, "logit_scale": 0.7}),
    "kl": (Objective(shape=PPOClip(), kl=KL(coef=0.1), aggregation="seq_mean_token_mean"), {}),
    "bias": (PPO, {"bias": torch.linspace(-1, 1, 301)}),
}


@pytest.mark.parametrize(("objective", "options"), STEPS.values(), ids=STEPS)
@pytest.mark.parametrize("needs", ["all", "hidden", "none"])
def test_influence_of_a_step(objective, options, needs, backend):
    given = step_inputs()
    if objective.kl is not None:
        given["ref_logp"] = given["old_logp"] - 0.1
    grad_logits, grad_hidden = gradients_in_float64(given, objective, **options)
    given["hidden"].requires_grad_(needs != "none")
    given["weight"].requires_grad_(needs == "all")
    spec = InfluenceSpec(rank=8, seed=5)
    step = policy_step(**given, objective=objective, influence=spec, **options)
    out, hidden = step.influence, given["hidden"].detach()
    want = torch.linalg.vector_norm(grad_logits, dim=1)
    torch.testing.assert_close(out.token_norms.double(), want, rtol=2e-5, atol=1e-8)
    torch.testing.assert_close(out.head_norms.double(), want * hidden.double().norm(dim=1), rtol=2e-5, atol=1e-8)
    want = torch.linalg.vector_norm(grad_hidden, dim=1)
    torch.testing.assert_close(out.hidden_norms.double(), want, rtol=2e-5, atol=1e-8)
    want = by_definition(grad_hidden, hidden, given["cu_seqlens"], 8, 5)
    torch.testing.assert_close(out.sketches.double(), want, rtol=1e-4, atol=1e-7)
    silent = ~given["mask"]
    if not objective.entropy_coef and objective.level == "token" and objective.kl is None:
        silent = silent | (given["advantage"] == 0)
        assert (out.token_norms > 0).sum() < (~silent).sum()  # some token is clipped
    for norms in (out.token_norms, out.head_norms, out.hidden_norms):
        assert (norms[silent] == 0).all() and not norms.requires_grad


@pytest.mark.parametrize("objective", [PPO, STEPS["sequence"][0]])
def test_asking_for_influence_changes_nothing_else(objective, backend):
    results = []
    for spec in (None, InfluenceSpec(rank=4)):
        given = step_inputs()
        given["weight"].requires_grad_()
        step = policy_step(**given, objective=objective, influence=spec)
        assert step.grad_hidden is None and (step.influence is None) == (spec is None)
        step.loss.backward()
        assert given["hidden"].grad is None
        results.append((step.loss.detach(), step.token_loss, *step.stats, given["weight"].grad))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_heads(dtype, backend):
    given = step_inputs(dtype)
    step = policy_step(**given, objective=PPO, influence=InfluenceSpec(rank=8))
    grad_logits, grad_hidden = gradients_in_float64(given, PPO)
    want = torch.linalg.vector_norm(grad_logits, dim=1)
    torch.testing.assert_close(step.influence.token_norms.double(), want, rtol=1e-3, atol=1e-6)
    want = by_definition(grad_hidden, given["hidden"], given["cu_seqlens"], 8, 0)
    scale = want.abs().max()
    assert (step.influence.sketches.double() - want).abs().max() < 0.02 * scale


def test_small_workspaces_and_tiles_give_the_same_norms():
    """A vocabulary of several tiles, processed inside dW's memory and a few rows at a time."""
    if (
        dispatch.table()
        and next(r for r in dispatch.table() if r["op"] == "policy_step_hidden" and r["backend"] == "cpu")["why"]
    ):
        pytest.skip("needs the native module")
    given = step_inputs(vocab=9001)
    grad_logits, _ = gradients_in_float64(given, PPO)
    want = torch.linalg.vector_norm(grad_logits, dim=1)
    given["weight"].requires_grad_()
    for budget in (1, 300_000, None):
        step = policy_step(**given, objective=PPO, influence=InfluenceSpec(), memory_budget=budget)
        torch.testing.assert_close(step.influence.token_norms.double(), want, rtol=2e-5, atol=1e-8)


def test_the_normaliser_is_included(backend):
    one, two = (
        policy_step(**{**step_inputs(), "normalizer": n}, objective=PPO, influence=InfluenceSpec(rank=4)).influence
        for n in (1.0, 2.0)
    )
    torch.testing.assert_close(one.token_norms, 2 * two.token_norms)
    torch.testing.assert_close(one.sketches, 2 * two.sketches)


# ------------------------------------------------------------------------------------------ errors

STATS = token_stats(torch.zeros(3, 4), torch.zeros(3, dtype=torch.int64))
ONES, H, CU = torch.ones(3), torch.ones(3, 2), torch.tensor([0, 3], dtype=torch.int32)
REFUSALS = [
    (lambda: influence.logit_norms(STATS, torch.ones(2)), r"coefficient must be of shape \(3,\)"),
    (lambda: influence.logit_norms(STATS, ONES, softcap=30.0), "softcap must be None .*got 30.0"),
    (
        lambda: influence.logit_norms(STATS, ONES, entropy_coefficient=ONES),
        "stats must be computed with moments if entropy_coefficient is given",
    ),
    (lambda: influence.logit_norms(STATS, ONES, temperature=0.0), "temperature must be a finite"),
    (lambda: influence.logit_norms(STATS, ONES, temperature=torch.ones(2)), r"temperature must be of shape \(3,\)"),
    (lambda: influence.logit_norms(STATS, ONES, logit_scale=-1.0), "logit_scale must be a finite"),
    (lambda: influence.head_norms(torch.ones(2), H), r"logit_norms must be of shape \(3,\)"),
    (lambda: influence.head_norms(ONES, ONES), "hidden must be two-dimensional"),
    (lambda: influence.hidden_norms(ONES), "grad_hidden must be two-dimensional"),
    (lambda: influence.sketch(H[:2], H, CU), r"grad_hidden must be of shape \(3, 2\) like hidden"),
    (lambda: influence.sketch(H, H, CU + 1), "cu_seqlens must be a prefix sum that starts at 0"),
    (lambda: influence.sketch(H, H, CU, rank=0), "rank must be an int >= 1, or None"),
    (lambda: influence.sketch(H, H, CU, seed=0.5), "seed must be an int"),
    (lambda: influence.sketch(H, H, CU, max_seqlen=-1), "max_seqlen must be >= 0"),
]


@pytest.mark.parametrize(("call", "message"), REFUSALS, ids=range(len(REFUSALS)))
def test_refusals(call, message):
    with pytest.raises(ValueError, match=rf"^influence\.\w+: {message}"):
        call()


def test_a_step_refuses_what_it_cannot_sketch(monkeypatch):
    given = step_inputs()
    objective, spec = PPO, InfluenceSpec()
    with pytest.raises(ValueError, match="policy_step: cu_seqlens must be given with influence="):
        policy_step(**{**given, "cu_seqlens": None}, objective=objective, influence=spec)
    with pytest.raises(ValueError, match="policy_step: rank must be an int >= 1"):
        policy_step(**given, objective=objective, influence=InfluenceSpec(rank=-1))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)
        with pytest.raises(ValueError, match="policy_step: influence must be None inside torch.co"):
            policy_step(**given, objective=objective, influence=spec)
    logits = given.pop("hidden") @ given.pop("weight").t()
    with pytest.raises(ValueError, match="policy_step: influence must be None with logits="):
        policy_step(logits=logits, **given, objective=objective, influence=spec)


# ------------------------------------------------------------- influence of the other steps from hidden


def preference_of(given):
    pairs = algorithms.PreferenceBatch(
        num_tokens=12, cu_seqlens=HEAD_CU, pairs=torch.tensor([[2, 0]]), ref_logp=torch.zeros(12)
    )
    target = torch.arange(12) % 40
    return lambda **more: algorithms.preference_step(
        loss=algorithms.make("dpo"), batch=pairs, target=target, **given, **more
    )


def distillation_of(given):
    teacher = torch.randn(12, 40, generator=torch.Generator().manual_seed(4))
    more = {"coef": torch.linspace(-1, 1, 12), "normalizer": 3.0, "kind": "jsd"}
    return lambda **rest: distill_step(teacher_logits=teacher, **more, **given, **rest)


def policy_distillation_of(given):
    """Tokens of the divergence alone, of the policy term alone, of both and of neither."""
    at = torch.arange(12)
    more = {"advantage": torch.where(at % 2 == 0, 0.0, torch.cos(at + 1.0)), "old_logp": torch.full((12,), -3.5)}
    more |= {"coef": torch.where(at % 3 == 0, 0.0, torch.sin(at + 1.0)), "objective": Objective(), "target": at % 40}
    teacher = torch.randn(12, 40, generator=torch.Generator().manual_seed(4))
    return lambda **rest: distill_step(teacher_logits=teacher, kind="jsd", normalizer=3.0, **(more | given | rest))


DISTILLED = (distillation_of, policy_distillation_of)
HEAD_CU = torch.tensor([0, 4, 5, 12], dtype=torch.int32)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("make", [preference_of, *DISTILLED])
def test_influence_of_other_steps_is_that_of_their_gradient(make, frozen, backend):
    gen = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(12, 8, generator=gen), torch.randn(40, 8, generator=gen)
    logits = (hidden @ weight.t()).requires_grad_()
    make({"logits": logits})().loss.backward()
    weight.requires_grad_(not frozen)
    hidden.requires_grad_(not frozen)
    more = {"influence": InfluenceSpec(rank=4, seed=2)}
    if make in DISTILLED:
        more["cu_seqlens"] = HEAD_CU
    step = make({"hidden": hidden, "weight": weight})(**more)
    out, dz = step.influence, logits.grad.double()
    dh = dz @ weight.detach().double()
    torch.testing.assert_close(out.token_norms.double(), dz.norm(dim=1), rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(out.hidden_norms.double(), dh.norm(dim=1), rtol=1e-4, atol=1e-7)
    want = influence.sketch(dh.float(), hidden.detach(), HEAD_CU, rank=4, seed=2)
    torch.testing.assert_close(out.sketches, want, rtol=1e-4, atol=1e-5)
    if not frozen:
        step.loss.backward()
        torch.testing.assert_close(hidden.grad.double(), dh, rtol=1e-4, atol=1e-6)
    for refused in ({"influence": more["influence"]}, {"influence": 3, "cu_seqlens": HEAD_CU}):
        if make in DISTILLED:
            with pytest.raises((ValueError, TypeError), match="distill_step: (cu_seqlens|influence) must be"):
                make({"hidden": hidden, "weight": weight})(**refused)
    with pytest.raises(ValueError, match="influence must be left out with logits="):
        make({"logits": logits})(influence=more["influence"])
