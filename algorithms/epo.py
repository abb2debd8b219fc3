"""EPO: entropy bonus for agents, with a band around the entropy history of each turn."""

import math
from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import plan_mask
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number, may_read
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.policy.shapes import PPOClip, Shape
from tokfuse.runtime.reference.segments import segment_sum

CODE_MAX_TURNS = 50  # default of the key "max_step", which the released scripts do not set


@register(
    "epo",
    system="EPO",
    label="exact (paper, released code)",
    source="arXiv 2509.22576; github.com/WujiangXu/EPO",
    summary="entropy bonus, penalty outside a band around the turn's history, schedule in phases",
    required=("max_turns",),
    differs=(
        "mode='paper': the band penalty is piecewise constant, so it has no gradient and only changes the reported "
        "loss (`Plan.constant`). mode='hinge' is an extension with a gradient. form='paper' (default): a batch "
        "without a turn does not count in the mean of that turn. form='code': the entropies of a rollout with n "
        "turns are stored for the last n turns of the history, and the other turns count as 0; the penalty "
        "starts at turn 25, because the code reads a key that its scripts do not set. Sequence means skip padding, "
        "which the code includes. The PPO branch of the launch script does not pass the options of the band."
    ),
)
@dataclass(frozen=True, kw_only=True)
class EPO(Standard):
    """L = L_base - coef (mean H - beta_k mean P), for any objective of `Standard`.

    h is the mean entropy of the token's turn over all rollouts, including this one, each with the same weight. The
    policy that `prepare` sees gives the entropies of a rollout.

        paper   P = 0 if kappa_low h < H < kappa_high h else alpha; no gradient
        hinge   P = alpha (relu(kappa_low h - H) + relu(H - kappa_high h))

    With the half J = floor(K / 2), beta_k is 1 - 0.2 (1 - e^-2p) with p = k / J up to J, and 0.8 e^-3p with
    p = (k - J) / (K - J) after it. P counts only in batches that contain a turn >= floor(max_turns / 2), or >= 25 with
    form "code".

    Args:
        entropy_coef: coef.
        kappa_low, kappa_high: bounds of the band, relative to h.
        alpha: the penalty; 0.05 for ScienceWorld, 0.1 for ALFWorld.
        total_steps: K.
        max_turns: maximum number of turns of an episode.
        over: "token" compares H of each token with the band, "sequence" the mean of the response.
        mode: "paper" or "hinge".
        form: "paper" or "code", which differ in the history of entropies and in the first turn with a penalty.

    Inputs: turn, ref_logp, and entropy: of the rollout's policy for `prepare`, of the current policy for `plans`.
    State: the step, and for each turn the sum of its batch means and their number.
    Source: released code, exact; hinge is an extension.
    """

    entropy_coef: float = 1e-3
    shape: Shape = PPOClip(dual=3.0)
    kl: KL | None = KL(coef=0.01)
    kappa_low: float = 0.0
    kappa_high: float = 2.0
    alpha: float = 0.05
    total_steps: int = 150
    max_turns: int = 0
    over: str = "token"
    mode: str = "paper"
    form: str = "paper"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "kappa_low", self.kappa_low, 0.0)
        check_number(self._op, "kappa_high", self.kappa_high, self.kappa_low)
        check_number(self._op, "alpha", self.alpha, 0.0)
        check_number(self._op, "total_steps", self.total_steps, 1)
        check_number(self._op, "max_turns", self.max_turns, 1)
        check_choice(self._op, "over", self.over, ("token", "sequence"))
        check_choice(self._op, "mode", self.mode, ("paper", "hinge"))
        check_choice(self._op, "form", self.form, ("paper", "code"))
        if self.form == "code":
            # The code averages the entropy of padding too, which a packed batch does not have.
            check_choice(self._op, "over", self.over, ("token",))
            check_choice(self._op, "mode", self.mode, ("paper",))
        check_choice(self._op, "aggregation", self.aggregation, ("token_mean",))
        check_number(self._op, "entropy_coef", self.entropy_coef, 0.0, open_low=True)

    @property
    def needs_policy(self) -> bool:
        """Always True: the band is compared with the current entropies."""
        return True

    def initial_state(self) -> State:
        """Return the base state, the step and an empty history."""
        history = {"sum": [0.0] * self.max_turns, "batches": [0] * self.max_turns}
        return super().initial_state() | {"step": 0} | history

    def beta(self, step: int) -> float:
        """Return beta_k of the schedule. It jumps from 0.827 to 0.8 in the middle and ends at 0.04."""
        step, half = min(step, self.total_steps), self.total_steps // 2
        if step <= half:
            return 1.0 - 0.2 * (1.0 - math.exp(-2.0 * step / max(half, 1)))
        return 0.8 * math.exp(-3.0 * (step - half) / (self.total_steps - half))

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return the base plan with the penalty, as a weight of the entropy or as a constant."""
        batch.require(self._op, "turn", "turn_entropy", "entropy")
        assert batch.turn is not None and batch.entropy is not None and batch.turn_entropy is not None
        plan = super().objective(batch, state)
        # Over all ranks, because they must use the same loss.
        first = CODE_MAX_TURNS // 2 if self.form == "code" else self.max_turns // 2
        late = bool(batch.world.sum((batch.turn >= first).any().long()))
        if not late or plan.objective.entropy_coef == 0.0:
            return plan
        keep, entropy = plan_mask(plan), batch.entropy.double()
        if self.over == "sequence":
            entropy = batch.spread(replace(batch, mask=keep).sequence_mean(entropy))
        low, high = (batch.spread(k * batch.turn_entropy.double()) for k in (self.kappa_low, self.kappa_high))
        beta = self.beta(state["step"])
        if self.mode == "paper":
            outside = keep & ~((low < entropy) & (entropy < high))
            penalty = self.alpha * outside.double()
            weight = None
        else:
            over, under = entropy - high, low - entropy
            penalty = self.alpha * torch.where(keep, over.clamp(min=0) + under.clamp(min=0), 0.0)
            # d penalty / d entropy changes the weight of the entropy bonus.
            slope = self.alpha * keep.double() * ((over > 0).double() - (under > 0).double())
            weight = (1.0 - beta * slope).to(batch.old_logp.dtype)
            # The weight carries the part slope * entropy of the penalty's value; the rest is constant.
            penalty = penalty - slope * batch.entropy.double()
        constant = plan.objective.entropy_coef * beta * (penalty * keep).sum()
        return replace(plan, entropy_weight=weight, constant=constant)

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the prepared batch of the base. Raise an error if a turn is outside [0, max_turns)."""
        batch.require(self._op, "turn")
        assert batch.turn is not None
        if may_read(batch.turn) and batch.num_seqs > 0:
            low, high = int(batch.turn.min()), int(batch.turn.max())
            if low < 0 or high >= self.max_turns:
                raise refuse(
                    self._op,
                    "batch.turn",
                    f"in [0, max_turns) = [0, {self.max_turns})",
                    low if low < 0 else high,
                    "Raise max_turns.",
                )
        batch = super().prepare(batch, state)
        history = self._with(state, batch)
        total = torch.tensor(history["sum"], dtype=torch.float64, device=batch.reward.device)
        seen = torch.tensor(history["batches"], device=batch.reward.device)
        assert batch.turn is not None
        return replace(batch, turn_entropy=(total / seen.clamp(min=1))[batch.turn.long()])

    def advance(self, state: State, batch: Batch) -> State:
        """Return the state with the batch's mean entropy of every turn added to the history."""
        return super().advance(state, batch) | {"step": state["step"] + 1} | self._with(state, batch)

    def _with(self, state: State, batch: Batch) -> State:
        """Return the history with this batch, as part of a state."""
        batch.require(self._op, "turn", "entropy")
        assert batch.turn is not None and batch.entropy is not None
        turn = batch.spread(batch.turn.long())
        entropy = torch.where(batch.valid, batch.entropy.double(), 0.0)
        sums = segment_sum(entropy, turn, self.max_turns)
        counts = segment_sum(batch.valid.double(), turn, self.max_turns)
        sums, counts = batch.world.sum(torch.stack([sums, counts]))
        mean = (sums / counts.clamp(min=1)).tolist()
        present = (counts > 0).tolist()
        if self.form == "code":
            turns = max((i + 1 for i, there in enumerate(present) if there), default=0)
            mean, present = [0.0] * (self.max_turns - turns) + mean[:turns], [True] * self.max_turns
        return {
            "sum": [s + m for s, m in zip(state["sum"], mean, strict=True)],
            "batches": [n + p for n, p in zip(state["batches"], present, strict=True)],
        }
