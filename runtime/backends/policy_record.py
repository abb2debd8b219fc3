"""What an objective's kernels over packed tokens read and write, as tokfuse._native takes it."""

from collections.abc import Sequence
from typing import Any

import torch

from tokfuse.runtime.core.native import float_vector, pointer
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective


def policy_record(
    logp: torch.Tensor | None,
    entropy: torch.Tensor | None,
    inputs: PolicyInputs,
    objective: Objective,
    inverse: float,
    out: Sequence[torch.Tensor],
) -> tuple[tuple[Any, ...], list[torch.Tensor | None]]:
    """(the fields that CPU and CUDA share, tensors that must outlive the call).

    out = (token_loss, d_logp, d_entropy, sums). On policy the old log-probabilities are logp's own
    memory, which the fused kernel of the CPU writes before it reads a token's objective.
    """
    i = inputs
    old_logp = logp if i.old_logp is None else i.old_logp
    assert old_logp is not None
    mask = None if i.mask is None else i.mask.contiguous()
    cu = None if i.cu_seqlens is None else i.cu_seqlens.contiguous()
    vectors = (
        logp,
        old_logp,
        i.advantage,
        i.token_weight,
        i.signal,
        i.ref_logp,
        i.kl_weight,
        entropy,
        i.entropy_weight,
    )
    alive = [*map(float_vector, vectors), mask, cu, *out]
    p = [pointer(x) for x in alive]
    record = (
        objective.record,
        old_logp.shape[0],
        0 if cu is None else cu.shape[0] - 1,
        *p[:3],
        int(i.advantage_level == "sequence"),
        p[9],
        p[10],
        *p[3:9],
        inverse,
        int(objective.counts_sequences),
        *p[11:],
    )
    return record, alive
