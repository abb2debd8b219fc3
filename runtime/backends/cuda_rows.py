"""Launch the CUDA kernels over rows of logits, by the same functions as for Triton."""

from typing import Any

import torch

from tokfuse.runtime.backends import row_args
from tokfuse.runtime.backends.cuda_backend import launchers, place, reader
from tokfuse.runtime.backends.row_args import DIVERGENCE_STATE, RowStats
from tokfuse.runtime.backends.value_checks import with_ids, with_support, with_targets, with_temperature
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.native import empty_vectors


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    *,
    second_temperature: float | None = None,
    moments: bool = False,
    logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1, row_max and inv_sum: (tokens,) float32 each.

    With second_temperature or moments, second_logp, sum_p2_logp and sum_p2_logp2 follow. Those that are
    not requested are empty. sum_j class_weight_j u_j is written to `logit_sum`, (tokens,) float32, if it is
    given; class_weight is (vocab,) float32. The caller has checked shapes, dtypes and devices.
    """
    out, native = row_args.empty_outputs(logits, second_temperature is not None, moments), launchers()
    native.token_stats_fwd(
        place(logits),
        row_args.logits_args(native, logits, target, LogitOptions(**options)),
        row_args.token_stats_out(native, RowStats.of(out), second_temperature, logit_sum, class_weight),
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
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """Return the gradient of the logits, written to `out` if given. `out` may be `logits` itself."""
    native = launchers()
    if out is None and grad_logit_sum is None and reader() is not None:
        given = (row_max, inv_sum, logp, entropy, grad_logp, grad_entropy, grad_lse)
        o, threads = LogitOptions(**options), torch.get_num_threads()
        done: torch.Tensor | None = native.eager_token_stats_bwd(logits, target, o, threads, *given)
        if done is not None:
            return done
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
            grad_lse=grad_lse,
            grad_logit_sum=grad_logit_sum,
            class_weight=class_weight,
        ),
    )
    return grad_logits


def token_stats_at_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    out: tuple[torch.Tensor, ...] | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """The seven outputs of token_stats_fwd, and logp_at (ids,) float32; into `out` if given.

    With `index`, row i of the logits is token index[i]; all other tensors are those of all tokens.
    """
    native = launchers()
    if out is None:
        logp_at = torch.empty(ids.shape, dtype=torch.float32, device=logits.device)
        out = (*row_args.empty_outputs(logits), logp_at)
    native.token_stats_at_fwd(
        place(logits),
        row_args.logits_args(native, logits, target, LogitOptions(**options), index=index),
        row_args.token_stats_out(native, RowStats.of(out[:7])),
        row_args.ids_args(native, ids, offsets, out[7]),
    )
    return out


def token_stats_at_bwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    logp_at: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_logp_at: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
    **options: Any,
) -> torch.Tensor:
    """The gradient of the logits, into `out` if given; `out` may be `logits` itself. `index`: as forward."""
    native = launchers()
    grad_logits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device) if out is None else out
    native.token_stats_at_bwd(
        place(logits),
        row_args.logits_args(native, logits, target, LogitOptions(**options), index=index),
        row_args.token_stats_grad(
            native,
            row_max=row_max,
            inv_sum=inv_sum,
            logp=logp,
            entropy=entropy,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_lse=grad_lse,
            grad_logits=grad_logits,
        ),
        row_args.ids_args(
            native,
            ids,
            offsets,
            logp_at,
            grad_logp_at,
            grad_at=torch.empty_like(logp_at),
            grad_at_target=torch.empty_like(logp),
            grad_total=torch.empty_like(logp),
        ),
    )
    return grad_logits


def kept_token_stats_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, row_max and inv_sum over the kept ids: (tokens,) float32 each."""
    native = launchers()
    logp, entropy, lse, row_max, inv_sum = empty_vectors([logits.shape[0]] * 5, logits.device)
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
    grad_lse: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Return the dense gradient of the logits, exactly 0 outside the kept ids."""
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
            grad_lse=grad_lse,
            grad_logits=grad_logits,
        ),
    )
    return grad_logits


def paired_divergence_fwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    given: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (divergence (tokens,), state (tokens, `DIVERGENCE_STATE`) for the backward).

    given: the state of longer rows, of which the logits are some columns; see `DivergenceArgs`.
    """
    native = launchers()
    divergence = torch.empty(logits_p.shape[0], dtype=torch.float32, device=logits_p.device)
    state = divergence.new_empty(logits_p.shape[0], DIVERGENCE_STATE)
    native.paired_divergence_fwd(
        place(logits_p),
        row_args.divergence_args(
            native, logits_p, logits_q, LogitOptions(**options), kind=kind, mix_weight=mix_weight, given=given
        ),
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
    """Return the gradient of logits_p, into `out` if given (it may be logits_p). The state marks masked rows."""
    native = launchers()
    grad_logits = torch.empty(logits_p.shape, dtype=logits_p.dtype, device=logits_p.device) if out is None else out
    native.paired_divergence_bwd(
        place(logits_p),
        row_args.divergence_args(native, logits_p, logits_q, LogitOptions(**options), kind=kind, mix_weight=mix_weight),
        row_args.divergence_grad(native, state, grad, grad_logits),
    )
    return grad_logits


def row_max_nats(o: LogitOptions) -> float | torch.Tensor:
    """Return nats per unit of `row_max`: the largest logit, with a softcap or bias the largest transformed one."""
    scale = 1.0 if o.softcap is not None or o.bias_logits is not None else o.logit_scale
    return o.per_temperature(scale)


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(with_targets(token_stats_fwd), token_stats_bwd, STATE)
TOKEN_STATS_AT = Kernels(with_ids(token_stats_at_fwd), token_stats_at_bwd)
KEPT_TOKEN_STATS = Kernels(with_support(kept_token_stats_fwd), kept_token_stats_bwd)
PAIRED_DIVERGENCE = Kernels(with_temperature(paired_divergence_fwd), paired_divergence_bwd, STATE)
