"""`tokfuse.policy_step`: loss and gradient of a policy objective, from logits or from hidden states."""

from dataclasses import replace
from typing import Any

import torch

from tokfuse.runtime.backends import cpu_policy, cuda_backend, cuda_policy, kept_rows, reference_policy, triton_policy
from tokfuse.runtime.backends.policy_runs import StepRun, device_run
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forced import eager_cpu
from tokfuse.runtime.core.forward_gradients import Gradients, with_gradients
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.leading import Leading, without_ignored
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_MASK, LogitOptions, check_logits, check_values
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.lm_head import problem as heads
from tokfuse.runtime.ops import influence as influence_op
from tokfuse.runtime.ops import policy_step_hidden as hidden_step
from tokfuse.runtime.ops.influence import InfluenceSpec
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
from tokfuse.runtime.policy.results import ABSENT, PolicyStep, PolicyTerms, step_result
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS
from tokfuse.runtime.reference import kept_token_stats as kept_reference

OP = "policy_step"


@ranged("policy_step.fwd")
def policy_step(
    *,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    target: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    advantage_level: str = "token",
    token_weight: torch.Tensor | None = None,
    signal: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    anchor_logp: torch.Tensor | None = None,
    anchor_weight: torch.Tensor | None = None,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    compact_clipped: bool = False,
    influence: InfluenceSpec | None = None,
    ignore_index: int | None = None,
) -> PolicyStep:
    """Return loss, gradients, statistics and metrics of a policy objective in one step.

    The result equals `policy_loss(token_stats(logits, target).logp, ...)` with its autograd, or the same
    with `linear_token_stats`. But the gradient is computed in the forward, in the same pass over the
    logits. `loss` is differentiable: call `step.loss.backward()`.

    All arguments are keywords. The list below has the input (logits, or hidden and the head), the batch
    (`target` to `cu_seqlens`), the objective and its inputs (`objective` to `sampler_logp`), the options
    of the distribution (`kept_ids` to `logit_scale`), and the options of the computation.

    The shapes below are for packed tokens. Leading dimensions work too: with logits of shape
    (..., vocab) or hidden of shape (..., hidden), every (tokens,) argument has shape (...), and so have
    `token_loss` and `stats`. With (batch, length) and without cu_seqlens, each row of the batch is a
    sequence. A contiguous tensor is not copied.

    Args:
        logits: (tokens, vocab) float32, bfloat16, float16 or float64. None: pass hidden and weight.
        hidden: (tokens, hidden), the hidden states, instead of logits.
        weight: (vocab, hidden), the weight of the lm_head. If hidden has another dtype, the logits are computed
            in the wider dtype, and each gradient has the dtype of its tensor (see `linear_token_stats`).
        bias: (vocab,), the bias of the lm_head. None: no bias.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        old_logp: (tokens,), nats. Log-probability at the start of the update. None: the update is on
            policy, so the log-probabilities of this step are used and every ratio is 1. A GPU then
            needs a pass for the statistics first, like for sequence-level ratios.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence".
        advantage_level: "token" or "sequence". It is never guessed from the shape.
        mask: (tokens,) bool. True = counts. None: all tokens count. Values at masked tokens are never
            used.
        cu_seqlens: (seqs + 1,) int32 packing offsets. Needed if the objective, advantage_level or
            influence uses sequences.
        objective: an `Objective`.
        normalizer: divisor of the loss. A number or 0-dim tensor, usually the global token or sequence
            count; or "batch", the count of this batch. None: no division, `loss` is the aggregated sum.
        token_weight: (tokens,). Multiplies the policy term (importance weights, selection masks).
        signal: (tokens,). Target signal (TargetRatio) or success rate (NFT). Only for those shapes.
        ref_logp: (tokens,), nats. Log-probability under the reference policy. Needed by a KL term.
            Without a KL term it only adds the metrics ref_kl_k1 and ref_kl_k3.
        kl_weight: (tokens,). Multiplies the KL term.
        anchor_logp: (tokens,), nats. Log-probability that `objective.anchor` compares with. Only with an anchor.
        anchor_weight: (tokens,). Multiplies the anchor term.
        entropy_weight: (tokens,). Multiplies the entropy term. The step computes the entropy itself.
        sampler_logp: (tokens,), nats, from the rollout engine. Adds the mismatch metric
            sampler_kl_k3. To correct for it, pass `token_weight` from `tokfuse.offpolicy_weights`.
        kept_ids: (kept,) int32 or int64, the kept ids of all rows, concatenated. The policy is then the
            distribution over the kept ids of each row, as in `kept_token_stats`: pass what a sampler with
            top-p or top-k kept, and log-probabilities over the same ids as old_logp and ref_logp.
            None: over the whole vocabulary.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids per row.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        memory_budget: workspace in bytes for the logits, which are computed in chunks of rows. Only
            with hidden. None: 64 MiB, or a sixth of the weight's float32 size if that is more; on a GPU
            at least the workspace of 1024 rows, up to 1 GiB. A chunk has at least one row.
        compact_clipped: True excludes clipped rows from the gradient GEMMs on a GPU. Triton kernels
            then find the rows in device memory, without a synchronisation. Use it if a large part of the
            batch is clipped; otherwise cuBLAS is faster. On the CPU the GEMMs always exclude clipped rows.
        influence: also return gradient norms and sketches of the loss in `step.influence`. Only with
            hidden and cu_seqlens. It computes grad_hidden even if hidden requires no gradient.
        ignore_index: tokens with this target are left out, as with mask = False: -100 for labels of
            transformers. None: no target is special.

    Returns:
        PolicyStep, with the gradients of `loss` (normaliser included) for the inputs that require grad.
        The gradient of logits is always computed.

    Numerics: same bounds as `token_stats` and `policy_loss`. grad_weight accumulates in float32. The
        fused token-level kernels give bitwise the same loss and metrics as the composition. The fused
        Triton kernel is an exception: it sums a row in larger tiles than its `token_stats`, so it is
        equal within the bounds, but not bitwise. Rows with a zero final coefficient (masked, zero
        advantage, active clip) get an exactly zero gradient without arithmetic. On a GPU, values are
        checked only with TOKFUSE_CHECK=1; without the check, a target or temperature out of range makes
        its row NaN.

    Gradients and memory: with logits, token-level objectives need one read and one write of
        (tokens, vocab), sequence-level ones one more read. With hidden, the extra memory is the
        workspace `memory_budget` and the gradients. On the CPU, rows with a zero final coefficient do
        not enter the gradient GEMMs. On a GPU, rows without advantage, KL and entropy bonus do not enter
        them; clipped rows enter as zeros, unless `compact_clipped` is True. The host
        synchronises once, to read the number of rows of each kind. Under CUDA-graph capture it does not
        synchronise, and every row enters every GEMM, except rows that `compact_clipped` excludes. The
        gradients are stored until `loss.backward()` returns them. With kept ids, logits outside them become -inf:
        one more write of (tokens, vocab), to the memory of the gradient or of the workspace. From logits, only the
        kept logits are read. From hidden, the host synchronises at most twice more.

    Examples:
        >>> logits, target = torch.zeros(2, 4, requires_grad=True), torch.tensor([0, 3])
        >>> step = tokfuse.policy_step(
        ...     logits=logits, target=target, old_logp=torch.full((2,), -1.3863),
        ...     advantage=torch.tensor([1.0, 0.0]), objective=tokfuse.Objective(), normalizer=2,
        ... )
        >>> step.loss.backward()
        >>> logits.grad  # the second row carries no gradient
        tensor([[-0.3750,  0.1250,  0.1250,  0.1250],
                [ 0.0000,  0.0000,  0.0000,  0.0000]])

    Raises:
        ValueError: wrong shape, dtype, device or range; invalid cu_seqlens; an unknown option; an input
            that the objective needs but does not get, or gets but does not use; both or neither of
            logits and hidden.

    Source: the fused gradient is softmax calculus, dz = c (onehot - p) / T - c_H p (log p + H) / T.
        Gradients in the forward: the heads of Fast-LLM and Liger. Exact.
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
    main = logits if logits is not None else hidden
    if ignore_index is not None or (isinstance(main, torch.Tensor) and main.dim() != 2):
        more: dict[str, Any] = {"weight": weight, "bias": bias, "objective": objective, "normalizer": normalizer}
        more |= {"softcap": softcap, "logit_scale": logit_scale, "memory_budget": memory_budget}
        more |= {"compact_clipped": compact_clipped, "influence": influence, "temperature": temperature}
        more |= {"kept_ids": kept_ids, "kept_offsets": kept_offsets}
        return _spread(logits, hidden, target, inputs, sampler_logp, ignore_index, more)
    options = LogitOptions(temperature, softcap, logit_scale, mask)
    checks.check_flag(OP, "compact_clipped", compact_clipped)
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(OP, "input", "either logits= or hidden= with weight=", given, "Pass one of the two.")
    if logits is not None:
        checks.check_unused(OP, "logits=", weight=weight, bias=bias, memory_budget=memory_budget)
        if compact_clipped:
            raise refuse(
                OP, "compact_clipped", "False with logits= (no GEMM follows)", "True", "Pass hidden= and weight=."
            )
        if influence is not None:
            raise refuse(
                OP,
                "influence",
                "None with logits= (sketches need the hidden states)",
                "a spec",
                "Use influence.logit_norms on the statistics.",
            )
        if sampler_logp is None and kept_ids is None and kept_offsets is None:
            done = _eager(OP, logits, target, options, inputs, objective, normalizer)
            if done is not None:
                return done
        options = options.floats()
        inv_normalizer = _check_step(OP, logits, target, options, inputs, objective, normalizer, sampler_logp)
        kept = kept_rows.check_kept(OP, kept_ids, kept_offsets, logits.shape[0], logits.device)
        return _from_logits(OP, logits, target, kept, options, inputs, objective, inv_normalizer, sampler_logp)
    assert hidden is not None
    problem = heads.check_head(OP, hidden, weight, bias, target, options.floats(), memory_budget)
    kept = kept_rows.check_kept(OP, kept_ids, kept_offsets, problem.tokens, hidden.device)
    problem = problem._replace(compact_clipped=compact_clipped, kept=kept)
    inv_normalizer = _check_policy(OP, inputs, objective, hidden.shape[0], hidden.device, normalizer, sampler_logp)
    if influence is not None:
        problem = influence_op.request(OP, influence, problem, cu_seqlens)
    problem = heads.probed(OP, problem, cu_seqlens)
    terms, stats, gradients = hidden_step.apply(problem, inputs, objective, inv_normalizer)
    step = step_result(terms, stats, inputs, objective, inv_normalizer, sampler_logp, gradients)
    if influence is None or cu_seqlens is None:
        return step
    return replace(step, influence=influence_op.collect(influence, problem, gradients, cu_seqlens))


def _spread(
    logits: torch.Tensor | None,
    hidden: torch.Tensor | None,
    target: torch.Tensor,
    inputs: PolicyInputs,
    sampler_logp: torch.Tensor | None,
    ignore_index: int | None,
    more: dict[str, Any],
) -> PolicyStep:
    """Compute a step with other leading dimensions than (tokens,), or with labels to leave out, on packed rows."""
    name = "hidden" if logits is None else "logits"
    main = checks.require_tensor(OP, name, hidden if logits is None else logits)
    if main.dim() < 1:
        raise refuse(OP, name, "(..., columns)", "shape ()", "Pass one row per token.")
    to = Leading(OP, tuple(main.shape[:-1]), name)
    given = inputs._asdict()
    per_sequence = inputs.advantage_level == "sequence"
    for field in policy_inputs.VECTORS:
        if not (field == "advantage" and per_sequence):
            given[field] = to.vector(field, given[field])
    packed = to.vector("target", checks.require_tensor(OP, "target", target))
    given["mask"] = without_ignored(OP, packed, to.vector("mask", inputs.mask), ignore_index)
    if inputs.cu_seqlens is None and len(to.shape) == 2:
        o: Objective = more["objective"]
        if isinstance(o, Objective) and (o.needs_sequences or o.counts_sequences or per_sequence):
            batch, length = to.shape
            given["cu_seqlens"] = torch.arange(batch + 1, dtype=torch.int32, device=main.device) * length
    more["temperature"] = to.vector("temperature", more["temperature"])
    step = policy_step(
        logits=to.rows("logits", logits),
        hidden=to.rows("hidden", hidden),
        target=packed,
        sampler_logp=to.vector("sampler_logp", sampler_logp),
        **given,
        **more,
    )
    shape = None if len(to.shape) == 1 else to.shape
    stats = to.unpack(step.stats)
    influence = step.influence
    if influence is not None:
        norms = {x: to.unpack(getattr(influence, x)) for x in ("token_norms", "head_norms", "hidden_norms")}
        influence = replace(influence, **norms)
    token_loss = to.unpack(step.token_loss)
    return replace(step, token_loss=token_loss, stats=stats, influence=influence, _leading=shape)


@ranged("policy_step_.fwd")
def policy_step_(
    logits: torch.Tensor,
    *,
    target: torch.Tensor,
    old_logp: torch.Tensor | None,
    advantage: torch.Tensor,
    objective: Objective,
    mask: torch.Tensor | None = None,
    cu_seqlens: torch.Tensor | None = None,
    normalizer: Normalizer = None,
    ref_logp: torch.Tensor | None = None,
    sampler_logp: torch.Tensor | None = None,
    advantage_level: str = "token",
    token_weight: torch.Tensor | None = None,
    signal: torch.Tensor | None = None,
    kl_weight: torch.Tensor | None = None,
    entropy_weight: torch.Tensor | None = None,
    anchor_logp: torch.Tensor | None = None,
    anchor_weight: torch.Tensor | None = None,
    kept_ids: torch.Tensor | None = None,
    kept_offsets: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> PolicyStep:
    """Compute `policy_step` from logits in place: the gradient overwrites the logits.

    There is no second (tokens, vocab) buffer. `step.grad_logits` shares its storage with `logits`, and
    `step.loss.backward()` returns it. All checks run before the logits are overwritten.

    Args:
        logits: (tokens, vocab) with a contiguous vocabulary and rows that do not overlap. Overwritten. A
            leaf that requires grad raises an error, because torch does not support in-place operations on it.
        target: (tokens,) int64, in [0, vocab) where mask is True.
        old_logp: (tokens,), nats. Log-probability at the start of the update. None: the update is on
            policy, so the log-probabilities of this step are used and every ratio is 1. A GPU then
            needs a pass for the statistics first, like for sequence-level ratios.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence".
        advantage_level: "token" or "sequence". It is never guessed from the shape.
        mask: (tokens,) bool. True = counts. None: all tokens count. Values at masked tokens are never
            used.
        cu_seqlens: (seqs + 1,) int32 packing offsets. Needed if the objective or advantage_level uses
            sequences.
        objective: an `Objective`.
        normalizer: divisor of the loss. A number or 0-dim tensor, usually the global token or sequence
            count; or "batch", the count of this batch. None: no division, `loss` is the aggregated sum.
        token_weight: (tokens,). Multiplies the policy term (importance weights, selection masks).
        signal: (tokens,). Target signal (TargetRatio) or success rate (NFT). Only for those shapes.
        ref_logp: (tokens,), nats. Log-probability under the reference policy. Needed by a KL term.
            Without a KL term it only adds the metrics ref_kl_k1 and ref_kl_k3.
        kl_weight: (tokens,). Multiplies the KL term.
        anchor_logp: (tokens,), nats. Log-probability that `objective.anchor` compares with. Only with an anchor.
        anchor_weight: (tokens,). Multiplies the anchor term.
        entropy_weight: (tokens,). Multiplies the entropy term. The step computes the entropy itself.
        sampler_logp: (tokens,), nats, from the rollout engine. Adds the mismatch metric
            sampler_kl_k3. To correct for it, pass `token_weight` from `tokfuse.offpolicy_weights`.
        kept_ids: (kept,) int32 or int64, the kept ids of all rows, concatenated. The policy is then the
            distribution over the kept ids of each row, as in `kept_token_stats`: pass what a sampler with
            top-p or top-k kept, and log-probabilities over the same ids as old_logp and ref_logp.
            None: over the whole vocabulary.
        kept_offsets: (tokens + 1,) int32 or int64, exclusive prefix sum of the number of kept ids per row.
        temperature: a number, or (tokens,) one per row; > 0. Divides the logits.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.

    Returns:
        PolicyStep, the same as `policy_step` from logits.

    Raises:
        ValueError: the errors of `policy_step`; logits that cannot be overwritten.
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
    options = LogitOptions(temperature, softcap, logit_scale, mask)
    op = "policy_step_"
    plain = sampler_logp is None and kept_ids is None and kept_offsets is None
    if plain and isinstance(logits, torch.Tensor) and logits.dim() == 2:
        _check_writable(op, logits)
        done = _eager(op, logits, target, options, inputs, objective, normalizer)
        if done is not None:
            return done
    options = options.floats()
    inv_normalizer = _check_step(op, logits, target, options, inputs, objective, normalizer, sampler_logp)
    _check_writable(op, logits)
    kept = kept_rows.check_kept(op, kept_ids, kept_offsets, logits.shape[0], logits.device)
    return _from_logits(op, logits, target, kept, options, inputs, objective, inv_normalizer, sampler_logp)


def _check_writable(op: str, logits: torch.Tensor) -> None:
    if logits.shape[0] > 1 and logits.stride(0) < logits.shape[1] or logits.stride(1) != 1:
        raise refuse(
            op,
            "logits",
            "writable in place (contiguous vocabulary, rows that do not overlap)",
            f"strides {logits.stride()}",
            "Call policy_step instead.",
        )
    if logits.is_leaf and logits.requires_grad and torch.is_grad_enabled():
        raise refuse(
            op, "logits", "no leaf that requires grad", "a leaf", "Call policy_step instead, or detach the logits."
        )
    if torch.compiler.is_compiling():
        raise refuse(op, "logits", "outside torch.compile", "a traced tensor", "Call policy_step inside compiled code.")


def _check_policy(
    op: str,
    inputs: PolicyInputs,
    objective: Objective,
    tokens: int,
    device: torch.device,
    normalizer: Normalizer,
    sampler_logp: torch.Tensor | None,
) -> float:
    policy_inputs.check_inputs(op, inputs, objective, tokens, device, has_entropy=True)
    policy_inputs.check_sampler(op, sampler_logp, tokens, device)
    return inverse_normalizer(op, normalizer, objective)


def _check_step(
    op: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    normalizer: Normalizer,
    sampler_logp: torch.Tensor | None,
) -> float:
    check_logits(op, logits, target, options)
    tokens, device = logits.shape[0], logits.device
    return _check_policy(op, inputs, objective, tokens, device, normalizer, sampler_logp)


# ------------------------------------------------------------------------------------- from logits


def _eager(
    op: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    options: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    normalizer: Normalizer,
) -> PolicyStep | None:
    """Compute a plain call by one native function. Return None if the call needs the general path."""
    native_module = eager_cpu(logits) or cuda_backend.eager(logits)
    if native_module is None or not isinstance(objective, Objective) or objective.shape.code is None:
        return None
    inv_normalizer = inverse_normalizer(op, normalizer, objective)
    in_place = op == "policy_step_"
    out = native_module.eager_policy_step(
        logits,
        target,
        options,
        inputs,
        objective.record,
        objective.counts_sequences,
        inv_normalizer,
        torch.get_num_threads(),
        in_place,
    )
    if out is None:
        return None
    loss, loss_sum, count, token_loss, sums, *rest = out
    gradients: Gradients = {"logits": logits.detach() if in_place else rest[5]}
    loss = attach(logits, loss, gradients, in_place)
    metrics = Metrics(sums, ABSENT[inputs.ref_logp is not None, True])
    stats = TokenStats(*rest[:5])
    return PolicyStep(loss, token_loss, loss_sum, count, metrics, stats, gradients)


def attach(logits: torch.Tensor, loss: torch.Tensor, gradients: Gradients, in_place: bool) -> torch.Tensor:
    """Return `loss` with a backward that returns the gradients that the forward computed."""
    if torch.is_grad_enabled() and logits.requires_grad:
        found = loss
        (loss,) = with_gradients(
            "policy_step", {"logits": logits}, lambda: (found, (), [gradients["logits"]]), gradients
        )
    if in_place:
        torch.autograd.graph.increment_version(logits)
    return loss


def _from_logits(
    op: str,
    logits: torch.Tensor,
    target: torch.Tensor,
    kept: TokenIds | None,
    options: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
    sampler_logp: torch.Tensor | None,
) -> PolicyStep:
    in_place = op == "policy_step_"
    capability = select(OP, logits.device.type, logits.dtype, objective.features(options.features()))
    gradients: Gradients = {}
    if not torch.compiler.is_compiling():
        z = logits if kept is None else _restricted(op, logits, target, kept, options, in_place)
        terms, stats, gradients["logits"] = capability.run(
            z, target, options, inputs, objective, inv_normalizer, in_place or kept is not None
        )
        terms = terms._replace(loss=attach(logits, terms.loss, gradients, in_place))
    elif capability.backend == "reference":
        z = kept_reference.restricted(logits, kept, options.mask)
        terms, stats = reference_policy.traced_step(z, target, options, inputs, objective, inv_normalizer, logits.dtype)
    else:
        terms, stats, grad = _custom_op(logits, target, kept, options, inputs, objective, inv_normalizer)
        gradients["logits"] = grad
    return step_result(terms, stats, inputs, objective, inv_normalizer, sampler_logp, gradients)


def _restricted(
    op: str, logits: torch.Tensor, target: torch.Tensor, kept: TokenIds, o: LogitOptions, in_place: bool
) -> torch.Tensor:
    """Return the logits with -inf outside the kept ids, in the memory that the gradient will overwrite."""
    vocab = logits.shape[1]
    if may_read(target):  # before anything is overwritten
        check_values(op, target, vocab, o.mask, o.temperature)
        kept_rows.check_kept_values(op, kept, vocab, o.mask)
    if in_place:
        return kept_rows.keep_only_(logits.detach(), kept_rows.all_entries(kept))
    return kept_rows.copied(logits, kept)


register_cpu(OP, cpu_policy.policy_step, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_run(cuda_policy.STEP), FLOAT_DTYPES, "softcap")
register_triton(OP, device_run(triton_policy.STEP), FLOAT_DTYPES, "softcap")
register_reference(OP, reference_policy.policy_step, "softcap", WITHOUT_KERNELS)


# ---------------------------------------------------------------------------------- torch.compile


@graph_op(
    "tokfuse::policy_step",
    f"(Tensor logits, Tensor target, {kept_rows.SCHEMA}, {FLAT_SCHEMA_WITHOUT_MASK}, {INPUTS_SCHEMA}"
    f", {OBJECTIVE_SCHEMA}) -> ({', '.join(['Tensor'] * 9)})",
)
@ranged("policy_step.fwd")
def _policy_step_op(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    ids, offsets, vector, scalar, softcap, logit_scale, *fields, form, coefficients, inv_normalizer = rest
    inputs = PolicyInputs(*fields)
    options = LogitOptions.from_flat(vector, scalar, softcap, logit_scale, inputs.mask)
    objective = objective_of(form, coefficients)
    run: StepRun = select(OP, logits.device.type, logits.dtype, objective.features(options.features())).run
    kept = kept_rows.of_graph(ids, offsets)
    z = logits if kept is None else _restricted(OP, logits, target, kept, options, False)
    inverse = checked_inverse(OP, inv_normalizer)
    terms, stats, grad = run(z, target, options, inputs, objective, inverse, kept is not None)
    return (terms.loss, terms.token_loss, terms.sums, *stats, grad)


@_policy_step_op.register_fake
def _(logits: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    vectors = [logits.new_empty(logits.shape[0], dtype=torch.float32) for _ in range(6)]
    sums = logits.new_empty(len(SLOTS), dtype=torch.float64)
    loss = logits.new_empty((), dtype=torch.float32)
    return (loss, vectors[0], sums, *vectors[1:], logits.new_empty(logits.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    ctx.save_for_backward(output[8])
    ctx.inputs = len(inputs)
    ctx.mark_non_differentiable(*output[1:])


def _op_backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    rest = [None] * (ctx.inputs - 1)
    return (grad * grad_loss.to(grad.dtype), *rest)


_policy_step_op.register_autograd(_op_backward, setup_context=_setup_context)


def _custom_op(
    logits: torch.Tensor,
    target: torch.Tensor,
    kept: TokenIds | None,
    o: LogitOptions,
    inputs: PolicyInputs,
    objective: Objective,
    inv_normalizer: float,
) -> tuple[PolicyTerms, TokenStats, torch.Tensor]:
    given = (*kept_rows.flat(kept), *o.flat()[:4], *inputs, *flat_objective(objective), inv_normalizer)
    out = _policy_step_op(logits, target, *given)
    loss, token_loss, sums, *stats, grad = out
    return PolicyTerms(loss, token_loss, token_loss, token_loss, sums), TokenStats(*stats), grad
