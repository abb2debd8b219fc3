"""Test heads on the CPU whose logits are stored in tiles: two sizes of chunks, and part of a tile at the end.

Bounds against the reference, as for heads with few columns: statistics 1e-5; divergences 4e-6 absolute and relative;
gradients 1.5e-5 of the sum of absolute terms (docs/numerics.md).
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


def sizes_of_terms(case: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the sums of the absolute terms of the gradients of hidden and weight."""
    x = {name: value.double() for name, value in case.items()}
    log_p = (x["hidden"] @ x["weight"].t()).log_softmax(-1)
    log_q = (x["teacher_hidden"] @ x["teacher_weight"].t()).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    term = 0.4 * (torch.maximum(p, q) + p * (log_p - log_q).abs()) / TOKENS
    return term @ x["weight"].abs(), term.t() @ x["hidden"].abs()


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
    (value, *gradients), (want, *wanted) = results
    compare(value, want, atol=4e-6, rtol=4e-6)
    for got, want, size in zip(gradients, wanted, sizes_of_terms(case), strict=True):
        compare(got, want, atol=1.5e-5 * size)
