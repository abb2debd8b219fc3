"""Reference of `tokfuse.ope`: off-policy value estimators in plain torch."""

import torch

Estimate = tuple[torch.Tensor, torch.Tensor]


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
) -> dict[str, Estimate | None]:
    """Return name -> (estimate, standard error), computed in float64, in the dtype of `reward`."""
    dtype = reward.dtype
    keep = torch.ones_like(reward, dtype=torch.bool) if mask is None else mask
    count = keep.sum().double()

    def valid(x: torch.Tensor) -> torch.Tensor:
        return torch.where(keep, x.double(), torch.zeros((), dtype=torch.float64, device=x.device))

    def mean(x: torch.Tensor) -> torch.Tensor:
        return x.sum() / count

    def estimate(value: torch.Tensor, influence: torch.Tensor) -> Estimate:
        # `influence` is the first-order contribution of each row. Its mean is subtracted here.
        centred = valid(influence - mean(valid(influence)))
        error = (centred.square().sum() / (count - 1) / count).sqrt()
        return value.to(dtype), error.to(dtype)

    w, r = valid(weight), valid(reward)
    mean_w = mean(w)
    ips, snips = mean(w * r), (w * r).sum() / w.sum()
    out: dict[str, Estimate | None] = {
        "ips": estimate(ips, w * r),
        "snips": estimate(snips, w * (r - snips) / mean_w),
        "dm": None,
        "dr": None,
        "sndr": None,
    }
    if q_pi is not None:
        direct = valid(q_pi)
        out["dm"] = estimate(mean(direct), direct)
        if q_a is not None:
            residual = w * (r - valid(q_a))
            correction = residual.sum() / w.sum()
            out["dr"] = estimate(mean(direct + residual), direct + residual)
            out["sndr"] = estimate(mean(direct) + correction, direct + (residual - correction * w) / mean_w)
    return out
