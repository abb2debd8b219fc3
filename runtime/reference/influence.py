"""Reference of the influence ops: gradients and sketches by their definitions, in plain torch and float64."""

import torch

from tokfuse.runtime.reference import token_stats as reference


def logit_gradients(
    logits: torch.Tensor,
    target: torch.Tensor,
    coefficient: torch.Tensor,
    entropy_coefficient: torch.Tensor | None = None,
    temperature: float | torch.Tensor = 1.0,
    logit_scale: float = 1.0,
) -> torch.Tensor:
    """Return d sum(coefficient * logp + entropy_coefficient * entropy) / d logits, (tokens, vocab)."""
    with torch.enable_grad():
        z = logits.detach().requires_grad_()
        stats = reference.forward(z, target, temperature=temperature, logit_scale=logit_scale)
        total = (stats[0] * coefficient).sum()
        if entropy_coefficient is not None:
            total = total + (stats[1] * entropy_coefficient).sum()
        (grad,) = torch.autograd.grad(total, z)
    return grad


def sketch(
    grad_hidden: torch.Tensor,
    hidden: torch.Tensor,
    cu_seqlens: torch.Tensor,
    projections: tuple[torch.Tensor, torch.Tensor] | None,
    max_seqlen: int | None,
) -> torch.Tensor:
    """Return, per sequence, the sum over its tokens of (P_out dX_t)(P_in h_t)^T: (seqs, rank, rank).

    Every sequence is padded with zeros to max_seqlen, so that one batched GEMM computes all of them.
    """
    dtype = reference.result_dtype(hidden.dtype)
    pair = [grad_hidden.double(), hidden.double()]
    if projections is not None:
        pair = [x @ p.double().t() for x, p in zip(pair, projections, strict=True)]
    if hidden.shape[0] == 0:
        rank = pair[0].shape[1]
        return torch.zeros(cu_seqlens.shape[0] - 1, rank, rank, dtype=dtype, device=hidden.device)
    if max_seqlen is None:
        max_seqlen = int(cu_seqlens.diff().max()) if cu_seqlens.shape[0] > 1 else 0
    offsets = cu_seqlens.to(torch.int64)
    place = offsets[:-1].unsqueeze(1) + torch.arange(max_seqlen, device=hidden.device)
    inside = (place < offsets[1:].unsqueeze(1)).unsqueeze(-1)
    place = place.clamp(max=hidden.shape[0] - 1)
    out, inner = (torch.where(inside, x[place], 0.0) for x in pair)
    return (out.transpose(1, 2) @ inner).to(dtype)
