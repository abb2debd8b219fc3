"""Test properties of every algorithm: fused runs, minibatches, edge cases, names, states, controllers."""

import copy
import dataclasses
import json
import re

import pytest
import torch
from algorithm_cases import METHODS, cast, example, gradient_of, planned, rollout
from harness import Backend, backends, bits, compare, crossed
from torch import Tensor

import tokfuse
from tokfuse import KL, PPOClip, algorithms
from tokfuse.algorithms import host_words, registry


@pytest.fixture(params=backends("policy_loss"))
def backend(request):
    with request.param.forced():
        yield request.param


# ------------------------------------------------------------------------------ through policy_step


# Methods that Triton's interpreter runs, at 2.6 s each: every shape, every level, and plans of unusual weights.
INTERPRETED = (
    "a2pr_nll bapo bpo cispo dapo dypo gmpo gpg grpo gspo gspo_token high_entropy kl_cov nft r2vpo sapo vapo vespo"
)


@pytest.mark.parametrize(
    "name, backend", crossed("policy_loss", {n: (n,) for n in METHODS}, INTERPRETED.split()), indirect=["backend"]
)
def test_plans_run_fused(name: str, backend: Backend):
    """policy_step from logits with a plan's inputs equals plan.loss of the statistics."""
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    batch, method = cast(rollout(2), dtype, backend.device), example(name)
    gen = torch.Generator().manual_seed(0)
    logits = backend.put(torch.randn(batch.num_tokens, 33, generator=gen, dtype=dtype))
    target = backend.put(torch.randint(33, (batch.num_tokens,), generator=gen))
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


def test_a_users_own_objective_takes_the_fused_backward(backend: Backend):
    """Autograd on (tokens,) vectors, then one fused backward over the vocabulary, or through a head."""
    dtype = torch.float64 if backend.name == "reference" else torch.float32
    bound = 1e-12 if backend.name == "reference" else 2e-6
    gen = torch.Generator().manual_seed(1)
    hidden = backend.put(torch.randn(9, 16, generator=gen, dtype=dtype)).requires_grad_()
    weight = backend.put(torch.randn(50, 16, generator=gen, dtype=dtype) / 4).requires_grad_()
    target = backend.put(torch.randint(50, (9,), generator=gen))
    advantage = backend.put(torch.randn(9, generator=gen, dtype=dtype))
    advantage[[2, 5]] = 0.0

    def mine(logp: Tensor, entropy: Tensor) -> Tensor:
        ratio = (logp - logp.detach() + 0.1).exp()
        live = advantage != 0
        return -(advantage * torch.tanh(ratio - 1)).sum() - 0.01 * (live * entropy.square()).sum()

    wide = [x.detach().double().requires_grad_() for x in (hidden, weight)]
    full = (wide[0] @ wide[1].t()).log_softmax(1)
    rows = backend.put(torch.arange(9))
    expected = torch.autograd.grad(mine(full[rows, target], -(full.exp() * full).sum(1)), wide)
    stats = tokfuse.linear_token_stats(hidden, weight, target)
    grads = torch.autograd.grad(mine(stats.logp, stats.entropy), [hidden, weight])
    for found, exact in zip(grads, expected, strict=True):
        compare(found, exact, atol=bound * float(exact.abs().max()))
    logits = (hidden @ weight.t()).detach().requires_grad_()
    stats = tokfuse.token_stats(logits, target)
    (grad,) = torch.autograd.grad(mine(stats.logp, stats.entropy), logits)
    compare(grad.double() @ wide[1].detach(), expected[0], atol=bound * 8)
    assert not grad[[2, 5]].any()  # rows without a coefficient


@pytest.mark.parametrize("name", METHODS)
def test_degenerate_groups(name: str):
    """All correct, all wrong, one response, no response: losses and gradients are finite."""
    full = rollout(0)
    for reward, take in ((1.0, range(12)), (0.0, range(12)), (1.0, [2]), (0.0, [])):
        batch = full.take(torch.tensor(list(take), dtype=torch.int64))
        reward = torch.full_like(batch.reward, reward)
        batch = dataclasses.replace(batch, reward=reward, correct=reward > 0)
        method = example(name)
        state = method.initial_state()
        prepared = method.prepare(batch, state)
        for plan in (*method.before(prepared, state), *method.plans(prepared, state)):
            loss, grad, *_ = gradient_of(plan, batch.logp, batch.entropy if plan.objective.entropy_coef else None)
            assert loss.isfinite() and bool(grad.isfinite().all())
        state = method.update(state, method.measure(plan, batch.logp, batch.entropy))
        assert method.advance(state, prepared).keys() == method.initial_state().keys()


def test_groups_without_spread_have_no_gradient():
    """Group estimators give exactly 0 for equal rewards; 0.1 and 1.1 would leave a rounding error."""
    for name in ("grpo", "dr_grpo", "rloo", "opo", "gpg", "gbpo", "d3s", "adora", "gspo", "dapo"):
        for value in (0.1, 1.1):
            b = rollout(0)
            b = dataclasses.replace(b, reward=torch.full_like(b.reward, value))
            method = example(name, **({"kl": None} if name == "grpo" else {}))
            _, grad = gradient_of(planned(method, b), b.logp)
            assert not grad.any(), name


# ------------------------------------------------------------------------------------- minibatches


def test_take_keeps_order_and_fields():
    b = rollout(0)
    ids = torch.tensor([7, 0, 4])
    part = b.take(ids)
    assert part.cu_seqlens.tolist() == [0, 6, 9, 13]
    cu = b.cu_seqlens.tolist()
    rows = [t for i in ids.tolist() for t in range(cu[i], cu[i + 1])]
    assert torch.equal(part.old_logp, b.old_logp[rows]) and torch.equal(part.mask, b.mask[rows])
    assert torch.equal(part.reward, b.reward[ids])


# ------------------------------------------------------------------------------------ names, errors


@pytest.mark.parametrize(
    ("name", "options", "hint"),
    [
        ("grpo", {"beta": 0.1}, "Write kl=KL(coef=...)."),
        ("grpo", {"kl_loss_coef": 0.1}, "Write kl=KL(coef=...)."),
        ("grpo", {"epsilon": 0.2}, "Write shape=PPOClip(low=..., high=...)."),
        ("grpo", {"clip_ratio": 0.2}, "Write shape=PPOClip(low=..., high=...)."),
        ("grpo", {"clip_ratio_c": 3.0}, "Write shape=PPOClip(dual=...)."),
        ("grpo", {"loss_agg_mode": "token-mean"}, "Write aggregation='token_mean'."),
        ("gspo", {"importance_sampling_level": "sequence"}, "Write level='token' or 'sequence'."),
        ("grpo", {"temperature": 0.7}, "it belongs to the logits."),
        ("grpo", {"ppo_epochs": 2}, "Pass epochs to train_step."),
        ("grpo", {"agregation": "token_mean"}, "Did you mean 'aggregation'?"),
        ("dpo", {"beeta": 0.1}, "Did you mean 'beta'?"),
        ("bapo", {"preset": "author"}, "Did you mean 'authors'?"),
        ("rloo", {"preset": "authors"}, "preset must be left out"),
        ("Dr.GRPO", {}, "Did you mean 'dr_grpo'?"),
        ("reinforce++", {}, "Did you mean 'reinforce_pp'?"),
        ("Clip-Cov", {}, "Did you mean 'clip_cov'?"),
        ("no such thing", {}, "lists? all|list all"),
    ],
)
def test_words_of_other_frameworks_get_ours(name: str, options: dict, hint: str):
    with pytest.raises(ValueError) as caught:
        algorithms.make(name, **options)
    message = str(caught.value)
    assert hint in message or re.search(hint, message), message
    assert len(message) < 260 and "a2pr_nll" not in message  # the whole list only on request


def test_every_word_of_a_host_leads_to_an_option():
    fields = {option for one in registry.ENTRIES.values() for option in one.options()}
    assert {ours for ours, _ in host_words.OPTIONS.values()} <= fields
    assert set(host_words.METHODS.values()) <= set(algorithms.list())
    # A word that an entry uses itself is never translated there.
    algorithms.make("dpo", beta=0.2)


def test_presets_are_options_that_the_caller_may_change():
    for name, one in registry.ENTRIES.items():
        for preset, (options, source) in one.presets.items():
            made = algorithms.make(name, preset=preset)
            assert all(getattr(made, option) == value for option, value in options.items())
            assert source and preset.split("_")[0] in ("authors", "paper")
    assert algorithms.make("bapo", preset="authors_script", target=0.7).settings.target == 0.7
    assert sum("authors" in one.presets for one in registry.ENTRIES.values()) >= 18
    assert algorithms.make("simpo", preset="authors_llama3_instruct").margin == pytest.approx(1.375)


def test_unknown_names_and_options_are_refused():
    with pytest.raises(ValueError, match=r"the name of a method; got 'gbop'. Did you mean 'gbpo'.*list all"):
        algorithms.make("gbop")
    with pytest.raises(ValueError, match=r"algorithms.gbpo: every option must be one of the method's"):
        algorithms.make("gbpo", tua=1.0)
    with pytest.raises(ValueError, match=r"dr_grpo: max_length must be given \(no default was published"):
        algorithms.make("dr_grpo")


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("grpo", {"lam": 0.9}, "lam must be left out with advantage 'grpo'"),
        ("grpo", {"advantage": "grop"}, "advantage must be one of grpo"),
        ("gspo", {"level": "seq"}, "level must be one of"),
        ("grpo", {"max_length": 5}, "max_length must be left out"),
        ("opo", {"eps": 1e-4, "advantage": "gae"}, "eps must be left out"),
        (
            "grpo",
            {"kl": None, "kl_control": algorithms.KLControl(target=0.1, horizon=10)},
            "kl_control must be None without",
        ),
        ("tis", {"bypass": True}, "correction must be None with bypass"),
        ("gbpo", {"tau": 0.0}, "tau must be a finite number in"),
        ("nft", {"neg_weight": -1.0}, "neg_weight must be a finite number"),
        ("nft", {"advantage": "gae"}, "advantage must be left out"),
        ("nft", {"overlong": algorithms.Overlong(max_length=8, cache=2)}, "overlong must be left out"),
        ("opo", {"bypass": True}, "bypass must be False with the shape LinearLogp"),
        ("gpg", {"level": "sequence"}, "level must be 'token' with the shape LinearLogp"),
        ("bapo", {"shape": PPOClip(low=0.1)}, "shape must be left out"),
        ("lopti", {"level": "sequence"}, "level must be one of token"),
        ("pipo", {"advantage": "gae"}, "advantage must be an estimator with one number per response"),
        ("vespo", {"correction": algorithms.Correction(high=2.0)}, "correction must be None, or one of mode 'keep'"),
        ("adora", {"condition": "length"}, "condition must be left out with rule 'llm'"),
    ],
)
def test_refusals_of_options(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        algorithms.make(name, **options)


@pytest.mark.parametrize("name", METHODS)
def test_a_reference_kl_adds_its_gradient(name: str):
    b = rollout(1)
    if name == "mirror_descent":  # without kl, ref_logp would be the anchor
        plain, added = example(name, kl=KL(coef=0.0)), example(name, kl=KL(coef=0.1))
    else:
        plain, added = (example(name, kl=kl) for kl in (None, KL(coef=0.1)))
    state = plain.initial_state()
    plans = [m.plans(m.prepare(b, state), state) for m in (plain, added)]
    for without, plan in zip(*plans, strict=True):
        entropy = b.entropy if plan.objective.entropy_coef else None
        got = gradient_of(plan, b.logp, entropy)[1] - gradient_of(without, b.logp, entropy)[1]
        keep = plan.batch.valid if plan.mask is None else plan.mask
        lengths = dataclasses.replace(b, mask=keep).lengths.clamp(min=1)
        divisor = float(plan.normalizer) if plan.normalizer != "batch" else float(plan.count().clamp(min=1))
        each = 0.1 * (1 - (b.ref_logp - b.logp).exp()) / divisor
        if plan.objective.aggregation == "seq_mean_token_mean":
            each = each / b.spread(lengths)
        if name == "dypo":  # the KL of L_GRPO: on mixed prompts, with the weight of GRPO
            each = each * plan.batch.token_weight
        compare(got, torch.where(keep, each, 0.0), atol=1e-12)


@pytest.mark.parametrize("name", METHODS)
def test_a_correction_weights_the_policy_term_or_is_refused(name: str):
    b = rollout(1)
    if name == "vespo":
        with pytest.raises(ValueError, match="the weight belongs inside its gate"):
            example(name, correction=algorithms.Correction(high=1.1))
        inside = planned(example(name, bypass=True), b)
        assert torch.equal(inside.batch.old_logp, b.sampler_logp)
        return
    plain, added = (example(name, correction=c) for c in (None, algorithms.Correction(high=1.1)))
    state = plain.initial_state()
    weight = (b.old_logp - b.sampler_logp).exp().clamp(max=1.1)
    for without, plan in zip(*(m.plans(m.prepare(b, state), state) for m in (plain, added)), strict=True):
        base = torch.ones_like(weight) if without.token_weight is None else without.token_weight
        keep = plan.batch.valid if plan.mask is None else plan.mask
        compare(plan.token_weight[keep], (base * weight)[keep], atol=1e-12)


def test_refusals_of_batches():
    b = rollout(0)
    for name, missing in (
        ("grpo", "ref_logp"),
        ("ppo", "value"),
        ("bapo", "logp"),
        ("high_entropy", "entropy"),
        ("tis", "sampler_logp"),
        ("nft", "correct"),
        ("dcpo_dist", "second_logp"),
        ("otb", "sum_sq"),
    ):
        with pytest.raises(ValueError, match=rf"algorithms.{name}: batch.{missing} must be given"):
            planned(example(name), dataclasses.replace(b, **{missing: None}))
    with pytest.raises(ValueError, match="batch must be prepared"):
        algorithms.make("dapo").objective(b, {})
    with pytest.raises(ValueError, match=r"entropy must be of shape \(37,\)"):
        dataclasses.replace(b, entropy=b.entropy[:5])
    with pytest.raises(ValueError, match="ends at num_tokens"):
        dataclasses.replace(b, cu_seqlens=b.cu_seqlens[:-1])
    with pytest.raises(ValueError, match="advantage_level must be one of token, sequence"):
        dataclasses.replace(b, advantage_level="group")
    with pytest.raises(ValueError, match=r"turn must be in \[0, max_turns\) = \[0, 2\); got 3"):
        planned(example("epo", max_turns=2), b)
    with pytest.raises(ValueError, match=r"metrics\['square'\] must be given; got \[\]"):
        example("r2vpo").update({"penalty": 0.1}, {})
    with pytest.raises(ValueError, match="rules must be only one that adds a term of log-probabilities"):
        rules = (algorithms.KLCov(), algorithms.PositiveLikelihood())
        planned(algorithms.make("grpo", rules=rules, aggregation="token_mean"), b)


def test_no_tensor_of_the_user_is_written():
    b = rollout(0)
    before = {f.name: bits(v) for f in dataclasses.fields(b) if isinstance(v := getattr(b, f.name), Tensor)}
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
    """coef *= 1 + clip(KL / target - 1, +-0.2) n / horizon; the plan uses the new coefficient."""
    control = algorithms.KLControl(target=0.1, horizon=120)
    method = algorithms.make("grpo", kl=KL(coef=0.04), kl_control=control)
    b, state = rollout(0), method.initial_state()
    state = method.update(state, method.measure(planned(method, b), b.logp))
    kl = float((b.logp - b.ref_logp)[b.valid].mean())
    error = min(max(kl / 0.1 - 1, -0.2), 0.2)
    assert state["kl_coef"] == pytest.approx(0.04 * (1 + error * 12 / 120), rel=1e-12)
    assert planned(method, b, state).objective.kl.coef == state["kl_coef"]


def test_entropy_controller():
    """+-0.005 towards the target; used only while the entropy is not above the target."""
    method = algorithms.make("dapo", entropy_control=algorithms.EntropyControl(target=1.0))
    b, state = rollout(0), method.initial_state()
    for entropy, coef, used in ((0.5, 0.005, True), (0.9, 0.01, True), (1.5, 0.005, False)):
        h = torch.full_like(b.entropy, entropy)
        state = method.update(state, method.measure(planned(method, b, state), b.logp, h))
        assert state["entropy_coef"] == pytest.approx(coef)
        spec = planned(method, b, state).objective
        assert spec.entropy_coef == (state["entropy_coef"] if used else 0.0)


# -------------------------------------------------------------------------------------------- state


def test_a_config_is_frozen_and_compares_by_value():
    assert algorithms.make("gbpo") == algorithms.make("gbpo") != algorithms.make("gbpo", tau=1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        algorithms.make("gbpo").tau = 2.0


@pytest.mark.parametrize("name", METHODS)
def test_resumed_runs_are_exact(name: str, tmp_path):
    """Five batches in one run, or three, a checkpoint on disk and two more: equal plans and states."""

    def run(state, seeds, method):
        out = []
        for seed in seeds:
            batch = method.prepare(cast(rollout(seed), torch.float32), state)
            plans = (*method.before(batch, state), *method.plans(batch, state))
            for plan in plans:
                x = plan.batch.logp if plan.source == "current" else plan.batch.old_logp
                loss = plan.loss(x, batch.entropy if plan.objective.entropy_coef else None)
                out.append((bits(loss.loss), plan.objective))
                state = method.update(state, method.measure(plan, x, plan.batch.entropy))
            state = method.advance(state, batch)
        return state, out

    options = {"min_steps": 2} if name == "pipo" else {}
    method = example(name, **options)
    whole, expected = run(method.initial_state(), range(5), method)
    half, first = run(method.initial_state(), range(3), method)
    kept = copy.deepcopy(half)
    torch.save(method.state_dict(half), tmp_path / "state.pt")
    resumed = example(name, **options)
    state = resumed.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    end, second = run(state, range(3, 5), resumed)
    assert first + second == expected
    assert _plain(end) == _plain(whole) and _plain(half) == _plain(kept)


def _plain(state):
    if isinstance(state, dict):
        return {k: _plain(v) for k, v in state.items()}
    return (
        bits(state)
        if isinstance(state, Tensor) and state.is_floating_point()
        else (state.tolist() if isinstance(state, Tensor) else json.dumps(state))
    )


def test_another_methods_checkpoint_is_refused():
    r2vpo = example("r2vpo")
    saved = r2vpo.state_dict(r2vpo.initial_state())
    with pytest.raises(ValueError, match="the algorithm of the checkpoint must be gbpo; got r2vpo"):
        algorithms.make("gbpo").load_state_dict(saved)
    with pytest.raises(ValueError, match="the config of the checkpoint must be"):
        example("r2vpo", delta=0.2).load_state_dict(saved)
    with pytest.raises(ValueError, match="the saved state must be one with the keys"):
        r2vpo.load_state_dict({**saved, "state": {}})
