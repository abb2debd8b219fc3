"""Project and sketch for `influence.sketch` on CUDA and Triton."""

from collections.abc import Callable

import torch


def device_sketch(launch: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Return `influence.sketch` of a backend. torch projects by GEMMs. The host reads no sequence length.

    launch: (left (tokens, rank), right (tokens, rank), cu_seqlens) -> (seqs, rank, rank).
    """

    def run(
        grad_hidden: torch.Tensor,
        hidden: torch.Tensor,
        cu_seqlens: torch.Tensor,
        pair: tuple[torch.Tensor, torch.Tensor] | None,
        max_seqlen: int | None,
    ) -> torch.Tensor:
        left, right = grad_hidden.float(), hidden.float()
        if pair is not None:
            left, right = left @ pair[0].t(), right @ pair[1].t()
        return launch(left, right, cu_seqlens)

    return run
