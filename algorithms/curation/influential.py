"""Selection by influence as the papers run it: LESS, GREATS, UGDA, over per-sample features.

    step = tokfuse.policy_step(hidden=..., weight=..., influence=InfluenceSpec())
    ids = tokfuse.algorithms.make("greats", k=16, lr=1e-3).select(step.influence.sketches, anchors)

Features are gradients per sample or sketches of them. With sketches of the last hidden state a
ranking is one of the last layer's gradients only; features of more layers plug into the same calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokfuse.algorithms.influence import adam_features, greedy_select, less_scores, matrix, top_fraction, ugda_select
from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse

Moments = tuple[torch.Tensor, torch.Tensor]


@register(
    "less",
    kind="selection",
    system="LESS",
    label="exact",
    source="arXiv 2402.04333; github.com/princeton-nlp/LESS",
    summary="cosine of Adam's update from a sample with validation gradients, over checkpoints",
    differs=(
        "Scores are exact for the features given: LESS's are LoRA gradients of all layers, "
        "projected to 8192 numbers; sketches see the last hidden state only."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LESS:
    """score_i = max over subtasks of mean over their samples j of sum_c w_c cos(Gamma_c,i, g_c,j);
    Gamma = m_new / sqrt(v_new + eps), w_c the checkpoint's mean learning rate. The top fraction.

    Args:
        fraction: share that is kept, in (0, 1].
        betas, eps: of the optimiser, see `tokfuse.influence.adam_features`.

    State: none; the checkpoints' moments are the optimiser's. Source: released code, exact.
    """

    fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("algorithms.less", "fraction", self.fraction, 0.0, 1.0, open_low=True)

    def scores(
        self,
        train: Sequence[torch.Tensor],
        validation: Sequence[torch.Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        weight: Sequence[float] | None = None,
        subtask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(samples,); see `tokfuse.influence.less_scores`.

        moments: (exp_avg, exp_avg_sq) per checkpoint, for the training features; validation
            features stay plain gradients. None: plain gradients on both sides (the SGD form).
        """
        return less_scores(_updates(self, train, moments), validation, weight=weight, subtask=subtask)

    def select(
        self,
        train: Sequence[torch.Tensor],
        validation: Sequence[torch.Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        weight: Sequence[float] | None = None,
        subtask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(kept,) int64 ids, best first; the arguments of `scores`."""
        score = self.scores(train, validation, moments=moments, weight=weight, subtask=subtask)
        return top_fraction(score, self.fraction)


@register(
    "greats",
    kind="selection",
    system="GREATS",
    label="exact",
    source="Wang et al., NeurIPS 2024; github.com/Jiachen-T-Wang/GREATS",
    summary="greedy choice of a batch: gain on validation minus overlap with what is chosen",
    required=("k", "lr"),
    differs="Exact for the features given, which in the paper are LoRA gradients of all layers.",
)
@dataclass(frozen=True, kw_only=True)
class GREATS:
    """score_i = lr <g_i, mean validation gradient>, K_ij = lr^2 <g_i, g_j> (the Hessian as the
    identity); k times: take the best, subtract its row of K from all scores.

    Args:
        k: number of samples to keep of the candidates. lr: learning rate of the step, > 0: it sets
            how much overlap costs.

    State: none. Source: released code, exact.
    """

    k: int = 0
    lr: float = 0.0

    def __post_init__(self) -> None:
        check_number("algorithms.greats", "k", self.k, 1)
        check_number("algorithms.greats", "lr", self.lr, 0.0, open_low=True)

    def select(self, features: torch.Tensor, validation: torch.Tensor, *, divisor: float = 1.0) -> torch.Tensor:
        """(k,) int64 ids in the order of picking.

        Args:
            features: (candidates, ...), plain gradients. validation: (samples, ...).
            divisor: what the loss behind both was divided by (the batch size, for a batch mean):
                features are multiplied by it, so that each is one sample's own gradient. The two
                terms scale differently, so a wrong one changes the choice.
        """
        check_number("algorithms.greats", "divisor", divisor, 0.0, open_low=True)
        own = features.detach() * divisor
        anchor = (validation.detach() * divisor).mean(0, keepdim=True)
        score = self.lr * matrix(own, anchor, cosine=False).squeeze(1)
        return greedy_select(score, self.lr**2 * matrix(own, cosine=False), self.k)


@register(
    "ugda",
    kind="selection",
    system="UGDA",
    label="recon",
    source="OpenReview iamWnRpMuQ; abstract, four reviews, LESS's code",
    summary="relabel what a reward ensemble disagrees on and what then moves the validation loss",
    differs=(
        "Reconstructed. Not settled by any source: whose checkpoints give the gradients (an "
        "argument here). Selection only; relabelling and refinement are the reward model's."
    ),
)
@dataclass(frozen=True, kw_only=True)
class UGDA:
    """Keep the `uncertain` share with the largest variance of rewards over the ensemble, of these
    the `influential` share by max over subtasks of the cosine with the subtask's mean gradient.

    Args:
        uncertain: gamma, in (0, 1]. influential: eta, in (0, 1]. Together: a quarter.
        betas, eps: of the optimiser, for the Adam features.

    State: none. Reconstructed.
    """

    uncertain: float = 0.5
    influential: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("algorithms.ugda", "uncertain", self.uncertain, 0.0, 1.0, open_low=True)
        check_number("algorithms.ugda", "influential", self.influential, 0.0, 1.0, open_low=True)

    def select(
        self,
        rewards: torch.Tensor,
        train: Sequence[torch.Tensor],
        validation: Sequence[torch.Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        weight: Sequence[float] | None = None,
        subtask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(kept,) int64 ids, most influential first.

        Args:
            rewards: (members, samples), of all ranks: the shares are of the samples given here, so
                a choice per rank would depend on how they are spread.
            The others as for `LESS.scores`, one entry per checkpoint.
        """
        updates = _updates(self, train, moments)
        score = less_scores(updates, validation, weight=weight, subtask=subtask, average="gradient")
        return ugda_select(rewards, score, uncertain=self.uncertain, influential=self.influential)


def _updates(
    method: LESS | UGDA, train: Sequence[torch.Tensor], moments: Sequence[Moments] | None
) -> Sequence[torch.Tensor]:
    """Adam's updates of the training features, or the features themselves without moments."""
    if moments is None:
        return train
    if len(moments) != len(train):
        raise refuse(
            f"algorithms.{type(method).__name__.lower()}",
            "moments",
            f"one pair per checkpoint, {len(train)}",
            len(moments),
            "Pass the optimiser's state of each.",
        )
    return [
        adam_features(g, m, v, betas=method.betas, eps=method.eps) for g, (m, v) in zip(train, moments, strict=True)
    ]
