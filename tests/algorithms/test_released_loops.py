"""Test `form="code"` against small simulations of the authors' training loops over several steps.

Each simulation is written from the released trainer: its states, its histories and the order of its minibatches. It
uses float64 and autograd through a full softmax.
"""

import dataclasses
import math
from collections import deque

import pytest
import torch
from algorithm_cases import spans
from harness import compare
from torch import Tensor
from train_cases import Model

from tokfuse import KL, PPOClip, algorithms
from tokfuse.algorithms import Batch, make, train_step

STEPS = 8
HALVES = [torch.arange(0, 8), torch.arange(8, 12)]  # two minibatches of whole prompts


def batches(**replaced) -> list[dict[str, Tensor]]:
    """Return the rewards of several rollouts: they rise, fall and rise."""
    gen = torch.Generator().manual_seed(5)
    level = (0.0, 0.2, 0.1, 0.4, 0.9, -1.0, 1.2, 1.0)
    rewards = [torch.randn(12, generator=gen, dtype=torch.float64) * 0.5 + x for x in level[:STEPS]]
    return [{"reward": r, "correct": r > 0, **replaced} for r in rewards]


def run(method: algorithms.Algorithm, rollouts: list[dict[str, Tensor]]) -> tuple[Model, list[list[float]]]:
    """Train with `train_step`. Return the model and the losses of every rollout."""
    model, state, losses = Model(), method.initial_state(), []
    for fields in rollouts:
        done = train_step(method, state, model.batch(**fields), model.forward, model.optimizer, minibatches=2)
        state = done.state
        losses.append(done.losses)
    return model, losses


class Simulation:
    """The policy of a simulated loop: log-probabilities and entropies of the packed tokens, and SGD."""

    def __init__(self) -> None:
        self.model = Model()

    def forward(self) -> tuple[Tensor, Tensor]:
        logits = (self.model.features @ self.model.weight.t()).log_softmax(1)
        logp = logits.gather(1, self.model.target[:, None])[:, 0]
        return logp, -(logits.exp() * logits).sum(1)

    def update(self, loss: Tensor) -> float:
        self.model.optimizer.zero_grad()
        loss.backward()
        self.model.optimizer.step()
        return float(loss.detach())


def tokens_of(b: Batch, seqs: Tensor) -> Tensor:
    """Return the counting tokens of these sequences, as indices."""
    all_spans = spans(b)
    return torch.tensor([t for i in seqs.tolist() for t in all_spans[i]])


def z_scores(b: Batch) -> Tensor:
    """Return the group advantages of verl's GRPO, one per sequence."""
    out = torch.zeros_like(b.reward)
    for g in b.group_ids.unique():
        mine = b.group_ids == g
        out[mine] = (b.reward[mine] - b.reward[mine].mean()) / (b.reward[mine].std() + 1e-6)
    return out


def dual_clip(logp: Tensor, old: Tensor, a: Tensor, low: float, high: float, c: float) -> Tensor:
    r = (logp - old).exp()
    loss = torch.maximum(-a * r, -a * r.clamp(low, high))
    return torch.where(a < 0, torch.minimum(loss, -a * c), loss)


def k3(logp: Tensor, ref: Tensor) -> Tensor:
    return (ref - logp).exp() - (ref - logp) - 1


def same(got: Model, want: Simulation) -> None:
    moved = float((want.model.weight.detach() - Model().weight.detach()).abs().max())
    assert moved > 1e-3
    compare(got.weight.detach(), want.model.weight.detach(), atol=1e-9 * moved)


# -------------------------------------------------------------------------------------------- PIPO


@pytest.mark.parametrize("worsening", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["grpo", "gspo", "gae"])
def test_pipo(kind: str, worsening: float):
    window, ready = 8, 8
    options = {
        "grpo": {"shape": PPOClip(dual=3.0), "kl": KL(coef=0.001)},
        "gspo": {
            "shape": PPOClip(low=0.003, high=0.004),
            "level": "sequence_token",
            "aggregation": "seq_mean_token_mean",
        },
        "gae": {"advantage": "gae", "whiten": True, "shape": PPOClip(dual=3.0)},
    }[kind]
    method = make("pipo", form="code", worsening=worsening, **options)
    got, _ = run(method, batches())

    sim, history, cache, repeated = Simulation(), deque(maxlen=window), None, []
    base = make("ppo")
    for step, fields in enumerate(batches(), start=1):
        b = sim.model.batch(**fields)
        mu = float(b.reward.mean())
        if kind == "gae":
            a = base.prepare(b, {}).advantage
            seen = torch.tensor(list(history), dtype=torch.float64)
            std = float(seen.std(correction=0)) if len(seen) >= 2 else 1.0
            std = std if std >= 1e-6 else 1.0
            gate = max(-5.0, min(5.0, mu - float(seen.mean()))) / std if len(seen) else 0.0
            a = a * max(-2.0, min(2.0, gate))
        else:
            a = b.spread(z_scores(b))
        history.append(mu)
        seen = torch.tensor(list(history), dtype=torch.float64)
        gain, scale = mu - float(seen.mean()), 1.0
        if gain < 0:
            scale = worsening
        if cache is not None and len(history) >= ready and scale > 0:
            repeated.append(step)
            old_b, old_a = cache
            xi = max(-5.0, min(5.0, gain)) / float(seen.std(correction=0))
            mean = torch.stack([old_a[s].mean() if s else old_a.new_zeros(()) for s in spans(old_b)])
            c = torch.zeros(12, dtype=torch.float64)
            for g in old_b.group_ids.unique():
                mine = old_b.group_ids == g
                c[mine] = mean[mine] / (mean[mine].abs().sum() + 1e-6) * int(mine.sum()) * xi
            c = old_b.spread(c.clamp(-10, 10))
            for seqs in HALVES:
                sim.update(pipo_loss(kind, sim, old_b, c, seqs, second=True, scale=scale))
        for seqs in HALVES:
            sim.update(pipo_loss(kind, sim, b, a, seqs, second=False, scale=1.0))
        cache = (b, a)
        history.append(mu)
    assert repeated == ([5, 6, 7, 8] if worsening else [5, 7, 8])
    same(got, sim)


def pipo_loss(kind: str, sim: Simulation, b: Batch, a: Tensor, seqs: Tensor, *, second: bool, scale: float) -> Tensor:
    """Return the loss of one minibatch: the ordinary one, or one of the authors' *_layback losses."""
    logp, _ = sim.forward()
    t = tokens_of(b, seqs)
    if kind == "gspo":
        low, high, terms = 0.997, 1.004, []
        for i in seqs.tolist():
            s = spans(b)[i]
            if s:
                mean = (logp[s] - b.old_logp[s]).mean()
                r = (logp[s] - logp[s].detach() + mean.detach()).exp()
                terms.append(torch.maximum(-a[s] * r, -a[s] * r.clamp(low, high)).mean())
        return scale * torch.stack(terms).mean()
    if kind == "gae":
        c = float("inf") if second else 3.0
        return scale * dual_clip(logp[t], b.old_logp[t], a[t], 0.8, 1.2, c).mean()
    if second:
        r = (logp[t] - b.old_logp[t]).exp()
        policy = -torch.minimum(r, r.clamp(0.8, 1.2)) * a[t]
    else:
        policy = dual_clip(logp[t], b.old_logp[t], a[t], 0.8, 1.2, 3.0)
    return scale * policy.mean() + 0.001 * k3(logp[t], b.ref_logp[t]).mean()


# ------------------------------------------------------------------------------------------- LOPTI


def test_lopti_goes_over_all_minibatches_with_the_rare_tokens_first():
    method = make("lopti", preset="authors", eta=0.05)
    got, _ = run(method, batches())
    sim = Simulation()
    for fields in batches():
        b = sim.model.batch(**fields)
        a, rare = b.spread(z_scores(b)), b.old_logp.exp() < 0.05
        for chosen in (rare, ~rare):
            for seqs in HALVES:
                logp, _ = sim.forward()
                t = tokens_of(b, seqs)
                part = chosen[t].double()
                policy = dual_clip(logp[t], b.old_logp[t], a[t] * part, 0.8, 1.24, 10.0)
                sim.update(policy.mean() + 0.001 * (k3(logp[t], b.ref_logp[t]) * part).mean())
    same(got, sim)
    alternating, _ = run(make("lopti", preset="authors", eta=0.05, form="minibatch"), batches())
    assert float((alternating.weight - got.weight).detach().abs().max()) > 1e-8


# -------------------------------------------------------------------------------------------- BAPO


@pytest.mark.parametrize("preset", ["authors", "authors_script"])
def test_bapo(preset: str):
    """The release's two while loops, restarted for every minibatch."""
    target, low, high, step_low, step_high = {
        "authors": (1.0, (0.6, 0.8), (1.2, 2.0), 0.05, 0.05),
        "authors_script": (0.5, (0.8, 0.95), (1.2, 2.0), 0.05, 0.1),
    }[preset]
    rollouts = [f | {"reward": f["reward"].exp()} for f in batches()]  # skewed: groups with one good response
    got, _ = run(make("bapo", preset=preset), rollouts)
    sim, chosen = Simulation(), set()
    for fields in rollouts:
        b = sim.model.batch(**fields)
        a = b.spread(z_scores(b))
        for seqs in HALVES:
            logp, _ = sim.forward()
            t = tokens_of(b, seqs)
            r = (logp[t] - b.old_logp[t]).exp().detach()

            def statistic(lo: float, hi: float, r=r, a=a[t]) -> float:
                e = torch.where(a >= 0, r.clamp(max=hi), r.clamp(min=lo)) * a
                bad = float(-e.clamp(max=0).sum())
                return float("inf") if bad <= 0 else float(e.clamp(min=0).sum()) / (bad + 1e-8)

            lo, hi = low[0], high[0]
            while statistic(lo, hi) < target and lo < low[1]:
                lo = min(lo + step_low, low[1])
            while statistic(lo, hi) < target and hi < high[1]:
                hi = min(hi + step_high, high[1])
            chosen.add((round(lo, 6), round(hi, 6)))
            sim.update(dual_clip(logp[t], b.old_logp[t], a[t], lo, hi, 3.0).mean())
    same(got, sim)
    assert len(chosen) >= (2 if preset == "authors" else 1)


@pytest.mark.parametrize("preset", ["authors", "authors_script"])
def test_bapos_search_is_the_loop(preset: str):
    """The one-pass search finds the bounds of the loops, at every outcome."""
    method = make("bapo", preset=preset)
    used, outcomes, gen = method.settings, set(), torch.Generator().manual_seed(2)
    for k in range(300):
        r = (torch.randn(40, generator=gen, dtype=torch.float64) * 0.6).exp()
        a = torch.randn(40, generator=gen, dtype=torch.float64) + (k % 7 - 3) * 0.25
        lo, hi = used.low[0], used.high[0]

        def statistic(lo: float, hi: float, r=r, a=a) -> float:
            e = torch.where(a >= 0, r.clamp(max=hi), r.clamp(min=lo)) * a
            bad = float(-e.clamp(max=0).sum())
            return float("inf") if bad <= 0 else float(e.clamp(min=0).sum()) / (bad + 1e-8)

        while statistic(lo, hi) < used.target and lo < used.low[1]:
            lo = min(lo + used.step_low, used.low[1])
        while statistic(lo, hi) < used.target and hi < used.high[1]:
            hi = min(hi + used.step_high, used.high[1])
        found = method.search(r, a, torch.ones(40, dtype=torch.bool))
        assert found == (pytest.approx(lo, abs=1e-9), pytest.approx(hi, abs=1e-9))
        outcomes.add("start" if lo == used.low[0] else "end" if hi > used.high[1] - 1e-9 else "between")
    assert outcomes == {"start", "between", "end"}


# --------------------------------------------------------------------------------------------- EPO


def test_epo():
    """History of entropies padded on the left, the penalty from turn 25 on, and the schedule over 150 epochs."""
    turns = 30
    method = make("epo", form="code", max_turns=turns, alpha=0.05, kappa_low=0.6, kappa_high=1.2)
    which = [torch.tensor([0, 1, 2, 3] * 3), torch.tensor([0, 13, 26, 27] * 3), torch.tensor([0, 1, 28, 29] * 3)]
    rollouts = [f | {"turn": which[k % 3]} for k, f in enumerate(batches())]
    got, losses = run(method, rollouts)
    sim, history = Simulation(), []
    for k, fields in enumerate(rollouts):
        b = sim.model.batch(**fields)
        means = []
        for turn in range(int(b.turn.max()) + 1):
            t = tokens_of(b, (b.turn == turn).nonzero().flatten())
            means.append(float(b.entropy[t].mean()) if len(t) else 0.0)
        history.append([0.0] * (turns - len(means)) + means)
        mean = torch.tensor(history, dtype=torch.float64).mean(0)
        a = b.spread(z_scores(b))
        beta = 1.0 - 0.2 * (1.0 - torch.exp(torch.tensor(-2.0 * k / 75, dtype=torch.float64)))
        for j, seqs in enumerate(HALVES):
            logp, entropy = sim.forward()
            t = tokens_of(b, seqs)
            h = entropy[t]
            usual = mean[b.spread(b.turn)[t]]
            penalty = torch.where((h > 0.6 * usual) & (h < 1.2 * usual), 0.0, 0.05) * beta
            if not bool((b.turn[seqs] >= 25).any()):
                penalty = torch.zeros_like(penalty)
            loss = dual_clip(logp[t], b.old_logp[t], a[t], 0.8, 1.2, 3.0).mean()
            loss = loss - 1e-3 * (h.mean() - penalty.mean()) + 0.01 * k3(logp[t], b.ref_logp[t]).mean()
            assert losses[k][j] == pytest.approx(sim.update(loss), abs=1e-11)
    same(got, sim)


# -------------------------------------------------------------------------------------- GRPO-Guard


def test_grpo_guard():
    """Two inner epochs over four denoising steps, one optimizer step each, as in train_sd3_GRPO_Guard.py."""
    gen = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=gen, dtype=torch.float64)

    samples, dims, steps = 6, 5, 4
    x, noise, start = normal(steps, samples, dims), normal(steps, samples, dims), normal(dims, dims) * 0.3
    sigma = torch.linspace(0.5, 0.9, steps, dtype=torch.float64)[:, None] * torch.ones(samples, dtype=torch.float64)
    dt = torch.linspace(0.05, 0.2, steps, dtype=torch.float64)[:, None] * torch.ones(samples, dtype=torch.float64)
    advantage = normal(samples) * 4
    s = sigma * dt.sqrt()
    old = torch.stack([x[j] + x[j] @ start for j in range(steps)])
    latent = old + s[..., None] * noise
    method = make("grpo_guard", preset="authors", clip=1e-2, beta=0.1)

    def log_density(j: int, mean: Tensor) -> Tensor:
        return (-((latent[j] - mean) ** 2) / (2 * s[j, :, None] ** 2) - s[j, :, None].log()).mean(1)

    def released(j: int, mean: Tensor) -> Tensor:
        a = advantage.clamp(-5, 5)
        bias = (mean - old[j]).pow(2).mean(dim=())  # an empty tuple of dims averages over everything
        scale = dt[j].sqrt().mean() * sigma[j].mean()
        ratio = ((log_density(j, mean) - log_density(j, old[j]) + bias / (2 * scale**2)) * scale).exp()
        policy = torch.maximum(-a * ratio, -a * ratio.clamp(1 - 1e-2, 1 + 1e-2)).mean() / dt[j].sqrt().mean() ** 2
        kl = ((mean - x[j]) ** 2).mean(1, keepdim=True) / (2 * sigma[j][:, None] ** 2)
        return policy + 0.1 * kl.mean()

    weights = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    for weight, form in zip(weights, ("library", "released"), strict=True):
        optimizer = torch.optim.SGD([weight], lr=1e-3)
        for _ in range(2):
            for j in range(steps):
                mean = x[j] + x[j] @ weight
                if form == "library":
                    loss = method.loss(latent[j], mean, old[j], sigma[j], dt[j], advantage, x[j])
                else:
                    loss = released(j, mean)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    moved = float((weights[1].detach() - start).abs().max())
    assert moved > 1e-4
    compare(weights[0].detach(), weights[1].detach(), atol=1e-10 * moved)
    per_sample = make("grpo_guard", clip=1e-2, beta=0.1)
    mean = x[0] + x[0] @ weights[0].detach()
    given = (latent[0], mean, old[0], sigma[0], dt[0], advantage, x[0])
    assert float((per_sample.loss(*given) - method.loss(*given)).abs()) > 1e-6


# -------------------------------------------------------------------------------- Thought Branches


def test_thought_branches():
    """The released loop over the sentences of a chain: similar rollouts are pooled into the kept side."""
    gen = torch.Generator().manual_seed(1)
    sentences, rollouts = 6, 20
    similarity = torch.rand(sentences, rollouts, generator=gen, dtype=torch.float64)
    similarity[4] = 0.9  # no dissimilar rollout: the loop falls back to all of them
    outcome = torch.rand(sentences, rollouts, generator=gen) < 0.5

    def kl(first: list[bool], second: list[bool]) -> float:
        p, q = ((sum(x) + 1e-9) / (len(x) + 2e-9) for x in (first, second))
        return max(0.0, p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q)))

    want = []
    for i in range(sentences - 1):
        now, following = outcome[i].tolist(), outcome[i + 1].tolist()
        far = [o for o, s in zip(now, similarity[i].tolist(), strict=True) if s < 0.6]
        near = [o for o, s in zip(now, similarity[i].tolist(), strict=True) if s >= 0.6]
        want.append(kl(now, following) if len(far) / rollouts <= 0.05 else kl(far, following + near))
    code, paper = make("thought_branches", form="code"), make("thought_branches")
    got = [code.importance(similarity[i], outcome[i], outcome[i + 1]) for i in range(sentences - 1)]
    assert got == pytest.approx(want, abs=1e-9)
    apart = [paper.importance(similarity[i], outcome[i], outcome[i + 1]) for i in range(sentences - 1)]
    assert apart[4] == pytest.approx(want[4]) and abs(apart[0] - want[0]) > 1e-3


# ------------------------------------------------------------------------------------------- CurES


def test_cures_sigma_uses_the_raw_success_rate():
    """Prompts whose rollouts are all right or all wrong get 0; the others the formula of the release, from norms."""
    norms = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0], dtype=torch.float64)
    right = torch.tensor([True, False, True, True, False, False])
    place = torch.tensor([0, 0, 1, 1, 2, 0])
    sigma = algorithms.curation.rollout_sigma(norms, right, place, 4)
    p = 1 / 3
    wrong_square, gap = (2.0**2 + 6.0**2) / 2, 1.0 - 4.0
    want = (p * (1 - p) ** 2 * 1.0 + p**2 * (1 - p) * wrong_square - p**2 * (1 - p) ** 2 * gap**2) ** 0.5
    assert sigma.tolist() == pytest.approx([want, 0.0, 0.0, 0.0])


def test_a_form_is_the_authors_by_name():
    for name in ("bapo", "pipo", "epo", "grpo_guard", "lopti", "thought_branches"):
        assert make(name, preset="authors").form == "code", name
    assert dataclasses.replace(make("lopti"), tokens="rare").passes()[0].tokens == "rare"
