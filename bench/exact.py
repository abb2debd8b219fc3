"""The float64 answers in closed form, and the errors of a provider's outputs relative to them.

This module uses neither tokfuse nor autograd. With p = softmax(z), entropy H, and (a, b) the derivatives
of the loss with respect to logp and entropy,

    d loss / d z = a (onehot - p) - b p (log p + H)

It is computed over blocks of rows to keep the float64 temporaries small.
"""

import torch

from tokfuse.bench.measure import Outputs
from tokfuse.bench.problem import CLIP, Batch

BLOCK_ROWS = 32
BLOCK_ELEMENTS = 1 << 24
BLOCK_ELEMENTS = 1 << 24
FORWARD = ("logp", "entropy", "lse", "sum_sq", "top1")


def _block(logits: torch.Tensor, target: torch.Tensor) -> tuple[Outputs, torch.Tensor]:
    """Return the statistics of some rows of float64 logits, and their log-probabilities."""
    top = logits.max(-1, keepdim=True).values
    lse = top + (logits - top).exp().sum(-1, keepdim=True).log()
    log_p = logits - lse
    p = log_p.exp()
    # a masked logit (-inf) contributes exactly 0, not 0 * inf
    p_log_p = torch.where(p > 0, p * log_p, torch.zeros_like(p))
    picked = logits.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    stats = {
        "logp": picked - lse.squeeze(-1),
        "entropy": -p_log_p.sum(-1),
        "lse": lse.squeeze(-1),
        "sum_sq": (p * p).sum(-1),
        "top1": (picked == top.squeeze(-1)).double(),
    }
    return stats, log_p


def token_stats(logits: torch.Tensor, target: torch.Tensor) -> Outputs:
    """Return all five statistics, each (tokens,) float64."""
    parts = [_block(z.double(), y)[0] for z, y in zip(logits.split(BLOCK_ROWS), target.split(BLOCK_ROWS), strict=True)]
    return {name: torch.cat([part[name] for part in parts]) for name in FORWARD}


def grad_logits(
    logits: torch.Tensor, target: torch.Tensor, by_logp: torch.Tensor, by_entropy: torch.Tensor
) -> torch.Tensor:
    """Return d loss / d logits, (tokens, vocab) float64, from the derivatives with respect to logp and entropy."""
    out = torch.empty(logits.shape, dtype=torch.float64, device=logits.device)
    for first in range(0, logits.shape[0], BLOCK_ROWS):
        rows = slice(first, first + BLOCK_ROWS)
        stats, log_p = _block(logits[rows].double(), target[rows])
        p = log_p.exp()
        a, b = by_logp[rows, None].double(), by_entropy[rows, None].double()
        spread = torch.where(p > 0, p * (log_p + stats["entropy"][:, None]), torch.zeros_like(p))
        grad = -a * p - b * spread
        grad.scatter_add_(-1, target[rows, None], a)
        out[rows] = grad
    return out


def policy_terms(stats: Outputs, batch: Batch, entropy_coef: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of PPO-clip with token mean, and its derivatives with respect to logp and entropy."""
    advantage = batch.advantage.double()
    ratio = (stats["logp"] - batch.old_logp.double()).exp()
    clipped = ratio.clamp(1 - CLIP, 1 + CLIP)
    surrogate = torch.minimum(ratio * advantage, clipped * advantage)
    loss = -(surrogate + entropy_coef * stats["entropy"]).sum() / batch.num_tokens
    live = (ratio * advantage <= clipped * advantage).double()
    by_logp = -live * ratio * advantage / batch.num_tokens
    by_entropy = torch.full_like(by_logp, -entropy_coef / batch.num_tokens)
    return loss, by_logp, by_entropy


def policy_step(logits: torch.Tensor, batch: Batch, entropy_coef: float) -> Outputs:
    """Return the loss, the statistics and the gradient with respect to the logits."""
    stats = token_stats(logits, batch.target)
    loss, by_logp, by_entropy = policy_terms(stats, batch, entropy_coef)
    grad = grad_logits(logits, batch.target, by_logp, by_entropy)
    return {**stats, "loss": loss, "grad_logits": grad}


def head_logits(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the logits, (tokens, vocab) float64."""
    return hidden.double() @ weight.double().T


def through_head(grad: torch.Tensor, hidden: torch.Tensor, weight: torch.Tensor, with_weight: bool = True) -> Outputs:
    """Return the gradients of hidden states and weight, from the gradient of the logits."""
    out = {"grad_hidden": grad @ weight.double()}
    if with_weight:
        out["grad_weight"] = grad.T @ hidden.double()
    return out


def divergence(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, beta: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence of P from Q, its gradient by the logits of P)."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "kl_forward":
        return (q * (log_q - log_p)).sum(-1), p - q
    if kind == "kl_reverse":
        from_p = (p * (log_p - log_q)).sum(-1, keepdim=True)
        return from_p.squeeze(-1), p * (log_p - log_q - from_p)
    log_m = (beta * q + (1 - beta) * p).log()
    from_p = (p * (log_p - log_m)).sum(-1, keepdim=True)
    value = beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * from_p.squeeze(-1)
    return value, (1 - beta) * p * (log_p - log_m - from_p)


def largest(exact: torch.Tensor) -> float:
    """Return the largest finite absolute value; 0 if there is none."""
    finite = exact[exact.isfinite()]
    return float(finite.abs().max()) if finite.numel() else 0.0


def distance(name: str, value: torch.Tensor, exact: torch.Tensor) -> float:
    """Return the largest absolute error; for gradients, divided by the largest exact absolute value.

    Equal infinities are no error. A NaN, or an infinity on one side only, is an infinite error.
    """
    if value.shape != exact.shape:
        return float("inf")
    worst, scale = 0.0, 0.0
    value, exact = torch.atleast_1d(value.detach()), torch.atleast_1d(exact)
    rows = max(1, BLOCK_ELEMENTS // max(1, exact[:1].numel()))
    for got, want in zip(value.split(rows), exact.split(rows), strict=True):
        got = got.double()
        error = torch.where(got == want, torch.zeros_like(want), (got - want).abs())
        error = error.nan_to_num(nan=float("inf"), posinf=float("inf"))
        worst = max(worst, float(error.max()) if error.numel() else 0.0)
        scale = max(scale, largest(want))
    return worst / scale if name.startswith("grad_") and scale else worst


def distances(outputs: Outputs, exact: Outputs) -> dict[str, float]:
    """Return the `distance` of every output that has an exact value."""
    return {name: distance(name, value, exact[name]) for name, value in outputs.items() if name in exact}
