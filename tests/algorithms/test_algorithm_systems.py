"""Test methods that change the loss against the formulas of their papers.

Every formula is a dozen lines of float64 over the sequences of a random batch, differentiated by autograd.
BAPO's search is compared with the loops of the paper and of the released code.
"""

import dataclasses
import itertools
import math

import pytest
import torch
from algorithm_cases import (
    cast,
    check,
    gae,
    gradient_of,
    grpo_a,
    k3,
    mates,
    per_group,
    planned,
    ppo,
    rollout,
    same_gradient,
    spans,
    token_mean,
)
from harness import Backend, backends, bits, compare
from torch import Tensor

from tokfuse import algorithms
from tokfuse.algorithms import Batch


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


# -------------------------------------------------------------------------------------------- GBPO


def f_gbpo(b, x, h):
    signal = per_group(b, lambda r, g, _: (r - g.sort().values[1:3].mean()) / (g.std() + 1e-6) / 0.3)
    target = 1 - 0.2 + 0.4 * torch.sigmoid(signal)
    return token_mean(b, ((x - b.old_logp).exp() - target).abs() * grpo_a(b).abs())


def f_bpo(b, x, h):
    a = gae(b)
    target = 0.7 + 0.6 * torch.sigmoid((a + b.value - b.median_value) / 1e-3)
    return token_mean(b, ((x - b.old_logp).exp() - target).abs() * a.abs())


def test_gbpo_and_bpo(backend: Backend):
    check(backend, algorithms.make("gbpo", tau=0.3), f_gbpo, rollout(0, binary=False))
    check(backend, algorithms.make("bpo"), f_bpo, rollout(0, binary=False))


def test_gbpo_holds_a_majority_at_the_median():
    """Three wrong, one correct: the target of the wrong ones is ratio 1, not 1 - low. An even G averages."""
    reward = torch.tensor([0, 0, 0, 1, 0, 1, 1, 0, 1, 1, 1, 0]).double()
    b = rollout(0, reward=reward)
    signal = b.sequence_mean(algorithms.make("gbpo").prepare(b, {}).signal)
    assert signal[:3].tolist() == [0, 0, 0] and signal[3] > 1e3
    assert signal[4] < -1e3 and signal[5] > 1e3  # two correct, two wrong: the median is 0.5


def test_median_loss_is_minimal_at_a_smoothed_median():
    q = torch.tensor([0.0, 1.0, 10.0], dtype=torch.float64) * 50
    u = torch.full((), 20.0, dtype=torch.float64, requires_grad=True)
    for _ in range(4000):
        (grad,) = torch.autograd.grad(algorithms.median_loss(q, u).sum(), u)
        u = (u - grad).detach().requires_grad_()
    assert float(u.detach()) == pytest.approx(50.0, abs=0.1)


# ------------------------------------------------------------------------------------------- R2VPO


def test_r2vpo(backend: Backend):
    def formula(b, x, h):
        r = (x - b.old_logp).exp()
        return token_mean(b, -grpo_a(b) * r + 0.3 * (r - 1) ** 2)

    method = algorithms.make("r2vpo", delta=0.05, step_size=2.0, penalty=0.3)
    check(backend, method, formula, rollout(1, binary=False))


def test_r2vpo_dual_step_sums_over_micro_batches():
    method = algorithms.make("r2vpo", delta=0.05, step_size=2.0, penalty=0.3)
    b, state = rollout(1), method.initial_state()
    plan = planned(method, b)
    whole = method.measure(plan, b.logp)
    parts = []
    for ids in ([0, 1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]):
        part = method.prepare(b, state).take(torch.tensor(ids))
        parts.append(method.measure(method.objective(part, state), part.logp))
    merged = {name: parts[0][name] + parts[1][name] for name in whole}
    mean = (((b.logp - b.old_logp).exp() - 1) ** 2)[b.valid].mean()
    for sums in (whole, merged):
        assert method.update(state, sums)["penalty"] == pytest.approx(float(0.3 + 2 * (mean - 0.05)), rel=1e-12)
    on_policy = method.measure(plan, b.old_logp)
    assert method.update(state, on_policy)["penalty"] == pytest.approx(0.2)
    assert method.update({"penalty": 0.01}, on_policy)["penalty"] == 0.0
    assert state == {"penalty": 0.3}  # update does not change its input


# -------------------------------------------------------------------------------------------- BAPO


def bapo_loop(method, ratio, advantage) -> tuple[float, float]:
    """Return the search of the paper (Alg. 1), or of the code (low first, P / N)."""

    def statistic(low: float, high: float) -> float:
        p = sum(min(r, high) * a for r, a in zip(ratio, advantage, strict=True) if a > 0)
        n = sum(max(r, low) * -a for r, a in zip(ratio, advantage, strict=True) if a < 0)
        whole = p + n if method.form == "paper" else n
        return p / whole if whole else math.inf

    target, (low, most_low), (high, most_high), step_low, step_high = method.settings
    if method.form == "paper":
        # 1e-9, because adding up 0.02 drifts past 0.9.
        while statistic(low, high) < target and low + step_low <= most_low + 1e-9:
            if high + step_high <= most_high + 1e-9:
                high += step_high
            else:
                low += step_low
        return low, high
    while statistic(low, high) < target and low < most_low - 1e-9:
        low = min(low + step_low, most_low)
    while statistic(low, high) < target and high < most_high - 1e-9:
        high = min(high + step_high, most_high)
    return low, high


@pytest.mark.parametrize("form", ["paper", "code"])
def test_bapo_one_pass_is_the_loop(form: str):
    """On 2000 random batches; all three outcomes occur."""
    method = algorithms.make("bapo", form=form)
    gen = torch.Generator().manual_seed(5)
    seen = set()
    for _ in range(2000):
        n = int(torch.randint(1, 30, (), generator=gen))
        ratio = (torch.randn(n, generator=gen, dtype=torch.float64) * 0.6).exp()
        advantage = torch.randn(n, generator=gen, dtype=torch.float64) - 0.3
        found = method.search(ratio, advantage, torch.ones(n, dtype=torch.bool))
        expected = bapo_loop(method, ratio.tolist(), advantage.tolist())
        assert found == pytest.approx(expected, abs=1e-12)
        seen.add((found[0] > 0.75, found[1] > 1.2, found[1] > 1.99))
    assert len(seen) >= 3


@pytest.mark.parametrize(
    ("form", "low", "last"),
    [
        ("paper", (0.8, 0.95), 0.94),
        ("paper", (0.8, 0.955), 0.94),
        ("code", (0.8, 0.95), 0.95),
        ("code", (0.8, 0.955), 0.955),
    ],
)
def test_bapo_never_passes_its_last_bounds(form: str, low: tuple, last: float):
    """Alg. 1 takes no step past the cap (it gave 0.96 for 0.955); the release ends at it."""
    method = algorithms.make("bapo", form=form, low=low, step_low=0.02, high=(1.2, 1.99), step_high=0.1)
    ratio, advantage = torch.ones(2).double(), torch.tensor([0.01, -1.0]).double()  # no bound reaches the target
    found = method.search(ratio, advantage, torch.ones(2, dtype=torch.bool))
    assert found == pytest.approx((last, 1.9 if form == "paper" else 1.99), abs=1e-12)
    assert found == pytest.approx(bapo_loop(method, ratio.tolist(), advantage.tolist()), abs=1e-9)


def test_bapos_forms_have_their_own_settings():
    paper, code = algorithms.make("bapo"), algorithms.make("bapo", form="code")
    assert paper.settings == (0.4, (0.6, 0.9), (1.2, 3.0), 0.02, 0.05)
    assert code.settings == (1.0, (0.6, 0.8), (1.2, 2.0), 0.05, 0.05)
    assert algorithms.make("bapo", form="code", target=0.5).settings == code.settings._replace(target=0.5)


def test_bapo_trains_with_the_bounds_it_found(backend: Backend):
    b = rollout(2, binary=False)
    method = algorithms.make("bapo", target=0.6)
    a, r = grpo_a(b)[b.valid], (b.logp - b.old_logp).exp()[b.valid]
    low, high = bapo_loop(method, r.tolist(), a.tolist())
    assert high > 1.2

    def formula(b, x, h):
        return token_mean(b, ppo(x, b.old_logp, grpo_a(b), 1 - low, high - 1))

    check(backend, method, formula, b)


def test_bapo_share_and_ratio_are_different_targets():
    """P / (P + N) >= 0.4 means P / N >= 2/3; the code's P / N >= 0.4 is weaker."""
    ratio, advantage = torch.tensor([1.0, 1.0]), torch.tensor([0.5, -1.0])
    mask = torch.ones(2, dtype=torch.bool)
    assert algorithms.make("bapo").search(ratio, advantage, mask) == pytest.approx((0.9, 3.0))
    code = algorithms.make("bapo", form="code", target=0.4)
    assert code.search(ratio, advantage, mask) == pytest.approx((0.6, 1.2))
    assert planned(code, rollout(0)).objective.shape.dual == 3.0


# --------------------------------------------------------------------------------------------- NFT


def nft_loss(b: Batch, ratio: Tensor, normalize: int, neg_weight: float, i: int) -> Tensor:
    q = b.correct[mates(b, i)].double().mean().clamp(0.02, 0.98)
    w = [torch.tensor(1.0).double(), 1 - q, ((1 - q) / q).sqrt()][normalize]
    if b.correct[i]:
        return -w * ratio.log()
    rest = (1 - q * ratio) / (1 - q)
    return -w * neg_weight * (rest + (rest.clamp(min=1.0) - rest).detach()).log()


@pytest.mark.parametrize("normalize", [0, 1, 2])
def test_nft(normalize: int, backend: Backend):
    def tokens(b, x, h):
        r = (x - b.old_logp).exp()
        parts = [nft_loss(b, r[s], normalize, 0.5, i).sum() for i, s in enumerate(spans(b)) if s]
        return torch.stack(parts).sum() / 1000

    def sequences(b, x, h):
        d = x - b.old_logp
        parts = [nft_loss(b, d[s].sum().exp(), normalize, 0.5, i) for i, s in enumerate(spans(b))]
        return torch.stack([p for p, s in zip(parts, spans(b), strict=True) if s]).sum()

    options = {"normalize": normalize, "neg_weight": 0.5}
    check(backend, algorithms.make("nft", **options), tokens, rollout(1))
    check(backend, algorithms.make("nft", level="sequence_sum", **options), sequences, rollout(1))


@pytest.mark.parametrize(("normalize", "scale"), [(2, True), (1, False)])
def test_nft_on_policy_is_grpo_or_dr_grpo(normalize: int, scale: bool):
    """GRPO with the population deviation and without eps; Dr.GRPO; both with NFT's denominator."""
    b = rollout(1)
    b = dataclasses.replace(b, logp=b.old_logp)
    _, grad = gradient_of(planned(algorithms.make("nft", normalize=normalize), b), b.logp)
    a = per_group(b, lambda r, g, _: (r - g.mean()) / (g.std(correction=0) if scale else 1.0))
    compare(grad, torch.where(b.valid, -a / 1000, 0.0), atol=1e-15)


def test_nft_keeps_the_gradient_of_a_long_right_answer(backend: Backend):
    """2000 tokens that are each 1% less likely: their log-ratios add up to -20, where a clamp ended the gradient."""
    n = 2000
    b = Batch(
        reward=torch.tensor([1.0, 0.0]).double(),
        correct=torch.tensor([True, False]),
        group_ids=torch.zeros(2, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, n, n + 2], dtype=torch.int32),
        old_logp=torch.full((n + 2,), -1.0).double(),
    )
    change = torch.full((n + 2,), math.log(0.99)).double()
    here = cast(b, torch.float64 if backend.name == "reference" else torch.float32, backend.device)
    plan = planned(algorithms.make("nft", level="sequence_sum", normalize=0), here)
    _, grad = gradient_of(plan, here.old_logp + change.to(here.old_logp))
    compare(grad[:n], torch.full((n,), -1.0), atol=1e-4)


def test_nft_defaults_to_the_authors_scripts():
    assert algorithms.make("nft").normalize == 1


def test_nft_learns_from_wrong_answers_and_drops_uniform_groups():
    b = rollout(1, correct=torch.tensor([1] * 4 + [0] * 4 + [1, 0, 0, 0], dtype=torch.bool))
    for neg_weight in (0.0, 1.0):
        method = algorithms.make("nft", neg_weight=neg_weight)
        _, grad = gradient_of(planned(method, b), b.logp)
        wrong = b.spread(~b.correct) & b.valid
        assert bool((grad[wrong & b.spread(b.group_ids == 3)] > 0).any()) == (neg_weight > 0)
        assert not grad[b.spread(b.group_ids != 3)].any()


# -------------------------------------------------------------------------------------------- PIPO


def pipo_formula(phi: float):
    def formula(b, x):
        r = (x - b.old_logp).exp()
        a = b.sequence_mean(grpo_a(b))
        c = [4 * a[i] / (sum(abs(a[j]) for j in mates(b, i)) + 1e-6) for i in range(12)]
        c = b.spread(torch.stack(c) * phi)
        return token_mean(b, torch.maximum(-r * c, -r.clamp(0.8, 1.2) * c))

    return formula


@pytest.mark.parametrize("better", [True, False])
def test_pipo(better: bool):
    """Eight batches of history, then a better or a worse batch."""
    method = algorithms.make("pipo")
    state = method.initial_state()
    means = []
    for seed in range(8):
        old = rollout(seed, binary=False)
        state = method.advance(state, method.prepare(old, state))
        means.append(float(old.reward.mean()))
    new = rollout(9, binary=False)
    new = dataclasses.replace(new, reward=new.reward + (1.0 if better else -1.0))
    new = method.prepare(new, state)
    (plan,) = method.before(new, state)
    assert plan.source == "previous" and torch.equal(plan.batch.old_logp, old.old_logp)
    history = torch.tensor(means, dtype=torch.float64)
    gain = float(new.reward.mean() - history.mean())
    xi = gain / float(history.std())
    phi = xi if better else 0.1 * xi
    x = old.logp.clone().requires_grad_()
    expected = pipo_formula(phi)(old, x)
    (grad,) = torch.autograd.grad(expected, x)
    loss, found = gradient_of(plan, old.logp)
    compare(loss, expected, rtol=1e-10)
    compare(found, grad, atol=1e-10 * float(grad.abs().max()))
    ordinary = method.plans(new, state)
    base = algorithms.make("grpo", kl=None, aggregation="token_mean")
    assert len(ordinary) == 1 and ordinary[0].source == "current"
    same_gradient(method, base, rollout(9, binary=False))


def test_pipo_waits_and_can_skip():
    method = algorithms.make("pipo", worsening=0.0, min_steps=3)
    state = method.initial_state()
    for seed in range(4):
        b = method.prepare(rollout(seed, reward=torch.full((12,), -float(seed)).double()), state)
        assert method.before(b, state) == ()  # too little history, then worse every time
        state = method.advance(state, b)
    assert len(state["means"]) == 4 and state["batches"] == 4
    b = method.prepare(rollout(0, reward=torch.full((12,), 9.0).double()), state)
    assert len(method.before(b, state)) == 1


def test_pipo_forms_kill_opposite_sides_of_a_negative_coefficient():
    d = torch.tensor([0.5, -0.5], dtype=torch.float64)
    b = Batch(
        reward=torch.zeros(1).double(),
        group_ids=torch.zeros(1, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 2], dtype=torch.int32),
        old_logp=torch.zeros(2).double(),
        advantage=-torch.ones(1).double(),
    )
    for form, alive in (("paper", [True, False]), ("code", [False, True])):
        method = algorithms.make("pipo", form=form, min_steps=2)
        state = {"means": [0.0, 0.1], "batches": 2, "previous": b.to_state()}
        new = dataclasses.replace(b, reward=torch.ones(1).double())
        if form == "paper":
            (plan,) = method.before(new, state)
        else:
            plan = method.replay_plan(method.replay(new, state), state)
        _, grad = gradient_of(plan, d)
        assert (grad != 0).tolist() == alive


# -------------------------------------------------------------------------------------------- DYPO


def dypo_formula(alpha: float, beta: float, sft: float, mean: str):
    def formula(b, x, h):
        total = x.new_zeros(())
        span = spans(b)
        for g in b.group_ids.unique().tolist():
            members = [i for i in range(12) if b.group_ids[i] == g and span[i]]
            own = [i for i in members if not b.demonstration[i]]
            right = sum(bool(b.correct[i]) for i in own)
            if right == 0:
                for i in set(members) - set(own):
                    nll = -x[span[i]]
                    total = total + sft * (nll.mean() if mean == "token" else nll.sum())
            elif right < len(own):
                rewards = b.reward[own]
                score = [(x - b.ref_logp)[span[i]].sum() for i in own]
                for i in own:
                    a = (b.reward[i] - rewards.mean()) / (rewards.std() + 1e-6)
                    loss = ppo(x[span[i]], b.old_logp[span[i]], a).mean()
                    total = total + alpha * loss / len(own)
                pairs = [
                    -torch.nn.functional.logsigmoid(beta * (score[s] - score[f]))
                    for s, f in itertools.permutations(range(len(own)), 2)
                    if rewards[s] > rewards[f]
                ]
                total = total + (1 - alpha) * torch.stack(pairs).mean()
        return total / 3

    return formula


@pytest.mark.parametrize("mean", ["token", "trace"])
def test_dypo(mean: str, backend: Backend):
    """One hard prompt with a teacher trace, one mixed, one easy: three branches in one pass."""
    correct = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    b = rollout(3, correct=correct, reward=correct.double())
    method = algorithms.make("dypo", alpha=0.3, beta=0.7, sft_coef=0.5, sft_mean=mean)
    check(backend, method, dypo_formula(0.3, 0.7, 0.5, mean), b)


# -------------------------------------------------------------------------- analogues, CDPO, LOPTI


def test_mirror_descent(backend: Backend):
    def formula(b, x, h):
        anchor = b.old_logp if b.ref_logp is None else b.ref_logp
        loss = -grpo_a(b) * (x - b.old_logp).exp() + (x - b.old_logp).exp() * k3(x, anchor) / 0.4
        return token_mean(b, loss)

    for b in (rollout(0, binary=False), rollout(0, binary=False, ref_logp=None)):
        check(backend, algorithms.make("mirror_descent", eta=0.4), formula, b)


def test_mirror_descents_expected_gradient_is_that_of_its_divergence():
    """A bandit with six arms: sums over the arms, weighted by pi_k. k2 is off by 0.1 there."""
    gen = torch.Generator().manual_seed(1)
    old, z = (torch.randn(6, generator=gen, dtype=torch.float64).log_softmax(0) for _ in range(2))
    z = z.requires_grad_()
    logp = z.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - old)).sum() / 0.5, z, retain_graph=True)
    b = Batch(
        reward=torch.zeros(6).double(),
        group_ids=torch.zeros(6, dtype=torch.int64),
        cu_seqlens=torch.arange(7, dtype=torch.int32),
        old_logp=old,
    )
    _, per_arm = gradient_of(planned(algorithms.make("mirror_descent", eta=0.5), b), logp)
    (found,) = torch.autograd.grad((old.exp() * 6 * per_arm * logp).sum(), z)
    compare(found, exact, atol=1e-12)


def test_a2pr_gate(backend: Backend):
    def formula(b, x, h):
        best = [i for i in range(12) if b.reward[i] == b.reward[mates(b, i)].max()]
        good = [t for i in best for t in spans(b)[i]]  # the ten responses differ, so the best has A > 0
        return token_mean(b, ppo(x, b.old_logp, grpo_a(b))) - 0.2 * x[good].sum() / b.valid.sum()

    check(backend, algorithms.make("a2pr_nll", mu=0.2), formula, rollout(0, binary=False))


def test_cip_entropy(backend: Backend):
    def formula(b, x, h):
        u = b.causal_weight[b.valid]
        return token_mean(b, ppo(x, b.old_logp, grpo_a(b))) - 0.03 * (u * h[b.valid]).sum() / u.sum()

    check(backend, algorithms.make("cip_entropy", entropy_coef=0.03), formula, rollout(0))


def test_cdpo_gradient_is_bounded_by_the_clamp_alone():
    b = rollout(0)
    b = dataclasses.replace(b, logp=b.old_logp, ref_logp=b.old_logp + 10.9)
    _, grad = gradient_of(planned(algorithms.make("cdpo", aggregation="token_mean"), b), b.logp)
    assert float(grad.max()) * int(b.valid.sum()) > 0.005 * math.exp(10.9)
    beyond = dataclasses.replace(b, ref_logp=b.old_logp + 11.1)
    plan = planned(algorithms.make("cdpo", aggregation="token_mean"), beyond)
    without = planned(algorithms.make("cdpo", aggregation="token_mean", kl=None), beyond)
    assert bits(gradient_of(plan, b.logp)[1]) == bits(gradient_of(without, b.logp)[1])


def test_lopti_splits_the_loss_by_old_probability():
    b, method = rollout(0, binary=False), algorithms.make("lopti", eta=0.3)
    rare, rest = method.plans(method.prepare(b, {}), {})
    assert not (rare.mask & rest.mask).any() and torch.equal(rare.mask | rest.mask, b.valid)
    assert bool((b.old_logp[rare.mask].exp() < 0.3).all())
    whole = gradient_of(method.objective(method.prepare(b, {}), {}), b.logp)[1]
    parts = [gradient_of(plan, b.logp)[1] for plan in (rare, rest)]
    compare(parts[0] + parts[1], whole, atol=1e-15)


# -------------------------------------------------------------------------------------- GRPO-Guard


def guard_inputs():
    gen = torch.Generator().manual_seed(0)
    old = torch.randn(5, 2, 3, generator=gen, dtype=torch.float64)
    mean = old + 0.02 * torch.randn(5, 2, 3, generator=gen, dtype=torch.float64)
    sigma, dt = torch.linspace(0.1, 0.7, 5).double(), torch.linspace(0.02, 0.2, 5).double()
    std = sigma * dt.sqrt()
    noise = torch.randn(5, 2, 3, generator=gen, dtype=torch.float64)
    return old + std[:, None, None] * noise, mean, old, sigma, dt


def test_grpo_guard_is_the_papers_normalised_ratio():
    x, mean, old, sigma, dt = guard_inputs()
    s = sigma * dt.sqrt()

    def log_density(mu):
        return (-((x - mu) ** 2).flatten(1) / (2 * s[:, None] ** 2)).mean(1)

    bias = ((mean - old) ** 2).flatten(1).mean(1) / (2 * s**2)
    paper = s * (log_density(mean) - log_density(old) + bias)
    guard = algorithms.make("grpo_guard", clip=0.01, beta=0.1, advantage_max=5.0)
    compare(guard.log_ratio(x, mean, old, s), paper, atol=1e-14)
    a = torch.tensor([1.0, -2.0, 9.0, -9.0, 0.5]).double()
    mu = mean.clone().requires_grad_()
    loss = guard.loss(x, mu, old, sigma, dt, a, ref_mean=old)
    r, c = paper.exp(), a.clamp(-5, 5)
    expected = (torch.maximum(-c * r, -c * r.clamp(0.99, 1.01)) / dt).mean()
    expected = expected + 0.1 * ((mean - old) ** 2 / (2 * sigma[:, None, None] ** 2)).mean()
    compare(loss, expected, rtol=1e-12)
    torch.autograd.gradcheck(lambda m: guard.loss(x, m, old, sigma, dt, a, ref_mean=old), mu, eps=1e-7, atol=1e-5)
    assert algorithms.make("grpo_guard").advantage_max == 5.0
    alone = guard.log_ratio(x[2:3], mean[2:3], old[2:3], s[2:3])
    assert bits(alone) == bits(guard.log_ratio(x, mean, old, s)[2:3])  # no bias of the batch's
    with pytest.raises(ValueError, match="ref_mean must be given with beta = 0.1"):
        guard.loss(x, mean, old, sigma, dt, a)
