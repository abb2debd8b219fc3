"""Test the standard family against float64 formulas: losses and gradients, on every backend.

Each case is a formula of a dozen lines over the sequences of a random batch (helpers are in
support/algorithm_cases.py). The reference runs in float64 and must agree up to rounding. Kernels run in
float32, with the bound of `policy_loss`.
"""

import dataclasses

import pytest
import torch
from algorithm_cases import (
    cast,
    centred,
    check,
    gae,
    grpo_a,
    k3,
    outcome,
    per_group,
    planned,
    ppo,
    reward_to_go,
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
from tokfuse import algorithms
from tokfuse.algorithms import Batch, Overlong
from tokfuse.algorithms.registry import ENTRIES


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


# --------------------------------------------------------------------------------------- formulas


def token_ppo(advantage, aggregate=token_mean, **clip):
    return lambda b, x, h: aggregate(b, ppo(x, b.old_logp, advantage(b), **clip))


def f_dapo(b, x, h):
    reward = b.reward + torch.tensor([max(-1.0, min(0.0, (3 - n) / 2)) for n in map(len, spans(b))])
    a = per_group(dataclasses.replace(b, reward=reward), z_score)
    return token_mean(b, ppo(x, b.old_logp, a, 0.2, 0.28))  # no group is all correct or all wrong


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
    """The third prompt of this batch has equal rewards: 12 responses, 8 in groups with a gradient."""
    return token_mean(b, -per_group(b, centred) * 12 / 8 * x)


def f_reinforce_pp(b, x, h):
    r = outcome(b) - 0.1 * (b.old_logp - b.ref_logp)
    return token_mean(b, ppo(x, b.old_logp, whitened(b, reward_to_go(b, r))))


def pass_at_k(r, group, place):
    top = group.sort(descending=True).values
    return (top[0] - top[1]) / (group.std() + 1e-6) if r == top[0] else 0.0


def otb(b: Batch) -> Tensor:
    """Positions count from the start of the response. A masked token has no weight."""
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
    """Return token_mean of w * ppo, with w = rule(w of the tokens of one sequence)."""

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
    return seq_mean(b, ppo(x, b.old_logp, a, 0.2, 0.28) - 0.01 * k3(x, b.ref_logp))


def f_tis_current(b, x, h):
    """Bypass: the ratio uses the log-probability of the engine."""
    return token_mean(b, ppo(x, b.sampler_logp, grpo_a(b)))


CASES = {
    "ppo": ("ppo", {}, token_ppo(lambda b: whitened(b, gae(b)))),
    "ppo_raw": ("ppo", {"whiten": False, "lam": 0.9, "gamma": 0.99}, token_ppo(lambda b: gae(b, 0.9, gamma=0.99))),
    "ppo_dual": ("ppo_dual", {}, f_ppo_dual),
    "grpo": ("grpo", {}, f_grpo),
    "grpo_no_kl": ("grpo", {"kl": None}, token_ppo(grpo_a, seq_mean)),
    "grpo_batch_scale": (
        "grpo",
        {"kl": None, "scale": "batch_std"},
        token_ppo(lambda b: per_group(b, centred) / (b.reward.std() + 1e-6), seq_mean),
    ),
    "dr_grpo": ("dr_grpo", {"max_length": 9}, f_dr_grpo),
    "dapo": ("dapo", {"overlong": Overlong(max_length=5, cache=2)}, f_dapo),
    "rloo": ("rloo", {}, token_ppo(lambda b: per_group(b, centred) * 4 / 3)),
    "remax": ("remax", {}, token_ppo(lambda b: b.spread(b.reward - b.greedy_reward))),
    "opo": ("opo", {}, f_opo),
    "reinforce_pp": ("reinforce_pp", {"reward_kl": 0.1}, f_reinforce_pp),
    "reinforce_pp_baseline": ("reinforce_pp_baseline", {}, token_ppo(lambda b: whitened(b, per_group(b, centred)))),
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
    "seq_mask_tis": ("seq_mask_tis", {}, mismatch(lambda d: d.exp() * float(0.5 <= d.mean().exp() <= 5))),
    "geo_rs": (
        "geo_rs",
        {
            "correction": algorithms.Correction(
                mode="keep", dropped="leave", keep_rules=(tokfuse.KeepRule("ratio", "mean", 0.9, 1.1),)
            )
        },
        f_geo_rs,
    ),
    "opsm": (
        "opsm",
        {
            "correction": algorithms.Correction(
                mode="keep",
                policy="current",
                keep_rules=(tokfuse.KeepRule("k1", "mean", high=0.05, negative_only=True),),
            )
        },
        f_opsm,
    ),
    "bypass": ("grpo", {"kl": None, "aggregation": "token_mean", "bypass": True}, f_tis_current),
    "cdpo": ("cdpo", {}, f_cdpo),
}


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
    check(backend, algorithms.make("maxrl"), lambda b, x, h: token_mean(b, ppo(x, b.old_logp, a)), b)


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


def test_otb_has_no_baseline_for_a_single_response():
    """verl: the advantage of a group of one is its return. A baseline of its own would make it 0."""
    b = rollout(0, binary=False).take(torch.tensor([0, 4, 5]))
    a = algorithms.make("otb").prepare(b, {}).advantage
    alone = b.spread(b.group_ids == 0)
    compare(a[alone & b.valid], b.reward[0].expand(int((alone & b.valid).sum())), atol=1e-12)
    pair = a[~alone & b.valid]
    assert bool((pair != b.spread(b.reward)[~alone & b.valid]).any())


def test_clip_cov_clips_at_zero_and_two():
    """Both official scripts: clip_ratio_low=1, clip_ratio_high=1."""
    assert algorithms.make("clip_cov").shape.bounds == (0.0, 2.0)


def test_clip_cov_drops_candidates_only(backend: Backend):
    b = rollout(1, binary=False)
    rule = algorithms.ClipCov(fraction=0.1, low=0.05, high=5.0, seed=3)
    method = algorithms.make("clip_cov", rules=(rule,))
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    here = cast(b, dtype, backend.device)
    plan = planned(method, here)
    a, x = grpo_a(b), b.logp
    cov = (a - a[b.valid].mean()) * (x - x[b.valid].mean())
    r = (x - b.old_logp).exp()
    clipped = (a > 0) & (r > 2)
    candidate = b.valid & ~clipped & (cov > 0.05) & (cov < 5)
    dropped = plan.token_weight.cpu() == 0
    assert int(dropped.sum()) == 3  # 0.1 of 34
    assert not (dropped & ~candidate).any()
    check(backend, method, lambda b, x, h: token_mean(b, ~dropped * ppo(x, b.old_logp, a, 1.0, 1.0)), b)
    again = planned(method, here, {"updates": 0})
    other = planned(method, here, {"updates": 1})
    assert bits(again.token_weight) == bits(plan.token_weight) != bits(other.token_weight)
