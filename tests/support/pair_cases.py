"""Student and teacher heads of different hidden sizes, and float64 formulas of what compares them."""

import math
from typing import Any, NamedTuple

import torch
from head_cases import SIZES, head_case
from torch import Tensor

INF = float("inf")
KINDS: dict[str, dict[str, Any]] = {
    "kl_forward": {"kind": "kl_forward"},
    "kl_reverse": {"kind": "kl_reverse"},
    "jsd": {"kind": "jsd"},
    "jsd 0.2": {"kind": "jsd", "beta": 0.2},
    "skew_forward": {"kind": "skew_forward"},
    "skew_reverse": {"kind": "skew_reverse", "alpha": 0.3},
    "tvd": {"kind": "tvd"},
}
TEACHER_HIDDEN = 40


class PairCase(NamedTuple):
    """CPU tensors of one batch."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    teacher_bias: Tensor
    target: Tensor


def pair_case(size: str = "tiles", dtype: torch.dtype = torch.float32, teacher_dtype: torch.dtype | None = None):
    """A teacher near enough that half of the rows have their maximum in one column."""
    case = head_case(size, torch.float32)
    tokens, hidden, vocab = SIZES[size]
    gen = torch.Generator().manual_seed(vocab + 1)
    more = TEACHER_HIDDEN - hidden
    teacher_hidden = torch.cat([case.hidden, torch.randn(tokens, more, generator=gen)], 1)
    teacher_weight = torch.cat([case.weight * 1.1, torch.randn(vocab, more, generator=gen) * 0.15], 1)
    teacher_bias = case.bias + 0.1 * torch.randn(vocab, generator=gen)
    other = teacher_dtype or dtype
    return PairCase(
        *(x.to(dtype) for x in (case.hidden, case.weight, case.bias)),
        *(x.to(other) for x in (teacher_hidden, teacher_weight, teacher_bias)),
        case.target,
    )


class PairTruth(NamedTuple):
    """Statistics and d (sum of c . statistics) / d inputs in float64, and the size of the summed terms.

    At 1e-5 of it, a term counts as in the tests of the logits: 4e-6 of a divergence's, 1e-8 of the
    others'.
    """

    stats: dict[str, Tensor]
    grad_logits: Tensor
    terms: Tensor

    def through_head(self, case: PairCase) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(gradients, sizes) of hidden, weight and bias."""
        h, w, dz = case.hidden.double(), case.weight.double(), self.grad_logits
        size = dz.abs() + self.terms
        grads = {"hidden": dz @ w, "weight": dz.t() @ h, "bias": dz.sum(0)}
        scales = {"hidden": size @ w.abs(), "weight": size.t() @ h.abs(), "bias": size.sum(0)}
        return grads, scales


def log_probs(z: Tensor, temperature: Any = 1.0, softcap: float | None = None, logit_scale: float = 1.0):
    """(log p, d u / d z, transformed logits)."""
    u, slope = z.double() * logit_scale, torch.full_like(z, logit_scale, dtype=torch.float64)
    if softcap is not None:
        t = torch.tanh(u / softcap)
        u, slope = torch.where(u == -INF, -INF, softcap * t), slope * (1 - t * t)
    divisor = torch.as_tensor(temperature, dtype=torch.float64).reshape(-1, 1)
    return torch.log_softmax(u / divisor, -1), slope / divisor, u


def of_kind(log_p: Tensor, log_q: Tensor, kind: str, beta: float = 0.5, alpha: float = 0.1) -> tuple[Tensor, Tensor]:
    """(divergence, d divergence / d (u / temperature)), both as the papers write them."""
    p, q = log_p.exp(), log_q.exp()

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        a = log_a.exp()
        return torch.where(a == 0, 0.0, a * (log_a - log_b)).sum(-1, keepdim=True)

    if kind == "kl_forward":
        value, grad = kl(log_q, log_p), p - q
    elif kind == "kl_reverse":
        value = kl(log_p, log_q)
        grad = torch.where(p == 0, 0.0, p * (log_p - log_q - value))
    elif kind == "tvd":
        value, s = 0.5 * (p - q).abs().sum(-1, keepdim=True), 0.5 * torch.sign(p - q)
        grad = p * (s - (p * s).sum(-1, keepdim=True))
    elif kind == "skew_forward":
        m = alpha * q + (1 - alpha) * p
        value, s = kl(log_q, m.log()), -(1 - alpha) * torch.where(m == 0, 0.0, q / m)
        grad = p * (s - (p * s).sum(-1, keepdim=True))
    elif kind == "skew_reverse":
        m = alpha * p + (1 - alpha) * q
        s = torch.where(p == 0, 0.0, (p / m).log() - alpha * p / m)
        value, grad = kl(log_p, m.log()), p * (s - (p * s).sum(-1, keepdim=True))
    else:
        log_m = torch.logaddexp(log_q + math.log(beta), log_p + math.log1p(-beta))
        value = beta * kl(log_q, log_m) + (1 - beta) * kl(log_p, log_m)
        grad = (1 - beta) * torch.where(p == 0, 0.0, p * (log_p - log_m - kl(log_p, log_m)))
    return value.squeeze(-1), grad


def split_options(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(the student's options, the teacher's) for `log_probs`."""
    names = ("temperature", "softcap", "logit_scale")
    student = {name: options[name] for name in names if name in options}
    return student, {name: options[f"teacher_{name}"] for name in names if f"teacher_{name}" in options}


def logits_of(case: PairCase, bias: bool = True) -> tuple[Tensor, Tensor]:
    """float64 logits of both sides."""
    z = case.hidden.double() @ case.weight.double().t()
    teacher = case.teacher_hidden.double() @ case.teacher_weight.double().t()
    return (z + case.bias.double(), teacher + case.teacher_bias.double()) if bias else (z, teacher)


def pair_truth(
    z: Tensor,
    teacher: Tensor,
    target: Tensor,
    c: tuple[Tensor, Tensor, Tensor],
    kind: dict[str, Any],
    mask: Tensor | None = None,
    **options: Any,
) -> PairTruth:
    """c: d loss / d divergence, entropy and logp."""
    of_student, of_teacher = split_options(options)
    (log_p, slope, u), (log_q, _, v) = log_probs(z, **of_student), log_probs(teacher, **of_teacher)
    keep = torch.ones(len(z), dtype=torch.bool) if mask is None else mask
    divergence, by_u = of_kind(log_p, log_q, **kind)
    p, finite = log_p.exp(), torch.where(log_p == -INF, 0.0, log_p)
    entropy = -(p * finite).sum(-1)
    safe = torch.where(keep, target, 0)
    one_hot = torch.nn.functional.one_hot(safe, z.shape[1]).double()
    meet = ((u == u.amax(-1, keepdim=True)) & (v == v.amax(-1, keepdim=True))).any(-1)
    stats = {
        "divergence": divergence,
        "entropy": entropy,
        "logp": log_p.gather(1, safe[:, None])[:, 0],
        "teacher_logp": log_q.gather(1, safe[:, None])[:, 0],
        "top1_agreement": meet.double(),
    }
    cd, ch, cy = (x.double()[:, None] for x in c)
    dz = cd * by_u + cy * (one_hot - p) - ch * p * (finite + entropy[:, None])
    gap = torch.where(p == 0, 0.0, log_p - log_q).abs()
    terms = 0.4 * cd.abs() * (torch.maximum(p, log_q.exp()) + p * gap)
    terms = terms + 1e-3 * (cy.abs() + ch.abs()) * p * (1 + finite.abs())
    stats = {name: torch.where(keep, x, 0.0) for name, x in stats.items()}
    return PairTruth(stats, torch.where(keep[:, None], dz * slope, 0.0), torch.where(keep[:, None], terms * slope, 0.0))
