"""Step selection by relative accuracy and uncertainty: an analogue of ISLA."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import FLOATS, Rows, check_dtype, check_number, check_values, check_vector
from tokfuse.runtime.core.errors import refuse


class StepScores(NamedTuple):
    """Scores of every step, (steps,) float64 each."""

    relative_accuracy: torch.Tensor
    information_gain: torch.Tensor


def binary_entropy(p: torch.Tensor) -> torch.Tensor:
    """Return -p log p - (1 - p) log(1 - p) in nats; 0 at p = 0 and p = 1. p is in [0, 1]."""
    check_dtype("binary_entropy", "p", p, FLOATS)
    check_values("binary_entropy", "p", p, 0.0, 1.0, always=True)
    p = p.double()
    nats: torch.Tensor = -(torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p))
    return nats


@register(
    "isla",
    kind="selection",
    system="ISLA",
    label="analogue",
    source="inspired by AAAI 2026, DOI 10.1609/aaai.v40i41.40798 (abstract only)",
    summary="keeps steps that raise the accuracy of completions while the model is uncertain",
    required=("min_accuracy_gain", "min_uncertainty"),
    differs=(
        "The abstract names 'relative accuracy' and 'uncertainty' without a formula. The gain, the "
        "entropy and the thresholds here are our choice."
    ),
)
@dataclass(frozen=True, kw_only=True)
class ISLA:
    """Keep step i if RA_i >= tau_a and U_i >= tau_u. Analogue: the paper's formula is not public.

    acc_i is the share of correct completions of (question, steps 1..i). RA_i = acc_i - acc_i-1.
    U_i is the mean token entropy of step i. IG_i = Hb(acc_i-1) - Hb(acc_i), with the binary entropy Hb.
    In a pair, the chosen side is the step, and the rejected side a sampled step from the same prefix with a lower
    accuracy.

    Args:
        min_accuracy_gain: tau_a, in [-1, 1].
        min_uncertainty: tau_u >= 0, nats.

    State: none.
    """

    min_accuracy_gain: float = 0.0
    min_uncertainty: float = 0.0

    def __post_init__(self) -> None:
        check_number("algorithms.isla", "min_accuracy_gain", self.min_accuracy_gain, -1.0, 1.0)
        check_number("algorithms.isla", "min_uncertainty", self.min_uncertainty, 0.0)

    def scores(self, accuracy: torch.Tensor) -> StepScores:
        """Return RA and IG of every step, from (steps + 1,) accuracies in [0, 1]: before the first and after each."""
        check_vector("algorithms.isla", "accuracy", accuracy)
        check_values("algorithms.isla", "accuracy", accuracy, 0.0, 1.0, always=True)
        if accuracy.shape[0] == 0:
            raise refuse(
                "algorithms.isla", "accuracy", "of at least one number", "none", "Start before the first step."
            )
        entropy = binary_entropy(accuracy)
        return StepScores(accuracy.double().diff(), entropy[:-1] - entropy[1:])

    def select(self, accuracy: torch.Tensor, uncertainty: torch.Tensor) -> torch.Tensor:
        """Return the steps to keep, (steps,) bool.

        Args:
            accuracy: (steps + 1,), in [0, 1], before the first step and after each.
            uncertainty: (steps,), finite, mean token entropy of each step, nats.
        """
        gain = self.scores(accuracy).relative_accuracy
        check_vector("algorithms.isla", "uncertainty", uncertainty, Rows(gain.shape[0], "accuracy", accuracy.device))
        check_values("algorithms.isla", "uncertainty", uncertainty, always=True)
        return (gain >= self.min_accuracy_gain) & (uncertainty >= self.min_uncertainty)

    def pair(self, chosen_accuracy: float, sampled: torch.Tensor) -> int | None:
        """Return the index of the rejected step: the one with the lowest of the (samples,) accuracies `sampled`.

        Of equal ones, the first. None if no accuracy is below the chosen step's. All accuracies are in [0, 1].
        """
        check_number("algorithms.isla", "chosen_accuracy", chosen_accuracy, 0.0, 1.0)
        check_vector("algorithms.isla", "sampled", sampled)
        check_values("algorithms.isla", "sampled", sampled, 0.0, 1.0, always=True)
        if sampled.numel() == 0 or float(sampled.min()) >= chosen_accuracy:
            return None
        return int(sampled.argmin())
