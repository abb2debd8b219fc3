"""LeaF: tokens of a prompt that mislead the student but not the teacher, and prompts without them.

    student, teacher = (embedding_sensitivity(g) for g in gradients_of_the_embeddings)
    mask = tokfuse.algorithms.make("leaf").confounders(student, teacher, keep=is_whitespace)
    prompts = [ids, *prune(ids, mask)]

The distillation on whole and pruned prompts is `make("leaf_kl")`.
"""

import math
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import BOOL, Rows, check_number, check_vector
from tokfuse.runtime.ops.influence import hidden_norms


def embedding_sensitivity(grad_embedding: torch.Tensor) -> torch.Tensor:
    """||d L / d e_i|| of every token: (tokens, hidden) -> (tokens,) float32.

    L is the mean cross-entropy of the response's labels, e_i the input embedding of token i: an
    ordinary backward to the embeddings, whose rows this op takes the norm of.
    """
    return hidden_norms(grad_embedding)


def _unit_range(x: torch.Tensor) -> torch.Tensor:
    """Min-max to [0, 1]; 0 where all are equal."""
    if x.numel() == 0:
        return x
    width = x.max() - x.min()
    return (x - x.min()) / torch.where(width == 0, 1.0, width)


@register(
    "leaf",
    kind="selection",
    system="LeaF",
    label="exact",
    source="arXiv 2506.07851; github.com/RUCBM/LeaF",
    summary="tokens to which the student is sensitive and the teacher is not, cut out by spans",
    differs=(
        "The masks are the released code's. `worth_keeping` is the paper's condition, which the "
        "released scripts leave out. The distillation loss on pruned prompts is `leaf_kl`."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LeaFMasks:
    """d = minmax(minmax(g_teacher) - minmax(g_student)); token i is a confounder where
    d_i <= min(sorted(d)[floor(q n)], cap), unless `keep` is true there.

    Args:
        q: fraction, in [0, 1); 0.05 for mathematics, 0.1 for code in the released scripts.
        cap: no token with d above it is one, in [0, 1].

    Inputs: embedding-gradient norms of both models over the analysed span (instruction, or
    instruction and earlier response), one tokenizer. State: none. Source: released code, exact.
    """

    q: float = 0.05
    cap: float = 0.5

    def __post_init__(self) -> None:
        check_number("algorithms.leaf", "q", self.q, 0.0, math.nextafter(1.0, 0.0))
        check_number("algorithms.leaf", "cap", self.cap, 0.0, 1.0)

    def confounders(
        self, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(tokens,) bool, true on confounders.

        Args:
            student, teacher: (tokens,), sensitivities of the two models to the same tokens.
            keep: (tokens,), bool, never masked: whitespace and line breaks. None: none of them.
        """
        op = "algorithms.leaf"
        n = check_vector(op, "student", student).shape[0]
        rows = Rows(n, "student", student.device)
        check_vector(op, "teacher", teacher, rows)
        if n == 0:
            return torch.zeros(0, dtype=torch.bool, device=student.device)
        gap = _unit_range(_unit_range(teacher.double()) - _unit_range(student.double()))
        threshold = gap.sort().values[math.floor(self.q * n)].clamp(max=self.cap)
        masked = gap <= threshold
        return masked if keep is None else masked & ~check_vector(op, "keep", keep, rows, BOOL)


def spans(mask: torch.Tensor) -> list[tuple[int, int]]:
    """(begin, end) of every maximal run of true, in order; (tokens,) bool.

    Each run makes one pruned prompt, without that run only: removing all at once was worse.
    """
    edge = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    begin, end = ((edge == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(begin, end, strict=True))


def prune(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """One copy of (tokens,) `ids` per span of `mask`, without that span."""
    return [torch.cat([ids[:begin], ids[end:]]) for begin, end in spans(mask)]


def worth_keeping(
    student_before: torch.Tensor, student_after: torch.Tensor, teacher_after: torch.Tensor
) -> torch.Tensor:
    """(samples,) bool: the student was wrong, and without the span both models are right.

    Inputs: (samples,) bool, right or wrong on the whole and on the pruned prompt. Source: LeaF's
    paper, from a note; not in its released scripts. Reconstructed.
    """
    return ~student_before & student_after & teacher_after
