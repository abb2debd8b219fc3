"""Gradient influence, computed along with the loss: norms, sketches, and data selection.

    step = tokfuse.policy_step(hidden=h, weight=w, ..., cu_seqlens=cu,
                               influence=tokfuse.influence.InfluenceSpec(rank=64, seed=0))
    scores = tokfuse.influence.matrix(step.influence.sketches, validation_sketches)

Norms (`logit_norms`, `head_norms`, `hidden_norms`) are magnitudes: they find tokens with a large gradient,
not tokens that help. Influence is an inner product of gradients (`matrix`, `less_scores`,
`greedy_select`). Here it is computed from sketches, which contain only the last hidden state.
"""

from tokfuse.algorithms.influence import adam_features, greedy_select, less_scores, matrix, ugda_select
from tokfuse.runtime.ops.influence import InfluenceSpec, head_norms, hidden_norms, logit_norms, sketch
from tokfuse.runtime.policy.results import Influence

__all__ = [
    "Influence",
    "InfluenceSpec",
    "adam_features",
    "greedy_select",
    "head_norms",
    "hidden_norms",
    "less_scores",
    "logit_norms",
    "matrix",
    "sketch",
    "ugda_select",
]
