"""Test the DID diagnostic, schedules of the reference, and errors of the losses."""

import dataclasses
import itertools

import pytest
import torch
from harness import compare
from preference_cases import LENGTHS, LOSSES, PAIRS, TOKENS, example, example_batch, pair_batch
from torch import Tensor

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import NLL, PreferenceBatch, preference_step
from tokfuse.algorithms.preference import did_entropy, did_token_entropy


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---------------------------------------------------------------------------------------------- DID


@pytest.mark.parametrize("sampled_from", ["reference", "policy"])
def test_did_entropy_estimates_the_entropy_of_the_ratio(sampled_from: str):
    """Compared with enumeration of 40 responses, from 100 000 samples. Its ESS is the ESS of the weights."""
    policy = (1.2 * normal(40, seed=3)).log_softmax(0)
    ref = (0.8 * normal(40, seed=4)).log_softmax(0)
    q = (policy - ref).softmax(0)
    exact = float(-(q * q.log()).sum())
    drawn = torch.multinomial(
        (ref if sampled_from == "reference" else policy).exp(),
        100_000,
        replacement=True,
        generator=torch.Generator().manual_seed(0),
    )
    found = did_entropy(policy[drawn], ref[drawn], sampled_from=sampled_from)
    assert float(found.entropy) == pytest.approx(exact, abs=0.03)
    v = (policy - 2 * ref if sampled_from == "reference" else -ref)[drawn].exp()
    assert float(found.ess) == pytest.approx(float(v.sum() ** 2 / (v * v).sum()))
    swapped = {"reference": "policy", "policy": "reference"}[sampled_from]
    other = did_entropy(policy[drawn], ref[drawn], sampled_from=swapped)
    assert abs(float(other.entropy) - exact) > 0.1
    far = did_entropy(policy[drawn] - 5000, ref[drawn] - 4000, sampled_from=sampled_from)
    assert bool(far.entropy.isfinite()), "log space"


def test_did_token_entropy():
    z, ref = normal(5, 20), normal(5, 20, seed=1)
    q = (z - ref).softmax(1)
    mask = torch.tensor([1, 1, 0, 1, 1], dtype=torch.bool)
    want = torch.where(mask, -(q * q.log()).sum(1), 0.0)
    compare(did_token_entropy(z, ref, mask=mask), want, atol=1e-12)


def test_the_ideal_rejected_sampler_makes_the_log_ratio_the_reward():
    """pi_l ~ ref (ref / pi*)^beta and y_w ~ ref: then P(y_w > y_l) is DPO's probability at the optimum."""
    beta, ref = 0.5, normal(6, seed=1).log_softmax(0)
    best = normal(6, seed=2).log_softmax(0)
    rejected = (ref + beta * (ref - best)).log_softmax(0)
    for i, j in itertools.permutations(range(6), 2):
        chosen_first, chosen_second = ref[i] + rejected[j], ref[j] + rejected[i]
        odds = chosen_first - chosen_second
        compare(odds, beta * ((best - ref)[i] - (best - ref)[j]), atol=1e-12)


# ---------------------------------------------------------------------------------------- schedules


def test_tr_dpo():
    rule = algorithms.make("tr_dpo", every=3)
    assert [step for step in range(8) if rule.due(step)] == [3, 6]
    ref, policy = [normal(3), normal(2, 2)], [normal(3, seed=5), normal(2, 2, seed=6)]
    want = [0.6 * p + 0.4 * r for r, p in zip(ref, policy, strict=True)]
    rule.update_(ref, policy)
    for found, right in zip(ref, want, strict=True):
        compare(found, right, rtol=1e-12)
    with pytest.raises(ValueError, match="every must be an int >= 1"):
        algorithms.make("tr_dpo", every=0)
    assert algorithms.make("tr_dpo") == algorithms.make("tr_dpo", mix=0.6, every=512)


def test_checkpoint_ring_is_uniform_over_what_is_saved_and_resumes():
    ring = algorithms.make("checkpoint_ring", size=3, every=10, seed=4)
    state, seen = ring.initial_state(), {}
    for step in range(41):
        state = ring.save(state, step)
        state = ring.load_state_dict(ring.state_dict(state))
        seen[step] = list(state["saved"])
    assert seen[9] == [0] and seen[10] == [0, 10] and seen[40] == [20, 30, 40]
    drawn = [ring.draw(state, step) for step in range(3000)]
    for saved in (20, 30, 40):
        assert abs(drawn.count(saved) - 1000) < 5 * (1000 * 2 / 3) ** 0.5
    assert drawn[:50] == [ring.draw(state, step) for step in range(50)]
    with pytest.raises(ValueError, match="size must be an int >= 1"):
        algorithms.make("checkpoint_ring", size=0)


def test_metatuner():
    joint = algorithms.make("metatuner", alpha=0.5, every=4)
    turns = algorithms.make("metatuner", alpha=0.5, every=4, form="alternating")
    assert joint.weights(0) == joint.weights(1) == (1.0, 0.5)
    assert turns.weights(0) == (1.0, 0.0) and turns.weights(1) == (0.0, 0.5)
    assert [step for step in range(9) if joint.copy_due(step)] == [0, 4, 8]
    with pytest.raises(ValueError, match="alpha, every must be given"):
        algorithms.make("metatuner")


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dpo", {"beta": 0.0}, "beta must be a finite number"),
        ("dpo", {"link": "sigmoid"}, "link must be one of logistic"),
        ("dpo", {"length": "avg"}, "length must be one of sum, mean"),
        ("dpo", {"tau": 0.1}, "tau must be given with link 'discopop', and only then"),
        ("discopop", {"tau": None}, "tau must be given with link 'discopop', and only then"),
        ("discopop", {"tau": 0.0}, "tau must be a finite number"),
        ("f_dpo", {"alpha": 0.5}, "alpha must be given with divergence 'alpha', and only then"),
        ("f_dpo", {"divergence": "alpha", "alpha": 1.0}, "alpha must be not 1"),
        ("f_dpo", {"divergence": "kl"}, "divergence must be one of reverse_kl"),
        ("simpo", {"divergence": "js"}, "divergence must be 'reverse_kl' without a reference"),
        ("exo_pair", {"smoothing": 0.0}, "smoothing must be above 0 with link 'exo'"),
        ("robust_dpo", {"smoothing": 0.5}, "smoothing must be below 0.5 with link 'robust'"),
        ("conservative_dpo", {"smoothing": 0.6}, r"smoothing must be a finite number in \[0, 0.5"),
        ("wpo", {"weighting": "wop"}, "weighting must be one of none, wpo"),
        ("ld_dpo", {"tail_weight": 1.5}, "tail_weight must be a finite number"),
        ("hpl", {"level_weight": (1.0, -1.0)}, "level_weight must be a finite number"),
        ("hpl", {"nll": NLL(coef=1.0, reduction="batch_mean")}, "nll.reduction must be 'sum' or"),
        ("dpo", {"nll": NLL(coef=1.0, level=0)}, "nll.level must be left out without level_weight"),
        ("apo_zero", {"form": "apo"}, "form must be one of apo_zero"),
        ("bco_pair", {"shift": "mean"}, "shift must be one of running, none"),
        ("orpo", {"beta": 0.1}, "beta must be left out"),
        ("orpo", {"lam": -1.0}, "lam must be a finite number"),
        ("kto", {"desirable_weight": -1.0}, "desirable_weight must be a finite number"),
        ("kto", {"undesirable_weight": -1.0}, "undesirable_weight must be a finite number"),
        ("aot", {"weighting": "wpo"}, "weighting and level_weight must be left out"),
        ("aot", {"smoothing": 0.7}, "smoothing must be a finite number"),
        ("aries", {}, "level_weight must be given"),
        ("rpo_mean", {}, "nll must be given"),
    ],
)
def test_options_are_refused(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        algorithms.make(name, **options)


def test_likelihood_terms_are_refused():
    with pytest.raises(ValueError, match="coef must be a finite number"):
        NLL(coef=-1.0)
    with pytest.raises(ValueError, match="reduction must be one of sum, mean, batch_mean"):
        NLL(coef=1.0, reduction="token")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"pairs": None}, "pairs or desirable must be given, one of them; got neither"),
        ({"desirable": torch.ones(len(LENGTHS), dtype=torch.bool)}, "one of them; got both"),
        ({"ref_logp": torch.zeros(TOKENS), "ref_sum": torch.zeros(10)}, "ref_sum must be left out"),
        ({"pairs": torch.tensor([0, 1])}, r"pairs must be \(pairs, 2\) int64"),
        ({"pairs": torch.tensor([[0, 10]])}, r"pairs must be sequences in \[0, 10\)"),
        ({"pairs": torch.tensor([[0, 1], [3, 1]])}, "pairs must be each sequence once"),
        ({"pair_weight": torch.ones(3)}, r"pair_weight must be of shape \(4,\)"),
        ({"level": torch.ones(3)}, r"level must be of shape \(4,\)"),
        ({"mask": torch.ones(3, dtype=torch.bool)}, "mask must be of shape"),
        ({"kl": torch.zeros(2)}, "kl must be a 0-dim tensor"),
        ({"num_tokens": 5}, "cu_seqlens must be a prefix sum that ends at num_tokens"),
        (
            {"pairs": None, "desirable": torch.ones(10, dtype=torch.bool), "pair_weight": torch.ones(4)},
            "pair_weight must be left out without pairs",
        ),
    ],
)
def test_batches_are_refused(given: dict, message: str):
    with pytest.raises(ValueError, match=message):
        pair_batch(reference=False, **given)


def step(loss, batch, **given):
    z = torch.zeros(TOKENS, 4)
    target = torch.zeros(TOKENS, dtype=torch.int64)
    return preference_step(loss=loss, batch=batch, **{"logits": z, "target": target, **given})


def test_what_a_loss_lacks_or_would_ignore_is_refused():
    dpo, simpo, kto, hpl = map(example, ("dpo", "simpo", "kto", "hpl"))
    unpaired = {"pairs": None, "desirable": torch.ones(len(LENGTHS), dtype=torch.bool)}
    for loss, batch, message in (
        (dpo, pair_batch(reference=False), "batch.ref_logp or batch.ref_sum must be given"),
        (simpo, pair_batch(), "batch.ref_logp and batch.ref_sum must be left out"),
        (dpo, pair_batch(kl=torch.tensor(0.0)), "batch.kl must be left out"),
        (dpo, pair_batch(level=torch.zeros(4, dtype=torch.int64)), "batch.level must be given"),
        (hpl, pair_batch(), "batch.level must be given with level_weight"),
        (dpo, pair_batch(**unpaired), "batch.pairs must be given"),
        (kto, pair_batch(**unpaired), "batch.kl must be given"),
        (kto, pair_batch(kl=torch.tensor(0.0)), "batch.desirable must be given"),
        (hpl, pair_batch(level=torch.tensor([0, 1, 2, 3])), r"batch.level must be in \[0, 3\)"),
        (example("aot"), pair_batch(pair_weight=torch.ones(4)), "batch.pair_weight must be left"),
    ):
        with pytest.raises(ValueError, match=message):
            step(loss, batch)


def test_step_refusals():
    dpo, batch, z = example("dpo"), pair_batch(), torch.zeros(TOKENS, 4)
    with pytest.raises(TypeError, match="loss must be a PreferenceLoss; got str"):
        step("dpo", batch)
    with pytest.raises(ValueError, match="either logits= or hidden= with weight=; got both"):
        step(dpo, batch, hidden=z)
    with pytest.raises(ValueError, match="either logits= or hidden= with weight=; got neither"):
        step(dpo, batch, logits=None)
    with pytest.raises(ValueError, match="weight must be left out with logits="):
        step(dpo, batch, weight=z)
    with pytest.raises(ValueError, match="weight must be given with hidden="):
        step(dpo, batch, logits=None, hidden=z)
    with pytest.raises(ValueError, match='normalizer must be None, a number or "batch"'):
        step(dpo, batch, normalizer="pairs")
    with pytest.raises(ValueError, match="normalizer must be a finite number"):
        step(dpo, batch, normalizer=0)
    long = PreferenceBatch(
        num_tokens=2,
        cu_seqlens=torch.tensor([0, 1, 2], dtype=torch.int32),
        pairs=torch.tensor([[0, 1]]),
        ref_logp=torch.zeros(2),
    )
    with pytest.raises(ValueError, match="batch.num_tokens must be 30"):
        step(dpo, long)


# -------------------------------------------------------------------------------------------- state


@pytest.mark.parametrize("name", LOSSES)
def test_configs_and_batches_are_plain(name: str):
    loss = example(name)
    assert loss == example(name) and loss.name == name
    with pytest.raises(dataclasses.FrozenInstanceError):
        loss.beta = 2.0
    state = loss.initial_state()
    assert loss.load_state_dict(loss.state_dict(state)) == state
    batch = example_batch(loss)
    again = PreferenceBatch.from_state(batch.to_state(), batch.world)
    assert all(getattr(again, f.name) is getattr(batch, f.name) for f in dataclasses.fields(batch) if f.name != "world")


def test_bco_takes_the_mean_over_all_ranks():
    loss, other = example("bco_pair"), torch.tensor([6.0, 4.0]).double()
    world = algorithms.World(gather=lambda x: torch.stack([x, other]))
    out = step(loss, pair_batch(world=world))
    own = torch.cat(out.rewards)
    state = loss.update(loss.initial_state(), out)
    assert state == {"mean": pytest.approx((float(own.sum()) + 6) / 12), "batches": 1}
    empty = step(loss, pair_batch(pairs=torch.zeros(0, 2, dtype=torch.int64)))
    assert loss.update(state, empty) == state, "a batch without pairs has no mean"


def test_metrics_add_up_over_parts():
    """Sums over two halves of the pairs equal those of the whole. A margin above 0 counts."""
    gen = torch.Generator().manual_seed(0)
    z, target = torch.randn(TOKENS, 4, generator=gen), torch.randint(4, (TOKENS,), generator=gen)
    with tokfuse.backend("reference"):
        whole = step(example("dpo"), pair_batch(), logits=z, target=target).metrics
        parts = [
            step(example("dpo"), pair_batch(pairs=torch.tensor(PAIRS[i : i + 2])), logits=z, target=target).metrics
            for i in (0, 2)
        ]
    for key in whole:
        compare(parts[0][key] + parts[1][key], whole[key], rtol=1e-9, atol=1e-12)
    assert whole["count"] == 4 and 0 < whole["accuracy"] < 5
    with tokfuse.backend("reference"):  # the policy is the reference: no pair is ahead
        flat = pair_batch(ref_logp=tokfuse.token_stats(z, target).logp)
        even = step(example("dpo"), flat, logits=z, target=target).metrics
    assert even["accuracy"] == 0 and even["margin"] == 0
    compare(whole["margin"], whole["chosen"] - whole["rejected"], rtol=1e-9)
