"""Cog-Rethinker: prompts that nothing solves are decomposed, then reflected on; BM25 buffers."""

import collections
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import State, Stateful
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse

STAGES = ("direct", "decompose", "reflect")


def bm25(query: str, documents: Sequence[str], *, k1: float = 1.5, b: float = 0.75) -> torch.Tensor:
    """Okapi BM25 of a query against each document; words are runs of letters and digits.

    sum over the query's words w of log(1 + (n - n_w + 0.5) / (n_w + 0.5)) f (k1 + 1) /
    (f + k1 (1 - b + b length / mean length)), f the count of w in the document, n_w the number of
    documents with w.

    Returns:
        (documents,) float64, >= 0.
    """
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
    return torch.tensor(scores, dtype=torch.float64)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text.lower())


@register(
    "cog_rethinker",
    kind="selection",
    system="Cog-Rethinker",
    label="recon",
    source="arXiv 2510.15979; abstract and four reviews",
    summary="direct, then decompose, then reflect where every rollout fails; buffers; DAPO + SFT",
    required=("sft_weight",),
    differs=(
        "Assumed: SFT per response, divided by its length, under the direct template; BM25 with "
        "its usual constants; the oldest demonstration leaves a full buffer. lambda has no "
        "published value and is required."
    ),
)
@dataclass(frozen=True, kw_only=True)
class CogRethinker(Stateful):
    """L = L_DAPO + lambda L_SFT, L_SFT = -mean over correct stage-2/3 responses of (1/|o|) sum
    log pi(o_t | direct prompt, o_<t). A stage follows only where no rollout was right.

    Args:
        sft_weight: lambda.
        demonstrations: how many a retrieval returns.
        capacity: of each buffer.

    State: the buffers, (question, solution) pairs of "decompose" and "reflect". The DAPO part is
    `make("dapo")`, which masks groups that are all right or all wrong. Reconstructed.
    """

    sft_weight: float = 0.0
    demonstrations: int = 1
    capacity: int = 512

    def __post_init__(self) -> None:
        check_number(self._op, "sft_weight", self.sft_weight, 0.0)
        check_number(self._op, "demonstrations", self.demonstrations, 1)
        check_number(self._op, "capacity", self.capacity, 1)

    def initial_state(self) -> State:
        """Empty buffers."""
        return {"decompose": [], "reflect": []}

    def route(self, accuracies: Sequence[float]) -> str | None:
        """The next stage of a prompt, from the accuracies of the stages that it has been through.

        "direct" for a new prompt; None where some rollout was right, and after the last stage.
        """
        if len(accuracies) > len(STAGES):
            raise refuse(
                self._op,
                "accuracies",
                f"of at most {len(STAGES)} stages",
                len(accuracies),
                "Start over for a new rollout.",
            )
        for accuracy in accuracies:
            check_number(self._op, "accuracies", float(accuracy), 0.0, 1.0)
        if any(accuracy > 0 for accuracy in accuracies) or len(accuracies) == len(STAGES):
            return None
        return STAGES[len(accuracies)]

    def push(self, state: State, stage: str, question: str, solution: str) -> State:
        """The state with a solved case in the buffer of its stage."""
        check_choice(self._op, "stage", stage, STAGES[1:])
        return state | {stage: [*state[stage], [question, solution]][-self.capacity :]}

    def retrieve(self, state: State, stage: str, question: str) -> list[tuple[str, str]]:
        """The nearest cases of a stage by BM25, nearest first; of equal ones the oldest."""
        check_choice(self._op, "stage", stage, STAGES[1:])
        cases = state[stage]
        order = bm25(question, [case[0] for case in cases]).sort(descending=True, stable=True)
        return [(cases[i][0], cases[i][1]) for i in order.indices[: self.demonstrations].tolist()]

    def sft_weights(self, cu_seqlens: torch.Tensor, solved: torch.Tensor) -> torch.Tensor:
        """(tokens,) float32: w with L_SFT lambda = -sum w logp.

        Args:
            cu_seqlens: (seqs + 1,), int32, responses re-prompted with the direct template.
            solved: (seqs,), bool: correct, and of stage 2 or 3. Without one all weights are 0.
        """
        lengths = cu_seqlens.diff().long()
        each = self.sft_weight * solved.double() / (lengths.clamp_min(1) * solved.sum().clamp_min(1))
        return each.repeat_interleave(lengths).float()
