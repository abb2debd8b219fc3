"""linear_paired_divergence: compare two lm_heads token by token, without storing their logits."""

from typing import Any

import torch

from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.dispatch import FLOAT_DTYPES, select
from tokfuse.runtime.core.divergence import ALPHA, BETA, mix_weight_of
from tokfuse.runtime.core.first_order import first_order
from tokfuse.runtime.core.graph_ops import graph_op, save_flat, saved_flat
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.core.statistics import PairedStats
from tokfuse.runtime.lm_head import cpu_pair, device_pair, reference_pair
from tokfuse.runtime.lm_head.pair_problem import (
    PAIR_ARGUMENTS,
    PAIR_SCHEMA,
    Coefficients,
    Divergence,
    PairProblem,
    PairRun,
    Teacher,
    check_pair,
)
from tokfuse.runtime.lm_head.probe import deliver
from tokfuse.runtime.lm_head.problem import fake_gradients, probed
from tokfuse.runtime.policy.shapes import WITHOUT_KERNELS
from tokfuse.runtime.reference import token_stats as stats_reference

OP = "linear_paired_divergence"


@ranged("linear_paired_divergence.fwd")
def linear_paired_divergence(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    teacher_hidden: torch.Tensor | None = None,
    teacher_weight: torch.Tensor | None = None,
    *,
    kind: str,
    beta: float = BETA,
    alpha: float = ALPHA,
    target: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    teacher_bias: torch.Tensor | None = None,
    teacher_logits: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_temperature: float | torch.Tensor = 1.0,
    teacher_softcap: float | None = None,
    teacher_logit_scale: float = 1.0,
    memory_budget: int | None = None,
) -> PairedStats:
    """Return the divergence of a student's head from a teacher's. Only the student receives a gradient.

    The result is `paired_divergence(hidden @ weight.T + bias, teacher_hidden @ teacher_weight.T + teacher_bias)`,
    but the logits of neither side are stored. P is the student's distribution and Q the teacher's. Each
    side has its own hidden size, bias, temperature, softcap and scale.

    The direction of a KL is its `kind`: "kl_forward" is KL(Q || P), TRL's and GKD's beta = 0;
    "kl_reverse" is KL(P || Q), their beta = 1. Between them is "jsd", whose beta is the weight of the
    teacher in the mixture, as in TRL and GKD. TRL and GKD treat beta = 0 and beta = 1 as special
    cases, because the Jensen-Shannon divergence itself goes to 0 there.

    Args:
        hidden: (tokens, hidden) float32, bfloat16, float16 or float64: final hidden states of the
            student.
        weight: (vocab, hidden): the student's lm_head. If hidden has another dtype, the logits are computed
            in the wider dtype, and each gradient has the dtype of its tensor (see `linear_token_stats`).
        teacher_hidden: (tokens, teacher_hidden). Hidden states of the same tokens; may have another
            dtype than the student. Must not require grad.
        teacher_weight: (vocab, teacher_hidden). The teacher's lm_head. Must not require grad.
        kind: "kl_forward", "kl_reverse", "jsd", "skew_forward", "skew_reverse" or "tvd"; the formulas
            are in `paired_divergence`.
        beta: weight of the teacher in the mixture of "jsd", in (0, 1).
        alpha: for the skew kinds, weight in the mixture of the distribution whose average is taken, in
            (0, 1): the teacher for "skew_forward", the student for "skew_reverse".
        target: (tokens,) int64, in [0, vocab) where mask is True: the sampled token. None: no
            log-probabilities are returned.
        bias: (vocab,). None: no bias.
        teacher_bias: (vocab,). None: no bias.
        teacher_logits: (tokens, vocab) instead of teacher_hidden and teacher_weight.
        mask: (tokens,) bool; False rows enter no GEMM and return 0. None: all rows count.
        temperature: a number, or (tokens,) one per row; > 0. Divides the student's logits.
        softcap: cap of the tanh soft-cap (Gemma) of the student, > 0. None: no cap.
        logit_scale: multiplies the student's logits before the cap (Cohere); > 0.
        teacher_temperature: divides the teacher's logits.
        teacher_softcap: cap of the teacher's logits.
        teacher_logit_scale: multiplies the teacher's logits.
        memory_budget: bytes of workspace for logits of both sides, in chunks of rows. None: 64 MiB;
            on a GPU 1024 rows, up to 1 GiB. At least one row is always computed.

    Returns:
        PairedStats(divergence, entropy, logp, teacher_logp, top1_agreement), each (tokens,) float32
        (float64 for float64). `logp - teacher_logp` estimates the reverse KL from one sampled token.

    Numerics: as `paired_divergence` and `token_stats` over float32 logits; bfloat16 and float16
        inputs are converted exactly, products accumulate in float32. dW is accumulated in float32 and
        rounded once. Bitwise repeatable; the GEMM library may round a row differently in another
        chunk size.

    Gradients and memory: hidden, weight and bias, through divergence, entropy and logp. Saved: the
        inputs. The backward recomputes both sides' logits for the rows whose incoming gradient is not
        zero; `distill_step` computes the gradients in the forward and recomputes nothing. Peak extra
        memory: memory_budget, the gradients, and a float32 dW if weight is 16-bit.

    Examples:
        >>> hidden, weight = torch.ones(3, 8), torch.zeros(5, 8)
        >>> teacher_hidden, teacher_weight = torch.ones(3, 16), torch.eye(5, 16)
        >>> tokfuse.linear_paired_divergence(
        ...     hidden, weight, teacher_hidden, teacher_weight, kind="kl_reverse"
        ... ).divergence
        tensor([0., 0., 0.])

    Raises:
        ValueError: wrong shape, dtype, device, range or kind; a teacher that requires grad; both or
            neither of teacher_hidden and teacher_logits; a target out of range where mask is True.
        BackendUnavailable: the forced backend cannot run this call.

    Source: generalised JSD on the student's samples as GKD (arXiv 2306.13649); full-vocabulary
        reverse KL as MiniLLM (arXiv 2306.08543). Exact.
    """
    problem = check_pair(
        OP,
        hidden,
        weight,
        bias,
        target,
        LogitOptions(temperature, softcap, logit_scale, mask).floats(),
        Teacher(
            teacher_hidden,
            teacher_weight,
            teacher_bias,
            teacher_logits,
            LogitOptions(teacher_temperature, teacher_softcap, teacher_logit_scale, None).floats(),
        ),
        Divergence(kind, mix_weight_of(OP, kind, beta, alpha)),
        memory_budget,
    )
    stats = _forward(problem._replace(student=probed(OP, problem.student)))
    return stats if target is not None else stats._replace(logp=None, teacher_logp=None)


def _forward(p: PairProblem) -> PairedStats:
    s = p.student
    capability = select(OP, s.hidden.device.type, s.dtype, p.features())
    if capability.backend == "reference":
        return PairedStats(*stats_reference.rounded(reference_pair.exact(p), s.dtype))
    if torch.compiler.is_compiling():
        return PairedStats(*_pair_op(*p.flat()))
    run: PairRun = capability.run
    wants = any(x is not None and x.requires_grad for x in (s.hidden, s.weight, s.bias))
    if wants and torch.is_grad_enabled():
        return PairedStats(*_PairFunction.apply(s.hidden, s.weight, s.bias, p, run))
    return PairedStats(*run(p, None, None)[0])


register_cpu(OP, cpu_pair.pair_run, FLOAT_DTYPES, "softcap")
register_cuda(OP, device_pair.CUDA_PAIR, FLOAT_DTYPES, "softcap")
register_triton(OP, device_pair.TRITON_PAIR, FLOAT_DTYPES, "softcap")
register_reference(OP, reference_pair.pair_run, "softcap", WITHOUT_KERNELS)


# ------------------------------------------------------------------------------- autograd, compile


def given_by(grads: tuple[torch.Tensor | None, ...], like: torch.Tensor) -> Coefficients | None:
    """Return the gradients of the outputs as coefficients, or None if there is no gradient."""
    divergence, entropy, logp = grads[:3]
    if divergence is None and entropy is None and logp is None:
        return None
    if divergence is None:
        divergence = torch.zeros(like.shape[0], dtype=torch.float32, device=like.device)
    return Coefficients(divergence, logp, entropy)


class _PairFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, p: PairProblem, run: PairRun
    ) -> tuple[torch.Tensor, ...]:
        stats, _ = run(p, None, None)
        save_flat(ctx, p.flat())
        ctx.run, ctx.probes = run, p.student.probes
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*stats[3:])
        return stats

    @staticmethod
    @first_order("linear_paired_divergence")
    @ranged("linear_paired_divergence.bwd")
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        p = PairProblem.from_flat(OP, *saved_flat(ctx))
        given = given_by(grads, p.student.hidden)
        if given is None:
            return None, None, None, None, None
        needs = tuple(ctx.needs_input_grad[:3])
        probes = tuple(probe.emptied() for probe in ctx.probes)
        student = p.student._replace(needs=needs, probes=probes)
        found = ctx.run(p._replace(student=student), given, None)[1]
        deliver(probes)
        return (*found, None, None)


def _run_of(p: PairProblem) -> PairRun:
    run: PairRun = select(OP, p.student.hidden.device.type, p.student.dtype, p.features()).run
    return run


@graph_op("tokfuse::linear_paired_divergence", f"({PAIR_SCHEMA}) -> ({', '.join(['Tensor'] * 5)})")
@ranged("linear_paired_divergence.fwd")
def _pair_op(*flat: Any) -> tuple[torch.Tensor, ...]:
    p = PairProblem.from_flat(OP, *flat)
    return _run_of(p)(p, None, None)[0]


@_pair_op.register_fake
def _(hidden: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return tuple(hidden.new_empty(hidden.shape[0], dtype=torch.float32) for _ in range(5))


@graph_op(
    "tokfuse::linear_paired_divergence_backward",
    f"({PAIR_SCHEMA}, Tensor? grad_divergence, Tensor? grad_entropy, Tensor? grad_logp"
    ", bool needs_hidden, bool needs_weight, bool needs_bias) -> Tensor[]",
)
@ranged("linear_paired_divergence.bwd")
def _pair_backward_op(*arguments: Any) -> list[torch.Tensor]:
    p, needs = PairProblem.from_flat(OP, *arguments[:PAIR_ARGUMENTS]), arguments[-3:]
    given = given_by(arguments[PAIR_ARGUMENTS:-3], p.student.hidden)
    grads = _run_of(p)(p._replace(student=p.student._replace(needs=needs)), given, None)[1]
    return [p.student.hidden.new_empty(0) if x is None else x for x in grads]


@_pair_backward_op.register_fake
def _(*arguments: Any) -> list[torch.Tensor]:
    return fake_gradients(*arguments)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, ...]) -> None:
    save_flat(ctx, inputs)
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[3:])


def _op_backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
    nothing = (None,) * (PAIR_ARGUMENTS - 3)
    if all(x is None for x in grads[:3]):
        return (None, None, None, *nothing)
    needs = tuple(ctx.needs_input_grad[:3])
    out = _pair_backward_op(*saved_flat(ctx), *grads[:3], *needs)
    return (*(x if need else None for x, need in zip(out, needs, strict=True)), *nothing)


_pair_op.register_autograd(_op_backward, setup_context=_setup_context)
