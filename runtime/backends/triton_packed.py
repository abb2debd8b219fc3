"""Launch the Triton kernels over packed vectors. The launchers allocate their outputs."""

from typing import Any

import torch

from tokfuse.runtime.backends.device_sketch import device_sketch
from tokfuse.runtime.backends.triton_backend import launcher
from tokfuse.runtime.backends.value_checks import with_segment_ids
from tokfuse.runtime.policy.keep_rule import KeepRule

gae = launcher("gae", "gae")
group_advantage = launcher("group_advantage", "group_advantage")
ope = launcher("ope", "ope")
segment_moments = with_segment_ids(launcher("segment_moments", "segment_moments"))
sketch = device_sketch(launcher("influence", "sketch"))
vtrace = launcher("vtrace", "vtrace")
whiten = launcher("whiten", "whiten")
_offpolicy_weights = launcher("offpolicy_weights", "offpolicy_weights")


def offpolicy_weights(
    logp: torch.Tensor | None,
    behavior_logp: torch.Tensor,
    *,
    lam: float | None,
    power: float | None,
    rules: tuple[KeepRule, ...],
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (weight, ess, kept)."""
    out: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = _offpolicy_weights(
        behavior_logp,
        logp,
        param=lam or power,
        rules=tuple((r.statistic, r.over, r.low, r.high, r.negative_only) for r in rules),
        **options,
    )
    return out
