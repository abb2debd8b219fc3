"""policy_loss: a clipped-ratio objective, its gradient coefficients and metrics in one launch."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.runtime import checks, native, triton_backend, triton_objective
from tokfuse.runtime.dispatch import (
    FLOAT_DTYPES,
    eager_cpu,
    register_cpu,
    register_reference,
    register_triton,
    select,
)
from tokfuse.runtime.errors import refuse
from tokfuse.runtime.metrics import SLOT, SLOTS, Metrics
from tokfuse.runtime.objective import Objective
from tokfuse.runtime.reference import policy_loss as reference
from tokfuse.runtime.reference.policy_loss import PolicyInputs

OP = "policy_loss"
Normalizer = float | int | str | torch.Tensor | None


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


def policy_loss(
    logp: torch.Tensor,
    *,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    entropy: torch.Tensor | None = None,
    advantage_level: str = "token",
    weight: torch.Tensor | None = None,
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
        old_logp: (tokens,), nats, at the start of the update.
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
            sampler_kl_k3. To correct for it, pass `weight` from `tokfuse.offpolicy_weights`.
        entropy: (tokens,), nats, of the current policy; receives a gradient with an entropy bonus.
        advantage_level: "token" or "sequence"; never guessed from the shape.
        weight: (tokens,) multiplies the policy term (importance weights, selection masks).
        signal: (tokens,) target signal (TargetRatio) or success rate (NFT); only for those shapes.
        kl_weight, entropy_weight: (tokens,) multiply the KL and the entropy term.

    Returns:
        PolicyLoss(loss, token_loss, loss_sum, count, metrics).

    Numerics: per-token math in float32, sums in float64 in a fixed order: bitwise repeatable
        whatever the thread count. float64 logp uses the float64 reference. No valid token: loss 0
        with zero gradients.

    Gradients and memory: logp and entropy only; every other input that requires grad is refused.
        Saved: two (tokens,) vectors.

    Raises:
        ValueError: shapes, dtypes, devices, cu_seqlens, unknown options, an input that the
            objective needs and lacks, or is given and does not use.

    Source: see the shapes in `tokfuse.Objective`; aggregations as DAPO (arXiv 2503.14476), GRPO
        (2402.03300), Dr.GRPO (2503.20783). Exact.
    """
    inputs = PolicyInputs(
        old_logp, advantage, advantage_level, mask, cu_seqlens,
        weight, signal, ref_logp, kl_weight, entropy_weight,
    )  # fmt: skip
    if sampler_logp is None:
        done = _eager(logp, entropy, inputs, objective, normalizer)
        if done is not None:
            return done
    check_logp(OP, logp, entropy)
    check_inputs(OP, inputs, objective, logp.shape[0], logp.device, entropy is not None)
    inverse = inverse_normalizer(OP, normalizer, objective)
    terms = _apply(logp, entropy, inputs, objective, inverse)
    sampler_kl = sampler_mismatch(OP, sampler_logp, inputs, logp)
    return finish(terms, inputs, objective, inverse, entropy is not None, sampler_kl)


def _eager(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    normalizer: Normalizer,
) -> PolicyLoss | None:
    """A plain call on the CPU, answered by one native function; None: take the general path."""
    native_module = eager_cpu()
    if native_module is None or not isinstance(objective, Objective):
        return None
    inverse = inverse_normalizer(OP, normalizer, objective)
    out = native_module.eager_policy_loss(
        logp, entropy, inputs, objective.record, objective.counts_sequences, inverse,
        torch.get_num_threads(),
    )  # fmt: skip
    if out is None:
        return None
    loss, loss_sum, count, token_loss, sums, d_logp, d_entropy = out
    if torch.is_grad_enabled() and (
        logp.requires_grad or (entropy is not None and entropy.requires_grad)
    ):
        terms = PolicyTerms(loss, token_loss, d_logp, d_entropy, sums)
        loss = _PolicyLossFunction.apply(logp, entropy, terms)
    metrics = Metrics(sums, ABSENT[inputs.ref_logp is not None, entropy is not None])
    return PolicyLoss(loss, token_loss, loss_sum, count, metrics)


def _apply(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
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


# ------------------------------------------------------------------------------------------ checks


def check_logp(op: str, logp: torch.Tensor, entropy: torch.Tensor | None) -> None:
    """The two differentiable vectors."""
    checks.require_tensor(op, "logp", logp)
    if logp.dim() != 1 or not logp.dtype.is_floating_point:
        raise refuse(op, "logp", "a floating vector of shape (tokens,)",
                     f"{tuple(logp.shape)} {logp.dtype}", "Pack padded batches first.")  # fmt: skip
    if entropy is not None:
        checks.check_vector(op, "entropy", entropy.detach(), logp.shape[0], "tokens", logp.device)


def check_inputs(
    op: str,
    inputs: PolicyInputs,
    objective: Objective,
    tokens: int,
    device: torch.device,
    has_entropy: bool,
) -> None:
    """Shapes of every input, and that the objective has what it needs and nothing it ignores."""
    if not isinstance(objective, Objective):
        raise TypeError(
            f"{op}: objective must be a tokfuse.Objective; got {type(objective).__name__}. "
            "Build one, for example Objective(shape=PPOClip(low=0.2, high=0.28))."
        )
    if inputs.advantage_level not in ("token", "sequence"):
        raise refuse(op, "advantage_level", "'token' or 'sequence'",
                     repr(inputs.advantage_level), "Pass one of the two.")  # fmt: skip
    checks.check_mask(op, inputs.mask, tokens, device)
    per_sequence = inputs.advantage_level == "sequence"
    if inputs.cu_seqlens is not None:
        checks.check_cu_seqlens(op, inputs.cu_seqlens, tokens, device)
    elif objective.needs_sequences or per_sequence or objective.counts_sequences:
        why = "advantage_level='sequence'" if per_sequence else (
            f"level={objective.level!r}, aggregation={objective.aggregation!r}")  # fmt: skip
        raise refuse(op, "cu_seqlens", f"given for {why}", "None",
                     "Pass the packing offsets (seqs + 1,) int32.")  # fmt: skip
    size, like = tokens, "tokens"
    if per_sequence:
        assert inputs.cu_seqlens is not None
        size, like = inputs.cu_seqlens.shape[0] - 1, "seqs"
    checks.check_vector(op, "advantage", inputs.advantage, size, like, device)
    for name in ("old_logp", "weight", "signal", "ref_logp", "kl_weight", "entropy_weight"):
        value = getattr(inputs, name)
        if value is not None or name == "old_logp":
            checks.check_vector(op, name, value, tokens, "tokens", device)
    _check_used(op, inputs, objective, has_entropy)


def _check_used(op: str, inputs: PolicyInputs, o: Objective, has_entropy: bool) -> None:
    shape = type(o.shape).__name__
    needs = [
        ("signal", o.shape.needs_signal, inputs.signal is not None, f"shape {shape}"),
        ("kl_weight", None, inputs.kl_weight is not None and o.kl is None, "kl=None"),
        ("ref_logp", o.kl is not None, inputs.ref_logp is not None, "a KL term"),
        ("entropy", o.entropy_coef != 0.0, has_entropy, "an entropy bonus"),
        ("entropy_weight", None, inputs.entropy_weight is not None and o.entropy_coef == 0.0,
         "entropy_coef=0"),
    ]  # fmt: skip
    for name, needed, given, what in needs:
        if needed and not given:
            raise refuse(op, name, f"given for {what}", "None", "Pass one value per token.")
        if needed is None and given:
            raise refuse(op, name, f"None with {what}", "a tensor", "It would be ignored.")
    if inputs.signal is not None and not o.shape.needs_signal:
        raise refuse(op, "signal", f"None with shape {shape}", "a tensor", "It would be ignored.")


def inverse_normalizer(op: str, normalizer: Normalizer, objective: Objective) -> float:
    """1 / normalizer; 1.0 for None, -1.0 for "batch" (the batch's own count)."""
    if normalizer is None:
        return 1.0
    if isinstance(normalizer, str):
        if normalizer != "batch":
            raise refuse(op, "normalizer", "None, a number, a 0-dim tensor or 'batch'",
                         repr(normalizer), "Pass the global count.")  # fmt: skip
        if objective.aggregation == "token_sum":
            raise refuse(op, "normalizer", "a number with aggregation='token_sum'", "'batch'",
                         "Dr.GRPO divides by sequences * max length; pass that.")  # fmt: skip
        return -1.0
    if isinstance(normalizer, torch.Tensor):
        if normalizer.numel() != 1:
            raise refuse(op, "normalizer", "a 0-dim tensor", f"shape {tuple(normalizer.shape)}",
                         "Pass the global count.")  # fmt: skip
        normalizer = float(normalizer)
    if not 0.0 < normalizer < float("inf"):
        raise refuse(op, "normalizer", "a finite number > 0", repr(normalizer),
                     "Pass the global count, or None for the sum.")  # fmt: skip
    return 1.0 / normalizer


def sampler_mismatch(
    op: str, sampler_logp: torch.Tensor | None, inputs: PolicyInputs, like: torch.Tensor
) -> torch.Tensor | None:
    """Sum over valid tokens of the k3 estimate of KL(sampler || old policy)."""
    if sampler_logp is None:
        return None
    checks.check_vector(op, "sampler_logp", sampler_logp, like.shape[0], "tokens", like.device)
    d = (inputs.old_logp.double() - sampler_logp.double()).clamp(-20, 20)
    k3 = torch.expm1(d) - d
    return (k3 if inputs.mask is None else torch.where(inputs.mask, k3, 0.0)).sum()


# ---------------------------------------------------------------------------------------- backends


def usable_by_autograd(x: Any) -> Any:
    """A copy of a tensor made under torch.inference_mode, which autograd could not save."""
    return x.clone() if isinstance(x, torch.Tensor) and x.is_inference() else x


def _reference_run(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
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

    out = (token_loss, d_logp, d_entropy, sums, scratch).
    """

    vector, i = native.float_vector, inputs
    mask = None if i.mask is None else i.mask.contiguous()
    cu = None if i.cu_seqlens is None else i.cu_seqlens.contiguous()
    alive = [
        vector(logp), vector(i.old_logp), vector(i.advantage), mask, cu, vector(i.weight),
        vector(i.signal), vector(i.ref_logp), vector(i.kl_weight), vector(entropy),
        vector(i.entropy_weight), *out,
    ]  # fmt: skip
    p = [native.pointer(x) for x in alive]
    record = (
        objective.record, i.old_logp.shape[0], 0 if cu is None else cu.shape[0] - 1,
        p[0], p[1], p[2], int(i.advantage_level == "sequence"), p[3], p[4], p[5], p[6], p[7],
        p[8], p[9], p[10], inverse, int(objective.counts_sequences), torch.get_num_threads(),
        *p[11:],
    )  # fmt: skip
    return record, alive


def native_outputs(tokens: int) -> tuple[torch.Tensor, ...]:
    """(token_loss, d_logp, d_entropy, sums, scratch) for `native_record`."""
    vectors = [torch.empty(tokens, dtype=torch.float32) for _ in range(3)]
    sums = torch.empty(len(SLOTS), dtype=torch.float64)
    return (*vectors, sums, torch.empty(4 * tokens, dtype=torch.float32))


def _cpu_run(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
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


_launch_tokens = triton_backend.launcher("policy_loss", "policy_loss")
_launch_sequences = triton_backend.launcher("policy_loss", "policy_loss_sequence")


def _triton_run(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
) -> PolicyTerms:
    given = triton_objective.encode(inputs, objective, inverse)
    _, level, _, seq_mean, *_ = objective.record
    x, h = native.float_vector(logp), native.float_vector(entropy)
    if objective.level == "token":
        out, sums = _launch_tokens(
            x, h, given.pointers, given.numbers, given.codes, given.scale, given.counts
        )
    else:
        assert inputs.cu_seqlens is not None
        out, sums = _launch_sequences(
            x, h, inputs.cu_seqlens.contiguous(), given.pointers, given.numbers,
            (*given.codes, level), given.scale, seq_mean=bool(seq_mean),
            seq_advantage=inputs.advantage_level == "sequence",
        )  # fmt: skip
    loss = sums[SLOT["loss"]].to(torch.float32)
    return PolicyTerms(loss, out.token_loss, out.d_logp, out.d_entropy, sums)


register_cpu(OP, _cpu_run, FLOAT_DTYPES)
register_triton(OP, _triton_run, FLOAT_DTYPES)
register_reference(OP, _reference_run)


# -------------------------------------------------------------------------------- autograd, compile


class _PolicyLossFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logp: torch.Tensor, entropy: torch.Tensor | None, terms: PolicyTerms
    ) -> torch.Tensor:
        ctx.save_for_backward(terms.d_logp, terms.d_entropy)
        ctx.dtypes = (logp.dtype, None if entropy is None else entropy.dtype)
        return terms.loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor) -> tuple[Any, ...]:
        d_logp, d_entropy = ctx.saved_tensors
        logp_dtype, entropy_dtype = ctx.dtypes
        grad_entropy = None
        if ctx.needs_input_grad[1]:
            grad_entropy = (d_entropy * grad_loss).to(entropy_dtype)
        return (d_logp * grad_loss).to(logp_dtype), grad_entropy, None


@torch.library.custom_op("tokfuse::policy_loss", mutates_args=())
def _policy_loss_op(
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    old_logp: torch.Tensor,
    advantage: torch.Tensor,
    advantage_level: str,
    mask: torch.Tensor | None,
    cu_seqlens: torch.Tensor | None,
    weight: torch.Tensor | None,
    signal: torch.Tensor | None,
    ref_logp: torch.Tensor | None,
    kl_weight: torch.Tensor | None,
    entropy_weight: torch.Tensor | None,
    objective_key: str,
    inverse: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs = PolicyInputs(
        old_logp, advantage, advantage_level, mask, cu_seqlens,
        weight, signal, ref_logp, kl_weight, entropy_weight,
    )  # fmt: skip
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
    logp: torch.Tensor,
    entropy: torch.Tensor | None,
    i: PolicyInputs,
    objective: Objective,
    inverse: float,
) -> tuple[torch.Tensor, ...]:
    out = _policy_loss_op(
        logp, entropy, i.old_logp, i.advantage, i.advantage_level, i.mask, i.cu_seqlens, i.weight,
        i.signal, i.ref_logp, i.kl_weight, i.entropy_weight, objective_key(objective), inverse,
    )  # fmt: skip
    return tuple(out)
