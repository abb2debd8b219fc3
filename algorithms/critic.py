"""What a trainer with a critic needs beside the policy loss: returns and the clipped value loss."""

import torch

from tokfuse.algorithms.advantages import gae_and_returns
from tokfuse.algorithms.batch import Batch
from tokfuse.runtime.core.errors import refuse


def returns(batch: Batch, *, gamma: float = 1.0, lam: float = 1.0, reward_kl: float = 0.0) -> torch.Tensor:
    """(tokens,) regression target of the critic: GAE + value. lam 1: the Monte-Carlo return.

    A decoupled critic (VAPO) has lam 1 whatever the policy's; the policy's own is the default of
    the method. Inputs: value, (token_)reward, ref_logp with reward_kl.
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
    """0.5 sum max((V - R)^2, (clip(V, V_old +- clip) - R)^2) / normalizer over the masked tokens.

    Args:
        value: (tokens,), float, of the current critic; receives the gradient.
        old_value: (tokens,), float, at the start of the update.
        target: (tokens,), float, e.g. `returns`.
        clip: None: the plain squared error.
        mask: (tokens,), bool. T-PPO: `TPPO.critic_mask`. None: all.
        normalizer: the global number of tokens.

    Source: PPO (arXiv 1707.06347) as in verl. Exact.
    """
    if clip is not None and not clip >= 0.0:
        raise refuse("critic.value_loss", "clip", ">= 0 or None", clip, "0.2 is PPO's.")
    target, old = target.detach(), old_value.detach()
    square = (value - target) ** 2
    if clip is not None:
        bounded = torch.minimum(torch.maximum(value, old - clip), old + clip)
        square = torch.maximum(square, (bounded - target) ** 2)
    if mask is not None:
        square = torch.where(mask, square, 0.0)
    return 0.5 * square.sum() / normalizer
