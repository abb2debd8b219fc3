"""Reference of the row statistics of one vocabulary shard, and of their gradient, in plain torch and float64.

The seven outputs and the arguments of the backward match the row kernels. The row maximum is in nats. The
outputs stay float64, because the statistics are rounded once, when the shards are merged.
"""

from typing import Any

import torch

from tokfuse.runtime.core.dispatch import RowState
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference import token_stats
from tokfuse.runtime.reference.linear_token_stats import logits_of
from tokfuse.runtime.reference.token_stats import transformed_logits
from tokfuse.runtime.reference.token_stats_at import exact as exact_at

STATE = RowState(lambda options: 1.0, torch.float64)  # row_max is in nats for all options


def forward(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1, row_max, inv_sum) of the softmax over this shard only."""
    with torch.no_grad():
        stats = token_stats.exact(
            logits,
            target,
            temperature=temperature,
            softcap=softcap,
            logit_scale=logit_scale,
            mask=mask,
            bias_logits=bias_logits,
            bias_scale=bias_scale,
        )
        u = transformed_logits(logits, temperature, softcap, logit_scale, bias_logits, bias_scale)
        row_max = u.amax(-1)
        dead = row_max == float("-inf") if mask is None else ~mask | (row_max == float("-inf"))
        row_max = torch.where(dead, 0.0, row_max)
        total = (u - row_max.unsqueeze(-1)).exp().sum(-1)
        return *stats, row_max, torch.where(dead, 0.0, 1.0 / total)


def forward_at(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return the outputs of `forward`, and log-probs of concatenated ids in the softmax over this shard only."""
    with torch.no_grad():
        return *forward(logits, target, **options), exact_at("token_stats", logits, target, ids, offsets, **options)[5]


def backward(
    logits: torch.Tensor,
    target: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
    *,
    grad_lse: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> torch.Tensor:
    """Return grad_logp d logp + grad_entropy d entropy + grad_lse d lse with respect to the logits of the shard.

    p_j = e^(u_j - row_max) inv_sum,
    du_j = grad_logp ([j = target] - p_j) - grad_entropy p_j (log p_j + entropy) + grad_lse p_j.
    A target outside [0, vocab) is on another shard, so [j = target] is 0 for every j.
    """
    row_max, inv_sum, logp, entropy = (x.double() for x in (row_max, inv_sum, logp, entropy))
    zero = torch.zeros_like(entropy)
    ga, gh, gl = (zero if x is None else x.double() for x in (grad_logp, grad_entropy, grad_lse))
    idle = ((ga == 0) & (gh == 0) & (gl == 0)) | (inv_sum == 0)
    if mask is not None:
        idle = idle | ~mask
    u = transformed_logits(logits, temperature, softcap, logit_scale, bias_logits, bias_scale)
    vectors = (ga, gh, gl, row_max, inv_sum, logp, entropy)
    ga, gh, gl, row_max, inv_sum, logp, entropy = (x.unsqueeze(-1) for x in vectors)
    x = u - row_max
    p = x.exp() * inv_sum
    onehot = target.unsqueeze(-1) == torch.arange(logits.shape[1], device=logits.device)
    log_p = torch.where(onehot, logp, x + inv_sum.log())
    d_logp = torch.where(onehot, -torch.expm1(logp), -p)  # 1 - p would lose digits near p = 1
    du = ga * d_logp - gh * p * (torch.where(p == 0, 0.0, log_p) + entropy) + gl * p
    slope = torch.full_like(u, logit_scale)
    if softcap is not None:
        slope = logit_scale * (1 - torch.tanh(logits.double() * logit_scale / softcap) ** 2)
    t = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    grad = torch.where(idle.unsqueeze(-1), 0.0, du * slope / t).to(logits.dtype)
    return grad if out is None else out.copy_(grad)


def _head_logits(p: Any) -> torch.Tensor:
    return kept_reference.restricted(logits_of(p.hidden, p.weight, p.bias), p.kept, p.options.mask)


def head_forward(p: Any) -> tuple[torch.Tensor, ...]:
    """Return `forward` of the logits of a head problem."""
    return forward(_head_logits(p), p.target, **p.options._asdict())


def head_backward(
    p: Any,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    *,
    grad_lse: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Return [grad_hidden, grad_weight, grad_bias]; None for inputs that need no gradient."""
    logits, grad_logp = _head_logits(p), kept_reference.gradient_if_kept(p.kept, logp, grad_logp)
    given = (row_max, inv_sum, logp, entropy, grad_logp, grad_entropy)
    dz = backward(logits, p.target, *given, grad_lse=grad_lse, **p.options._asdict())
    return [
        (dz @ p.weight.to(dz.dtype)).to(p.hidden.dtype) if needs[0] else None,
        (dz.t() @ p.hidden.to(dz.dtype)).to(p.weight.dtype) if needs[1] else None,
        dz.sum(0).to(p.bias.dtype) if needs[2] else None,
    ]
