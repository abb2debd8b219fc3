"""PIPO: repeats or reverses the previous update, depending on the improvement that it caused."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import PER_TOKEN
from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.shapes import PPOClip
from tokfuse.runtime.reference.segments import groups_of, segment_sum


@register(
    "pipo",
    system="PIPO",
    label="exact",
    source="arXiv 2604.00860; github.com/JacckMa/pipo_verl",
    summary="a second step on the previous batch, scaled by the measured improvement",
    differs=(
        "form='paper' (default): PPO's minimum of products, sample deviation. form='code': minimum of "
        "ratios (the optimistic side for C < 0), population deviation, improvement clipped to +-5 and "
        "C to +-10. worsening=0 skips the step if the batch became worse, as in the code. The released "
        "loop for PPO with a critic, which scales token advantages, is not implemented."
    ),
)
@dataclass(frozen=True, kw_only=True)
class PIPO(Standard):
    """Any clipped method of `Standard`, with one more step on the previous batch, which `before` returns.

        xi = (mean R - mean of the last K batch means) / their deviation (1 if it is below 1e-8)
        phi = xi if xi >= 0 else worsening xi
        a_i = G Abar_i / (sum over the group of |Abar| + 1e-6),   C_i = a_i phi
        loss = PPO clip of exp(logp - old_logp of the previous batch) with advantage C

    G is the group size and Abar_i the mean advantage of response i.

    Args:
        history: K, number of batch means to compare with.
        min_steps: number of batches before the first such step.
        worsening: factor if xi < 0, the paper's lambda.
        form: "paper" or "code".

    A plan with source "previous" trains on the last batch that `advance` saw, so the trainer must keep its tokens.

    Inputs: group_ids.
    State: the previous batch, the last K means, the number of batches.
    Source: released code and paper, exact.
    """

    history: int = 8
    min_steps: int = 8
    worsening: float = 0.1
    form: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "form", self.form, ("paper", "code"))
        check_number(self._op, "history", self.history, 2)
        check_number(self._op, "min_steps", self.min_steps, 2)
        check_number(self._op, "worsening", self.worsening, 0.0)
        if self.advantage in PER_TOKEN:
            raise refuse(
                self._op,
                "advantage",
                "an estimator with one number per response (C is one number per response)",
                repr(self.advantage),
                "The authors' loop for PPO with a critic is another one, which is not implemented.",
            )
        if not isinstance(self.shape, PPOClip):
            raise refuse(self._op, "shape", "a PPOClip (the second step clips with it)", self.shape, "Set its widths.")

    def initial_state(self) -> State:
        """Return the base state, no previous batch and no means."""
        return super().initial_state() | {"means": [], "batches": 0, "previous": None}

    def improvement(self, batch: Batch, state: State) -> float:
        """Return phi(xi) of the new batch. While there is too little history: 0."""
        if state["batches"] < self.min_steps:
            return 0.0
        means = torch.tensor(state["means"], dtype=torch.float64)
        std = float(means.std(correction=1 if self.form == "paper" else 0))
        gain = _mean_reward(batch) - float(means.mean())
        if self.form == "code":
            gain = min(max(gain, -5.0), 5.0)
        xi = gain / (std if std >= 1e-8 else 1.0)
        return xi if xi >= 0 else self.worsening * xi

    def before(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the step on the previous batch. Return nothing if it would have no effect."""
        phi = self.improvement(batch, state)
        if phi == 0.0 or state["previous"] is None:
            return ()
        previous = Batch.from_state(state["previous"], batch.world)
        coefficient = phi * _share(self._op, previous)
        shape = self.shape
        if self.form == "code":
            coefficient = coefficient.clamp(-10.0, 10.0)
            assert isinstance(shape, PPOClip)
            high = shape.bounds[1]
            # min(r, clip(r)) C = min(r, high) C for both signs of C: there is no lower bound, and for negative C
            # the dual clip is at the same place.
            shape = PPOClip(low=1.0, high=None, ratio_max=high, dual=high)
        coefficient = coefficient.to(previous.old_logp.dtype)
        previous = replace(previous, advantage=coefficient, advantage_level="sequence")
        plan = super().objective(previous, state)
        spec = replace(plan.objective, shape=shape)
        return (replace(plan, objective=spec, source="previous"),)

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state with this batch and its mean reward."""
        means = [*state["means"], _mean_reward(batch)][-self.history :]
        return super().advance(state, batch) | {
            "means": means,
            "batches": state["batches"] + 1,
            "previous": batch.to_state(),
        }


def _mean_reward(batch: Batch) -> float:
    reward = batch.reward.double()
    sums = torch.stack([reward.sum(), torch.ones_like(reward).sum()])
    total, count = batch.world.sum(sums).tolist()
    return float(total / max(count, 1.0))


def _share(op: str, batch: Batch) -> torch.Tensor:
    """Return a_i, (seqs,) float64."""
    batch.require(op, "group_ids", "advantage")
    assert batch.group_ids is not None and batch.advantage is not None
    mean = batch.advantage.double()
    if batch.advantage_level == "token":
        mean = batch.sequence_mean(mean)
    groups = groups_of(batch.group_ids)
    total = segment_sum(mean.abs(), groups.member, batch.num_seqs)[groups.member]
    return groups.size * mean / (total + 1e-6)
