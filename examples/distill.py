"""Distil a small language model into a smaller one, on a CPU, without downloading a model.

The teacher is SmolLM2-135M, the student 24 of its 30 blocks, the task one-digit sums. Three ways to train the student:

    reverse_kl   make("opd"): the student answers, and learns KL(student || teacher) of its own answers
    forward_kl   make("gkd", beta=0, lam=0): the teacher answers, and the student learns KL(teacher || student)
    sft          the teacher answers, and the student learns the likelihood of the sampled tokens

It takes a few minutes on two cores, and writes the accuracy on held-out sums (rows.jsonl) and its curves (curves.png).
"""

import argparse
import copy
import dataclasses
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# Spinning idle OpenMP threads slow down the working thread. OpenMP reads this when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.model import default_cache, load_model, require_packages
from grpo_demo.rollout import Rollout, collect, completion_hidden
from grpo_demo.task import ChainSum

import tokfuse
from tokfuse import algorithms

METHODS = {"reverse_kl": algorithms.make("opd"), "forward_kl": algorithms.make("gkd", beta=0.0, lam=0.0), "sft": None}


@dataclasses.dataclass(frozen=True)
class Settings:
    steps: int = 16
    prompts: int = 6  # per step
    answers: int = 4  # per prompt
    new_tokens: int = 4  # per answer
    blocks: int = 24  # of the student
    lr: float = 1e-4
    every: int = 8  # steps between two evaluations
    held_out: int = 64  # prompts of an evaluation


def make_student(teacher: Any, blocks: int) -> Any:
    """Return a copy of the teacher with evenly spaced blocks, the first and the last among them. The head is frozen."""
    student = copy.deepcopy(teacher).requires_grad_(True)
    kept = torch.linspace(0, len(student.model.layers) - 1, blocks).round().int().tolist()
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept)
    for place, block in enumerate(student.model.layers):
        block.self_attn.layer_idx = place  # its place in the cache of keys and values
    student.config.num_hidden_layers = blocks
    student.lm_head.weight.requires_grad_(False)
    return student


@dataclasses.dataclass
class Lesson:
    """The teacher, and the task by seed."""

    teacher: Any
    tokenizer: Any
    task: Callable[[int], Any]
    settings: Settings

    def answers(self, model: Any, seed: int, step: int) -> Rollout:
        """Return the model's answers to the prompts of a step. Every call draws the same from the same model."""
        torch.manual_seed(seed * 1_000_003 + step)
        s, task = self.settings, self.task(seed)
        questions = task.questions(step * s.prompts, s.prompts)
        return collect(model, self.tokenizer, task, questions, s.answers, s.new_tokens)

    def accuracy(self, model: Any, seed: int) -> float:
        """Return the share of held-out sums that one sampled answer solves."""
        torch.manual_seed(seed)
        task, s = self.task(seed + 1000), self.settings  # the sums of another seed
        return collect(model, self.tokenizer, task, task.questions(0, s.held_out), 1, s.new_tokens).reward.mean().item()

    def loss(self, student: Any, name: str, rollout: Rollout) -> torch.Tensor:
        """Return the loss of the student on some answers."""
        hidden, head, method = completion_hidden(student, rollout), student.lm_head.weight, METHODS[name]
        if method is None:
            return -tokfuse.linear_token_stats(hidden, head, rollout.target).logp.mean()
        batch = algorithms.DistillationBatch(num_tokens=len(hidden), cu_seqlens=rollout.cu_seqlens)
        with torch.no_grad():
            known = completion_hidden(self.teacher, rollout)
        teacher = dict(teacher_hidden=known, teacher_weight=self.teacher.lm_head.weight)
        return tokfuse.distill_step(hidden=hidden, weight=head, **teacher, **method.objective(batch).inputs()).loss

    def train(self, name: str, seed: int) -> Iterator[dict[str, Any]]:
        """Train a student, and yield one row per evaluation."""
        s = self.settings
        student = make_student(self.teacher, s.blocks)
        optimizer = torch.optim.AdamW((p for p in student.parameters() if p.requires_grad), lr=s.lr, weight_decay=0.0)
        for step in range(s.steps + 1):
            if step % s.every == 0:
                yield {"method": name, "seed": seed, "step": step, "accuracy": self.accuracy(student, seed)}
            rollout = self.answers(student if name == "reverse_kl" else self.teacher, seed, step)
            self.loss(student, name, rollout).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Plot the mean accuracy of each method over the steps, with a dot per seed."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
    for color, name in enumerate(METHODS):
        mine = [(row["step"], row["accuracy"]) for row in rows if row["method"] == name]
        axis.plot(*zip(*mine, strict=True), f"C{color}.")
        steps = sorted({step for step, _ in mine})
        axis.plot(steps, [statistics.fmean(y for x, y in mine if x == step) for step in steps], f"C{color}", label=name)
    axis.axhline(rows[0]["teacher"], color="black", linestyle="--", label="teacher")
    axis.set(xlabel="step", ylabel="accuracy on held-out sums", ylim=(0, None))
    axis.legend()
    figure.savefig(path, dpi=120)


def run(lesson: Lesson, seeds: list[int], out: Path) -> None:
    """Train every method with every seed, and write the rows and the curves."""
    out.mkdir(parents=True, exist_ok=True)
    lesson.teacher.requires_grad_(False)
    teacher, rows = statistics.fmean(lesson.accuracy(lesson.teacher, seed) for seed in seeds), []
    with (out / "rows.jsonl").open("w") as file:
        for row in (row for seed in seeds for name in METHODS for row in lesson.train(name, seed)):
            rows.append(row | {"teacher": teacher})
            for where in (file, sys.stdout):
                print(json.dumps(rows[-1]), file=where, flush=True)
    plot(rows, out / "curves.png")


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description="Distil SmolLM2-135M into a student of fewer blocks with tokfuse.")
    parser.add_argument("--steps", type=int, default=Settings.steps)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/distill"))
    options = parser.parse_args(argv)
    require_packages()
    run(Lesson(*load_model(default_cache()), ChainSum, Settings(steps=options.steps)), options.seeds, options.out)


if __name__ == "__main__":
    main(sys.argv[1:])
