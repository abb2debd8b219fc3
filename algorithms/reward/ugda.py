"""UGDA's refinement: trains the reward ensemble on expert scores of the selected samples."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.algorithms.stateful import draws
from tokfuse.runtime.core.checks import (
    FLOATS,
    INTS,
    check_dtype,
    check_integer,
    check_normalizer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse

OP = "algorithms.ugda_refine"


@register(
    "ugda_refine",
    kind="reward",
    system="UGDA",
    label="recon",
    source="OpenReview iamWnRpMuQ (abstract, reviews with the constants)",
    summary="expert scores become quantiles of each member's own rewards, then squared error",
    differs="Assumed: the quantiles are of a member's rewards over the logged samples, at "
    "(j - 1/2) / 5; 0.01 is the variance of the noise. `influence.ugda_select` selects the samples.",
)
@dataclass(frozen=True, kw_only=True)
class UGDARefinement:
    """target_ki = Quantile(R_k, (score_i - 1/2) / levels) + noise. Reconstructed.

    loss = sum over members k of mean over samples i of (R_ki - target_ki)^2.

    Args:
        levels: expert scores are 1 .. levels, >= 2 (the paper's experts use 5).
        noise_std: standard deviation of the noise on the targets, >= 0.
        seed: seed of the noise, >= 0.
    """

    levels: int = 5
    noise_std: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number(OP, "noise_std", self.noise_std, 0.0)
        check_integer(OP, "levels", self.levels, 2)
        check_integer(OP, "seed", self.seed, 0)

    def targets(self, logged: torch.Tensor, score: torch.Tensor, step: int = 0) -> torch.Tensor:
        """Return regression targets, (members, samples), detached. The same seed and step give the same targets.

        Args:
            logged: (members, logged samples), finite, each member's rewards during the policy's training.
            score: (samples,), int in [1, levels], expert scores of the selected samples.
            step: round of refinement, >= 0. Each round draws new noise.
        """
        if logged.dim() != 2 or logged.shape[1] == 0:
            raise refuse(OP, "logged", "(members, samples >= 1)", tuple(logged.shape), "Pass one row per member.")
        check_vector(OP, "score", score, None, INTS)
        check_integer(OP, "step", step, 0)
        check_dtype(OP, "logged", logged, FLOATS)
        check_values(OP, "logged", logged, always=True)
        check_values(OP, "score", score, 1, self.levels, always=True)
        level = (torch.arange(self.levels, dtype=torch.float64, device="cpu") + 0.5) / self.levels
        table = torch.quantile(logged.detach().double(), level.to(logged.device), dim=1)
        noise = draws(self.seed, step).normal(0, self.noise_std, (logged.shape[0], score.shape[0]))
        target = table[(score - 1).long()].t() + torch.from_numpy(noise).to(logged.device)
        return target.to(logged.dtype)

    def loss(
        self, reward: torch.Tensor, target: torch.Tensor, *, normalizer: float | torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the sum over members of the mean squared error, (), differentiable in `reward`.

        Args:
            reward: (members, samples), predicted rewards.
            target: (members, samples), from `targets`.
            normalizer: number of samples > 0 over micro-batches and ranks. None: of this call.
        """
        if reward.shape != target.shape:
            raise refuse(
                OP, "target", f"of shape {tuple(reward.shape)} to match reward", tuple(target.shape), "Use `targets`."
            )
        check_normalizer(OP, normalizer)
        count = max(1, reward.shape[1]) if normalizer is None else normalizer
        return ((reward - target.detach()) ** 2).sum() / count
