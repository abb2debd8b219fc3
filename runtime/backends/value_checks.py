"""Check the values of tensors before the kernels of the CUDA and Triton backends are launched.

The CPU kernels check the values that they read. A device kernel cannot raise an error, so values are
checked before its launch: always for CPU tensors, on a GPU only with TOKFUSE_CHECK=1, because reading
them synchronises. Without the check, a row with a bad value gives NaN.
"""

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import check_values
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference import token_stats_at as at_reference

Launch = Callable[..., tuple[torch.Tensor, ...]]


def with_targets(launch: Launch) -> Launch:
    """Return `launch(logits, target, **options)` with a check of targets and temperatures before it."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, op: str = "token_stats", **options: Any
    ) -> tuple[torch.Tensor, ...]:
        if may_read(target):
            check_values(op, target, logits.shape[1], options["mask"], options["temperature"])
        return launch(logits, target, **options)

    return forward


def with_ids(launch: Launch) -> Launch:
    """`launch(logits, target, ids, offsets, **options)` after a check of targets, temperatures and ids.

    Rows of an index belong to a head, which has checked them.
    """

    def forward(
        logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        if options.get("index") is None and may_read(ids):
            vocab = logits.shape[1]
            at_reference.check_values(
                "token_stats", target, ids, offsets, vocab, options["mask"], options["temperature"]
            )
        return launch(logits, target, ids, offsets, **options)

    return forward


def with_support(launch: Launch) -> Launch:
    """Return `launch(logits, target, ids, offsets, **options)` with a check of their values before it."""

    def forward(
        logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
    ) -> tuple[torch.Tensor, ...]:
        if may_read(ids):
            kept_reference.check(logits, target, ids, offsets, options["mask"], options["temperature"])
        return launch(logits, target, ids, offsets, **options)

    return forward


def with_temperature(launch: Launch) -> Launch:
    """Return `launch(logits_p, logits_q, **options)` of paired_divergence with a check of temperatures before it."""

    def forward(logits_p: torch.Tensor, logits_q: torch.Tensor, **options: Any) -> tuple[torch.Tensor, ...]:
        temperature = options["temperature"]
        if isinstance(temperature, torch.Tensor) and may_read(temperature):
            check_temperature("paired_divergence", temperature, options["mask"])
        return launch(logits_p, logits_q, **options)

    return forward


def with_segment_ids(launch: Launch) -> Launch:
    """Return `launch(values, segment_ids, cu_seqlens, num_segments, mask)` with a check of the ids before it."""

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
    """Raise an error unless the temperature is > 0 in every row where mask is True."""
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
    """Raise an error unless the ids are in [0, num_segments) where mask is True."""
    outside = (ids < 0) | (ids >= num_segments)
    if mask is not None:
        outside = outside & mask
    if bool(outside.any()):
        refuse_segment_id(ids, int(outside.to(torch.uint8).argmax()), num_segments)


def refuse_segment_id(ids: torch.Tensor, row: int, num_segments: int) -> NoReturn:
    """Raise the error for the id of `row`."""
    want = f"in [0, num_segments) = [0, {num_segments})"
    raise refuse(
        "segment_moments",
        "segment_ids",
        want,
        f"{int(ids[row])} at row {row}",
        "Set mask to False in rows without a segment.",
    )
