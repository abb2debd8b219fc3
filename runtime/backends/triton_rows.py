"""The Triton kernels over rows of logits; the launchers allocate their own outputs."""

import math
from typing import Any

import torch

from tokfuse.runtime.backends.triton_backend import launcher
from tokfuse.runtime.backends.value_checks import with_support, with_targets, with_temperature
from tokfuse.runtime.core.dispatch import Kernels

_divergence_fwd = launcher("paired_divergence", "paired_divergence_fwd")


def paired_divergence_fwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, *, beta: float, **options: Any
) -> tuple[torch.Tensor, ...]:
    """(divergence (tokens,), what the backward needs of each row)."""
    bound = -beta * math.log(beta) - (1 - beta) * math.log1p(-beta)  # entropy of the weights
    out: tuple[torch.Tensor, ...] = _divergence_fwd(logits_p, logits_q, beta=beta, jsd_bound=bound, **options)
    return out


TOKEN_STATS = Kernels(
    with_targets(launcher("token_stats", "token_stats_fwd")), launcher("token_stats", "token_stats_bwd")
)
KEPT_TOKEN_STATS = Kernels(
    with_support(launcher("kept_token_stats", "kept_token_stats_fwd")),
    launcher("kept_token_stats", "kept_token_stats_bwd"),
)
PAIRED_DIVERGENCE = Kernels(
    with_temperature(paired_divergence_fwd), launcher("paired_divergence", "paired_divergence_bwd")
)
