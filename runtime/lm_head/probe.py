"""Probes of the lm_head: projections of the gradient of the logits, from the chunks that hold it.

An op from hidden states never stores the gradient of all logits. A probe multiplies each chunk of it by a small
matrix, next to the gradient GEMMs. `tokfuse.influence.capture` uses it to see the lm_head inside these ops.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch


class HeadProbe(NamedTuple):
    """A request for dz @ projection.T of every token, where dz is the gradient of its logits."""

    projection: torch.Tensor
    """(rank, vocab) float32, or float64 for float64 hidden states."""
    out: torch.Tensor
    """(tokens, rank), in the dtype of the projection. Rows without gradient stay 0."""
    record: Callable[[torch.Tensor], None]
    """Takes `out`, multiplied by the gradient of the loss, in the backward."""

    @staticmethod
    def of(projection: torch.Tensor, tokens: int, record: Callable[[torch.Tensor], None]) -> "HeadProbe":
        """Return a probe with an empty output."""
        return HeadProbe(projection, projection.new_zeros(tokens, projection.shape[0]), record)

    def emptied(self) -> "HeadProbe":
        """Return the same request with a new output, for a backward that computes the gradient itself."""
        return self._replace(out=torch.zeros_like(self.out))


Probes = tuple[HeadProbe, ...]


def deliver(probes: Probes, grad_loss: torch.Tensor | None = None) -> None:
    """Pass the outputs on. grad_loss: factor of gradients that were computed in the forward. None: 1."""
    for probe in probes:
        probe.record(probe.out if grad_loss is None else probe.out * grad_loss)


def with_probes(hidden: torch.Tensor, weight: torch.Tensor, probes: Probes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states and weight with extra columns, so that autograd delivers the probes.

    The extra columns of hidden are 0, so the logits do not change, and their gradient is dz @ projection.T. Only the
    reference uses this: it copies the weight.
    """
    for probe in probes:
        columns = hidden.new_zeros(probe.out.shape).requires_grad_()
        columns.register_hook(probe.record)
        hidden = torch.cat([hidden, columns], 1)
        weight = torch.cat([weight, probe.projection.t().to(weight.dtype)], 1)
    return hidden, weight


class ProbeSource(Protocol):
    """An open `capture`, which decides about probes."""

    def probe(
        self, op: str, hidden: torch.Tensor, weight: torch.Tensor, cu_seqlens: torch.Tensor | None
    ) -> HeadProbe | None:
        """Return the probe of a call, or None if this head is not captured."""

    def captures_head(self, hidden_size: int) -> bool:
        """Return whether a head over this hidden size is captured."""


_sources: list[ProbeSource] = []


@contextlib.contextmanager
def open_source(source: ProbeSource) -> Iterator[None]:
    """Context manager: calls inside it ask this source for probes."""
    _sources.append(source)
    try:
        yield
    finally:
        _sources.remove(source)


def sources() -> list[ProbeSource]:
    """Return the open sources."""
    return _sources
