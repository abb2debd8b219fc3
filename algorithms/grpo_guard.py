"""GRPO-Guard: the normalised ratio of flow-matching policies: Gaussian latents, not tokens."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_number
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.grpo_guard"


@register(
    "grpo_guard",
    system="GRPO-Guard",
    label="exact",
    required=("advantage_max",),
    source="arXiv 2510.22319; copy of the official code in zhmtike/flow_grpo",
    summary="log-ratio without its mean and step-dependent variance, gradients over 1 / dt",
    differs=(
        "The released code averages the ratio's bias over the whole batch by an empty dim tuple; "
        "here, as the paper means it, per sample. Plain torch: there is no vocabulary to fuse over."
    ),
)
@dataclass(frozen=True, kw_only=True)
class GRPOGuard:
    """loss = mean over samples of max(-A r, -A clip(r, 1 +- clip)) / dt.

    log r = mean_d(z_d Delta_d) with z = (x - mu_old) / s, Delta = mu - mu_old, s = sigma sqrt(dt);
    d log r / d mu_d = z_d / D. Equal to s (logp - old_logp + mean Delta^2 / (2 s^2)) with logp the
    mean Gaussian log-density.

    Args:
        clip: width; 2e-6 (OCR) or 4e-6 (PickScore) in the paper.
        advantage_max: advantages are clamped to +-advantage_max; the paper gives no value.
        beta: coefficient of mean (mu - mu_ref)^2 / (2 sigma^2).

    Inputs: latents and means of one denoising step. State: none. Source: released code, exact.
    """

    clip: float = 2e-6
    advantage_max: float
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_number(OP, "clip", self.clip, 0.0)
        check_number(OP, "advantage_max", self.advantage_max, 0.0, open_low=True)
        check_number(OP, "beta", self.beta, 0.0)

    def log_ratio(
        self, latent: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """(samples,) log r; differentiable in mean.

        Args:
            latent: (samples, ...), the sampled x. mean, old_mean: the same shape.
            std: (samples,) or 0-dim, s = sigma sqrt(dt).
        """
        for name, x in (("mean", mean), ("old_mean", old_mean)):
            if x.shape != latent.shape:
                raise refuse(
                    OP,
                    name,
                    f"of shape {tuple(latent.shape)} like latent",
                    f"{tuple(x.shape)}",
                    "Pass one mean per latent.",
                )
        x, mu, old = (t.flatten(1) for t in (latent, mean, old_mean))
        s = std.reshape(-1, 1)
        return ((x - old).detach() / s * (mu - old.detach())).mean(1)

    def loss(
        self,
        latent: torch.Tensor,
        mean: torch.Tensor,
        old_mean: torch.Tensor,
        sigma: torch.Tensor,
        dt: torch.Tensor,
        advantage: torch.Tensor,
        ref_mean: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """() loss of one denoising step.

        Args:
            latent, mean, old_mean, ref_mean: (samples, ...).
            sigma, dt: (samples,) or 0-dim, > 0; of the step.
            advantage: (samples,), per image.
        """
        if (ref_mean is None) != (self.beta == 0.0):
            want = "None with beta = 0" if self.beta == 0.0 else f"given with beta = {self.beta}"
            given = "None" if ref_mean is None else "a tensor"
            raise refuse(OP, "ref_mean", want, given, "It belongs to the KL term.")
        ratio = self.log_ratio(latent, mean, old_mean, sigma * dt.sqrt()).exp()
        a = advantage.detach().clamp(-self.advantage_max, self.advantage_max)
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        loss = (torch.maximum(-a * ratio, -a * clipped) / dt).mean()
        if ref_mean is not None:
            gap = (mean - ref_mean.detach()).flatten(1) ** 2
            loss = loss + self.beta * (gap / (2 * sigma.reshape(-1, 1) ** 2)).mean()
        return loss
