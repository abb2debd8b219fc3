"""The optional outputs of `token_stats`, from the same read: second temperature and moments."""

import functools
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import checks, native
from tokfuse.runtime.core.dispatch import (
    FLOAT_DTYPES,
    register_cpu,
    register_cuda,
    register_reference,
    register_triton,
    select,
)
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.ops.token_stats import Kernels
from tokfuse.runtime.reference import extended_token_stats as reference
from tokfuse.runtime.reference.token_stats import bad_row

OP = "extended_token_stats"


class ExtendedTokenStats(NamedTuple):
    """`TokenStats` and what `second_temperature` or `moments` adds; every field is (tokens,)."""

    logp: torch.Tensor
    """log p of the target, nats. Differentiable."""
    entropy: torch.Tensor
    """-sum p log p, nats. Differentiable."""
    lse: torch.Tensor
    """log-sum-exp of the transformed logits, nats."""
    sum_sq: torch.Tensor
    """sum of p^2."""
    top1: torch.Tensor
    """1.0 where the target attains the row's maximum, else 0.0."""
    second_logp: torch.Tensor | None
    """log p of the target at `second_temperature`; None where that was not given. Detached."""
    sum_p2_logp: torch.Tensor | None
    """sum of p^2 log p; None without `moments`. Detached."""
    sum_p2_logp2: torch.Tensor | None
    """sum of p^2 log^2 p; None without `moments`. Detached."""


class Extras(NamedTuple):
    """Which optional outputs are asked for."""

    second_temperature: float | None
    moments: bool

    def result(self, out: tuple[torch.Tensor, ...]) -> ExtendedTokenStats:
        """The backend's eight outputs, with None for those that were not asked for."""
        logp, entropy, lse, sum_sq, top1, second, p2_logp, p2_logp2 = out
        return ExtendedTokenStats(
            logp,
            entropy,
            lse,
            sum_sq,
            top1,
            None if self.second_temperature is None else second,
            p2_logp if self.moments else None,
            p2_logp2 if self.moments else None,
        )


def extended_token_stats(
    logits: torch.Tensor, target: torch.Tensor, options: LogitOptions, extras: Extras
) -> ExtendedTokenStats:
    """`tokfuse.token_stats` with second_temperature or moments; logits and options are checked."""
    if extras.second_temperature is not None:
        checks.check_positive(stats_op.OP, "second_temperature", extras.second_temperature)
    capability = select(OP, logits.device.type, logits.dtype, options.features())
    arguments = {**options._asdict(), **extras._asdict()}
    if capability.backend == "reference":
        return extras.result(reference.forward(logits, target, **arguments))
    if torch.compiler.is_compiling():
        out = _custom_op(logits, target, options, extras)
        return extras.result((*out[:5], *out[7:]))
    run: Kernels = capability.run
    if logits.requires_grad and torch.is_grad_enabled():
        bound = run._replace(forward=functools.partial(run.forward, **extras._asdict()))
        return extras.result(stats_op._TokenStatsFunction.apply(logits, target, options, bound))
    out = run.forward(logits, target, **arguments)
    return extras.result((*out[:5], *out[7:]))


def _run(logits: torch.Tensor, options: LogitOptions) -> Kernels:
    run: Kernels = select(OP, logits.device.type, logits.dtype, options.features()).run
    return run


def _cpu_forward(
    logits: torch.Tensor, target: torch.Tensor, *, second_temperature: float | None, moments: bool, **options: Any
) -> tuple[torch.Tensor, ...]:
    """(logp, entropy, lse, sum_sq, top1, shift, inv_sum, second_logp, p2_logp, p2_logp2)."""
    o = LogitOptions(**options)
    record, alive = stats_op.native_logits_record(logits, target, o)
    tokens = logits.shape[0]
    second_size = 0 if second_temperature is None else tokens
    sizes = [tokens] * 7 + [second_size] + [tokens if moments else 0] * 2
    out = [torch.empty(size, dtype=torch.float32) for size in sizes]
    second, p2_logp, p2_logp2 = (x.data_ptr() if x.shape[0] > 0 else 0 for x in out[7:])
    module = native.module()
    assert module is not None
    bad = module.token_stats_fwd(
        record,
        *[x.data_ptr() for x in out[:7]],
        p2_logp,
        p2_logp2,
        second,
        1.0 if second_temperature is None else second_temperature,
    )
    del alive
    if bad >= 0:
        raise bad_row(stats_op.OP, bad, target, logits.shape[1], o.temperature)
    return tuple(out)


register_cpu(OP, Kernels(_cpu_forward, stats_op._cpu_backward), FLOAT_DTYPES, "softcap", "bias_logits")
register_cuda(OP, stats_op.CUDA, FLOAT_DTYPES, "softcap", "bias_logits")
register_triton(OP, stats_op.TRITON, FLOAT_DTYPES, "softcap", "bias_logits")
register_reference(OP, Kernels(reference.forward, None), "softcap", "bias_logits")


# ---------------------------------------------------------------------------------- torch.compile


@torch.library.custom_op("tokfuse::extended_token_stats", mutates_args=())
@ranged("token_stats.fwd")
def _extended_op(
    logits: torch.Tensor,
    target: torch.Tensor,
    temperature: torch.Tensor | None,
    scalar_temperature: float,
    softcap: float,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None,
    bias_scale: float,
    second_temperature: float | None,
    moments: bool,
) -> list[torch.Tensor]:
    options = stats_op._unpack(temperature, scalar_temperature, softcap, logit_scale, mask, bias_logits, bias_scale)
    run = _run(logits, LogitOptions(**options))
    out = run.forward(logits, target, second_temperature=second_temperature, moments=moments, **options)
    return list(out)


@_extended_op.register_fake
def _(logits: torch.Tensor, target: torch.Tensor, *rest: Any) -> list[torch.Tensor]:
    second_temperature, moments = rest[-2:]
    wanted = [True] * 7 + [second_temperature is not None, moments, moments]
    tokens = logits.shape[0]
    return [logits.new_empty(tokens if yes else 0, dtype=torch.float32) for yes in wanted]


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[torch.Tensor]) -> None:
    stats_op._setup_context(ctx, inputs[:9], tuple(output[:7]))
    ctx.mark_non_differentiable(*output[2:])


def _op_backward(ctx: Any, grads: list[torch.Tensor | None]) -> tuple[Any, ...]:
    return (*stats_op._op_backward(ctx, *grads), None, None)


_extended_op.register_autograd(_op_backward, setup_context=_setup_context)


def _custom_op(logits: torch.Tensor, target: torch.Tensor, o: LogitOptions, extras: Extras) -> tuple[torch.Tensor, ...]:
    vector = o.temperature if isinstance(o.temperature, torch.Tensor) else None
    scalar = 1.0 if isinstance(o.temperature, torch.Tensor) else o.temperature
    out = _extended_op(
        logits, target, vector, scalar, o.softcap or 0.0, o.logit_scale, o.mask, o.bias_logits, o.bias_scale, *extras
    )
    return tuple(out)
