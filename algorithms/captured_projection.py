"""The random projections of `tokfuse.influence.capture`.

A projection has r rows of signs. Row k is the Kronecker product of two short rows of signs,
P_k,(i d2 + j) = a_k,i b_k,j / sqrt(r), so r 2 sqrt(d) signs are stored in place of r d.
"""

import functools
import math
import zlib
from typing import Any

import torch

from tokfuse.runtime.ops.influence import projection_dtype
from tokfuse.runtime.reference.token_stats import result_dtype

OP = "influence.capture"


class Projection:
    """A (rank, size) matrix P with E <P x, P y> = <x, y>. If size <= rank, P is the identity.

    Args:
        size: length of the vectors.
        rank: largest number of rows.
        seed: seed of the signs.
        device: device of the matrix.
        scale: (size,) float, >= 0, multiplies the columns. None: 1.
    """

    def __init__(
        self, size: int, rank: int, seed: int, device: torch.device, scale: torch.Tensor | None = None
    ) -> None:
        self.size, self.rows = size, min(rank, size)
        self.factor = torch.ones((), dtype=torch.float64, device="cpu")
        self._signs: list[torch.Tensor] = []
        if size > rank:
            generator = torch.Generator().manual_seed(seed)
            inner = math.isqrt(size - 1) + 1
            for length in (-(-size // inner), inner):
                bits = torch.randint(0, 2, (rank, length), generator=generator, dtype=torch.float32, device="cpu")
                self._signs.append((2 * bits - 1).to(device))
            self.factor *= rank**-0.5
        self.device = device
        self._scale: torch.Tensor | None = None
        if scale is not None:
            # The largest entry is 1, so that a 16-bit copy cannot overflow.
            largest = scale.double().max().clamp_min(torch.finfo(torch.float64).tiny)
            self._scale = (scale.double() / largest).to(device, result_dtype(scale.dtype))
            self.factor = self.factor * largest.cpu()

    def matrix(self, dtype: torch.dtype) -> torch.Tensor:
        """Return P / factor, (rows, size), computed from the stored signs."""
        if self._signs:
            outer, inner = self._signs if dtype == torch.float32 else (x.to(dtype) for x in self._signs)
            full = (outer.unsqueeze(2) * inner.unsqueeze(1)).view(self.rows, -1)[:, : self.size]
        else:
            full = torch.eye(self.size, dtype=dtype, device=self.device)
        return full if self._scale is None else (full * self._scale).to(dtype)

    def matrix_for(self, x: torch.Tensor) -> torch.Tensor:
        """Return `matrix` in the dtype in which `project` multiplies x by it."""
        scaled = self._scale is not None
        found = self.matrix(result_dtype(x.dtype) if scaled else projection_dtype(x))
        return found if found.device == x.device else found.to(x.device)


def seed_of(seed: int, name: str, side: str) -> int:
    """Return the seed of one projection: the same on every machine and for every order of the layers."""
    return zlib.crc32(f"{seed}/{name}/{side}".encode())


@functools.lru_cache(maxsize=1)
def distributed_types() -> tuple[Any, Any]:
    """Return (DTensor, FSDPModule), or dummies in a torch without torch.distributed."""
    try:
        from torch.distributed.fsdp import FSDPModule
        from torch.distributed.tensor import DTensor
    except ImportError:
        return (), ()
    return DTensor, FSDPModule


def is_dtensor(x: Any) -> bool:
    """Return whether a tensor is split over ranks."""
    return isinstance(x, distributed_types()[0])


def whole(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor that may be split over ranks as a whole, detached."""
    found: torch.Tensor = x.full_tensor() if is_dtensor(x) else x  # type: ignore[attr-defined]
    return found.detach()
