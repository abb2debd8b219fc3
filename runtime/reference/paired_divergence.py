"""Reference of `tokfuse.paired_divergence`, differentiable in the logits of P."""

import torch

from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.reference.token_stats import log_softmax, result_dtype, transformed_logits

EXCLUDED = -1e4  # log-prob of an excluded entry: its exp is exactly 0, and differences stay finite
FAR = 80.0  # bound on |log q - log p|: there the smaller probability is 1e-35 of the larger one


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
    q_options: LogitOptions | None = None,
) -> torch.Tensor:
    """(tokens,) divergence; see `tokfuse.paired_divergence` for the contract.

    q_options: how logits_q become Q; None: as logits_p become P.
    """
    of_q = (temperature, softcap, logit_scale) if q_options is None else q_options[:3]
    keep = torch.ones(logits_p.shape[0], dtype=torch.bool, device=logits_p.device)
    if mask is not None:  # before any arithmetic: 0 * NaN in a masked row would reach the gradient
        keep = mask
        logits_p = torch.where(keep.unsqueeze(-1), logits_p, 0.0)
        logits_q = torch.where(keep.unsqueeze(-1), logits_q, 0.0)
        if isinstance(temperature, torch.Tensor):
            temperature = torch.where(keep, temperature, 1.0)
        if isinstance(of_q[0], torch.Tensor):
            of_q = (torch.where(keep, of_q[0], 1.0), *of_q[1:])
    u_p = transformed_logits(logits_p, temperature, softcap, logit_scale)
    u_q = transformed_logits(logits_q.detach(), *of_q)
    no_p, no_q = u_p == float("-inf"), u_q == float("-inf")
    zero = no_p.all(-1) | no_q.all(-1) | ~keep
    infinite = torch.zeros_like(zero)
    if kind == "kl_forward":
        infinite = (no_p & ~no_q).any(-1) & ~zero
    elif kind == "kl_reverse":
        infinite = (no_q & ~no_p).any(-1) & ~zero
    # Rows with result 0 or inf are replaced before the arithmetic: their gradient would be 0 * inf.
    flat = (zero | infinite).unsqueeze(-1)
    log_p, log_q = (_log_probs(torch.where(flat, 0.0, u)) for u in (u_p, u_q))
    out = terms(log_p, log_q, kind, mix_weight).sum(-1)
    out = out + (-out.detach()).clamp_min(0.0)  # rounding below 0; the gradient stays
    out = torch.where(infinite, float("inf"), torch.where(zero, 0.0, out))
    return out.to(result_dtype(logits_p.dtype))


def _log_probs(u: torch.Tensor) -> torch.Tensor:
    return torch.where(u == float("-inf"), EXCLUDED, log_softmax(u)[0])


def terms(log_p: torch.Tensor, log_q: torch.Tensor, kind: str, mix_weight: float) -> torch.Tensor:
    """Return the summands of the divergence. `EXCLUDED` is the log-prob of an excluded entry."""
    p, q = log_p.exp(), log_q.exp()
    if kind == "kl_forward":
        return q * (log_q - log_p)
    if kind == "kl_reverse":
        return p * (log_p - log_q)
    if kind == "tvd":
        return 0.5 * (p - q).abs()
    p_weight, q_weight = weights(kind, mix_weight)
    p_over_mix, q_over_mix = over_mixture(log_p, log_q, p_weight, q_weight)
    if kind == "skew_forward":
        return q * q_over_mix
    if kind == "skew_reverse":
        return p * p_over_mix
    return p_weight * p * p_over_mix + q_weight * q * q_over_mix


def weights(kind: str, mix_weight: float) -> tuple[float, float]:
    """Return the weights of P and Q in the mixture."""
    return (mix_weight, 1 - mix_weight) if kind == "skew_reverse" else (1 - mix_weight, mix_weight)


def over_mixture(
    log_p: torch.Tensor, log_q: torch.Tensor, p_weight: float, q_weight: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log(p / mix) and log(q / mix), which are exactly 0 if p = q."""
    # log(p / mix) = -log(1 - q_weight + q_weight q / p)
    ratio = (log_q - log_p).clamp(-FAR, FAR)
    return -torch.log1p(q_weight * torch.expm1(ratio)), -torch.log1p(p_weight * torch.expm1(-ratio))
