"""Divergences over a few ids per token, for teachers that send only those, and for less memory.

    method = tokfuse.algorithms.make("forward_kl_topk_tail", k=32)
    stats = tokfuse.linear_token_stats(hidden, weight, target, ids=teacher_ids)      # (tokens, k), from the teacher
    divergence = method.divergence(stats.logp_at, teacher_logp_at, teacher_ids)
    loss = method.objective(batch).loss(divergence)

`top_k_step` returns the same loss and computes its gradients in the forward, so no matrix product runs twice.

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
    check_device,
    check_dtype,
    check_integer,
    check_matrix,
    check_number,
    require_tensor,
)
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.token_ids import check_ids
from tokfuse.runtime.lm_head.pair_results import token_weights, weighted_sum
from tokfuse.runtime.lm_head.problem import check_head, probed
from tokfuse.runtime.ops.linear_token_stats_at import ids_step
from tokfuse.runtime.policy.shapes import clamped

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
            value = clamped(value, self.loss_min, self.loss_max)
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
            log = clamped(log, low=self.logp_min)
        mass = torch.where(keep, log.exp(), 0.0)
        total = mass.sum(1, keepdim=True)
        if self.mass == "tail":
            # The masses are float64 sums of float32 log-probabilities: 1 - total keeps every digit that they have.
            inside = clamped(total, high=1.0 - self.tail_floor)
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


class TopKStep(NamedTuple):
    """Result of `top_k_step`."""

    loss: torch.Tensor
    """(), differentiable once in hidden, weight and bias."""
    divergence: torch.Tensor
    """(tokens,), detached; 0 for tokens without a weight."""
    entropy: torch.Tensor
    """(tokens,), nats, of the student, detached; 0 for tokens without a weight."""
    logp_at: torch.Tensor
    """(tokens, count), nats, the student's log-probabilities at the ids, detached."""


def top_k_step(
    method: TopK,
    plan: DistillationPlan,
    *,
    hidden: torch.Tensor,
    weight: torch.Tensor,
    ids: torch.Tensor,
    teacher_logp_at: torch.Tensor,
    bias: torch.Tensor | None = None,
    normalizer: float | torch.Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
) -> TopKStep:
    """Return `plan.loss(method.divergence(...))` of the lm_head's log-probabilities at the ids, with its gradients.

    The gradients are computed in the forward, from the logits of a chunk of tokens, and `loss.backward()` returns them.
    With `linear_token_stats` and autograd, the backward would compute all logits again.

    Args:
        method: configuration, e.g. `make("forward_kl_topk_tail")`, or `top_k()` of "sdft" and "sdpo".
        plan: `method.objective(batch)`, or a part of it from `take`.
        hidden: (tokens, hidden), float32, bfloat16 or float16. Final hidden states of the student, packed.
        weight: (vocab, hidden), of the lm_head.
        ids: (tokens, count), int64 in [-1, vocab); -1 is padding. See `method.ids`.
        teacher_logp_at: (tokens, count), float, nats. The teacher's log-probabilities at the ids; -inf is allowed.
        bias: (vocab,), of the lm_head. None: no bias.
        normalizer: sum of `plan.count()` over micro-batches and ranks. None: the normalizer of the plan.
        softcap: cap of the tanh soft-cap (Gemma), > 0. None: no cap.
        logit_scale: multiplies the logits before the cap (Cohere); > 0.
        memory_budget: bytes of workspace for logits. None: as in `linear_token_stats`.

    Returns:
        TopKStep. Tokens outside the plan's mask, or with weight 0, cost nothing.

    Memory and gradients: 2 T V H operations for the logits and 4 T V H for the gradients, T the tokens with a weight;
        2 T V H less for a frozen weight or hidden. Workspace: `memory_budget`, independent of T. On the CPU the logits
        are stored in the memory of the weight's gradient where they fit.

    Raises:
        ValueError: a wrong shape, dtype, device or range.
        TypeError: a method that compares whole vocabularies.

    Source: the losses of `method`. The gradients are what autograd gives through `method.divergence`. Exact.
    """
    op = "top_k_step"
    if not isinstance(method, TopK):
        raise TypeError(
            f"{op}: method must be a TopK; got {type(method).__name__}. For a divergence over the whole vocabulary use "
            "distill_step, and for form='top_k' of sdft or sdpo pass method.top_k()."
        )
    if not isinstance(plan, DistillationPlan) or plan.divergence is not None:
        given = "one over the whole vocabulary" if isinstance(plan, DistillationPlan) else type(plan).__name__
        raise refuse(op, "plan", "a plan of a top-k method", given, "Pass method.objective(batch), or a part of it.")
    options = LogitOptions(plan.temperature, softcap, logit_scale, None).floats()
    tokens = plan.batch.num_tokens
    check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    if hidden.shape[0] != tokens:
        raise refuse(
            op,
            "hidden",
            f"of {tokens} tokens, like the plan's batch",
            f"shape {tuple(hidden.shape)}",
            "Pack both alike.",
        )
    places = check_ids(op, ids, None, tokens, hidden.device)
    check_matrix(op, "teacher_logp_at", teacher_logp_at, "(tokens, ids)")
    check_device(op, "teacher_logp_at", teacher_logp_at, hidden.device)
    if teacher_logp_at.shape != ids.shape:
        raise refuse(
            op,
            "teacher_logp_at",
            f"{tuple(ids.shape)} like ids",
            tuple(teacher_logp_at.shape),
            "Pass one value per id.",
        )
    weighting = {n: _moved(x, hidden.device) for n, x in plan.weighting(normalizer).items()}
    c = token_weights(op, **weighting, tokens=tokens, device=hidden.device, dtype=torch.float64).coefficient
    options = options._replace(mask=c != 0)
    target = torch.zeros(tokens, dtype=torch.int64, device=hidden.device)
    problem = probed(op, check_head(op, hidden, weight, bias, target, options, memory_budget), plan.batch.cu_seqlens)
    found = torch.zeros(tokens, dtype=torch.float32, device=hidden.device)

    def loss(logp_at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        value = method.divergence(logp_at, teacher_logp_at[rows], ids[rows])
        found[rows] = value.detach().to(found.dtype)
        return weighted_sum(value, c[rows])  # without the rows of weight 0 that a captured graph computes, too

    step = ids_step(op, problem, places, loss)
    return TopKStep(step.loss, torch.where(c != 0, found, 0.0), step.entropy, step.logp_at)


def _moved(x: Any, device: torch.device) -> Any:
    return x.to(device) if isinstance(x, torch.Tensor) else x


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
