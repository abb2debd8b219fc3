"""Plain calls of the eager mode, which one native function runs: on the CPU and on CUDA."""

from collections.abc import Callable
from typing import Any

import torch

import tokfuse

TOKENS, VOCAB = 7, 33
CU = torch.tensor([0, 3, 7], dtype=torch.int32)
Call = Callable[[], Any]


class Spy:
    """Replacement of the native module that records which whole-call functions ran."""

    def __init__(self, module: Any) -> None:
        self.module = module
        self.answered: list[str] = []

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            out = getattr(self.module, name)(*args, **named)
            self.answered += [] if out is None else [name]
            return out

        return call


def batch(seed: int = 0) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    advantage = torch.randn(TOKENS, generator=gen)
    advantage[2] = 0.0
    return {
        "old_logp": -3.5 + 0.3 * torch.randn(TOKENS, generator=gen),
        "advantage": advantage,
        "mask": torch.tensor([True, True, True, False, True, True, True]),
    }


def logits_of(dtype: torch.dtype = torch.float32, seed: int = 1) -> torch.Tensor:
    return torch.randn(TOKENS, VOCAB, generator=torch.Generator().manual_seed(seed)).to(dtype)


TARGET = torch.arange(TOKENS) * 4

OBJECTIVES = {
    "ppo": (tokfuse.Objective(), {}),
    "kl_entropy": (
        tokfuse.Objective(kl=tokfuse.KL(coef=0.1), entropy_coef=0.02),
        {"ref_logp": torch.full((TOKENS,), -3.4), "kl_weight": torch.linspace(0, 1, TOKENS)},
    ),
    "seq_mean": (tokfuse.Objective(aggregation="seq_mean_token_mean"), {"cu_seqlens": CU}),
    "batch": (tokfuse.Objective(), {"normalizer": "batch"}),
    "number": (tokfuse.Objective(aggregation="token_sum"), {"normalizer": 12}),
    "per_sequence": (
        tokfuse.Objective(),
        {"cu_seqlens": CU, "advantage_level": "sequence", "advantage": torch.tensor([1.0, -2.0])},
    ),
    "signal": (tokfuse.Objective(shape=tokfuse.NFT()), {"signal": torch.full((TOKENS,), 0.4)}),
}


def flat(result: Any) -> list[torch.Tensor]:
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, tokfuse.PolicyStep):
        given = (result.loss, result.token_loss, result.loss_sum, result.count)
        rest = (result.metrics.sums, *result.stats, result.grad_logits)
        return [x for x in (*given, *rest) if x is not None]
    if isinstance(result, tokfuse.PolicyLoss):
        given = (result.loss, result.token_loss, result.loss_sum, result.count)
        return [*given, result.metrics.sums]
    return list(result)
