"""Functions for a trainer with a critic, in addition to the policy loss: returns and the clipped value loss."""

import torch

from tokfuse.algorithms.advantages import gae_and_returns
from tokfuse.algorithms.batch import Batch
from tokfuse.runtime.core.errors import refuse


def returns(batch: Batch, *, gamma: float = 1.0, lam: float = 1.0, reward_kl: float = 0.0) -> torch.Tensor:
    """Return the regression target of the critic, (tokens,): GAE + value. With lam 1: the Monte-Carlo return.

    A decoupled critic (VAPO) uses lam 1 with every lam of the policy.

    Args:
        batch: needs `value`, and `reward` or `token_reward`; with reward_kl also `ref_logp`.
        gamma: discount in [0, 1].
        lam: lambda in [0, 1].
        reward_kl: coefficient of the k1 KL that is subtracted from the token rewards.
    """
    batch.require("critic.returns", "value")
    options = {"gamma": gamma, "lam": lam, "reward_kl": reward_kl}
    return gae_and_returns(batch, batch.reward, options)[1]


def value_loss(
    value: torch.Tensor,
    old_value: torch.Tensor,
    target: torch.Tensor,
    *,
    clip: float | None = 0.2,
    mask: torch.Tensor | None = None,
    normalizer: float | torch.Tensor,
) -> torch.Tensor:
    """Return 0.5 sum max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / normalizer over the masked tokens, ().

    Args:
        value: (tokens,), float. Value of the current critic; receives the gradient.
        old_value: (tokens,), float. Value at the start of the update.
        target: (tokens,), float. Regression target R, e.g. from `returns`.
        clip: width of the clip. None: the plain squared error.
        mask: (tokens,), bool. True where a token counts; for T-PPO `TPPO.critic_mask`. None: all tokens count.
        normalizer: number of tokens over all micro-batches and ranks.

    Source: PPO (arXiv 1707.06347) as in verl. Exact.
    """
    if clip is not None and not clip >= 0.0:
        raise refuse("critic.value_loss", "clip", ">= 0 or None", clip, "PPO uses 0.2.")
    target, old = target.detach(), old_value.detach()
    square = (value - target) ** 2
    if clip is not None:
        bounded = torch.minimum(torch.maximum(value, old - clip), old + clip)
        square = torch.maximum(square, (bounded - target) ** 2)
    if mask is not None:
        square = torch.where(mask, square, 0.0)
    return 0.5 * square.sum() / normalizer
