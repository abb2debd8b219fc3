"""Gradient influence, computed along with the loss: features of all layers, sketches, norms, and data selection.

    with tokfuse.influence.capture(model) as captured:  # linear layers and norms, per sequence
        loss_of(model(batch)).backward()
    scores = captured.scores(captured_validation)

`capture` sees all layers but the lm_head and is the one to use for scores. The sketches of the last hidden state are a
cheaper proxy:

    step = tokfuse.policy_step(hidden=h, weight=w, ..., cu_seqlens=cu,
                               influence=tokfuse.influence.InfluenceSpec(rank=64, seed=0))
    scores = tokfuse.influence.matrix(step.influence.sketches, validation_sketches)

Norms (`logit_norms`, `head_norms`, `hidden_norms`) are magnitudes: they find tokens with a large gradient,
not tokens that help. Influence is an inner product of gradients (`matrix`, `less_scores`,
`greedy_select`).
"""

from tokfuse.algorithms.capture import Captured, capture
from tokfuse.algorithms.captured_layers import layers
from tokfuse.algorithms.influence import adam_features, greedy_select, less_scores, matrix, ugda_select
from tokfuse.runtime.ops.influence import InfluenceSpec, head_norms, hidden_norms, logit_norms, sketch
from tokfuse.runtime.policy.results import Influence

__all__ = [
    "Captured",
    "Influence",
    "InfluenceSpec",
    "adam_features",
    "capture",
    "greedy_select",
    "head_norms",
    "hidden_norms",
    "layers",
    "less_scores",
    "logit_norms",
    "matrix",
    "sketch",
    "ugda_select",
]
