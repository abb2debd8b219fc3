"""The CPU kernels over rows of logits: records, outputs and calls of the native module."""

from typing import Any

import torch

from tokfuse.runtime.backends.value_checks import refuse_temperature
from tokfuse.runtime.core import native
from tokfuse.runtime.core.codes import DIVERGENCES
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference.token_stats import bad_row, check_values

LN_2 = 0.6931471805599453
DIVERGENCE_STATE = 6  # kDivergenceState of csrc/cpu/distribution_kernels.h


def logits_record(
    logits: torch.Tensor, target: torch.Tensor, o: LogitOptions
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(record for tokfuse._native, tensors that must outlive the call)."""
    if logits.stride(1) != 1:
        logits = logits.contiguous()
    bias = o.bias_logits
    if bias is not None and bias.stride(1) != 1:
        bias = bias.contiguous()
    target = target.contiguous()
    mask = None if o.mask is None else o.mask.contiguous()
    temperature: float | torch.Tensor = o.temperature
    scalar, vector = 1.0, None
    if isinstance(temperature, torch.Tensor):
        vector = temperature.float().contiguous()
    else:
        scalar = temperature
    record = (
        logits.data_ptr(),
        logits.stride(0),
        native.DTYPE_CODE[logits.dtype],
        logits.shape[0],
        logits.shape[1],
        target.data_ptr(),
        native.pointer(mask),
        native.pointer(vector),
        scalar,
        o.softcap or 0.0,
        o.logit_scale,
        native.pointer(bias),
        0 if bias is None else bias.stride(0),
        o.bias_scale,
        torch.get_num_threads(),
        0,
        logits.shape[0],
        0,
        0,
    )
    return record, (logits, target, mask, vector, bias)


# ------------------------------------------------------------------------------------- token_stats


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    op: str = "token_stats",
    second_temperature: float | None = None,
    moments: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, sum_sq, top1, row_max and inv_sum: (tokens,) float32 each.

    With second_temperature or moments three more: second_logp, sum_p2_logp and sum_p2_logp2, empty
    if they were not asked for.
    """
    o = LogitOptions(**options)
    record, alive = logits_record(logits, target, o)
    tokens = logits.shape[0]
    sizes = [tokens] * 7
    if second_temperature is not None or moments:
        sizes += [0 if second_temperature is None else tokens] + [tokens if moments else 0] * 2
    out = [torch.empty(size, dtype=torch.float32) for size in sizes]
    second, p2_logp, p2_logp2 = [x.data_ptr() if x.shape[0] > 0 else 0 for x in out[7:]] or (0, 0, 0)
    bad = native.loaded().token_stats_fwd(
        record,
        *[x.data_ptr() for x in out[:7]],
        p2_logp,
        p2_logp2,
        second,
        1.0 if second_temperature is None else second_temperature,
    )
    del alive
    if bad >= 0:
        raise bad_row(op, bad, target, logits.shape[1], o.temperature)
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
    """The gradient of the logits, into `out` if given; `out` may be `logits` itself."""
    record, alive = logits_record(logits, target, LogitOptions(**options))
    grad_logits = native.empty_like_rows(logits) if out is None else out
    ga = None if grad_logp is None else grad_logp.float().contiguous()
    gh = None if grad_entropy is None else grad_entropy.float().contiguous()
    native.loaded().token_stats_bwd(
        record,
        row_max.data_ptr(),
        inv_sum.data_ptr(),
        logp.data_ptr(),
        entropy.data_ptr(),
        native.pointer(ga),
        native.pointer(gh),
        grad_logits.data_ptr(),
        grad_logits.stride(0),
    )
    del alive
    return grad_logits


# -------------------------------------------------------------------------------- kept_token_stats


def kept_token_stats_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, row_max and inv_sum over the kept ids: (tokens,) float32 each."""
    o = LogitOptions(**options)
    record, alive = logits_record(logits, target, o)
    out = [torch.empty(logits.shape[0], dtype=torch.float32) for _ in range(5)]
    bad = native.loaded().kept_token_stats_fwd(
        record, ids.data_ptr(), offsets.data_ptr(), ids.shape[0], *[x.data_ptr() for x in out]
    )
    del alive
    if bad >= 0:
        _refuse_kept_row(bad, logits, target, ids, offsets, o)
    return tuple(out)


def _refuse_kept_row(
    bad: int, logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, o: LogitOptions
) -> None:
    """Raise the error for row `bad`; which value it is about was not recorded by the kernel."""
    vocab = logits.shape[1]
    only = torch.zeros(logits.shape[0], dtype=torch.bool)
    only[bad] = True
    check_values("kept_token_stats", target, vocab, only, o.temperature)
    row_ids = ids[int(offsets[bad]) : int(offsets[bad + 1])]
    kept_reference.check_ids(row_ids, torch.full_like(row_ids, bad), vocab, None)


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
    record, alive = logits_record(logits, target, LogitOptions(**options))
    grad = native.empty_like_rows(logits)
    ga = None if grad_logp is None else grad_logp.float().contiguous()
    gh = None if grad_entropy is None else grad_entropy.float().contiguous()
    native.loaded().kept_token_stats_bwd(
        record,
        ids.data_ptr(),
        offsets.data_ptr(),
        ids.shape[0],
        row_max.data_ptr(),
        inv_sum.data_ptr(),
        logp.data_ptr(),
        entropy.data_ptr(),
        native.pointer(ga),
        native.pointer(gh),
        grad.data_ptr(),
        grad.stride(0),
    )
    del alive
    return grad


# ------------------------------------------------------------------------------- paired_divergence


def divergence_record(
    p: torch.Tensor, q: torch.Tensor, kind: str, beta: float, o: LogitOptions
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(record for tokfuse._native, tensors that must outlive the call)."""
    p, q = (x if x.stride(1) == 1 else x.contiguous() for x in (p, q))
    mask = None if o.mask is None else o.mask.contiguous()
    scalar, vector = 1.0, None
    if isinstance(o.temperature, torch.Tensor):
        vector = o.temperature.float().contiguous()
    else:
        scalar = o.temperature
    record = (
        p.data_ptr(),
        p.stride(0),
        q.data_ptr(),
        q.stride(0),
        native.DTYPE_CODE[p.dtype],
        p.shape[0],
        p.shape[1],
        native.pointer(mask),
        native.pointer(vector),
        scalar,
        o.softcap or 0.0,
        o.logit_scale,
        DIVERGENCES.index(kind),
        beta,
        torch.get_num_threads(),
    )
    return record, (p, q, mask, vector)


def paired_divergence_fwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, *, kind: str, beta: float, **options: Any
) -> tuple[torch.Tensor, ...]:
    """(divergence (tokens,), what the backward needs of each row)."""
    o = LogitOptions(**options)
    record, alive = divergence_record(logits_p, logits_q, kind, beta, o)
    out = torch.empty(logits_p.shape[0], dtype=torch.float32)
    state = torch.empty(logits_p.shape[0], DIVERGENCE_STATE, dtype=torch.float32)
    bad = native.loaded().paired_divergence_fwd(record, out.data_ptr(), state.data_ptr())
    del alive
    if bad >= 0:
        assert isinstance(o.temperature, torch.Tensor)
        refuse_temperature("paired_divergence", o.temperature, bad)
    return out, state


def paired_divergence_bwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    *,
    kind: str,
    beta: float,
    **options: Any,
) -> torch.Tensor:
    """The gradient of logits_p; masked rows are known by their state."""
    record, alive = divergence_record(logits_p, logits_q, kind, beta, LogitOptions(**options))
    out = native.empty_like_rows(logits_p)
    given = grad.float().contiguous()
    native.loaded().paired_divergence_bwd(record, state.data_ptr(), given.data_ptr(), out.data_ptr(), out.stride(0))
    del alive
    return out


def row_max_nats(o: LogitOptions) -> float:
    """The exponents are in base 2, every option applied."""
    return LN_2


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(token_stats_fwd, token_stats_bwd, STATE)
KEPT_TOKEN_STATS = Kernels(kept_token_stats_fwd, kept_token_stats_bwd)
PAIRED_DIVERGENCE = Kernels(paired_divergence_fwd, paired_divergence_bwd)
