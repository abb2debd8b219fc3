"""policy_loss: a clipped-ratio objective, its gradient coefficients and metrics in one launch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_policy, triton_backend, triton_objective
from tokfuse.runtime.backends.policy_record import policy_record
from tokfuse.runtime.core import native
from tokfuse.runtime.core.dispatch import (
    FLOAT_DTYPES,
    eager_cpu,
    register_cpu,
    register_cuda,
    register_reference,
    register_triton,
    select,
)
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.policy import policy_checks
from tokfuse.runtime.policy.metrics import SLOT, SLOTS, Metrics
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.reference import policy_loss as reference
from tokfuse.runtime.reference.policy_loss import PolicyInputs

OP = "policy_loss"


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


class PolicyTerms(NamedTuple):
    """What a backend computes from one batch."""

    loss: torch.Tensor
    token_loss: torch.Tensor
    d_logp: torch.Tensor
    d_entropy: torch.Tensor
    sums: torch.Tensor


@ranged("policy_loss.fwd")
def policy_loss(
    logp: torch.Tensor,
    *,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: policy_checks.Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    advantage_level: str = "token",
    token_weight: torch.Tensor | None = None,
    signal: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
) -> PolicyLoss:
    """Loss, gradient coefficients and metrics of a policy objective over packed tokens.

    loss = 1 / normalizer * sum_t agg_t [ weight_t phi(log_ratio_t, advantage_t)
           + kl.coef kl_weight_t KL_t - entropy_coef entropy_weight_t entropy_t ],
    log_ratio = logp - old_logp (its mean or sum over the sequence for sequence levels), agg_t = 1,
    or 1 / (valid tokens of the sequence) for "seq_mean_token_mean".

    Args:
        logp: (tokens,) floating, nats, of the current policy; receives a gradient.
        old_logp: (tokens,), nats, at the start of the update. None: on policy, logp itself without
            its gradient; every ratio is 1.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence".
        objective: an `Objective`.
        mask: (tokens,) bool, True counts. None: all tokens. Values at masked tokens are never used.
        cu_seqlens: (seqs + 1,) int32 packing offsets; needed where the objective or
            advantage_level looks at sequences.
        normalizer: None: no division, `loss` is the aggregated sum. A number or 0-dim tensor:
            divides (global token or sequence count). "batch": this batch's own count.
        ref_logp: (tokens,), nats, reference policy; needed by, and only by, a KL term or its
            metric.
        sampler_logp: (tokens,), nats, from the rollout engine: adds the mismatch metric
            sampler_kl_k3. To correct for it, pass `token_weight` from `tokfuse.offpolicy_weights`.
        entropy: (tokens,), nats, of the current policy; receives a gradient with an entropy bonus.
        advantage_level: "token" or "sequence"; never guessed from the shape.
        token_weight: (tokens,) multiplies the policy term (importance weights, selection masks).
        signal: (tokens,) target signal (TargetRatio) or success rate (NFT); only for those shapes.
        kl_weight, entropy_weight: (tokens,) multiply the KL and the entropy term.

    Returns:
        PolicyLoss(loss, token_loss, loss_sum, count, metrics).

    Numerics: per-token math in float32, sums in float64 in a fixed order: bitwise repeatable
        whatever the thread count. float64 logp uses the float64 reference. No valid token: loss 0
        with zero gradients.

    Gradients and memory: logp and entropy only; every other input that requires grad is refused.
        Saved: two (tokens,) vectors.

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
        ValueError: shapes, dtypes, devices, cu_seqlens, unknown options, an input that the
            objective needs and lacks, or is given and does not use.

    Source: see the shapes in `tokfuse.Objective`; aggregations as DAPO (arXiv 2503.14476), GRPO
        (2402.03300), Dr.GRPO (2503.20783). Exact.
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
    )
    if sampler_logp is None:
        done = _eager(logp, entropy, inputs, objective, normalizer)
        if done is not None:
            return done
    policy_checks.check_logp(OP, logp, entropy)
    policy_checks.check_inputs(OP, inputs, objective, logp.shape[0], logp.device, entropy is not None)
    policy_checks.check_sampler(OP, sampler_logp, logp.shape[0], logp.device)
    inverse = policy_checks.inverse_normalizer(OP, normalizer, objective)
    terms = _apply(logp, entropy, inputs, objective, inverse)
    sampler_kl = policy_checks.sampler_mismatch(sampler_logp, inputs, logp)
    return finish(terms, inputs, objective, inverse, entropy is not None, sampler_kl)


def _eager(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    normalizer: policy_checks.Normalizer,
) -> PolicyLoss | None:
    """A plain call on the CPU, answered by one native function; None: take the general path."""
    native_module = eager_cpu()
    if native_module is None or not isinstance(objective, Objective):
        return None
    inverse = policy_checks.inverse_normalizer(OP, normalizer, objective)
    out = native_module.eager_policy_loss(
        logp, entropy, inputs, objective.record, objective.counts_sequences, inverse, torch.get_num_threads()
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
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    capability = select(OP, logp.device.type, logp.dtype)
    if capability.backend == "reference":
        return _reference_run(logp, entropy, inputs, objective, inverse)
    if torch.compiler.is_compiling():
        return PolicyTerms(*_custom_op(logp, entropy, inputs, objective, inverse))
    terms: PolicyTerms = capability.run(logp, entropy, inputs, objective, inverse)
    return terms._replace(loss=_PolicyLossFunction.apply(logp, entropy, terms))


def finish(
    terms: PolicyTerms,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    has_entropy: bool,
    sampler_kl: torch.Tensor | None,
) -> PolicyLoss:
    """Assemble the public result from a backend's terms."""
    sums = terms.sums
    count = sums[SLOT["seqs" if objective.counts_sequences else "tokens"]]
    loss = terms.loss.detach()
    loss_sum = loss * count.to(loss.dtype) if inverse < 0 else loss / inverse
    absent = ABSENT[inputs.ref_logp is not None, has_entropy]
    metrics = Metrics(sums, absent, sampler_kl)
    return PolicyLoss(terms.loss, terms.token_loss, loss_sum, count, metrics)


_REFERENCE_KL = frozenset({"ref_kl_k1", "ref_kl_k3"})
# (has ref_logp, has entropy) -> metrics that such a batch does not have
ABSENT = {
    (True, True): frozenset[str](),
    (True, False): frozenset({"entropy"}),
    (False, True): _REFERENCE_KL,
    (False, False): _REFERENCE_KL | {"entropy"},
}


# ---------------------------------------------------------------------------------------- backends


def usable_by_autograd(x: Any) -> Any:
    """A copy of a tensor made under torch.inference_mode, which autograd could not save."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def _reference_run(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    loss, token_loss, sums = reference.forward(logp, entropy, inputs, objective, inverse)
    if torch.compiler.is_compiling():
        zero = torch.zeros_like(token_loss)
        return PolicyTerms(loss, token_loss, zero, zero, sums)
    with torch.inference_mode(False), torch.enable_grad():
        x = usable_by_autograd(logp.detach()).requires_grad_()
        h = None if entropy is None else usable_by_autograd(entropy.detach()).requires_grad_()
        given = PolicyInputs(*map(usable_by_autograd, inputs))
        again, *_ = reference.forward(x, h, given, objective, inverse)
        leaves = [x] if h is None else [x, h]
        grads = torch.autograd.grad(again, leaves, allow_unused=True, materialize_grads=True)
    d_entropy = grads[1] if h is not None else torch.zeros_like(grads[0])
    rows = (grads[0] != 0) | (d_entropy != 0)
    sums[SLOT["grad_rows"]] = rows.sum()
    return PolicyTerms(loss, token_loss, grads[0], d_entropy, sums)


def native_record(
    logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    out: tuple[torch.Tensor, ...],
) -> tuple[tuple[Any, ...], list[torch.Tensor | None]]:
    """(record for tokfuse._native, tensors that must outlive the call).

    out = (token_loss, d_logp, d_entropy, sums, scratch), see `policy_record`.
    """
    *results, scratch = out
    record, alive = policy_record(logp, entropy, inputs, objective, inverse, results)
    return (*record, torch.get_num_threads(), scratch.data_ptr()), [*alive, scratch]


def native_outputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """(token_loss, d_logp, d_entropy, sums, scratch) for `native_record`."""
    vectors = [torch.empty(tokens, dtype=torch.float32) for _ in range(3)]
    sums = torch.empty(len(SLOTS), dtype=torch.float64)
    return (*vectors, sums, torch.empty(4 * tokens, dtype=torch.float32))


def _cpu_run(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    out = native_outputs(logp.shape[0])
    record, alive = native_record(logp, entropy, inputs, objective, inverse, out)
    module = native.module()
    assert module is not None
    module.policy_loss(record)
    del alive
    token_loss, d_logp, d_entropy, sums, _ = out
    loss = sums[SLOT["loss"]].to(torch.float32)
    return PolicyTerms(loss, token_loss, d_logp, d_entropy, sums)


def _cuda_run(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    if inputs.old_logp is None:
        inputs = inputs._replace(old_logp=logp.detach())
    out = cuda_policy.policy_loss(logp, entropy, inputs, objective, inverse)
    token_loss, d_logp, d_entropy, sums = out
    loss = sums[SLOT["loss"]].to(torch.float32)
    return PolicyTerms(loss, token_loss, d_logp, d_entropy, sums)


_launch_tokens = triton_backend.launcher("policy_loss", "policy_loss")
_launch_sequences = triton_backend.launcher("policy_loss", "policy_loss_sequence")


def _triton_run(
    logp: torch.Tensor, entropy: torch.Tensor | None, inputs: PolicyInputs, objective: Objective, inverse: float
) -> PolicyTerms:
    if inputs.old_logp is None:
        inputs = inputs._replace(old_logp=logp.detach())
    given = triton_objective.encode(inputs, objective, inverse)
    _, level, _, seq_mean, *_ = objective.record
    x, h = native.float_vector(logp), native.float_vector(entropy)
    if objective.level == "token":
        out, sums = _launch_tokens(x, h, given.pointers, given.numbers, given.codes, given.scale, given.counts)
    else:
        assert inputs.cu_seqlens is not None
        out, sums = _launch_sequences(
            x,
            h,
            inputs.cu_seqlens.contiguous(),
            given.pointers,
            given.numbers,
            (*given.codes, level),
            given.scale,
            seq_mean=bool(seq_mean),
            seq_advantage=inputs.advantage_level == "sequence",
        )
    loss = sums[SLOT["loss"]].to(torch.float32)
    return PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, sums)


register_cpu(OP, _cpu_run, FLOAT_DTYPES)
register_cuda(OP, _cuda_run, FLOAT_DTYPES)
register_triton(OP, _triton_run, FLOAT_DTYPES)
register_reference(OP, _reference_run)


# -------------------------------------------------------------------------------- autograd, compile


class _PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logp: torch.Tensor, entropy: torch.Tensor | None, terms: PolicyTerms) -> torch.Tensor:
        ctx.save_for_backward(terms.d_logp, terms.d_entropy)
        ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
        return terms.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    @ranged("policy_loss.bwd")
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        d_logp, d_entropy = ctx.saved_tensors
        logp_dtype, entropy_dtype = ctx.dtypes
        grad_entropy = None
        if ctx.needs_input_grad[1]:
            grad_entropy = (d_entropy * grad_loss).to(entropy_dtype)
        return (d_logp * grad_loss).to(logp_dtype), grad_entropy, None


@torch.library.custom_op("tokfuse::policy_loss", mutates_args=())
@ranged("policy_loss.fwd")
def _policy_loss_op(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    advantage_level: str,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    token_weight: torch.Tensor | None,
    signal: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    kl_weight: torch.Tensor | None,
    entropy_weight: torch.Tensor | None,
    objective_key: str,
    inverse: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
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
    )
    run = select(OP, logp.device.type, logp.dtype).run
    terms = run(logp, entropy, inputs, _OBJECTIVES[objective_key], inverse)
    return tuple(terms)


@_policy_loss_op.register_fake
def _(logp: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    vectors = [logp.new_empty(logp.shape, dtype=torch.float32) for _ in range(3)]
    sums = logp.new_empty(len(SLOTS), dtype=torch.float64)
    return (logp.new_empty((), dtype=torch.float32), *vectors, sums)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    logp, entropy = inputs[0], inputs[1]
    ctx.save_for_backward(output[2], output[3])
    ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    d_logp, d_entropy = ctx.saved_tensors
    logp_dtype, entropy_dtype = ctx.dtypes
    grad_entropy = None if entropy_dtype is None else (d_entropy * grad_loss).to(entropy_dtype)
    return ((d_logp * grad_loss).to(logp_dtype), grad_entropy) + (None,) * 12


_policy_loss_op.register_autograd(_op_backward, setup_context=_setup_context)

# A custom op takes no dataclass; the spec's repr names it exactly.
_OBJECTIVES: dict[str, Objective] = {}


def objective_key(objective: Objective) -> str:
    """A string that stands for the objective in a custom op's schema."""
    key = repr(objective)
    _OBJECTIVES.setdefault(key, objective)
    return key


objective_key._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as dispatch.select


def objective_of(key: str) -> Objective:
    """The objective behind `objective_key`."""
    return _OBJECTIVES[key]


def _custom_op(
    logp: torch.Tensor, entropy: torch.Tensor | None, i: PolicyInputs, objective: Objective, inverse: float
) -> tuple[torch.Tensor, ...]:
    out = _policy_loss_op(
        logp,
        entropy,
        i.old_logp,
        i.advantage,
        i.advantage_level,
        i.mask,
        i.cu_seqlens,
        i.token_weight,
        i.signal,
        i.ref_logp,
        i.kl_weight,
        i.entropy_weight,
        objective_key(objective),
        inverse,
    )
    return tuple(out)
