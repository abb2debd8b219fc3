"""Metric sums of a policy loss: numerators and denominators that can be merged across batches and ranks."""

from dataclasses import dataclass

import torch

# Slots of the metric vector. The order must match csrc/common/objective.h::Metric.
SLOTS = (
    "tokens",
    "all_tokens",
    "seqs",
    "loss",
    "masked",
    "clip_low",
    "clip_high",
    "dual_clip",
    "kl_k1",
    "kl_k3",
    "ref_kl_k1",
    "ref_kl_k3",
    "ratio",
    "ratio_min",
    "ratio_max",
    "entropy",
    "grad_rows",
)
SLOT = {name: i for i, name in enumerate(SLOTS)}
_PER_TOKEN = ("clip_low", "clip_high", "dual_clip", "kl_k1", "kl_k3", "ratio", "grad_rows")


class NamedMeans:
    """Metrics that can be read by name."""

    def mean(self) -> dict[str, float]:
        """Return every metric as a number."""
        raise NotImplementedError

    def __getitem__(self, name: str) -> float:
        values = self.mean()
        if name not in values:
            raise KeyError(f"{type(self).__name__}: name must be one of {', '.join(values)}; got {name!r}.")
        return values[name]


@dataclass(frozen=True)
class Metrics(NamedMeans):
    """Metric sums over the valid tokens of one or more batches, without gradient.

    Attributes:
        sums: (17,) float64, in the order of `SLOTS`: the numerator of every metric, the counts that
            divide them, and the extremes of the ratio. Add two `Metrics` to merge them. Across ranks,
            all-reduce `sums` with SUM, but ratio_min with MIN and ratio_max with MAX.
        absent: metrics whose input was not given (no entropy, no ref_logp).
        sampler_kl_k3: sum over valid tokens of the k3 estimate of KL(sampler || old), or None.

    `mean()` returns these metrics, as means over valid tokens unless stated otherwise:

    * clip_low, clip_high, dual_clip: fraction of tokens whose gradient the clip removed, by side.
    * kl_k1, kl_k3: k1 and k3 estimate of KL(old || current).
    * ref_kl_k1, ref_kl_k3: k1 and k3 estimate of KL(current || reference).
    * sampler_kl_k3: k3 estimate of KL(sampler || old).
    * ratio, ratio_min, ratio_max: mean and extremes of the ratio.
    * entropy: mean entropy, nats.
    * masked: fraction of all tokens that the mask excludes.
    * grad_rows: fraction of tokens whose final coefficient is not zero. It is NaN on the reference
      backend inside torch.compile, because the backward runs later there.
    * loss, tokens, seqs: sums, not means.
    """

    sums: torch.Tensor
    absent: frozenset[str] = frozenset()
    sampler_kl_k3: torch.Tensor | None = None

    def __add__(self, other: "Metrics") -> "Metrics":
        sums = self.sums + other.sums
        low, high = SLOT["ratio_min"], SLOT["ratio_max"]
        sums[low] = torch.minimum(self.sums[low], other.sums[low])
        sums[high] = torch.maximum(self.sums[high], other.sums[high])
        sampler = None
        if self.sampler_kl_k3 is not None and other.sampler_kl_k3 is not None:
            sampler = self.sampler_kl_k3 + other.sampler_kl_k3
        return Metrics(sums, self.absent | other.absent, sampler)

    def mean(self) -> dict[str, float]:
        """Return every metric as a number. Reads the device once. Without a valid token the fractions are 0."""
        sums = dict(zip(SLOTS, self.sums.tolist(), strict=True))
        tokens = max(sums["tokens"], 1.0)
        names = [*_PER_TOKEN, "ref_kl_k1", "ref_kl_k3", "entropy"]
        out = {name: sums[name] / tokens for name in names if name not in self.absent}
        if self.sampler_kl_k3 is not None:
            out["sampler_kl_k3"] = float(self.sampler_kl_k3) / tokens
        out["ratio_min"], out["ratio_max"] = sums["ratio_min"], sums["ratio_max"]
        out["masked"] = sums["masked"] / max(sums["all_tokens"], 1.0)
        return out | {name: sums[name] for name in ("loss", "tokens", "seqs")}
