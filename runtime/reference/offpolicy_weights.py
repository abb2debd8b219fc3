"""Reference of `tokfuse.offpolicy_weights`: off-policy weights in plain torch."""

from typing import NamedTuple, Protocol

import torch

from tokfuse.runtime.reference.segments import groups_of, segment_sum, sequence_index

LOG_RATIO_CLAMP = 20.0


class Rule(Protocol):
    """The fields of `tokfuse.KeepRule` that the reference reads."""

    statistic: str
    over: str
    low: float | None
    high: float | None
    negative_only: bool


class _Layout(NamedTuple):
    mask: torch.Tensor  # (rows,)
    seq: torch.Tensor  # (rows,) sequence of each row
    num_seqs: int
    length: torch.Tensor  # (seqs,) valid rows, float64


def offpolicy_weights(
    logp: torch.Tensor | None,
    behavior_logp: torch.Tensor,
    *,
    level: str,
    mode: str,
    low: float | None,
    high: float | None,
    lam: float | None,
    power: float | None,
    normalize: str,
    rules: tuple[Rule, ...],
    cu_seqlens: torch.Tensor | None,
    mask: torch.Tensor | None,
    group_ids: torch.Tensor | None,
    advantage: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (weight, ess, kept_mask), computed in float64. weight and ess have the dtype of `behavior_logp`."""
    layout = _layout(behavior_logp, cu_seqlens, mask)
    d = -behavior_logp.double() if logp is None else logp.double() - behavior_logp.double()
    d = _clamped(d)
    d = torch.where(layout.mask, d, torch.zeros_like(d))
    over = {"sequence": "sum", "geometric": "mean"}.get(level, "token")
    ratio = _clamped(_reduced(d, layout, over)).exp()
    kept = layout.mask
    if mode == "mask":
        kept = kept & _inside(ratio, low, high)
    for rule in rules:
        kept = kept & _rule_keeps(d, layout, rule, advantage)
    weight = transform(ratio, mode, low, high, lam, power)
    weight = torch.where(kept, weight, torch.zeros_like(weight))
    # A unit is a kept row, or, at the sequence levels, a sequence with a kept row.
    unit = kept if over == "token" else _first_kept(kept, layout)
    if normalize != "none":
        mean = _unit_mean(weight, unit, layout, group_ids, normalize)
        # If the mean is 0, all weights are 0 and stay 0. A rejected row also stays 0 if the mean is NaN.
        weight = torch.where(kept & (mean != 0), weight / mean, torch.zeros_like(weight))
    units = torch.where(unit, weight, torch.zeros_like(weight))
    total, square = units.sum(), (units**2).sum()
    ess = torch.where(square > 0, total**2 / square, square)
    return weight.to(behavior_logp.dtype), ess.to(behavior_logp.dtype), kept


def transform(
    w: torch.Tensor, mode: str, low: float | None, high: float | None, lam: float | None, power: float | None
) -> torch.Tensor:
    """Return the weight of a kept row from its ratio w."""
    if mode == "truncate":
        return w.clamp(min=low, max=high)
    if mode == "switch":
        assert high is not None
        return torch.where(w > high, torch.zeros_like(w), w)
    if mode == "shrink":
        assert lam is not None
        return lam * w / (w * w + lam)
    if mode == "subgaussian":
        assert lam is not None
        return w / (1.0 - lam + lam * w)
    if mode == "tempered":
        assert power is not None
        return w**power
    return torch.ones_like(w) if mode == "keep" else w  # ips, mask


def _layout(rows: torch.Tensor, cu_seqlens: torch.Tensor | None, mask: torch.Tensor | None) -> _Layout:
    num_rows = rows.shape[0]
    if mask is None:
        mask = torch.ones(num_rows, dtype=torch.bool, device=rows.device)
    if cu_seqlens is None:
        seq = torch.arange(num_rows, device=rows.device)
        return _Layout(mask, seq, num_rows, mask.double())
    seq, num_seqs = sequence_index(cu_seqlens, num_rows), cu_seqlens.shape[0] - 1
    return _Layout(mask, seq, num_seqs, segment_sum(mask.double(), seq, num_seqs))


def _clamped(x: torch.Tensor) -> torch.Tensor:
    return x.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP)


def _reduced(x: torch.Tensor, layout: _Layout, over: str) -> torch.Tensor:
    """Return x per row, or its masked sum, mean or maximum over the row's sequence, broadcast to rows."""
    if over == "token":
        return x
    if over == "max":
        lowest = torch.full((layout.num_seqs,), -float("inf"), dtype=x.dtype, device=x.device)
        valid = torch.where(layout.mask, x, -float("inf"))
        return lowest.scatter_reduce(0, layout.seq, valid, "amax")[layout.seq]
    total = segment_sum(torch.where(layout.mask, x, 0.0), layout.seq, layout.num_seqs)
    return (total if over == "sum" else total / layout.length.clamp_min(1.0))[layout.seq]


def _inside(x: torch.Tensor, low: float | None, high: float | None) -> torch.Tensor:
    """Return low <= x <= high. NaN counts as inside, so that it stays visible in the result."""
    outside = torch.zeros_like(x, dtype=torch.bool)
    if low is not None:
        outside = outside | (x < low)
    if high is not None:
        outside = outside | (x > high)
    return ~outside


def _rule_keeps(d: torch.Tensor, layout: _Layout, rule: Rule, advantage: torch.Tensor | None) -> torch.Tensor:
    if rule.statistic == "ratio":
        x = _clamped(_reduced(d, layout, rule.over)).exp()
    else:
        per_row = {"k1": -d, "k2": 0.5 * d * d, "k3": d.exp() - 1.0 - d}[rule.statistic]
        x = _reduced(per_row, layout, rule.over)
    keeps = _inside(x, rule.low, rule.high)
    if rule.negative_only:
        assert advantage is not None
        keeps = keeps | (advantage >= 0)
    return keeps


def _first_kept(kept: torch.Tensor, layout: _Layout) -> torch.Tensor:
    """Return True for the first kept row of every sequence, so that each sequence is one unit."""
    num_rows = kept.shape[0]
    place = torch.arange(num_rows, device=kept.device)
    first = torch.full((layout.num_seqs,), num_rows, device=kept.device, dtype=torch.int64)
    first = first.scatter_reduce(0, layout.seq, torch.where(kept, place, num_rows), "amin")
    return first[layout.seq] == place


def _unit_mean(
    weight: torch.Tensor, unit: torch.Tensor, layout: _Layout, group_ids: torch.Tensor | None, normalize: str
) -> torch.Tensor:
    """Return the mean weight over the units of the batch, or of the group of each row."""
    units = torch.where(unit, weight, torch.zeros_like(weight))
    if normalize == "batch":
        return units.sum() / unit.sum()
    assert group_ids is not None
    index = groups_of(group_ids).member[layout.seq]
    total = segment_sum(units, index, layout.num_seqs)
    return (total / segment_sum(unit.double(), index, layout.num_seqs))[index]
