"""T-PPO: PPO on generation windows: unfinished responses train the policy, not the critic."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard


@register(
    "tppo",
    system="T-PPO",
    label="recon",
    source="arXiv 2506.15050; abstract, reviews, one note",
    summary="extended GAE on truncated responses, loss on the window's tokens",
    required=("gamma", "lam"),
    differs=(
        "gamma and lam are required: no source states them; advantages are not whitened, for the "
        "same reason. Keeping partial responses and their per-token old_logp between steps, and "
        "replacing finished ones, is the rollout scheduler's."
    ),
)
@dataclass(frozen=True, kw_only=True)
class TPPO(Standard):
    """PPO clip on the tokens generated in this step, with the extended GAE of `tokfuse.gae`.

        delta_t = r_t + gamma V_t+1 - V_t,   V behind the last token: V of the last token if the
        response is unfinished, 0 if it is finished.

    The critic regresses onto the Monte-Carlo return of the sequences that finished in this step,
    over all their tokens: `critic.value_loss(..., mask=algorithm.critic_mask(batch))` with
    `critic.returns(batch, gamma=gamma)`.

    Inputs: value, finished, window; old_logp as recorded when each token was generated. State: none
    here (partial responses live in the scheduler). Source: reconstructed.
    """

    advantage: str = "gae"
    whiten: bool | None = False

    def select(self, batch: Batch, advantage: Advantage, state: State) -> torch.Tensor | None:
        """The tokens of this step's window."""
        batch.require(self._op, "window", "finished")
        base = super().select(batch, advantage, state)
        assert batch.window is not None
        return batch.window if base is None else base & batch.window

    def critic_mask(self, batch: Batch) -> torch.Tensor:
        """(tokens,) bool: the valid tokens of finished sequences. Takes the batch before `prepare`,
        which narrows the mask to the window."""
        batch.require(self._op, "finished")
        assert batch.finished is not None
        return batch.valid & batch.spread(batch.finished)
