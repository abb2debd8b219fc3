"""unit_step: a loss over whole sequences or pairs of sequences, and its gradient, from hidden states.

`tokfuse.algorithms.preference_step` calls it. It has no rows in the table of backends: the
linear_token_stats record of each backend contains its run. lm_head/units.py describes the passes.
"""

import functools
from typing import NamedTuple

import torch

from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.core.forward_gradients import Computed, Gradients, with_gradients
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head import reference_runs
from tokfuse.runtime.lm_head.probe import deliver, with_probes
from tokfuse.runtime.lm_head.problem import NAMES, HeadProblem
from tokfuse.runtime.lm_head.units import Loss, Units, UnitsRun, UnitStats
from tokfuse.runtime.ops import linear_token_stats as linear

# Limit in bytes up to which the default memory budget grows to fit the largest unit.
LARGEST_DEFAULT = 1 << 30


class UnitStep(NamedTuple):
    """Result of `unit_step`."""

    loss: torch.Tensor
    """(), differentiable."""
    stats: TokenStats
    """(tokens,), detached; 0 for tokens outside all units."""
    gradients: Gradients
    """Gradients of the loss for hidden, weight and bias."""
    read_twice: int
    """Number of rows whose logits were computed twice, because their unit exceeds the workspace."""


def unit_step(p: HeadProblem, units: Units, loss: Loss, *, own_budget: bool) -> UnitStep:
    """Return the loss of all units, and its gradients for hidden, weight and bias if they require grad.

    Args:
        p: the head and its inputs.
        units: the units, which are sequences or pairs of sequences.
        loss: function that computes the loss of units from their statistics.
        own_budget: True if the caller chose `p.memory_budget`. Otherwise the budget grows to fit the
            largest unit, up to 1 GiB.
    """
    capability = select(linear.OP, p.hidden.device.type, p.dtype, p.options.features())
    if torch.compiler.is_compiling():  # before the comparison below: torch.compile cannot guard a run of the registry
        return _composed(p, units, loss)
    run: UnitsRun | None = capability.run.units
    if run is None and p.row_norms is not None:
        run = reference_runs.unit_step
    if run is None:
        return _composed(p, units, loss)
    if not own_budget:
        row = 6 * (p.vocab + 16) + 8 * p.hidden.shape[1] + 64
        grown = min(units.largest * row, LARGEST_DEFAULT)
        p = p._replace(memory_budget=max(p.memory_budget, grown))
    if not torch.is_grad_enabled() and p.row_norms is None:
        p = p._replace(needs=(False, False, False))
    gradients: Gradients = {}
    read_twice = 0

    def compute() -> Computed:
        nonlocal read_twice
        found = run(p, units, loss)
        read_twice = found.read_twice
        return found.loss.to(found.stats.logp.dtype), found.stats, found.gradients

    leaves = dict(zip(NAMES, (p.hidden, p.weight, p.bias), strict=True))
    value, *stats = with_gradients(p.op, leaves, compute, gradients, functools.partial(deliver, p.probes))
    return UnitStep(value, TokenStats(*stats), gradients, read_twice)


def _composed(p: HeadProblem, units: Units, loss: Loss) -> UnitStep:
    """Return the same result by `linear_token_stats` and autograd. The chunked passes must equal it."""
    o = p.options
    hidden, weight = with_probes(p.hidden, p.weight, p.probes)
    stats = linear.linear_token_stats(
        hidden,
        weight,
        p.target,
        bias=p.bias,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
        mask=o.mask,
        memory_budget=p.memory_budget,
    )
    of_units = UnitStats(*(x[units.order] for x in stats))
    total = loss(of_units, units.order, 0, len(units.border) - 1).to(stats.logp.dtype)
    return UnitStep(total, TokenStats(*(x.detach() for x in stats)), {}, 0)
