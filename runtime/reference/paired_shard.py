"""Reference of paired_divergence on one vocabulary shard, and of its gradient, in plain torch and float64.

State and arguments are those of the row kernels, except that maxima are in nats:

    live, max u_p, max u_q, log2 S_p, log2 S_q, sum p s,   p_j = e^(u_j - max u_p) / S_p.

Everything stays float64, because a divergence is rounded once, when the shards are merged.
"""

import math

import torch

from tokfuse.runtime.core.dispatch import RowState
from tokfuse.runtime.reference.paired_divergence import EXCLUDED, over_mixture, terms, weights
from tokfuse.runtime.reference.token_stats import transformed_logits

STATE = RowState(lambda options: 1.0, torch.float64)
LN_2 = math.log(2.0)


def forward(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
    given: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence, state) of these columns alone.

    given: the state of the whole rows. The results are then the sums over these columns.
    """
    with torch.no_grad():
        options = (temperature, softcap, logit_scale)
        u_p, u_q = (transformed_logits(z, *options) for z in (logits_p, logits_q))
        if mask is not None:
            u_p, u_q = (torch.where(mask.unsqueeze(-1), u, 0.0) for u in (u_p, u_q))
        if given is None:
            (p_max, p_log2s), (q_max, q_log2s) = _side(u_p), _side(u_q)
            live = (p_log2s != -math.inf) & (q_log2s != -math.inf)
        else:
            alive, p_max, q_max, p_log2s, q_log2s, _ = given.double().unbind(1)
            live = alive != 0
        if mask is not None:
            live = live & mask
        log_p, log_q = _log_probs(u_p, p_max, p_log2s), _log_probs(u_q, q_max, q_log2s)
        value = terms(log_p, log_q, kind, mix_weight).sum(-1)
        mean = (log_p.exp() * _slopes(log_p, log_q, kind, mix_weight)).sum(-1)
        p_alone, q_alone = (log_q == EXCLUDED) & (log_p != EXCLUDED), (log_p == EXCLUDED) & (log_q != EXCLUDED)
        alone = {"kl_reverse": p_alone, "kl_forward": q_alone}.get(kind)
        if alone is not None:
            value = torch.where(alone.any(-1), math.inf, value)
        live = live & (value != math.inf)
        value = torch.where(live | (value == math.inf), value, 0.0)
        return value, torch.stack([live.double(), p_max, q_max, p_log2s, q_log2s, mean], 1)


def backward(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    out: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of logits_p: `grad p_j (s_j - sum p s)`, that of kl_forward `grad (p_j - q_j)`."""
    options = (temperature, softcap, logit_scale)
    u_p, u_q = (transformed_logits(z, *options) for z in (logits_p, logits_q))
    live, p_max, q_max, p_log2s, q_log2s, mean = state.double().unbind(1)
    log_p, log_q = _log_probs(u_p, p_max, p_log2s), _log_probs(u_q, q_max, q_log2s)
    p = log_p.exp()
    if kind == "kl_forward":
        du = p - log_q.exp()
    else:
        du = p * (_slopes(log_p, log_q, kind, mix_weight) - mean.unsqueeze(-1))
    slope = torch.full_like(du, logit_scale)
    if softcap is not None:
        slope = logit_scale * (1 - torch.tanh(logits_p.double() * logit_scale / softcap) ** 2)
    t = temperature.unsqueeze(-1) if isinstance(temperature, torch.Tensor) else temperature
    idle = (live == 0) | (grad == 0)
    found = torch.where(idle.unsqueeze(-1), 0.0, grad.double().unsqueeze(-1) * du * slope / t).to(logits_p.dtype)
    return found if out is None else out.copy_(found)


def _side(u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the maximum, 0 without a distribution, and log2 of the sum of exponentials, -inf without one."""
    largest = u.amax(-1)
    largest = torch.where(largest == -math.inf, 0.0, largest)
    return largest, (u - largest.unsqueeze(-1)).exp().sum(-1).log2()


def _log_probs(u: torch.Tensor, largest: torch.Tensor, log2s: torch.Tensor) -> torch.Tensor:
    log_p = u - (largest + log2s * LN_2).unsqueeze(-1)
    return torch.where(u == -math.inf, EXCLUDED, log_p)


def _slopes(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, mix_weight: float) -> torch.Tensor:
    """Return s_j of `tokfuse.paired_divergence`."""
    if kind in ("kl_forward", "kl_reverse"):
        return log_p - log_q
    if kind == "tvd":
        return 0.5 * torch.sign(log_p - log_q)
    p_weight, q_weight = weights(kind, mix_weight)
    p_over_mix, q_over_mix = over_mixture(log_p, log_q, p_weight, q_weight)
    if kind == "skew_forward":
        return -p_weight * q_over_mix.exp()
    if kind == "skew_reverse":
        return p_over_mix - p_weight * p_over_mix.exp()
    return p_weight * p_over_mix
