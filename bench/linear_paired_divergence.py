"""Case `linear_paired_divergence`: as `distill_step`, with the mean over the tokens and autograd outside of the op.

Inputs, peers and limit are those of `distill_step`. The op returns differentiable divergences, so its backward
computes the logits of both sides again, which the limit does not.
"""

import torch

from tokfuse.bench import distill_step, ours
from tokfuse.bench.distill_step import Inputs, leaves
from tokfuse.bench.measure import Outputs, Provider
from tokfuse.bench.problem import Config, Problem

OP = "linear_paired_divergence"
SHAPES, QUICK_SHAPES, DTYPES = distill_step.SHAPES, distill_step.QUICK_SHAPES, distill_step.DTYPES
CASES = tuple(("forward+backward", variant) for _, variant in distill_step.CASES)


def build(config: Config, peer_names: list[str]) -> Problem:
    """The problem of one configuration."""
    return distill_step.problem(config, peer_names, _ours)


def _ours(data: Inputs) -> Provider:
    op = ours.public("linear_paired_divergence")
    hidden, weight = leaves(data)

    def run() -> Outputs:
        stats = op(hidden, weight, data.teacher_hidden, data.teacher_weight, kind=data.kind)
        loss = stats.divergence.mean()
        grad_hidden, grad_weight = torch.autograd.grad(loss, (hidden, weight))
        found = {"divergence": stats.divergence, "entropy": stats.entropy}
        return {"loss": loss, **found, "grad_hidden": grad_hidden, "grad_weight": grad_weight}

    return ours.provider(run)
