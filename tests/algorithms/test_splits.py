"""Test that no gradient depends on how an optimizer step is split into micro-batches or over ranks."""

import dataclasses
import itertools

import pytest
import torch
from algorithm_cases import METHODS, example, gradient_of, rollout, spread_over
from harness import compare
from preference_cases import LENGTHS, LOSSES, example_batch, sequences
from preference_cases import example as example_loss

import tokfuse
from tokfuse import KeepRule, algorithms
from tokfuse.algorithms import NLL, Correction, Plan, PositiveLikelihood, PreferenceBatch, World, preference_step

PARTS = ([list(range(12))], [[0, 5, 3, 7, 8], [1, 2, 4, 6, 9, 10, 11]], [[11, 0], [1, 4, 5], [2, 3, 6, 7, 8, 9], [10]])

WIDE = {
    "pipo": {"min_steps": 2},
    # The published bounds drop every sequence of a random batch.
    "geo_rs": {
        "correction": Correction(mode="keep", dropped="leave", keep_rules=(KeepRule("ratio", "mean", 0.9, 1.1),))
    },
}


def values(
    plan: Plan, logp: torch.Tensor, entropy: torch.Tensor, normalizer: float | None = None
) -> list[torch.Tensor]:
    """Return [loss with the constant, d logp, d entropy]."""
    x, h = (t.clone().requires_grad_() for t in (logp, entropy))
    loss = plan.loss(x, h if plan.objective.entropy_coef else None, normalizer).loss
    grads = torch.autograd.grad(loss, [x, h], allow_unused=True, materialize_grads=True)
    return [loss.detach() + plan.offset(normalizer), *grads]


def steps(name: str, options: dict | None = None) -> list[Plan]:
    """Return the plans of two rollouts, from a state with a history; PIPO's second steps included."""
    method = example(name, **{**WIDE.get(name, {}), **(options or {})})
    state, out = method.initial_state(), []
    for seed in range(4):
        batch = rollout(seed, binary=False)
        prepared = method.prepare(batch, state)
        plans = (*method.before(prepared, state), *method.plans(prepared, state))
        for plan in plans:
            state = method.update(state, method.measure(plan, plan.batch.logp, plan.batch.entropy))
        state = method.advance(state, prepared)
        out += plans if seed >= 2 else ()
    return out


def assert_adds_up(plan: Plan, parts: list[list[int]]) -> None:
    b = plan.batch
    whole = values(plan, b.logp, b.entropy)
    found = [torch.zeros_like(x) for x in whole]
    count = 0.0
    for ids in map(torch.tensor, parts):
        part, rows = plan.take(ids), b.rows(ids)
        loss, x, h = values(part, b.logp[rows], b.entropy[rows])
        found[0] += loss
        found[1][rows] += x
        found[2][rows] += h
        count += float(part.count())
    assert count == pytest.approx(float(plan.count()), rel=1e-12)
    for got, want in zip(found, whole, strict=True):
        compare(got, want, atol=1e-12 * max(1.0, float(want.abs().max())))


@pytest.mark.parametrize("name", METHODS)
def test_micro_batches_of_a_plan_are_the_plan(name: str):
    """1, 2 and 4 parts, in any order: the loss with its constant, and the gradients."""
    plans = steps(name)
    assert len(plans) >= (4 if name in ("lopti", "pipo") else 2)
    assert any(bool(values(p, p.batch.logp, p.batch.entropy)[1].any()) for p in plans)
    for plan in plans:
        for parts in PARTS:
            assert_adds_up(plan, parts)
        nested = plan.take(torch.arange(8)).take(torch.arange(3))
        once = plan.take(torch.arange(3))
        for got, want in zip(*(values(p, p.batch.logp, p.batch.entropy) for p in (nested, once)), strict=True):
            compare(got, want, atol=1e-14)


@pytest.mark.parametrize("options", [{}, {"level": "sequence_sum"}, {"constant": 50.0}])
def test_nfts_constant_is_the_constant_of_the_step(options: dict):
    """Four micro-batches gave a quarter of the gradient."""
    for plan in steps("nft", options):
        for parts in PARTS:
            assert_adds_up(plan, parts)
        assert float(plan.count()) == options.get("constant", 1.0 if options else 1000.0)


WEIGHED = [
    ("tis", {"correction": Correction(level=level, high=1.2, normalize="batch", dropped=dropped, keep_rules=rules)})
    for level, dropped, rules in (
        ("token", "count", ()),
        ("sequence", "leave", (KeepRule("ratio", "token", 0.7, 1.3),)),
    )
]


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in METHODS), *WEIGHED])
def test_two_ranks_are_one_process(name: str, options: dict):
    """Each rank has whole prompts. Divided by the sum of the counts, the gradients are those of one process."""
    b = rollout(6)
    ids = (torch.arange(0, 4), torch.arange(4, 12))
    method = example(name, **options)

    def plans_of(world: World) -> tuple[Plan, ...]:
        batch = b if world.gather is None else b.take(ids[world.rank])
        state = method.initial_state()
        return method.plans(method.prepare(dataclasses.replace(batch, world=world), state), state)

    for k, plan in enumerate(plans_of(World())):
        mine = [plans[k] for plans in spread_over(2, plans_of)]
        total = sum(float(part.count()) for part in mine)
        assert total == pytest.approx(float(plan.count()), rel=1e-12)
        loss, x, h = values(plan, b.logp, b.entropy)
        found = [values(part, part.batch.logp, part.batch.entropy, total) for part in mine]
        compare(sum(f[0] for f in found), loss, atol=1e-12)
        compare(torch.cat([f[1] for f in found]), x, atol=1e-12 * max(1.0, float(x.abs().max())))
        compare(torch.cat([f[2] for f in found]), h, atol=1e-12)


@pytest.mark.parametrize(("_", "options"), WEIGHED)
def test_normalised_weights_of_one_process_are_those_of_the_op(_: str, options: dict):
    b, c = rollout(6), options["correction"]
    (plan,) = example("tis", **options).plans(example("tis").prepare(b, {}), {})
    out = tokfuse.offpolicy_weights(
        b.old_logp,
        b.sampler_logp,
        level=c.level,
        mode=c.mode,
        high=c.high,
        rules=c.keep_rules,
        normalize="batch",
        cu_seqlens=b.cu_seqlens,
        mask=b.mask,
    )
    assert not torch.equal(out.kept_mask, b.mask) or not c.keep_rules
    compare(plan.token_weight, out.weight, atol=1e-12)


def test_an_empty_rank_counts_nothing():
    b = rollout(0).take(torch.tensor([], dtype=torch.int64))
    for name in ("dr_grpo", "grpo", "dapo", "lopti"):
        method = example(name)
        state = method.initial_state()
        for plan in method.plans(method.prepare(b, state), state):
            assert float(plan.count()) == 0.0
            loss, grad, *_ = gradient_of(plan, b.logp)
            assert float(loss) == 0.0 and grad.numel() == 0


# ------------------------------------------------------------------------------------ minibatches

# These decide over the tokens of an optimizer step. Micro-batches come from Plan.take, tested above.
OF_A_STEP = ("bapo", "cip_entropy", "clip_cov", "high_entropy", "kl_cov", "vapo")
# DYPO's pairwise term needs the whole prompt: see the test below.
SPLIT = {"dypo": {"alpha": 1.0}}


def in_two(members: list[int]) -> list[tuple[list[int], list[int]]]:
    """Return every split of the members into two parts, the empty one included."""
    first, *rest = members
    out = []
    for choice in itertools.product((False, True), repeat=len(rest)):
        out.append(
            tuple([m for m, c in zip(members, (False, *choice), strict=True) if c == side] for side in (False, True))
        )
    assert len(out) == 2 ** len(rest) and ([first], rest) in out
    return out


def added(method, prepared, parts, normalizer: list[float]) -> list[list[torch.Tensor]]:
    """Return [loss, d logp, d entropy] of every plan, summed over minibatches that are planned one by one."""
    state = method.initial_state()
    b, out = prepared, None
    for ids in map(torch.tensor, parts):
        rows, plans = b.rows(ids), method.plans(b.take(ids), state)
        if out is None:
            out = [[torch.zeros(()).double(), torch.zeros_like(b.logp), torch.zeros_like(b.logp)] for _ in plans]
        for total, plan, count in zip(out, plans, normalizer, strict=True):
            loss, x, h = values(plan, b.logp[rows], b.entropy[rows], count)
            total[0] += loss
            total[1][rows] += x
            total[2][rows] += h
    return out


@pytest.mark.parametrize("name", [name for name in METHODS if name not in OF_A_STEP])
def test_groups_split_in_every_way(name: str):
    """Group decisions are of the rollout: no split of a hard, a mixed or an easy prompt changes a gradient."""
    correct = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    b = rollout(3, correct=correct)  # 3, 6 and 11 are a teacher's
    method = example(name, **SPLIT.get(name, {}))
    state = method.initial_state()
    prepared = method.prepare(b, state)
    plans = method.plans(prepared, state)
    counts = [float(plan.count()) for plan in plans]
    whole = [values(plan, b.logp, b.entropy) for plan in plans]
    for first in (0, 4, 8):
        others = [i for i in range(12) if not first <= i < first + 4]
        for left, right in in_two(list(range(first, first + 4))):
            parts = [part for part in (left + others[:3], right + others[3:]) if part]
            for got, want in zip(added(method, prepared, parts, counts), whole, strict=True):
                for x, y in zip(got, want, strict=True):
                    compare(x, y, atol=1e-12 * max(1.0, float(y.abs().max())))


def test_a_part_of_a_mixed_prompt_is_not_hard():
    """A teacher, two right and two wrong answers. Taken as [0, 3, 4], the teacher was imitated (gradient -1/3)."""
    b = rollout(0).take(torch.arange(5))
    b = dataclasses.replace(
        b,
        group_ids=torch.zeros(5, dtype=torch.int64),
        reward=torch.tensor([0.0, 1.0, 1.0, 0.0, 0.0]).double(),
        correct=torch.tensor([0, 1, 1, 0, 0], dtype=torch.bool),
        demonstration=torch.tensor([1, 0, 0, 0, 0], dtype=torch.bool),
    )
    method = example("dypo", alpha=1.0)
    part = method.prepare(b, {}).take(torch.tensor([0, 3, 4]))
    plan = method.objective(part, {})
    _, grad = gradient_of(plan, part.logp)
    assert not grad[part.spread(part.demonstration)].any() and bool(grad.any())
    assert float(plan.count()) == pytest.approx(3 / 5)
    with pytest.raises(
        ValueError, match="all responses of a prompt whose responses are right and wrong, or none; got a"
    ):
        pairwise = example("dypo")
        pairwise.objective(pairwise.prepare(b, {}).take(torch.tensor([0, 3, 4])), {})


def test_minibatches_of_whole_prompts_with_pairwise_alignment():
    correct = torch.tensor([0, 0, 0, 1, 1, 0, 1, 0, 1, 1, 1, 1], dtype=torch.bool)
    b, method = rollout(3, correct=correct, reward=correct.double()), example("dypo")
    prepared = method.prepare(b, {})
    (plan,) = method.plans(prepared, {})
    want = values(plan, b.logp, b.entropy)
    # Only the prompt of 4 ... 7 is mixed: the hard and the easy one may be split.
    for parts in ([[0, 4, 5, 6, 7, 8], [1, 2, 3, 9, 10, 11]], [[0, 1, 8, 9], [2, 11], [3, 7, 6, 5, 4, 10]]):
        (got,) = added(method, prepared, parts, [float(plan.count())])
        for x, y in zip(got, want, strict=True):
            compare(x, y, atol=1e-13)


def test_the_best_of_a_group_is_the_best_of_the_rollout():
    """The second best alone in a minibatch would have been the best."""
    b = rollout(0, binary=False)
    method = example("a2pr_nll")
    prepared = method.prepare(b, {})
    for i in range(12):
        part = prepared.take(torch.tensor([i]))
        group = b.reward[b.group_ids == b.group_ids[i]]
        liked = bool(method.objective(part, {}).anchor_weight.any())
        assert liked == (float(b.reward[i]) == float(group.max()) and bool(part.mask.any()))
    rule = PositiveLikelihood(of="group_best", over="all")
    ruled = algorithms.make("dapo", overlong=None, skip_uniform=False, rules=(rule,))
    assert torch.equal(ruled.prepare(b, {}).imitation, prepared.imitation)


# ------------------------------------------------------------------------------------- preferences

PAIRWISE = [name for name in LOSSES if name != "kto" and not example_loss(name).whole]
HPL_LIKE = {"nll": NLL(coef=0.5, reduction="mean", level=1), "level_weight": (1.0, 0.5, 2.0)}


def loss_and_gradient(loss, batch: PreferenceBatch, logp: torch.Tensor, normalizer: float | str):
    leaf = logp.clone().requires_grad_()
    logits = torch.stack([leaf, torch.log(-torch.expm1(leaf))], 1)
    target = torch.zeros(logp.shape[0], dtype=torch.int64)
    with tokfuse.backend("reference"):
        step = preference_step(loss=loss, batch=batch, logits=logits, target=target, normalizer=normalizer)
        (grad,) = torch.autograd.grad(step.loss, leaf)
    return step.loss.detach(), grad


def pairs_of(batch: PreferenceBatch, rows: list[int]) -> PreferenceBatch:
    """Return a micro-batch with these pairs. The other sequences are in no pair, so they do not count."""
    per_pair = ("pairs", "level", "pair_weight")
    return dataclasses.replace(batch, **{n: x[rows] for n in per_pair if (x := getattr(batch, n)) is not None})


@pytest.mark.parametrize(("name", "options"), [*((name, {}) for name in PAIRWISE), ("dpo", HPL_LIKE)])
def test_micro_batches_of_pairs(name: str, options: dict):
    loss, (_, _, logp, _) = example_loss(name, **options), sequences()
    batch = example_batch(loss, pair_weight=torch.tensor([1.0, 0.5, 2.0, 1.0]).double())
    whole, want = loss_and_gradient(loss, batch, logp, "batch")
    for parts in ([[0, 1, 2, 3]], [[3, 0], [1, 2]], [[0], [1], [2], [3]]):
        micro = [pairs_of(batch, rows) for rows in parts]
        own = [loss.counts(part) for part in micro]
        total = {key: sum(counts[key] for counts in own) for key in own[0]}
        micro = [dataclasses.replace(part, counts=total or None) for part in micro]
        found = [loss_and_gradient(loss, part, logp, 4.0) for part in micro]
        compare(sum(f[0] for f in found), whole, atol=1e-12 * max(1.0, float(whole.abs())))
        compare(sum(f[1] for f in found), want, atol=1e-12 * max(1.0, float(want.abs().max())))


def test_micro_batches_of_unpaired_responses():
    loss, (_, _, logp, _) = example_loss("kto"), sequences()
    batch = example_batch(loss)
    _, want = loss_and_gradient(loss, batch, logp, "batch")
    found = torch.zeros_like(want)
    for ids in ((0, 4), (4, 5), (5, 10)):
        first, last = (int(batch.cu_seqlens[i]) for i in ids)
        part = dataclasses.replace(
            batch,
            num_tokens=last - first,
            cu_seqlens=batch.cu_seqlens[ids[0] : ids[1] + 1] - first,
            desirable=batch.desirable[slice(*ids)],
            mask=batch.mask[first:last],
            ref_logp=batch.ref_logp[first:last],
        )
        found[first:last] = loss_and_gradient(loss, part, logp[first:last], float(len(LENGTHS)))[1]
    compare(found, want, atol=1e-14)


def test_only_the_sorted_losses_couple_all_pairs():
    """Their quantiles are over the micro-batch, as in TRL."""
    assert [name for name in LOSSES if example_loss(name).whole] == ["aot", "aot_unpaired"]


def test_counts_of_a_part_are_refused():
    _, _, logp, _ = sequences()
    for name in ("hpl", "aries", "cpo"):
        loss = example_loss(name)
        batch = example_batch(loss)
        for normalizer in (4.0, None):
            with pytest.raises(ValueError, match="batch.counts must be given with a global normalizer"):
                loss_and_gradient(loss, batch, logp, normalizer)
        counted = dataclasses.replace(batch, counts=loss.counts(batch))
        with pytest.raises(ValueError, match='left out with normalizer="batch"'):
            loss_and_gradient(loss, counted, logp, "batch")
    with pytest.raises(ValueError, match=r"batch.counts must be left out; got \['pairs'\]"):
        plain = example_loss("dpo")
        loss_and_gradient(plain, example_batch(plain, counts={"pairs": torch.ones(())}), logp, 4.0)
    with pytest.raises(ValueError, match="batch.counts must be with the entries pairs, levels"):
        hpl = example_loss("hpl")
        loss_and_gradient(hpl, example_batch(hpl, counts={"pairs": torch.ones(())}), logp, 4.0)
