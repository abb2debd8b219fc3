"""LeaF: distillation on the original instruction and on the instruction without a confounding span."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import BOOL, Rows, check_choice, check_number, check_vector
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.ops.paired_divergence import paired_divergence

OP = "algorithms.leaf_kl"


@register(
    "leaf_kl",
    kind="preference",
    system="LeaF",
    label="recon",
    required=("lam",),
    source="arXiv 2506.07851; github.com/RUCBM/LeaF (the KL: code; lam: a note on the paper)",
    summary="forward KL to the teacher in two contexts: original and pruned instruction",
    differs="lam must be given: no value was found, and the released code has none (form='code': "
    "one mean over both contexts). The code computes the KL at label positions of unshifted "
    "logits, one position late; pass the rows that predict the response tokens.",
)
@dataclass(frozen=True, kw_only=True)
class LeaF:
    """T^2 [lam KL(teacher || student | X) + (1 - lam) KL(teacher || student | X minus A)].

    X is the instruction and A its confounding span. Each KL is the mean over the response tokens of its context. A
    context without rows adds 0.

    Args:
        lam: weight of the original context in [0, 1], for form "paper". None for form "code".
        temperature: T > 0 of both models.
        form: "paper", or "code": T^2 times the mean over the rows of both contexts.

    Inputs: logits of both models on the same rows.
    State: none.
    Source: reconstructed (lam); the divergence is exact.
    """

    lam: float | None
    temperature: float = 1.0
    form: str = "paper"

    def __post_init__(self) -> None:
        check_choice(OP, "form", self.form, ("paper", "code"))
        check_number(OP, "temperature", self.temperature, 0.0, open_low=True)
        if (self.lam is None) != (self.form == "code"):
            raise refuse(OP, "lam", "given with form 'paper', and only then", self.lam, "The released code has no lam.")
        if self.lam is not None:
            check_number(OP, "lam", self.lam, 0.0, 1.0)

    def loss(
        self,
        student: torch.Tensor,
        teacher: torch.Tensor,
        pruned: torch.Tensor,
        *,
        mask: torch.Tensor | None = None,
        counts: tuple[float, float] | None = None,
    ) -> torch.Tensor:
        """Return the loss, (), differentiable in the student's logits.

        Args:
            student: (tokens, vocab), logits of the packed rows of both contexts.
            teacher: like student. Row t of both predicts the same token in the same context.
            pruned: (tokens,) bool, True for rows of a pruned instruction.
            mask: (tokens,) bool. None: all rows count.
            counts: number of rows of the (original, pruned) context over all micro-batches and ranks. None: of
                this call.
        """
        check_vector(OP, "pruned", pruned, Rows(student.shape[0], "student", student.device), BOOL)
        kl = paired_divergence(student, teacher, kind="kl_forward", temperature=self.temperature, mask=mask)
        keep = torch.ones_like(pruned) if mask is None else mask
        parts = [torch.where(keep & side, kl, 0.0).sum() for side in (~pruned, pruned)]
        if counts is None:
            found = [(keep & side).sum() for side in (~pruned, pruned)]
        else:
            found = [torch.tensor(count, device=kl.device) for count in counts]
        square = self.temperature**2
        if self.lam is None:
            return square * (parts[0] + parts[1]) / (found[0] + found[1]).clamp(min=1)
        means = [part / count.clamp(min=1) for part, count in zip(parts, found, strict=True)]
        return square * (self.lam * means[0] + (1 - self.lam) * means[1])
