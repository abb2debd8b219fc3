"""Step selection by relative accuracy and uncertainty: our stand-in for ISLA."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import Rows, check_number, check_vector


class StepScores(NamedTuple):
    """Of every step, (steps,) float64."""

    relative_accuracy: torch.Tensor
    information_gain: torch.Tensor


def binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """-p log p - (1 - p) log(1 - p) in nats; 0 at 0 and 1."""
    p = p.double()
    nats: torch.Tensor = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
    return nats


@register(
    "isla",
    kind="selection",
    system="ISLA",
    label="analogue",
    source="inspired by AAAI 2026, DOI 10.1609/aaai.v40i41.40798 (abstract only)",
    summary="keep steps that raise the accuracy of completions where the model is uncertain",
    required=("min_accuracy_gain", "min_uncertainty"),
    differs=(
        "A stand-in: the abstract names 'relative accuracy' and 'uncertainty', without a formula. "
        "Gain, entropy and thresholds are ours."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ISLA:
    """acc_i: share of completions of (question, steps 1..i) that are right; RA_i = acc_i - acc_i-1;
    U_i: mean token entropy of step i; IG_i = Hb(acc_i-1) - Hb(acc_i). Keep RA_i >= tau_a, U_i >=
    tau_u; chosen = the step, rejected = a sampled step from the same prefix with lower accuracy.

    Args:
        min_accuracy_gain: tau_a, in [-1, 1].
        min_uncertainty: tau_u >= 0, nats.

    State: none. Analogue: not the paper's formula, which is not public.
    """

    min_accuracy_gain: float = 0.0
    min_uncertainty: float = 0.0

    def __post_init__(self) -> None:
        check_number("algorithms.isla", "min_accuracy_gain", self.min_accuracy_gain, -1.0, 1.0)
        check_number("algorithms.isla", "min_uncertainty", self.min_uncertainty, 0.0)

    def scores(self, accuracy: torch.Tensor) -> StepScores:
        """Of (steps + 1,) accuracies: before the first step, and after each."""
        check_vector("algorithms.isla", "accuracy", accuracy)
        entropy = binary_entropy(accuracy)
        return StepScores(accuracy.double().diff(), entropy[:-1] - entropy[1:])

    def select(self, accuracy: torch.Tensor, uncertainty: torch.Tensor) -> torch.Tensor:
        """(steps,) bool; accuracy (steps + 1,), uncertainty (steps,) mean entropies."""
        gain = self.scores(accuracy).relative_accuracy
        check_vector("algorithms.isla", "uncertainty", uncertainty, Rows(gain.shape[0], "accuracy", accuracy.device))
        return (gain >= self.min_accuracy_gain) & (uncertainty >= self.min_uncertainty)

    def pair(self, chosen_accuracy: float, sampled: torch.Tensor) -> int | None:
        """The rejected partner: index of the worst of (samples,) accuracies of sampled steps, if
        it is below that of the chosen step; the first of equals."""
        check_vector("algorithms.isla", "sampled", sampled)
        if sampled.numel() == 0 or float(sampled.min()) >= chosen_accuracy:
            return None
        return int(sampled.argmin())
