"""Calls every op of the backend "cuda" once, on small inputs; for compute-sanitizer.

    compute-sanitizer --tool memcheck python tests/support/cuda_smoke.py

Runs on a GPU, or on the CPU where TOKFUSE_CUDA_HOST is set.
"""

from collections.abc import Callable

import torch

import tokfuse
from tokfuse import KL, Objective, PPOClip
from tokfuse.runtime.backends import cuda_backend

TOKENS, VOCAB, HIDDEN = 24, 1003, 16
DEVICE = "cpu" if cuda_backend.hosted() else "cuda"


def _rows(dtype: torch.dtype) -> None:
    logits = torch.randn(TOKENS, VOCAB, device=DEVICE, dtype=dtype, requires_grad=True)
    target = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    stats = tokfuse.token_stats(logits, target, softcap=20.0)
    (stats.logp.sum() + stats.entropy.sum()).backward()
    tokfuse.token_stats(logits, target, second_temperature=0.5, moments=True)
    tokfuse.paired_divergence(logits, logits.detach().flip(0), kind="jsd").sum().backward()


def _steps(x: torch.Tensor, cu: torch.Tensor) -> None:
    target = torch.randint(VOCAB, (TOKENS,), device=DEVICE)
    batch = {"old_logp": x - 7, "advantage": x, "ref_logp": x - 7, "cu_seqlens": cu}
    for level in ("token", "sequence"):
        clip = PPOClip(low=0.2, high=0.2)
        objective = Objective(shape=clip, level=level, kl=KL(estimator="k3", coef=0.1), entropy_coef=0.01)
        tokfuse.policy_loss(x - 7, entropy=x.abs(), objective=objective, **batch)
        for vocab in (VOCAB, 1024):  # rows that are not aligned, and rows that are
            logits = torch.randn(TOKENS, vocab, device=DEVICE, requires_grad=True)
            tokfuse.policy_step(logits=logits, target=target, objective=objective, **batch)
        hidden = torch.randn(TOKENS, HIDDEN, device=DEVICE, requires_grad=True)
        weight = torch.randn(VOCAB, HIDDEN, device=DEVICE, requires_grad=True)
        tokfuse.policy_step(hidden=hidden, weight=weight, target=target, objective=objective, **batch)
        tokfuse.linear_token_stats(hidden, weight, target).logp.sum().backward()


def _packed(x: torch.Tensor, cu: torch.Tensor) -> None:
    ids = torch.randint(0, 3, (TOKENS,), device=DEVICE)
    tokfuse.gae(x, x, cu, gamma=0.9, lam=0.9)
    tokfuse.vtrace(x, x, x, cu, gamma=0.9)
    tokfuse.whiten(x)
    tokfuse.ope(x.abs(), x)
    tokfuse.group_advantage(x, ids)
    tokfuse.offpolicy_weights(x, x.flip(0), normalize="group", group_ids=ids[:4], cu_seqlens=cu)
    tokfuse.segment_moments(x, ids, num_segments=3)
    tokfuse.segment_moments(x, cu_seqlens=cu)
    matrix = torch.randn(TOKENS, HIDDEN, device=DEVICE)
    tokfuse.influence.sketch(matrix, matrix, cu, rank=8)


def main() -> None:
    x = torch.randn(TOKENS, device=DEVICE)
    cu = torch.tensor([0, 5, 5, 20, TOKENS], dtype=torch.int32, device=DEVICE)
    calls: tuple[Callable[[], None], ...] = (
        *(lambda d=d: _rows(d) for d in (torch.float32, torch.bfloat16, torch.float16)),
        lambda: _steps(x, cu),
        lambda: _packed(x, cu),
    )
    with tokfuse.backend("cuda"):
        for call in calls:
            call()
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("cuda_smoke: done")


if __name__ == "__main__":
    main()
