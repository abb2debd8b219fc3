"""LeaF: finds prompt tokens that mislead the student but not the teacher, and makes prompts without them.

    student, teacher = (embedding_sensitivity(g) for g in gradients_of_the_embeddings)
    mask = tokfuse.algorithms.make("leaf").confounders(student, teacher, keep=is_whitespace)
    prompts = [ids, *prune(ids, mask)]

`make("leaf_kl")` is the distillation on original and pruned prompts.
"""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import BOOL, INTS, Rows, check_number, check_values, check_vector
from tokfuse.runtime.ops.influence import hidden_norms


def embedding_sensitivity(grad_embedding: torch.Tensor) -> torch.Tensor:
    """Return ||d L / d e_i|| of every token: (tokens, hidden) -> (tokens,) float32.

    L is the mean cross-entropy of the response's labels and e_i the input embedding of token i. First run an ordinary
    backward to the embeddings. This function returns the norm of each row of their gradient.
    """
    return hidden_norms(grad_embedding)


def _unit_range(x: torch.Tensor) -> torch.Tensor:
    """Scale linearly to [0, 1] by minimum and maximum. 0 if all values are equal."""
    if x.numel() == 0:
        return x
    width = x.max() - x.min()
    return (x - x.min()) / torch.where(width == 0, 1.0, width)


@register(
    "leaf",
    kind="selection",
    system="LeaF",
    label="exact (released code)",
    source="arXiv 2506.07851; github.com/RUCBM/LeaF",
    summary="tokens to which the student is sensitive and the teacher is not, removed span by span",
    differs=(
        "The masks match the released code. `worth_keeping` is the paper's condition, which the "
        "released scripts leave out. The distillation loss on pruned prompts is `leaf_kl`."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LeaFMasks:
    """d = minmax(minmax(g_teacher) - minmax(g_student)). Confounders have d_i <= min(sorted(d)[floor(q n)], cap).

    Tokens in `keep` are never confounders.

    Args:
        q: fraction of the tokens, in [0, 1). The released scripts use 0.05 for mathematics and 0.1 for code.
        cap: a token with d above this value is never a confounder, in [0, 1].

    Inputs: norms of the embedding gradients of both models over the analysed span (instruction, or instruction and
    earlier response), with the same tokenizer.
    State: none.
    Source: released code, exact.
    """

    q: float = 0.05
    cap: float = 0.5

    def __post_init__(self) -> None:
        check_number("algorithms.leaf", "q", self.q, 0.0, 1.0, open_high=True)
        check_number("algorithms.leaf", "cap", self.cap, 0.0, 1.0)

    def confounders(
        self, student: torch.Tensor, teacher: torch.Tensor, keep: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return True for confounders, (tokens,) bool.

        Args:
            student: (tokens,), finite and >= 0, sensitivities of the student.
            teacher: (tokens,), finite and >= 0, sensitivities of the teacher to the same tokens.
            keep: (tokens,), bool, tokens that are never masked: whitespace and line breaks. None: no such tokens.
        """
        op = "algorithms.leaf"
        n = check_vector(op, "student", student).shape[0]
        rows = Rows(n, "student", student.device)
        check_vector(op, "teacher", teacher, rows)
        check_values(op, "student", student, 0.0, always=True)
        check_values(op, "teacher", teacher, 0.0, always=True)
        if n == 0:
            return torch.zeros(0, dtype=torch.bool, device=student.device)
        gap = _unit_range(_unit_range(teacher.double()) - _unit_range(student.double()))
        threshold = gap.sort().values[int(self.q * n)].clamp(max=self.cap)
        masked = gap <= threshold
        return masked if keep is None else masked & ~check_vector(op, "keep", keep, rows, BOOL)


def spans(mask: torch.Tensor) -> list[tuple[int, int]]:
    """Return (begin, end) of every maximal run of True in a (tokens,) bool mask, in order.

    Each run gives one pruned prompt, without that run only: removing all runs at once was worse.
    """
    check_vector("spans", "mask", mask, dtypes=BOOL)
    edge = torch.nn.functional.pad(mask.int(), (1, 1)).diff()
    begin, end = ((edge == sign).nonzero().flatten().tolist() for sign in (1, -1))
    return list(zip(begin, end, strict=True))


def prune(ids: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Return one copy of `ids`, (tokens,) int, per span of `mask`, (tokens,) bool, without that span."""
    rows = Rows(check_vector("prune", "ids", ids, dtypes=INTS).shape[0], "ids", ids.device)
    check_vector("prune", "mask", mask, rows, BOOL)
    return [torch.cat([ids[:begin], ids[end:]]) for begin, end in spans(mask)]


def worth_keeping(
    student_before: torch.Tensor, student_after: torch.Tensor, teacher_after: torch.Tensor
) -> torch.Tensor:
    """Return True if the student was wrong, and both models are correct without the span, (samples,) bool.

    Args:
        student_before: (samples,), bool, whether the student is correct on the original prompt.
        student_after: (samples,), bool, whether the student is correct on the pruned prompt.
        teacher_after: (samples,), bool, whether the teacher is correct on the pruned prompt.

    Source: LeaF's paper, from a note; not in its released scripts. Reconstructed.
    """
    rows = Rows(
        check_vector("worth_keeping", "student_before", student_before, dtypes=BOOL).shape[0],
        "student_before",
        student_before.device,
    )
    for name, value in (("student_after", student_after), ("teacher_after", teacher_after)):
        check_vector("worth_keeping", name, value, rows, BOOL)
    return ~student_before & student_after & teacher_after
