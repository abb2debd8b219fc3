"""The task: one-digit sums from reasoning-gym's `chain_sum`. Only the correct answer gets a reward."""

from dataclasses import dataclass
from typing import Any

SHOTS = 2  # solved sums in front of each question


@dataclass(frozen=True)
class Question:
    """A prompt, and the data needed to score its completions."""

    prompt: str
    entry: dict[str, Any]


class ChainSum:
    """An endless, deterministic stream of sums. Question `i` of a seed is always the same."""

    def __init__(self, seed: int) -> None:
        import reasoning_gym

        self.dataset = reasoning_gym.create_dataset(
            "chain_sum",
            min_terms=2,
            max_terms=2,
            min_digits=1,
            max_digits=1,
            # Entry i is drawn from seed + i. Without the factor, neighbouring seeds would share almost all entries.
            seed=seed * 10_000_000,
            size=10_000_000,
        )

    def questions(self, start: int, count: int) -> list[Question]:
        """Return the questions `start` to `start + count - 1`."""
        return [self._question(index) for index in range(start, start + count)]

    def _question(self, index: int) -> Question:
        """Build a prompt such as `4 + 3 = 7`, `9 - 2 = 7`, `5 + 8 =` from three entries, the last one unsolved."""
        *solved, entry = (self.dataset[index * (SHOTS + 1) + i] for i in range(SHOTS + 1))
        lines = [f"{e['metadata']['expression']} = {e['answer']}" for e in solved]
        return Question("\n".join([*lines, f"{entry['metadata']['expression']} ="]), entry)

    def score(self, text: str, question: Question) -> float:
        """Return 1.0 if the first line is the correct number, else 0.0.

        The data set gives partial credit for "12" instead of "2"; here such an answer gets 0.
        """
        answer = text.split("\n")[0].strip()
        return float(self.dataset.score_answer(answer, question.entry) == 1.0)


def kept_length(pieces: list[str]) -> int:
    """Return how many tokens of a completion count: all up to and including the first one with a newline."""
    for index, piece in enumerate(pieces):
        if "\n" in piece:
            return index + 1
    return len(pieces)
