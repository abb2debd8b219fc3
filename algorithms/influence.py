"""Selection by gradient inner products: influence matrix, LESS scores, GREATS greedy choice, UGDA.

A feature is a per-sample gradient or a projection of it: of all layers (`tokfuse.influence.capture`), or of the last
hidden state only (`tokfuse.influence.sketch`), a cheaper proxy. It may have any shape after the sample axis.

Every selector raises ValueError if a feature, a score or a reward is not finite. NaN has no rank, and torch sorts it
first. `matrix` and `adam_features` do not rank: there, NaN stays NaN.
"""

import math
from collections.abc import Sequence

import torch

from tokfuse.runtime.core.checks import (
    FLOATS,
    INTS,
    check_choice,
    check_dtype,
    check_integer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse


def matrix(features: torch.Tensor, others: torch.Tensor | None = None, *, cosine: bool = True) -> torch.Tensor:
    """Return the inner products of all pairs of features: how much a step on one sample helps another.

    To first order, a small gradient step on sample i changes the loss of sample j by -lr <g_i, g_j> (TracIn). With
    `cosine`, each feature is first divided by its norm.

    Args:
        features: (samples, ...), e.g. sketches (seqs, rank, rank).
        others: (samples', ...) with the same trailing shape, e.g. a validation set. None: features.
        cosine: divide by the norms. If the loss is a mean over a sequence, short sequences have larger
            gradients; the cosine removes this effect. A feature of zeros has cosine 0.

    Returns:
        (samples, samples') float32 (float64 for float64 features).

    Raises:
        ValueError: wrong shapes.

    Source: TracIn (arXiv 2002.08484); cosine as in LESS (arXiv 2402.04333). Exact for the given features.
    """
    left = _flat("influence.matrix", "features", features)
    right = left if others is None else _flat("influence.matrix", "others", others)
    if right.shape[1] != left.shape[1]:
        raise refuse(
            "influence.matrix",
            "others",
            f"of {left.shape[1]} numbers per feature, like features",
            f"{right.shape[1]}",
            "Use the same rank and seed for both.",
        )
    if cosine:
        left, right = _unit(left), _unit(right)
    return left @ right.t()


def adam_features(
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> torch.Tensor:
    """Return the update that Adam would make for each sample alone: m_new / sqrt(v_new + eps).

    m_new = b1 m + (1 - b1) g, v_new = b2 v + (1 - b2) g^2. eps is inside the root; there is no bias correction.

    The optimizer state must belong to the same parameters as `gradient`. Adam scales each coordinate separately, and a
    random projection mixes coordinates. Apply this function first, then project. Applying it to sketches, with
    moments of sketches, is an approximation that LESS does not make.

    Args:
        gradient: (samples, ...), per-sample gradients of the optimizer's parameters.
        exp_avg: (...), finite, m of the optimizer state.
        exp_avg_sq: (...), finite and >= 0, v of the optimizer state.
        betas: (b1, b2), each in [0, 1).
        eps: > 0.

    Returns:
        Features with the shape and dtype of `gradient`. LESS uses them for training samples only; its validation
        features are plain gradients.

    Raises:
        ValueError: wrong shapes, betas or eps. The moments' values are checked on the CPU, and on other devices
            only with TOKFUSE_CHECK=1.

    Source: LESS (arXiv 2402.04333), its released collect_grad_reps. Exact.
    """
    op = "influence.adam_features"
    for name, given in (("gradient", gradient), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        check_dtype(op, name, given, FLOATS)
    for name, state in (("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq)):
        if state.shape != gradient.shape[1:]:
            raise refuse(
                op,
                name,
                f"of shape {tuple(gradient.shape[1:])}, one sample's gradient",
                f"shape {tuple(state.shape)}",
                "Pass the optimizer's state of the same parameters.",
            )
    check_adam(op, betas, eps)
    check_values(op, "exp_avg", exp_avg)
    check_values(op, "exp_avg_sq", exp_avg_sq, 0.0)
    first = betas[0] * exp_avg + (1 - betas[0]) * gradient
    second = betas[1] * exp_avg_sq + (1 - betas[1]) * gradient * gradient
    return first / (second + eps).sqrt()


def check_adam(op: str, betas: tuple[float, float], eps: float) -> None:
    """Raise an error unless `betas` are two numbers in [0, 1) and `eps` is > 0."""
    if len(betas) != 2:
        raise refuse(op, "betas", "two numbers in [0, 1)", betas, "Pass the betas of the optimizer.")
    for i, beta in enumerate(betas):
        check_number(op, f"betas[{i}]", beta, 0.0, 1.0, open_high=True)
    check_number(op, "eps", eps, 0.0, open_low=True)


def less_scores(
    train: Sequence[torch.Tensor],
    validation: Sequence[torch.Tensor],
    *,
    weight: Sequence[float] | None = None,
    subtask: torch.Tensor | None = None,
    average: str = "cosine",
) -> torch.Tensor:
    """Return the LESS score of every training sample: its cosine with the gradients of the best validation subtask.

    score_i = max over subtasks k of mean over j in k of sum_c weight_c cos(train_c,i, valid_c,j).

    Args:
        train: one (samples, ...) tensor per checkpoint, e.g. `adam_features`, with the same samples in each.
        validation: one (samples', ...) tensor per checkpoint, plain gradients of at least one sample.
        weight: one number >= 0 per checkpoint, its mean learning rate. Normalized to sum 1. None: equal weights.
        subtask: (samples',) int, the subtask of each validation sample. Any numbers. None: one subtask.
        average: "cosine" averages the cosines of a subtask (LESS). "gradient" takes the cosine with the
            subtask's mean gradient (UGDA).

    Returns:
        (samples,) float32 (float64 for float64 features). A step on a sample with a higher score lowers the
        validation loss of its best subtask more.

    Raises:
        ValueError: wrong numbers of checkpoints, shapes, weights or `average`; no validation sample; a feature
            whose norm is not finite.

    Source: LESS (arXiv 2402.04333), released code; UGDA (OpenReview iamWnRpMuQ), reconstructed.
    """
    op = "influence.less_scores"
    if not len(train) == len(validation) > 0:
        raise refuse(
            op,
            "train and validation",
            "one tensor per checkpoint each",
            f"{len(train)} and {len(validation)}",
            "Pass both for the same checkpoints.",
        )
    check_choice(op, "average", average, ("cosine", "gradient"))
    shares = [1.0 / len(train)] * len(train)
    if weight is not None:
        shares = _shares(op, weight, len(train))
    samples, count = train[0].shape[0], validation[0].shape[0]
    check_features(op, "validation", validation[0], least=1)
    if subtask is None:
        subtask = torch.zeros(count, dtype=torch.int64, device=validation[0].device)
    elif subtask.shape != (count,):
        raise refuse(
            op,
            "subtask",
            f"of shape ({count},) like the validation samples",
            f"shape {tuple(subtask.shape)}",
            "Pass one subtask id per sample.",
        )
    check_vector(op, "subtask", subtask, dtypes=INTS)
    # Only the ids that occur: an id without samples would take part in the maximum with a score of 0.
    present, place = subtask.unique(return_inverse=True)
    members = torch.nn.functional.one_hot(place, present.shape[0]).t()  # (subtasks, samples')
    total: torch.Tensor | None = None
    for share, of_train, of_validation in zip(shares, train, validation, strict=True):
        left, right = _flat(op, "train", of_train), _flat(op, "validation", of_validation)
        if left.shape[0] != samples or right.shape != (count, left.shape[1]):
            raise refuse(
                op,
                "train and validation",
                f"of {samples} and {count} samples in every checkpoint, with equally large features",
                f"shapes {tuple(left.shape)} and {tuple(right.shape)}",
                "Pass the same samples for all checkpoints.",
            )
        check_features(op, "train", left)
        check_features(op, "validation", right)
        mean = members.to(right.dtype) / members.sum(1, keepdim=True)
        anchors = mean @ _unit(right) if average == "cosine" else _unit(mean @ right)
        term = share * (_unit(left) @ anchors.t())
        total = term if total is None else total + term
    assert total is not None
    return total.amax(1)


def _shares(op: str, weight: Sequence[float], checkpoints: int) -> list[float]:
    """Return the weights of the checkpoints, divided by their sum."""
    if len(weight) != checkpoints:
        raise refuse(
            op, "weight", f"one number per checkpoint, {checkpoints}", len(weight), "Pass the mean learning rates."
        )
    known = [check_number(op, "weight", w, 0.0) for w in weight]
    if sum(known) == 0.0:
        raise refuse(op, "weight", "above 0 for one checkpoint at least", known, "Pass the mean learning rates.")
    return [w / sum(known) for w in known]


def greedy_select(score: torch.Tensor, interaction: torch.Tensor, k: int) -> torch.Tensor:
    """Return k samples: repeatedly pick the best one and subtract its row of interactions from all scores.

    Redundant samples lower each other's gain. Given the chosen set C, the gain of sample i is
    score_i - sum over j in C of interaction_ij.

    Args:
        score: (samples,), e.g. lr * <g_i, mean validation gradient>.
        interaction: (samples, samples), e.g. lr^2 <g_i, g_j> = lr^2 `matrix(g, cosine=False)`, which
            approximates the Hessian by the identity.
        k: number of samples to pick, in [0, samples].

    Returns:
        (k,) int64, in the order of picking. Of equal gains the first sample is picked. A sample is picked even
        if its gain is negative.

    Raises:
        ValueError: wrong shapes or k; a score or an interaction that is not finite.

    Source: GREATS (Wang et al., NeurIPS 2024), released code. Exact.
    """
    op = "influence.greedy_select"
    samples = score.shape[0]
    if score.dim() != 1 or interaction.shape != (samples, samples):
        raise refuse(
            op,
            "interaction",
            f"of shape ({samples}, {samples}) for score of shape {tuple(score.shape)}",
            f"shape {tuple(interaction.shape)}",
            "Pass one row per sample.",
        )
    check_integer(op, "k", k, 0, samples)
    check_dtype(op, "score", score, FLOATS)
    check_dtype(op, "interaction", interaction, FLOATS)
    check_values(op, "score", score, always=True)
    check_values(op, "interaction", interaction, always=True)
    gain = score.detach().clone()
    chosen = torch.empty(k, dtype=torch.int64, device=score.device)
    for i in range(k):
        best = gain.argmax()
        chosen[i] = best
        gain = gain - interaction.index_select(0, best.unsqueeze(0)).squeeze(0)
        gain[chosen[: i + 1]] = -math.inf
    return chosen


def ugda_select(
    rewards: torch.Tensor, score: torch.Tensor, *, uncertain: float = 0.5, influential: float = 0.5
) -> torch.Tensor:
    """Return the samples to relabel: the most influential ones among the most uncertain ones.

    The uncertainty is the variance of the reward over the members of an ensemble.

    Args:
        rewards: (members, samples), each ensemble member's reward; at least two members.
        score: (samples,), influence, e.g. `less_scores(..., average="gradient")`.
        uncertain: fraction of samples kept by variance, in (0, 1].
        influential: fraction of those kept by score, in (0, 1].

    Returns:
        (kept,) int64 sample indices, most influential first. Each fraction is rounded to the nearest count, at
        least 1.

    Raises:
        ValueError: wrong shapes or fractions; a reward or a score that is not finite.

    Source: UGDA (OpenReview iamWnRpMuQ), reconstructed from its abstract and reviews.
    """
    op = "influence.ugda_select"
    if rewards.dim() != 2 or rewards.shape[0] < 2 or score.shape != rewards.shape[1:]:
        raise refuse(
            op,
            "rewards",
            "of shape (members >= 2, samples) with score (samples,)",
            f"shapes {tuple(rewards.shape)} and {tuple(score.shape)}",
            "Pass one row per ensemble member.",
        )
    for name, fraction in (("uncertain", uncertain), ("influential", influential)):
        check_number(op, name, fraction, 0.0, 1.0, open_low=True)
    check_dtype(op, "rewards", rewards, FLOATS)
    check_dtype(op, "score", score, FLOATS)
    check_values(op, "rewards", rewards, always=True)
    check_values(op, "score", score, always=True)
    kept = top_fraction(rewards.var(0, unbiased=False), uncertain)
    return kept[top_fraction(score[kept], influential)]


def top_fraction(value: torch.Tensor, fraction: float) -> torch.Tensor:
    """Return the indices of the largest `fraction` of values, largest first. Of equal values the first wins.

    The count is rounded to the nearest integer, and is at least 1 if there is a value.

    Args:
        value: (samples,), finite.
        fraction: in (0, 1].
    """
    op = "influence.top_fraction"
    check_number(op, "fraction", fraction, 0.0, 1.0, open_low=True)
    check_values(op, "value", check_vector(op, "value", value), always=True)
    count = min(value.shape[0], max(1, round(fraction * value.shape[0])))
    return value.sort(descending=True, stable=True).indices[:count]


def _flat(op: str, name: str, features: torch.Tensor) -> torch.Tensor:
    """Return the features as (samples, numbers), float32 or float64."""
    if features.dim() < 2:
        raise refuse(
            op,
            name,
            "of shape (samples, ...) with one feature per sample",
            f"shape {tuple(features.shape)}",
            "Add a sample axis.",
        )
    check_dtype(op, name, features, FLOATS)
    wide = torch.float64 if features.dtype == torch.float64 else torch.float32
    return features.detach().flatten(1).to(wide)


def check_features(op: str, name: str, features: torch.Tensor, least: int = 0) -> None:
    """Raise ValueError for fewer than `least` features, or for a norm that is not finite. The message has its index."""
    if features.shape[0] < least:
        raise refuse(op, name, f"of at least {least} sample", "none", "Pass one gradient or sketch per sample.")
    check_values(op, f"the norms of {name}", _norms(_flat(op, name, features)).squeeze(1), always=True)


def _norms(rows: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    return norm


def _unit(rows: torch.Tensor) -> torch.Tensor:
    """Return the rows divided by their norms. A row of zeros stays zero."""
    norm = _norms(rows)
    return rows / torch.where(norm == 0, 1.0, norm)
