"""Losses of reward models over pairs of responses or of prompts."""

import torch
from torch.nn.functional import logsigmoid

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import Rows, check_vector


@register(
    "bradley_terry",
    kind="reward",
    system="The standard family",
    label="exact",
    source="Bradley and Terry (1952); arXiv 2203.02155",
    summary="-log sig(r_chosen - r_rejected - margin)",
)
def bradley_terry(chosen: torch.Tensor, rejected: torch.Tensor, *, margin: float = 0.0) -> torch.Tensor:
    """(pairs,) -log sig(r_w - r_l - margin). Exact.

    Args:
        chosen, rejected: (pairs,), rewards; both receive gradients.
        margin: least difference asked for (Llama 2).
    """
    rows = Rows(check_vector("algorithms.bradley_terry", "chosen", chosen).shape[0], "chosen", chosen.device)
    check_vector("algorithms.bradley_terry", "rejected", rejected, rows)
    return -logsigmoid(chosen - rejected - margin)


@register(
    "pair_consistency",
    kind="reward",
    system="CDSAE",
    label="utility",
    source="arXiv 2309.13005 (a summary; the exact term is unknown)",
    summary="squared gap of the scores of a prompt and of its counterfactual",
    differs="CDSAE is a sequential VAE; only its counterfactual-pair term has a counterpart here. "
    "For distributions over tokens take `paired_divergence`.",
)
def pair_consistency(
    score: torch.Tensor, counterfactual: torch.Tensor, *, detach_counterfactual: bool = False
) -> torch.Tensor:
    """(pairs,) (score - score of the counterfactual)^2. Utility.

    Args:
        score, counterfactual: (pairs,), of prompts that differ in a name, a group or a hint that
            should not matter.
        detach_counterfactual: True: only `score` learns.
    """
    op = "algorithms.pair_consistency"
    rows = Rows(check_vector(op, "score", score).shape[0], "score", score.device)
    check_vector(op, "counterfactual", counterfactual, rows)
    other = counterfactual.detach() if detach_counterfactual else counterfactual
    return (score - other) ** 2
