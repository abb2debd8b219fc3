"""Test `train_step`: it makes the calls of the protocol, for every method, in any number of micro-batches and ranks."""

import dataclasses
import itertools

import pytest
import torch
from algorithm_cases import METHODS, example, spread_over
from harness import compare
from train_cases import Model

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import train_step


def by_hand(algorithm: algorithms.Algorithm, model: Model, minibatches: list[torch.Tensor], rollouts: int) -> None:
    """Train with the calls that the docstring of algorithms/base.py lists."""

    def step(plan, seqs):
        model.optimizer.zero_grad()
        out = tokfuse.policy_step(**model.forward(seqs, plan.source), **plan.inputs())
        out.loss.backward()
        model.optimizer.step()
        return algorithm.update(state, algorithm.measure(plan, out.stats.logp, out.stats.entropy))

    state = algorithm.initial_state()
    for _ in range(rollouts):
        batch = algorithm.prepare(model.batch(), state)
        for plan in algorithm.before(batch, state):
            state = step(plan, torch.arange(batch.num_seqs))
        for each, seqs in itertools.product(algorithm.passes(), minibatches):
            part = batch.take(seqs)
            if algorithm.needs_policy:
                with torch.no_grad():
                    given = model.forward(seqs, "current")
                    stats = tokfuse.linear_token_stats(given["hidden"], given["weight"], given["target"])
                part = part.with_policy(stats.logp, stats.entropy)
            for plan in each.plans(part, state):
                state = step(plan, seqs)
        state = algorithm.advance(state, batch)


WHOLE_PROMPTS = [torch.arange(0, 4), torch.arange(4, 12)]


@pytest.mark.parametrize("name", METHODS)
def test_it_makes_the_calls_of_the_protocol(name: str):
    options = {"pipo": {"history": 2, "min_steps": 2}, "lopti": {"eta": 0.05}}.get(name, {})
    algorithm = example(name, **options)
    want, got = Model(), Model()
    by_hand(algorithm, want, WHOLE_PROMPTS, 3)
    state = algorithm.initial_state()
    rewards = got.all.reward
    for _ in range(3):
        done = train_step(
            algorithm, state, got.batch(), got.forward, got.optimizer, minibatches=WHOLE_PROMPTS, micro_batches=2
        )
        state = done.state
    assert torch.equal(rewards, got.all.reward) and len(done.losses) >= 2
    start = Model().weight.detach()
    assert not torch.equal(want.weight, start)
    compare(
        got.weight.detach(),
        want.weight.detach(),
        atol=1e-10 * float((want.weight.detach() - start).abs().max()) + 1e-14,
    )


def test_minibatches_hold_whole_prompts_in_the_order_of_the_generator():
    model = Model()
    parts = lambda: [seqs for _, seqs in model.asked]  # noqa: E731
    state = {}
    grpo = example("grpo")
    train_step(grpo, state, model.batch(), model.forward, model.optimizer, minibatches=2, epochs=2)
    assert parts() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11]] * 2
    model.asked.clear()
    # The prompts of a response may be anywhere in the batch.
    ids = torch.tensor([4, 4, 9, 1, 9, 1, 4, 4, 1, 9, 4, 9])
    train_step(grpo, state, model.batch(group_ids=ids), model.forward, model.optimizer, minibatches=3)
    assert parts() == [[0, 1, 6, 7, 10], [2, 4, 9, 11], [3, 5, 8]]
    model.asked.clear()
    gen = torch.Generator().manual_seed(3)
    train_step(grpo, state, model.batch(), model.forward, model.optimizer, minibatches=3, epochs=4, generator=gen)
    orders = [tuple(seqs[0] for seqs in parts()[3 * k : 3 * k + 3]) for k in range(4)]
    assert all(sorted(order) == [0, 4, 8] for order in orders) and len(set(orders)) > 1


def test_the_previous_rollout_is_asked_for_by_name():
    model, pipo = Model(), example("pipo", history=2, min_steps=2)
    state = pipo.initial_state()
    for reward in (0.0, 0.5, 1.0):
        model.asked.clear()
        batch = model.batch(reward=model.all.reward + reward)
        state = train_step(pipo, state, batch, model.forward, model.optimizer).state
    assert [source for source, _ in model.asked] == ["previous", "current"]


@pytest.mark.parametrize("gradients", ["mean", "sum"])
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "nft", "kl_cov", "r2vpo"])
def test_two_ranks_are_one_process(name: str, gradients: str):
    """The gradients of both ranks, averaged or added up, are the gradient of one process, and so is the state."""
    algorithm = example(name)

    def train(world: algorithms.World) -> tuple[torch.Tensor, algorithms.State, float]:
        model = Model()
        seqs = torch.arange(12) if world.gather is None else WHOLE_PROMPTS[world.rank]

        def forward(part: torch.Tensor, source: str) -> dict[str, torch.Tensor]:
            return model.forward(seqs[part], source)

        batch = model.batch()
        # Not the logp of this model: the gradient of KL-Cov's |logp - old_logp| would be the sign of a rounding error.
        batch = dataclasses.replace(batch, old_logp=batch.old_logp - 0.01, world=world).take(seqs)
        done = train_step(algorithm, algorithm.initial_state(), batch, forward, model.optimizer, gradients=gradients)
        return model.weight.detach() - Model().weight.detach(), done.state, done.losses[0]

    want, state, loss = train(algorithms.World())
    found = spread_over(2, train)
    scale = 0.5 if gradients == "mean" else 1.0
    compare(scale * (found[0][0] + found[1][0]), want, atol=1e-12)
    assert scale * (found[0][2] + found[1][2]) == pytest.approx(loss, abs=1e-12)
    for _, mine, _ in found:
        assert mine.keys() == state.keys()
        assert all(mine[key] == pytest.approx(state[key], abs=1e-12) for key in state)


def test_leaving_out_prompts_without_gradient_changes_nothing():
    reward = torch.tensor([1.0] * 4 + [0.0, 1.0, 0.0, 0.0] + [0.0] * 4, dtype=torch.float64)
    models = Model(), Model()
    steps = []
    for model, leave_out in zip(models, (False, True), strict=True):
        grpo = example("grpo", kl=None)
        batch = model.batch(reward=reward)
        steps.append(train_step(grpo, {}, batch, model.forward, model.optimizer, leave_out=leave_out))
    assert models[1].asked == [("current", [4, 5, 6, 7])]
    compare(models[1].weight.detach(), models[0].weight.detach(), atol=1e-13)
    assert steps[0].losses == pytest.approx(steps[1].losses, abs=1e-13)
    same = models[0].batch(reward=torch.ones(12, dtype=torch.float64))
    nothing = train_step(grpo, {}, same, models[0].forward, models[0].optimizer, leave_out=True)
    assert nothing.losses == [] and nothing.metrics is None


def test_a_new_method_is_a_subclass_and_a_call():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Confident(algorithms.Standard):
        """Weigh every token by the old policy's probability."""

        def objective(self, batch, state):
            return super().objective(batch, state).weigh(batch.old_logp.exp())

    own, plain = Model(), Model()
    first = train_step(Confident(), {}, own.batch(), own.forward, own.optimizer)
    again = train_step(algorithms.Standard(), {}, plain.batch(), plain.forward, plain.optimizer)
    b = first.batch
    want = -(b.spread(b.advantage) * b.old_logp.exp())[b.valid].mean()
    assert first.losses[0] == pytest.approx(float(want), abs=1e-12) and first.losses != again.losses


def test_options_are_checked_and_the_callback_sees_every_micro_batch():
    model, seen = Model(), []

    def call(**options):
        given = {"on_step": lambda plan, inputs, step: seen.append((len(inputs["target"]), float(step.loss.detach())))}
        return train_step(example("grpo"), {}, model.batch(), model.forward, model.optimizer, **given, **options)

    for message, options in {
        "generator must be None with a list": {"minibatches": WHOLE_PROMPTS, "generator": torch.Generator()},
        "gradients must be one of": {"gradients": "max"},
        "micro_batches must be": {"micro_batches": 0},
        "minibatches must be an integer": {"minibatches": 0},
        "minibatches must be sequences in": {"minibatches": [torch.tensor([99])]},
        "epochs must be": {"epochs": 0},
        "max_gradient must be": {"max_gradient": 0.0},
    }.items():
        with pytest.raises(ValueError, match=message):
            call(**options)
    before = model.weight.detach().clone()
    right = {"algorithm": example("grpo"), "batch": model.batch(), "optimizer": model.optimizer}
    for name in right:
        with pytest.raises(TypeError, match=f"train_step: {name} must be an? .*; got str"):
            train_step(state={}, forward=model.forward, **right | {name: "grpo"})
    with pytest.raises(TypeError, match="minibatches must be an integer; got 1.5"):
        call(minibatches=1.5)
    assert torch.equal(model.weight, before)  # nothing was trained
    done = call(micro_batches=3, max_gradient=1e-3)
    assert sum(n for n, _ in seen) == model.all.num_tokens and len(seen) == 3
    assert sum(loss for _, loss in seen) == pytest.approx(done.losses[0], abs=1e-12)
    assert float((model.weight.detach() - before).norm()) == pytest.approx(0.5e-3, rel=1e-5)


@pytest.mark.parametrize("name", ["grpo", "kl_cov"])  # kl_cov reads the policy before its loss
def test_a_wrong_result_of_forward_is_named(name: str):
    model = Model()
    hidden, target = model.features, model.target
    head = {"hidden": hidden, "weight": model.weight, "target": target}
    needed = "the result of forward must be a dict with logits and target, or hidden, weight and target"
    size = "in the result of forward must be a tensor with one row for each of the"
    before = model.weight.detach().clone()
    for result, error, message in (
        ((hidden, target), TypeError, f"{needed}; got tuple"),
        (None, TypeError, f"{needed}; got NoneType"),
        ({}, ValueError, f"{needed}; got nothing"),
        ({"hidden": hidden, "target": target}, ValueError, f"{needed}; got hidden, target"),
        ({"logits": hidden}, ValueError, f"{needed}; got logits"),
        (head | {"logits": hidden}, ValueError, f"{needed}; got hidden, weight, target, logits"),
        (head | {"mask": target > 0}, ValueError, "every key of the result of forward must be one of .*; got 'mask'"),
        (head | {"target": target[1:]}, ValueError, rf"'target' {size} \d+ tokens of seqs; got shape \(36,\)"),
        (head | {"hidden": hidden[None]}, ValueError, rf"'hidden' {size} \d+ tokens of seqs; got shape \(1, 37, 6\)"),
        (head | {"target": target.tolist()}, ValueError, rf"'target' {size} \d+ tokens of seqs; got list"),
    ):
        with pytest.raises(error, match=f"^train_step: {message}"):
            train_step(example(name), {}, model.batch(), lambda seqs, source, result=result: result, model.optimizer)
    with pytest.raises(TypeError, match="^train_step: forward must be a function; got dict"):
        train_step(example(name), {}, model.batch(), head, model.optimizer)
    assert torch.equal(model.weight, before)
    absent = {"bias": None, "logits": None}
    train_step(example(name), {}, model.batch(), lambda *asked: model.forward(*asked) | absent, model.optimizer)
    assert not torch.equal(model.weight, before)
