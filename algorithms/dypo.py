"""DYPO: each prompt gets imitation, a policy gradient with contrast, or nothing, depending on its outcome."""

from dataclasses import dataclass, replace

import torch

from tokfuse.algorithms.advantages import Advantage
from tokfuse.algorithms.base import Plan, State
from tokfuse.algorithms.batch import Batch
from tokfuse.algorithms.registry import register
from tokfuse.algorithms.rules import UNBOUNDED, plan_mask, with_anchor
from tokfuse.algorithms.standard import Standard
from tokfuse.runtime.core.checks import check_choice, check_number
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL
from tokfuse.runtime.reference.segments import groups_of, segment_sum


@register(
    "dypo",
    system="DYPO",
    label="exact (paper)",
    source="arXiv 2604.08926 Eqs. 4, 14-16, 20-24 (no released code)",
    summary="all wrong: imitate a teacher; all correct: nothing; mixed: GRPO and pairwise alignment",
    differs=(
        "Not stated in the paper and chosen here: gamma 1; the teacher's likelihood per token (sft_mean='token') or "
        "per trace; the ratio is against old_logp; the mean over prompts counts all of them. Eqs. 3 and 21 have a "
        "KL to the reference without a value of its coefficient: set kl=KL(coef=...)."
    ),
)
@dataclass(frozen=True, kw_only=True)
class DYPO(Standard):
    """mean over prompts of hard sft_coef L_SFT + mixed [alpha L_GRPO + (1 - alpha) L_GAL].

        L_SFT  = -log pi(teacher trace)
        L_GRPO = clipped loss of the base plus `kl`, mean over the group's responses of token means
        L_GAL  = mean over pairs (s, f) with R_s > R_f of -log sigmoid(beta Delta),
                 Delta = [sum of logp - ref_logp of s] - [the same of f]

    A prompt is hard if no response is correct, easy if all are, and mixed otherwise. The gradient of GAL is one
    number per sequence, computed from sums of the current logp, so the three losses are one fused pass. The value of
    GAL is added to `Plan.constant`.

    Args:
        alpha: weight of GRPO against GAL, in [0, 1].
        beta: scale of GAL; 1 is the paper's best value.
        sft_coef: gamma, weight of the imitation.
        sft_mean: "token" (mean over the trace) or "trace" (sum over the trace).
        kl: KL to the reference policy inside L_GRPO (Eqs. 3 and 21). Its coefficient is not published. None: no KL.

    Inputs: group_ids, correct, ref_logp, logp, and demonstration, which is True on teacher traces. A hard prompt
    without a trace is not imitated; several traces of a prompt share the weight. `prepare` decides the outcome of a
    prompt on the whole rollout. A minibatch may split hard and easy prompts. It must hold a mixed prompt whole, because
    GAL compares the current policy on all its responses; micro-batches from `Plan.take` may split it.
    State: none.
    Source: paper, exact, apart from the gaps that the paper index names.
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
        """Always True: GAL compares sums of the current log-probabilities."""
        return True

    def advantages(self, batch: Batch) -> Advantage:
        """Return the base advantages of the policy's own responses, and 0 on teacher traces."""
        batch.require(self._op, "group_ids", "demonstration")
        assert batch.demonstration is not None
        own = (~batch.demonstration).nonzero().flatten()
        value, level = super().advantages(batch.take(own))
        if level == "sequence":
            return Advantage(value.new_zeros(batch.num_seqs).index_put((own,), value), level)
        rows = batch.spread(~batch.demonstration).nonzero().flatten()
        return Advantage(value.new_zeros(batch.num_tokens).index_put((rows,), value), level)

    def prepare(self, batch: Batch, state: State) -> Batch:
        """Return the prepared batch with the outcome of every prompt, decided on all its responses."""
        batch.require(self._op, "group_ids", "correct", "demonstration")
        batch = super().prepare(batch, state)
        assert batch.group_ids is not None and batch.correct is not None and batch.demonstration is not None
        group, there = groups_of(batch.group_ids).member, batch.lengths > 0
        own, teacher = ~batch.demonstration & there, batch.demonstration & there

        def total(x: torch.Tensor) -> torch.Tensor:
            return segment_sum(x.double(), group, batch.num_seqs)[group]

        size, right, traces = total(own), total(own & batch.correct), total(teacher)
        mixed = own & (right > 0) & (right < size)
        imitated = teacher & (right == 0) & (size > 0)
        weight = batch.spread(torch.where(mixed, self.alpha / size.clamp(min=1), 0.0)).to(batch.old_logp.dtype)
        return replace(
            batch,
            token_weight=weight if batch.token_weight is None else batch.token_weight * weight,
            imitation=torch.where(imitated, self.sft_coef / traces.clamp(min=1), 0.0),
            contrast=mixed,
            prompt_share=1.0 / total(torch.ones_like(own)),
        )

    def objective(self, batch: Batch, state: State) -> Plan:
        """Return one plan for the three branches."""
        batch.require(self._op, "group_ids", "imitation", "contrast", "prompt_share", "ref_logp", "logp")
        assert batch.group_ids is not None and batch.contrast is not None
        assert batch.imitation is not None and batch.prompt_share is not None
        plan = super().objective(batch, state)
        length = replace(batch, mask=plan_mask(plan)).lengths.double()
        group = groups_of(batch.group_ids).member
        if self.alpha < 1.0:
            self._check_whole(batch, group)
        # The aggregation divides each sequence by its length. Multiply by the length to get a sum instead.
        unit = length if self.sft_mean == "trace" else torch.ones_like(length)
        slope, value = self.alignment(batch, group, batch.contrast & (length > 0), plan_mask(plan))
        likelihood = (1 - self.alpha) * slope * length - batch.imitation * unit
        # The fused loss reports a linear function with the gradient of GAL. The constant corrects its value.
        x = torch.where(plan_mask(plan), _required(batch.logp).double(), 0.0)
        linear = (slope * segment_sum(x, batch.sequence, batch.num_seqs)).sum()
        constant = (1 - self.alpha) * (value - linear)
        plan = replace(plan, normalizer=float(batch.prompt_share.sum()), constant=constant)
        if self.kl is not None:  # the KL is a part of L_GRPO and has its weight
            plan = replace(plan, kl_weight=batch.token_weight)
        kl = KL(estimator="k1", coef=1.0, clamp=UNBOUNDED)
        nothing = torch.zeros_like(batch.old_logp)
        return with_anchor(plan, kl, nothing, batch.spread(likelihood), self._op)

    def _check_whole(self, batch: Batch, group: torch.Tensor) -> None:
        """Raise an error if a mixed prompt is here in part. GAL compares current log-probabilities of all its pairs."""
        present = segment_sum(_required(batch.prompt_share).double(), group, batch.num_seqs)[group]
        missing = _required(batch.contrast) & (present < 1.0 - 1e-6)
        if bool(missing.any()):
            raise refuse(
                self._op,
                "the minibatch",
                "with all responses of a prompt whose responses are right and wrong, or none",
                f"a part of prompt {int(_required(batch.group_ids)[missing][0])}",
                "Split by prompts, make micro-batches with Plan.take, or set alpha=1.",
            )

    def alignment(
        self, batch: Batch, group: torch.Tensor, own: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (derivatives (seqs,), value ()) of the sum over groups of L_GAL.

        The derivatives are with respect to the sum of logp of each sequence. Memory: O(seqs^2) numbers.
        """
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
