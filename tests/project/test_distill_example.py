"""Test `examples/distill.py` on a random model of a few thousand parameters: the student, the losses, the files."""

import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))

pytest.importorskip("transformers", reason="transformers is not installed")

import distill
from grpo_demo.rollout import completion_hidden
from grpo_demo.task import Question
from tiny_llama import tiny_llama

ALPHABET = "0123456789+= \n"


class Letters:
    """One token per character."""

    def encode(self, text: str) -> list[int]:
        return [ALPHABET.index(letter) for letter in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(ALPHABET[token] for token in tokens)


class Digits:
    """The correct answer starts with a digit."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def questions(self, start: int, count: int) -> list[Question]:
        return [Question(f"{(self.seed + i) % 10}+{i}=", {}) for i in range(start, start + count)]

    def score(self, text: str, question: Question) -> float:
        return float(text[0].isdigit())


def lesson_of(**settings: int | float) -> distill.Lesson:
    sizes = {"prompts": 4, "answers": 3, "new_tokens": 3, "blocks": 1, "held_out": 20}
    small = sizes | {"steps": 2, "every": 1, "lr": 3e-3}
    teacher = tiny_llama(len(ALPHABET))
    with torch.no_grad():
        for matrix in (p for p in teacher.parameters() if p.dim() == 2):
            matrix.mul_(12.0)  # a teacher with an opinion, of which each block forms a part
    return distill.Lesson(teacher.requires_grad_(False), Letters(), Digits, distill.Settings(**{**small, **settings}))


def test_a_student_with_all_blocks_is_the_teacher():
    """Its KL losses are 0, and its likelihood loss is the cross-entropy of the sampled tokens."""
    lesson = lesson_of()
    student = distill.make_student(lesson.teacher, 2)
    rollout = lesson.answers(lesson.teacher, 1, 0)
    assert rollout.texts == lesson.answers(lesson.teacher, 1, 0).texts != lesson.answers(lesson.teacher, 1, 1).texts
    for name in ("reverse_kl", "forward_kl"):
        assert abs(float(lesson.loss(student, name, rollout).detach())) < 1e-6
    logp = (completion_hidden(student, rollout) @ student.lm_head.weight.t()).log_softmax(1)
    nll = -logp[torch.arange(len(logp)), rollout.target].mean()
    assert float(lesson.loss(student, "sft", rollout).detach()) == pytest.approx(float(nll.detach()), rel=1e-5)


def test_a_student_trains_its_own_blocks_only():
    lesson = lesson_of()
    before = [p.clone() for p in lesson.teacher.parameters()]
    student = distill.make_student(lesson.teacher, 1)
    assert len(student.model.layers) == 1 and len(lesson.teacher.model.layers) == 2
    lesson.loss(student, "forward_kl", lesson.answers(lesson.teacher, 1, 0)).backward()
    assert all(p.grad is not None for p in student.model.layers.parameters()) and student.lm_head.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(before, lesson.teacher.parameters(), strict=True))


@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl"])
def test_a_student_gets_closer_to_the_teacher(name: str, monkeypatch):
    lesson = lesson_of(steps=16, every=16, prompts=8)
    rollout, student = lesson.answers(lesson.teacher, 5, 0), distill.make_student(lesson.teacher, 1)
    first = lesson.loss(student, name, rollout).item()
    monkeypatch.setattr(distill, "make_student", lambda *_: student)
    assert [row["step"] for row in lesson.train(name, 1)] == [0, 16]
    last = lesson.loss(student, name, rollout).item()
    assert 0.0 < last < 0.8 * first, (first, last)


def test_a_run_writes_rows_and_curves(tmp_path: Path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    distill.run(lesson_of(), [1, 2], tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "rows.jsonl").read_text().splitlines()]
    found = [(row["seed"], row["method"], row["step"]) for row in rows]
    assert found == [(seed, name, step) for seed in (1, 2) for name in distill.METHODS for step in (0, 1, 2)]
    at_start = {row["accuracy"] for row in rows if row["step"] == 0 and row["seed"] == 1}
    assert len(at_start) == 1 and len({row["teacher"] for row in rows}) == 1
    assert (tmp_path / "run" / "curves.png").stat().st_size > 5000
