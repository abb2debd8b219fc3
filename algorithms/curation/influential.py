"""Selection by influence with the settings of the papers: LESS, GREATS, UGDA, from per-sample features.

    with tokfuse.influence.capture(model) as captured:
        loss_of(model(candidates)).backward()
    ids = tokfuse.algorithms.make("greats", k=16, lr=1e-3).select(captured.features, anchors)

A feature is a per-sample gradient or a projection of it. `tokfuse.influence.capture` has features of linear layers and
norms. The sketches of `policy_step(influence=...)` work with the same calls. They are a cheaper proxy, which ranks
samples by the gradients of the last layer only.

A feature, score or reward that is not finite raises ValueError: it has no rank (`tokfuse.influence`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tokfuse.algorithms.influence import (
    adam_features,
    check_adam,
    check_features,
    greedy_select,
    less_scores,
    matrix,
    top_fraction,
    ugda_select,
)
from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_integer, check_number
from tokfuse.runtime.core.errors import refuse

Moments = tuple[torch.Tensor, torch.Tensor]


@register(
    "less",
    kind="selection",
    system="LESS",
    label="exact (released code)",
    source="arXiv 2402.04333; github.com/princeton-nlp/LESS",
    summary="cosine of a sample's Adam update with validation gradients, over checkpoints",
    differs=(
        "Scores are exact for the given features. The paper's features are LoRA gradients of all "
        "layers, projected to 8192 numbers; `influence.capture` projects each layer separately."
    ),
)
@dataclass(frozen=True, kw_only=True)
class LESS:
    """Select the fraction of the training samples with the highest LESS scores.

    score_i = max over subtasks of mean over their samples j of sum_c w_c cos(Gamma_c,i, g_c,j), where
    Gamma = m_new / sqrt(v_new + eps) and w_c is the mean learning rate of checkpoint c.

    Args:
        fraction: share of the samples that is kept, in (0, 1].
        betas: betas of the Adam optimizer, in [0, 1), see `tokfuse.influence.adam_features`.
        eps: eps of the Adam optimizer, > 0.

    State: none; the moments of the checkpoints belong to the optimizer.
    Source: released code, exact.
    """

    fraction: float = 0.05
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("algorithms.less", "fraction", self.fraction, 0.0, 1.0, open_low=True)
        check_adam("algorithms.less", self.betas, self.eps)

    def scores(
        self,
        train: Sequence[torch.Tensor],
        validation: Sequence[torch.Tensor],
        *,
        moments: Sequence[Moments] | None = None,
        weight: Sequence[float] | None = None,
        subtask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the score of every training sample, (samples,).

        Args:
            train: one (samples, ...) tensor per checkpoint, gradients of the training samples.
            validation: one (samples', ...) tensor per checkpoint, plain gradients.
            moments: (exp_avg, exp_avg_sq) per checkpoint, applied to the training features only. None: plain
                gradients on both sides (the SGD form).
            weight: one number >= 0 per checkpoint, its mean learning rate. None: equal weights.
            subtask: (samples',) int, subtask of each validation sample. Any numbers. None: one subtask.
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
        """Return the indices of the selected samples, (kept,) int64, best first.

        Args:
            train: one (samples, ...) tensor per checkpoint, gradients of the training samples.
            validation: one (samples', ...) tensor per checkpoint, plain gradients.
            moments: (exp_avg, exp_avg_sq) per checkpoint, applied to the training features only. None: plain
                gradients on both sides (the SGD form).
            weight: one number >= 0 per checkpoint, its mean learning rate. None: equal weights.
            subtask: (samples',) int, subtask of each validation sample. Any numbers. None: one subtask.
        """
        score = self.scores(train, validation, moments=moments, weight=weight, subtask=subtask)
        return top_fraction(score, self.fraction)


@register(
    "greats",
    kind="selection",
    system="GREATS",
    label="exact (released code)",
    source="Wang et al., NeurIPS 2024; github.com/Jiachen-T-Wang/GREATS",
    summary="greedy choice of a batch: gain on validation minus overlap with the chosen samples",
    required=("k", "lr"),
    differs="Exact for the given features. The paper's features are LoRA gradients of all layers.",
)
@dataclass(frozen=True, kw_only=True)
class GREATS:
    """Greedy selection: k times, take the sample with the best score and subtract its row of K from all scores.

    score_i = lr <g_i, mean validation gradient>. K_ij = lr^2 <g_i, g_j> approximates the Hessian by the identity.

    Args:
        k: number of candidates to keep.
        lr: learning rate of the step, > 0. It sets the cost of overlap.

    State: none.
    Source: released code, exact.
    """

    k: int = 0
    lr: float = 0.0

    def __post_init__(self) -> None:
        check_integer("algorithms.greats", "k", self.k, 1)
        check_number("algorithms.greats", "lr", self.lr, 0.0, open_low=True)

    def select(self, features: torch.Tensor, validation: torch.Tensor, *, divisor: float = 1.0) -> torch.Tensor:
        """Return the indices of the selected candidates in the order of picking, (k,) int64.

        Args:
            features: (candidates, ...), plain gradients.
            validation: (samples, ...), plain gradients, of at least one sample.
            divisor: divisor of the loss whose gradients the features are (for a batch mean, the batch size).
                The features are multiplied by it to become gradients of single samples. The two terms scale
                differently, so a wrong divisor changes the choice.
        """
        check_number("algorithms.greats", "divisor", divisor, 0.0, open_low=True)
        check_features("algorithms.greats", "features", features)
        check_features("algorithms.greats", "validation", validation, least=1)
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
    summary="relabels samples on which a reward ensemble disagrees and that change the validation loss most",
    differs=(
        "Reconstructed. No source says which checkpoints give the gradients, so they are an argument. "
        "Only the selection; relabelling and refinement belong to the reward model."
    ),
)
@dataclass(frozen=True, kw_only=True)
class UGDA:
    """Select samples to relabel: first by the variance of the reward over the ensemble, then by influence.

    The `uncertain` share with the largest variance is kept, and of it the `influential` share with the largest
    max over subtasks of the cosine with the subtask's mean gradient. Reconstructed.

    Args:
        uncertain: gamma, in (0, 1].
        influential: eta, in (0, 1]. The defaults together keep a quarter.
        betas: betas of the Adam optimizer, in [0, 1), for the Adam features.
        eps: eps of the Adam optimizer, > 0.

    State: none.
    """

    uncertain: float = 0.5
    influential: float = 0.5
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def __post_init__(self) -> None:
        check_number("algorithms.ugda", "uncertain", self.uncertain, 0.0, 1.0, open_low=True)
        check_number("algorithms.ugda", "influential", self.influential, 0.0, 1.0, open_low=True)
        check_adam("algorithms.ugda", self.betas, self.eps)

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
        """Return the indices of the selected samples, (kept,) int64, most influential first.

        Args:
            rewards: (members, samples), over the samples of all ranks. Shares are of the samples given here, so a
                selection per rank would depend on how the samples are distributed.
            train: one (samples, ...) tensor per checkpoint, gradients of the training samples.
            validation: one (samples', ...) tensor per checkpoint, plain gradients.
            moments: (exp_avg, exp_avg_sq) per checkpoint. None: plain gradients on both sides.
            weight: one number >= 0 per checkpoint, its mean learning rate. None: equal weights.
            subtask: (samples',) int, subtask of each validation sample. Any numbers. None: one subtask.
        """
        updates = _updates(self, train, moments)
        score = less_scores(updates, validation, weight=weight, subtask=subtask, average="gradient")
        return ugda_select(rewards, score, uncertain=self.uncertain, influential=self.influential)


def _updates(
    method: LESS | UGDA, train: Sequence[torch.Tensor], moments: Sequence[Moments] | None
) -> Sequence[torch.Tensor]:
    """Return Adam's updates of the training features. Without moments: the features."""
    if moments is None:
        return train
    if len(moments) != len(train):
        raise refuse(
            f"algorithms.{type(method).__name__.lower()}",
            "moments",
            f"one pair per checkpoint, {len(train)}",
            len(moments),
            "Pass the optimizer's state of each checkpoint.",
        )
    for features in train:
        check_features(f"algorithms.{type(method).__name__.lower()}", "train", features)
    return [
        adam_features(g, m, v, betas=method.betas, eps=method.eps) for g, (m, v) in zip(train, moments, strict=True)
    ]
