"""Thought Branches with a real model: how much does each line of its own chain matter for the answer?

SmolLM2 solves a sum line by line. For every line of its chain, many continuations are sampled with and without the
line. The importance of a line is the divergence between the two distributions of the outcome (right or wrong), over
continuations that wrote a different line. Its resilience is the number of times that the line must be removed until its
content does not come back.

    python examples/branch_thoughts.py         # a few minutes on two cores
    python examples/branch_thoughts.py --steps 12 --seed 1

The example shows estimator and loop of the released code on chains that the model wrote. The paper's chains are long;
here a line is a sum, and two lines have the same content if they consist of the same tokens.
"""

import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
from grpo_demo.chains import Sum, Writer, main, sums

from tokfuse import algorithms


@dataclass(frozen=True)
class Settings:
    """Settings of a run."""

    terms: int = 3
    rollouts: int = 16  # continuations per prefix
    similar: float = 0.99  # cosine of two lines with the same content
    removals: int = 5


@dataclass(frozen=True)
class Line:
    """A line of a chain and what was measured about it."""

    text: str
    rate_without: float
    rate_with: float
    importance: float
    removals: int
    abandoned: bool


def cosine(first: str, second: str) -> float:
    """Return the cosine of the word counts of two lines."""
    a, b = Counter(first.split()), Counter(second.split())
    norm = math.sqrt(sum(n * n for n in a.values()) * sum(n * n for n in b.values()))
    return sum(a[word] * b[word] for word in a) / norm if norm else 0.0


def examine(writer: Writer, question: Sum, chain: Sequence[str], settings: Settings) -> list[Line]:
    """Return every line of a chain with its importance and resilience."""
    method = algorithms.make("thought_branches", similar=settings.similar, max_interventions=settings.removals)
    # Continuations of every prefix. Those that keep line i are the ones resampled at i + 1.
    rollouts = [writer.branches(question, chain[:i], settings.rollouts) for i in range(len(chain) + 1)]
    right = [
        torch.tensor([question.right("\n".join([*chain[:i], *rest])) for rest in some])
        for i, some in enumerate(rollouts)
    ]

    def resample(prefix: list[str]) -> list[str]:
        return writer.branches(question, prefix, 1)[0]

    def similarity(line: str, candidates: Sequence[str]) -> list[float]:
        return [cosine(line, other) for other in candidates]

    out = []
    for i, line in enumerate(chain):
        first = torch.tensor([cosine(line, rest[0]) if rest else 0.0 for rest in rollouts[i]])
        resilience = method.resilience(chain, i, resample, similarity)
        out.append(
            Line(
                line,
                float(right[i].double().mean()),
                float(right[i + 1].double().mean()),
                method.importance(first, right[i], right[i + 1]),
                resilience.interventions,
                resilience.abandoned,
            )
        )
    return out


def run(writer: Writer, steps: int, seed: int, settings: Settings | None = None) -> None:
    """Examine one chain of the model per step, and print its lines."""
    settings = settings or Settings()
    counted: dict[bool, list[float]] = {True: [], False: []}
    print("line                  right without -> with  importance  removals until it stays away")
    for question in sums(seed, 0, steps, settings.terms):
        chain = writer.branches(question, [], 1)[0]
        print(f"{question.text} = {question.answer}", flush=True)
        for line in examine(writer, question, chain, settings):
            stays = f"{line.removals}" if line.abandoned else f"more than {line.removals}"
            print(
                f"  {line.text:20}{line.rate_without:13.2f} -> {line.rate_with:.2f}  {line.importance:10.2f}  {stays}",
                flush=True,
            )
            counted[line.text in question.steps].append(line.rate_with - line.rate_without)
    for correct, changes in counted.items():
        if changes:
            kind = "lines of the correct chain" if correct else "other lines"
            print(f"{kind}: {len(changes)}, mean change of the rate {sum(changes) / len(changes):+.2f}")


if __name__ == "__main__":
    sys.exit(main(run, steps=6))
