"""Test the system examples on a random model of a few thousand parameters."""

import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import branch_thoughts
import joint_metatuner
import learn_causalrm
import prune_steps_isla
import refine_aries
import relabel_ugda
import replay_r2vpo
import route_cog_rethinker
import select_less
import windowed_tppo
from grpo_demo import chains
from harness import compare
from tiny_llama import tiny_llama

ALPHABET = "0123456789+= \nabcdefghijklmnopqrstuvwxyz,.?:"
EXAMPLES = Path(chains.__file__).parents[1]


class CharTokenizer:
    """One token per character."""

    def encode(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(ALPHABET[token] for token in tokens)


@pytest.fixture
def writer() -> chains.Writer:
    torch.manual_seed(0)
    return chains.Writer(tiny_llama(len(ALPHABET)), CharTokenizer())


@pytest.fixture
def says(monkeypatch):
    """Make the writer say what a function of the prompt returns, whatever it samples."""

    def install(writer: chains.Writer, say) -> None:
        def sample(prompts, new, stop="\n", started=None):
            started = started or [[] for _ in prompts]
            texts = [say(p + writer.tokenizer.decode(s)) for p, s in zip(prompts, started, strict=True)]
            heads = [[*writer.tokenizer.encode(p), *s] for p, s in zip(prompts, started, strict=True)]
            return chains.Responses(heads, [writer.tokenizer.encode(text)[:new] for text in texts])

        monkeypatch.setattr(writer, "sample", sample)

    return install


# ---------------------------------------------------------------------------------- shared helpers


def test_chains_and_prompts():
    question = chains.Sum((4, 3, 2))
    assert question.steps == ["4 + 3 = 7", "7 + 2 = 9"] and question.answer == 9
    assert question.right(" 9\n") and question.right("4 + 3 = 7\n7 + 2 = 9") and not question.right("no")
    other = chains.Sum((5, 5, 5))
    assert chains.direct(other).endswith("5 + 5 + 5 =")
    assert chains.decompose(other, ["5 + 5 = 10"]).endswith("\n5 + 5 + 5\n5 + 5 = 10\n")
    assert chains.refine(other, " 12\n").endswith("5 + 5 + 5 = 12\nwrong, it is =")
    assert chains.sums(1, 3, 2) == chains.sums(1, 0, 5)[3:] != chains.sums(2, 3, 2)


def test_the_writer_stops_and_scores_like_the_plain_model(writer):
    prompts = ["4 + 3 =", "1 + 12 + 3 ="]
    out = writer.sample(prompts, 12, started=[[], writer.tokenizer.encode(" 4")])
    assert out.prompts[1] == writer.tokenizer.encode("1 + 12 + 3 = 4")
    assert all("\n" not in text[:-1] and 0 < len(text) <= 12 for text in writer.texts(out))
    stats = writer.stats(out)
    for i, (p, r) in enumerate(zip(out.prompts, out.tokens, strict=True)):
        logits = writer.model(torch.tensor([p + r])).logits[0, len(p) - 1 : -1].double()
        want = logits.log_softmax(-1).gather(1, torch.tensor(r)[:, None])[:, 0]
        first, last = out.cu_seqlens[i : i + 2]
        compare(stats.logp[first:last], want.detach(), atol=1e-5)
        assert writer.sums(out)[i] == pytest.approx(want.sum().item(), abs=1e-5)


@pytest.mark.parametrize("path", sorted(p for p in EXAMPLES.glob("*_*.py") if "from grpo_demo.chains" in p.read_text()))
def test_an_example_is_short(path: Path):
    assert len(path.read_text().splitlines()) < 150


# ------------------------------------------------------------------------------------------- R2VPO


def test_r2vpo_replays_stale_rollouts_with_their_own_ratio(writer, says, capsys):
    settings = replay_r2vpo.Settings(prompts=2, group_size=3, kept=2, replays=2, lr=3e-2, delta=1e-4, penalty=0.0)
    replay = replay_r2vpo.Replay(writer, settings)
    answers = iter(range(1000))
    says(writer, lambda prompt: f" {next(answers) % 3 + 4}\n")  # some answers are right, so groups have advantages
    rows = [replay.step([chains.Sum((2, 2)), chains.Sum((3, 3))]) for _ in range(4)]
    assert [row["age"] for row in rows] == [0.0, 1.0, 1.5, 1.5] and len(replay.buffer) == 2
    assert all(row["fresh"] < 1e-9 for row in rows), "the ratio of a fresh rollout is 1"
    assert all(row["stale"] > 1e-4 for row in rows[1:])
    assert rows[0]["penalty"] == 0.0 and rows[-1]["penalty"] > 0.0
    oldest = replay.buffer[0]
    assert not torch.allclose(writer.stats(oldest.responses).logp, oldest.batch.old_logp, atol=1e-3)
    replay_r2vpo.run(writer, steps=1, seed=0, settings=settings)
    assert "mean reward: first fifth" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- T-PPO


def test_tppo_keeps_partial_responses_with_the_policy_of_each_part(writer, says, capsys):
    settings = windowed_tppo.Settings(slots=2, window=4, longest=10, lr=3e-2, terms=2)
    trainer = windowed_tppo.Trainer(writer, settings, seed=0)
    short, long = trainer.scheduler.slots
    ended = chains.decompose(short.question)
    says(writer, lambda prompt: "1=2\n\n" if prompt == ended else "77777")
    says_full = writer.sample
    writer.sample = lambda prompts, new, *rest: says_full(prompts, 5 if prompts[0] == ended else new, *rest)
    first = trainer.step()
    assert short.finished and not long.finished and trainer.scheduler.slots[1].tokens == long.tokens
    recorded = list(long.old_logp)
    assert len(recorded) == len(long.tokens) == 5
    trainer.step()
    assert trainer.scheduler.slots[0].question != short.question, "a finished response leaves its slot"
    assert long.old_logp[:5] == recorded and len(long.tokens) == 9
    now = writer.stats(chains.Responses(writer.encode([chains.decompose(long.question)], [""]).prompts, [long.tokens]))
    assert (now.logp[:5] - torch.tensor(recorded)).abs().max() > 1e-2
    trainer.step()
    assert len(long.tokens) == 10 and long.finished, "the longest response is cut"
    assert first["tokens"] == 10 and trainer.critic.weight.any()
    windowed_tppo.run(writer, steps=1, seed=0, settings=settings)
    assert "windows per response" in capsys.readouterr().out


def test_tppo_trains_the_tokens_of_the_window_alone(writer, says):
    trainer = windowed_tppo.Trainer(writer, windowed_tppo.Settings(slots=1, window=3, longest=9), seed=0)
    says(writer, lambda prompt: "123")
    trainer.scheduler.advance()
    trainer.scheduler.record(torch.zeros(3))
    responses = trainer.scheduler.advance()
    batch, _ = trainer.batch(responses)
    assert batch.window.tolist() == [False] * 3 + [True] * 3
    assert batch.old_logp[:3].tolist() == [0.0] * 3 and not batch.finished.any()
    prepared = trainer.method.prepare(batch, {})
    assert prepared.valid.tolist() == batch.window.tolist()


# --------------------------------------------------------------------------------- Thought Branches


def test_a_line_that_decides_the_answer_is_important(writer, says, monkeypatch, capsys):
    """After the right first line the model always succeeds; otherwise it writes one of two lines at random."""
    question = chains.Sum((4, 3, 2))
    turn = iter(range(10_000))

    def say(prompt):
        tail = prompt.rsplit("4 + 3 + 2\n", 1)[1]
        if tail.startswith("4 + 3 = 7\n"):
            return "7 + 2 = 9\n\n" if "9" not in tail else "\n\n"
        if tail.startswith("4 + 3 = 8\n"):
            return "8 + 2 = 10\n\n" if "10" not in tail else "\n\n"
        return "4 + 3 = 7\n7 + 2 = 9\n\n" if next(turn) % 2 else "4 + 3 = 8\n8 + 2 = 10\n\n"

    says(writer, say)
    settings = branch_thoughts.Settings(rollouts=20)
    first, last = branch_thoughts.examine(writer, question, question.steps, settings)
    assert (first.rate_without, first.rate_with, last.rate_with) == (0.5, 1.0, 1.0)
    assert first.importance > 5 > last.importance == pytest.approx(0.0, abs=1e-6)
    assert not last.abandoned and last.removals == 5, "the second line always comes back"
    assert branch_thoughts.cosine("4 + 3 = 7", "4 + 3 = 8") < 0.99 < branch_thoughts.cosine("7 + 2", "7 + 2")
    monkeypatch.setattr(branch_thoughts, "sums", lambda *_: [question])
    branch_thoughts.run(writer, steps=1, seed=0, settings=branch_thoughts.Settings(rollouts=4, removals=1))
    assert "more than 1" in capsys.readouterr().out


# -------------------------------------------------------------------------------------------- ISLA


def test_isla_keeps_the_step_that_helps_and_learns_from_it(writer, says, monkeypatch, capsys):
    question = chains.Sum((4, 3, 2))
    turn = iter(range(10_000))

    def say(prompt):
        tail = prompt.rsplit("4 + 3 + 2\n", 1)[1]
        if "= 8\n" in tail:
            return "8 + 2 = 10\n\n"
        if "= 7\n" in tail:
            return "7 + 2 = 9\n\n" if "9" not in tail else "\n\n"
        return "4 + 3 = 7\n7 + 2 = 9\n\n" if next(turn) % 2 == 0 else "4 + 3 = 8\n8 + 2 = 10\n\n"

    says(writer, say)
    settings = prune_steps_isla.Settings(completions=4)
    trace = prune_steps_isla.measure(writer, question, 4)
    assert trace.lines == question.steps and trace.accuracy.tolist() == [0.5, 1.0, 1.0]
    assert (trace.uncertainty > 0.05).all()
    found = prune_steps_isla.pair_at(writer, trace, 0, settings)
    assert found == (chains.decompose(question), "4 + 3 = 7\n", "4 + 3 = 8\n")
    assert prune_steps_isla.pair_at(writer, trace, 1, settings) is None
    optimizer = chains.optimizer_of(writer.model, 1e-2)
    loss = prune_steps_isla.algorithms.make("dpo")
    margins = [float(chains.train_pairs(writer, loss, optimizer, [found]).losses) for _ in range(2)]
    assert margins[0] == pytest.approx(0.6931, abs=1e-3), "the reference is the policy before the step"
    sides = writer.encode([found[0]] * 2, found[1:])
    assert torch.diff(writer.sums(sides)) < 0
    monkeypatch.setattr(prune_steps_isla, "sums", lambda *_: [question])
    turn = iter(range(10_000))  # the first chain is the right one again
    prune_steps_isla.run(writer, steps=1, seed=0, settings=settings)
    assert "kept steps: 1" in capsys.readouterr().out


# ------------------------------------------------------------------------------------------- ARIES


def test_aries_refines_a_wrong_answer_and_pairs_both_levels(writer, says, capsys):
    question, turn = chains.Sum((2, 3)), iter(range(10_000))

    def say(prompt):
        if "= 9\nwrong, it is =" in prompt:
            return " 5\n" if next(turn) % 2 else " 8\n"
        if "= 8\nwrong, it is =" in prompt:
            return " 5\n"
        return " 5\n" if next(turn) % 2 else " 9\n"

    says(writer, say)
    settings = refine_aries.Settings(answers=4, turns=2, lr=3e-2)
    turns = refine_aries.refine_chains(writer, [question], settings)
    assert [some[0].prompt for some in turns] == [
        chains.direct(question),
        chains.refine(question, "9"),
        chains.refine(question, "8"),
    ]
    assert refine_aries.accuracies(turns) == [0.5, 0.5, 1.0]
    pairs, levels = refine_aries.pairs_of(turns)
    assert levels == [0, 1] and [pair[1:] for pair in pairs] == [(" 5\n", " 9\n"), (" 5\n", " 8\n")]
    before = [writer.sums(writer.encode([p, p], rest)).diff() for p, *rest in pairs]
    loss = refine_aries.algorithms.make("aries", level_weight=(1.0, 0.5))
    step = chains.train_pairs(writer, loss, chains.optimizer_of(writer.model, 1e-2), pairs, levels)
    assert step.loss.item() == pytest.approx(1.5 * 0.6931, abs=1e-3)
    after = [writer.sums(writer.encode([p, p], rest)).diff() for p, *rest in pairs]
    assert all(b < a for a, b in zip(before, after, strict=True)), "both levels are learnt"
    refine_aries.run(writer, steps=3, seed=0, settings=settings)
    assert "last rounds: turn 0" in capsys.readouterr().out


# ----------------------------------------------------------------------------------- Cog-Rethinker


def test_cog_rethinker_goes_to_the_next_stage_only_if_every_rollout_fails(writer, says, capsys):
    easy, hard, harder, hopeless = (chains.Sum(terms) for terms in ((1, 1, 1), (2, 2, 2), (3, 3, 3), (5, 5, 5)))
    prompts = []

    def say(prompt):
        prompts.append(prompt)
        if "wrong, it is =" in prompt:
            return " 9\n"
        if prompt.endswith("2 + 2 + 2\n"):
            return "2 + 2 = 4\n4 + 2 = 6\n\n"
        return " 3\n" if prompt.endswith("1 + 1 + 1 =") else " 8\n\n"

    says(writer, say)
    driver = route_cog_rethinker.Driver(writer, route_cog_rethinker.Settings(rollouts=2, lr=3e-2, sft_weight=1.0))
    target = writer.encode([chains.direct(hard)], ["2 + 2 = 4\n4 + 2 = 6\n\n"])
    before = writer.sums(target)
    row = driver.step([easy, hard, harder, hopeless])
    assert [row[name] for name in ("direct", "decompose", "reflect", "unsolved")] == [1, 1, 1, 1]
    asked = [prompts.count(p) for p in (chains.direct(easy), chains.decompose(easy), chains.refine(harder, "8"))]
    assert asked == [2, 0, 2]
    assert driver.state["decompose"] == [["2 + 2 + 2", "2 + 2 = 4\n4 + 2 = 6"]] * 2
    assert driver.state["reflect"] == [["3 + 3 + 3", "9"]] * 2
    assert writer.sums(target) > before, "the policy learns the solution after the direct template"
    shown = [p for p in prompts if p.endswith("\n3 + 3 + 3\n")]
    assert shown[0].startswith("2 + 2 + 2\n2 + 2 = 4\n4 + 2 = 6\n\n"), "solved cases are shown"
    route_cog_rethinker.run(writer, steps=1, seed=0, settings=driver.settings)
    assert "buffers:" in capsys.readouterr().out


# --------------------------------------------------------------------------------------- MetaTuner


def test_metatuners_actor_learns_as_far_as_the_copy_is_up_to_date(capsys):
    *_, renewed = joint_metatuner.train("joint", joint_metatuner.Settings(steps=100))
    assert renewed["prompts"] > 0.95 and renewed["answers"] > 0.85
    *_, stale = joint_metatuner.train("joint", joint_metatuner.Settings(steps=100, every=200))
    assert stale["prompts"] > 0.95 and stale["answers"] < 0.4, "prompts of the untrained copy say nothing"
    assert joint_metatuner.main(["--steps", "10"]) == 0
    assert "alternating" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------- LESS


def test_less_takes_features_of_single_samples_with_the_moments_of_the_run(writer, capsys):
    s = select_less.Settings(per_kind=4, validation=2, held_out=3, warm_steps=2, batch=4, lr=1e-2)
    pool = select_less.pool_of(0, s)
    assert [x.kind for x in pool] == [kind for kind in select_less.KINDS for _ in range(4)]
    wrong = [x for x in pool if x.kind == "wrong sums"]
    assert all(eval(x.prompt.splitlines()[-1].removesuffix("=")) + 3 == int(x.response) for x in wrong)
    optimizer = chains.optimizer_of(writer.model, s.lr)
    before = writer.sums(select_less.encoded(writer, pool)).sum()
    select_less.train(writer, pool, optimizer, s.warm_steps, s)
    assert writer.sums(select_less.encoded(writer, pool)).sum() > before
    for given in (None, optimizer):
        together = select_less.features(writer, pool, s, given)
        for i in (1, 10):  # a sum and another task, next to longer and shorter samples
            alone = select_less.features(writer, pool[i : i + 1], s, given)
            compare(together[i : i + 1], alone, atol=1e-4 * float(alone.abs().max()))
    plain = select_less.features(writer, pool, s)
    cosine = torch.nn.functional.cosine_similarity(plain, together, dim=1)
    assert (cosine < 0.99).all(), "the second moments change the direction"
    select_less.run(writer, steps=2, seed=0, settings=s)
    out = capsys.readouterr().out
    assert "more steps on LESS's choice" in out and "more steps on random's choice" in out


# --------------------------------------------------------------------------------------------- UGDA


def test_ugda_relabels_and_refines_the_rewards(capsys):
    rows = torch.tensor([[9, 9, 18], [9, 9, 8], [1, 2, 3], [1, 2, 5]])
    assert relabel_ugda.scores(rows).tolist() == [5, 1, 5, 3]
    assert relabel_ugda.scores(rows, False).tolist() == [1, 5, 5, 3], "without the carry 9 + 9 is 8"
    torch.manual_seed(0)
    s = relabel_ugda.Settings(seeds=1, labels=200, members=3, fits=100, steps=5, trusted=16)
    rated = relabel_ugda.samples(s.labels)
    ensemble = relabel_ugda.Ensemble(rated, relabel_ugda.scores(rated, False), s)
    score = ensemble.influence(rows, rated[:16])
    assert score.shape == (4,) and (score > 0).all() and (score <= 1).all()
    first = ensemble.rewards(rows).mean(0)
    assert first[1] > first[0], "the raters forget the carry"
    ensemble.fit(s.fits, rows, rated)
    refined = ensemble.rewards(rows).mean(0)
    assert refined[0] > refined[1], "the expert's scores win"
    assert relabel_ugda.main(["--seeds", "1", "--labels", "100", "--fits", "5", "--steps", "3"]) == 0
    assert "UGDA" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------- CausalRM


def test_causalrm_learns_both_heads_and_the_reward(capsys):
    s = learn_causalrm.Settings(seeds=1, steps=150)
    torch.manual_seed(0)
    data = learn_causalrm.draw(s)
    learned = learn_causalrm.learned_propensity(data, s.steps)
    assert (learned - data.propensity).abs().mean() < 0.06 < (data.propensity.mean() - data.propensity).abs().mean()
    rate01, rate10 = learn_causalrm.learned_noise(data, s.steps)
    assert abs(rate01 - s.false_negative) < 0.15 and abs(rate10 - s.false_positive) < 0.1 and rate01 > rate10
    found = learn_causalrm.compare(s, 0)
    squared = {name: error for name, (_, error) in found.items()}
    assert squared["both"] < min(squared[name] for name in ("no correction", "propensity", "noise"))
    assert squared["both, doubly robust"] < squared["no correction"]
    assert learn_causalrm.main(["--seeds", "1", "--samples", "200", "--steps", "3"]) == 0
    assert "both, true values" in capsys.readouterr().out
