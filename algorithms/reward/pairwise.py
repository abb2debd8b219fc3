"""Losses of reward models on pairs of responses or of prompts."""

import math

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import Rows, check_number, check_vector


@register(
    "bradley_terry",
    kind="reward",
    system="The standard family",
    label="exact (paper)",
    source="Bradley and Terry (1952); arXiv 2203.02155",
    summary="-log sig(r_chosen - r_rejected - margin)",
)
def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, *, margin: float = 0.0) -> torch.Tensor:
    """Return -log sig(r_w - r_l - margin), (pairs,). Exact.

    Args:
        chosen: (pairs,), rewards r_w; receive gradients.
        rejected: (pairs,), rewards r_l; receive gradients.
        margin: required difference of the rewards (Llama 2), finite.
    """
    rows = Rows(check_vector("algorithms.bradley_terry", "chosen", chosen).shape[0], "chosen", chosen.device)
    check_vector("algorithms.bradley_terry", "rejected", rejected, rows)
    check_number("algorithms.bradley_terry", "margin", margin, -math.inf)
    return -logsigmoid(chosen - rejected - margin)


@register(
    "pair_consistency",
    kind="reward",
    system="CDSAE",
    label="utility",
    source="arXiv 2309.13005 (a summary; the exact term is unknown)",
    summary="squared difference between the scores of a prompt and of its counterfactual",
    differs="CDSAE is a sequential VAE; only its counterfactual-pair term applies here. "
    "For distributions over tokens, use `paired_divergence`.",
)
def pair_consistency(
    score: torch.Tensor, counterfactual: torch.Tensor, *, detach_counterfactual: bool = False
) -> torch.Tensor:
    """Return (score - score of the counterfactual)^2, (pairs,). Utility.

    Args:
        score: (pairs,), scores of prompts.
        counterfactual: (pairs,), scores of the same prompts with another name, group or hint that should not matter.
        detach_counterfactual: True: only `score` receives a gradient.
    """
    op = "algorithms.pair_consistency"
    rows = Rows(check_vector(op, "score", score).shape[0], "score", score.device)
    check_vector(op, "counterfactual", counterfactual, rows)
    other = counterfactual.detach() if detach_counterfactual else counterfactual
    return (score - other) ** 2
