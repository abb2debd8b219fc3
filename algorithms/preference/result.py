"""The result of `preference_step`."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.preference.batch import PreferenceBatch
from tokfuse.runtime.core.forward_gradients import Gradients
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.results import Influence


@dataclass(frozen=True)
class PreferenceStep:
    """Result of `preference_step`. All fields except `loss` are detached."""

    loss: torch.Tensor
    """(), sum of `losses` / normalizer. `loss.backward()` returns the gradients computed in the forward pass."""
    losses: torch.Tensor
    """(pairs,) or (seqs,) float64, weights included. AOT: one loss per rank of the sorted batch, not per pair."""
    rewards: tuple[torch.Tensor, ...]
    """Implicit rewards, float64: (chosen (pairs,), rejected (pairs,)). For an unpaired batch: (all (seqs,),)."""
    stats: TokenStats
    """(tokens,) statistics of the policy; 0 for tokens that do not count."""
    batch: PreferenceBatch
    read_twice: int
    """Number of rows whose logits were computed twice, because their pair is larger than the workspace."""
    gradients: Gradients
    """Gradients before `loss.backward()`, only from hidden: "hidden", "weight", "bias". None if not required."""
    influence: Influence | None = None
    """Gradient norms and one sketch per sequence, if `influence=InfluenceSpec(...)` was passed, else None."""

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """0-dim float64 sums over pairs, and their "count". Add them over micro-batches and ranks.

        "margin" is the chosen minus the rejected reward; "accuracy" counts pairs with a positive margin. An unpaired
        batch has the rewards "desirable" and "undesirable", and "desirable_count", instead.
        """
        count = torch.tensor(self.losses.shape[0], dtype=torch.float64, device=self.losses.device)
        out = {"count": count, "loss": self.losses.sum()}
        if len(self.rewards) == 2:
            chosen, rejected = self.rewards
            margin = chosen - rejected
            return out | {
                "chosen": chosen.sum(),
                "rejected": rejected.sum(),
                "margin": margin.sum(),
                "accuracy": (margin > 0).double().sum(),
            }
        assert self.batch.desirable is not None
        good, (reward,) = self.batch.desirable, self.rewards
        return out | {
            "desirable": reward[good].sum(),
            "undesirable": reward[~good].sum(),
            "desirable_count": good.double().sum(),
        }
