"""Test heads on the CPU whose logits are stored in tiles: two sizes of chunks, and part of a tile at the end.

Bound: that of the heads with few columns, against the reference.
"""

import pytest
import torch
from harness import compare

import tokfuse

TOKENS, VOCAB = 5, 34_000
CHUNKS = {"one chunk": 64 << 20, "3 + 2 rows": 3 * 4 * 37_000}


def inputs(hidden: int) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(hidden)
    sizes = {
        "hidden": (TOKENS, hidden),
        "weight": (VOCAB, hidden),
        "teacher_hidden": (TOKENS, 9),
        "teacher_weight": (VOCAB, 9),
    }
    return {name: torch.randn(size, generator=gen) for name, size in sizes.items()}


@pytest.mark.parametrize("chunks", CHUNKS)
def test_statistics(chunks: str):
    case, target = inputs(8), torch.tensor([0, 4095, 8192, 33_999, 17])
    results = []
    for name in ("cpu", "reference"):
        with tokfuse.backend(name):
            results.append(
                tokfuse.linear_token_stats(case["hidden"], case["weight"], target, memory_budget=CHUNKS[chunks])
            )
    for got, want in zip(*results, strict=True):
        compare(got, want, atol=1e-5)


@pytest.mark.parametrize("hidden", (3, 8), ids=("rows outside dW", "rows in dW"))
@pytest.mark.parametrize("chunks", CHUNKS)
def test_distillation(chunks: str, hidden: int):
    case, results = inputs(hidden), []
    for name in ("cpu", "reference"):
        leaves = {key: case[key].clone().requires_grad_() for key in ("hidden", "weight")}
        with tokfuse.backend(name):
            step = tokfuse.distill_step(**case | leaves, kind="jsd", normalizer="batch", memory_budget=CHUNKS[chunks])
        step.loss.backward()
        results.append((step.divergence, leaves["hidden"].grad, leaves["weight"].grad))
    for got, want in zip(*results, strict=True):
        compare(got, want, atol=2e-5 * float(want.abs().max()))
