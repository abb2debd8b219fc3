"""Result types of policy_loss and policy_step."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.forward_gradients import Gradients, HeldGradients
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOT, Metrics
from tokfuse.runtime.policy.objective import Objective


class PolicyTerms(NamedTuple):
    """The values that a backend computes from one batch."""

    loss: torch.Tensor
    """() float32."""
    token_loss: torch.Tensor
    """(tokens,), the summands of `loss`."""
    d_logp: torch.Tensor
    """(tokens,), d loss / d logp."""
    d_entropy: torch.Tensor
    """(tokens,), d loss / d entropy."""
    sums: torch.Tensor
    """(metrics,) float64, in the order of `metrics.SLOTS`."""
    loss_sum: torch.Tensor | None = None
    """() float32, loss before the division by the normaliser. None: `loss_result` computes it."""

    @staticmethod
    def of_sums(sums: torch.Tensor, out: Any) -> "PolicyTerms":
        """The terms of a kernel that writes the loss to its metric sums and the rest to the fields of `out`."""
        return PolicyTerms(sums[SLOT["loss"]].to(torch.float32), out.token_loss, out.d_logp, out.d_entropy, sums)


@dataclass(frozen=True)
class PolicyLoss:
    """Result of `policy_loss`."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer. Differentiable in logp and entropy."""
    token_loss: torch.Tensor
    """(tokens,) float32, the summands of `loss`. Detached."""
    loss_sum: torch.Tensor
    """() float32, aggregated sum before division by the normaliser. Detached."""
    count: torch.Tensor
    """() float64, the count of this batch: valid tokens, or sequences with a valid token."""
    metrics: Metrics
    """Metric sums of this batch."""


@dataclass(frozen=True)
class Influence:
    """Norms and sketches of the gradient of one step's `loss`, its normaliser included. Detached.

    They contain the objective's coefficient. A token that is masked, has zero advantage or is stopped by
    the clip has norm 0 and adds nothing to the sketch of its sequence. The three norms are magnitudes
    only: noise and wrong labels have large norms too.
    """

    token_norms: torch.Tensor
    """(tokens,) float32, ||d loss / d logits_t||."""
    head_norms: torch.Tensor
    """(tokens,) float32, Frobenius norm of the token's term in d loss / d weight of the lm_head."""
    hidden_norms: torch.Tensor
    """(tokens,) float32, ||d loss / d hidden_t||."""
    sketches: torch.Tensor
    """(seqs, rank, rank) float32, see `tokfuse.influence.sketch`."""


@dataclass(frozen=True)
class PolicyStep(HeldGradients):
    """Result of `policy_step` and `policy_step_`."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer. `loss.backward()` returns the gradients below."""
    token_loss: torch.Tensor
    """(tokens,) float32, the summands of `loss`. Detached."""
    loss_sum: torch.Tensor
    """() float32, aggregated sum before division by the normaliser. Detached."""
    count: torch.Tensor
    """() float64, the count of this batch: valid tokens, or sequences with a valid token."""
    metrics: Metrics
    """Metric sums of this batch."""
    stats: TokenStats
    """Statistics of the current policy. Detached."""
    _gradients: Gradients
    influence: Influence | None = None
    """Gradient norms and sketches, if `influence=InfluenceSpec(...)` was passed, else None."""
    _leading: tuple[int, ...] | None = None


_REFERENCE_KL = frozenset({"ref_kl_k1", "ref_kl_k3"})
# (has ref_logp, has entropy) -> metrics that are absent
ABSENT = {
    (True, True): frozenset[str](),
    (True, False): frozenset({"entropy"}),
    (False, True): _REFERENCE_KL,
    (False, False): _REFERENCE_KL | {"entropy"},
}


def sampler_mismatch(
    sampler_logp: torch.Tensor | None, inputs: PolicyInputs, logp: torch.Tensor
) -> torch.Tensor | None:
    """Return the sum over valid tokens of the k3 estimate of KL(sampler || old policy).

    Args:
        sampler_logp: (tokens,), nats, from the rollout engine. None: return None.
        inputs: inputs of the objective; its old_logp is the old policy.
        logp: (tokens,), nats, of the current policy. It is the old policy if old_logp is None.
    """
    if sampler_logp is None:
        return None
    old = logp.detach() if inputs.old_logp is None else inputs.old_logp
    d = (old.double() - sampler_logp.double()).clamp(-20, 20)
    k3 = torch.expm1(d) - d
    return (k3 if inputs.mask is None else torch.where(inputs.mask, k3, 0.0)).sum()


def loss_result(
    terms: PolicyTerms,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    has_entropy: bool,
    sampler_kl: torch.Tensor | None,
) -> PolicyLoss:
    """Assemble the result of policy_loss from the terms of a backend.

    `inv_normalizer` is 1 / normaliser. It is negative if the count of this batch is the normaliser.
    """
    sums = terms.sums
    count = sums[SLOT["seqs" if objective.counts_sequences else "tokens"]]
    loss, loss_sum = terms.loss.detach(), terms.loss_sum
    if loss_sum is not None:
        pass
    elif isinstance(inv_normalizer, torch.Tensor):  # see inverse_normalizer
        loss_sum = loss / inv_normalizer.to(loss.dtype)
    else:
        loss_sum = loss * count.to(loss.dtype) if inv_normalizer < 0 else loss / inv_normalizer
    absent = ABSENT[inputs.ref_logp is not None, has_entropy]
    metrics = Metrics(sums, absent, sampler_kl)
    return PolicyLoss(terms.loss, terms.token_loss, loss_sum, count, metrics)


def step_result(
    terms: PolicyTerms,
    stats: TokenStats,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    sampler_logp: torch.Tensor | None,
    gradients: Gradients,
) -> PolicyStep:
    """Assemble the result of policy_step from the terms and statistics of a backend."""
    sampler_kl = sampler_mismatch(sampler_logp, inputs, stats.logp)
    base = loss_result(terms, inputs, objective, inv_normalizer, True, sampler_kl)
    return PolicyStep(base.loss, base.token_loss, base.loss_sum, base.count, base.metrics, stats, gradients)
