"""Test the losses of reward models: formulas in float64, finite differences, global statistics."""

import dataclasses
import itertools
import math

import pytest
import torch
from harness import compare
from reward_cases import normal, uniform
from torch import Tensor
from torch.autograd import gradcheck

from tokfuse import algorithms
from tokfuse.algorithms import World
from tokfuse.algorithms.reward import LengthProbe, bradley_terry, pair_consistency, weighted_nll
from tokfuse.algorithms.reward.fimi import length_encoding, pearson

# ----------------------------------------------------------------------------------------- FiMi-RM


def test_length_encoding_and_probe():
    code = length_encoding(torch.tensor([0, 7]), 6)
    want = [f(7 / 10000 ** (2 * j / 6)) for j in range(3) for f in (math.sin, math.cos)]
    compare(code, torch.tensor([[0.0, 1.0] * 3, want]), atol=1e-7)
    probe = LengthProbe()
    assert sum(p.numel() for p in probe.parameters()) == 6441
    assert probe(torch.tensor([3, 9, 27])).shape == (3,)
    with pytest.raises(ValueError, match="dim must be even"):
        LengthProbe(7)


def test_pearson():
    x, y = normal(9).requires_grad_(), normal(9, seed=1)
    compare(pearson(x, y), torch.corrcoef(torch.stack([x, y]))[0, 1], rtol=1e-12)
    assert gradcheck(lambda z: pearson(z, y), x)
    flat = torch.full((5,), 0.1, requires_grad=True)
    value = pearson(flat, y[:5].float())
    value.backward()
    assert value.item() == 0.0 and not flat.grad.any()
    # The mean of many equal numbers has a rounding error. It must not count as spread.
    many = normal(3000)
    assert pearson(torch.full((3000,), 0.1, dtype=torch.float64), many).item() == 0.0
    assert pearson(1e-6 * many, many).item() == pytest.approx(1.0)
    assert float(pearson(x.detach()[:0], y[:0])) == 0.0


def ranks(parts: list[list[Tensor]], call) -> list[Tensor]:
    """Run `call(world, *tensors)` on every rank. Each gather is answered with the results of a dry run."""
    logs: list[list[Tensor]] = [[] for _ in parts]
    out = []
    for _ in range(4):  # one round per dependent gather
        out = []
        for rank, tensors in enumerate(parts):
            taken: list[Tensor] = []

            def gather(x: Tensor, taken=taken, rank=rank) -> Tensor:
                k = len(taken)
                taken.append(x)
                rows = [logs[r][k] if len(logs[r]) > k else x for r in range(len(parts))]
                rows[rank] = x
                return torch.stack(rows)

            out.append(call(World(gather=gather, rank=rank), *tensors))
            logs[rank] = [t.detach() for t in taken]
    return out


def test_trap_15_statistics_are_global():
    """Two ranks: every rank's loss and gradient equal those of the whole batch."""
    fimi = algorithms.make("fimi_rm", warmup=0, mse_weight=0.5)
    r, p = normal(10).requires_grad_(), normal(10, seed=3).requires_grad_()
    values = ranks([[r[:4], p[:4]], [r[4:], p[4:]]], pearson_call)
    whole = pearson(r, p)
    for value in values:
        compare(value, whole, rtol=1e-12)
    parts = sum(torch.autograd.grad(v, r, retain_graph=True)[0] for v in values)
    compare(parts, torch.autograd.grad(whole, r, retain_graph=True)[0], atol=1e-14)
    probes = ranks([[r[:4], p[:4]], [r[4:], p[4:]]], lambda world, a, b: fimi.probe_loss(a, b, world))
    alone = fimi.probe_loss(r, p)
    summed = sum(torch.autograd.grad(v, p, retain_graph=True)[0] for v in probes)
    compare(summed, torch.autograd.grad(alone, p)[0], atol=1e-14)


def pearson_call(world: World, x: Tensor, y: Tensor) -> Tensor:
    return pearson(x, y, world)


def test_fimi_losses_and_phases():
    w, r, pw, pr = (normal(5, seed=s).requires_grad_() for s in range(4))
    fimi = algorithms.make("fimi_rm", warmup=3, period=2)
    rho = torch.corrcoef(torch.stack([torch.cat([w, r]), torch.cat([pw, pr])]))[0, 1]
    loss = fimi.reward_loss(w, r, pw, pr)
    compare(loss, -torch.sigmoid(w - r).log().mean() + rho.abs(), rtol=1e-12)
    grads = torch.autograd.grad(loss, [w, pw], allow_unused=True)
    assert grads[0] is not None and grads[1] is None
    assert gradcheck(lambda a: fimi.reward_loss(a, r, pw, pr), w)
    compare(fimi.probe_loss(w, pw), -torch.corrcoef(torch.stack([w, pw]))[0, 1].abs(), rtol=1e-12)
    v1 = algorithms.make("fimi_rm", warmup=3, mse_weight=1.0)
    compare(v1.probe_loss(w, pw) - fimi.probe_loss(w, pw), ((w - pw) ** 2).mean(), rtol=1e-10)
    assert torch.autograd.grad(v1.probe_loss(w, pw), w, allow_unused=True)[0] is None
    # One sample: no correlation, and the squared error of that sample.
    compare(v1.probe_loss(w[:1], pw[:1]), (w[0] - pw[0]) ** 2, rtol=1e-12)
    state, seen = fimi.initial_state(), []
    for _ in range(9):
        seen.append(fimi.phase(state))
        state = fimi.load_state_dict(fimi.state_dict(fimi.advance(state)))
    assert seen == ["warmup"] * 3 + ["probe"] * 2 + ["reward"] * 2 + ["probe"] * 2


def test_a_probe_takes_the_length_out_of_a_reward():
    """A reward of quality + length depends less on the length after alternating phases."""
    torch.manual_seed(0)
    length = torch.randint(5, 200, (256,))
    quality = torch.randn(256)
    features = torch.stack([quality, torch.tanh(length / 60.0)], 1)
    model, probe = torch.nn.Linear(2, 1), LengthProbe(16)
    better = quality[:128] + 0.9 * features[:128, 1] > quality[128:] + 0.9 * features[128:, 1]
    chosen = torch.where(better, torch.arange(128), torch.arange(128, 256))
    other = torch.where(better, torch.arange(128, 256), torch.arange(128))
    share = {}
    for warmup in (10_000, 60):
        torch.manual_seed(1)
        model.reset_parameters()
        fimi = algorithms.make("fimi_rm", warmup=warmup)
        optimizers = {"probe": torch.optim.Adam(probe.parameters(), lr=3e-3)}
        optimizers["reward"] = torch.optim.Adam(model.parameters(), lr=2e-2)
        state = fimi.initial_state()
        for _ in range(240):
            reward, phase = model(features).squeeze(1), fimi.phase(state)
            guess = probe(length)
            sides = (reward[chosen], reward[other], guess[chosen], guess[other])
            if phase == "probe":
                loss = fimi.probe_loss(reward, guess)
            else:
                loss = bradley_terry(*sides[:2]).mean() if phase == "warmup" else (fimi.reward_loss(*sides))
            optimizer = optimizers["probe" if phase == "probe" else "reward"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = fimi.advance(state)
        a, b = model.weight.detach().flatten().tolist()
        share[warmup] = abs(b) / abs(a)
    assert share[60] < 0.75 * share[10_000], share


# --------------------------------------------------------------------------------------- UGDA, PARL


def test_ugda_refinement():
    refine = algorithms.make("ugda_refine", noise_std=0.0)
    logged = torch.stack([torch.arange(101.0), 10 * torch.arange(101.0)])
    target = refine.targets(logged, torch.tensor([1, 3, 5]))
    compare(target, torch.tensor([[10.0, 50.0, 90.0], [100.0, 500.0, 900.0]]), rtol=1e-6)
    reward = normal(2, 3).requires_grad_()
    want = sum(((reward[k] - target[k]) ** 2).mean() for k in range(2))
    compare(refine.loss(reward, target.double()), want, rtol=1e-12)
    one = refine.loss(reward[:, :1], target[:, :1].double())
    compare(one, ((reward[:, 0] - target[:, 0]) ** 2).sum(), rtol=1e-12)
    noisy = algorithms.make("ugda_refine")
    many = torch.full((20_000,), 3)
    noise = noisy.targets(logged, many) - 50 * torch.tensor([[1.0], [10.0]])
    assert float(noise[0].std()) == pytest.approx(0.1, rel=0.03)
    again = noisy.targets(logged, many) - 50 * torch.tensor([[1.0], [10.0]])
    assert torch.equal(noise, again) and not torch.equal(noise, noisy.targets(logged, many, 1))
    with pytest.raises(ValueError, match=r"score must be in \[1, 5\] in every element; got 0 at 0"):
        refine.targets(logged, torch.tensor([0]))


@pytest.mark.parametrize("baseline", ["mean", "none"])
def test_parl_gradient_is_that_of_the_upper_objective(baseline: str):
    """All pairs of four responses, weighted by pi*: the gradient of G(nu) through pi*_nu."""
    beta, ref, label = 0.7, normal(4, seed=5).log_softmax(0), uniform(4, 4, seed=6)
    nu = normal(4, seed=7).requires_grad_()
    policy = (ref + nu / beta).log_softmax(0)
    pairs = list(itertools.product(range(4), repeat=2))
    first, second = (torch.tensor([pair[k] for pair in pairs]) for k in (0, 1))
    d = nu[first] - nu[second]
    y = label[first, second]
    utility = y * torch.nn.functional.logsigmoid(d) + (1 - y) * torch.nn.functional.logsigmoid(-d)
    upper = ((policy[first] + policy[second]).exp() * utility).sum()
    (want,) = torch.autograd.grad(upper, nu, retain_graph=True)
    share = (policy[first] + policy[second]).exp().detach()
    parl = algorithms.make("parl", beta=beta, baseline=baseline)
    expected = (policy.exp().detach() * nu).sum().expand(len(pairs))
    if baseline == "none":
        total = torch.zeros((), dtype=torch.float64)
        for s, i, j in zip(share, first, second, strict=True):
            total = total + s * parl.loss(nu[i, None], nu[j, None], label[i, j, None], expected[:1])
        compare(-torch.autograd.grad(total, nu)[0], want, atol=1e-12)
        return
    # With the leave-one-out baseline: two independent pairs, all combinations.
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(len(pairs)), repeat=2):
        two = torch.tensor([a, b])
        total = total + share[a] * share[b] * parl.loss(nu[first[two]], nu[second[two]], y[two], expected[:2])
    compare(-torch.autograd.grad(total, nu)[0], want, atol=1e-12)
    value = parl.loss(nu[first], nu[second], y, expected)
    compare(value, -utility.mean(), rtol=1e-12, what="the reported value is the loss itself")


# ------------------------------------------------------------------------------------- other losses


def test_dwbc_weights_and_weighted_likelihood():
    dwbc = algorithms.make("dwbc", eta=0.8)
    d = torch.tensor([0.05, 0.5, 0.7, 0.3, 0.95]).double()
    expert = torch.tensor([True, True, False, False, False])
    w = dwbc.weights(d, expert)
    want = [7.5 - (0.8 / 0.09 + 1), 7.5 - (0.8 / 0.25 + 1), 1 / 0.3 - 1, 0.0, 1 / 0.1 - 1]
    compare(w, torch.tensor(want).double(), rtol=1e-6)
    assert float(dwbc.negative(w)) == 0.2
    logp = torch.tensor([-1.0, -2.0, -3.0, -math.inf, -5.0]).double().requires_grad_()
    mask = torch.tensor([True, True, True, True, False])
    loss = weighted_nll(logp, w, mask=mask, normalizer=4)
    compare(loss, (w[:3] * torch.tensor([1.0, 2.0, 3.0])).sum() / 4, rtol=1e-12)
    loss.backward()
    compare(logp.grad, torch.cat([-w[:3] / 4, torch.zeros(2)]), rtol=1e-12)


def test_pairs():
    a, b = normal(4).requires_grad_(), normal(4, seed=1).requires_grad_()
    compare(bradley_terry(a, b, margin=0.5), -torch.sigmoid(a - b - 0.5).log(), rtol=1e-12)
    assert gradcheck(lambda x, y: bradley_terry(x, y), (a, b))
    compare(pair_consistency(a, b), (a - b) ** 2, rtol=1e-12)
    out = algorithms.make("pair_consistency", detach_counterfactual=True)(a, b).sum()
    grads = torch.autograd.grad(out, [a, b], allow_unused=True)
    compare(grads[0], 2 * (a - b), rtol=1e-12)
    assert grads[1] is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("causalrm", {"form": "snipes"}, "form must be one of ips, snips, dr"),
        ("causalrm", {"clip": 0.0}, r"clip must be a finite number in \(0, 1\)"),
        ("kernel_balancing", {"gamma": 0.0, "slack": 0.1}, "gamma must be a finite number"),
        ("ivl", {"alpha": -1.0}, "alpha must be a finite number"),
        ("ivl", {}, "alpha must be given"),
        ("parl", {"baseline": "batch"}, "baseline must be one of mean, none"),
        ("parl", {"beta": 0.0}, "beta must be a finite number"),
        ("fimi_rm", {}, "warmup must be given"),
        ("fimi_rm", {"warmup": 1, "period": 0}, "period must be an integer >= 1"),
        ("ugda_refine", {"levels": 1}, "levels must be an integer >= 2"),
        ("dwbc", {"eta": 0.5, "clip": 0.5}, r"clip must be a finite number in \(0, 0.5\)"),
        ("reward_calibrator", {"method": "spline"}, "method must be one of lcc, tweedie"),
    ],
)
def test_refusals(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        algorithms.make(name, **options)


def test_configs_are_frozen():
    assert algorithms.make("ivl", alpha=1.0) == algorithms.make("ivl", alpha=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithms.make("ivl", alpha=1.0).alpha = 2.0
