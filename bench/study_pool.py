"""The samples of the data selection studies: sums, other tasks, and sums with wrong answers."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

IRRELEVANT = ("spell_backward", "letter_counting")


class Sample(NamedTuple):
    """One sequence. Its loss is -advantage * mean log-prob of the tokens after the prompt."""

    ids: torch.Tensor
    prompt: int
    advantage: float
    group: int


class Pool(NamedTuple):
    """Samples of one seed; `Sample.group` is the kind."""

    train: list[Sample]
    validation: list[Sample]
    held_out: list[Sample]


def sums(count: int, seed: int, taken: set[str]) -> Iterator[tuple[str, str]]:
    """Return (prompt, answer) of sums with one solved example. No question is in `taken`, which stays unchanged."""
    import reasoning_gym

    entries = reasoning_gym.create_dataset(
        "chain_sum", min_terms=2, max_terms=2, min_digits=1, max_digits=1, seed=seed, size=10**7
    )
    found = index = 0
    while found < count:
        solved, entry = entries[index], entries[index + 1]
        index += 2
        question = entry["metadata"]["expression"]
        if question not in taken:
            found += 1
            line = f"{solved['metadata']['expression']} = {solved['answer']}"
            yield f"{line}\n{question} =", entry["answer"]


def build_pool(tokenizer: Any, seed: int, *, per_kind: int, validation: int, held_out: int) -> Pool:
    """Return the pool, a validation set, and held-out sums whose questions occur in neither of them."""
    import reasoning_gym

    def sample(prompt: str, answer: str, kind: int) -> Sample:
        before = tokenizer(prompt)["input_ids"]
        whole = tokenizer(f"{prompt} {answer}\n")["input_ids"]
        assert whole[: len(before)] == before, prompt
        return Sample(torch.tensor(whole), len(before), 1.0, kind)

    base = seed * 10**7
    tested = list(sums(held_out, base + 1, set()))
    taken = {prompt.split("\n")[1].removesuffix(" =") for prompt, _ in tested}
    # There are few one-digit sums. Up to half of all questions are held out, and none of these is trained on.
    right = list(sums(per_kind + validation, base + 2_000_001, taken))
    wrong = list(sums(per_kind, base + 4_000_001, taken))
    generator = torch.Generator().manual_seed(seed)
    shift = (1 + torch.randint(8, (per_kind,), generator=generator)).tolist()
    pool = [sample(q, a, 0) for q, a in right[:per_kind]]
    for i in range(per_kind):
        entries = reasoning_gym.create_dataset(IRRELEVANT[i % 2], seed=base + i, size=1)
        pool.append(sample(entries[0]["question"].strip(), entries[0]["answer"], 1))
    pool += [sample(q, str(int(a) + d), 2) for (q, a), d in zip(wrong, shift, strict=True)]
    return Pool(pool, [sample(q, a, 0) for q, a in right[per_kind:]], [sample(q, a, 0) for q, a in tested])
