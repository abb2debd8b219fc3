"""Reference of `tokfuse.whiten`: masked whitening in plain torch."""

import torch


def whiten(
    x: torch.Tensor,
    *,
    mask: torch.Tensor | None,
    shift_mean: bool,
    eps: float,
    mean: torch.Tensor | None,
    var: torch.Tensor | None,
) -> torch.Tensor:
    """Return (x - mean) / sqrt(var + eps) where mask is True, else 0. The statistics are float64."""
    keep = torch.ones_like(x, dtype=torch.bool) if mask is None else mask
    zero = torch.zeros((), dtype=torch.float64, device=x.device)
    y = torch.where(keep, x.double(), zero)
    if mean is None or var is None:
        mean, centred, var = _moments(y, keep)
    else:
        mean, var = mean.double(), var.double()
        centred = y - mean
    spread = var + eps
    out = centred * torch.where(spread == 0, torch.zeros_like(spread), torch.rsqrt(spread))
    if not shift_mean:
        out = out + mean
    return torch.where(keep, out, zero).to(x.dtype)


def _moments(y: torch.Tensor, keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the masked mean, centred values and unbiased variance. Equal values give exactly 0 for the last two."""
    zero = torch.zeros((), dtype=y.dtype, device=y.device)
    count = keep.sum()
    if y.shape[0] == 0:
        return zero, y, zero
    first = y.take(keep.to(torch.uint8).argmax())
    equal = torch.where(keep, y == first, True).all()
    mean = torch.where(equal, first, y.sum() / count.clamp_min(1))
    centred = torch.where(keep, y - mean, zero)
    return mean, centred, (centred**2).sum() / (count - 1).clamp_min(1)
