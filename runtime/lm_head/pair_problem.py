"""Arguments of the ops that compare a student's head with a teacher: the checks and the derived values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends.policy_runs import LossRun
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_options, check_values
from tokfuse.runtime.lm_head.problem import GPU_ROWS, HEAD_SCHEMA, MIN_BUDGET, HeadProblem, check_head, check_targets
from tokfuse.runtime.policy.inputs import PolicyInputs, may_carry_gradient
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms

Stats = tuple[torch.Tensor, ...]
"""divergence, entropy, logp, teacher_logp, top1_agreement: (tokens,) each. With coefficients of the log-sum-exp or the
sum of the logits, `Coefficients.further` more: lse, and the sum."""
DEVICE_MAX_BUDGET = 1 << 30


class Divergence(NamedTuple):
    """Which divergence, and the weight of its mixture."""

    kind: str
    mix_weight: float


class Teacher(NamedTuple):
    """The side without a gradient: hidden states and a head, or logits."""

    hidden: torch.Tensor | None
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    logits: torch.Tensor | None
    options: LogitOptions
    """Without a mask: the student's mask applies to both sides."""


class PairProblem(NamedTuple):
    """Checked arguments of an op that compares two heads."""

    student: HeadProblem
    teacher: Teacher
    divergence: Divergence

    def teacher_head(self, memory_budget: int) -> HeadProblem | None:
        """Return the teacher as a head, or None if it is given as logits."""
        t = self.teacher
        if t.hidden is None or t.weight is None:
            return None
        return HeadProblem(self.student.op, t.hidden, t.weight, t.bias, self.student.target, t.options, memory_budget)

    def features(self) -> frozenset[str]:
        """Names of the optional behaviours this call uses."""
        return self.student.options.features() | self.teacher.options.features()

    def flat(self) -> tuple[Any, ...]:
        """The values of `PAIR_SCHEMA`."""
        s, t = self.student, self.teacher
        head = (s.hidden, s.weight, s.bias, s.target)
        return (*head, *t[:4], *self.divergence, *s.options.flat()[:5], *t.options.flat()[:4], s.memory_budget)

    @staticmethod
    def from_flat(op: str, *flat: Any) -> "PairProblem":
        """Undo `flat`."""
        hidden, weight, bias, target, *rest = flat
        teacher_hidden, teacher_weight, teacher_bias, teacher_logits, kind, mix_weight = rest[:6]
        options = LogitOptions.from_flat(*rest[6:11])
        vector, scalar, softcap, logit_scale, memory_budget = rest[11:]
        teacher_options = LogitOptions.from_flat(vector, scalar, softcap, logit_scale, None)
        return PairProblem(
            HeadProblem(op, hidden, weight, bias, target, options, memory_budget),
            Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_options),
            Divergence(kind, mix_weight),
        )


class LogitsPair(NamedTuple):
    """Checked logits of both sides, (tokens, vocab) of one dtype."""

    logits: torch.Tensor
    teacher_logits: torch.Tensor
    target: torch.Tensor
    options: LogitOptions
    teacher_options: LogitOptions
    """Without a mask: the student's mask applies to both sides."""
    divergence: Divergence

    def features(self) -> frozenset[str]:
        """Names of the optional behaviours this call uses."""
        return self.options.features() | self.teacher_options.features()

    def flat(self) -> tuple[Any, ...]:
        """The values of `LOGITS_PAIR_SCHEMA`."""
        return (*self[:3], *self.divergence, *self.options.flat()[:5], *self.teacher_options.flat()[:4])

    @staticmethod
    def from_flat(*flat: Any) -> "LogitsPair":
        """Undo `flat`."""
        logits, teacher_logits, target, kind, mix_weight, *rest = flat
        options = LogitOptions.from_flat(*rest[:5])
        vector, scalar, softcap, logit_scale = rest[5:]
        teacher_options = LogitOptions.from_flat(vector, scalar, softcap, logit_scale, None)
        return LogitsPair(logits, teacher_logits, target, options, teacher_options, Divergence(kind, mix_weight))


_TEACHER_OPTIONS = (
    "Tensor? teacher_temperature, float teacher_scalar_temperature, float? teacher_softcap, float teacher_logit_scale"
)
PAIR_SCHEMA = (
    f"{HEAD_SCHEMA}, Tensor? teacher_hidden, Tensor? teacher_weight, Tensor? teacher_bias, Tensor? teacher_logits"
    f", str kind, float mix_weight, {FLAT_SCHEMA_WITHOUT_BIAS}, {_TEACHER_OPTIONS}, int memory_budget"
)
"""A pair problem in the schema of a custom op."""
LOGITS_PAIR_SCHEMA = (
    f"Tensor logits, Tensor teacher_logits, Tensor target, str kind, float mix_weight, {FLAT_SCHEMA_WITHOUT_BIAS}"
    f", {_TEACHER_OPTIONS}"
)
PAIR_ARGUMENTS = 20


class Coefficients(NamedTuple):
    """d loss / d of what the student can be differentiated by, (tokens,) each. None: the loss does not contain it."""

    divergence: torch.Tensor
    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None
    lse: torch.Tensor | None = None
    lse_square: torch.Tensor | None = None
    """Of lse^2."""
    logit_sum: torch.Tensor | None = None
    """Of sum_j class_weight_j u_j, with u the scaled logits."""
    class_weight: torch.Tensor | None = None
    """(vocab,), of that sum; None: 1."""

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Coefficients":
        """Apply `change` to every vector of the tokens."""
        logp, entropy, lse, lse_square, logit_sum = (None if x is None else change(x) for x in self[1:6])
        return Coefficients(change(self.divergence), logp, entropy, lse, lse_square, logit_sum, self.class_weight)

    def of_stats(self) -> list[torch.Tensor]:
        """Return the vectors except that of the divergence."""
        return [x for x in self[1:6] if x is not None]

    def active(self) -> torch.Tensor:
        """(tokens,) bool: rows with a gradient. NaN counts as one."""
        active = self.divergence != 0
        for x in self.of_stats():
            active = active | (x != 0)
        return active

    @property
    def further(self) -> int:
        """Number of statistics after the first five that the loss contains: lse, then the sum of the logits."""
        return 2 if self.logit_sum is not None else int(self.lse_square is not None)

    def plus(self, logp: torch.Tensor, entropy: torch.Tensor) -> "Coefficients":
        """Add the coefficients of a policy term."""
        return self._replace(
            logp=logp if self.logp is None else self.logp + logp,
            entropy=entropy if self.entropy is None else self.entropy + entropy,
        )

    def of_lse(self, lse: torch.Tensor) -> torch.Tensor | None:
        """Return d loss / d lse of rows with these values."""
        if self.lse_square is None:
            return self.lse
        slope = 2.0 * self.lse_square * lse
        return slope if self.lse is None else self.lse + slope


class PolicyPart(NamedTuple):
    """The policy term of a step: its inputs, and how a backend computes it."""

    inputs: PolicyInputs
    objective: Objective
    inv_normalizer: float
    loss: LossRun

    def terms(self, logp: torch.Tensor, entropy: torch.Tensor) -> PolicyTerms:
        """Return loss, metrics and coefficients; logp and entropy are (tokens,), of every row that counts."""
        terms = self.loss(logp, entropy, self.inputs, self.objective, self.inv_normalizer)
        return terms._replace(loss=terms.loss.detach())

    def coefficients(self, logp: torch.Tensor, entropy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d loss / d logp and d loss / d entropy of every row."""
        terms = self.terms(logp, entropy)
        return terms.d_logp, terms.d_entropy

    def may_have_gradient(self, tokens: int) -> torch.Tensor | None:
        """Return False for tokens without a gradient for all logits, (tokens,) bool. None: every token may have one.

        Only for a ratio of tokens: the gradient of a token then depends on that token alone.
        """
        i = self.inputs
        if i.advantage_level == "sequence":
            assert i.cu_seqlens is not None
            sizes = i.cu_seqlens.diff()
            i = i._replace(advantage=i.advantage.repeat_interleave(sizes, output_size=tokens))
        return may_carry_gradient(i, self.objective)


class ChunkPolicy:
    """The coefficients of a policy term whose ratio is of tokens, chunk of rows by chunk of rows.

    Each chunk evaluates the term on all tokens, of which only the rows so far have a value. That costs a
    millionth of the chunk's GEMMs, and every aggregation and normaliser has its usual meaning.
    """

    def __init__(self, part: PolicyPart, tokens: int, device: torch.device) -> None:
        self.part = part
        self.logp, self.entropy = (torch.zeros(tokens, dtype=torch.float32, device=device) for _ in range(2))

    def coefficients(
        self, index: torch.Tensor, logp: torch.Tensor, entropy: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return d loss / d logp and d loss / d entropy of the rows `index`."""
        self.logp[index], self.entropy[index] = logp, entropy
        by_logp, by_entropy = self.part.coefficients(self.logp, self.entropy)
        return by_logp[index], by_entropy[index]


Gradients = list[torch.Tensor | None]
PairRun = Callable[[PairProblem, Coefficients | None, PolicyPart | None], tuple[Stats, Gradients]]
"""(problem, coefficients, policy term) -> (statistics, gradients in the order of `problem.NAMES`).

Without coefficients: the statistics of every row that counts. With them: gradients of the rows that have
one. Divergence, teacher_logp and top1_agreement are those of the rows with a coefficient of the divergence,
the other statistics those of the rows with any coefficient; 0 elsewhere. With a policy term, its gradients
too, and logp and entropy of every row that counts; the coefficients then do not contain those of the policy term.
"""


LogitsRun = Callable[[LogitsPair, Coefficients, PolicyPart | None], tuple[Stats, torch.Tensor]]
"""(logits of both sides, coefficients, policy term) -> (statistics, d loss / d logits).

Rows as in `PairRun`.
"""


def policy_first(
    run: PairRun,
    forward: Callable[[HeadProblem], tuple[torch.Tensor, ...]],
    p: PairProblem,
    given: Coefficients | None,
    policy: PolicyPart,
) -> tuple[Stats, Gradients]:
    """Run a policy term whose ratio is of sequences: the statistics of all tokens, then the step.

    forward: problem -> the outputs of the `token_stats` kernels. The student's logits of the tokens with a
        gradient are computed twice.
    """
    assert given is not None
    own = forward(p.student)
    stats, gradients = run(p, given.plus(*policy.coefficients(own[0], own[1])), None)
    return with_student_stats(stats, own, given.divergence), gradients


def with_student_stats(stats: Stats, own: tuple[torch.Tensor, ...], coefficient: torch.Tensor) -> Stats:
    """Return the statistics with logp and entropy of `own`, and the rest only of rows with a coefficient."""
    active = coefficient != 0
    divergence, _, _, teacher_logp, top1, *further = stats
    kept = (torch.where(active, x, 0.0) for x in (divergence, teacher_logp, top1))
    value, of_teacher, agreement = kept
    return value, own[1], own[0], of_teacher, agreement, *further


class PairRows(NamedTuple):
    """Tokens sorted by what they need."""

    order: torch.Tensor
    """(tokens,) int64."""
    compared: int
    """Number of tokens that need both sides; they come first."""
    gradient: int
    """Number of tokens up to the last one that may have a gradient of the student's statistics."""
    forward: int
    """Number of tokens up to the last one that needs the student's statistics."""
    keep: torch.Tensor | None
    """(tokens,) bool, tokens that are needed, if all rows are computed (graph capture). Else None."""
    in_order: bool
    """Whether `order` is 0, 1, 2, ..."""


def pair_rows(
    p: PairProblem, given: Coefficients | None, policy: PolicyPart | None, capturing: bool = False
) -> PairRows:
    """Sort the tokens. Reads three numbers from the device, unless a CUDA graph is captured."""
    tokens, mask, device = p.student.tokens, p.student.options.mask, p.student.hidden.device
    if given is None and mask is None:
        return PairRows(torch.arange(tokens, device=device), tokens, tokens, tokens, None, True)
    needed = torch.ones(tokens, dtype=torch.bool, device=device) if mask is None else mask
    compared = gradient = forward = needed
    if given is not None:
        compared = needed & (given.divergence != 0)
        gradient = forward = needed & given.active()
        if policy is not None:
            may = policy.may_have_gradient(tokens)
            gradient, forward = needed if may is None else needed & (may | gradient), needed
    if capturing:
        return PairRows(torch.arange(tokens, device=device), tokens, tokens, tokens, forward, True)
    rank = 3 - compared.to(torch.int8) - gradient.to(torch.int8) - forward.to(torch.int8)
    first, second, third = torch.stack([compared.sum(), gradient.sum(), forward.sum()]).tolist()
    one_class = {first, second, third} <= {0, tokens}  # a stable sort keeps the order
    return PairRows(torch.argsort(rank, stable=True), first, second, third, None, one_class)


def check_pair(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    target: torch.Tensor | None,
    options: LogitOptions,
    teacher: Teacher,
    divergence: Divergence,
    memory_budget: int | None,
) -> PairProblem:
    """Check shapes, dtypes and devices of both sides. Fill in the default budget and a missing target."""
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    if target is None:
        target = torch.zeros(hidden.shape[0], dtype=torch.int64, device=hidden.device)
    student = check_head(op, hidden, weight, bias, target, options, memory_budget)
    check_teacher(op, teacher, student.tokens, student.vocab, hidden.device, student.dtype)
    if memory_budget is None:
        student = student._replace(memory_budget=default_budget(hidden, teacher.hidden, student.vocab))
    return PairProblem(student, teacher, divergence)


def default_budget(hidden: torch.Tensor, teacher_hidden: torch.Tensor | None, vocab: int) -> int:
    """Return 64 MiB, because dW adds its own memory; on a GPU 1024 rows of both sides, up to 1 GiB."""
    if hidden.device.type == "cpu":
        return MIN_BUDGET
    columns = hidden.shape[1] + (0 if teacher_hidden is None else teacher_hidden.shape[1])
    return max(MIN_BUDGET, min(GPU_ROWS * (10 * vocab + 8 * columns + 128), DEVICE_MAX_BUDGET))


def check_teacher(op: str, teacher: Teacher, tokens: int, vocab: int, device: torch.device, dtype: torch.dtype) -> None:
    """Check hidden states with a head, or logits, against the student's tokens, vocabulary, device and dtype."""
    if (teacher.hidden is None) == (teacher.logits is None):
        given = "neither" if teacher.hidden is None else "both"
        raise refuse(op, "teacher", "teacher_hidden= with teacher_weight=, or teacher_logits=", given, "Pass one.")
    if teacher.logits is not None:
        checks.check_unused(op, "teacher_logits=", teacher_weight=teacher.weight, teacher_bias=teacher.bias)
        checks.check_matrix(op, "teacher_logits", teacher.logits, "(tokens, vocab)")
        if tuple(teacher.logits.shape) != (tokens, vocab):
            raise refuse(
                op,
                "teacher_logits",
                f"of shape (tokens, vocab) = ({tokens}, {vocab}) like the student's",
                f"shape {tuple(teacher.logits.shape)}",
                "For the log-probabilities of a teacher's K most likely ids use linear_token_stats(..., ids=).",
            )
    else:
        _check_teacher_head(op, teacher, tokens, vocab)
    for name in ("hidden", "weight", "bias", "logits"):
        x = getattr(teacher, name)
        if x is None:
            continue
        name = f"teacher_{name}"
        checks.check_device(op, name, x, device)
        checks.check_constant(op, name, x)
        if x.dtype == torch.float64 and dtype != torch.float64:
            raise refuse(op, name, f"{dtype} or narrower, as the student", str(x.dtype), f"Call {name}.float().")
    check_options(op, tokens, device, teacher.options, "teacher_")


def _check_teacher_head(op: str, teacher: Teacher, tokens: int, vocab: int) -> None:
    hidden, weight, bias = teacher[:3]
    assert hidden is not None
    checks.check_matrix(op, "teacher_hidden", hidden, "(tokens, hidden)")
    if weight is None:
        raise refuse(op, "teacher_weight", "given with teacher_hidden=", "None", "Pass the teacher's lm_head.weight.")
    checks.check_matrix(op, "teacher_weight", weight, "(vocab, hidden)")
    if hidden.shape[0] != tokens:
        raise refuse(
            op,
            "teacher_hidden",
            f"of shape (tokens, hidden) with tokens = {tokens} like hidden",
            f"shape {tuple(hidden.shape)}",
            "Pack the same tokens on both sides.",
        )
    if tuple(weight.shape) != (vocab, hidden.shape[1]):
        raise refuse(
            op,
            "teacher_weight",
            f"of shape (vocab, hidden) = ({vocab}, {hidden.shape[1]})",
            f"shape {tuple(weight.shape)}",
            "The vocabularies must be the same; of padded ones take the common rows, weight[:vocab].",
        )
    if bias is not None:
        checks.check_vector(op, "teacher_bias", bias, checks.Rows(vocab, "the rows of teacher_weight", hidden.device))


def check_values_of(p: PairProblem) -> None:
    """Check the values before the first GEMM."""
    check_targets(p.student)
    check_teacher_temperature(p.student.op, p.teacher.options.temperature, p.student.options.mask)


def check_teacher_temperature(op: str, temperature: float | torch.Tensor, mask: torch.Tensor | None) -> None:
    """Check that the temperature is positive where the mask is True."""
    if isinstance(temperature, torch.Tensor):
        bad = ~(temperature > 0) if mask is None else ~(temperature > 0) & mask
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise refuse(
                op,
                "teacher_temperature",
                "> 0 in every row where mask is True",
                f"{float(temperature[row])} in row {row}",
                "Mask the row or fix its temperature.",
            )


def check_logits_values(op: str, p: LogitsPair) -> None:
    """Check targets and temperatures of both sides where the mask is True."""
    check_values(op, p.target, p.logits.shape[1], p.options.mask, p.options.temperature)
    check_teacher_temperature(op, p.teacher_options.temperature, p.options.mask)
