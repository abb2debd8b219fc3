"""Arguments of the ops that compare a student's head with a teacher: the checks and the derived values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import FLAT_SCHEMA_WITHOUT_BIAS, LogitOptions, check_options, check_values
from tokfuse.runtime.lm_head.problem import GPU_ROWS, HEAD_SCHEMA, MIN_BUDGET, HeadProblem, check_head, check_targets

Stats = tuple[torch.Tensor, ...]
"""divergence, entropy, logp, teacher_logp, top1_agreement: (tokens,) each."""
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
    op: str
    """The public op, for messages."""

    def teacher_head(self, memory_budget: int) -> HeadProblem | None:
        """Return the teacher as a head, or None if it is given as logits."""
        t = self.teacher
        if t.hidden is None or t.weight is None:
            return None
        return HeadProblem(t.hidden, t.weight, t.bias, self.student.target, t.options, memory_budget)

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
            HeadProblem(hidden, weight, bias, target, options, memory_budget),
            Teacher(teacher_hidden, teacher_weight, teacher_bias, teacher_logits, teacher_options),
            Divergence(kind, mix_weight),
            op,
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
    """d loss / d of what the student can be differentiated by, (tokens,) each."""

    divergence: torch.Tensor
    logp: torch.Tensor | None = None
    entropy: torch.Tensor | None = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Coefficients":
        """Apply `change` to every vector."""
        logp = None if self.logp is None else change(self.logp)
        entropy = None if self.entropy is None else change(self.entropy)
        return Coefficients(change(self.divergence), logp, entropy)

    def active(self) -> torch.Tensor:
        """(tokens,) bool: rows with a gradient. NaN counts as one."""
        active = self.divergence != 0
        for x in (self.logp, self.entropy):
            active = active if x is None else active | (x != 0)
        return active


Gradients = list[torch.Tensor | None]
PairRun = Callable[[PairProblem, Coefficients | None], tuple[Stats, Gradients]]
"""(problem, coefficients) -> (statistics, gradients in the order of `problem.NAMES`).

Without coefficients: the statistics of every row that counts. With them: statistics and gradients
of the rows that have one, and 0 elsewhere.
"""


LogitsRun = Callable[[LogitsPair, torch.Tensor], tuple[Stats, torch.Tensor]]
"""(logits of both sides, d loss / d divergence (tokens,)) -> (statistics, d loss / d logits).

Statistics and gradients of the rows with a coefficient, and 0 elsewhere.
"""


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
        student = student._replace(memory_budget=_default_budget(student, teacher))
    return PairProblem(student, teacher, divergence, op)


def _default_budget(student: HeadProblem, teacher: Teacher) -> int:
    """Return 64 MiB, because dW adds its own memory; on a GPU 1024 rows of both sides, up to 1 GiB."""
    if student.hidden.device.type == "cpu":
        return MIN_BUDGET
    columns = student.hidden.shape[1] + (0 if teacher.hidden is None else teacher.hidden.shape[1])
    return max(MIN_BUDGET, min(GPU_ROWS * (10 * student.vocab + 8 * columns + 128), DEVICE_MAX_BUDGET))


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
    check_targets(p.op, p.student)
    check_teacher_temperature(p.op, p.teacher.options.temperature, p.student.options.mask)


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
