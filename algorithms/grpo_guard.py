"""GRPO-Guard: the normalised ratio of flow-matching policies, for Gaussian latents instead of tokens."""

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
    source="arXiv 2510.22319; copy of the official code in zhmtike/flow_grpo",
    summary="log-ratio without its mean and its step-dependent variance, gradients divided by dt",
    differs=(
        "The released code averages the ratio's bias over the whole batch, because its dim tuple is "
        "empty. Here it is averaged per sample, as in the paper. Plain torch: there are no logits to fuse."
    ),
)
@dataclass(frozen=True, kw_only=True)
class GRPOGuard:
    """loss = mean over samples of max(-A r, -A clip(r, 1 +- clip)) / dt.

    log r = mean_d(z_d Delta_d), with z = (x - mu_old) / s, Delta = mu - mu_old and s = sigma sqrt(dt), so
    d log r / d mu_d = z_d / D. It equals s (logp - old_logp + mean Delta^2 / (2 s^2)), where logp is the mean
    Gaussian log-density.

    Args:
        clip: width of the clip; the paper uses 2e-6 (OCR) and 4e-6 (PickScore).
        advantage_max: advantages are clamped to +-advantage_max. 5 is adv_clip_max of flow_grpo's config/base.py;
            the paper gives no value.
        beta: coefficient of the KL term, mean (mu - mu_ref)^2 / (2 sigma^2).

    Inputs: latents and means of one denoising step.
    State: none.
    Source: released code, exact.
    """

    clip: float = 2e-6
    advantage_max: float = 5.0
    beta: float = 0.0

    def __post_init__(self) -> None:
        check_number(OP, "clip", self.clip, 0.0)
        check_number(OP, "advantage_max", self.advantage_max, 0.0, open_low=True)
        check_number(OP, "beta", self.beta, 0.0)

    def log_ratio(
        self, latent: torch.Tensor, mean: torch.Tensor, old_mean: torch.Tensor, std: torch.Tensor
    ) -> torch.Tensor:
        """Return log r, (samples,); differentiable in mean.

        Args:
            latent: (samples, ...), the sampled x.
            mean: like latent, mu of the current policy.
            old_mean: like latent, mu of the policy that sampled x.
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
        """Return the loss of one denoising step, ().

        Args:
            latent: (samples, ...), the sampled x.
            mean: like latent, mu of the current policy; receives the gradient.
            old_mean: like latent, mu of the policy that sampled x.
            sigma: (samples,) or 0-dim, > 0, noise scale of the step.
            dt: (samples,) or 0-dim, > 0, size of the step.
            advantage: (samples,), one per image.
            ref_mean: like latent, mu of the reference policy. Needed if beta > 0, and only then.
        """
        if (ref_mean is None) != (self.beta == 0.0):
            want = "None with beta = 0" if self.beta == 0.0 else f"given with beta = {self.beta}"
            given = "None" if ref_mean is None else "a tensor"
            raise refuse(OP, "ref_mean", want, given, "Only the KL term uses it.")
        ratio = self.log_ratio(latent, mean, old_mean, sigma * dt.sqrt()).exp()
        a = advantage.detach().clamp(-self.advantage_max, self.advantage_max)
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        loss = (torch.maximum(-a * ratio, -a * clipped) / dt).mean()
        if ref_mean is not None:
            gap = (mean - ref_mean.detach()).flatten(1) ** 2
            loss = loss + self.beta * (gap / (2 * sigma.reshape(-1, 1) ** 2)).mean()
        return loss
