"""The standard family against formulas in float64: losses and gradients, on every backend.

Each case is a formula of a dozen lines over the sequences of a random batch (pieces in
support/algorithm_cases.py). The reference runs in float64 and must agree to rounding; kernels run
in float32, where the bound is that of `policy_loss`.
"""

import dataclasses

import pytest
import torch
from algorithm_cases import (
    cast,
    centred,
    k3,
    per_group,
    ppo,
    rollout,
    seq_mean,
    spans,
    token_mean,
    whitened,
    z_score,
)
from harness import Backend, backends, bits, compare
from torch import Tensor

import tokfuse
from tokfuse import KL, PPOClip, algorithms
from tokfuse.algorithms import Batch, Overlong
from tokfuse.algorithms.registry import ENTRIES


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


def planned(algorithm, batch: Batch, state=None) -> algorithms.Plan:
    state = algorithm.initial_state() if state is None else state
    return algorithm.objective(algorithm.prepare(batch, state), state)


def gradient_of(plan, logp: Tensor, entropy: Tensor | None = None):
    """(loss with the plan's constant, d loss / d logp, d loss / d entropy)."""
    x = logp.detach().clone().requires_grad_()
    h = None if entropy is None else entropy.detach().clone().requires_grad_()
    out = plan.loss(x, h).loss
    leaves = [x] if h is None else [x, h]
    grads = torch.autograd.grad(out, leaves, allow_unused=True, materialize_grads=True)
    return out.detach() + (0.0 if plan.constant is None else plan.constant), *grads


def check(backend: Backend, algorithm, formula, batch: Batch, state=None) -> None:
    """The plan's loss and gradients are those of formula(batch, logp, entropy)."""
    x = batch.logp.clone().requires_grad_()
    h = batch.entropy.clone().requires_grad_()
    expected = formula(batch, x, h)
    grad_x, grad_h = torch.autograd.grad(
        expected, [x, h], allow_unused=True, materialize_grads=True
    )
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    bound = 1e-12 if backend.name == "reference" else 3e-6
    plan = planned(algorithm, cast(batch, dtype), state)
    uses_entropy = plan.objective.entropy_coef != 0.0
    entropy = batch.entropy.to(dtype) if uses_entropy else None
    loss, *grads = gradient_of(plan, batch.logp.to(dtype), entropy)
    size = max(1.0, float(expected.detach().abs()))
    compare(loss, expected, atol=bound * size, what="loss")
    compare(grads[0], grad_x, atol=bound * float(grad_x.abs().max()), what="d logp")
    assert uses_entropy or not grad_h.any()
    if uses_entropy:
        compare(grads[1], grad_h, atol=bound * float(grad_h.abs().max()), what="d entropy")


# --------------------------------------------------------------------------------------- formulas


def reward_to_go(b: Batch, r: Tensor) -> Tensor:
    out = torch.zeros_like(r)
    for span in spans(b):
        for k, t in enumerate(span):
            out[t] = r[span[k:]].sum()
    return out


def outcome(b: Batch) -> Tensor:
    """The reward on the last valid token."""
    r = torch.zeros_like(b.old_logp)
    for i, span in enumerate(spans(b)):
        if span:
            r[span[-1]] = b.reward[i]
    return r


def gae(b: Batch, lam: float | list[float] = 1.0, gamma: float = 1.0) -> Tensor:
    """Behind an unfinished response the value of its last token, behind a finished one 0."""
    r, out = outcome(b), torch.zeros_like(b.old_logp)
    for i, span in enumerate(spans(b)):
        decay = lam[i] if isinstance(lam, list) else lam
        carry = 0.0
        for k in reversed(range(len(span))):
            behind = 0.0 if b.finished[i] else b.value[span[-1]]
            after = b.value[span[k + 1]] if k + 1 < len(span) else behind
            carry = r[span[k]] + gamma * after - b.value[span[k]] + gamma * decay * carry
            out[span[k]] = carry
    return out


def token_ppo(advantage, aggregate=token_mean, **clip):
    return lambda b, x, h: aggregate(b, ppo(x, b.old_logp, advantage(b), **clip))


def grpo_a(b: Batch) -> Tensor:
    return per_group(b, z_score)


def f_dapo(b, x, h):
    reward = b.reward + torch.tensor([max(-1.0, min(0.0, (3 - n) / 2)) for n in map(len, spans(b))])
    a = per_group(dataclasses.replace(b, reward=reward), z_score)
    return token_mean(b, ppo(x, b.old_logp, a, 0.2, 0.28))  # no group is all right or all wrong


def f_grpo(b, x, h):
    return seq_mean(b, ppo(x, b.old_logp, grpo_a(b)) + 0.04 * k3(x, b.ref_logp))


def f_dr_grpo(b, x, h):
    return ppo(x, b.old_logp, per_group(b, centred))[b.valid].sum() / (b.num_seqs * 9)


def f_ppo_dual(b, x, h):
    a = whitened(b, gae(b))
    loss = ppo(x, b.old_logp, a)
    return token_mean(b, torch.where(a < 0, torch.minimum(loss, -3 * a), loss))


def opo(b: Batch) -> Tensor:
    n = torch.tensor([len(span) for span in spans(b)], dtype=torch.float64)
    out, cu = torch.zeros_like(b.old_logp), b.cu_seqlens.tolist()
    for i in range(b.num_seqs):
        group = (b.group_ids == b.group_ids[i]).nonzero().flatten()
        out[cu[i] : cu[i + 1]] = b.reward[i] - (n * b.reward)[group].sum() / n[group].sum()
    return out


def f_opo(b, x, h):
    return token_mean(b, -opo(b) * x)


def f_gpg(b, x, h):
    """The third prompt of this batch has equal rewards: 12 responses, 8 in live groups."""
    return token_mean(b, -per_group(b, centred) * 12 / 8 * x)


def f_reinforce_pp(b, x, h):
    r = outcome(b) - 0.1 * (b.old_logp - b.ref_logp)
    return token_mean(b, ppo(x, b.old_logp, whitened(b, reward_to_go(b, r))))


def pass_at_k(r, group, place):
    top = group.sort(descending=True).values
    return (top[0] - top[1]) / (group.std() + 1e-6) if r == top[0] else 0.0


def otb(b: Batch) -> Tensor:
    """Positions count from the start of the response; a masked token has no weight."""
    w, g = torch.zeros_like(b.old_logp), reward_to_go(b, outcome(b))
    cu = b.cu_seqlens.tolist()
    for span in spans(b):
        for k, t in enumerate(span):
            w[t] = sum(1 - 2 * b.old_logp[u].exp() + b.sum_sq[u] for u in span[: k + 1])
    out = torch.zeros_like(w)
    for i, span in enumerate(spans(b)):
        for t in span:
            group = (b.group_ids == b.group_ids[i]).nonzero().flatten().tolist()
            cells = [cu[j] + t - cu[i] for j in group if cu[j] + t - cu[i] < cu[j + 1]]
            cells = [u for u in cells if b.valid[u]]
            out[t] = g[t] - sum(g[u] * w[u] for u in cells) / sum(w[u] for u in cells)
    return out


def f_gspo(b, x, h):
    a, out = grpo_a(b), []
    for span in spans(b):
        if span:
            s = (x - b.old_logp)[span].mean().exp()
            a_i = a[span[0]]
            out.append(torch.maximum(-a_i * s, -a_i * s.clamp(1 - 3e-4, 1 + 4e-4)))
    return torch.stack(out).mean()


def f_gspo_token(b, x, h):
    a, loss = grpo_a(b), torch.zeros_like(x)
    parts = []
    for span in spans(b):
        if span:
            s = (x - b.old_logp)[span].mean().exp().detach()
            r = s * (x[span] - x[span].detach()).exp()
            loss = torch.maximum(-a[span] * r, -a[span] * r.clamp(1 - 3e-4, 1 + 4e-4))
            parts.append(loss.mean())
    return torch.stack(parts).mean()


def f_gmpo(b, x, h):
    a, out = grpo_a(b), []
    for span in spans(b):
        if span:
            sign, d = torch.sign(a[span[0]]), (x - b.old_logp)[span]
            bounded = sign * torch.minimum(sign * d, sign * d.clamp(-0.4, 0.4))
            out.append(-a[span[0]] * bounded.mean().exp())
    return torch.stack(out).mean()


def f_sapo(b, x, h):
    a, r = grpo_a(b), (x - b.old_logp).exp()
    tau = torch.where(a > 0, 1.0, 1.05).double()
    tau[a <= 0] = 1.05
    return seq_mean(b, -(4 / tau) * torch.sigmoid(tau * (r - 1)) * a)


def f_cispo(b, x, h):
    return token_mean(b, -(x - b.old_logp).exp().clamp(max=5).detach() * grpo_a(b) * x)


def f_vespo(b, x, h):
    a, gate = grpo_a(b), torch.zeros_like(x)
    for span in spans(b):
        if span:
            d = (x - b.old_logp)[span].sum().detach()
            k, lam = (2.0, 3.0) if a[span[0]] >= 0 else (3.0, 2.0)
            gate[span] = (lam + k * d - lam * d.exp()).exp()
    return token_mean(b, -gate * a * x)


def f_high_entropy(b, x, h):
    keep = b.entropy >= torch.quantile(b.entropy[b.valid], 0.8)
    return token_mean(b, keep * ppo(x, b.old_logp, grpo_a(b), 0.2, 0.28))


def f_kl_cov(b, x, h):
    a, v = grpo_a(b), b.valid
    cov = (a - a[v].mean()) * (x.detach() - x.detach()[v].mean())
    chosen = torch.zeros_like(x)
    for t in sorted(v.nonzero().flatten().tolist(), key=lambda t: -cov[t])[:8]:  # 0.25 of 34
        chosen[t] = 1.0
    d = x - b.old_logp
    return token_mean(b, -a * d.exp() + chosen * d.abs())


def f_ar(b, x, h):
    return token_mean(b, ppo(x, b.old_logp, grpo_a(b) * (0.2 * b.old_logp.exp() + 0.8)))


def f_vapo(b, x, h):
    lam = [1 - 1 / max(0.05 * len(span), 1.0) for span in spans(b)]
    a = whitened(b, gae(b, lam))
    good = [t for i, span in enumerate(spans(b)) if b.correct[i] for t in span]
    return token_mean(b, ppo(x, b.old_logp, a, 0.2, 0.28)) - 0.1 * x[good].mean()


def mismatch(rule):
    """token_mean of w ppo, w = rule(w of the tokens of one sequence)."""

    def formula(b, x, h):
        w, d = torch.zeros_like(x), b.old_logp - b.sampler_logp
        for span in spans(b):
            w[span] = rule(d[span]) if span else w[span]
        return token_mean(b, w * ppo(x, b.old_logp, grpo_a(b)))

    return formula


def keep_if(d: Tensor, low: float, high: float, value: Tensor) -> Tensor:
    return torch.where((value >= low) & (value <= high), value, 0.0).expand_as(d)


def f_geo_rs(b, x, h):
    d, keep = b.old_logp - b.sampler_logp, torch.zeros_like(b.valid)
    for span in spans(b):
        keep[span] = bool(span) and 0.9 <= float(d[span].mean().exp()) <= 1.1
    return ppo(x, b.old_logp, grpo_a(b))[keep].sum() / keep.sum()


def f_opsm(b, x, h):
    a, keep = grpo_a(b), torch.zeros_like(x)
    for span in spans(b):
        if span:
            stale = (b.sampler_logp - x.detach())[span].mean()
            keep[span] = float(a[span[0]] >= 0 or stale <= 0.05)
    return token_mean(b, keep * ppo(x, b.old_logp, a))


def f_cdpo(b, x, h):
    a = per_group(b, lambda *g: z_score(*g, eps=1e-4))
    return seq_mean(b, ppo(x, b.old_logp, a) - 0.01 * k3(x, b.ref_logp))


def f_tis_current(b, x, h):
    """bypass: the engine's log-probability in the ratio."""
    return token_mean(b, ppo(x, b.sampler_logp, grpo_a(b)))


CASES = {
    "ppo": ("ppo", {}, token_ppo(lambda b: whitened(b, gae(b)))),
    "ppo_raw": ("ppo", {"whiten": False, "lam": 0.9, "gamma": 0.99},
                token_ppo(lambda b: gae(b, 0.9, gamma=0.99))),
    "ppo_dual": ("ppo_dual", {}, f_ppo_dual),
    "grpo": ("grpo", {}, f_grpo),
    "grpo_no_kl": ("grpo", {"kl": None}, token_ppo(grpo_a, seq_mean)),
    "grpo_batch_scale": ("grpo", {"kl": None, "scale": "batch_std"}, token_ppo(
        lambda b: per_group(b, centred) / (b.reward.std() + 1e-6), seq_mean)),
    "dr_grpo": ("dr_grpo", {"max_length": 9}, f_dr_grpo),
    "dapo": ("dapo", {"overlong": Overlong(max_length=5, cache=2)}, f_dapo),
    "rloo": ("rloo", {}, token_ppo(lambda b: per_group(b, centred) * 4 / 3)),
    "remax": ("remax", {}, token_ppo(lambda b: b.spread(b.reward - b.greedy_reward))),
    "opo": ("opo", {}, f_opo),
    "reinforce_pp": ("reinforce_pp", {"reward_kl": 0.1}, f_reinforce_pp),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {},
                              token_ppo(lambda b: whitened(b, per_group(b, centred)))),
    "pass_at_k": ("pass_at_k", {}, token_ppo(lambda b: per_group(b, pass_at_k))),
    "otb": ("otb", {}, token_ppo(otb)),
    "gspo": ("gspo", {}, f_gspo),
    "gspo_token": ("gspo_token", {}, f_gspo_token),
    "cispo": ("cispo", {}, f_cispo),
    "gmpo": ("gmpo", {}, f_gmpo),
    "sapo": ("sapo", {}, f_sapo),
    "vespo": ("vespo", {}, f_vespo),
    "high_entropy": ("high_entropy", {}, f_high_entropy),
    "kl_cov": ("kl_cov", {"rules": (algorithms.KLCov(fraction=0.25),)}, f_kl_cov),
    "ar": ("ar", {}, f_ar),
    "vapo": ("vapo", {}, f_vapo),
    "tis": ("tis", {}, mismatch(lambda d: d.exp().clamp(max=2))),
    "seq_tis": ("seq_tis", {}, mismatch(lambda d: d.sum().exp().clamp(max=2).expand_as(d))),
    "mis": ("mis", {}, mismatch(lambda d: keep_if(d, 0, 3, d.sum().exp()))),
    "icepop": ("icepop", {}, mismatch(lambda d: keep_if(d, 0.5, 5, d.exp()))),
    "seq_mask_tis": ("seq_mask_tis", {}, mismatch(
        lambda d: d.exp() * float(0.5 <= d.mean().exp() <= 5))),
    "geo_rs": ("geo_rs", {"correction": algorithms.Correction(
        mode="keep", dropped="leave",
        keep_rules=(tokfuse.KeepRule("ratio", "mean", 0.9, 1.1),))}, f_geo_rs),
    "opsm": ("opsm", {"correction": algorithms.Correction(
        mode="keep", policy="current",
        keep_rules=(tokfuse.KeepRule("k1", "mean", high=0.05, negative_only=True),))}, f_opsm),
    "bypass": ("grpo", {"kl": None, "aggregation": "token_mean", "bypass": True}, f_tis_current),
    "cdpo": ("cdpo", {}, f_cdpo),
}  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("case", CASES)
def test_standard_family(case: str, seed: int, backend: Backend):
    name, options, formula = CASES[case]
    check(backend, algorithms.make(name, **options), formula, rollout(seed, binary=False))


def test_methods_of_binary_rewards(backend: Backend):
    b = rollout(4)
    reward = torch.where(b.group_ids == 3, 1.0, b.reward)
    live = dataclasses.replace(b, reward=reward)
    check(backend, algorithms.make("gpg"), f_gpg, live)
    a = per_group(b, lambda r, group, _: (r - group.mean()) / (group.mean() + 1e-8))
    check(
        backend, algorithms.make("maxrl"), lambda b, x, h: token_mean(b, ppo(x, b.old_logp, a)), b
    )


def test_gpg_counts_live_groups_and_verl_counts_rewards():
    b = rollout(4)
    live = dataclasses.replace(b, reward=torch.where(b.group_ids == 3, 1.0, b.reward))
    base = algorithms.make("dr_grpo", max_length=1).advantages(live).value
    official = algorithms.make("gpg").advantages(live).value
    verl = algorithms.make("gpg", advantage="gpg_verl").advantages(live).value
    compare(official, base * 12 / 8, rtol=1e-12)
    compare(verl, base * 12 / float((live.reward != 0).sum()), rtol=1e-12)


def test_every_row_of_the_table_is_tested():
    tested = {name for name, *_ in CASES.values()} | {"gpg", "maxrl", "clip_cov"}
    rows = {e.name for e in ENTRIES.values() if e.cls is algorithms.Standard}
    assert rows == tested


def test_clip_cov_drops_candidates_only(backend: Backend):
    b = rollout(1, binary=False)
    rule = algorithms.ClipCov(fraction=0.1, low=0.05, high=5.0, seed=3)
    method = algorithms.make("clip_cov", rules=(rule,))
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    plan = planned(method, cast(b, dtype))
    a, x = grpo_a(b), b.logp
    cov = (a - a[b.valid].mean()) * (x - x[b.valid].mean())
    r = (x - b.old_logp).exp()
    clipped = ((a > 0) & (r > 1.2)) | ((a < 0) & (r < 0.8))
    candidate = b.valid & ~clipped & (cov > 0.05) & (cov < 5)
    dropped = plan.token_weight == 0
    assert int(dropped.sum()) == 3  # 0.1 of 34
    assert not (dropped & ~candidate).any()
    check(backend, method, lambda b, x, h: token_mean(b, ~dropped * ppo(x, b.old_logp, a)), b)
    again = planned(method, cast(b, dtype), {"updates": 0})
    other = planned(method, cast(b, dtype), {"updates": 1})
    assert bits(again.token_weight) == bits(plan.token_weight) != bits(other.token_weight)


# --------------------------------------------------------------------- the same through policy_step

OPTIONS = {
    "a2pr_nll": {"mu": 0.1}, "cip_entropy": {"entropy_coef": 0.01}, "dr_grpo": {"max_length": 8},
    "d3s": {"rollouts": (2, 4), "tokens": (0.3, 0.6), "total_steps": 10}, "epo": {"max_turns": 4},
    "mirror_descent": {"eta": 0.5}, "reinforce_pp": {"reward_kl": 0.01},
    "r2vpo": {"delta": 0.1, "step_size": 1.0, "penalty": 0.04}, "tppo": {"gamma": 1.0, "lam": 0.95},
}  # fmt: skip
METHODS = [name for name in algorithms.list() if name != "grpo_guard"]


def example(name: str, **options) -> algorithms.Algorithm:
    return algorithms.make(name, **{**OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("name", METHODS)
def test_plans_run_fused(name: str, backend: Backend):
    """policy_step from logits, with a plan's inputs, equals plan.loss of the statistics."""
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    batch, method = cast(rollout(2), dtype), example(name)
    gen = torch.Generator().manual_seed(0)
    logits = torch.randn(batch.num_tokens, 33, generator=gen, dtype=dtype)
    target = torch.randint(33, (batch.num_tokens,), generator=gen)
    stats = tokfuse.token_stats(logits, target)
    batch = dataclasses.replace(batch, old_logp=stats.logp + 0.3 * batch.causal_weight - 0.3)
    state = method.initial_state()
    for plan in method.plans(method.prepare(batch, state).with_policy(stats.logp), state):
        z = logits.clone().requires_grad_()
        live = tokfuse.token_stats(z, target)
        entropy = live.entropy if plan.objective.entropy_coef else None
        composed = plan.loss(live.logp, entropy)
        (expected,) = torch.autograd.grad(composed.loss, z)
        y = logits.clone().requires_grad_()
        step = tokfuse.policy_step(logits=y, target=target, **plan.inputs())
        step.loss.backward()
        compare(step.loss, composed.loss, rtol=2e-6, atol=1e-7)
        compare(y.grad, expected, atol=3e-6 * float(expected.abs().max()))


@pytest.mark.parametrize("name", METHODS)
def test_degenerate_groups(name: str):
    """All right, all wrong, one response, no response: finite losses and gradients."""
    full = rollout(0)
    for reward, take in ((1.0, range(12)), (0.0, range(12)), (1.0, [2]), (0.0, [])):
        batch = full.take(torch.tensor(list(take), dtype=torch.int64))
        reward = torch.full_like(batch.reward, reward)
        batch = dataclasses.replace(batch, reward=reward, correct=reward > 0)
        method = example(name)
        state = method.initial_state()
        prepared = method.prepare(batch, state)
        for plan in (*method.before(prepared, state), *method.plans(prepared, state)):
            loss, grad, *_ = gradient_of(
                plan, batch.logp, batch.entropy if plan.objective.entropy_coef else None
            )
            assert loss.isfinite() and bool(grad.isfinite().all())
        state = method.update(state, method.measure(plan, batch.logp, batch.entropy))
        assert method.advance(state, prepared).keys() == method.initial_state().keys()


def test_groups_without_spread_have_no_gradient():
    """Group estimators give exactly 0 for equal rewards, of which 0.1 and 1.1 leave rounding."""
    for name in ("grpo", "dr_grpo", "rloo", "opo", "gpg", "gbpo", "d3s", "adora", "gspo", "dapo"):
        for value in (0.1, 1.1):
            b = rollout(0)
            b = dataclasses.replace(b, reward=torch.full_like(b.reward, value))
            method = example(name, **({"kl": None} if name == "grpo" else {}))
            _, grad = gradient_of(planned(method, b), b.logp)
            assert not grad.any(), name


# ---------------------------------------------------------------------------- minibatches and ranks


# What these minimise is itself decided over all tokens of an optimizer step, or counts in its own
# unit.
WHOLE = (
    "bapo",
    "cip_entropy",
    "clip_cov",
    "dr_grpo",
    "dypo",
    "high_entropy",
    "kl_cov",
    "nft",
    "vapo",
)


@pytest.mark.parametrize("name", [n for n in METHODS if n not in WHOLE])
def test_minibatches_add_up(name: str):
    """Parts with the whole batch's count give the whole batch's loss, where nothing is global."""
    method, batch = example(name), rollout(3)
    state = method.initial_state()
    prepared = method.prepare(batch, state)
    whole = method.plans(prepared, state)
    total = [float(plan.loss(batch.logp, batch.entropy).loss) for plan in whole]
    parts = [0.0] * len(whole)
    for ids in ([0, 5, 3], [1, 2, 4, 11], [6, 7, 8, 9, 10]):
        part = prepared.take(torch.tensor(ids))
        for k, plan in enumerate(method.plans(part, state)):
            count = float(whole[k].count())
            parts[k] += float(plan.loss(part.logp, part.entropy, normalizer=count).loss)
    assert parts == pytest.approx(total, rel=1e-9, abs=1e-12)


def test_take_keeps_order_and_fields():
    b = rollout(0)
    ids = torch.tensor([7, 0, 4])
    part = b.take(ids)
    assert part.cu_seqlens.tolist() == [0, 6, 9, 13]
    cu = b.cu_seqlens.tolist()
    rows = [t for i in ids.tolist() for t in range(cu[i], cu[i + 1])]
    assert torch.equal(part.old_logp, b.old_logp[rows]) and torch.equal(part.mask, b.mask[rows])
    assert torch.equal(part.reward, b.reward[ids])


# ---------------------------------------------------------------------------------- names, refusals


def test_unknown_names_and_options_list_the_known():
    with pytest.raises(
        ValueError, match=r"one of a2pr_nll, adora.*got 'gbop'. Did you mean 'gbpo'"
    ):
        algorithms.make("gbop")
    with pytest.raises(ValueError, match=r"algorithms.gbpo: options must be among advantage,.*tau"):
        algorithms.make("gbpo", tua=1.0)
    with pytest.raises(ValueError, match=r"dr_grpo: max_length must be given \(no published"):
        algorithms.make("dr_grpo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"lam": 0.9}, "lam must be left out with advantage 'grpo'"),
        ("grpo", {"advantage": "grop"}, "advantage must be one of grpo"),
        ("gspo", {"level": "seq"}, "level must be one of"),
        ("grpo", {"max_length": 5}, "max_length must be left out"),
        ("opo", {"eps": 1e-4, "advantage": "gae"}, "eps must be left out"),
        ("grpo", {"kl": None, "kl_control": algorithms.KLControl(target=0.1, horizon=10)},
         "kl_control must be None without"),
        ("tis", {"bypass": True}, "correction must be None with bypass"),
        ("gbpo", {"tau": 0.0}, "tau must be a finite number in"),
        ("nft", {"neg_weight": -1.0}, "neg_weight must be a finite number"),
        ("bapo", {"shape": PPOClip(low=0.1)}, "shape must be left out"),
        ("lopti", {"level": "sequence"}, "level must be one of token"),
        ("adora", {"condition": "length"}, "condition must be left out with rule 'llm'"),
    ],
)  # fmt: skip
def test_refusals_of_options(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        algorithms.make(name, **options)


def test_refusals_of_batches():
    b = rollout(0)
    for name, missing in (("grpo", "ref_logp"), ("ppo", "value"), ("bapo", "logp"),
                          ("high_entropy", "entropy"), ("tis", "sampler_logp"), ("nft", "correct"),
                          ("dcpo_dist", "second_logp"), ("otb", "sum_sq")):  # fmt: skip
        with pytest.raises(ValueError, match=rf"algorithms.{name}: batch.{missing} must be given"):
            planned(example(name), dataclasses.replace(b, **{missing: None}))
    with pytest.raises(ValueError, match="batch must be prepared"):
        algorithms.make("dapo").objective(b, {})
    with pytest.raises(ValueError, match=r"entropy must be of shape \(37,\)"):
        dataclasses.replace(b, entropy=b.entropy[:5])
    with pytest.raises(ValueError, match="ends at num_tokens"):
        dataclasses.replace(b, cu_seqlens=b.cu_seqlens[:-1])
    with pytest.raises(ValueError, match="kl must be None"):
        rules = (algorithms.KLCov(),)
        planned(algorithms.make("grpo", rules=rules), b)


def test_no_tensor_of_the_user_is_written():
    b = rollout(0)
    before = {f.name: bits(v) for f in dataclasses.fields(b)
              if isinstance(v := getattr(b, f.name), Tensor)}  # fmt: skip
    for name in METHODS:
        method = example(name)
        state = method.initial_state()
        prepared = method.prepare(b, state)
        for plan in method.plans(prepared, state):
            plan.loss(b.logp, b.entropy)
        method.advance(method.update(state, method.measure(plan, b.logp, b.entropy)), prepared)
        assert all(bits(getattr(b, k)) == v for k, v in before.items()), name


# -------------------------------------------------------------------------------------- controllers


def test_kl_controller():
    """coef *= 1 + clip(KL / target - 1, +-0.2) n / horizon; the plan takes the new coefficient."""
    control = algorithms.KLControl(target=0.1, horizon=120)
    method = algorithms.make("grpo", kl=KL(coef=0.04), kl_control=control)
    b, state = rollout(0), method.initial_state()
    state = method.update(state, method.measure(planned(method, b), b.logp))
    kl = float((b.logp - b.ref_logp)[b.valid].mean())
    error = min(max(kl / 0.1 - 1, -0.2), 0.2)
    assert state["kl_coef"] == pytest.approx(0.04 * (1 + error * 12 / 120), rel=1e-12)
    assert planned(method, b, state).objective.kl.coef == state["kl_coef"]


def test_entropy_controller():
    """+-0.005 towards the target, used only while the entropy is not above it."""
    method = algorithms.make("dapo", entropy_control=algorithms.EntropyControl(target=1.0))
    b, state = rollout(0), method.initial_state()
    for entropy, coef, used in ((0.5, 0.005, True), (0.9, 0.01, True), (1.5, 0.005, False)):
        h = torch.full_like(b.entropy, entropy)
        state = method.update(state, method.measure(planned(method, b, state), b.logp, h))
        assert state["entropy_coef"] == pytest.approx(coef)
        spec = planned(method, b, state).objective
        assert spec.entropy_coef == (state["entropy_coef"] if used else 0.0)
