"""`tokfuse.gae`: generalised advantage estimation over packed sequences, as one reverse scan."""

from typing import Any

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
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, like_rows, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.gae import gae as reference

OP = "gae"


@ranged("gae.fwd")
def gae(
    reward: torch.Tensor,
    value: torch.Tensor,
    cu_seqlens: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float | torch.Tensor = 1.0,
    mask: torch.Tensor | None = None,
    finished: torch.Tensor | None = None,
    length_adaptive_alpha: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the generalised advantages of packed sequences and the regression target of the critic.

        delta_t = r_t + gamma V_t+1 - V_t,  A_t = delta_t + gamma lam A_t+1,  returns_t = A_t + V_t

    where t+1 is the next token with mask True. A decoupled critic (VAPO) uses lam = 1 for the value and a
    smaller lam for the policy. It needs two calls, because `returns` depends on the lam of its call: take
    `advantage` from one call and `returns` from the other.

    Args:
        reward: (tokens,), float. Reward of each token. An outcome reward is on the last token.
        value: (tokens,), float. Value, by the critic, of the state in which the token was chosen.
        cu_seqlens: (seqs + 1,), int32. Offsets of the packed sequences. Empty sequences are allowed.
        gamma: discount in [0, 1].
        lam: decay in [0, 1]; a number, or (seqs,) float with one value per sequence.
        mask: (tokens,), bool. False tokens (tool output, padding) are skipped: the scan carries A
            and V across them, their reward and value are not read, and their outputs are 0.
            None: all tokens count.
        finished: (seqs,), bool. False marks a response that was cut off by its window, so the value
            after its last token is unknown. It is then set to the value at the last token, as in the
            extended GAE of T-PPO. For True it is 0. None: all sequences are finished.
        length_adaptive_alpha: alpha of VAPO's lam_i = 1 - 1 / max(alpha n_i, 1), which replaces `lam`.
            n_i is the number of tokens of sequence i with mask True. None: use `lam`.

    Returns:
        advantage: (tokens,), float32 (float64 if an input is float64). Detached, not whitened.
        returns: (tokens,), same dtype. A + V. Detached.

    Numerics:
        The scan runs in float64 and is rounded once. NaN stays inside its sequence. Results are bitwise
        repeatable for any number of threads. Zero tokens give empty outputs.

    Gradients and memory:
        No gradients. Two (tokens,) outputs. Inputs of another dtype are converted first.

    Examples:
        >>> reward, value = torch.tensor([0.0, 0.0, 1.0]), torch.tensor([0.5, 0.5, 0.5])
        >>> cu_seqlens = torch.tensor([0, 3], dtype=torch.int32)
        >>> tokfuse.gae(reward, value, cu_seqlens)
        (tensor([0.5000, 0.5000, 0.5000]), tensor([1., 1., 1.]))

    Raises:
        ValueError: wrong shape, dtype or range; a `cu_seqlens` that is not a prefix sum of the tokens
            (checked on the CPU, and on other devices only with TOKFUSE_CHECK=1).

    Source:
        GAE: arXiv 1506.02438. Skipping of masked tokens: verl `core_algos.py`, which also drops their
        rewards. Both exact. Extended GAE: T-PPO, arXiv 2506.15050, reconstructed from two agreeing
        sources. Length-adaptive lam: VAPO, arXiv 2504.05118, formula in NeMo-RL
        `advantage_estimator.py`, exact.
    """
    num_tokens = check_vector(OP, "reward", reward).shape[0]
    device = reward.device
    rows = Rows(num_tokens, "reward", device)
    check_vector(OP, "value", value, rows)
    num_seqs = check_cu_seqlens(OP, cu_seqlens, num_tokens, device)
    check_optional(OP, "mask", mask, rows, BOOL)
    seqs = Rows(num_seqs, "cu_seqlens", device)
    check_optional(OP, "finished", finished, seqs, BOOL)
    check_number(OP, "gamma", gamma, 0.0, 1.0)
    if isinstance(lam, torch.Tensor):
        check_vector(OP, "lam", lam, seqs)
    else:
        check_number(OP, "lam", lam, 0.0, 1.0)
    if length_adaptive_alpha is not None:
        check_number(OP, "length_adaptive_alpha", length_adaptive_alpha, 0.0, open_low=True)
        if isinstance(lam, torch.Tensor) or lam != 1.0:
            want = "left out with length_adaptive_alpha"
            raise refuse(OP, "lam", want, "a tensor or number", "Remove it: it would have no effect.")
    dtype = working_dtype(reward, value)
    run = _RUNS[backend_of(OP, device.type, dtype)]
    out: tuple[torch.Tensor, torch.Tensor] = run(
        plain(reward, dtype),
        plain(value, dtype),
        plain(cu_seqlens),
        gamma=float(gamma),
        lam=plain(lam, dtype) if isinstance(lam, torch.Tensor) else float(lam),
        length_adaptive_alpha=number(length_adaptive_alpha),
        mask=plain(mask),
        finished=plain(finished),
    )
    return out


def _flat(options: dict[str, Any]) -> dict[str, Any]:
    lam = options["lam"]
    per_seq = lam if isinstance(lam, torch.Tensor) else None
    return options | {"lam": 1.0 if per_seq is not None else lam, "seq_lam": per_seq}


def _rich(options: dict[str, Any]) -> dict[str, Any]:
    per_seq = options.pop("seq_lam")
    return options | ({} if per_seq is None else {"lam": per_seq})


_FORM = GraphForm(
    "(Tensor reward, Tensor value, Tensor cu_seqlens, *, float gamma, float lam, Tensor? seq_lam,"
    " float? length_adaptive_alpha, Tensor? mask, Tensor? finished) -> (Tensor, Tensor)",
    like_rows(2),
    _flat,
    _rich,
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.gae, _FORM),
    "triton": traceable(OP, "triton", triton_packed.gae, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.gae, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
