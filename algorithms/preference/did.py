"""Differential information: how spread out the change from a reference to a policy is."""

from typing import NamedTuple

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import Rows, check_choice, check_vector
from tokfuse.runtime.ops.token_stats import token_stats

OP = "algorithms.did_entropy"
SYSTEM = "Differential Information"
SOURCE = "arXiv 2505.23761 (definition and Thms 3.2, 3.3 as quoted in a review)"


class DIDEntropy(NamedTuple):
    """Result of `did_entropy`; 0-dim float64."""

    entropy: torch.Tensor
    """Nats; an estimate, biased for few samples."""
    ess: torch.Tensor
    """Effective number of samples behind it; near 1 it says nothing."""


@register(
    "did_entropy",
    kind="preference",
    system=SYSTEM,
    label="utility",
    source=SOURCE,
    summary="entropy of pi / ref over responses, by self-normalised sampling, with its ESS",
    differs="The paper's estimator was not found (it takes 32 samples): self-normalised importance "
    "sampling is ours. Its weights are heavy-tailed at sequence level: a plot, never a loss.",
)
def did_entropy(logp_sum: torch.Tensor, ref_sum: torch.Tensor, *, sampled_from: str = "reference") -> DIDEntropy:
    """Entropy of q(y) = (pi(y) / ref(y)) / Z over the responses y of one prompt. Utility.

    H(q) = log Z - E_q[log(pi / ref)]; with y_k drawn from b, v_k = pi / (ref b) at y_k:
    Z = mean v, E_q[f] = sum v f / sum v. High: mass is moved everywhere (smoothing, open-ended
    tasks); low: a few responses are reinforced (factual tasks).

    Args:
        logp_sum, ref_sum: (samples,), nats, of whole responses to one prompt.
        sampled_from: "reference" (v = pi / ref^2) or "policy" (v = 1 / ref).

    Returns:
        DIDEntropy(entropy, ess), detached. In log space: no weight overflows.

    Raises:
        ValueError: shapes, sampled_from.
    """
    check_choice(OP, "sampled_from", sampled_from, ("reference", "policy"))
    samples = check_vector(OP, "logp_sum", logp_sum).shape[0]
    check_vector(OP, "ref_sum", ref_sum, Rows(samples, "logp_sum", logp_sum.device))
    lp, ref = logp_sum.detach().double(), ref_sum.detach().double()
    log_v = lp - 2 * ref if sampled_from == "reference" else -ref
    log_z = torch.logsumexp(log_v, 0)
    share = (log_v - log_z).exp()
    count = torch.tensor(float(samples), dtype=torch.float64, device=lp.device)
    entropy = log_z - count.log() - (share * (lp - ref)).sum()
    return DIDEntropy(entropy, 1.0 / (share * share).sum())


@register(
    "did_token_entropy",
    kind="preference",
    system=SYSTEM,
    label="utility",
    source=SOURCE,
    summary="entropy over the vocabulary of softmax(policy logits - reference logits), per token",
    differs="A token-level stand-in of ours, exact for what it is; the paper is about responses.",
)
def did_token_entropy(
    logits: torch.Tensor, ref_logits: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Entropy of q_t = softmax(log pi_t - log ref_t) = softmax(logits - ref_logits). Utility.

    Args:
        logits: (tokens, vocab). ref_logits: same shape and dtype.
        mask: (tokens,), bool. None: all count.

    Returns:
        (tokens,), nats, detached; one pass over both streams (`token_stats` with bias_logits).
    """
    target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    stats = token_stats(logits.detach(), target, bias_logits=ref_logits.detach(), mask=mask)
    return stats.entropy
