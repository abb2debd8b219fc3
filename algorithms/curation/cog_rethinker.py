"""Cog-Rethinker: decomposes, then reflects on, prompts that no rollout solves; BM25 retrieval of solved cases."""

import collections
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    check_choice,
    check_cu_seqlens,
    check_integer,
    check_number,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse

STAGES = ("direct", "decompose", "reflect")


def bm25(query: str, documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> torch.Tensor:
    """Return the Okapi BM25 score of a query for each document. Words are runs of letters and digits.

    score = sum over the query's words w of log(1 + (n - n_w + 0.5) / (n_w + 0.5)) f (k1 + 1) /
    (f + k1 (1 - b + b length / mean length)), where f is the count of w in the document, n the number of documents and
    n_w the number of documents with w.

    Args:
        query: text of the query.
        documents: texts of the documents.
        k1: saturation of the count, >= 0.
        b: strength of the length normalisation, in [0, 1].

    Returns:
        (documents,) float64, >= 0.
    """
    check_number("bm25", "k1", k1, 0.0)
    check_number("bm25", "b", b, 0.0, 1.0)
    words = [collections.Counter(_words(text)) for text in documents]
    lengths = [sum(count.values()) for count in words]
    mean = sum(lengths) / max(1, len(lengths)) or 1.0
    scores = [0.0] * len(words)
    for word in _words(query):
        holding = sum(word in count for count in words)
        rarity = math.log1p((len(words) - holding + 0.5) / (holding + 0.5))
        for i, count in enumerate(words):
            f = count[word]
            scores[i] += rarity * f * (k1 + 1) / (f + k1 * (1 - b + b * lengths[i] / mean))
    return torch.tensor(scores, dtype=torch.float64, device="cpu")


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@register(
    "cog_rethinker",
    kind="selection",
    system="Cog-Rethinker",
    label="recon",
    source="arXiv 2510.15979; abstract and four reviews",
    summary="direct, then decompose, then reflect if every rollout fails; buffers; DAPO + SFT",
    required=("sft_weight",),
    differs=(
        "Assumed: SFT per response, divided by its length, with the direct template; BM25 with its "
        "usual constants; a full buffer drops its oldest demonstration. lambda has no published "
        "value and must be given."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CogRethinker(Stateful):
    """L = L_DAPO + lambda L_SFT. Reconstructed.

    L_SFT = -mean over correct responses of stages 2 and 3 of (1/|o|) sum log pi(o_t | direct prompt, o_<t). The next
    stage is used only if no rollout was correct. L_DAPO is `make("dapo")`, which masks groups whose responses are all
    correct or all wrong.

    Args:
        sft_weight: lambda, >= 0.
        demonstrations: number of cases that a retrieval returns, >= 1.
        capacity: size of each buffer, >= 1.

    State: the buffers "decompose" and "reflect" of (question, solution) pairs.
    """

    sft_weight: float = 0.0
    demonstrations: int = 1
    capacity: int = 512

    def __post_init__(self) -> None:
        check_number(self._op, "sft_weight", self.sft_weight, 0.0)
        check_integer(self._op, "demonstrations", self.demonstrations, 1)
        check_integer(self._op, "capacity", self.capacity, 1)

    def initial_state(self) -> State:
        """Return empty buffers."""
        return {"decompose": [], "reflect": []}

    def route(self, accuracies: Sequence[float]) -> str | None:
        """Return the next stage of a prompt, from the accuracies in [0, 1] of its previous stages.

        "direct" for a new prompt. None if a rollout was correct, or after the last stage.
        """
        if len(accuracies) > len(STAGES):
            raise refuse(
                self._op,
                "accuracies",
                f"of at most {len(STAGES)} stages",
                len(accuracies),
                "Start with an empty list for a new rollout.",
            )
        for accuracy in accuracies:
            check_number(self._op, "accuracies", accuracy, 0.0, 1.0)
        if any(accuracy > 0 for accuracy in accuracies) or len(accuracies) == len(STAGES):
            return None
        return STAGES[len(accuracies)]

    def push(self, state: State, stage: str, question: str, solution: str) -> State:
        """Return the state with a solved case added to the buffer of its stage."""
        check_choice(self._op, "stage", stage, STAGES[1:])
        return state | {stage: [*state[stage], [question, solution]][-self.capacity :]}

    def retrieve(self, state: State, stage: str, question: str) -> list[tuple[str, str]]:
        """Return the most similar cases of a stage by BM25, best first. Of equal ones, the oldest is first."""
        check_choice(self._op, "stage", stage, STAGES[1:])
        cases = state[stage]
        order = bm25(question, [case[0] for case in cases]).sort(descending=True, stable=True)
        return [(cases[i][0], cases[i][1]) for i in order.indices[: self.demonstrations].tolist()]

    def sft_weights(self, cu_seqlens: torch.Tensor, solved: torch.Tensor) -> torch.Tensor:
        """Return token weights w with lambda L_SFT = -sum w logp, (tokens,) float32.

        Args:
            cu_seqlens: (seqs + 1,), int32, responses after the direct template.
            solved: (seqs,), bool, True for correct responses of stage 2 or 3. If there is none, all weights are 0.
        """
        lengths = cu_seqlens.diff().long()
        check_vector(self._op, "solved", solved, Rows(lengths.shape[0], "cu_seqlens", cu_seqlens.device), BOOL)
        check_cu_seqlens(self._op, cu_seqlens, int(lengths.sum()), cu_seqlens.device)
        each = self.sft_weight * solved.double() / (lengths.clamp_min(1) * solved.sum().clamp_min(1))
        return each.repeat_interleave(lengths).float()
