"""The ops from hidden states on a GPU: GEMMs of torch around the row kernels of CUDA or Triton."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_policy, cuda_rows, triton_backend, triton_policy, triton_rows
from tokfuse.runtime.backends.policy_runs import LossRun, RowObjective, statistics_first
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import Kernels
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.device_head import DeviceHead, RowClasses
from tokfuse.runtime.lm_head.problem import HeadProblem, Step, StepRun, check_targets, wanted
from tokfuse.runtime.lm_head.units import HeadKernels, Loss, Units, UnitTerms, coefficients
from tokfuse.runtime.policy.inputs import PolicyInputs, may_carry_gradient
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.reference import kept_token_stats as kept_reference

_linear_fused = triton_backend.launcher("linear_token_stats", "linear_token_stats")

# ------------------------------------------------------------------------------ linear_token_stats


def _rows_of_options(p: HeadProblem, index: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """Return (target, options without mask) of the tokens `index`, for the row kernels."""
    o = p.options
    t = o.temperature[index] if isinstance(o.temperature, torch.Tensor) else o.temperature
    options = {"temperature": t, "softcap": o.softcap, "logit_scale": o.logit_scale, "mask": None}
    return p.target[index], options


def cuda_linear_fwd(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1, row_max, inv_sum), (tokens,) float32 each, 0 in masked rows."""
    if may_read(p.target):
        check_targets(p)
    return _forward_in_chunks(p, cuda_rows.TOKEN_STATS)


def triton_linear_fwd(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    """Return the same as `cuda_linear_fwd`.

    For a 16-bit head one kernel computes logits and statistics, so logits never leave the registers. A
    float32 head, one of mixed dtypes, a sum of logits, and kept ids use torch GEMMs in chunks.
    """
    if may_read(p.target):
        check_targets(p)
    o, hidden, weight = p.options, p.hidden.detach(), p.weight.detach()
    if p.dtype == torch.float32 or p.kept is not None or p.logit_sum is not None:
        return _forward_in_chunks(p, triton_rows.TOKEN_STATS)
    if hidden.stride(1) != 1:
        hidden = hidden.contiguous()
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    bias = None if p.bias is None else p.bias.detach().contiguous()
    out: tuple[torch.Tensor, ...] = _linear_fused(
        hidden,
        weight,
        bias,
        p.target,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
        mask=o.mask,
    )
    return out


def _forward_in_chunks(p: HeadProblem, kernels: Kernels) -> tuple[torch.Tensor, ...]:
    """Compute the statistics in chunks. Each chunk is one torch GEMM and one launch of the row kernel."""
    rows = device_head.classify(p, p.options.mask, None)
    head = DeviceHead(p, (False, False, False), rows)
    # Seven tensors, not rows of one tensor: results of an op in a compiled graph must not share storage.
    out = [torch.zeros(p.tokens, dtype=torch.float32, device=p.hidden.device) for _ in range(7)]
    with torch.no_grad():
        for chunk in head.chunks(0, rows.forward):
            _stats_of_chunk(kernels, head, chunk.tokens, head.logits_of(chunk), out)
    return tuple(out)


def _stats_of_chunk(
    kernels: Kernels, head: DeviceHead, index: torch.Tensor, logits: torch.Tensor, out: list[torch.Tensor]
) -> None:
    """Write the statistics of the tokens `index` to the seven outputs, (tokens,) each, and to `logit_sum`."""
    p, keep = head.problem, head.rows.keep
    target, options = _rows_of_options(p, index)
    if keep is not None:
        options["mask"] = keep[index]
    if p.logit_sum is None:
        stats = kernels.forward(logits, target, **options)
    else:
        part = torch.empty(index.shape[0], dtype=torch.float32, device=logits.device)
        stats = kernels.forward(logits, target, logit_sum=part, class_weight=p.class_weight, **options)
        p.logit_sum[index] = part
    for whole, x in zip(out, stats, strict=True):
        whole[index] = x


def _gradient_of_rows(
    kernels: Kernels,
    head: DeviceHead,
    index: torch.Tensor,
    logits: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the gradient of the logits of a chunk. The statistics are (tokens,)."""
    assert kernels.backward is not None
    target, options = _rows_of_options(head.problem, index)
    vectors = (x[index] for x in (row_max, inv_sum, logp, entropy, grad_logp, grad_entropy))
    more: dict[str, Any] = {"grad_lse": grad_lse, "grad_logit_sum": grad_logit_sum}
    more = {name: None if x is None else x[index] for name, x in more.items()}
    more["class_weight"] = head.problem.class_weight
    return kernels.backward(logits, target, *vectors, out=head.gradient_like(logits), **more, **options)


def _linear_bwd(
    kernels: Kernels,
    p: HeadProblem,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    *,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Return [grad_hidden, grad_weight, grad_bias]. Rows without incoming gradient are not recomputed."""
    grad_logp = kept_reference.gradient_if_kept(p.kept, logp, grad_logp)
    ga = torch.zeros_like(entropy) if grad_logp is None else grad_logp.float()
    gh = torch.zeros_like(entropy) if grad_entropy is None else grad_entropy.float()
    gl, gu = (None if x is None else x.float() for x in (grad_lse, grad_logit_sum))
    if p.options.mask is not None:
        ga, gh = (torch.where(p.options.mask, x, 0.0) for x in (ga, gh))
        gl, gu = (None if x is None else torch.where(p.options.mask, x, 0.0) for x in (gl, gu))
    live = (ga != 0) | (gh != 0)
    for more in (gl, gu):
        if more is not None:
            live |= more != 0
    rows = device_head.classify(p, live, None)
    head = DeviceHead(p, needs, rows)
    with torch.no_grad():
        for chunk in head.chunks(0, rows.gradient):
            index, h, _ = chunk
            given = (row_max, inv_sum, logp, entropy, ga, gh, gl, gu)
            dz = _gradient_of_rows(kernels, head, index, head.logits_of(chunk), *given)
            if p.compact_clipped and rows.keep is not None:  # without `keep`, chunks contain only live rows
                head.add_live(index, h, dz, rows.keep[index])
            else:
                head.add(index, h, dz)
    return head.finish()


# ------------------------------------------------------------------------------------- policy_step


class StepKernels(NamedTuple):
    """The parts of a step that differ between the CUDA and the Triton backend."""

    objective: RowObjective
    loss: LossRun
    linear: HeadKernels


def step_run(kernels: StepKernels) -> StepRun:
    """Return the `run` of policy_step_hidden on a GPU backend."""

    def run(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> Step:
        if may_read(p.target):
            check_targets(p)
        device_head.check_compact("policy_step", p)
        with torch.no_grad():
            if objective.level == "token" and inputs.old_logp is not None:
                return _token_step(kernels.objective, p, inputs, objective, inv_normalizer)
            return statistics_first(
                lambda: kernels.linear.forward(p),
                lambda logp, entropy: kernels.loss(logp, entropy, inputs, objective, inv_normalizer),
                functools.partial(kernels.linear.backward, p, needs=wanted(p)),
            )

    return run


def _token_step(
    kernels: RowObjective, p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float
) -> Step:
    """Compute gradients in one pass: 2MHV FLOPs for the logits, 4MHV for the rows that may have a gradient."""
    given = kernels.encode(inputs, objective, inv_normalizer)
    x, o = given.pointers, p.options
    needs = wanted(p)
    gradient = may_carry_gradient(x, objective)
    if not any(needs):
        gradient = torch.zeros_like(p.target, dtype=torch.bool)
    rows = device_head.classify(p, o.mask, gradient)
    head = DeviceHead(p, needs, rows)
    like = torch.empty_like if rows.forward == p.tokens else torch.zeros_like  # a row that is left out is 0
    stats = TokenStats(*(like(x.old_logp) for _ in range(5)))
    out = kernels.results_like(x.old_logp, like)
    for start, stop, has_gradient in ((0, rows.gradient, True), (rows.gradient, rows.forward, False)):
        for chunk in head.chunks(start, stop):
            index, h, _ = chunk
            logits = head.logits_of(chunk)
            dz = head.gradient_like(logits)
            kernels.step_rows(
                logits,
                dz,
                index,
                p.target,
                given,
                stats,
                out,
                temperature=o.temperature,
                softcap=o.softcap,
                logit_scale=o.logit_scale,
            )
            if not has_gradient:
                continue
            if p.compact_clipped:
                live = (out.d_logp[index] != 0) | (out.d_entropy[index] != 0)
                head.add_live(index, h, dz, live)
            else:
                head.add(index, h, dz)
    return kernels.metrics(stats.logp, stats.entropy, given, out), stats, head.finish()


# ------------------------------------------------------------------------------------------- units


def _unit_step(kernels: Kernels, p: HeadProblem, units: Units, loss: Loss) -> UnitTerms:
    """Compute a loss over units (a `UnitsRun`). The host reads no coefficients.

    Unlike on the CPU, rows without gradient enter the GEMMs as zeros.
    """
    if may_read(p.target):
        check_targets(p)
    needs, device, rows = wanted(p), p.hidden.device, units.order.shape[0]
    with torch.no_grad():
        head = DeviceHead(p, needs, RowClasses(units.order, rows, rows, None))
        stats = [torch.zeros(p.tokens, dtype=torch.float32, device=device) for _ in range(7)]
        total = torch.zeros((), dtype=torch.float64, device=device)
        read_twice = 0
        for first, last in units.groups(head.rows_in_budget()):
            start, stop = units.border[first], units.border[last]
            logits = None
            chunks = list(head.chunks(start, stop))
            for chunk in chunks:
                logits = head.logits_of(chunk)
                _stats_of_chunk(kernels, head, chunk.tokens, logits, stats)
            value, c = coefficients(stats, p.logit_sum, units, first, last, loss)
            total += value
            if not any(needs):
                continue
            logp, entropy, _, _, _, row_max, inv_sum = stats
            none = torch.zeros_like(entropy)
            for chunk in chunks:
                index, h, _ = chunk
                if logits is None or len(chunks) > 1:
                    logits = head.logits_of(chunk)
                    read_twice += index.shape[0]
                given = (row_max, inv_sum, logp, entropy, c.logp, none, c.lse, c.logit_sum)
                head.add(index, h, _gradient_of_rows(kernels, head, index, logits, *given))
        return UnitTerms(total, TokenStats(*stats[:5]), head.finish(), read_twice)


def _linear(forward: Callable[[HeadProblem], tuple[torch.Tensor, ...]], rows: Kernels) -> HeadKernels:
    assert rows.state is not None
    backward, units = functools.partial(_linear_bwd, rows), functools.partial(_unit_step, rows)
    return HeadKernels(forward, backward, rows.state, units)


CUDA_LINEAR = _linear(cuda_linear_fwd, cuda_rows.TOKEN_STATS)
CUDA_STEP = StepKernels(cuda_policy.ROW_OBJECTIVE, cuda_policy.policy_loss, CUDA_LINEAR)
TRITON_LINEAR = _linear(triton_linear_fwd, triton_rows.TOKEN_STATS)
TRITON_STEP = StepKernels(triton_policy.ROW_OBJECTIVE, triton_policy.policy_loss, TRITON_LINEAR)
