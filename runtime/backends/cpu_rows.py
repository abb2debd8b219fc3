"""Call the CPU kernels over rows of logits and allocate their outputs."""

from typing import Any

import torch

from tokfuse.runtime.backends import row_args
from tokfuse.runtime.backends.row_args import DIVERGENCE_STATE, RowStats
from tokfuse.runtime.backends.value_checks import refuse_temperature
from tokfuse.runtime.core import native
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions, bad_row, check_values
from tokfuse.runtime.reference import kept_token_stats as kept_reference
from tokfuse.runtime.reference import token_stats_at as at_reference

LN_2 = 0.6931471805599453

# ------------------------------------------------------------------------------------- token_stats


def token_stats_fwd(
    logits: torch.Tensor,
    target: torch.Tensor,
    op: str = "token_stats",
    second_temperature: float | None = None,
    moments: bool = False,
    logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1, row_max and inv_sum: (tokens,) float32 each.

    With second_temperature or moments, second_logp, sum_p2_logp and sum_p2_logp2 follow. Those that are
    not requested are empty. sum_j class_weight_j u_j is written to `logit_sum`, (tokens,) float32, if it is given;
    class_weight is (vocab,) float32.
    """
    o, module = LogitOptions(**options), native.loaded()
    out = row_args.empty_outputs(logits, second_temperature is not None, moments)
    bad = module.token_stats_fwd(
        row_args.logits_args(module, logits, target, o),
        row_args.token_stats_out(module, RowStats.of(out), second_temperature, logit_sum, class_weight),
    )
    if bad >= 0:
        raise bad_row(op, bad, target, logits.shape[1], o.temperature)
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
    module = native.loaded()
    grad_logits = native.empty_like_rows(logits) if out is None else out
    module.token_stats_bwd(
        row_args.logits_args(module, logits, target, LogitOptions(**options)),
        row_args.token_stats_grad(
            module,
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


# ---------------------------------------------------------------------------------- token_stats_at


def token_stats_at_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """The seven outputs of token_stats_fwd, and logp_at (ids,) float32."""
    o, module = LogitOptions(**options), native.loaded()
    out = (*row_args.empty_outputs(logits), torch.empty(ids.shape, dtype=torch.float32, device="cpu"))
    bad = module.token_stats_at_fwd(
        row_args.logits_args(module, logits, target, o),
        row_args.token_stats_out(module, RowStats.of(out[:7])),
        row_args.ids_args(module, ids, offsets, out[7]),
    )
    if bad >= 0:
        at_reference.check_values("token_stats", target, ids, offsets, logits.shape[1], o.mask, o.temperature)
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
    **options: Any,
) -> torch.Tensor:
    """The gradient of the logits."""
    module = native.loaded()
    grad_logits = native.empty_like_rows(logits)
    module.token_stats_at_bwd(
        row_args.logits_args(module, logits, target, LogitOptions(**options)),
        row_args.token_stats_grad(
            module,
            row_max=row_max,
            inv_sum=inv_sum,
            logp=logp,
            entropy=entropy,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_lse=grad_lse,
            grad_logits=grad_logits,
        ),
        row_args.ids_args(module, ids, offsets, logp_at, grad_logp_at),
    )
    return grad_logits


# -------------------------------------------------------------------------------- kept_token_stats


def kept_token_stats_fwd(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return logp, entropy, lse, row_max and inv_sum over the kept ids: (tokens,) float32 each."""
    o, module = LogitOptions(**options), native.loaded()
    logp, entropy, lse, row_max, inv_sum = native.empty_vectors([logits.shape[0]] * 5, logits.device)
    bad = module.kept_token_stats_fwd(
        row_args.kept_args(module, row_args.logits_args(module, logits, target, o), ids, offsets),
        row_args.token_stats_out(module, RowStats(logp, entropy, lse, row_max=row_max, inv_sum=inv_sum)),
    )
    if bad >= 0:
        _refuse_kept_row(bad, logits, target, ids, offsets, o)
    return logp, entropy, lse, row_max, inv_sum


def _refuse_kept_row(
    bad: int, logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor, offsets: torch.Tensor, o: LogitOptions
) -> None:
    """Raise the error for row `bad`. The kernel reports the row only, so its values are checked again."""
    vocab = logits.shape[1]
    only = torch.zeros(logits.shape[0], dtype=torch.bool, device="cpu")
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
    grad_lse: torch.Tensor | None,
    **options: Any,
) -> torch.Tensor:
    """Return the dense gradient of the logits, exactly 0 outside the kept ids."""
    module = native.loaded()
    grad_logits = native.empty_like_rows(logits)
    rows = row_args.logits_args(module, logits, target, LogitOptions(**options))
    module.kept_token_stats_bwd(
        row_args.kept_args(module, rows, ids, offsets),
        row_args.token_stats_grad(
            module,
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


# ------------------------------------------------------------------------------- paired_divergence


def paired_divergence_fwd(
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    *,
    kind: str,
    mix_weight: float,
    given: torch.Tensor | None = None,
    **options: Any,
) -> tuple[torch.Tensor, ...]:
    """Return (divergence (tokens,), state (tokens, `DIVERGENCE_STATE`) for the backward).

    given: the state of longer rows, of which the logits are some columns; see `DivergenceArgs`.
    """
    o, module = LogitOptions(**options), native.loaded()
    divergence = torch.empty(logits_p.shape[0], dtype=torch.float32, device="cpu")
    state = torch.empty(logits_p.shape[0], DIVERGENCE_STATE, dtype=torch.float32, device="cpu")
    bad = module.paired_divergence_fwd(
        row_args.divergence_args(module, logits_p, logits_q, o, kind=kind, mix_weight=mix_weight, given=given),
        row_args.divergence_out(module, divergence, state),
    )
    if bad >= 0:
        assert isinstance(o.temperature, torch.Tensor)
        refuse_temperature("paired_divergence", o.temperature, bad)
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
    module, o = native.loaded(), LogitOptions(**options)
    grad_logits = native.empty_like_rows(logits_p) if out is None else out
    module.paired_divergence_bwd(
        row_args.divergence_args(module, logits_p, logits_q, o, kind=kind, mix_weight=mix_weight),
        row_args.divergence_grad(module, state, grad, grad_logits),
    )
    return grad_logits


def row_max_nats(o: LogitOptions) -> float:
    """Return nats per unit of `row_max`: it is an exponent of 2, with every option applied."""
    return LN_2


def divergence_nats(o: LogitOptions) -> float | torch.Tensor:
    """Return nats per unit of the maxima of paired_divergence: logits, with a softcap or scale transformed ones."""
    return o.per_temperature(1.0 if o.softcap is not None else o.logit_scale)


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(token_stats_fwd, token_stats_bwd, STATE)
TOKEN_STATS_AT = Kernels(token_stats_at_fwd, token_stats_at_bwd)
KEPT_TOKEN_STATS = Kernels(kept_token_stats_fwd, kept_token_stats_bwd)
PAIRED_DIVERGENCE = Kernels(paired_divergence_fwd, paired_divergence_bwd, RowState(divergence_nats))
