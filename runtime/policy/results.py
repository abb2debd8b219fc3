"""Result types of policy_loss and policy_step, and the backward that returns gradients of the forward."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.metrics import SLOT, Metrics
from tokfuse.runtime.policy.objective import Objective

Gradients = dict[str, torch.Tensor | None]


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


class HeldGradients:
    """The gradients of a step by name, until its last backward."""

    _gradients: Gradients
    _leading: tuple[int, ...] | None = None  # leading dimensions of the input in place of (tokens,)

    # The last `loss.backward()` moves the gradients out of this object. If this object kept them,
    # autograd would have to copy a (vocab, hidden) tensor into `weight.grad`.

    @property
    def grad_logits(self) -> torch.Tensor | None:
        """d loss / d logits, (tokens, vocab).

        None for a step from hidden states, after the last backward, and on the reference backend inside
        torch.compile, where autograd computes the gradient in the backward.
        """
        return self._of_rows("logits")

    @property
    def grad_hidden(self) -> torch.Tensor | None:
        """d loss / d hidden, (tokens, hidden). None if hidden requires no gradient, or after the last backward."""
        return self._of_rows("hidden")

    def _of_rows(self, name: str) -> torch.Tensor | None:
        grad = self._gradients.get(name)
        return grad if grad is None or self._leading is None else grad.view(*self._leading, grad.shape[-1])

    @property
    def grad_weight(self) -> torch.Tensor | None:
        """d loss / d weight, (vocab, hidden). None if weight requires no gradient, or after the last backward."""
        return self._gradients.get("weight")

    @property
    def grad_bias(self) -> torch.Tensor | None:
        """d loss / d bias, (vocab,). None if bias requires no gradient, or after the last backward."""
        return self._gradients.get("bias")


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


def _keeps_graph() -> bool:
    """Return True inside a backward that may run again (retain_graph=True)."""
    return bool(torch._C._autograd._get_current_graph_task_keep_graph())


Computed = tuple[torch.Tensor, Sequence[torch.Tensor], Sequence[torch.Tensor | None]]
"""Loss, further results without a gradient, gradients of the loss."""


Deliver = Callable[[torch.Tensor], None]


def with_gradients(
    op: str,
    leaves: Mapping[str, torch.Tensor | None],
    compute: Callable[[], Computed],
    gradients: Gradients,
    deliver: Deliver | None = None,
) -> tuple[torch.Tensor, ...]:
    """Return the loss and the further results of `compute`. The backward of the loss returns its gradients.

    Args:
        op: name of the op, for the profiler range of the backward and for errors.
        leaves: the inputs that the gradients belong to, by name, in the order of the gradients.
        compute: called once. Its gradients are stored in `gradients` by name until the last backward.
        gradients: empty; `HeldGradients` shows its content.
        deliver: called in every backward with the gradient of the loss: it passes on what else the forward
            computed, the probes of an lm_head. None: nothing else.
    """
    rest = (op, tuple(leaves), compute, gradients, deliver)
    out: tuple[torch.Tensor, ...] = _ForwardGradients.apply(*rest, *leaves.values())
    return out


class _ForwardGradients(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        op: str,
        names: tuple[str, ...],
        compute: Callable[[], Computed],
        gradients: Gradients,
        deliver: Deliver | None,
        *leaves: torch.Tensor | None,
    ) -> tuple[torch.Tensor, ...]:
        loss, others, grads = compute()
        gradients.update(zip(names, grads, strict=True))
        ctx.op, ctx.names, ctx.gradients, ctx.deliver = op, names, gradients, deliver
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        grads = _hand_over_of(ctx.op)(ctx.gradients, grad_loss, ctx.op)
        if ctx.deliver is not None:
            ctx.deliver(grad_loss)
        return None, None, None, None, None, *(grads[name] for name in ctx.names)


@functools.cache
def _hand_over_of(op: str) -> Callable[[Gradients, torch.Tensor, str], Gradients]:
    """Return `_hand_over` for an op: inside the profiler range of its backward, with an error under create_graph."""
    return first_order(op)(ranged(f"{op}.bwd")(_hand_over))


def _hand_over(gradients: Gradients, grad_loss: torch.Tensor, op: str) -> Gradients:
    """Return the stored gradients times grad_loss. The last backward moves them instead of copying them."""
    if not any(x is not None for x in gradients.values()):
        raise RuntimeError(
            f"{op}: backward ran twice, but the first backward has already returned the stored gradients. "
            "Pass retain_graph=True to the first backward."
        )
    last = not _keeps_graph()
    # On a CPU, reading the scalar needs no synchronisation and can save a pass over every gradient.
    is_one = grad_loss.device.type == "cpu" and float(grad_loss) == 1.0
    out: Gradients = {}
    for name, grad in gradients.items():
        if grad is not None and not is_one:
            grad = grad.mul_(grad_loss) if last else grad * grad_loss.to(grad.dtype)
        elif grad is not None and not last:
            grad = grad.clone()  # its receiver may write into it, e.g. an accumulation into .grad
        out[name] = grad
    if last:
        gradients.update(dict.fromkeys(gradients))
    return out


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
