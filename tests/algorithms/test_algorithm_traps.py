"""Test equivalences between algorithms, and details in which implementations differ."""

import dataclasses

import pytest
import torch
from algorithm_cases import centred, gradient_of, grpo_a, planned, rollout, same_gradient, token_mean
from harness import bits, compare

import tokfuse
from tokfuse import KL, PPOClip, SigmoidGate, algorithms


def test_on_policy_gradients_coincide():
    """-A per token for every token-level shape; GSPO and GMPO equal the sequence means."""
    b = rollout(0, binary=False)
    b = dataclasses.replace(b, logp=b.old_logp)
    base = algorithms.make("grpo", kl=None, aggregation="token_mean")
    same = {
        "cispo": {},
        "sapo": {"aggregation": "token_mean"},
        "gpg": {"advantage": "grpo"},
        "r2vpo": {"delta": 1.0, "step_size": 0.0, "penalty": 5.0},
        "bapo": {},
        "pipo": {},
        "mirror_descent": {"eta": 0.1},
        "kl_cov": {},
        "vespo": {},
        "tppo": {"advantage": "grpo", "gamma": None, "lam": None},
    }
    free = dataclasses.replace(b, ref_logp=None, window=b.valid)
    for name, options in same.items():
        same_gradient(algorithms.make(name, **options), base, free)
    means = algorithms.make("grpo", kl=None)
    for name in ("gspo", "gspo_token", "gmpo"):
        same_gradient(algorithms.make(name), means, free)
    _, gbpo = gradient_of(planned(algorithms.make("gbpo"), free), b.logp)
    _, grpo = gradient_of(planned(base, free), b.logp)
    signal = algorithms.make("gbpo").prepare(free, {}).signal
    agree = (signal * -grpo > 0) & b.valid
    assert int(agree.sum()) > 20
    compare(gbpo[agree], grpo[agree], atol=1e-15)


def test_limits_are_the_simpler_method():
    b = rollout(0, binary=False)
    base = algorithms.make("grpo", kl=None, aggregation="token_mean")
    linear = dataclasses.replace(base, shape=tokfuse.LinearRatio())
    same_gradient(algorithms.make("r2vpo", delta=0.0, step_size=0.0, penalty=0.0), linear, b)
    same_gradient(algorithms.make("bapo", low=(0.8, 0.8), high=(1.2, 1.2)), base, b)
    same_gradient(dataclasses.replace(base, shape=PPOClip(dual=1e30)), base, b)
    same_gradient(
        algorithms.make("vapo", rules=()),
        algorithms.make("ppo", length_adaptive_alpha=0.05, shape=PPOClip(low=0.2, high=0.28)),
        b,
    )
    epo = algorithms.make("epo", max_turns=4, entropy_coef=1e-30, kl=None)
    left = gradient_of(planned(epo, b), b.logp, b.entropy)[1]
    assert bits(left) == bits(gradient_of(planned(base, b), b.logp)[1])
    one = algorithms.make("dr_grpo", max_length=1)
    assert not torch.equal(one.advantages(b).value, base.advantages(b).value)
    assert bits(centred(b.reward[0], b.reward[:4], 0)) == bits(one.advantages(b).value[0])


def test_traps_of_one_name_with_two_meanings():
    """Bound or width (CISPO); loss at ratio 1 (SAPO); the length factor (Dr.GRPO)."""
    b = rollout(0)
    b = dataclasses.replace(b, logp=b.old_logp)
    width = tokfuse.StopGradClip(low=0.2, high=0.28, ratio_min=None, ratio_max=None)
    absolute = tokfuse.StopGradClip(ratio_max=0.28)
    grads = [gradient_of(planned(algorithms.make("cispo", shape=s), b), b.logp)[1] for s in (width, absolute)]
    compare(grads[1], 0.28 * grads[0], rtol=1e-12)
    sapo = algorithms.make("sapo", aggregation="token_mean", shape=SigmoidGate(tau_negative=1.0))
    loss, grad = gradient_of(planned(sapo, b), b.logp)
    compare(loss, token_mean(b, -2 * grpo_a(b)), atol=1e-12)
    compare(grad, torch.where(b.valid, -grpo_a(b), 0.0) / b.valid.sum(), atol=1e-15)
    short, long = (planned(algorithms.make("dr_grpo", max_length=n), b) for n in (10, 20))
    assert float(short.count()) == 120 and float(long.count()) == 240


def test_kl_cov_is_a_no_op_on_the_first_update():
    b = rollout(0, binary=False)
    b = dataclasses.replace(b, logp=b.old_logp)
    same_gradient(algorithms.make("kl_cov"), algorithms.make("kl_cov", rules=()), b)


def test_rejected_tokens_leave_or_stay_in_the_denominator():
    """verl shrinks the mask, TRL multiplies the loss: the losses differ by the share of kept tokens."""
    b = rollout(0)
    rule = (tokfuse.KeepRule("ratio", "token", 0.9, 1.1),)
    plans = [
        planned(algorithms.make("tis", correction=algorithms.Correction(mode="keep", keep_rules=rule, dropped=d)), b)
        for d in ("leave", "count")
    ]
    (left, a), (counted, c) = (gradient_of(plan, b.logp) for plan in plans)
    kept = float(plans[0].count())
    assert kept < int(b.valid.sum()) == float(plans[1].count())
    compare(left * kept, counted * int(b.valid.sum()), rtol=1e-12)
    assert torch.equal(a != 0, c != 0)


def test_whitening_is_over_tokens_and_group_scores_over_sequences():
    b = rollout(0)
    tokens = algorithms.make("reinforce_pp_baseline").advantages(b)
    seqs = algorithms.make("grpo", kl=None).advantages(b)
    assert (tokens.level, seqs.level) == ("token", "sequence")
    v = tokens.value[b.valid]
    assert abs(float(v.mean())) < 1e-12 and float(v.std()) == pytest.approx(1, rel=1e-6)
    loose = algorithms.make("grpo", kl=None, eps=1e-4).advantages(b).value
    assert not torch.equal(loose, seqs.value)


def test_clamped_kl_matches_its_reference_options():
    """Any method can have a KL term with any estimator."""
    b = rollout(0, binary=False)
    for estimator in ("k1", "k2", "k3", "ratio_k3", "k1_straight", "k3_straight"):
        method = algorithms.make("dapo", overlong=None, kl=KL(estimator=estimator, coef=0.1))
        _, grad = gradient_of(planned(method, b), b.logp)
        plain = algorithms.make("dapo", overlong=None)
        assert bits(grad) != bits(gradient_of(planned(plain, b), b.logp)[1])
