"""Launch the Triton kernels over rows of logits. The launchers allocate their outputs."""

from typing import Any

import torch

from tokfuse.runtime.backends.row_args import divergence_bound
from tokfuse.runtime.backends.triton_backend import launcher
from tokfuse.runtime.backends.value_checks import with_ids, with_support, with_targets, with_temperature
from tokfuse.runtime.core.dispatch import Kernels, RowState
from tokfuse.runtime.core.logit_options import LogitOptions

_divergence_fwd = launcher("paired_divergence", "paired_divergence_fwd")


def paired_divergence_fwd(
    logits_p: torch.Tensor, logits_q: torch.Tensor, *, kind: str, mix_weight: float, **options: Any
) -> tuple[torch.Tensor, ...]:
    """Return (divergence (tokens,), state for the backward). `given` is an option, as for CUDA."""
    bound = divergence_bound(kind, mix_weight)
    out: tuple[torch.Tensor, ...] = _divergence_fwd(
        logits_p, logits_q, kind=kind, mix_weight=mix_weight, bound=bound, **options
    )
    return out


def row_max_nats(o: LogitOptions) -> float | torch.Tensor:
    """Return nats per unit of `row_max`: as for CUDA, but with a softcap it is the largest tanh, before the cap."""
    if o.softcap is not None:
        return o.per_temperature(o.softcap)
    return o.per_temperature(1.0 if o.bias_logits is not None else o.logit_scale)


STATE = RowState(row_max_nats)
TOKEN_STATS = Kernels(
    with_targets(launcher("token_stats", "token_stats_fwd")), launcher("token_stats", "token_stats_bwd"), STATE
)
TOKEN_STATS_AT = Kernels(
    with_ids(launcher("token_stats_at", "token_stats_at_fwd")), launcher("token_stats_at", "token_stats_at_bwd")
)
KEPT_TOKEN_STATS = Kernels(
    with_support(launcher("kept_token_stats", "kept_token_stats_fwd")),
    launcher("kept_token_stats", "kept_token_stats_bwd"),
)
PAIRED_DIVERGENCE = Kernels(
    with_temperature(paired_divergence_fwd), launcher("paired_divergence", "paired_divergence_bwd"), STATE
)
