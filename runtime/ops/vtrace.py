"""`tokfuse.vtrace`: V-trace targets and the sequential doubly robust scan, as one reverse scan."""

from typing import NamedTuple

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    Runs,
    check_cu_seqlens,
    check_number,
    check_optional,
    check_vector,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.graph_ops import GraphForm, like_rows, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.vtrace import vtrace as reference

OP = "vtrace"


class VTrace(NamedTuple):
    """Result of `vtrace`; every field (tokens,), detached, 0 on masked tokens."""

    target: torch.Tensor
    advantage: torch.Tensor
    rho: torch.Tensor


@ranged("vtrace.fwd")
def vtrace(
    log_ratio: torch.Tensor,
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 1.0,
    rho_bar: float | None = 1.0,
    c_bar: float | None = 1.0,
    mask: torch.Tensor | None = None,
    finished: torch.Tensor | None = None,
) -> VTrace:
    """Off-policy value targets per packed sequence: V-trace, or doubly robust without clips.

        rho_t = min(rho_bar, w_t),   c_t = lam min(c_bar, w_t),   w_t = exp(log_ratio_t)
        target_t    = V_t + rho_t (r_t + gamma V_t+1 - V_t) + gamma c_t (target_t+1 - V_t+1)
        advantage_t = r_t + gamma target_t+1 - V_t

    With `rho_bar=None, c_bar=None` (and lam 1) the target is the sequential doubly robust estimate
    V_t + w_t (r_t + gamma target_t+1 - V_t), unbiased for any V when the ratios are right. With
    log_ratio 0 it is the discounted Monte-Carlo return whatever V is.

    Args:
        log_ratio: (tokens,), float, nats. Target minus behaviour log-probability of each token;
            clamped to +-20.
        reward: (tokens,), float. Reward of each token.
        value: (tokens,), float. Critic's value of the state in which the token was chosen.
        cu_seqlens: (seqs + 1,), int32. Borders of the packed sequences; empty ones are allowed.
        gamma: discount in [0, 1].
        lam: factor in [0, 1] on the trace c.
        rho_bar, c_bar: absolute upper bounds > 0 on the ratio. None: no bound.
        mask: (tokens,), bool. False tokens are skipped as in `gae`. None: all count.
        finished: (seqs,), bool. False: the value behind the last token is that token's own value;
            True: 0. None: all finished.

    Returns:
        VTrace(target, advantage, rho), each (tokens,) float32 (float64 if an input is float64).
        `advantage` does not carry rho: an objective with a ratio brings its own; for IMPALA's
        policy gradient multiply the two.

    Numerics:
        The scan runs in float64 and is rounded once; the native exp has relative error <= 1e-6. NaN
        stays inside its sequence. Bitwise repeatable, whatever the number of threads.

    Gradients and memory:
        No gradients. Three (tokens,) outputs; inputs of other dtypes are converted first.

    Examples:
        >>> cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
        >>> reward, value = torch.tensor([0.0, 1.0]), torch.zeros(2)
        >>> tokfuse.vtrace(torch.zeros(2), reward, value, cu_seqlens).target
        tensor([1., 1.])

    Raises:
        ValueError: shapes, dtypes, ranges, a `cu_seqlens` that is not a prefix sum of the tokens.

    Source:
        V-trace: IMPALA 1802.01561, section 4. Doubly robust recursion: 1511.03722, equation 10.
    """
    num_tokens = check_vector(OP, "reward", reward).shape[0]
    device = reward.device
    rows = Rows(num_tokens, "reward", device)
    check_vector(OP, "log_ratio", log_ratio, rows)
    check_vector(OP, "value", value, rows)
    num_seqs = check_cu_seqlens(OP, cu_seqlens, num_tokens, device)
    check_optional(OP, "mask", mask, rows, BOOL)
    seqs = Rows(num_seqs, "cu_seqlens", device)
    check_optional(OP, "finished", finished, seqs, BOOL)
    check_number(OP, "gamma", gamma, 0.0, 1.0)
    check_number(OP, "lam", lam, 0.0, 1.0)
    for name, bound in (("rho_bar", rho_bar), ("c_bar", c_bar)):
        if bound is not None:
            check_number(OP, name, bound, 0.0, open_low=True)
    dtype = working_dtype(log_ratio, reward, value)
    run = _RUNS[backend_of(OP, device.type, dtype)]
    return VTrace(
        *run(
            plain(log_ratio, dtype),
            plain(reward, dtype),
            plain(value, dtype),
            plain(cu_seqlens),
            gamma=float(gamma),
            lam=float(lam),
            rho_bar=rho_bar,
            c_bar=c_bar,
            mask=plain(mask),
            finished=plain(finished),
        )
    )


_FORM = GraphForm(
    "(Tensor log_ratio, Tensor reward, Tensor value, Tensor cu_seqlens, *, float gamma, float lam,"
    " float? rho_bar, float? c_bar, Tensor? mask, Tensor? finished) -> (Tensor, Tensor, Tensor)",
    like_rows(3),
)
# By name, because torch.compile can follow a module's table but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.vtrace, _FORM),
    "triton": traceable(OP, "triton", triton_packed.vtrace, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.vtrace, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
