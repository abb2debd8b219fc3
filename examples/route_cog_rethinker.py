"""Cog-Rethinker's driver loop: answer, and if every rollout fails, decompose, then reflect; learn from all stages.

Each question starts at the stage "direct". If no rollout is right, the next stage asks again with another template:
"decompose" shows solved cases, line by line, that a buffer returns for the question; "reflect" shows the wrong answer.
Right responses of the later stages fill the buffers. The loss is DAPO on the direct rollouts plus `sft_weight` times
the likelihood of the right responses of later stages, after the *direct* template.

    python examples/route_cog_rethinker.py     # a few minutes on two cores
    python examples/route_cog_rethinker.py --steps 12 --seed 1

The example shows how many questions each stage solves that the stages before could not, and what reaches the policy.
The paper's templates and sft_weight are not public.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Responses, Sum, Writer, decompose, direct, main, optimizer_of, refine, sums

import tokfuse
from tokfuse import algorithms
from tokfuse.algorithms import Batch, Plan, train_step

STOP = {"direct": "\n", "decompose": "\n\n", "reflect": "\n"}
NEW = {"direct": 5, "decompose": 24, "reflect": 5}


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    questions: int = 8  # per step
    rollouts: int = 4  # per question and stage
    terms: int = 3
    sft_weight: float = 0.5
    lr: float = 5e-6


class Driver:
    """The stages, the buffers and the policy."""

    def __init__(self, writer: Writer, settings: Settings) -> None:
        self.writer, self.settings = writer, settings
        self.router = algorithms.make("cog_rethinker", sft_weight=settings.sft_weight, demonstrations=2)
        self.state = self.router.initial_state()
        self.dapo = algorithms.make("dapo", overlong=None)
        self.optimizer = optimizer_of(writer.model, settings.lr)

    def prompt(self, stage: str, question: Sum, wrong: str) -> str:
        """Return the template of a stage, filled in."""
        if stage == "decompose":
            return decompose(question, shots=self.router.retrieve(self.state, stage, question.text))
        return refine(question, wrong) if stage == "reflect" else direct(question)

    def ask(self, stage: str, question: Sum, wrong: str) -> tuple[Responses, list[str], list[bool]]:
        """Return the rollouts of a stage for a question: tokens, texts and whether they are right."""
        prompts = [self.prompt(stage, question, wrong)] * self.settings.rollouts
        responses = self.writer.sample(prompts, NEW[stage], STOP[stage])
        texts = self.writer.texts(responses)
        return responses, texts, [question.right(text.split("\n\n")[0]) for text in texts]

    def drive(self, question: Sum) -> tuple[Responses, list[bool], list[str], str | None]:
        """Take a question through the stages.

        Returns: the direct rollouts, whether each is right, the right responses of later stages, and the stage that
        solved the question (None: no stage).
        """
        first, accuracies, wrong = None, [], ""
        while (stage := self.router.route(accuracies)) is not None:
            responses, texts, right = self.ask(stage, question, wrong)
            first = first or (responses, right)
            accuracies.append(sum(right) / len(right))
            if stage == "direct":
                wrong = texts[0]
            solved, last = [text for text, ok in zip(texts, right, strict=True) if ok], stage
        assert first is not None
        if not solved or last == "direct":
            return *first, [], last if solved else None
        for text in solved:
            self.state = self.router.push(self.state, last, question.text, text.strip())
        return *first, solved, last

    def step(self, questions: list[Sum]) -> dict[str, int | float]:
        """Drive all questions and take one optimizer step. Return how many each stage solved."""
        driven = [self.drive(question) for question in questions]
        stages = [stage for *_, stage in driven]
        tokens = Responses([p for r, *_ in driven for p in r.prompts], [t for r, *_ in driven for t in r.tokens])
        reward = torch.tensor([ok for _, right, *_ in driven for ok in right]).float()
        with torch.no_grad():
            old = self.writer.stats(tokens).logp
        group_ids = torch.arange(len(reward)) // self.settings.rollouts
        batch = Batch(reward=reward, group_ids=group_ids, cu_seqlens=tokens.cu_seqlens, old_logp=old)
        cases = [case for *_, case, _ in driven]
        imitated: list[float] = []

        def imitate(plan: Plan, inputs: Mapping[str, Any], step: tokfuse.PolicyStep) -> None:
            loss = self.imitation(questions, cases)
            if loss is not None:
                loss.backward()  # adds to the gradient of the same optimizer step
                imitated.append(loss.item())

        done = train_step(self.dapo, {}, batch, self.writer.reader(tokens), self.optimizer, on_step=imitate)
        counts = {name: stages.count(name) for name in STOP}
        return {
            "reward": float(reward.mean()),
            **counts,
            "unsolved": stages.count(None),
            "loss": sum(done.losses + imitated),
        }

    def imitation(self, questions: list[Sum], solved: list[list[str]]) -> torch.Tensor | None:
        """Return sft_weight times the loss of the solved cases, after the direct template. None without a case."""
        cases = [(direct(q), text) for q, texts in zip(questions, solved, strict=True) for text in texts]
        if not cases:
            return None
        responses = self.writer.encode(*zip(*cases, strict=True))
        weight = self.router.sft_weights(responses.cu_seqlens, torch.ones(len(cases), dtype=torch.bool))
        return -(weight * self.writer.stats(responses).logp).sum()


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print one row per step."""
    s = settings or Settings()
    driver = Driver(writer, s)
    print("step  reward  solved by direct  decompose  reflect  by none  loss")
    form = "{:4}  {reward:6.3f}  {direct:16}  {decompose:9}  {reflect:7}  {unsolved:7}  {loss:.3f}"
    for i in range(steps):
        row = driver.step(sums(seed, i * s.questions, s.questions, s.terms))
        print(form.format(i, **row), flush=True)
    print("buffers: " + ", ".join(f"{len(cases)} of {stage}" for stage, cases in driver.state.items()))


if __name__ == "__main__":
    sys.exit(main(run, steps=6))
