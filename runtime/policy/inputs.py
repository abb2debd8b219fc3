"""Record of the per-token inputs of an objective."""

from typing import NamedTuple

import torch


class PolicyInputs(NamedTuple):
    """Per-token inputs of an objective. They carry no gradient. None means that the term is absent.

    If old_logp is None, the update is on policy: the old policy is the current one, and every ratio is 1.
    """

    old_logp: torch.Tensor | None
    advantage: torch.Tensor
    advantage_level: str = "token"
    mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    token_weight: torch.Tensor | None = None
    signal: torch.Tensor | None = None
    ref_logp: torch.Tensor | None = None
    kl_weight: torch.Tensor | None = None
    entropy_weight: torch.Tensor | None = None
