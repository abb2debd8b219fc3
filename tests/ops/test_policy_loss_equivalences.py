"""Test policy_loss: equivalences between methods, and details in which implementations differ."""

import math

import pytest
import torch
from harness import Backend, backends, bits, compare
from policy_cases import LENGTHS, batch

import tokfuse
from tokfuse import (
    KL,
    NFT,
    Gamma,
    LinearLogp,
    LinearRatio,
    LogClamp,
    Objective,
    PPOClip,
    Quadratic,
    SigmoidGate,
    StopGradClip,
    TargetRatio,
)


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


def evaluate(backend: Backend, objective: Objective, logp, **inputs):
    """Return (result, d loss / d logp on the CPU)."""
    x = backend.put(logp).detach().clone().requires_grad_()
    out = tokfuse.policy_loss(x, objective=objective, **{k: backend.put(v) for k, v in inputs.items()})
    out.loss.backward()
    return out, x.grad.cpu()


def off_policy(*names: str, per_sequence: bool = True):
    data = batch(*names, per_sequence=per_sequence)
    return data.cast(torch.float32)


def same(backend: Backend, left: Objective, right: Objective, *names: str) -> None:
    """Check that losses and gradients are bitwise equal on an off-policy batch."""
    logp, inputs = off_policy(*names)
    a, grad_a = evaluate(backend, left, logp, **inputs)
    b, grad_b = evaluate(backend, right, logp, **inputs)
    assert bits(a.token_loss) == bits(b.token_loss) and bits(grad_a) == bits(grad_b)


# --------------------------------------------------------------------------------------- on policy

ON_POLICY = {
    "reinforce": LinearLogp(),
    "surrogate": LinearRatio(),
    "ppo": PPOClip(),
    "ppo_dual": PPOClip(dual=3.0),
    "two_sided": PPOClip(cap=2.0),
    "cispo": StopGradClip(),
    "sapo": SigmoidGate(),
    "gbpo": TargetRatio(),
    "r2vpo": Quadratic(penalty=5.0),
    "gmpo": LogClamp(),
    "vespo": Gamma(),
}


@pytest.mark.parametrize("name", ON_POLICY)
def test_on_policy_gradients_are_minus_the_advantage(name: str, backend: Backend):
    logp, inputs = off_policy()
    inputs["old_logp"] = logp.clone()
    if name == "gbpo":  # a saturated target in the direction of the advantage
        inputs["signal"] = 1e4 * inputs["advantage"]
    expected = torch.where(inputs["mask"], -inputs["advantage"], 0.0)
    shape = ON_POLICY[name]
    _, grad = evaluate(backend, Objective(shape=shape), logp, **inputs)
    compare(grad, expected, rtol=4e-7, what="token")
    counts = [max(1, int(m.sum())) for m in inputs["mask"].split(list(LENGTHS))]
    means = expected / torch.tensor(counts).repeat_interleave(torch.tensor(LENGTHS))
    levels = ("token", "sequence", "sequence_token")
    for level in levels:
        objective = Objective(shape=shape, level=level, aggregation="seq_mean_token_mean")
        _, grad = evaluate(backend, objective, logp, **inputs)
        compare(grad, means, rtol=6e-7, what=level)


@pytest.mark.parametrize(("normalize", "centre_only"), [(2, False), (1, True)])
def test_nft_on_policy_is_grpo_or_dr_grpo(normalize: int, centre_only: bool, backend: Backend):
    """Weight sqrt((1 - q) / q): GRPO with the population deviation. Weight 1 - q: Dr.GRPO."""
    correct = torch.tensor([1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, 0.0])
    q = correct.mean()
    grpo = correct - q
    if not centre_only:
        grpo = grpo / correct.std(correction=0)
    logp = torch.linspace(-3, -0.5, 8)
    weight = (1 - q) if normalize == 1 else ((1 - q) / q).sqrt()
    _, nft = evaluate(
        backend,
        Objective(shape=NFT()),
        logp,
        old_logp=logp,
        advantage=2 * correct - 1,
        signal=q.expand(8),
        token_weight=weight.expand(8),
    )
    _, expected = evaluate(backend, Objective(), logp, old_logp=logp, advantage=grpo)
    compare(nft, expected, rtol=1e-6)


# ---------------------------------------------------------------------------- limits, special cases


def test_limits_are_bitwise_the_simpler_objective(backend: Backend):
    def at(shape, **options):
        return Objective(shape=shape, **options)

    same(backend, at(PPOClip(dual=1e30)), at(PPOClip()))
    same(backend, at(PPOClip(cap=1e30)), at(PPOClip()))
    same(backend, at(PPOClip(low=None, high=None, ratio_min=0.8, ratio_max=1.2)), at(PPOClip()))
    same(backend, at(PPOClip(low=1.0, high=1e30)), at(LinearRatio()))
    same(backend, at(Quadratic(penalty=0.0)), at(LinearRatio()))
    same(backend, at(LogClamp(bound=1e30)), at(LinearRatio()))
    same(backend, at(LogClamp(bound=1e30), level="sequence"), at(LinearRatio(), level="sequence"))
    same(backend, at(PPOClip(), entropy_coef=0.0), at(PPOClip()))
    same(backend, at(StopGradClip(low=1.0, ratio_min=None)), at(StopGradClip(ratio_min=0.0)))


def test_two_sided_and_dual_clip_stop_the_same_gradients(backend: Backend):
    logp, inputs = off_policy()
    _, dual = evaluate(backend, Objective(shape=PPOClip(dual=2.0)), logp, **inputs)
    _, cap = evaluate(backend, Objective(shape=PPOClip(cap=2.0)), logp, **inputs)
    _, ppo = evaluate(backend, Objective(), logp, **inputs)
    assert bits(dual) == bits(cap) != bits(ppo)


def test_cispo_is_never_zero_and_unclipped_it_is_the_surrogate(backend: Backend):
    logp, inputs = off_policy()
    near = ((logp - inputs["old_logp"]).abs() < 20) & inputs["mask"]
    _, free = evaluate(backend, Objective(shape=StopGradClip(ratio_max=1e30)), logp, **inputs)
    _, surrogate = evaluate(backend, Objective(shape=LinearRatio()), logp, **inputs)
    compare(free[near], surrogate[near], rtol=1e-6)
    narrow = StopGradClip(low=0.2, high=0.2, ratio_min=None, ratio_max=None)
    _, clipped = evaluate(backend, Objective(shape=narrow), logp, **inputs)
    assert bool((clipped[inputs["mask"]] != 0).all())


def test_gspo_and_gspo_token_agree_for_one_advantage_per_sequence(backend: Backend):
    logp, inputs = off_policy()
    a, grad_a = evaluate(backend, Objective(level="sequence"), logp, **inputs)
    b, grad_b = evaluate(backend, Objective(level="sequence_token"), logp, **inputs)
    inside = (logp - inputs["old_logp"]).abs() < 20  # the clamp is per token in gspo only
    compare(a.token_loss, b.token_loss, rtol=1e-6)
    compare(grad_a[inside], grad_b[inside], rtol=1e-6, atol=1e-7)


def test_one_token_sequences_make_all_levels_equal(backend: Backend):
    logp, inputs = off_policy()
    inputs["cu_seqlens"] = torch.arange(len(logp) + 1, dtype=torch.int32)
    for shape in (PPOClip(dual=3.0), SigmoidGate(), Quadratic(penalty=0.5), Gamma()):
        token, grad = evaluate(backend, Objective(shape=shape), logp, **inputs)
        for level in ("sequence", "sequence_token", "sequence_sum"):
            out, other = evaluate(backend, Objective(shape=shape, level=level), logp, **inputs)
            compare(out.token_loss, token.token_loss, rtol=1e-6, what=level)
            compare(other, grad, rtol=1e-6, atol=1e-7, what=level)


def test_gbpo_pulls_a_ratio_outside_the_bounds_back(backend: Backend):
    """Inside the saturated bounds: the PPO gradient. On the target: 0. Outside: the opposite sign."""
    d = torch.tensor([0.1, math.log(1.2), 0.5, -0.1, -0.5])
    advantage = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0])
    inputs = {"old_logp": torch.zeros(5), "advantage": advantage, "signal": 1e4 * advantage}
    out, grad = evaluate(backend, Objective(shape=TargetRatio(low=0.2, high=0.2)), d, **inputs)
    r = d.exp()
    turn = torch.tensor([-1.0, 0.0, 1.0, 1.0, -1.0])
    compare(grad[[0, 2, 3, 4]], (turn * r)[[0, 2, 3, 4]], rtol=1e-6)
    middle = Objective(shape=TargetRatio(low=0.2, high=0.3))  # signal 0: 1 + (high - low) / 2
    inputs["signal"] = torch.zeros(5)
    out, grad = evaluate(backend, middle, torch.full((5,), math.log(1.05)), **inputs)
    compare(out.token_loss, torch.zeros(5), atol=2e-7)
    exact = evaluate(backend, Objective(shape=TargetRatio(low=0.5, high=0.5)), torch.zeros(5), **inputs)
    assert not exact[1].any()  # exactly on the target: subgradient 0


def test_sapo_is_not_normalised_to_the_ratio(backend: Backend):
    zero = torch.zeros(2)
    advantage = torch.tensor([2.0, -3.0])
    out, grad = evaluate(backend, Objective(shape=SigmoidGate()), zero, old_logp=zero, advantage=advantage)
    compare(out.token_loss, torch.tensor([-4.0, 6.0 / 1.05]), rtol=1e-6)
    compare(grad, -advantage, rtol=1e-6)


def test_widths_and_absolute_bounds_are_different_numbers(backend: Backend):
    logp, inputs = off_policy()
    width = Objective(shape=StopGradClip(high=0.5, ratio_max=None))
    absolute = Objective(shape=StopGradClip(ratio_max=0.5))
    _, a = evaluate(backend, width, logp, **inputs)
    _, b = evaluate(backend, absolute, logp, **inputs)
    both = Objective(shape=StopGradClip(ratio_max=1.5))
    _, c = evaluate(backend, both, logp, **inputs)
    assert bits(a) == bits(c) != bits(b)


# ----------------------------------------------------------------------------------------------- KL


def expected_gradient(estimator: str, behaviour: torch.Tensor | None = None):
    """Return (E[d estimate], grad KL(pi || ref), grad KL(ref || pi)) in the logits of a categorical."""
    gen = torch.Generator().manual_seed(7)
    theta = torch.randn(6, dtype=torch.float64, generator=gen).requires_grad_()
    ref = torch.randn(6, dtype=torch.float64, generator=gen).log_softmax(0)
    logp = theta.log_softmax(0)
    sampled = logp.detach() if behaviour is None else behaviour
    out = tokfuse.policy_loss(
        logp,
        old_logp=sampled,
        advantage=torch.zeros(6, dtype=torch.float64),
        objective=Objective(shape=LinearRatio(), kl=KL(estimator=estimator, coef=1.0)),
        ref_logp=ref,
        kl_weight=sampled.exp(),
    )
    (grad,) = torch.autograd.grad(out.loss, theta)
    logp = theta.log_softmax(0)
    (reverse,) = torch.autograd.grad((logp.exp() * (logp - ref)).sum(), theta, retain_graph=True)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logp)).sum(), theta)
    return grad, reverse, forward


def test_expected_gradients_of_the_estimators():
    """On policy, k1 trains nothing, k2 trains the reverse KL, and k3 the forward KL."""
    for estimator in ("k2", "k1_straight", "k3_straight", "ratio_k3"):
        grad, reverse, forward = expected_gradient(estimator)
        compare(grad, reverse, atol=1e-12, what=estimator)
        assert (grad - forward).abs().max() > 0.05
    grad, reverse, forward = expected_gradient("k3")
    compare(grad, forward, atol=1e-12)
    grad, *_ = expected_gradient("k1")
    compare(grad, torch.zeros(6), atol=1e-12)
    other = torch.randn(6, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    grad, reverse, _ = expected_gradient("ratio_k3", other.log_softmax(0))
    compare(grad, reverse, atol=1e-12, what="off policy")


def test_negative_kl_coefficient_repels_up_to_the_clamp(backend: Backend):
    """k3 with coefficient -0.01 reaches 0.01 e^11 at the clamp of 11, and 0 beyond it (CDPO)."""
    k = torch.tensor([-10.999, -11.5, 0.5])
    objective = Objective(shape=LinearRatio(), kl=KL(coef=-0.01, clamp=11.0))
    _, grad = evaluate(backend, objective, k, old_logp=k, advantage=torch.zeros(3), ref_logp=torch.zeros(3))
    compare(grad, torch.tensor([0.01 * math.expm1(10.999), 0.0, 0.01 * math.expm1(-0.5)]), rtol=1e-5)


def test_abs_penalty_is_a_no_op_where_the_policies_agree(backend: Backend):
    logp = torch.tensor([-1.0, -2.0, -3.0])
    objective = Objective(shape=LinearRatio(), kl=KL(estimator="abs", coef=1.0))
    _, grad = evaluate(
        backend,
        objective,
        logp,
        old_logp=logp,
        advantage=torch.zeros(3),
        ref_logp=logp + torch.tensor([0.0, 0.1, -0.1]),
    )
    assert grad.tolist() == [0.0, -1.0, 1.0]


# ----------------------------------------------------------------------------------- normalisation


def test_a_global_count_makes_splits_exact_and_the_own_count_does_not(backend: Backend):
    logp, inputs = off_policy()
    for aggregation, count in (("token_mean", 17.0), ("seq_mean_token_mean", 4.0)):
        objective = Objective(aggregation=aggregation)
        whole, grad = evaluate(backend, objective, logp, normalizer=count, **inputs)
        own, _ = evaluate(backend, objective, logp, normalizer="batch", **inputs)
        assert float(own.loss.detach()) == pytest.approx(float(whole.loss.detach()), rel=1e-6)
        parts, grads, local, pieces = 0.0, [], [], ((0, 5, 0, 2), (5, 15, 2, 4), (15, 22, 4, 6))
        for begin, end, first, last in pieces:
            cut = {k: v[begin:end] for k, v in inputs.items() if k != "cu_seqlens"}
            cut["cu_seqlens"] = inputs["cu_seqlens"][first : last + 1] - begin
            part, g = evaluate(backend, objective, logp[begin:end], normalizer=count, **cut)
            parts, grads = parts + float(part.loss.detach()), [*grads, g]
            part, _ = evaluate(backend, objective, logp[begin:end], normalizer="batch", **cut)
            local.append(float(part.loss.detach()))
        assert parts == pytest.approx(float(whole.loss.detach()), rel=1e-6)
        compare(torch.cat(grads), grad, rtol=1e-6)
        assert abs(sum(local) / 3 - float(whole.loss.detach())) > 0.01 * abs(parts)
