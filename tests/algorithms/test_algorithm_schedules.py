"""Test methods that change advantages, selection or schedules against the formulas of their papers.

D3S is compared with brute force, ADORA with a Python version of its rules, the states with their recursions.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from algorithm_cases import check, gae, gradient_of, grpo_a, k3, planned, ppo, rollout, same_gradient, spans, token_mean
from harness import Backend, backends, bits, compare
from torch import Tensor

from tokfuse import PPOClip, algorithms
from tokfuse.algorithms import Batch, critic


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


# --------------------------------------------------------------------------------------------- D3S


def d3s(**options):
    given = {"rollouts": (2, 4), "tokens": (0.25, 1.0), "total_steps": 4, "batch_rollouts": 4}
    return algorithms.make("d3s", **{**given, **options})


def test_d3s_against_brute_force(backend: Backend):
    """Stage 1: best pair of every group. Stage 2: best four of their union. Then the top tokens."""
    for seed in range(4):
        b = rollout(seed, binary=False)
        a = b.sequence_mean(grpo_a(b))
        pool = [
            i
            for g in (0, 7, 3)
            for i in max(
                itertools.combinations((b.group_ids == g).nonzero().flatten().tolist(), 2),
                key=lambda s: a[list(s)].var(correction=0),
            )
        ]
        kept = max(itertools.combinations(sorted(pool), 4), key=lambda s: a[list(s)].var())
        rows = [t for i in kept for t in spans(b)[i]]
        score = (grpo_a(b).abs() * b.entropy).float()
        top = sorted(rows, key=lambda t: -score[t])[: max(1, int(0.25 * len(rows)))]
        keep = torch.zeros_like(b.valid)
        keep[top] = True

        def formula(b, x, h, keep=keep):
            return ppo(x, b.old_logp, grpo_a(b))[keep].sum() / keep.sum()

        check(backend, d3s(), formula, b)


def test_d3s_schedule_and_everything_kept_is_the_base():
    method, state = d3s(rollouts=(2, 4), tokens=(0.2, 1.0)), d3s().initial_state()
    budgets = []
    for _ in range(6):
        budgets.append(method.budgets(state))
        state = method.advance(state, rollout(0))
    assert [n for n, _ in budgets] == [2, 2, 3, 3, 4, 4]
    assert [k for _, k in budgets] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    everything = d3s(rollouts=(4, 4), tokens=(1.0, 1.0), batch_rollouts=None)
    base = algorithms.make("grpo", kl=None, aggregation="token_mean")
    same_gradient(everything, base, rollout(0, binary=False))
    kept = algorithms.kept_sequences(d3s().prepare(rollout(0), {"step": 0}))
    assert 0 < len(kept) <= 4  # the other eight sequences need no forward pass


# ------------------------------------------------------------------------------------------- ADORA


@pytest.mark.parametrize("rule", ["llm", "vlm", "paper_amplify", "paper_attenuate"])
def test_adora_weights(rule: str):
    """The released rules in Python, for all 2^4 outcomes of a group."""
    for outcome in itertools.product((True, False), repeat=4):
        b = rollout(1).take(torch.arange(4))
        b = dataclasses.replace(b, correct=torch.tensor(outcome))
        n = [len(span) for span in spans(b)]
        limit = 3 if rule in ("llm", "vlm") else None
        right = [n[i] for i in range(4) if outcome[i]]
        wrong = [n[i] for i in range(4) if not outcome[i] and (limit is None or n[i] < limit)]
        best = max(right) if right else -math.inf
        mean = sum(wrong) / len(wrong) if wrong else math.inf if rule == "vlm" else -math.inf
        expected = {
            "llm": 1.0 if best > mean else 0.1,
            "vlm": 1.0 if best > mean or not right else 0.1,
            "paper_amplify": 2.0 if best > mean else 1.0,
            "paper_attenuate": 1.0 if best > mean else 0.1,
        }[rule]
        method = algorithms.make("adora", rule=rule, length_limit=limit)
        assert method.group_weight(b).tolist() == [expected] * 4, outcome


def test_adora_scales_the_gradient(backend: Backend):
    b = rollout(3, binary=False)
    method = algorithms.make("adora", rule="paper_amplify", condition="difficulty")
    weight = torch.tensor([2.0] * 8 + [1.0] * 4).double()  # rates 2/4, 2/4, 3/4

    def formula(b, x, h):
        return token_mean(b, ppo(x, b.old_logp, b.spread(weight) * grpo_a(b)))

    check(backend, method, formula, b)


def test_adora_with_weight_one_is_the_base():
    base = algorithms.make("grpo", kl=None, aggregation="token_mean")
    same_gradient(algorithms.make("adora", weight=1.0), base, rollout(3, binary=False))


# ------------------------------------------------------------------------------------------- T-PPO


def test_tppo(backend: Backend):
    def formula(b, x, h):
        keep = b.window & b.valid
        paid = dataclasses.replace(b, reward=torch.where(b.finished, b.reward, 0.0))
        loss = ppo(x, b.old_logp, gae(paid, 0.9, gamma=0.99))
        return loss[keep].sum() / keep.sum()

    b = rollout(2, binary=False)
    assert bool(b.reward[~b.finished].all())
    check(backend, algorithms.make("tppo", gamma=0.99, lam=0.9), formula, b)


def test_tppo_pays_no_outcome_to_an_unfinished_response():
    b, method = rollout(2), algorithms.make("tppo", gamma=1.0, lam=0.9)
    other = dataclasses.replace(b, reward=torch.where(b.finished, b.reward, 7.0))
    assert torch.equal(method.advantages(b).value, method.advantages(other).value)
    paid = dataclasses.replace(b, token_reward=torch.ones_like(b.value))
    assert not torch.equal(method.advantages(paid).value, method.advantages(b).value)


def test_tppo_critic_sees_finished_sequences_only():
    b, method = rollout(2), algorithms.make("tppo", gamma=1.0, lam=0.9)
    keep, target = method.critic_mask(b), critic.returns(b)
    expected = b.valid & b.spread(b.finished)
    assert torch.equal(keep, expected) and 0 < int(keep.sum()) < int(b.valid.sum())
    for i, span in enumerate(spans(b)):  # with lam 1 it is the Monte-Carlo return
        if b.finished[i] and span:
            compare(target[span], b.reward[i].expand(len(span)), atol=1e-12)
    value = (b.value + 0.4).requires_grad_()
    loss = critic.value_loss(value, b.value, target, mask=keep, normalizer=7.0)
    bounded = torch.maximum((value - target) ** 2, (b.value + 0.2 - target) ** 2)
    compare(loss, 0.5 * bounded[keep].sum() / 7, rtol=1e-12)
    (grad,) = torch.autograd.grad(loss, value)
    assert not grad[~keep].any() and bool(grad[keep].any())


def test_the_last_delta_of_an_unfinished_response_is_its_reward():
    """gamma = 1 without reward: V(s_l) = V(s_l-1) gives delta 0 for an unfinished response, -V for a finished one."""
    one = {"cu_seqlens": torch.tensor([0, 3], dtype=torch.int32), "old_logp": torch.zeros(3)}
    value = torch.tensor([0.1, 0.4, 0.7])
    for finished, last in ((False, 0.0), (True, -0.7)):
        b = Batch(
            reward=torch.zeros(1),
            value=value,
            finished=torch.tensor([finished]),
            window=torch.ones(3, dtype=torch.bool),
            **one,
        )
        a = algorithms.make("tppo", gamma=1.0, lam=0.0).advantages(b).value
        assert float(a[-1]) == pytest.approx(last)


# -------------------------------------------------------------------------------------------- DCPO


def test_dcpo(backend: Backend):
    """H = 0.6 > H0 = 0.5: T = 0.8, alpha_0 = 0.1."""
    method = algorithms.make("dcpo_dist", target_entropy=0.5)
    state = {"entropy": 0.6}
    assert method.temperature(state) == 0.8 and method.temperature({"entropy": 0.0}) == 1.2

    def formula(b, x, h):
        positive = (b.reward > 0.05).double()
        alpha = 0.1 / positive.mean() / (1 + 0.1 / positive.mean())
        bonus = b.spread(positive) * (b.second_logp - b.old_logp).exp()
        a = (1 - alpha) * grpo_a(b) + alpha * bonus
        loss = ppo(x, b.old_logp, a)
        return token_mean(b, torch.where(a < 0, torch.minimum(loss, -3 * a), loss))

    check(backend, method, formula, rollout(1), state)
    b = rollout(1)
    after = method.advance(state, b)
    assert after["entropy"] == pytest.approx(float(-b.old_logp[b.valid].mean()), rel=1e-12)


def test_dcpo_without_positives_or_alpha_is_dual_clip_grpo():
    base = algorithms.make("grpo", kl=None, aggregation="token_mean", shape=PPOClip(dual=3.0))
    b = rollout(1)
    none = dataclasses.replace(b, reward=b.reward - 1.0)
    same_gradient(algorithms.make("dcpo_dist"), base, none)
    same_gradient(algorithms.make("dcpo_dist", alpha_max=0.0), base, b)


# --------------------------------------------------------------------------------------------- EPO

HISTORY = {"step": 20, "sum": [3.0, 2.0, 1.0, 0.0], "batches": [2, 2, 1, 0]}


def epo_penalty(b: Batch, h: Tensor, mode: str, over: str) -> Tensor:
    """Return (tokens,) P with alpha 0.05 and the band [0.5, 1.5] around the mean of each turn."""
    out = torch.zeros_like(h)
    for i, span in enumerate(spans(b)):
        turn = int(b.turn[i])
        if not span:
            continue
        now = float(b.entropy[[t for j, s in enumerate(spans(b)) if b.turn[j] == turn for t in s]].mean())
        mean = (HISTORY["sum"][turn] + now) / (HISTORY["batches"][turn] + 1)
        x = h[span] if over == "token" else h[span].mean().expand(len(span))
        low, high = 0.5 * mean, 1.5 * mean
        inside = (low < x) & (x < high)
        hinge = (low - x).clamp(min=0) + (x - high).clamp(min=0)
        out[span] = 0.05 * ((~inside).double() if mode == "paper" else hinge)
    return out


@pytest.mark.parametrize("over", ["token", "sequence"])
@pytest.mark.parametrize("mode", ["paper", "hinge"])
def test_epo(mode: str, over: str, backend: Backend):
    method = algorithms.make(
        "epo", max_turns=4, total_steps=60, kappa_low=0.5, kappa_high=1.5, mode=mode, over=over, entropy_coef=0.1
    )
    beta = 1 - 0.2 * (1 - math.exp(-2 * 20 / 30))

    def formula(b, x, h):
        a = grpo_a(b)
        loss = ppo(x, b.old_logp, a)
        loss = torch.where(a < 0, torch.minimum(loss, -3 * a), loss) + 0.01 * k3(x, b.ref_logp)
        penalty = epo_penalty(b, h, mode, over)
        return token_mean(b, loss) - 0.1 * (token_mean(b, h) - beta * token_mean(b, penalty))

    check(backend, method, formula, rollout(1, binary=False), HISTORY)


def test_epo_band_has_no_gradient_as_published():
    """The paper's penalty changes only the reported loss. The hinge changes the weights of the entropy."""
    b, results = rollout(1), {}
    for mode in ("paper", "hinge", "off"):
        options = {"mode": "paper", "alpha": 0.0} if mode == "off" else {"mode": mode}
        method = algorithms.make("epo", max_turns=4, kappa_low=0.5, kappa_high=1.5, **options)
        results[mode] = gradient_of(planned(method, b, HISTORY), b.logp, b.entropy)
    assert bits(results["paper"][2]) == bits(results["off"][2]) != bits(results["hinge"][2])
    assert float(results["paper"][0]) != float(results["off"][0])


def test_epo_history_and_schedule():
    """Mean over batches of the mean entropy of each turn, this one included; beta 1 -> 0.827, 0.8 -> 0.04."""
    method = algorithms.make("epo", max_turns=5, total_steps=100)
    state, first, second = method.initial_state(), rollout(0), rollout(1)
    second = dataclasses.replace(second, turn=torch.zeros(12, dtype=torch.int64))
    for b in (first, second):
        state = method.advance(state, b)
    zero = [t for i, span in enumerate(spans(first)) if first.turn[i] == 0 for t in span]
    means = float(first.entropy[zero].mean()) + float(second.entropy[second.valid].mean())
    assert state["sum"][0] == pytest.approx(means, rel=1e-12)
    assert state["batches"] == [2, 1, 1, 1, 0] and state["step"] == 2
    prepared = method.prepare(second, method.advance(method.initial_state(), first))
    compare(prepared.turn_entropy, torch.full((12,), means / 2, dtype=torch.float64), atol=1e-12)
    # The policy moves after the rollout; the band does not.
    moved = prepared.with_policy(second.logp, second.entropy + 1.0)
    assert torch.equal(moved.turn_entropy, prepared.turn_entropy)
    betas = [method.beta(k) for k in (0, 50, 51, 100)]
    assert betas == pytest.approx([1.0, 0.827, 0.8 * math.exp(-0.06), 0.0398], abs=1e-3)
    odd = algorithms.make("epo", max_turns=5, total_steps=7)  # floor(7 / 2) steps, then 4
    assert [odd.beta(k) for k in (3, 4, 7)] == pytest.approx(
        [1 - 0.2 * (1 - math.exp(-2)), 0.8 * math.exp(-0.75), 0.8 * math.exp(-3)]
    )
    for turn, counts in ((1, False), (2, True)):  # floor(5 / 2)
        early = dataclasses.replace(first, turn=torch.full((12,), turn))
        assert (planned(method, early, state).constant is not None) == counts
