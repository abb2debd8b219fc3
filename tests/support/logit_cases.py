"""Difficult rows of logits, and float64 formulas for the expected results of an op."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

INF = float("inf")
FORWARD_ATOL = 2e-5  # nats for |logit| <= 100; relative above
GRADIENT_RTOL = 2e-6  # relative to a row's largest term, before the target's term and p cancel


class Truth(NamedTuple):
    """float64 statistics and gradient. `term` is the largest gradient term of each row."""

    logp: Tensor
    entropy: Tensor
    lse: Tensor
    sum_sq: Tensor
    top1: Tensor
    grad: Tensor
    term: Tensor


def transformed(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    bias_logits: Tensor | None = None,
    bias_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Return (u / T, d u / d logits / T) in float64. An excluded logit stays -inf."""
    z = logits.double() * logit_scale
    excluded, slope = z == -INF, torch.full_like(z, logit_scale)
    if softcap is not None:
        t = torch.tanh(torch.where(excluded, 0.0, z) / softcap)
        z, slope = softcap * t, torch.where(excluded, 0.0, logit_scale * (1 - t * t))
    if bias_logits is not None:
        z = z - bias_scale * bias_logits.double()
    z = torch.where(excluded, -INF, z)
    divisor = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    return z / divisor, slope / divisor


def truth(logits: Tensor, target: Tensor, ga: Tensor, gh: Tensor, mask: Tensor | None = None, **options: Any) -> Truth:
    """Compute the formulas in the docstring of `token_stats`, and d (ga logp + gh entropy) / d logits."""
    u, slope = transformed(logits, **options)
    keep = torch.ones(len(u), dtype=torch.bool) if mask is None else mask
    dead = (u == -INF).all(1)
    usable = (keep & ~dead).unsqueeze(1)
    u = torch.where(usable, u, 0.0)
    y = torch.where(keep, target, 0).unsqueeze(1)
    high = u.amax(1, keepdim=True)
    e = (u - high).exp()
    total = e.sum(1, keepdim=True)
    p = e / total
    log_p = torch.where(p == 0, 0.0, u - high - total.log())  # p log p = 0 at p = 0
    logp = (u.gather(1, y) - high - total.log()).squeeze(1)
    entropy = -(p * log_p).sum(1)
    onehot = torch.zeros_like(p).scatter_(1, y, 1.0)
    ga, gh = ga.double().unsqueeze(1), gh.double().unsqueeze(1)
    slope = torch.where(usable, slope, 0.0)
    grad = slope * (ga * (onehot - p) - gh * p * (log_p + entropy.unsqueeze(1)))
    # log p + H is a difference of float32 numbers near 1. The 0.1 covers their rounding.
    log_term = log_p.abs() + entropy.unsqueeze(1) + 0.1
    term = ga.abs() * (onehot + p) + gh.abs() * p * log_term
    # 1 - tanh^2 is such a difference too.
    slope_term = 0.0 if options.get("softcap") is None else 0.1 * options.get("logit_scale", 1.0)
    at = torch.where(dead, -INF, 0.0)

    def final(x: Tensor, of_dead: Tensor) -> Tensor:
        return torch.where(keep, torch.where(dead, of_dead, x), 0.0)

    none = torch.zeros_like(at)
    return Truth(
        final(logp, at),
        final(entropy, none),
        final((high + total.log()).squeeze(1), at),
        final((p * p).sum(1), none),
        final((u.gather(1, y) == high).double().squeeze(1), none),
        grad,
        ((slope + slope_term) * term).amax(1, keepdim=True),
    )


@dataclass(frozen=True)
class Case:
    """A named batch. `fill` writes the values (float32), `layout` changes the strides."""

    name: str
    tokens: int
    vocab: int
    fill: Callable[[Tensor, torch.Generator], Tensor] | None = None
    layout: Callable[[Tensor], Tensor] | None = None
    options: Callable[[int, torch.Generator], dict[str, Any]] = field(default=lambda t, g: {})
    target: int | None = None
    scale: float = 4.0

    def make(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, Any]]:
        """Return (logits, target, options) on the CPU, the same values in each call."""
        gen = torch.Generator().manual_seed(len(self.name) + 31 * self.vocab)
        logits = torch.randn(self.tokens, self.vocab, generator=gen) * self.scale
        if self.fill is not None:
            logits = self.fill(logits, gen)
        target = torch.randint(0, self.vocab, (self.tokens,), generator=gen)
        if self.target is not None:
            target[:] = self.target % self.vocab
        logits = logits.to(dtype)
        if self.layout is not None:
            logits = self.layout(logits)
        return logits, target, self.options(self.tokens, gen)


def _write(rows: slice | int, columns: slice | int, value: float) -> Callable[..., Tensor]:
    def fill(z: Tensor, gen: torch.Generator) -> Tensor:
        z[rows, columns] = value
        return z

    return fill


def _drop(share: float) -> Callable[..., Tensor]:
    def fill(z: Tensor, gen: torch.Generator) -> Tensor:
        z[torch.rand(z.shape, generator=gen) < share] = -INF
        z[:, 0] = 1.0  # at least one logit in every row
        return z

    return fill


def _uniform(low: float, high: float) -> Callable[..., Tensor]:
    return lambda z, gen: torch.rand(z.shape, generator=gen) * (high - low) + low


def _padded_rows(z: Tensor) -> Tensor:
    """Return rows that are 13 elements apart, with NaN between them."""
    wide = torch.full((z.shape[0], z.shape[1] + 13), float("nan"), dtype=z.dtype)
    wide[:, 3:-10] = z
    return wide[:, 3:-10]


def _mask(tokens: int, gen: torch.Generator) -> Tensor:
    mask = torch.rand(tokens, generator=gen) < 0.6
    mask[0], mask[-1] = False, True
    return mask


TAILS = (1, 2, 15, 16, 17, 2047, 2048, 2049, 4096, 5003, 49155)
CASES = (
    *(Case(f"vocab_{v}", 3, v) for v in TAILS),
    Case("no_tokens", 0, 33),
    Case("one_token", 1, 33),
    Case("one_column", 5, 1, _write(2, 0, -INF)),
    Case("large_values", 6, 3001, _uniform(-100.0, 100.0)),
    Case("all_negative", 4, 700, _uniform(-100.0, -60.0)),
    Case("uniform_rows", 3, 2500, _write(slice(None), slice(None), 7.25)),
    Case("one_large_is_target", 4, 2300, _write(slice(None), 2100, 100.0), target=2100),
    Case("one_large_is_not_target", 4, 2300, _write(slice(None), 2100, 100.0), target=5),
    Case("masked_vocab_some", 6, 2300, _drop(0.3)),
    Case("masked_vocab_most", 6, 5003, _drop(0.99)),
    Case("first_block_excluded", 3, 5003, _write(slice(None), slice(0, 2048), -INF), target=5002),
    Case("middle_block_excluded", 3, 7000, _write(slice(None), slice(2048, 4096), -INF), target=1),
    Case("last_block_excluded", 3, 5003, _write(slice(None), slice(4096, 5003), -INF), target=0),
    Case("target_excluded", 4, 2300, _write(slice(None), 7, -INF), target=7),
    Case("one_row_excluded", 4, 2300, _write(1, slice(None), -INF)),
    Case("all_rows_excluded", 3, 40, _write(slice(None), slice(None), -INF)),
    Case("padded_rows", 5, 2077, layout=_padded_rows),
    Case("same_row_for_all", 6, 2077, layout=lambda z: z[:1].expand(6, -1)),
    Case("transposed", 5, 300, layout=lambda z: z.t().contiguous().t()),
    Case("every_second_column", 4, 2100, layout=lambda z: z.repeat_interleave(2, 1)[:, ::2]),
    Case("temperature", 5, 2100, options=lambda t, g: {"temperature": 0.7}),
    Case("temperature_rows", 5, 2100, options=lambda t, g: {"temperature": torch.rand(t, generator=g) + 0.5}),
    Case("softcap", 5, 2100, _uniform(-90.0, 90.0), options=lambda t, g: {"softcap": 30.0}),
    Case("softcap_excluded", 5, 2100, _drop(0.4), options=lambda t, g: {"softcap": 3.0}),
    Case("logit_scale", 5, 2100, options=lambda t, g: {"logit_scale": 0.0625}),
    Case("mask", 7, 2100, options=lambda t, g: {"mask": _mask(t, g)}),
    Case("mask_all", 4, 50, options=lambda t, g: {"mask": torch.zeros(t, dtype=torch.bool)}),
    Case(
        "mask_some_excluded",
        7,
        2100,
        _drop(0.5),
        _padded_rows,
        options=lambda t, g: {
            "mask": _mask(t, g),
            "softcap": 20.0,
            "logit_scale": 1.5,
            "temperature": torch.rand(t, generator=g) + 0.5,
        },
    ),
)


def coefficients(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return incoming gradients of logp and entropy: both signs, and rows with zeros."""
    i = torch.arange(tokens)
    ga, gh = torch.cos(1.7 * i + 0.3), torch.sin(2.3 * i + 0.2)
    return torch.where(i % 5 == 3, 0.0, ga), torch.where(i % 3 == 2, 0.0, gh)
