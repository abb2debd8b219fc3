"""The results of policy_loss and policy_step, and the backward that returns held gradients."""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOT, Metrics
from tokfuse.runtime.policy.objective import Objective

Gradients = dict[str, torch.Tensor | None]


class PolicyTerms(NamedTuple):
    """What a backend computes from one batch."""

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


@dataclass(frozen=True)
class PolicyLoss:
    """What `policy_loss` returns."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer; differentiable in logp and entropy."""
    token_loss: torch.Tensor
    """(tokens,) float32, the summands of `loss`; detached."""
    loss_sum: torch.Tensor
    """() float32, aggregated sum before the normaliser; detached."""
    count: torch.Tensor
    """() float64, this batch's own denominator: valid tokens, or sequences with a valid token."""
    metrics: Metrics


@dataclass(frozen=True)
class Influence:
    """Norms and sketches of the gradient of one step's `loss`, its normaliser included; detached.

    The coefficient of the objective is folded in: a masked token, one with zero advantage and one
    whose clip is active have norm 0 and add nothing to their sequence's sketch. The three norms are
    magnitudes only: noise and wrong labels have large ones.
    """

    token_norms: torch.Tensor
    """(tokens,) float32, ||d loss / d logits_t||."""
    head_norms: torch.Tensor
    """(tokens,) float32, Frobenius norm of token t's term of d loss / d weight of the lm_head."""
    hidden_norms: torch.Tensor
    """(tokens,) float32, ||d loss / d hidden_t||."""
    sketches: torch.Tensor
    """(seqs, rank, rank) float32, see `tokfuse.influence.sketch`."""


@dataclass(frozen=True)
class PolicyStep:
    """What `policy_step` and `policy_step_` return."""

    loss: torch.Tensor
    """() float32, loss_sum / normalizer; `loss.backward()` hands out the gradients below."""
    token_loss: torch.Tensor
    """(tokens,) float32, the summands of `loss`; detached."""
    loss_sum: torch.Tensor
    """() float32, aggregated sum before the normaliser; detached."""
    count: torch.Tensor
    """() float64, this batch's own denominator: valid tokens, or sequences with a valid token."""
    metrics: Metrics
    stats: TokenStats
    """Statistics of the current policy; detached."""
    _gradients: Gradients
    influence: Influence | None = None
    """Gradient norms and sketches, where `influence=InfluenceSpec(...)` asked for them."""

    # The last `loss.backward()` gives the gradients away: held here too, autograd would have to
    # copy a (vocab, hidden) tensor into `weight.grad`. Read them before, or instead.

    @property
    def grad_logits(self) -> torch.Tensor | None:
        """(tokens, vocab), d loss / d logits; None from hidden, after the last backward, and on
        the reference inside torch.compile, which makes the backward itself."""
        return self._gradients.get("logits")

    @property
    def grad_hidden(self) -> torch.Tensor | None:
        """(tokens, hidden); None where hidden needs no gradient, or after the last backward."""
        return self._gradients.get("hidden")

    @property
    def grad_weight(self) -> torch.Tensor | None:
        """(vocab, hidden); None where weight needs no gradient, or after the last backward."""
        return self._gradients.get("weight")

    @property
    def grad_bias(self) -> torch.Tensor | None:
        """(vocab,); None where bias needs no gradient, or after the last backward."""
        return self._gradients.get("bias")


def _keeps_graph() -> bool:
    """True inside a backward that may run again (retain_graph=True)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


def hand_over(gradients: Gradients, grad_loss: torch.Tensor, op: str = "policy_step") -> Gradients:
    """The held gradients times grad_loss. In the last backward they are given away, not copied."""
    if not any(x is not None for x in gradients.values()):
        raise RuntimeError(
            f"{op}: backward ran twice, and the first one handed the gradients over. "
            "Pass retain_graph=True to the first backward."
        )
    last = not _keeps_graph()
    # Reading the scalar costs no synchronisation on a CPU, and saves a pass over every gradient.
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    out: Gradients = {}
    for name, grad in gradients.items():
        if grad is not None and not is_one:
            grad = grad.mul_(grad_loss) if last else grad * grad_loss.to(grad.dtype)
        elif grad is not None and not last:
            grad = grad.clone()  # autograd may hand it to an optimizer that writes into it
        out[name] = grad
    if last:
        gradients.update(dict.fromkeys(gradients))
    return out


_REFERENCE_KL = frozenset({"ref_kl_k1", "ref_kl_k3"})
# (has ref_logp, has entropy) -> metrics that such a batch does not have
ABSENT = {
    (True, True): frozenset[str](),
    (True, False): frozenset({"entropy"}),
    (False, True): _REFERENCE_KL,
    (False, False): _REFERENCE_KL | {"entropy"},
}


def sampler_mismatch(
    sampler_logp: torch.Tensor | None, inputs: PolicyInputs, logp: torch.Tensor
) -> torch.Tensor | None:
    """Sum over valid tokens of the k3 estimate of KL(sampler || old policy).

    logp: of the current policy, which is the old one where old_logp is None.
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
    """Assemble the result of policy_loss from a backend's terms.

    inv_normalizer: 1 / normaliser; negative if the batch's own count is the normaliser.
    """
    sums = terms.sums
    count = sums[SLOT["seqs" if objective.counts_sequences else "tokens"]]
    loss = terms.loss.detach()
    if isinstance(inv_normalizer, torch.Tensor):  # see inverse_normalizer
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
    """Assemble the result of policy_step from a backend's terms and statistics."""
    sampler_kl = sampler_mismatch(sampler_logp, inputs, stats.logp)
    base = loss_result(terms, inputs, objective, inv_normalizer, True, sampler_kl)
    return PolicyStep(base.loss, base.token_loss, base.loss_sum, base.count, base.metrics, stats, gradients)
