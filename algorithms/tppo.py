"""T-PPO: PPO on generation windows. Unfinished responses train the policy but not the critic."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.advantages import PER_TOKEN, Advantage
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard


@register(
    "tppo",
    system="T-PPO",
    label="recon",
    source="arXiv 2506.15050; abstract, reviews, one note",
    summary="extended GAE on truncated responses, with the loss on the tokens of the window",
    required=("gamma", "lam"),
    differs=(
        "gamma and lam are required, because no source states them. Advantages are not whitened, for "
        "the same reason. The rollout scheduler must keep partial responses and their old_logp per "
        "token between steps, and replace finished ones."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TPPO(Standard):
    """PPO clip on the tokens generated in this step, with the extended GAE of `tokfuse.gae`.

        delta_t = r_t + gamma V_t+1 - V_t

    After the last token, V is 0 if the response is finished; otherwise it is the V of the last token. `batch.reward`
    is paid on the last token of a finished response; an unfinished one has no outcome yet, so its reward is ignored.
    `batch.token_reward` is used as given.

    The critic regresses onto the Monte-Carlo return of the sequences that finished in this step, over all their
    tokens: `critic.value_loss(..., mask=algorithm.critic_mask(batch))` with `critic.returns(batch, gamma=gamma)`.

    Inputs: value, finished, window, and old_logp as recorded when each token was generated.
    State: none; the scheduler keeps partial responses.
    Source: reconstructed.
    """

    advantage: str = "gae"
    whiten: bool | None = False

    def rewards(self, batch: Batch) -> torch.Tensor:
        """Return the rewards of the base, 0 for a response that is not finished: it has no outcome yet."""
        reward = super().rewards(batch)
        if self.advantage not in PER_TOKEN:
            return reward
        batch.require(self._op, "finished")
        assert batch.finished is not None
        return torch.where(batch.finished, reward, 0.0)

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """Return the tokens of this step's window."""
        batch.require(self._op, "window", "finished")
        base = super().select(batch, advantage, state)
        assert batch.window is not None
        return batch.window if base is None else base & batch.window

    def critic_mask(self, batch: Batch) -> torch.Tensor:
        """Return the valid tokens of finished sequences, (tokens,) bool.

        Pass the batch before `prepare`, which reduces the mask to the window.
        """
        batch.require(self._op, "finished")
        assert batch.finished is not None
        return batch.valid & batch.spread(batch.finished)
