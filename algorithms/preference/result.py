"""What `preference_step` returns."""

from dataclasses import dataclass

import torch

from tokfuse.algorithms.preference.batch import PreferenceBatch
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.policy.results import Gradients


@dataclass(frozen=True)
class PreferenceStep:
    """What `preference_step` returns; all but `loss` is detached."""

    loss: torch.Tensor
    """(), sum of `losses` / normalizer; `loss.backward()` hands out the gradients."""
    losses: torch.Tensor
    """(pairs,) or (seqs,) float64, weights included; of AOT by rank, not by pair."""
    rewards: tuple[torch.Tensor, ...]
    """Implicit rewards, float64: (chosen (pairs,), rejected (pairs,)), or of an unpaired batch
    (all (seqs,),)."""
    stats: TokenStats
    """(tokens,) statistics of the policy; 0 for tokens that do not count."""
    batch: PreferenceBatch
    read_twice: int
    """Rows whose logits were computed a second time: those of pairs larger than the workspace."""
    gradients: Gradients
    """From hidden, before `loss.backward()`: "hidden", "weight", "bias", None where not asked."""

    @property
    def metrics(self) -> dict[str, torch.Tensor]:
        """0-dim float64 sums over pairs, and their "count": add them over micro-batches and ranks.

        "margin": chosen minus rejected reward; "accuracy": pairs with a positive margin. Unpaired:
        "desirable" and "undesirable" rewards and "desirable_count" instead.
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
