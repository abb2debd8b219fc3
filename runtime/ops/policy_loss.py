"""`tokfuse.policy_loss`: a clipped-ratio objective, its gradient coefficients and its metrics in one launch."""

from typing import Any

import torch

from tokfuse.runtime.backends import cpu_policy, cuda_backend, cuda_policy, reference_policy, triton_policy
from tokfuse.runtime.backends.policy_runs import LossRun
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.forced import eager_cpu
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.policy import inputs as policy_inputs
from tokfuse.runtime.policy.graph_form import (
    INPUTS_SCHEMA,
    OBJECTIVE_SCHEMA,
    checked_inverse,
    flat_objective,
    objective_of,
)
from tokfuse.runtime.policy.inputs import Normalizer, PolicyInputs, inverse_normalizer
from tokfuse.runtime.policy.metrics import SLOTS, Metrics
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import ABSENT, PolicyLoss, PolicyTerms, loss_result, sampler_mismatch
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS

OP = "policy_loss"


@ranged("policy_loss.fwd")
def policy_loss(
    logp: torch.Tensor,
    *,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    advantage_level: str = "token",
    token_weight: torch.Tensor | None = None,
    signal: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    anchor_logp: torch.Tensor | None = None,
    anchor_weight: torch.Tensor | None = None,
) -> PolicyLoss:
    """Return the loss, gradient coefficients and metrics of a policy objective over packed tokens.

    loss = 1 / normalizer * sum_t agg_t [ weight_t phi(log_ratio_t, advantage_t)
           + kl.coef kl_weight_t KL_t + anchor.coef anchor_weight_t KL'_t - entropy_coef entropy_weight_t entropy_t ],
    where log_ratio = logp - old_logp, or its mean or sum over the sequence for sequence levels, and
    agg_t = 1, or 1 / (valid tokens of the sequence) for "seq_mean_token_mean".

    Args:
        logp: (tokens,) float, nats. Log-probability under the current policy. Receives a gradient.
        old_logp: (tokens,), nats. Log-probability at the start of the update. None: the update is on
            policy, so logp without its gradient is used and every ratio is 1.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence".
        objective: an `Objective`.
        mask: (tokens,) bool. True = counts. None: all tokens count. Values at masked tokens are never
            used.
        cu_seqlens: (seqs + 1,) int32 packing offsets. Needed if the objective or advantage_level uses
            sequences.
        normalizer: divisor of the loss. A number or 0-dim tensor, usually the global token or sequence
            count; or "batch", the count of this batch. None: no division, `loss` is the aggregated sum.
        ref_logp: (tokens,), nats. Log-probability under the reference policy. Needed by a KL term.
            Without a KL term it only adds the metrics ref_kl_k1 and ref_kl_k3.
        sampler_logp: (tokens,), nats, from the rollout engine. Adds the mismatch metric
            sampler_kl_k3. To correct for it, pass `token_weight` from `tokfuse.offpolicy_weights`.
        entropy: (tokens,), nats, of the current policy. Receives a gradient if the objective has an
            entropy bonus.
        advantage_level: "token" or "sequence". It is never guessed from the shape.
        token_weight: (tokens,). Multiplies the policy term (importance weights, selection masks).
        signal: (tokens,). Target signal (TargetRatio) or success rate (NFT). Only for those shapes.
        kl_weight: (tokens,). Multiplies the KL term.
        anchor_logp: (tokens,), nats. Log-probability that `objective.anchor` compares with. Only with an anchor.
        anchor_weight: (tokens,). Multiplies the anchor term.
        entropy_weight: (tokens,). Multiplies the entropy term.

    Returns:
        PolicyLoss(loss, token_loss, loss_sum, count, metrics).

    Numerics: per-token math in float32, sums in float64 in a fixed order, so results are bitwise
        repeatable for any number of threads. float64 logp uses the float64 reference. Without a valid
        token the loss is 0 with zero gradients.

    Gradients and memory: logp and entropy receive gradients. Every other input that requires grad
        raises an error. Saved: two (tokens,) vectors.

    Examples:
        >>> logp = torch.tensor([-1.0, -2.0], requires_grad=True)
        >>> out = tokfuse.policy_loss(
        ...     logp, old_logp=logp.detach(), advantage=torch.tensor([1.0, -1.0]),
        ...     objective=tokfuse.Objective(), normalizer="batch",
        ... )
        >>> out.loss.backward()
        >>> logp.grad
        tensor([-0.5000,  0.5000])

    Raises:
        ValueError: wrong shape, dtype or device; invalid cu_seqlens; an unknown option; an input that
            the objective needs but does not get, or gets but does not use.

    Source: the shapes of `tokfuse.Objective` name theirs. Aggregations: DAPO (arXiv 2503.14476), GRPO
        (arXiv 2402.03300), Dr.GRPO (arXiv 2503.20783). Exact.
    """
    inputs = PolicyInputs(
        old_logp,
        advantage,
        advantage_level,
        mask,
        cu_seqlens,
        token_weight,
        signal,
        ref_logp,
        kl_weight,
        entropy_weight,
        anchor_logp,
        anchor_weight,
    )
    if sampler_logp is None:
        done = _eager(logp, entropy, inputs, objective, normalizer)
        if done is not None:
            return done
    policy_inputs.check_logp(OP, logp, entropy)
    policy_inputs.check_inputs(OP, inputs, objective, logp.shape[0], logp.device, entropy is not None)
    policy_inputs.check_sampler(OP, sampler_logp, logp.shape[0], logp.device)
    inv_normalizer = inverse_normalizer(OP, normalizer, objective)
    terms = _apply(logp, entropy, inputs, objective, inv_normalizer)
    sampler_kl = sampler_mismatch(sampler_logp, inputs, logp)
    return loss_result(terms, inputs, objective, inv_normalizer, entropy is not None, sampler_kl)


def _eager(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, normalizer: Normalizer
) -> PolicyLoss | None:
    """Compute a plain call by one native function. Return None if the call needs the general path."""
    native_module = eager_cpu(logp) or cuda_backend.eager(logp)
    if native_module is None or not isinstance(objective, Objective) or objective.shape.code is None:
        return None
    inv_normalizer = inverse_normalizer(OP, normalizer, objective)
    out = native_module.eager_policy_loss(
        logp, entropy, inputs, objective.record, objective.counts_sequences, inv_normalizer, torch.get_num_threads()
    )
    if out is None:
        return None
    loss, loss_sum, count, token_loss, sums, d_logp, d_entropy = out
    if torch.is_grad_enabled() and (logp.requires_grad or (entropy is not None and entropy.requires_grad)):
        terms = PolicyTerms(loss, token_loss, d_logp, d_entropy, sums)
        loss = _PolicyLossFunction.apply(logp, entropy, terms)
    metrics = Metrics(sums, ABSENT[inputs.ref_logp is not None, entropy is not None])
    return PolicyLoss(loss, token_loss, loss_sum, count, metrics)


def _apply(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> PolicyTerms:
    capability = select(OP, logp.device.type, logp.dtype, objective.features())
    if capability.backend == "reference":
        return reference_policy.policy_loss(logp, entropy, inputs, objective, inv_normalizer)
    if torch.compiler.is_compiling():
        return PolicyTerms(*_policy_loss_op(logp, entropy, *inputs, *flat_objective(objective), inv_normalizer))
    terms: PolicyTerms = capability.run(logp, entropy, inputs, objective, inv_normalizer)
    return terms._replace(loss=_PolicyLossFunction.apply(logp, entropy, terms))


register_cpu(OP, cpu_policy.policy_loss, FLOAT_DTYPES)
register_cuda(OP, cuda_policy.policy_loss, FLOAT_DTYPES)
register_triton(OP, triton_policy.policy_loss, FLOAT_DTYPES)
register_reference(OP, reference_policy.policy_loss, WITHOUT_KERNELS)


# -------------------------------------------------------------------------------- autograd, compile


class _PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: torch.Tensor, entropy: torch.Tensor | None, terms: PolicyTerms) -> torch.Tensor:
        ctx.save_for_backward(terms.d_logp, terms.d_entropy)
        ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
        return terms.loss

    @staticmethod
    @first_order("policy_loss")
    @ranged("policy_loss.bwd")
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        d_logp, d_entropy = ctx.saved_tensors
        logp_dtype, entropy_dtype = ctx.dtypes
        grad_entropy = None
        if ctx.needs_input_grad[1]:
            grad_entropy = (d_entropy * grad_loss).to(entropy_dtype)
        return (d_logp * grad_loss).to(logp_dtype), grad_entropy, None


@graph_op(
    "tokfuse::policy_loss",
    f"(Tensor logp, Tensor? entropy, {INPUTS_SCHEMA}, {OBJECTIVE_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
@ranged("policy_loss.fwd")
def _policy_loss_op(logp: torch.Tensor, entropy: torch.Tensor | None, *rest: Any) -> tuple[torch.Tensor, ...]:
    *inputs, form, coefficients, inv_normalizer = rest
    objective = objective_of(form, coefficients)
    run: LossRun = select(OP, logp.device.type, logp.dtype, objective.features()).run
    terms = run(logp, entropy, PolicyInputs(*inputs), objective, checked_inverse(OP, inv_normalizer))
    return terms.loss, terms.token_loss, terms.d_logp, terms.d_entropy, terms.sums


@_policy_loss_op.register_fake
def _(logp: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    vectors = [logp.new_empty(logp.shape, dtype=torch.float32) for _ in range(3)]
    sums = logp.new_empty(len(SLOTS), dtype=torch.float64)
    return (logp.new_empty((), dtype=torch.float32), *vectors, sums)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logp, entropy = inputs[0], inputs[1]
    ctx.save_for_backward(output[2], output[3])
    ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    d_logp, d_entropy = ctx.saved_tensors
    logp_dtype, entropy_dtype = ctx.dtypes
    grad_entropy = None if entropy_dtype is None else (d_entropy * grad_loss).to(entropy_dtype)
    rest = [None] * (ctx.inputs - 2)
    return ((d_logp * grad_loss).to(logp_dtype), grad_entropy, *rest)


_policy_loss_op.register_autograd(_op_backward, setup_context=_setup_context)
