"""How `normalizer=` is read."""

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import Objective

Normalizer = float | int | str | torch.Tensor | None


def inverse_normalizer(op: str, normalizer: Normalizer, objective: Objective) -> float:
    """1 / normalizer; 1.0 for None, -1.0 for "batch" (the batch's own count)."""
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer != "batch":
            raise refuse(
                op,
                "normalizer",
                "None, a number, a 0-dim tensor or 'batch'",
                repr(normalizer),
                "Pass the global count.",
            )
        if objective.aggregation == "token_sum":
            raise refuse(
                op,
                "normalizer",
                "a number with aggregation='token_sum'",
                "'batch'",
                "Dr.GRPO divides by sequences * max length; pass that.",
            )
        return -1.0
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise refuse(
                op, "normalizer", "a 0-dim tensor", f"shape {tuple(normalizer.shape)}", "Pass the global count."
            )
        normalizer = float(normalizer)
    return 1.0 / checks.check_number(op, "normalizer", normalizer, 0.0, open_low=True)
