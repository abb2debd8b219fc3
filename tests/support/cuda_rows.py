"""The launchers of the CUDA row kernels, with the defaults of the ops. Outputs start as NaN.

For tests of cases that the ops do not request: arrays at unusual addresses, rows of some tokens, 16-bit
gradients of float32 rows. Use it only in a process with TOKFUSE_CUDA_HOST.
"""

from typing import Any

import torch
from torch import Tensor

from tokfuse.runtime.backends import cuda_policy, cuda_rows
from tokfuse.runtime.backends.objective_args import TokenPointers, TokenResults
from tokfuse.runtime.policy.objective import Objective

PLAIN: dict[str, Any] = {"temperature": 1.0, "softcap": None, "logit_scale": 1.0}


def token_stats_fwd(logits: Tensor, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    """Return logp, entropy, lse, sum_sq, top1, row_max, inv_sum and the requested extras."""
    return cuda_rows.token_stats_fwd(logits, target, **{"mask": None, **PLAIN, **options})


def token_stats_bwd(
    logits: Tensor,
    target: Tensor,
    stats: tuple[Tensor, ...],
    grad_logp: Tensor | None,
    grad_entropy: Tensor | None,
    out: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Return the gradient, computed from the results of token_stats_fwd; `out` may be the logits."""
    grad = torch.full(logits.shape, float("nan"), dtype=logits.dtype) if out is None else out
    return cuda_rows.token_stats_bwd(
        logits,
        target,
        stats[5],
        stats[6],
        *stats[:2],
        grad_logp,
        grad_entropy,
        grad,
        **{"mask": None, **PLAIN, **options},
    )


def policy_step(
    logits: Tensor,
    target: Tensor,
    objective: Objective,
    inputs: dict[str, Tensor],
    scale: float | Tensor = 1.0,
    out: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    index: Tensor | None = None,
    **options: Any,
) -> tuple[list[Tensor], dict[str, Tensor], Tensor]:
    """Return (statistics, results by name, gradient)."""
    nan = torch.full((len(target),), float("nan"))
    stats = [nan.clone() for _ in range(5)]
    flags = torch.full((len(target),), -1, dtype=torch.int32)
    results = TokenResults(*(nan.clone() for _ in range(4)), flags)
    grad = torch.full(logits.shape, float("nan"), dtype=logits.dtype) if out is None else out
    names = (name for name in TokenPointers._fields if name != "mask")
    pointers = TokenPointers(mask=mask, **{name: inputs.get(name) for name in names})
    given = cuda_policy.CudaInputs(pointers, objective.record, scale, None)
    cuda_policy.policy_step_rows(logits, grad, index, target, given, stats, results, **{**PLAIN, **options})
    return stats, results._asdict(), grad
