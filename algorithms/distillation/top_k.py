"""Divergences over a few ids per token, for teachers that send only those, and for less memory.

    method = tokfuse.algorithms.make("forward_kl_topk_tail", k=32)
    stats = tokfuse.linear_token_stats(hidden, weight, target, ids=teacher_ids)      # (tokens, k), from the teacher
    divergence = method.divergence(stats.logp_at, teacher_logp_at, teacher_ids)
    loss = method.objective(batch).loss(divergence)

If the ids come from the student or from both, see `TopK.ids`.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from tokfuse.algorithms.distillation.base import Distillation, DistillationPlan, mean_plan
from tokfuse.algorithms.distillation.batch import DistillationBatch
from tokfuse.algorithms.registry import Entry, add
from tokfuse.runtime.core.checks import (
    INTS,
    check_choice,
    check_constant,
    check_dtype,
    check_integer,
    check_matrix,
    check_number,
    require_tensor,
)
from tokfuse.runtime.core.errors import refuse

MASSES = ("as_given", "teacher_renormalised", "renormalised", "tail")
SUPPORTS = ("teacher", "student", "union")


class Distribution(NamedTuple):
    """Categories of one side, (tokens, categories) float64. A category that does not count has mass 0 and log 0."""

    mass: torch.Tensor
    log: torch.Tensor


@dataclass(frozen=True, kw_only=True)
class TopK(Distillation):
    """loss = mean over tokens of a divergence of student p and teacher q over the ids k of a token.

        "kl_forward":  sum_k q_k (log q_k - log p_k)
        "kl_reverse":  sum_k p_k (log p_k - log q_k)
        "jsd":         beta KL(q || m) + (1 - beta) KL(p || m), m = beta q + (1 - beta) p

    Both log-probabilities are normalised over the whole vocabulary before `mass` is applied.

    Args:
        kind: "kl_forward", "kl_reverse" or "jsd".
        beta: weight of the teacher in the mixture of "jsd", in (0, 1). Other kinds do not read it.
        k: number of ids per token and side: pass it as top_k.
        support: whose ids are compared: "teacher", "student", or the "union" of both.
        mass: what happens to the probability of all other ids. "as_given": it is left out on both sides. The loss is
            then no divergence: it can be negative, and p = q is not its minimum. "teacher_renormalised": the
            teacher's probabilities are divided by their sum, the student's are not. "renormalised": both are. "tail":
            it is one more category of both sides, with log-probability log1p(-sum_k exp(log p_k)). The loss is then
            >= 0, 0 at p = q, and at most the divergence over the whole vocabulary.
        tail_floor: least probability of the tail, in (0, 1), on both sides. Below it, the student's tail has no
            gradient. Only with mass "tail".
        logp_min: lower bound of all log-probabilities, nats; no gradient below. Only with mass "as_given". None: none.
        loss_min: lower bound of the divergence of a token; no gradient below. None: none.
        loss_max: upper bound of the divergence of a token; no gradient above. None: none.
        aggregation: "token_mean" or "seq_mean_token_mean".

    Inputs: log-probabilities of both sides at the same ids (`divergence`), and the responses (`objective`).
    State: none.
    """

    kind: str = "kl_forward"
    beta: float = 0.5
    k: int = 32
    support: str = "teacher"
    mass: str = "tail"
    tail_floor: float = 1e-7
    logp_min: float | None = None
    loss_min: float | None = None
    loss_max: float | None = None
    aggregation: str = "token_mean"

    def __post_init__(self) -> None:
        check_choice(self._op, "kind", self.kind, ("kl_forward", "kl_reverse", "jsd"))
        check_number(self._op, "beta", self.beta, 0.0, 1.0, open_low=True, open_high=True)
        if self.kind != "jsd" and self.beta != 0.5:
            raise refuse(self._op, "beta", f"left out with kind {self.kind!r}", self.beta, "Only 'jsd' has a mixture.")
        check_integer(self._op, "k", self.k, 1)
        check_choice(self._op, "support", self.support, SUPPORTS)
        check_choice(self._op, "mass", self.mass, MASSES)
        check_number(self._op, "tail_floor", self.tail_floor, 0.0, 1.0, open_low=True, open_high=True)
        if self.mass != "tail" and self.tail_floor != 1e-7:
            raise refuse(
                self._op, "tail_floor", f"left out with mass {self.mass!r}", self.tail_floor, "There is no tail."
            )
        if self.logp_min is not None:
            check_number(self._op, "logp_min", self.logp_min, float("-inf"), 0.0)
            if self.mass != "as_given":
                raise refuse(
                    self._op,
                    "logp_min",
                    "None, or used with mass 'as_given'",
                    self.logp_min,
                    "A bound would change the sum of the probabilities.",
                )
        for name in ("loss_min", "loss_max"):
            if getattr(self, name) is not None:
                check_number(self._op, name, getattr(self, name), float("-inf"))
        self.check_aggregation(self.aggregation)

    def ids(self, *, student: torch.Tensor | None = None, teacher: torch.Tensor | None = None) -> torch.Tensor:
        """Return the ids to compare, (tokens, count), from the most likely ids of each side.

        `token_stats(..., top_k=method.k).top_ids` returns them for one side. In a "union", an id that both sides have
        is kept once, and its second place becomes padding (-1).

        Args:
            student: (tokens, k) int, for support "student" and "union".
            teacher: (tokens, k) int, for support "teacher" and "union".
        """
        given = {"student": student, "teacher": teacher}
        needed = [n for n in given if self.support in (n, "union")]
        for name, value in given.items():
            if (value is None) == (name in needed):
                want = f"{'given' if name in needed else 'left out'} with support {self.support!r}"
                raise refuse(self._op, name, want, None if value is None else "a tensor", "Pass the ids that it needs.")
        found = [value for value in (teacher, student) if value is not None]
        for value in found:
            self._check_ids(value, 1)
        if len(found) == 1:
            return found[0]
        both = torch.cat(found, 1)
        # A stable sort puts the second of two equal ids right behind the first.
        ordered, place = both.sort(dim=1, stable=True)
        again = torch.zeros_like(both, dtype=torch.bool)
        again.scatter_(1, place[:, 1:], ordered[:, 1:] == ordered[:, :-1])
        return both.masked_fill(again, -1)

    def divergence(self, logp_at: torch.Tensor, teacher_logp_at: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Return the divergence of every token, (tokens,), differentiable in `logp_at`. Computed in float64.

        Args:
            logp_at: (tokens, count), float, nats. The student's log-probabilities at the ids, as `token_stats` and
                `linear_token_stats` return them.
            teacher_logp_at: like logp_at. The teacher's; -inf is allowed.
            ids: (tokens, count), int. The ids; -1 is padding. An id that is twice in a row counts twice.

        A row without an id has the divergence 0. The value of a masked row has no meaning; `plan.loss` leaves it out.
        """
        self._check_ids(ids, 2 if self.support == "union" else 1)
        for name, value in (("logp_at", logp_at), ("teacher_logp_at", teacher_logp_at)):
            check_matrix(self._op, name, value, "(tokens, ids)")
            if value.shape != ids.shape:
                raise refuse(
                    self._op, name, f"{tuple(ids.shape)} like ids", tuple(value.shape), "Pass one value per id."
                )
        check_constant(self._op, "teacher_logp_at", teacher_logp_at)
        value = self._compare(*(self._side(x, ids >= 0, own) for x, own in ((logp_at, True), (teacher_logp_at, False))))
        if self.loss_min is not None or self.loss_max is not None:
            value = value.clamp(self.loss_min, self.loss_max)
        return value.to(logp_at.dtype)

    def objective(self, batch: DistillationBatch) -> DistillationPlan:
        """Return the plan of a batch. Its loss is `plan.loss(method.divergence(...))`."""
        self.check_contexts(batch)
        return mean_plan(batch, None, self.aggregation)

    def _check_ids(self, ids: torch.Tensor, sides: int) -> None:
        check_dtype(self._op, "ids", require_tensor(self._op, "ids", ids), INTS)
        if ids.dim() != 2 or ids.shape[1] > sides * self.k:
            raise refuse(
                self._op, "ids", f"(tokens, at most {sides * self.k})", tuple(ids.shape), "Raise k, or pass fewer ids."
            )

    def _side(self, logp: torch.Tensor, keep: torch.Tensor, student: bool) -> Distribution:
        """Return the categories of one side, after `mass`."""
        log = torch.where(keep, logp.double(), 0.0)
        if self.logp_min is not None:
            log = log.clamp(min=self.logp_min)
        mass = torch.where(keep, log.exp(), 0.0)
        total = mass.sum(1, keepdim=True)
        if self.mass == "tail":
            # The masses are float64 sums of float32 log-probabilities: 1 - total keeps every digit that they have.
            inside = total.clamp(max=1.0 - self.tail_floor)
            return Distribution(torch.cat([mass, 1.0 - inside], 1), torch.cat([log, torch.log1p(-inside)], 1))
        if self.mass == "renormalised" or (self.mass == "teacher_renormalised" and not student):
            total = torch.where(total == 0, 1.0, total)
            return Distribution(mass / total, torch.where(keep, log - total.log(), 0.0))
        return Distribution(mass, log)

    def _compare(self, p: Distribution, q: Distribution) -> torch.Tensor:
        """Return the divergence of each row, (tokens,)."""
        if self.kind == "kl_forward":
            return _kl(q, p)
        if self.kind == "kl_reverse":
            return _kl(p, q)
        mixture = self.beta * q.mass + (1.0 - self.beta) * p.mass
        m = Distribution(mixture, torch.where(mixture > 0, mixture, 1.0).log())
        return self.beta * _kl(q, m) + (1.0 - self.beta) * _kl(p, m)


def _kl(a: Distribution, b: Distribution) -> torch.Tensor:
    """Return sum a (log a - log b) of each row. A category without mass in `a` adds 0, also if its log is -inf."""
    live = a.mass > 0
    gap = torch.where(live, a.log, 0.0) - torch.where(live, b.log, 0.0)
    return (a.mass * gap).sum(1)


def _row(name: str, source: str, summary: str, differs: str, **preset: Any) -> None:
    add(
        Entry(
            name=name,
            cls=TopK,
            kind="distillation",
            table=__name__,
            system="Top-k distillation",
            label="exact (released code)",
            source=source,
            summary=summary,
            differs=differs,
            preset=preset,
        )
    )


_row(
    "forward_kl_topk",
    "verl trainer/distillation (forward_kl_topk)",
    "forward KL over the teacher's k ids, other ids left out",
    "As in verl, a negative token loss is 0 and has no gradient (loss_min=0). verl's config class also bounds "
    "log-probabilities below by -10 and token losses by 10 (logp_min=-10, loss_max=10); its yaml file does not. k"
    " is 32 as in the yaml file, 128 in the class.",
    mass="as_given",
    loss_min=0.0,
)
_row(
    "forward_kl_topk_tail",
    "verl trainer/distillation (forward_kl_topk_tail)",
    "forward KL over the teacher's k ids and one category for all others",
    "tail_floor bounds the tail of both sides, as in the SDPO release; verl bounds only the student's. With a teacher "
    "tail below the floor, the two differ by less than 20 tail_floor.",
    mass="tail",
)
_row(
    "reverse_kl_topk",
    "TRL experimental/iw_opd and experimental/sdpo (alpha=1)",
    "reverse KL over the student's own k ids and a tail",
    "TRL's default in SDPO renormalises both sides instead of adding the tail: mass='renormalised'.",
    kind="kl_reverse",
    support="student",
    mass="tail",
)
_row(
    "jsd_topk",
    "TRL experimental/iw_opd",
    "JSD over the k ids of both sides and a tail",
    "The SDPO and SDFT trainers take the student's ids only: support='student'.",
    kind="jsd",
    support="union",
    mass="tail",
)
