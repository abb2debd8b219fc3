"""ARIES' driver loop: refine wrong answers in chains, learn from the best and worst of each round, refine better.

A round asks SmolLM2 for several direct answers. A wrong one is shown again in a refinement prompt, whose answer may be
refined in turn. Pairs of level 0 are right and wrong direct answers to a question; pairs of level 1 are right and wrong
refinements of one rejected answer. One loss trains both: DPO of level 0 plus `refine_weight` times DPO of level 1.

    python examples/refine_aries.py            # a few minutes on two cores
    python examples/refine_aries.py --steps 12 --seed 1

The example shows the accuracy of each turn of the chains, before and after training. The paper's conditioning and
weight could not be confirmed, so the method is a substitute.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from grpo_demo.chains import Sum, Writer, direct, main, optimizer_of, refine, sums, train_pairs

from tokfuse import algorithms


@dataclass(frozen=True)
class Settings:
    """Settings of a run. The weight of the refinements has no published value."""

    questions: int = 8  # per round
    answers: int = 6  # per prompt
    turns: int = 2  # refinements after the direct answer
    new_tokens: int = 4
    terms: int = 2
    refine_weight: float = 1.0
    lr: float = 5e-6


@dataclass(frozen=True)
class Turn:
    """Answers to one prompt."""

    question: Sum
    prompt: str
    level: int  # 0: direct, 1: refinement
    answers: list[str]

    @property
    def right(self) -> list[bool]:
        return [self.question.right(text) for text in self.answers]

    def pick(self, right: bool) -> str | None:
        """Return the first answer that is right, or wrong. None if there is none."""
        return next((text for text, ok in zip(self.answers, self.right, strict=True) if ok == right), None)


def answer(writer: Writer, asked: list[tuple[Sum, str]], level: int, settings: Settings) -> list[Turn]:
    """Return one turn for each (question, prompt)."""
    prompts = [prompt for _, prompt in asked for _ in range(settings.answers)]
    texts = writer.texts(writer.sample(prompts, settings.new_tokens)) if prompts else []
    size = settings.answers
    return [
        Turn(question, prompt, level, texts[i * size : (i + 1) * size]) for i, (question, prompt) in enumerate(asked)
    ]


def refine_chains(writer: Writer, questions: list[Sum], settings: Settings) -> list[list[Turn]]:
    """Return the turns of a round: direct answers, then refinements of a wrong answer of the turn before."""
    turns = [answer(writer, [(q, direct(q)) for q in questions], 0, settings)]
    for _ in range(settings.turns):
        wrong = [(turn.question, turn.pick(right=False)) for turn in turns[-1]]
        turns.append(answer(writer, [(q, refine(q, text)) for q, text in wrong if text is not None], 1, settings))
    return turns


def pairs_of(turns: list[list[Turn]]) -> tuple[list[tuple[str, str, str]], list[int]]:
    """Return (prompt, right answer, wrong answer) of every prompt that has both, and their levels."""
    pairs, levels = [], []
    for turn in (turn for some in turns for turn in some):
        best, worst = turn.pick(right=True), turn.pick(right=False)
        if best is not None and worst is not None:
            pairs.append((turn.prompt, best, worst))
            levels.append(turn.level)
    return pairs, levels


def accuracies(turns: list[list[Turn]]) -> list[float]:
    """Return the share of right answers of every turn; NaN if nothing had to be refined."""
    marks = [[ok for turn in some for ok in turn.right] for some in turns]
    return [sum(some) / len(some) if some else float("nan") for some in marks]


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Print one row per round, and the mean accuracy of each turn at both ends."""
    s = settings or Settings()
    loss = algorithms.make("aries", level_weight=(1.0, s.refine_weight))
    optimizer, history = optimizer_of(writer.model, s.lr), []
    print("round  direct  refined  refined again ...  pairs direct / refined  loss")
    for i in range(steps):
        turns = refine_chains(writer, sums(seed, i * s.questions, s.questions, s.terms), s)
        pairs, levels = pairs_of(turns)
        value = float("nan")
        if pairs:
            value = train_pairs(writer, loss, optimizer, pairs, levels).loss.item()
        history.append(accuracies(turns))
        shares = "  ".join(f"{share:.3f}" for share in history[-1])
        print(f"{i:5}  {shares}  {levels.count(0)} / {levels.count(1)}  {value:.3f}", flush=True)
    tail = max(1, steps // 3)
    for name, rows in (("first", history[:tail]), ("last", history[-tail:])):
        means = [sum(column) / len(column) for column in zip(*rows, strict=True)]
        print(f"{name} rounds: " + ", ".join(f"turn {i} {mean:.3f}" for i, mean in enumerate(means)))


if __name__ == "__main__":
    sys.exit(main(run, steps=6))
