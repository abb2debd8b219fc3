"""A batch of preference pairs, its per-sequence sums, and the formulas of the papers.

The formulas are float64, one pair at a time, so that you can compare them with the paper: chosen w, rejected r.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokfuse import algorithms
from tokfuse.algorithms import NLL, PreferenceBatch
from tokfuse.algorithms.registry import ENTRIES

LENGTHS = (3, 5, 0, 2, 4, 1, 6, 3, 2, 4)
# Pairs in any order. Sequences 2 (empty) and 9 are in no pair.
PAIRS = ((4, 1), (0, 7), (8, 6), (3, 5))
TOKENS = sum(LENGTHS)


def sequences(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return (cu_seqlens, mask, logp, ref_logp); values are exact in float32."""
    gen = torch.Generator().manual_seed(seed)
    cu = torch.nn.functional.pad(torch.tensor(LENGTHS).cumsum(0), (1, 0)).to(torch.int32)
    mask = torch.ones(TOKENS, dtype=torch.bool)
    mask[[1, 9, 20]] = False
    logp = -torch.rand(TOKENS, generator=gen) * 3 - 0.05
    ref = logp + torch.randn(TOKENS, generator=gen) * 0.6
    return cu, mask, logp.double(), ref.double()


def pair_batch(seed: int = 0, reference: bool = True, **given: Any) -> PreferenceBatch:
    cu, mask, _, ref = sequences(seed)
    fields = {"num_tokens": TOKENS, "cu_seqlens": cu, "mask": mask, "pairs": torch.tensor(PAIRS)}
    if reference and "ref_sum" not in given:
        fields["ref_logp"] = ref
    return PreferenceBatch(**{**fields, **given})


class S(NamedTuple):
    """One response: sums over its valid tokens, and their number."""

    lp: Tensor
    ref: float
    n: int

    @property
    def rho(self) -> Tensor:
        return self.lp - self.ref


def of_sequence(batch: PreferenceBatch, logp: Tensor, ref: Tensor, i: int) -> S:
    cu = batch.cu_seqlens.tolist()
    rows = [t for t in range(cu[i], cu[i + 1]) if batch.mask is None or bool(batch.mask[t])]
    return S(logp[rows].sum(), ref[rows].sum(), len(rows))


def sig(x: Any) -> Tensor:
    return 1 / (1 + (-torch.as_tensor(x)).exp())


def logsig(x: Any) -> Tensor:
    return sig(x).log()


def delta(w: S, r: S) -> Tensor:
    return w.rho - r.rho


def odds(a: Tensor) -> Tensor:
    return (a.exp() / (1 - a.exp())).log()


def js(x: Tensor) -> Tensor:
    return logsig(x)


B = 0.1
# name -> (options, loss of one pair)
PAIRWISE: dict[str, tuple[dict[str, Any], Any]] = {
    "dpo": ({}, lambda w, r: -logsig(B * delta(w, r))),
    "conservative_dpo": (
        {"smoothing": 0.2},
        lambda w, r: -0.8 * logsig(B * delta(w, r)) - 0.2 * logsig(-B * delta(w, r)),
    ),
    "robust_dpo": (
        {"smoothing": 0.2},
        lambda w, r: (-0.8 * logsig(B * delta(w, r)) + 0.2 * logsig(-B * delta(w, r))) / 0.6,
    ),
    "slic": ({"beta": 0.9}, lambda w, r: (1 - 0.9 * delta(w, r)).clamp(min=0)),
    "ipo": ({}, lambda w, r: (w.rho / w.n - r.rho / r.n - 1 / (2 * B)) ** 2),
    "ipo_sum": ({}, lambda w, r: (delta(w, r) - 1 / (2 * B)) ** 2),
    "dpo_norm": ({}, lambda w, r: -logsig(B * (w.rho / w.n - r.rho / r.n))),
    "exo_pair": (
        {"smoothing": 0.05},
        lambda w, r: sum(
            q * (q.log() - math.log(p)) for q, p in ((sig(B * delta(w, r)), 0.95), (sig(-B * delta(w, r)), 0.05))
        ),
    ),
    "discopop": (
        {},
        lambda w, r: (
            (1 - sig(delta(w, r))) * -logsig(0.05 * delta(w, r)) + sig(delta(w, r)) * (-0.05 * delta(w, r)).exp()
        ),
    ),
    "f_dpo": ({}, lambda w, r: -logsig(B * (js(w.rho) - js(r.rho)))),
    "apo_zero": ({}, lambda w, r: 1 - sig(B * w.rho) + sig(B * r.rho)),
    "apo_down": ({}, lambda w, r: sig(B * w.rho) + 1 - sig(B * delta(w, r))),
    "nca_pair": ({}, lambda w, r: -logsig(B * w.rho) - 0.5 * logsig(-B * w.rho) - 0.5 * logsig(-B * r.rho)),
    "sppo_hard": ({}, lambda w, r: (w.rho - 0.5 / B) ** 2 + (r.rho + 0.5 / B) ** 2),
    "bco_pair": ({"shift": "none"}, lambda w, r: -logsig(B * w.rho) - logsig(-B * r.rho)),
    "seppo": ({}, lambda w, r: -logsig(B * (w.rho - (1 if w.rho > 0 else -1) * r.rho))),
    "simpo": ({}, lambda w, r: -logsig(2 * (w.lp / w.n - r.lp / r.n) - 1)),
    "orpo": ({}, lambda w, r: -w.lp / w.n - 0.1 * logsig(odds(w.lp / w.n) - odds(r.lp / r.n))),
    "rpo": ({}, lambda w, r: -logsig(0.01 * delta(w, r)) - 0.005 * 0.01 * w.lp),
    "rpo_mean": ({"nll": NLL(coef=0.005)}, lambda w, r: -logsig(0.01 * delta(w, r)) - 0.005 * w.lp / w.n),
}

OPTIONS: dict[str, dict[str, Any]] = {"aries": {"level_weight": (1.0, 0.5)}, "rpo_mean": {"nll": NLL(coef=0.005)}}
# The methods of kind "preference" that are losses of sequences.
LOSSES = [
    name
    for name in algorithms.list("preference")
    if isinstance(cls := ENTRIES[name].cls, type) and issubclass(cls, algorithms.PreferenceLoss)
]


def example(name: str, **options: Any) -> Any:
    return algorithms.make(name, **{**OPTIONS.get(name, {}), **options})


def example_batch(loss: Any, **given: Any) -> PreferenceBatch:
    """Return a batch with the inputs that the loss reads."""
    if loss.name == "kto":
        good = torch.tensor([i % 3 != 1 for i in range(len(LENGTHS))])
        given = {"pairs": None, "desirable": good, "kl": torch.tensor(0.3), **given}
    if getattr(loss, "level_weight", None):
        levels = torch.tensor([0, 1, 0, 2]) % len(loss.level_weight)
        given = {"level": levels, **given}
    return pair_batch(reference=loss.needs_reference, **given)
