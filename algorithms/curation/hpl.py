"""HPL's data preparation: splitting trajectories into action groups, and the curriculum over two axes."""

import math
from dataclasses import dataclass

import torch

from tokfuse.algorithms.registry import register
from tokfuse.runtime.core.checks import (
    FLOATS,
    INTS,
    Rows,
    check_dtype,
    check_integer,
    check_number,
    check_values,
    check_vector,
)
from tokfuse.runtime.core.errors import refuse


@register(
    "hpl_curriculum",
    kind="selection",
    system="HPL",
    label="exact (released code)",
    source="arXiv 2510.03253; a public copy of the code (SandRiverDDL/HPL, pipeline/group)",
    summary="group pairs by length and reward gap; three phases from short and easy to all",
    differs="The code that was read has the authors' README but is not in their GitHub account.",
)
@dataclass(frozen=True, kw_only=True)
class HPLCurriculum:
    """A curriculum over lengths L1 <= 3 < L2 <= 6 < L3 and gaps D1 >= 0.7 > D2 >= 0.4 > D3, from easy to hard.

    Phase 1: L1 D1. Phase 2: also L1 D2 and L2 D1. Phase 3: all. Only the group pairs follow the schedule.

    Args:
        lengths: largest length of L1 and of L2, integers with 1 <= L1 < L2.
        gaps: smallest gap of D1 and of D2, with D1 > D2 >= 0.
        min_gap: the expert's estimated return must exceed the agent's by more than this.
        min_return: the expert's estimated return must be at least this.

    A gap, reward or return that is not finite raises ValueError: NaN is neither easy nor hard.

    State: none; the trainer keeps the phase.
    Source: released code, exact.
    """

    lengths: tuple[int, int] = (3, 6)
    gaps: tuple[float, float] = (0.7, 0.4)
    min_gap: float = 0.3
    min_return: float = 0.8

    def __post_init__(self) -> None:
        op = "algorithms.hpl_curriculum"
        check_integer(op, "lengths[0]", self.lengths[0], 1)
        check_integer(op, "lengths[1]", self.lengths[1], self.lengths[0] + 1)
        check_number(op, "gaps[1]", self.gaps[1], 0.0)
        check_number(op, "gaps[0]", self.gaps[0], self.gaps[1], open_low=True)
        check_number(op, "min_gap", self.min_gap, -math.inf)
        check_number(op, "min_return", self.min_return, -math.inf)

    def buckets(self, length: torch.Tensor, gap: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (L, D) of every pair, (pairs,) int64 in {1, 2, 3} each. L = 1 is short and D = 1 is easy.

        Args:
            length: (pairs,), int >= 0, number of actions of the group.
            gap: (pairs,), finite, return of the chosen group minus the return of the rejected one.
        """
        op = "algorithms.hpl_curriculum"
        check_vector(op, "gap", gap)
        check_vector(op, "length", length, Rows(gap.shape[0], "gap", gap.device), INTS)
        check_values(op, "length", length, 0, always=True)
        check_values(op, "gap", gap, always=True)
        long = torch.stack([length > border for border in self.lengths]).sum(0)
        hard = torch.stack([gap < border for border in self.gaps]).sum(0)
        return 1 + long, 1 + hard

    def in_phase(self, phase: int, length: torch.Tensor, gap: torch.Tensor) -> torch.Tensor:
        """Return the pairs of phase 1, 2 or 3, (pairs,) bool."""
        check_integer("algorithms.hpl_curriculum", "phase", phase, 1, 3)
        long, hard = self.buckets(length, gap)
        # L + D is 2 for L1 D1, and 3 for L1 D2 and L2 D1.
        return torch.ones_like(long, dtype=torch.bool) if phase == 3 else long + hard <= phase + 1

    def keep(
        self,
        expert_reward: torch.Tensor,
        agent_reward: torch.Tensor,
        expert_return: torch.Tensor,
        agent_return: torch.Tensor,
    ) -> torch.Tensor:
        """Return the pairs to use, (pairs,) bool. Pairs that the agent wins are not used.

        The expert's reward must be at least the agent's. The expert's estimated return must be at least min_return and
        exceed the agent's by more than min_gap. All are (pairs,) and finite.
        """
        op = "algorithms.hpl_curriculum"
        check_vector(op, "expert_reward", expert_reward)
        rows = Rows(expert_reward.shape[0], "expert_reward", expert_reward.device)
        for name, value in (
            ("expert_reward", expert_reward),
            ("agent_reward", agent_reward),
            ("expert_return", expert_return),
            ("agent_return", agent_return),
        ):
            check_values(op, name, check_vector(op, name, value, rows), always=True)
        apart = expert_return > agent_return + self.min_gap
        return (expert_reward >= agent_reward) & apart & (expert_return >= self.min_return)


def group_return(final_reward: torch.Tensor) -> torch.Tensor:
    """Return the mean over the last axis: M final rewards of rollouts that continue each group (M = 5).

    The rewards must be finite, and M at least 1.
    """
    if final_reward.dim() == 0 or final_reward.shape[-1] == 0:
        raise refuse(
            "group_return", "final_reward", "of at least one rollout", tuple(final_reward.shape), "Roll out each group."
        )
    check_dtype("group_return", "final_reward", final_reward, FLOATS)
    check_values("group_return", "final_reward", final_reward, always=True)
    return final_reward.double().mean(-1)


def segment_fixed_size(actions: int, size: int = 3) -> torch.Tensor:
    """Return the offsets of groups of `size` actions, (groups + 1,) int32. The last group may be shorter."""
    check_integer("segment_fixed_size", "actions", actions, 0)
    check_integer("segment_fixed_size", "size", size, 1)
    return torch.tensor([*range(0, actions, size), actions], dtype=torch.int32, device="cpu")


def segment_fixed_count(actions: int, count: int = 3) -> torch.Tensor:
    """Return the offsets of at most `count` groups of ceil(actions / count) actions, (groups + 1,) int32."""
    check_integer("segment_fixed_count", "actions", actions, 0)
    check_integer("segment_fixed_count", "count", count, 1)
    return segment_fixed_size(actions, max(1, -(-actions // count)))


def segment_uncertain(
    entropy: torch.Tensor, *, quantile: float | None = 0.8, threshold: float | None = None
) -> torch.Tensor:
    """Return the offsets of groups that end after each action with high policy entropy, (groups + 1,) int32.

    Pass either quantile or threshold; the other must be None.

    Args:
        entropy: (actions,), finite, nats, mean over each action's tokens.
        quantile: in [0, 1]; split after actions whose entropy exceeds this quantile of the trajectory (paper).
        threshold: split after actions whose entropy exceeds this finite constant (released code: 1.2 or 0.1).
    """
    op = "segment_uncertain"
    check_vector(op, "entropy", entropy)
    if (quantile is None) == (threshold is None):
        raise refuse(
            op,
            "quantile or threshold",
            "given, one of them",
            "none" if quantile is None else "both",
            "Set the other to None.",
        )
    n = entropy.shape[0]
    if quantile is not None:
        check_number(op, "quantile", quantile, 0.0, 1.0)
    if threshold is not None:
        check_number(op, "threshold", threshold, -math.inf)
    check_values(op, "entropy", entropy, always=True)
    if n == 0:
        return torch.zeros(1, dtype=torch.int32, device="cpu")
    if quantile is not None:
        threshold = float(torch.quantile(entropy.double(), quantile))
    assert threshold is not None
    ends = (entropy.double() > threshold).nonzero().flatten().tolist()
    borders = [0, *(end + 1 for end in ends if end + 1 < n), n]
    return torch.tensor(borders, dtype=torch.int32, device="cpu")
