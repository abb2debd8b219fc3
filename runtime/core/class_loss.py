"""The cross entropy of a token with class weights, label smoothing and a z-loss, from the statistics of its row."""

import math
from typing import NamedTuple

import torch

from tokfuse.runtime.core import checks


class ClassLoss(NamedTuple):
    """The options of the loss of one token. `tokfuse.cross_entropy` has the formula."""

    class_weight: torch.Tensor | None
    label_smoothing: float
    z_loss: float

    def checked(self, op: str, name: str, vocab: int, device: torch.device, prefix: str = "") -> "ClassLoss":
        """Return the options with numbers as floats. Reads no values.

        Errors call the class weights `name`. In errors, every name begins with `prefix`.
        """
        smoothing = checks.check_number(op, f"{prefix}label_smoothing", self.label_smoothing, 0.0, 1.0)
        z_loss = checks.check_number(op, f"{prefix}z_loss", self.z_loss, 0.0, math.inf)
        if self.class_weight is not None:
            rows = checks.Rows(vocab, "the vocabulary", device)
            checks.check_constant_vector(op, f"{prefix}{name}", self.class_weight, rows)
        return ClassLoss(self.class_weight, smoothing, z_loss)

    def counts(self, target: torch.Tensor, mask: torch.Tensor, vocab: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the weight w_y of every row in the mean, 0 in masked rows."""
        if self.class_weight is None:
            return mask.to(dtype)
        # A target outside the vocabulary has a logp of NaN. An index must not be outside.
        return torch.where(mask, self.class_weight.to(dtype)[target.clamp(0, vocab - 1)], 0.0)

    def share(self, vocab: int, dtype: torch.dtype) -> float | torch.Tensor:
        """Return the mean of the class weights, the factor of lse in the smoothed part."""
        return 1.0 if self.class_weight is None else self.class_weight.to(dtype).sum() / vocab

    def losses(
        self,
        logp: torch.Tensor,
        lse: torch.Tensor,
        logit_sum: torch.Tensor | None,
        target: torch.Tensor,
        mask: torch.Tensor,
        vocab: int,
    ) -> torch.Tensor:
        """Return the loss of every row, 0 in masked rows. logit_sum: None without label smoothing."""
        losses = 0.0 - logp  # not -logp, which is -0.0 in masked rows
        if self.class_weight is not None:
            losses = losses * self.counts(target, mask, vocab, logp.dtype)
        if logit_sum is not None:
            # -sum_j w_j log p_j / vocab, from log p_j = u_j - lse. The share may be NaN.
            smooth = torch.where(mask, self.share(vocab, logp.dtype) * lse - logit_sum / vocab, 0.0)
            losses = (1.0 - self.label_smoothing) * losses + self.label_smoothing * smooth
        return losses if self.z_loss == 0.0 else losses + self.z_loss * lse.square()
