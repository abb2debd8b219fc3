"""LeaF: distillation on the original instruction and on the instruction without a confounding span."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse


@register(
    "leaf_kl",
    kind="distillation",
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
class LeaF(Distillation):
    """T^2 [lam KL(teacher || student | X) + (1 - lam) KL(teacher || student | X minus A)].

    X is the instruction and A its confounding span, see `make("leaf")`. Each KL is the mean over the response tokens of
    its context. A context without tokens adds 0.

    Args:
        lam: weight of the original context in [0, 1], for form "paper". None for form "code".
        temperature: T > 0 of both models.
        form: "paper", or "code": T^2 times the mean over the tokens of both contexts.

    Inputs: the responses after both instructions, with `pruned`. The means are over all ranks.
    State: none.
    Source: reconstructed (lam); the divergence is exact.
    """

    contexts = ("pruned",)

    lam: float | None
    temperature: float = 1.0
    form: str = "paper"

    def __post_init__(self) -> None:
        check_choice(self._op, "form", self.form, ("paper", "code"))
        self.check_temperature(self.temperature)
        if (self.lam is None) != (self.form == "code"):
            raise refuse(
                self._op, "lam", "given with form 'paper', and only then", self.lam, "The released code has no lam."
            )
        if self.lam is not None:
            check_number(self._op, "lam", self.lam, 0.0, 1.0)

    def objective(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of a batch, for `distill_step`. Micro-batches of it must come from `plan.take`."""
        self.check_contexts(batch)
        batch.require(self._op, "pruned")
        assert batch.pruned is not None
        keep, pruned = batch.valid, batch.pruned[batch.sequence]
        square = torch.full((batch.num_tokens,), self.temperature**2, dtype=torch.float64, device=keep.device)
        if self.lam is not None:
            # The plan divides by all tokens N: N / n per token of a context makes the mean over its own n tokens.
            counts = batch.world.sum(torch.stack([(keep & ~pruned).sum(), (keep & pruned).sum()]).double())
            weights = counts.new_tensor([self.lam, 1.0 - self.lam]) * counts.sum() / counts.clamp(min=1.0)
            square = square * weights[pruned.long()]
        return mean_plan(batch, {"kind": "kl_forward"}, "token_mean", coef=square, temperature=self.temperature)
