"""Differential information: how widely a policy differs from its reference."""

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
    """Nats. An estimate, biased if there are few samples."""
    ess: torch.Tensor
    """Effective number of samples. Near 1, the estimate is meaningless."""


@register(
    "did_entropy",
    kind="preference",
    system=SYSTEM,
    label="utility",
    source=SOURCE,
    summary="entropy of pi / ref over responses, by self-normalised sampling, with its effective sample size",
    differs="The paper's estimator was not found (it takes 32 samples); self-normalised importance "
    "sampling is our choice. Its weights are heavy-tailed at sequence level: plot it, do not train on it.",
)
def did_entropy(logp_sum: torch.Tensor, ref_sum: torch.Tensor, *, sampled_from: str = "reference") -> DIDEntropy:
    """Return the entropy of q(y) = (pi(y) / ref(y)) / Z over the responses y of one prompt. Utility.

    H(q) = log Z - E_q[log(pi / ref)]. With y_k drawn from b and v_k = pi / (ref b) at y_k:
    Z = mean v, E_q[f] = sum v f / sum v. A high entropy means that probability mass moved everywhere (smoothing,
    open-ended tasks); a low one that a few responses were reinforced (factual tasks).

    Args:
        logp_sum: (samples,), nats. Log-probability of whole responses to one prompt under the policy.
        ref_sum: (samples,), nats. The same under the reference.
        sampled_from: b. "reference" (v = pi / ref^2) or "policy" (v = 1 / ref).

    Returns:
        DIDEntropy(entropy, ess), detached. Computed in log space, so no weight overflows.

    Raises:
        ValueError: wrong shapes or sampled_from.
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
    differs="A token-level substitute, exact as defined. The paper is about whole responses.",
)
def did_token_entropy(
    logits: torch.Tensor, ref_logits: torch.Tensor, *, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the entropy of q_t = softmax(log pi_t - log ref_t) = softmax(logits - ref_logits). Utility.

    Args:
        logits: (tokens, vocab).
        ref_logits: like logits, same dtype.
        mask: (tokens,), bool. None: all tokens count.

    Returns:
        (tokens,), nats, detached. One pass over both tensors (`token_stats` with bias_logits).
    """
    target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    stats = token_stats(logits.detach(), target, bias_logits=ref_logits.detach(), mask=mask)
    return stats.entropy
