"""Reference of `tokfuse.policy_loss`: objectives in plain torch and float64, differentiable in logp and entropy.

The formulas of the policy terms are defined in runtime/policy/shapes.py.
"""

from typing import NamedTuple

import torch

from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOT, SLOTS
from tokfuse.runtime.policy.objective import AGGREGATIONS, KL, Objective
from tokfuse.runtime.policy.shapes import TermInputs, clamped, straight_through
from tokfuse.runtime.reference.token_stats import rounded


class Segments(NamedTuple):
    """The assignment of tokens to sequences."""

    ids: torch.Tensor
    """(tokens,) int64, sequence of each token."""
    counts: torch.Tensor
    """(seqs,) int64, number of valid tokens of each sequence."""

    def mean(self, x: torch.Tensor, *, as_sum: bool = False) -> torch.Tensor:
        """Return the mean (or sum) of x per sequence, broadcast to tokens."""
        total = torch.zeros_like(self.counts, dtype=x.dtype).index_add(0, self.ids, x)
        if not as_sum:
            total = total / self.counts.clamp(min=1)
        return total[self.ids]


def segments(inputs: PolicyInputs, keep: torch.Tensor) -> Segments:
    """Return the assignment of tokens to sequences by cu_seqlens. Without it all tokens are one sequence."""
    tokens = keep.shape[0]
    if inputs.cu_seqlens is None:
        ids = torch.zeros(tokens, dtype=torch.int64, device=keep.device)
        seqs = 1
    else:
        lengths = (inputs.cu_seqlens[1:] - inputs.cu_seqlens[:-1]).long()
        seqs = lengths.shape[0]
        index = torch.arange(seqs, device=keep.device)
        ids = torch.repeat_interleave(index, lengths, output_size=tokens)
    counts = torch.zeros(seqs, dtype=torch.int64, device=keep.device).index_add(0, ids, keep.long())
    return Segments(ids, counts)


def _kl_term(kl: KL, o: Objective, logp: torch.Tensor, ref: torch.Tensor, d: torch.Tensor) -> torch.Tensor:
    k = clamped(logp - ref, -kl.clamp, kl.clamp)
    k3 = torch.expm1(-k) + k
    match kl.estimator:
        case "k1":
            return k
        case "k2":
            return 0.5 * k * k
        case "k3":
            return k3
        case "ratio_k3":
            return clamped(d, -o.log_ratio_clamp, o.log_ratio_clamp).exp() * k3
        case "k1_straight":
            return straight_through(k, 0.5 * k * k)
        case "k3_straight":
            return straight_through(k3, 0.5 * k * k)
    return k.abs()


def forward(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    o: Objective,
    inv_normalizer: float | torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (loss, detached token_loss, metric sums). inv_normalizer < 0 selects the count of this batch.

    loss and token_loss are rounded once to the result dtype of `logp`. The sums are float64.
    """
    o.shape.check_signal("policy_loss", inputs.signal is not None)
    x = logp.double()
    keep = torch.ones_like(x, dtype=torch.bool) if inputs.mask is None else inputs.mask

    def vector(v: torch.Tensor | None, masked: float) -> torch.Tensor | None:
        return None if v is None else torch.where(keep, v.detach().double(), masked)

    def required(v: torch.Tensor | None) -> torch.Tensor:
        assert v is not None
        return v

    seg = segments(inputs, keep)
    per_token = inputs.advantage_level == "token"
    a = required(vector(inputs.advantage if per_token else inputs.advantage[seg.ids], 0.0))
    x = torch.where(keep, x, 0.0)
    old = x.detach() if inputs.old_logp is None else required(vector(inputs.old_logp, 0.0))
    raw = x - old
    d = o.shape.bound_tokens(raw, a, o.log_ratio_clamp)
    if o.level != "token":
        mean = seg.mean(torch.where(keep, d, 0.0), as_sum=o.level == "sequence_sum")
        d = mean if o.level != "sequence_token" else mean.detach() + (x - x.detach())
    d = o.shape.bound_level(d, o.log_ratio_clamp)

    loss, flags = o.shape.term(TermInputs(d, d.exp(), x, a, vector(inputs.signal, 0.0)))
    weight = vector(inputs.token_weight, 0.0)
    loss = loss if weight is None else weight * loss
    for term, ref, kl_weight in (
        (o.kl, inputs.ref_logp, inputs.kl_weight),
        (o.anchor, inputs.anchor_logp, inputs.anchor_weight),
    ):
        if term is not None:
            kl = _kl_term(term, o, x, required(vector(ref, 0.0)), raw)
            loss = loss + term.coef * (kl if kl_weight is None else required(vector(kl_weight, 0.0)) * kl)
    h = None if entropy is None else torch.where(keep, entropy.double(), 0.0)
    if o.entropy_coef != 0.0:
        h_weight = vector(inputs.entropy_weight, 0.0)
        bonus = required(h) if h_weight is None else h_weight * required(h)
        loss = loss - o.entropy_coef * bonus

    agg = keep.double()
    if AGGREGATIONS[o.aggregation].divides_by_length:
        agg = agg / seg.counts.clamp(min=1)[seg.ids]
    count = (seg.counts > 0).sum() if o.counts_sequences else keep.sum()
    if isinstance(inv_normalizer, float) and inv_normalizer < 0:
        inverse = 1.0 / count.clamp(min=1).double()  # without double(), 1 / integer tensor is float32
        scale: float | torch.Tensor = torch.where(count > 0, inverse, 0.0)
    else:
        scale = inv_normalizer
    token_loss = torch.where(keep, loss, 0.0) * agg * scale
    total = token_loss.sum()
    sums = _metric_sums(o, inputs, keep, seg, flags, raw, d, x, h, total)
    loss, token_loss = rounded((total, token_loss.detach()), logp.dtype)
    return loss, token_loss, sums


def _metric_sums(
    o: Objective,
    inputs: PolicyInputs,
    keep: torch.Tensor,
    seg: Segments,
    flags: dict[str, torch.Tensor],
    raw: torch.Tensor,
    d: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    loss: torch.Tensor,
) -> torch.Tensor:
    sums = torch.zeros(len(SLOTS), dtype=torch.float64, device=keep.device)
    with torch.no_grad():
        ratio, weight = d.exp(), keep.double()

        def put(name: str, value: torch.Tensor) -> None:
            sums[SLOT[name]] = value.detach().double()

        put("tokens", keep.sum())
        put("all_tokens", torch.tensor(keep.shape[0], device="cpu"))
        put("masked", (~keep).sum())
        put("seqs", (seg.counts > 0).sum() if inputs.cu_seqlens is not None else torch.tensor(0, device="cpu"))
        put("loss", loss)
        for name, flag in flags.items():
            put(name, (flag & keep).sum())
        put("kl_k1", -(weight * raw).sum())
        put("kl_k3", (weight * (torch.expm1(raw) - raw)).sum())
        if inputs.ref_logp is not None:
            k = torch.where(keep, logp - inputs.ref_logp, 0.0)
            put("ref_kl_k1", k.sum())
            put("ref_kl_k3", (torch.expm1(-k) + k).sum())
        put("ratio", (weight * ratio).sum())
        inf = torch.tensor(float("inf"), dtype=torch.float64, device=keep.device)
        put("ratio_min", torch.cat([torch.where(keep, ratio, inf), inf[None]]).min())
        put("ratio_max", torch.cat([torch.where(keep, ratio, -inf), -inf[None]]).max())
        if entropy is not None:
            put("entropy", entropy.sum())
    return sums
