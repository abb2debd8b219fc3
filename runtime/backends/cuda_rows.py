"""Launchers of the CUDA kernels over rows of logits; the same functions as those of Triton."""

from typing import Any

import torch

from tokfuse.runtime.backends import row_args
from tokfuse.runtime.backends.cuda_backend import launchers, place
from tokfuse.runtime.backends.row_args import DIVERGENCE_STATE, RowStats
from tokfuse.runtime.backends.value_checks import with_support, with_targets, with_temperature
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    second_temperature: float | None = None,
    moments: bool = False,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, sum_sq, top1, row_max and inv_sum: (tokens,) float32 each.

    With second_temperature or moments three more: second_logp, sum_p2_logp and sum_p2_logp2, empty
    if they were not asked for. The caller has checked shapes, dtypes and devices.
    """
    out, native = row_args.empty_outputs(logits, second_temperature is not None, moments), launchers()
    native.token_stats_fwd(
        place(logits),
        row_args.logits_args(native, logits, target, LogitOptions(**options)),
        row_args.token_stats_out(native, RowStats.of(out), second_temperature),
    )
    return out


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
    native = launchers()
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    native.token_stats_bwd(
        place(logits),
        row_args.logits_args(native, logits, target, LogitOptions(**options)),
        row_args.token_stats_grad(
            native,
            row_max=row_max,
            inv_sum=inv_sum,
            logp=logp,
            entropy=entropy,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_logits=grad_logits,
        ),
    )
    return grad_logits


def kept_token_stats_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """logp, entropy, lse, row_max and inv_sum over the kept ids: (tokens,) float32 each."""
    native = launchers()
    logp, entropy, lse, row_max, inv_sum = (
        torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device) for _ in range(5)
    )
    rows = row_args.logits_args(native, logits, target, LogitOptions(**options))
    native.kept_token_stats_fwd(
        place(logits),
        row_args.kept_args(native, rows, ids, offsets),
        row_args.token_stats_out(native, RowStats(logp, entropy, lse, row_max=row_max, inv_sum=inv_sum)),
    )
    return logp, entropy, lse, row_max, inv_sum


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
    native = launchers()
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    rows = row_args.logits_args(native, logits, target, LogitOptions(**options))
    native.kept_token_stats_bwd(
        place(logits),
        row_args.kept_args(native, rows, ids, offsets),
        row_args.token_stats_grad(
            native,
            row_max=row_max,
            inv_sum=inv_sum,
            logp=logp,
            entropy=entropy,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_logits=grad_logits,
        ),
    )
    return grad_logits


def paired_divergence_fwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, *, kind: str, mix_weight: float, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """(divergence (tokens,), what the backward needs of each row)."""
    native = launchers()
    divergence = torch.empty(logits_p.shape[0], dtype=torch.float32, device=logits_p.device)
    state = divergence.new_empty(logits_p.shape[0], DIVERGENCE_STATE)
    native.paired_divergence_fwd(
        place(logits_p),
        row_args.divergence_args(native, logits_p, logits_q, LogitOptions(**options), kind=kind, mix_weight=mix_weight),
        row_args.divergence_out(native, divergence, state),
    )
    return divergence, state


def paired_divergence_bwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    state: torch.Tensor,
    grad: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The gradient of logits_p, into `out` if given, which may be logits_p; masked rows are known by their state."""
    native = launchers()
    grad_logits = torch.empty(logits_p.shape, dtype=logits_p.dtype, device=logits_p.device) if out is None else out
    native.paired_divergence_bwd(
        place(logits_p),
        row_args.divergence_args(native, logits_p, logits_q, LogitOptions(**options), kind=kind, mix_weight=mix_weight),
        row_args.divergence_grad(native, state, grad, grad_logits),
    )
    return grad_logits


def row_max_nats(o: LogitOptions) -> float | torch.Tensor:
    """The maximum is that of the logits; softcap and bias apply to scaled logits."""
    scale = 1.0 if o.softcap is not None or o.bias_logits is not None else o.logit_scale
    return o.per_temperature(scale)


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(with_targets(token_stats_fwd), token_stats_bwd, STATE)
KEPT_TOKEN_STATS = Kernels(with_support(kept_token_stats_fwd), kept_token_stats_bwd)
PAIRED_DIVERGENCE = Kernels(with_temperature(paired_divergence_fwd), paired_divergence_bwd)
