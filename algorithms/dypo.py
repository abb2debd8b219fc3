"""DYPO: per prompt imitation, policy gradient with contrast, or nothing, by the outcome."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import UNBOUNDED, plan_mask, with_kl
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.reference.segments import groups_of, segment_sum


@register(
    "dypo",
    system="DYPO",
    label="exact",
    source="arXiv 2604.08926 Eqs. 4, 14-16, 20-24 (no released code)",
    summary="all wrong: imitate a teacher; all right: nothing; mixed: GRPO and pairwise alignment",
    differs=(
        "Not stated in the paper, chosen here: gamma 1; the teacher's likelihood per token "
        "(sft_mean='token') or per trace; ratio against old_logp; no further KL; the mean over "
        "prompts counts all of them."
    ),
)
@dataclass(frozen=True, kw_only=True)
class DYPO(Standard):
    """mean over prompts of hard sft_coef L_SFT + mixed [alpha L_GRPO + (1 - alpha) L_GAL].

        L_SFT  = -log pi(teacher trace)
        L_GRPO = the base's clipped loss, mean over the group's responses of token means
        L_GAL  = mean over pairs (s, f), R_s > R_f, of -log sigmoid(beta Delta),
                 Delta = [sum logp - ref_logp of s] - [the same of f]

    Hard: no response correct; easy: all; mixed: the rest. GAL's gradient is one number per
    sequence, found from sums of the current logp, so all three are one fused pass. Its value is in
    `Plan.constant`.

    Args:
        alpha: 0.5. beta: 1 (the paper's best). sft_coef: gamma, weight of imitation.
        sft_mean: "token" (mean over the trace) or "trace" (sum).

    Inputs: group_ids, correct, demonstration (True on teacher traces, at least one for every hard
    prompt that is to be imitated; several share the weight), ref_logp, logp. State: none.

    Source: paper, exact but for the gaps that the paper index names.
    """

    aggregation: str = "seq_mean_token_mean"
    alpha: float = 0.5
    beta: float = 1.0
    sft_coef: float = 1.0
    sft_mean: str = "token"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number(self._op, "alpha", self.alpha, 0.0, 1.0)
        for name in ("beta", "sft_coef"):
            check_number(self._op, name, getattr(self, name), 0.0)
        check_choice(self._op, "sft_mean", self.sft_mean, ("token", "trace"))
        check_choice(self._op, "aggregation", self.aggregation, ("seq_mean_token_mean",))

    @property
    def needs_policy(self) -> bool:
        """GAL compares sums of the current log-probabilities."""
        return True

    def advantages(self, batch: Batch) -> Advantage:
        """The base's over the policy's own responses; 0 on teacher traces."""
        batch.require(self._op, "group_ids", "demonstration")
        assert batch.demonstration is not None
        own = (~batch.demonstration).nonzero().flatten()
        value, level = super().advantages(batch.take(own))
        if level == "sequence":
            return Advantage(value.new_zeros(batch.num_seqs).index_put((own,), value), level)
        rows = batch.spread(~batch.demonstration).nonzero().flatten()
        return Advantage(value.new_zeros(batch.num_tokens).index_put((rows,), value), level)

    def objective(self, batch: Batch, state: State) -> Plan:
        """One plan for the three branches."""
        batch.require(self._op, "group_ids", "correct", "demonstration", "ref_logp", "logp")
        assert batch.group_ids is not None and batch.correct is not None
        assert batch.demonstration is not None
        plan = super().objective(batch, state)
        length = replace(batch, mask=plan_mask(plan)).lengths.double()
        group = groups_of(batch.group_ids).member
        own, teacher = ~batch.demonstration & (length > 0), batch.demonstration & (length > 0)

        def total(x: torch.Tensor) -> torch.Tensor:
            return segment_sum(x.double(), group, batch.num_seqs)[group]

        size, right, traces = total(own), total(own & batch.correct), total(teacher)
        mixed = (right > 0) & (right < size)
        hard = (right == 0) & (size > 0)
        grpo = torch.where(mixed & own, self.alpha / size.clamp(min=1), 0.0)
        # The aggregation divides each sequence by its length; what is a sum is multiplied by it.
        unit = length if self.sft_mean == "trace" else torch.ones_like(length)
        sft = torch.where(hard & teacher, self.sft_coef * unit / traces.clamp(min=1), 0.0)
        slope, value = self.alignment(batch, group, own & mixed, plan_mask(plan))
        likelihood = (1 - self.alpha) * slope * length - sft
        weight = batch.spread(grpo).to(batch.old_logp.dtype)
        prompts = max(1, int(group.max()) + 1) if batch.num_seqs else 1
        # Value of the linear stand-in of GAL, which the fused loss reports instead of GAL's.
        x = torch.where(plan_mask(plan), _required(batch.logp).double(), 0.0)
        linear = (slope * segment_sum(x, batch.sequence, batch.num_seqs)).sum()
        constant = (1 - self.alpha) * (value - linear) / prompts
        plan = replace(plan.weigh(weight), normalizer=float(prompts), constant=constant)
        kl = KL(estimator="k1", coef=1.0, clamp=UNBOUNDED)
        nothing = torch.zeros_like(batch.old_logp)
        return with_kl(plan, kl, nothing, batch.spread(likelihood), self._op)

    def alignment(
        self, batch: Batch, group: torch.Tensor, own: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """((seqs,) d/d sum logp, () value) of the sum over groups of L_GAL; O(seqs^2) numbers."""
        gap = _required(batch.logp).double() - _required(batch.ref_logp).double()
        score = segment_sum(torch.where(mask, gap, 0.0), batch.sequence, batch.num_seqs)
        reward = batch.reward.double()
        pair = (group[:, None] == group) & (reward[:, None] > reward) & own[:, None] & own
        delta = self.beta * (score[:, None] - score)
        in_group = segment_sum(pair.sum(1), group, batch.num_seqs)[group].clamp(min=1)
        share = pair.double() / in_group[:, None]
        pull = self.beta * share * torch.sigmoid(-delta)
        value = (share * torch.nn.functional.softplus(-delta)).sum()
        return pull.sum(0) - pull.sum(1), value


def _required(x: torch.Tensor | None) -> torch.Tensor:
    assert x is not None
    return x
