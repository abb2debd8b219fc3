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
    label="exact (paper, released code)",
    source="arXiv 2604.00860; github.com/JacckMa/pipo_verl",
    summary="a second step on the previous batch, scaled by the measured improvement",
    differs=(
        "form='paper' (default): PPO's minimum of products, sample deviation, one step on the whole previous batch. "
        "form='code' is the released loop: the history holds every batch mean twice and the new one before it is "
        "read, so the first repetition is in step 5 with the default history; population deviation; C clipped to "
        "+-10 before `worsening` scales it; minimum of ratios (the optimistic side for C < 0) in minibatches. The "
        "code reads worsening from `loss_scale_neg`, whose default 0 skips the repetition after a worse batch."
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

    Form "code", with mu the mean reward of the new batch: h are the last K of the means (mu_1, mu_1, mu_2, mu_2, ...,
    mu); mu itself counts once. xi = clip(mu - mean h, +-5) / deviation of h. C = clip(a xi, +-10), times `worsening`
    if mu < mean h. The clip of the ratio is

        gae             PPO's, and this batch's advantages are multiplied by clip(xi, +-2) of the means before mu
        sequence level  PPO's, of the sequence ratio
        others          min(r, 1 + second_clip) C

    Args:
        history: K, number of batch means to compare with.
        min_steps: number of batches before the first such step.
        worsening: factor if xi < 0, the paper's lambda. 0: no second step then.
        form: "paper" (one more step, `before`) or "code" (the minibatches of `replay`).
        second_clip: with form "code", width of the clip of the second steps; 0.2 is verl's default `clip_ratio`.

    A plan with source "previous" trains on the last batch that `advance` saw, so the trainer must keep its tokens.

    Inputs: group_ids.
    State: the previous batch, the last K means, the number of batches.
    Source: released code and paper, exact.
    """

    history: int = 8
    min_steps: int = 8
    worsening: float = 0.1
    form: str = "paper"
    second_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self._op, "form", self.form, ("paper", "code"))
        check_number(self._op, "history", self.history, 2)
        check_number(self._op, "min_steps", self.min_steps, 2)
        check_number(self._op, "worsening", self.worsening, 0.0)
        if self.second_clip is not None:
            check_number(self._op, "second_clip", self.second_clip, 0.0, open_low=True)
            if self.form == "paper":
                raise refuse(
                    self._op, "second_clip", "None with form 'paper'", self.second_clip, "The clip of `shape` is used."
                )
        if self.advantage in PER_TOKEN and not (self.form == "code" and self.advantage == "gae"):
            raise refuse(
                self._op,
                "advantage",
                "an estimator with one number per response (C is one number per response)",
                repr(self.advantage),
                "With form='code', advantage='gae' is the authors' loop for PPO with a critic.",
            )
        if not isinstance(self.shape, PPOClip):
            raise refuse(self._op, "shape", "a PPOClip (the second step clips with it)", self.shape, "Set its widths.")

    def initial_state(self) -> State:
        """Return the base state, no previous batch and no means."""
        return super().initial_state() | {"means": [], "batches": 0, "previous": None}

    def improvement(self, batch: Batch, state: State) -> float:
        """Return phi(xi) of the new batch with form "paper". While there is too little history: 0."""
        if state["batches"] < self.min_steps:
            return 0.0
        means = torch.tensor(state["means"], dtype=torch.float64, device="cpu")
        std = float(means.std())
        xi = (_mean_reward(batch) - float(means.mean())) / (std if std >= 1e-8 else 1.0)
        return xi if xi >= 0 else self.worsening * xi

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the prepared batch. With form "code" and GAE, its advantages are scaled by the improvement."""
        batch = super().prepare(batch, state)
        if self.form == "paper" or self.advantage != "gae":
            return batch
        assert batch.advantage is not None
        _, xi = _improvement(_mean_reward(batch), state["means"])
        return replace(batch, advantage=batch.advantage * min(max(xi, -2.0), 2.0))

    def before(self, batch: Batch, state: State) -> tuple[Plan, ...]:
        """Return the step on the previous batch, with form "paper". Return nothing if it would have no effect."""
        if self.form == "code":
            return ()
        phi = self.improvement(batch, state)
        if phi == 0.0 or state["previous"] is None:
            return ()
        previous = self._previous(
            state, batch, phi * _share(self._op, Batch.from_state(state["previous"], batch.world))
        )
        return (replace(super().objective(previous, state), source="previous"),)

    def replay(self, batch: Batch, state: State) -> Batch | None:
        """Return the previous batch with C as its advantages, with form "code". Without enough history: None."""
        mu = _mean_reward(batch)
        means = [*state["means"], mu][-self.history :]
        if self.form == "paper" or state["previous"] is None or len(means) < self.min_steps:
            return None
        gain, xi = _improvement(mu, means)
        if gain < 0 and self.worsening == 0.0:
            return None
        share = _share(self._op, Batch.from_state(state["previous"], batch.world))
        coefficient = (share * xi).clamp(-10.0, 10.0) * (self.worsening if gain < 0 else 1.0)
        return self._previous(state, batch, coefficient)

    def replay_plan(self, batch: Batch, state: State) -> Plan:
        """Return the optimizer step of a minibatch of `replay`."""
        plan = super().replay_plan(batch, state)
        assert isinstance(self.shape, PPOClip)
        low, high = self.shape.bounds
        shape = PPOClip(low=None, high=None, ratio_min=low, ratio_max=high)
        if self.advantage != "gae" and self.level == "token":
            # min(r, clip(r)) C = min(r, high) C for both signs of C: there is no lower bound, and for negative C
            # the dual clip is at the same place.
            high = 1.0 + (0.2 if self.second_clip is None else self.second_clip)
            shape = PPOClip(low=1.0, high=None, ratio_max=high, dual=high)
        return replace(plan, objective=replace(plan.objective, shape=shape))

    def _previous(self, state: State, batch: Batch, coefficient: torch.Tensor) -> Batch:
        """Return the previous batch with C, (seqs,), as its advantages."""
        previous = Batch.from_state(state["previous"], batch.world)
        return replace(previous, advantage=coefficient.to(previous.old_logp.dtype), advantage_level="sequence")

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state with this batch and its mean reward; form "code" stores the mean twice."""
        times = 2 if self.form == "code" else 1
        means = [*state["means"], *[_mean_reward(batch)] * times][-self.history :]
        return super().advance(state, batch) | {
            "means": means,
            "batches": state["batches"] + 1,
            "previous": batch.to_state(),
        }


def _improvement(mu: float, means: list[float]) -> tuple[float, float]:
    """Return (mu - mean of the means, xi) of the released code."""
    if not means:
        return 0.0, 0.0
    history = torch.tensor(means, dtype=torch.float64, device="cpu")
    std = float(history.std(correction=0)) if len(means) >= 2 else 1.0
    gain = mu - float(history.mean())
    return gain, min(max(gain, -5.0), 5.0) / (std if std >= 1e-6 else 1.0)


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
