"""SDFT and SDPO: the teacher is the model itself, with privileged context in its prompt."""

from dataclasses import dataclass
from typing import Any

import torch

from tokfuse.algorithms.base import Plan
from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.distillation.opd import CLAMP, sampled_token_plan
from tokfuse.algorithms.distillation.top_k import MASSES, TopK
from tokfuse.algorithms.registry import Entry, add
from tokfuse.runtime.core.checks import FLOATS, INTS, Rows, check_choice, check_integer, check_number, check_vector
from tokfuse.runtime.core.divergence import generalised_jsd
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.shapes import LinearLogp
from tokfuse.runtime.reference.segments import groups_of

FORMS = ("top_k", "full_vocabulary", "sampled_token")


@dataclass(frozen=True, kw_only=True)
class SelfDistillation(Distillation):
    """loss = mean over tokens of w_t D_t between the student p and the same model q with privileged context.

    The response follows the plain prompt for p, and a prompt with a demonstration, a solution or feedback for q. Three
    forms of D_t:

        "top_k":            JSD(beta) over the student's k most likely ids, as `TopK`
        "full_vocabulary":  JSD(beta) over all ids; beta 0 and 1 are the forward and the reverse KL
        "sampled_token":    (log p(y_t) - log q(y_t)) log p(y_t), with a detached difference: the reverse KL

        w_t = min(exp(log p(y_t) - old log p(y_t)), ratio_max), detached; the log-ratio is bounded by 20

    Args:
        form: "top_k", "full_vocabulary" or "sampled_token".
        beta: weight of the teacher in the mixture of the JSD, in [0, 1] (the authors' alpha). "sampled_token" needs 1.
        k: number of ids, for form "top_k". None: not that form.
        mass: "renormalised" or "tail", see `TopK`, for form "top_k". None: not that form.
        ratio_max: bound of the importance weight, > 0. None: no weight.
        skip_tokens: number of tokens at the start of each response that do not count, >= 0.
        aggregation: "token_mean" or "seq_mean_token_mean".

    Inputs: logp and old_logp of the sampled tokens for ratio_max; "sampled_token" also needs teacher_logp. Responses
    with `informed` False do not count.
    State: none. `make("tr_dpo", mix=0.05, every=1)` keeps the teacher as a moving average of the student (SDPO; SDFT
    has 0.01).
    """

    contexts = ("informed",)

    form: str = "top_k"
    beta: float = 0.5
    k: int | None = 100
    mass: str | None = "tail"
    ratio_max: float | None = 2.0
    skip_tokens: int = 0
    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self._op, "form", self.form, FORMS)
        check_number(self._op, "beta", self.beta, 0.0, 1.0)
        if self.form == "sampled_token" and self.beta != 1.0:
            raise refuse(
                self._op, "beta", "1 with form 'sampled_token'", self.beta, "One token estimates a reverse KL."
            )
        for name in ("k", "mass"):
            if (getattr(self, name) is None) == (self.form == "top_k"):
                raise refuse(
                    self._op, name, "given with form 'top_k', and only then", getattr(self, name), f"Pass {name}=None."
                )
        if self.form == "top_k":
            check_choice(self._op, "mass", self.mass, MASSES[2:])
            self.top_k()
        if self.ratio_max is not None:
            check_number(self._op, "ratio_max", self.ratio_max, 0.0, open_low=True)
        check_integer(self._op, "skip_tokens", self.skip_tokens, 0)
        self.check_aggregation(self.aggregation)

    def top_k(self) -> TopK:
        """Return the divergence of form "top_k". Its ids are the student's: `linear_token_stats(..., top_k=k)`."""
        if self.form != "top_k":
            raise refuse(self._op, "form", "'top_k'", repr(self.form), "The other forms compare no list of ids.")
        assert self.k is not None and self.mass is not None
        divergence: dict[str, Any] = generalised_jsd(self.beta)
        return TopK(name=self.name, k=self.k, mass=self.mass, support="student", **divergence)

    def divergence(self, logp_at: torch.Tensor, teacher_logp_at: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return `TopK.divergence` of form "top_k", (tokens,)."""
        return self.top_k().divergence(logp_at, teacher_logp_at, ids)

    def objective(self, batch: DistillationBatch) -> DistillationPlan | Plan:
        """Return the plan of a batch.

        Form "top_k": `plan.loss(method.divergence(...))`. "full_vocabulary": for `distill_step`. "sampled_token": for
        `policy_step`.
        """
        self.check_contexts(batch)
        mask, weight = self._mask(batch), self._weight(batch)
        if self.form == "sampled_token":
            batch.require(self._op, "old_logp", "logp", "teacher_logp")
            assert batch.logp is not None and batch.teacher_logp is not None
            gap = batch.teacher_logp.double() - batch.logp.double()
            return sampled_token_plan(batch, gap, LinearLogp(), self.aggregation, mask=mask, token_weight=weight)
        divergence = generalised_jsd(self.beta) if self.form == "full_vocabulary" else None
        return mean_plan(batch, divergence, self.aggregation, mask=mask, coef=weight)

    def _mask(self, batch: DistillationBatch) -> torch.Tensor:
        """Return the tokens that count, (tokens,) bool."""
        keep = batch.valid
        if batch.informed is not None:
            keep = keep & batch.informed[batch.sequence]
        if self.skip_tokens:
            start = batch.cu_seqlens[:-1].long()[batch.sequence]
            place = torch.arange(batch.num_tokens, device=keep.device) - start
            keep = keep & (place >= self.skip_tokens)
        return keep

    def _weight(self, batch: DistillationBatch) -> torch.Tensor | None:
        """Return w_t, (tokens,) float64."""
        if self.ratio_max is None:
            return None
        batch.require(self._op, "old_logp", "logp")
        assert batch.logp is not None and batch.old_logp is not None
        log_ratio = (batch.logp.double() - batch.old_logp.double()).clamp(-CLAMP, CLAMP)
        return log_ratio.exp().clamp(max=self.ratio_max)


def demonstrations(
    reward: torch.Tensor, group_ids: torch.Tensor, *, threshold: float = 1.0, exclude_self: bool = True
) -> torch.Tensor:
    """Return, for each response, the first response to the same prompt that succeeded, (seqs,) int64. -1: none did.

    SDPO shows it to the teacher. Without one and without feedback, the response has `informed` False.

    Args:
        reward: (seqs,), float. One reward per response.
        group_ids: (seqs,), int. Prompt of each response. All responses to a prompt must be on one rank.
        threshold: a response succeeds if its reward is at least this.
        exclude_self: a response is not shown to itself.

    Source: the SDPO release and TRL, exact. The release names it dont_reprompt_on_self_success.
    """
    op = "demonstrations"
    rows = Rows(check_vector(op, "reward", reward, dtypes=FLOATS).shape[0], "reward", reward.device)
    check_vector(op, "group_ids", group_ids, rows, INTS)
    check_number(op, "threshold", threshold, float("-inf"))
    count, member = rows.size, groups_of(group_ids).member
    place = torch.arange(count, device=reward.device)
    index = torch.where(reward >= threshold, place, count)

    def first(of: torch.Tensor) -> torch.Tensor:
        """The least index of each response's group."""
        least = torch.full((count,), count, device=reward.device).scatter_reduce(0, member, of, "amin")
        return least[member]

    found = first(index)
    if exclude_self:
        # Without its first success, a group's least index is its second success.
        found = torch.where(found == place, first(torch.where(index == found, count, index)), found)
    return torch.where(found == count, -1, found)


def _row(name: str, system: str, source: str, summary: str, differs: str, **preset: Any) -> None:
    add(
        Entry(
            name=name,
            cls=SelfDistillation,
            kind="distillation",
            table=__name__,
            system=system,
            label="exact (released code)",
            source=source,
            summary=summary,
            differs=differs,
            preset=preset,
        )
    )


_row(
    "sdpo",
    "SDPO",
    "arXiv 2601.20802; github.com/lasgroup/SDPO (core_algos.py, actor.yaml); TRL experimental/sdpo",
    "self-distillation from a successful response or feedback in the teacher's prompt",
    "The defaults come from the release's actor.yaml: JSD(1/2), 100 ids with a tail, weight at most 2, token "
    "mean. Its config class has the forward KL over all ids without a weight. TRL's default is "
    "form='sampled_token' with beta=1 and sequence means, in which a response without context counts as 0. The "
    "release's trust-region teacher is not here.",
)
_row(
    "sdft",
    "SDFT",
    "arXiv 2601.19897; github.com/idanshen/Self-Distillation (copy in xuefei-wang/Self-Distillation); TRL "
    "experimental/sdft",
    "self-distillation from a demonstration in the teacher's prompt",
    "The defaults come from the released code: the forward KL over all ids, the first 3 tokens skipped, "
    "weights at most 2 against the rollout engine's log-probabilities (old_logp), a teacher that moves by 0.01 "
    "per step. The paper's Eq. 1 is the reverse KL (beta=1). TRL's defaults are JSD(1/2) of 100 renormalised ids,"
    " and no token skipped.",
    form="full_vocabulary",
    beta=0.0,
    k=None,
    mass=None,
    skip_tokens=3,
    aggregation="seq_mean_token_mean",
)
