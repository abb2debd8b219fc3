"""The result types of `token_stats`, of the ops that build on it, and of their forms from hidden states."""

from typing import NamedTuple

import torch


class TokenStats(NamedTuple):
    """Statistics of each row's distribution.

    Every field is (tokens,) float32 (float64 for float64 inputs), 0 in masked rows.
    """

    logp: torch.Tensor
    """log p of the target, nats. Differentiable."""
    entropy: torch.Tensor
    """-sum p log p, nats. Differentiable."""
    lse: torch.Tensor
    """log-sum-exp of the transformed logits, nats. Differentiable."""
    sum_sq: torch.Tensor
    """sum of p^2; 1 - 2 exp(logp) + sum_sq is the squared norm of d logp / d logits at T = 1."""
    top1: torch.Tensor
    """1.0 where the target attains the row's maximum (ties count), else 0.0."""


class ExtendedTokenStats(NamedTuple):
    """`TokenStats` plus the results of `second_temperature` and `moments`. Every field is (tokens,)."""

    logp: torch.Tensor
    """log p of the target, nats. Differentiable."""
    entropy: torch.Tensor
    """-sum p log p, nats. Differentiable."""
    lse: torch.Tensor
    """log-sum-exp of the transformed logits, nats. Differentiable."""
    sum_sq: torch.Tensor
    """sum of p^2."""
    top1: torch.Tensor
    """1.0 where the target attains the row's maximum, else 0.0."""
    second_logp: torch.Tensor | None
    """log p of the target at `second_temperature`; None if that was not given. Detached."""
    sum_p2_logp: torch.Tensor | None
    """sum of p^2 log p; None without `moments`. Detached."""
    sum_p2_logp2: torch.Tensor | None
    """sum of p^2 log^2 p; None without `moments`. Detached."""


class TokenStatsAt(NamedTuple):
    """`TokenStats` and the log-probs of a few ids per row, which `ids` or `top_k` ask for."""

    logp: torch.Tensor
    """log p of the target, nats; (tokens,). Differentiable."""
    entropy: torch.Tensor
    """-sum p log p, nats; (tokens,). Differentiable."""
    lse: torch.Tensor
    """log-sum-exp of the transformed logits, nats; (tokens,). Differentiable."""
    sum_sq: torch.Tensor
    """sum of p^2; (tokens,)."""
    top1: torch.Tensor
    """1.0 where the target attains the row's maximum, else 0.0; (tokens,)."""
    logp_at: torch.Tensor
    """log p of each id, nats, in the shape of the ids; 0 at padding and in masked rows. Differentiable."""
    top_ids: torch.Tensor | None
    """(tokens, top_k) int64, the most likely first, -1 in masked rows; None if `ids` was given."""


class CrossEntropyStats(NamedTuple):
    """Result of `cross_entropy` and `linear_cross_entropy` with `return_stats=True`."""

    loss: torch.Tensor
    """The loss, bitwise as without `return_stats`. Differentiable."""
    stats: TokenStats
    """Statistics of the same forward, each in the shape of the target and 0 in rows that do not count. logp, entropy
    and lse are differentiable."""


class PairedStats(NamedTuple):
    """Two distributions of each token compared; every field is (tokens,) float32, 0 where masked."""

    divergence: torch.Tensor
    """Divergence of the student from the teacher, nats. Differentiable."""
    entropy: torch.Tensor
    """Entropy of the student, nats. Differentiable."""
    logp: torch.Tensor | None
    """log p of the target by the student, nats; None without a target. Differentiable."""
    teacher_logp: torch.Tensor | None
    """log p of the target by the teacher, nats; None without a target."""
    top1_agreement: torch.Tensor
    """1.0 where one column attains the maximum of both sides (ties count), else 0.0."""
