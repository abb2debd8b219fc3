"""GRPO-Guard: the normalised ratio of flow-matching policies, for Gaussian latents instead of tokens."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.grpo_guard"


@register(
    "grpo_guard",
    system="GRPO-Guard",
    label="exact (paper, released code)",
    source="arXiv 2510.22319; copy of the official code in zhmtike/flow_grpo",
    summary="log-ratio without its mean and its step-dependent variance, gradients divided by dt",
    differs=(
        "form='paper' (default): the bias of the ratio is averaged per sample. form='code': over the whole batch, "
        "because the dim tuple of the released code is empty, with the means of sigma and sqrt(dt) over the batch. "
        "Plain torch: there are no logits to fuse."
    ),
)
@dataclass(frozen=True, kw_only=True)
class GRPOGuard:
    """loss = mean over samples of max(-A r, -A clip(r, 1 +- clip)) / dt.

    log r = mean_d(z_d Delta_d), with z = (x - mu_old) / s, Delta = mu - mu_old and s = sigma sqrt(dt), so
    d log r / d mu_d = z_d / D. It equals s (logp - old_logp + mean Delta^2 / (2 s^2)), where logp is the mean
    Gaussian log-density. form "code" is log r = s (logp - old_logp + B / (2 s^2)), with s and B = mean Delta^2 averaged
    over the whole batch.

    Args:
        clip: width of the clip; the paper uses 2e-6 (OCR) and 4e-6 (PickScore).
        advantage_max: advantages are clamped to +-advantage_max. 5 is adv_clip_max of flow_grpo's config/base.py;
            the paper gives no value.
        beta: coefficient of the KL term, mean (mu - mu_ref)^2 / (2 sigma^2).
        form: "paper" or "code".

    Inputs: latents and means of one denoising step.
    State: none.
    Source: released code, exact.
    """

    clip: float = 2e-6
    advantage_max: float = 5.0
    beta: float = 0.0
    form: str = "paper"

    def __post_init__(self) -> None:
        check_choice(OP, "form", self.form, ("paper", "code"))
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
            std: (samples,) or 0-dim, s = sigma sqrt(dt). With form "code", the s of the bias is its mean; `loss` uses
                mean sigma * mean sqrt(dt), as the code does.
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
        noise, delta, s = (x - old).detach(), mu - old.detach(), std.reshape(-1, 1)
        if self.form == "paper":
            return (noise / s * delta).mean(1)
        return self._released(noise, delta, s, s.mean())

    def _released(
        self, noise: torch.Tensor, delta: torch.Tensor, s: torch.Tensor, s_mean: torch.Tensor
    ) -> torch.Tensor:
        """Return log r of the released code: the bias B is averaged over samples and dimensions."""
        gain = ((2 * noise - delta) * delta / (2 * s**2)).mean(1)  # logp - old_logp
        return s_mean * gain + (delta**2).mean() / (2 * s_mean)

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
        if self.form == "paper":
            log_ratio, step = self.log_ratio(latent, mean, old_mean, sigma * dt.sqrt()), dt
        else:
            self.log_ratio(latent, mean, old_mean, sigma * dt.sqrt())  # checks the shapes
            x, mu, old = (t.flatten(1) for t in (latent, mean, old_mean))
            s = (sigma * dt.sqrt()).reshape(-1, 1)
            s_mean, step = sigma.mean() * dt.sqrt().mean(), dt.sqrt().mean() ** 2
            log_ratio = self._released((x - old).detach(), mu - old.detach(), s, s_mean)
        ratio = log_ratio.exp()
        a = advantage.detach().clamp(-self.advantage_max, self.advantage_max)
        clipped = ratio.clamp(1.0 - self.clip, 1.0 + self.clip)
        loss = (torch.maximum(-a * ratio, -a * clipped) / step).mean()
        if ref_mean is not None:
            gap = (mean - ref_mean.detach()).flatten(1) ** 2
            loss = loss + self.beta * (gap / (2 * sigma.reshape(-1, 1) ** 2)).mean()
        return loss
