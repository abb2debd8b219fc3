"""Test `examples/train_grpo.py` on a random model of a few thousand parameters.

Sharing the prompt within a group must change no hidden state or gradient. Leaving out groups without advantage
must change no parameter. A run that was stopped and resumed must write the same rows as an uninterrupted run.
Bounds are float32 rounding of the same sums in another order.
"""

import dataclasses
import importlib.util
import os
import signal
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

import summarize_runs
import train_grpo
from grpo_demo import algorithms, learner, model, report, rollout, run_folder, task

import tokfuse

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

ALPHABET = "0123456789+-= abc\n"
SETTINGS = train_grpo.Settings(steps=4, prompts=3, group_size=4, max_new_tokens=3, lr=1e-2, seed=1)


class CharTokenizer:
    """One token per character."""

    def encode(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(ALPHABET[token] for token in tokens)


class DigitTask:
    """The correct answer starts with a digit. `on_question` receives each requested position."""

    def __init__(self, on_question=lambda start: None) -> None:
        self.on_question = on_question

    def questions(self, start: int, count: int) -> list[task.Question]:
        self.on_question(start)
        prompts = [f"{i % 10}+{i}=" for i in range(start, start + count)]
        return [task.Question(prompt, {}) for prompt in prompts]

    def score(self, text: str, question: task.Question) -> float:
        return float(text[0].isdigit())


def tiny_model() -> torch.nn.Module:
    """Return a random Llama with tied head, with the same weights in each call."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=True,
        initializer_range=0.3,
    )
    return transformers.LlamaForCausalLM(config).eval()


def new_training(settings=SETTINGS, digits: DigitTask | None = None) -> train_grpo.Training:
    return train_grpo.Training(settings, tiny_model(), CharTokenizer(), digits or DigitTask())


def new_folder(path: Path) -> run_folder.RunFolder:
    folder = run_folder.RunFolder(path)
    folder.start()
    return folder


def figures(folder: run_folder.RunFolder) -> list[tuple[float, ...]]:
    """Return the figures that must be equal between two runs: everything except times and memory."""
    keys = ("step", "reward", "entropy", "loss", "kl", "clip_fraction", "grad_rows", "tokens")
    return [tuple(row[key] for key in keys) for row in folder.rows()]


def example_rollout(group_size: int = 2) -> rollout.Rollout:
    """Return two prompts of different length with completions of length 1 to 3."""
    prompt, mask = rollout.encode(CharTokenizer(), ["1+2=", "10-2="])
    completion = torch.arange(2 * group_size * 3).view(-1, 3) % len(ALPHABET)
    length = torch.arange(2 * group_size) % 3 + 1
    reward = (torch.arange(2 * group_size) % 2).float()
    return rollout.Rollout(prompt, mask, completion, length, reward, [""] * len(length))


def plain_hidden(net: torch.nn.Module, batch: rollout.Rollout) -> torch.Tensor:
    """Return `completion_hidden`, computed by one forward over every whole sequence."""
    tokens = torch.cat([batch.prompt.repeat_interleave(batch.group_size, 0), batch.completion], 1)
    mask = torch.cat([batch.prompt_mask.repeat_interleave(batch.group_size, 0), torch.ones_like(batch.completion)], 1)
    states = net.model(tokens, attention_mask=mask, position_ids=rollout.positions(mask))
    start = batch.prompt.shape[1] - 1
    return states.last_hidden_state[:, start:-1][batch.kept]


# --- task and rollout -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pieces", "length"), [(["\n", "1"], 1), ([" 7", "\n", "x"], 2), ([" 7", " \n\n", "x"], 2), ([" 1", "2"], 2)]
)
def test_the_first_newline_ends_what_counts(pieces, length):
    assert task.kept_length(pieces) == length


def test_prompts_are_padded_on_the_left():
    ids, mask = rollout.encode(CharTokenizer(), ["1", "123"])
    assert ids.tolist() == [[0, 0, 1], [1, 2, 3]]
    assert mask.tolist() == [[0, 0, 1], [1, 1, 1]]
    assert rollout.positions(mask).tolist() == [[0, 0, 0], [0, 1, 2]]


def test_packing_keeps_the_tokens_that_count():
    batch = example_rollout()
    assert batch.length.tolist() == [1, 2, 3, 1]
    assert batch.cu_seqlens.tolist() == [0, 1, 3, 6, 7] and batch.cu_seqlens.dtype == torch.int32
    assert batch.target.tolist() == [0, 3, 4, 6, 7, 8, 9]
    assert batch.group_ids.tolist() == [0, 0, 1, 1]
    second = batch.select(torch.tensor([1]))
    assert second.target.tolist() == [6, 7, 8, 9] and second.reward.tolist() == [0.0, 1.0]
    assert second.prompt.tolist() == batch.prompt[1:].tolist()


def test_sharing_the_prompt_changes_neither_states_nor_gradients():
    net, batch = tiny_model(), example_rollout()
    grads = []
    for states in (plain_hidden(net, batch), rollout.completion_hidden(net, batch)):
        grads.append((states.detach(), torch.autograd.grad(states.sin().sum(), net.parameters())))
    torch.testing.assert_close(grads[0][0], grads[1][0], rtol=1e-5, atol=1e-5)
    for plain, shared in zip(grads[0][1], grads[1][1], strict=True):
        torch.testing.assert_close(plain, shared, rtol=1e-4, atol=1e-4)


def test_samples_follow_the_model():
    """With a nearly deterministic head every sample is the greedy continuation."""
    net = tiny_model()
    net.lm_head.weight.data *= 100  # the head is tied, so this also scales the embedding
    prompt, mask = rollout.encode(CharTokenizer(), ["1+2=", "10-2="])
    sampled = rollout.sample(net, prompt, mask, 2, 3)
    tokens, full = prompt.repeat_interleave(2, 0), mask.repeat_interleave(2, 0)
    for _ in range(3):
        logits = net(tokens, attention_mask=full, position_ids=rollout.positions(full)).logits
        tokens = torch.cat([tokens, logits[:, -1:].argmax(-1)], 1)
        full = torch.cat([full, torch.ones_like(full[:, :1])], 1)
    assert sampled.tolist() == tokens[:, -3:].tolist()


def test_questions_are_deterministic_and_scored_strictly():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is not installed")
    sums = task.ChainSum(seed=3)
    first, second = sums.questions(5, 2)
    assert first == task.ChainSum(seed=3).questions(5, 1)[0] and first != second
    prompts = {q.prompt for q in sums.questions(0, 50)}
    assert not prompts & {q.prompt for q in task.ChainSum(seed=4).questions(0, 50)}
    *solved, asked = first.prompt.split("\n")
    assert len(solved) == task.SHOTS and asked.endswith(" =")
    for line in solved:
        sum_text, answer = line.split("=")
        assert eval(sum_text) == int(answer)
    right = str(eval(asked.removesuffix("=")))
    assert sums.score(f" {right}\nand more", first) == 1.0
    for wrong in ("", f"1{right}", f"{right}{right}", "seven", f" is {right}"):
        assert sums.score(wrong, first) == 0.0


# --- learning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", algorithms.OPTIONS)
def test_every_algorithm_trains(name):
    training = new_training(dataclasses.replace(SETTINGS, algorithm=name))
    before = training.model.lm_head.weight.detach().clone()
    rows = [training.step() for _ in range(3)]
    assert any(row["updates"] for row in rows)
    assert all(row["loss"] is None or abs(row["loss"]) < 10 for row in rows)
    assert not torch.equal(before, training.model.lm_head.weight)


@pytest.mark.parametrize("minibatches", [1, 2])
def test_leaving_out_groups_without_advantage_is_exact(minibatches):
    batch = dataclasses.replace(example_rollout(group_size=4), reward=torch.tensor([1.0, 0, 1, 1, 1, 1, 1, 1]))
    nets = []
    for leave_out in (True, False):
        net = tiny_model()
        method = tokfuse.algorithms.make("grpo", kl=None, aggregation="token_mean")
        optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
        trainer = learner.Learner(net, optimizer, method, minibatches, leave_out)
        result = trainer.step(batch)
        assert result.tokens == len(batch.target)
        nets.append((net, result))
    for (name, left_out), whole in zip(nets[0][0].named_parameters(), nets[1][0].parameters(), strict=True):
        torch.testing.assert_close(left_out, whole, rtol=1e-5, atol=1e-6, msg=name)
    for _, result in nets:
        assert result.row()["grad_rows"] == pytest.approx(7 / 15)


def test_a_step_without_gradient_updates_nothing_and_says_so():
    training = new_training()
    training.task.score = lambda text, question: 1.0
    before = {name: value.clone() for name, value in training.model.state_dict().items()}
    row = training.step()
    assert row["note"] == "no gradient: update skipped" and row["updates"] == 0
    assert row["loss"] is None and row["grad_rows"] == 0.0
    assert "no gradient" in report.step_line(row)
    after = training.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_the_policy_learns():
    training = new_training(dataclasses.replace(SETTINGS, prompts=8, group_size=8))
    rewards = [training.step()["reward"] for _ in range(9)]
    assert sum(rewards[-3:]) / 3 > rewards[0] + 0.2


# --- stopping and resuming --------------------------------------------------------------------


def test_resumed_equals_uninterrupted(tmp_path):
    whole = new_folder(tmp_path / "whole")
    assert train_grpo.train(new_training(), whole)

    parts = new_folder(tmp_path / "parts")
    half = dataclasses.replace(SETTINGS, steps=2, save_every=2)
    assert train_grpo.train(new_training(half), parts)
    parts.append({"step": 2, "reward": 9.0})  # written after the checkpoint by an interrupted run

    torch.manual_seed(99)
    options = train_grpo.parse(["--resume", str(parts.path), "--steps", "4"])
    settings, folder, checkpoint = train_grpo.open_run(options)
    assert settings == dataclasses.replace(half, steps=4)
    training = new_training(settings)
    train_grpo.resume(training, folder, checkpoint)
    assert train_grpo.train(training, folder)
    assert figures(folder) == figures(whole)


def test_ctrl_c_finishes_the_step_and_saves(tmp_path, capsys):
    whole = new_folder(tmp_path / "whole")
    assert train_grpo.train(new_training(), whole)

    def interrupt(start: int) -> None:
        if start == SETTINGS.prompts:
            os.kill(os.getpid(), signal.SIGINT)

    folder = new_folder(tmp_path / "stopped")
    handler = signal.getsignal(signal.SIGINT)
    assert not train_grpo.train(new_training(digits=DigitTask(interrupt)), folder)
    assert signal.getsignal(signal.SIGINT) is handler
    assert "Stopping after this step" in capsys.readouterr().out
    assert figures(folder) == figures(whole)[:2]

    training = new_training()
    train_grpo.resume(training, folder, folder.load())
    assert train_grpo.train(training, folder)
    assert figures(folder) == figures(whole)


def test_ctrl_c_in_the_last_step_is_a_complete_run(tmp_path):
    digits = DigitTask(lambda start: os.kill(os.getpid(), signal.SIGINT))
    settings = dataclasses.replace(SETTINGS, steps=1)
    assert train_grpo.train(new_training(settings, digits), new_folder(tmp_path / "run"))


def test_a_second_ctrl_c_interrupts_at_once():
    with pytest.raises(KeyboardInterrupt), run_folder.StopRequest():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_folder.write_atomically(path, fail)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- the command line -------------------------------------------------------------------------


def test_refusals(tmp_path, monkeypatch):
    def refusal(*argv: str) -> str:
        with pytest.raises(SystemExit) as caught:
            train_grpo.open_run(train_grpo.parse(list(argv)))
        return str(caught.value)

    known = refusal("--algorithm", "sarsa")
    assert "'sarsa'" in known and all(name in known for name in algorithms.OPTIONS)
    assert "auto, cuda, triton, cpu, reference; got 'gpu'" in refusal("--backend", "gpu")
    assert "--group-size must be at least 2; got 1" in refusal("--group-size", "1")
    assert "no checkpoint.pt" in refusal("--resume", str(tmp_path))

    folder = new_folder(tmp_path / "run")
    folder.save(new_training().state())
    assert f"--resume {folder.path}" in refusal("--out", str(folder.path))
    assert "--lr 0.01" in refusal("--resume", str(folder.path), "--lr", "0.5")
    assert "Leave out --out" in refusal("--resume", str(folder.path), "--out", str(tmp_path))

    monkeypatch.setitem(model.NEEDED, "no_such_module", "no-such-package")
    with pytest.raises(SystemExit, match=r"no-such-package.*make demo"):
        model.require_packages()


def test_options_have_help_and_reach_the_settings(tmp_path):
    assert set(train_grpo.HELP) == {field.name for field in dataclasses.fields(train_grpo.Settings)}
    argv = "--steps 3 --prompts 2 --group-size 3 --max-new-tokens 5 --minibatches 1"
    argv += f" --algorithm dapo --lr 0.1 --seed 7 --backend reference --out {tmp_path / 'run'}"
    settings, folder, checkpoint = train_grpo.open_run(train_grpo.parse(argv.split()))
    assert settings == train_grpo.Settings(3, 2, 3, 5, 1, "dapo", 0.1, 7, "reference", 0)
    assert folder.path == tmp_path / "run" and checkpoint is None


def test_the_chosen_backend_is_used(monkeypatch, tmp_path):
    from tokfuse.runtime.core import dispatch

    seen = set()
    digits = DigitTask(lambda start: seen.add(dispatch.forced_backend()))
    settings = dataclasses.replace(SETTINGS, backend="reference", steps=1)
    train_grpo.train(new_training(settings, digits), new_folder(tmp_path / "run"))
    assert seen == {"reference"}


# --- conversion cache and report --------------------------------------------------------------


def test_an_interrupted_conversion_is_not_believed(tmp_path):
    folder = tmp_path / "model"

    def fail(partial: Path) -> None:
        (partial / "weights").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.convert_once(folder, fail)
    assert list(tmp_path.iterdir()) == []

    def write(partial: Path) -> None:
        (partial / "weights").write_text("whole")

    def lose_the_race(partial: Path) -> None:
        model.convert_once(folder, write)
        (partial / "weights").write_text("second")

    model.convert_once(folder, lose_the_race)
    assert (folder / "weights").read_text() == "whole" and list(tmp_path.iterdir()) == [folder]


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert model.default_cache() == Path("/somewhere/tokfuse")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert model.default_cache() == Path.home() / ".cache" / "tokfuse"


def test_backend_table_compares_the_same_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "BACKENDS", ("reference", "reference"))
    training = new_training()
    while not training.batches:
        training.step()
    path = tmp_path / "backends.jsonl"
    text = report.write_backends(training.batches, training.model.lm_head.weight, training.algorithm.spec({}), path)
    assert "Largest difference between the two losses: 0.0e+00" in text
    assert len(path.read_text().splitlines()) == len(training.batches)


def test_saved_batches_are_the_largest():
    batches = [{"target": torch.zeros(n)} for n in (3, 9, 1, 7, 5)]
    assert [len(b["target"]) for b in train_grpo.largest(batches)] == [9, 7, 5]


def test_summary_of_several_runs(tmp_path, capsys):
    for name, last in (("a", 0.9), ("b", 0.7)):
        folder = new_folder(tmp_path / name)
        for step in range(10):
            reward = 0.3 if step < 3 else (last if step >= 8 else 0.5)
            folder.append({"step": step, "reward": reward, "entropy": 1.0, "step_s": 6.0})
    assert summarize_runs.main([str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    out = capsys.readouterr().out
    assert f"{tmp_path / 'a'}\t10\t1.0\t0.300\t0.900\t+0.600" in out
    assert "smallest gain +0.400, mean gain +0.500" in out
    with pytest.raises(SystemExit, match="no rows in"):
        summarize_runs.main([str(tmp_path / "c")])


def test_comparison_of_methods(tmp_path, capsys):
    for name, last, tokens in (("grpo-1", 0.9, 100), ("grpo-2", 0.7, 300), ("nft-1", 0.5, 100)):
        folder = new_folder(tmp_path / name)
        for step in range(10):
            folder.append(
                {
                    "step": step,
                    "reward": last if step >= 8 else 0.5,
                    "entropy": 0.2,
                    "step_s": 1.0,
                    "grad_rows": 0.5 if tokens == 100 else 0.1,
                    "tokens": tokens,
                    "loss_ms": 40.0,
                }
            )
    plot = tmp_path / "curves.png"
    runs = [str(tmp_path / name) for name in ("grpo-1", "grpo-2", "nft-1")]
    assert summarize_runs.main([*runs, "--compare", "--plot", str(plot)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[2] == ("| grpo | 2 | 0.560 (0.540 to 0.580) | 0.800 (0.700 to 0.900) | 0.20 | 20% | 40 |")
    assert out[3].startswith("| nft | 1 | 0.500 (0.500 to 0.500)") and len(out) == 4
    rows = {name: run_folder.RunFolder(tmp_path / name).rows() for name in ("grpo-1", "grpo-2")}
    assert summarize_runs.means(rows)["grpo"][9]["reward"] == pytest.approx(0.8)
    assert plot.stat().st_size > 5000


def test_curves(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    rows = [{"step": i, "reward": 0.5, "entropy": 1.0} for i in range(4)]
    report.plot_runs({"a": rows, "b": rows}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_real_model_end_to_end(tmp_path, capsys):
    missing = [n for module, n in model.NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    out = tmp_path / "run"
    argv = ["--steps", "2", "--prompts", "4", "--cache", str(tmp_path / "cache"), "--out", str(out)]
    assert train_grpo.main(argv) == 0
    assert "Mean reward of the first three steps" in capsys.readouterr().out
    assert {p.name for p in out.iterdir()} == {"metrics.jsonl", "backends.jsonl", "curves.png"}
