"""distill_step: loss and gradient of a divergence from a teacher, from hidden states or from logits."""

import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.forward_gradients import Computed, Gradients, with_gradients
from tokfuse.runtime.core.graph_ops import graph_op
from tokfuse.runtime.core.logit_options import LogitOptions, check_logits
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.lm_head import cpu_pair, device_pair, reference_pair
from tokfuse.runtime.lm_head.class_part import CrossEntropy
from tokfuse.runtime.lm_head.pair_problem import (
    LOGITS_PAIR_SCHEMA,
    PAIR_ARGUMENTS,
    PAIR_SCHEMA,
    Divergence,
    LogitsPair,
    LogitsRun,
    PairProblem,
    PairRun,
    PolicyPart,
    Teacher,
    check_pair,
    check_teacher,
)
from tokfuse.runtime.lm_head.pair_results import DistillStep, distill_result, token_weights
from tokfuse.runtime.lm_head.probe import deliver
from tokfuse.runtime.lm_head.problem import NAMES, probed, wanted
from tokfuse.runtime.ops import influence as influence_op
from tokfuse.runtime.ops import linear_paired_divergence as linear
from tokfuse.runtime.ops.distill_terms import (
    OP,
    TERMS_ARGUMENTS,
    TERMS_SCHEMA,
    Terms,
    class_part,
    counting,
    fake_results,
    loss_run,
)
from tokfuse.runtime.ops.influence import InfluenceSpec
from tokfuse.runtime.policy import inputs as policy_inputs
from tokfuse.runtime.policy.inputs import Normalizer, PolicyInputs, inverse_normalizer
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS
from tokfuse.runtime.reference.token_stats import result_dtype


@ranged("distill_step.fwd")
def distill_step(
    *,
    logits: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    kind: str,
    beta: float = BETA,
    alpha: float = ALPHA,
    coef: float | torch.Tensor | None = None,
    objective: Objective | None = None,
    cross_entropy: CrossEntropy | None = None,
    advantage: torch.Tensor | None = None,
    old_logp: torch.Tensor | None = None,
    target: torch.Tensor | None = None,
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
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_temperature: float | torch.Tensor = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    memory_budget: int | None = None,
    influence: InfluenceSpec | None = None,
) -> DistillStep:
    """Return loss, gradients and statistics of distilling a teacher into a student, in one pass.

    The loss is `sum(coef * divergence) / normalizer`, with the divergence of
    `linear_paired_divergence` from hidden states and of `paired_divergence` from logits. It equals
    the composition of these ops. The gradient is computed in the forward, so no GEMM runs twice;
    `step.loss.backward()` returns it. P is the student's distribution, Q the teacher's.

    With an `objective` the loss of `policy_step` is added, from the same logits: reinforcement learning
    and distillation in one pass. The arguments from `advantage` to `anchor_weight` are those of
    `policy_step` and belong to the objective. With `cross_entropy` the cross entropy with the targets is
    added, also from the same logits.

    The direction of a KL is its `kind`: "kl_forward" is KL(Q || P), TRL's and GKD's beta = 0;
    "kl_reverse" is KL(P || Q), their beta = 1.

    Args:
        logits: (tokens, vocab) float32, bfloat16, float16 or float64. Logits of the student; they need
            teacher_logits. None: pass hidden and weight instead.
        hidden: (tokens, hidden) float32, bfloat16, float16 or float64. Final hidden states of the student.
        weight: (vocab, hidden). The student's lm_head; may have another dtype than hidden, see
            `linear_paired_divergence`.
        bias: (vocab,). None: no bias.
        teacher_logits: (tokens, vocab). If `logits` is given, the same dtype. None: pass teacher_hidden
            and teacher_weight instead. No tensor of the teacher may require grad.
        teacher_hidden: (tokens, teacher_hidden). Hidden states of the same tokens; may have another
            dtype than the student.
        teacher_weight: (vocab, teacher_hidden). The teacher's lm_head.
        teacher_bias: (vocab,). None: no bias.
        kind: "kl_forward", "kl_reverse", "jsd", "skew_forward", "skew_reverse" or "tvd"; the formulas
            are in `paired_divergence`.
        beta: weight of the teacher in the mixture of "jsd", in (0, 1).
        alpha: for the skew kinds, weight in the mixture of the distribution whose average is taken, in
            (0, 1): the teacher for "skew_forward", the student for "skew_reverse".
        coef: weight of the divergence, a number or (tokens,). None: 1. A token with weight 0 needs no
            logits of the teacher; without an objective it costs nothing.
        objective: an `Objective`, whose loss is added. None: no policy term.
        cross_entropy: a `CrossEntropy`, whose loss is added: class weights, label smoothing, z-loss. It needs
            `target`. None: no cross entropy.
        advantage: (tokens,), or (seqs,) with advantage_level="sequence". Needed by an objective.
        old_logp: (tokens,), nats. Log-probability at the start of the update. None: the update is on
            policy, and every ratio is 1.
        target: (tokens,) int64, the sampled token, for the log-probabilities in `stats` and
            `metrics`. Needed by an objective and by `cross_entropy`. None: they are not returned.
        mask: (tokens,) bool, True counts. None: all tokens. Values at masked tokens are never used.
        cu_seqlens: (seqs + 1,) int32 packing offsets, if the objective or advantage_level uses sequences, and
            for `influence` and `influence.capture`.
        normalizer: divides all terms. None: no division. A number or 0-dim tensor: the global count.
            "batch": the number of tokens that the mask keeps, whatever their weight; the policy term is
            divided by its own count, which for some aggregations is that of the sequences, and the cross
            entropy by the sum of the class weights of the targets.
        ref_logp: (tokens,), nats, for a KL term of the objective. The divergence needs none.
        sampler_logp: (tokens,), nats, from the rollout engine. Adds the metric sampler_kl_k3.
        advantage_level: "token" or "sequence".
        token_weight: (tokens,). Multiplies the policy term without its KL and entropy terms.
        signal: (tokens,). Target signal or success rate, for the shapes that need one.
        kl_weight: (tokens,). Multiplies the KL term of the objective.
        entropy_weight: (tokens,). Multiplies the entropy term of the objective.
        anchor_logp: (tokens,), nats. Log-probability that `objective.anchor` compares with. Only with an anchor.
        anchor_weight: (tokens,). Multiplies the anchor term of the objective.
        temperature: a number, or (tokens,) one per row; > 0. Divides the student's logits. No factor
            of temperature squared is applied: pass it in `coef`.
        softcap: cap of the tanh soft-cap (Gemma) of the student, > 0. None: no cap.
        logit_scale: multiplies the student's logits before the cap (Cohere); > 0.
        teacher_temperature: divides the teacher's logits.
        teacher_softcap: cap of the teacher's logits.
        teacher_logit_scale: multiplies the teacher's logits.
        memory_budget: from hidden only: bytes of workspace for logits of both sides, in chunks of
            rows. None: 64 MiB; on a GPU 1024 rows, up to 1 GiB.
        influence: also return gradient norms of every token and a sketch of every sequence in
            `step.influence`. Only from hidden, with cu_seqlens. It computes grad_hidden even if hidden
            requires no gradient.

    Returns:
        DistillStep. Gradients of `loss` (normaliser included) for hidden, weight and bias where they
        require grad; from logits always. Statistics and metrics are of the tokens with a weight.
        `step.policy` has loss and metrics of the policy term, `step.cross_entropy` the loss of the
        cross entropy.

    Numerics: as `linear_paired_divergence`, `paired_divergence` and `cross_entropy`; grad_weight accumulated
        in float32. A row of infinite KL has a zero gradient and makes the loss infinite. Bitwise
        repeatable. On a GPU a bad target or temperature makes its row NaN instead of an error.

    Gradients and memory: from hidden 2 T V (H + H_teacher) operations for the logits and 4 T V H
        for the gradients, T the tokens with a weight; 2 T V H less for a frozen weight or hidden.
        Extra memory: `memory_budget` and the gradients, independent of T. On the CPU the student's
        logits are stored in the memory of the weight's gradient, and only the teacher's need the
        workspace. From logits, the CPU reads both sides once and writes the gradient once. On a GPU,
        entropy, log-probabilities and top-1 agreement cost up to three more reads per side. The
        gradients are stored until `loss.backward()` returns them. An objective costs one more read of
        the student's logits of a chunk. Tokens with a weight of the divergence need both sides, other
        tokens the student alone; those without a gradient (advantage 0) only its statistics. If the
        ratio is of sequences, all statistics come first: 2 T V H operations more. A cross entropy needs
        the student alone. On the CPU it needs no further read of the logits; on a GPU it shares the read of
        the objective.

    Examples:
        >>> logits = torch.zeros(2, 4, requires_grad=True)
        >>> teacher_logits = torch.tensor([[0.0, 0.0, 0.0, 0.0], [2.0, 0.0, 0.0, 0.0]])
        >>> step = tokfuse.distill_step(
        ...     logits=logits, teacher_logits=teacher_logits, kind="kl_forward", normalizer="batch"
        ... )
        >>> step.loss.backward()
        >>> logits.grad[1]  # (p - q) / 2
        tensor([-0.2306,  0.0769,  0.0769,  0.0769])
        >>> step = tokfuse.distill_step(
        ...     logits=logits,
        ...     teacher_logits=teacher_logits,
        ...     kind="kl_forward",
        ...     coef=0.0,
        ...     target=torch.tensor([1, -100]),
        ...     cross_entropy=tokfuse.CrossEntropy(label_smoothing=0.1),
        ...     normalizer="batch",
        ... )
        >>> step.cross_entropy.token_loss
        tensor([1.3863, 0.0000])

    Raises:
        ValueError: as `linear_paired_divergence`; neither or both of logits and hidden; an input that
            the objective or the cross entropy needs but does not get, or gets but does not use.
        TypeError: an objective that is no `Objective`, or a cross entropy that is no `CrossEntropy`.

    Source: full-vocabulary distillation on the student's own samples as GKD (arXiv 2306.13649) and
        MiniLLM (arXiv 2306.08543); gradients in the forward as Liger's and Fast-LLM's heads. Exact.
    """
    if cross_entropy is not None:
        mask, target = counting(cross_entropy, mask, target)
    options = LogitOptions(temperature, softcap, logit_scale, mask).floats()
    teacher_options = LogitOptions(teacher_temperature, teacher_softcap, teacher_logit_scale, None).floats()
    teacher = Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_options)
    divergence, has_target = Divergence(kind, mix_weight_of(OP, kind, beta, alpha)), target is not None
    if (logits is None) == (hidden is None):
        given = "both" if logits is not None else "neither"
        raise refuse(OP, "input", "either logits= or hidden= with weight=", given, "Pass one.")
    if logits is not None:
        unused: dict[str, object] = {"memory_budget": memory_budget, "influence": influence}
        if objective is None:
            unused["cu_seqlens"] = cu_seqlens
        checks.check_unused(OP, "logits=", weight=weight, bias=bias, **unused)
        pair = _check_logits(logits, target, options, teacher, divergence)
        rows, vocab, device, dtype = *logits.shape, logits.device, logits.dtype
    else:
        assert hidden is not None
        problem = check_pair(OP, hidden, weight, bias, target, options, teacher, divergence, memory_budget)
        student = problem.student
        if influence is not None:
            student = influence_op.request(OP, influence, student, cu_seqlens)
        elif cu_seqlens is not None:
            checks.check_cu_seqlens(OP, cu_seqlens, hidden.shape[0], hidden.device)
        problem = problem._replace(student=probed(OP, student, cu_seqlens))
        rows, vocab, device, dtype = hidden.shape[0], student.vocab, hidden.device, student.dtype
    w = token_weights(OP, coef, mask, normalizer, rows, device, result_dtype(dtype))
    named = {
        "advantage": advantage,
        "old_logp": old_logp,
        "token_weight": token_weight,
        "signal": signal,
        "ref_logp": ref_logp,
        "kl_weight": kl_weight,
        "entropy_weight": entropy_weight,
        "anchor_logp": anchor_logp,
        "anchor_weight": anchor_weight,
    }
    policy = None
    if objective is None:
        level = None if advantage_level == "token" else advantage_level
        checks.check_unused(OP, "objective=None", **named, sampler_logp=sampler_logp, advantage_level=level)
    else:
        checks.check_given(OP, "objective=", target=target, advantage=advantage)
        inputs = PolicyInputs(
            advantage_level=advantage_level,
            mask=mask,
            cu_seqlens=cu_seqlens,
            **named,  # type: ignore[arg-type]
        )
        policy_inputs.check_inputs(OP, inputs, objective, rows, device, has_entropy=True)
        policy_inputs.check_sampler(OP, sampler_logp, rows, device)
        inverse = inverse_normalizer(OP, normalizer, objective)
        policy = PolicyPart(inputs, objective, inverse, loss_run(objective, device, dtype))
    classes = of_classes = None
    if cross_entropy is not None:
        assert target is not None
        classes, of_classes = class_part(cross_entropy, target, mask, normalizer, vocab, result_dtype(dtype))
    gradients: Gradients = {}
    terms = Terms(w.coefficient, policy, classes)
    if logits is not None:
        loss, *found = _from_logits(pair, terms, gradients)
    else:
        loss, *found = _from_hidden(problem, terms, gradients)
    step = distill_result(loss, tuple(found), w, has_target, gradients, policy, sampler_logp, of_classes)
    if influence is None or cu_seqlens is None:
        return step
    return replace(step, influence=influence_op.collect(influence, problem.student, gradients, cu_seqlens))


def _check_logits(
    logits: torch.Tensor, target: torch.Tensor | None, options: LogitOptions, teacher: Teacher, divergence: Divergence
) -> LogitsPair:
    checks.check_matrix(OP, "logits", logits, "(tokens, vocab)")
    if target is None:
        target = torch.zeros(logits.shape[0], dtype=torch.int64, device=logits.device)
    check_logits(OP, logits, target, options)
    if teacher.logits is None:
        raise refuse(OP, "teacher_logits", "given with logits=", "None", "Or pass hidden= and weight=.")
    check_teacher(OP, teacher, logits.shape[0], logits.shape[1], logits.device, logits.dtype)
    if teacher.logits.dtype != logits.dtype:
        raise refuse(OP, "teacher_logits", f"{logits.dtype} like logits", str(teacher.logits.dtype), "Cast one.")
    return LogitsPair(logits, teacher.logits, target, options, teacher.options, divergence)


# ----------------------------------------------------------------------------------- from hidden


def _from_hidden(p: PairProblem, terms: Terms, gradients: Gradients) -> Sequence[torch.Tensor]:
    """Return the results of `Terms.results`; the loss is differentiable."""
    s, policy = p.student, terms.policy
    features = p.features() if policy is None else policy.objective.features(p.features())
    capability = select(linear.OP, s.hidden.device.type, s.dtype, features)
    if not torch.is_grad_enabled() and s.row_norms is None:
        p = p._replace(student=s._replace(needs=(False, False, False)))
    if torch.compiler.is_compiling():
        if capability.backend == "reference":
            given = terms.given(s.target)
            return terms.traced(reference_pair.exact(p, reference_pair.own_rows(given, policy)), given, s.target)
        needs = wanted(p.student)
        found: list[torch.Tensor] = _hidden_op(*p.flat(), *terms.flat(), *needs)
        held = (x if need else None for x, need in zip(found[-3:], needs, strict=True))
        gradients.update(zip(NAMES, held, strict=True))
        return found[:-3]
    run: PairRun = capability.run

    def compute() -> Computed:
        stats, grads = run(p, terms.given(s.target), policy)
        loss, *others = terms.results(stats, s.target)
        return loss, others, grads

    leaves = dict(zip(NAMES, (s.hidden, s.weight, s.bias), strict=True))
    return with_gradients(OP, leaves, compute, gradients, functools.partial(deliver, s.probes))


@graph_op(
    "tokfuse::distill_step_hidden",
    f"({PAIR_SCHEMA}, {TERMS_SCHEMA}, bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("distill_step.fwd")
def _hidden_op(*arguments: Any) -> list[torch.Tensor]:
    p, rest = PairProblem.from_flat(OP, *arguments[:PAIR_ARGUMENTS]), arguments[PAIR_ARGUMENTS:]
    flat, needs = rest[:TERMS_ARGUMENTS], rest[TERMS_ARGUMENTS:]
    s = p.student._replace(needs=(needs[0], needs[1], needs[2]))
    terms = Terms.from_flat(flat, s.vocab, s.options.mask, s.hidden.device, s.dtype)
    run: PairRun = select(linear.OP, s.hidden.device.type, s.dtype, p.features()).run
    stats, grads = run(p._replace(student=s), terms.given(s.target), terms.policy)
    return [*terms.results(stats, s.target), *(s.hidden.new_empty(0) if x is None else x for x in grads)]


@_hidden_op.register_fake
def _(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any) -> list[torch.Tensor]:
    likes = zip((hidden, weight, bias), rest[-3:], strict=True)
    grads = [x.new_empty(x.shape) if x is not None and need else hidden.new_empty(0) for x, need in likes]
    return [*fake_results(hidden, rest[-3 - TERMS_ARGUMENTS : -3]), *grads]


def _setup_hidden(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(*output[-3:])
    ctx.inputs = len(inputs)


def _hidden_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    pairs = zip(ctx.saved_tensors, ctx.needs_input_grad[:3], strict=True)
    nothing = (None,) * (ctx.inputs - 3)
    return (*(g * grads[0].to(g.dtype) if need else None for g, need in pairs), *nothing)


_hidden_op.register_autograd(_hidden_backward, setup_context=_setup_hidden)


# ----------------------------------------------------------------------------------- from logits


def _from_logits(p: LogitsPair, terms: Terms, gradients: Gradients) -> Sequence[torch.Tensor]:
    """Return the results of `Terms.results`; the loss is differentiable."""
    policy = terms.policy
    features = p.features() if policy is None else policy.objective.features(p.features())
    capability = select(OP, p.logits.device.type, p.logits.dtype, features)
    if torch.compiler.is_compiling():
        if capability.backend == "reference":
            given = terms.given(p.target)
            own = reference_pair.own_rows(given, policy)
            return terms.traced(reference_pair.exact_of_logits(p, OP, own), given, p.target)
        found: list[torch.Tensor] = _logits_op(*p.flat(), *terms.flat())
        gradients["logits"] = found[-1]
        return found[:-1]
    run: LogitsRun = capability.run

    def compute() -> Computed:
        stats, grad = run(p, terms.given(p.target), policy)
        loss, *others = terms.results(stats, p.target)
        return loss, others, [grad]

    return with_gradients(OP, {"logits": p.logits}, compute, gradients)


register_cpu(OP, cpu_pair.logits_run, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_pair.CUDA_LOGITS, FLOAT_DTYPES, "softcap")
register_triton(OP, device_pair.TRITON_LOGITS, FLOAT_DTYPES, "softcap")
register_reference(OP, reference_pair.logits_run, "softcap", WITHOUT_KERNELS)


@graph_op("tokfuse::distill_step", f"({LOGITS_PAIR_SCHEMA}, {TERMS_SCHEMA}) -> Tensor[]")
@ranged("distill_step.fwd")
def _logits_op(*arguments: Any) -> list[torch.Tensor]:
    p = LogitsPair.from_flat(*arguments[:-TERMS_ARGUMENTS])
    of_logits = (p.logits.shape[1], p.options.mask, p.logits.device, p.logits.dtype)
    terms = Terms.from_flat(arguments[-TERMS_ARGUMENTS:], *of_logits)
    run: LogitsRun = select(OP, p.logits.device.type, p.logits.dtype, p.features()).run
    stats, grad = run(p, terms.given(p.target), terms.policy)
    return [*terms.results(stats, p.target), grad]


@_logits_op.register_fake
def _(logits: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    return [*fake_results(logits, rest[-TERMS_ARGUMENTS:]), logits.new_empty(logits.shape)]


def _setup_logits(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    ctx.save_for_backward(output[-1])
    ctx.inputs = len(inputs)


def _logits_backward(ctx: Any, grads: list[torch.Tensor]) -> tuple[Any, ...]:
    (grad,) = ctx.saved_tensors
    return (grad * grads[0].to(grad.dtype), *(None,) * (ctx.inputs - 1))


_logits_op.register_autograd(_logits_backward, setup_context=_setup_logits)
