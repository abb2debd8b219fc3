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
    number,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.graph_ops import GraphForm, like_rows, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.vtrace import vtrace as reference

OP = "vtrace"


class VTrace(NamedTuple):
    """Result of `vtrace`. Every field is (tokens,), detached, 0 at masked tokens."""

    target: torch.Tensor
    """Off-policy value target of the critic."""
    advantage: torch.Tensor
    """r_t + gamma target_t+1 - V_t, without the factor rho."""
    rho: torch.Tensor
    """Ratio of the two policies, bounded by rho_bar."""


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
    """Return off-policy value targets of packed sequences: V-trace, or doubly robust without bounds.

        rho_t = min(rho_bar, w_t),   c_t = lam min(c_bar, w_t),   w_t = exp(log_ratio_t)
        target_t    = V_t + rho_t (r_t + gamma V_t+1 - V_t) + gamma c_t (target_t+1 - V_t+1)
        advantage_t = r_t + gamma target_t+1 - V_t

    where t+1 is the next token with mask True. With `rho_bar=None, c_bar=None` and lam = 1 the target is
    the sequential doubly robust estimate V_t + w_t (r_t + gamma target_t+1 - V_t). It is unbiased for any V
    if the ratios are correct. With log_ratio = 0 it is the discounted Monte-Carlo return for any V.

    Args:
        log_ratio: (tokens,), float, nats. Log-probability of each token under the target policy minus
            that under the behaviour policy. Clamped to +-20.
        reward: (tokens,), float. Reward of each token.
        value: (tokens,), float. Value, by the critic, of the state in which the token was chosen.
        cu_seqlens: (seqs + 1,), int32. Offsets of the packed sequences. Empty sequences are allowed.
        gamma: discount in [0, 1].
        lam: factor in [0, 1] of the trace c.
        rho_bar: absolute upper bound > 0 on the ratio in rho. None: no bound.
        c_bar: absolute upper bound > 0 on the ratio in c. None: no bound.
        mask: (tokens,), bool. False tokens (tool output, padding) are skipped: the scan carries its
            values across them, their inputs are not read, and their outputs are 0. None: all tokens
            count.
        finished: (seqs,), bool. False marks a response that was cut off by its window: the value after
            its last token is set to the value at the last token. For True it is 0. None: all sequences
            are finished.

    Returns:
        VTrace(target, advantage, rho), each (tokens,) float32 (float64 if an input is float64).
        `advantage` does not contain rho, because objectives with a ratio apply their own ratio. For
        the policy gradient of IMPALA, multiply the two.

    Numerics:
        The scan runs in float64 and is rounded once. The native exp has a relative error <= 1e-6. NaN
        stays inside its sequence. Results are bitwise repeatable for any number of threads.

    Gradients and memory:
        No gradients. Three (tokens,) outputs. Inputs of another dtype are converted first.

    Examples:
        >>> cu_seqlens = torch.tensor([0, 2], dtype=torch.int32)
        >>> reward, value = torch.tensor([0.0, 1.0]), torch.zeros(2)
        >>> tokfuse.vtrace(torch.zeros(2), reward, value, cu_seqlens).target
        tensor([1., 1.])

    Raises:
        ValueError: wrong shape, dtype or range; a `cu_seqlens` that is not a prefix sum of the tokens
            (checked on the CPU, and on other devices only with TOKFUSE_CHECK=1).

    Source:
        V-trace: IMPALA, arXiv 1802.01561, section 4. Doubly robust recursion: arXiv 1511.03722,
        equation 10.
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
            rho_bar=number(rho_bar),
            c_bar=number(c_bar),
            mask=plain(mask),
            finished=plain(finished),
        )
    )


_FORM = GraphForm(
    "(Tensor log_ratio, Tensor reward, Tensor value, Tensor cu_seqlens, *, float gamma, float lam,"
    " float? rho_bar, float? c_bar, Tensor? mask, Tensor? finished) -> (Tensor, Tensor, Tensor)",
    like_rows(3),
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
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
