"""Checks of the values of a call's tensors, in front of the kernels of the two device backends.

The CPU kernels check while they read. A device kernel cannot raise, so the values are read before
its launch: on the CPU always, on a GPU only with TOKFUSE_CHECK=1. Otherwise a bad row is NaN.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import check_values
from tokfuse.runtime.reference import kept_token_stats as kept_reference

Launch = Callable[..., tuple[torch.Tensor, ...]]


def with_targets(launch: Launch) -> Launch:
    """`launch(logits, target, **options)` after a check of targets and temperatures."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, op: str = "token_stats", **options: Any
    ) -> tuple[torch.Tensor, ...]:
        if may_read(target):
            check_values(op, target, logits.shape[1], options["mask"], options["temperature"])
        return launch(logits, target, **options)

    return forward


def with_support(launch: Launch) -> Launch:
    """`launch(logits, target, ids, offsets, **options)` after a check of ids, targets and temperatures."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        if may_read(ids):
            kept_reference.check(logits, target, ids, offsets, options["mask"], options["temperature"])
        return launch(logits, target, ids, offsets, **options)

    return forward


def with_temperature(launch: Launch) -> Launch:
    """`launch(logits_p, logits_q, **options)` of paired_divergence after a check of temperatures."""

    def forward(logits_p: torch.Tensor, logits_q: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        temperature = options["temperature"]
        if isinstance(temperature, torch.Tensor) and may_read(temperature):
            check_temperature("paired_divergence", temperature, options["mask"])
        return launch(logits_p, logits_q, **options)

    return forward


def with_segment_ids(launch: Launch) -> Launch:
    """`launch(values, segment_ids, cu_seqlens, num_segments, mask)` after a check of the ids."""

    def forward(
        values: torch.Tensor,
        segment_ids: torch.Tensor | None,
        cu_seqlens: torch.Tensor | None,
        num_segments: int,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        if segment_ids is not None and may_read(segment_ids):
            check_segment_ids(segment_ids, num_segments, mask)
        return launch(values, segment_ids, cu_seqlens, num_segments, mask)

    return forward


def check_temperature(op: str, temperature: torch.Tensor, mask: torch.Tensor | None) -> None:
    """A temperature > 0 in every row where mask is True."""
    bad = ~(temperature > 0) if mask is None else ~(temperature > 0) & mask
    if bool(bad.any()):
        refuse_temperature(op, temperature, int(bad.to(torch.uint8).argmax()))


def refuse_temperature(op: str, temperature: torch.Tensor, row: int) -> NoReturn:
    """Raise the error for the temperature of `row`."""
    raise refuse(
        op,
        "temperature",
        "> 0 in every row where mask is True",
        f"{float(temperature[row])} in row {row}",
        "Mask the row.",
    )


def check_segment_ids(ids: torch.Tensor, num_segments: int, mask: torch.Tensor | None) -> None:
    """Ids in [0, num_segments) where mask is True."""
    outside = (ids < 0) | (ids >= num_segments)
    if mask is not None:
        outside = outside & mask
    if bool(outside.any()):
        refuse_segment_id(ids, int(outside.to(torch.uint8).argmax()), num_segments)


def refuse_segment_id(ids: torch.Tensor, row: int, num_segments: int) -> NoReturn:
    """Raise the error for the id of `row`."""
    want = f"in [0, num_segments) = [0, {num_segments})"
    raise refuse("segment_moments", "segment_ids", want, f"{int(ids[row])} at row {row}", "Mask rows without one.")
