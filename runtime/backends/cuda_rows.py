"""Launchers of the CUDA kernels over rows of logits; the same functions as those of Triton."""

from collections.abc import Sequence
from typing import Any

import torch

from tokfuse.runtime.backends.cuda_backend import launchers, place
from tokfuse.runtime.backends.value_checks import with_support, with_targets, with_temperature
from tokfuse.runtime.core.codes import DIVERGENCES
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.native import DTYPE_CODE, float_vector, pointer


def unit_stride(logits: torch.Tensor) -> torch.Tensor:
    """Logits whose vocabulary is contiguous."""
    return logits if logits.stride(1) == 1 else logits.contiguous()


def logits_record(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
    bias_logits: torch.Tensor | None = None,
    bias_scale: float = 1.0,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(record for the native module, tensors that must outlive the call)."""
    logits = unit_stride(logits)
    bias = None if bias_logits is None else unit_stride(bias_logits)
    target = target.contiguous()
    mask = None if mask is None else mask.contiguous()
    scalar, vector = 1.0, None
    if isinstance(temperature, torch.Tensor):
        vector = float_vector(temperature)
    else:
        scalar = temperature
    record = (
        logits.data_ptr(),
        logits.stride(0),
        DTYPE_CODE[logits.dtype],
        *logits.shape,
        pointer(index),
        target.data_ptr(),
        pointer(mask),
        pointer(vector),
        scalar,
        softcap or 0.0,
        logit_scale,
        pointer(bias),
        0 if bias is None else bias.stride(0),
        bias_scale,
    )
    return record, (logits, target, mask, vector, bias)


def stats_record(out: Sequence[torch.Tensor], second_temperature: float | None) -> tuple[Any, ...]:
    """Of logp, entropy, lse, sum_sq, top1, row maximum, 1 / sum, and three more where asked for."""
    addresses = [pointer(x) if x.numel() else 0 for x in out]
    return (*addresses, *[0] * (10 - len(out)), second_temperature or 1.0)


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    second_temperature: float | None = None,
    moments: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, sum_sq, top1, row maximum and 1 / sum of exps: (tokens,) float32 each.

    With second_temperature or moments three more: second_logp, sum_p2_logp and sum_p2_logp2, empty
    where they were not asked for. The caller has checked shapes, dtypes and devices.
    """
    tokens = logits.shape[0]
    sizes = [tokens] * 7
    if second_temperature is not None or moments:
        sizes += [0 if second_temperature is None else tokens] + [tokens if moments else 0] * 2
    out = [torch.empty(n, dtype=torch.float32, device=logits.device) for n in sizes]
    record, alive = logits_record(logits, target, **options)
    launchers().token_stats_fwd(place(logits), record, stats_record(out, second_temperature))
    del alive
    return tuple(out)


def token_stats_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The gradient of the logits, into `out` if given; `out` may be `logits` itself.

    `row_max` and `inv_sum` are the sixth and seventh output of `token_stats_fwd`.
    """
    if out is None:
        out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    record, alive = logits_record(logits, target, **options)
    ga, gh = float_vector(grad_logp), float_vector(grad_entropy)
    grad = (
        row_max.data_ptr(),
        inv_sum.data_ptr(),
        logp.data_ptr(),
        entropy.data_ptr(),
        pointer(ga),
        pointer(gh),
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODE[out.dtype],
    )
    launchers().token_stats_bwd(place(logits), record, grad)
    del alive
    return out


def kept_token_stats_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, row maximum and 1 / sum of exps over the kept ids: (tokens,) float32."""
    record, alive = logits_record(logits, target, **options)
    logp, entropy, lse, row_max, inv_sum = out = [
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(5)
    ]
    none = logp.new_empty(0)
    launchers().kept_token_stats_fwd(
        place(logits),
        record,
        ids.data_ptr(),
        offsets.data_ptr(),
        ids.shape[0],
        stats_record([logp, entropy, lse, none, none, row_max, inv_sum], None),
    )
    del alive
    return tuple(out)


def kept_token_stats_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """The dense gradient of the logits, exactly 0 outside the support."""
    record, alive = logits_record(logits, target, **options)
    out = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    ga, gh = float_vector(grad_logp), float_vector(grad_entropy)
    grad = (
        row_max.data_ptr(),
        inv_sum.data_ptr(),
        logp.data_ptr(),
        entropy.data_ptr(),
        pointer(ga),
        pointer(gh),
        out.data_ptr(),
        out.stride(0),
        DTYPE_CODE[out.dtype],
    )
    launchers().kept_token_stats_bwd(place(logits), record, ids.data_ptr(), offsets.data_ptr(), ids.shape[0], grad)
    del alive
    return out


def _divergence_record(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    beta: float,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
    mask: torch.Tensor | None,
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    p, q = unit_stride(logits_p), unit_stride(logits_q)
    mask = None if mask is None else mask.contiguous()
    scalar, vector = 1.0, None
    if isinstance(temperature, torch.Tensor):
        vector = float_vector(temperature)
    else:
        scalar = temperature
    record = (
        p.data_ptr(),
        p.stride(0),
        q.data_ptr(),
        q.stride(0),
        DTYPE_CODE[p.dtype],
        *p.shape,
        pointer(mask),
        pointer(vector),
        scalar,
        softcap or 0.0,
        logit_scale,
        DIVERGENCES.index(kind),
        beta,
    )
    return record, (p, q, mask, vector)


def paired_divergence_fwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence (tokens,), what the backward needs of each row)."""
    record, alive = _divergence_record(logits_p, logits_q, **options)
    out = torch.empty(logits_p.shape[0], dtype=torch.float32, device=logits_p.device)
    state = out.new_empty(logits_p.shape[0], launchers().DIVERGENCE_STATE)
    launchers().paired_divergence_fwd(place(out), record, out.data_ptr(), state.data_ptr())
    del alive
    return out, state


def paired_divergence_bwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, state: torch.Tensor, grad: torch.Tensor, **options: Any
) -> torch.Tensor:
    """The gradient of logits_p; masked rows are known by their state."""
    record, alive = _divergence_record(logits_p, logits_q, **options)
    out = torch.empty(logits_p.shape, dtype=logits_p.dtype, device=logits_p.device)
    given = float_vector(grad)
    launchers().paired_divergence_bwd(
        place(out), record, state.data_ptr(), pointer(given), out.data_ptr(), out.stride(0)
    )
    del alive
    return out


def row_max_nats(o: LogitOptions) -> float | torch.Tensor:
    """The maximum is that of the logits; softcap and bias apply to scaled logits."""
    scale = 1.0 if o.softcap is not None or o.bias_logits is not None else o.logit_scale
    return o.per_temperature(scale)


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(with_targets(token_stats_fwd), token_stats_bwd, STATE)
KEPT_TOKEN_STATS = Kernels(with_support(kept_token_stats_fwd), kept_token_stats_bwd)
PAIRED_DIVERGENCE = Kernels(with_temperature(paired_divergence_fwd), paired_divergence_bwd)
