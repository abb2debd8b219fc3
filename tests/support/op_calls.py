"""One table of calls for every test and tool that runs each op. A new op needs only a row here.

    for call in op_calls.calls():
        problem = op_calls.Problem(op_calls.SMALL, device="cuda", dtype=torch.bfloat16)
        result = call.run(problem)          # outputs and gradients by name

A `Row` names an op of the registry, its public function, arguments for that function and options. A `Call`
is a row with one of its options. Values depend only on the sizes and on the argument's name, so they are
equal on every device. This file imports only torch and the public names of tokfuse, because
`tools/fingerprint.py` also runs it with older checkouts.
"""

import operator
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import torch

import tokfuse
from tokfuse import KL, CrossEntropy, KeepRule, Objective, PPOClip, algorithms
from tokfuse.influence import InfluenceSpec

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
Arguments = dict[str, Any]


@dataclass(frozen=True)
class Sizes:
    """The sizes of the tensors of a problem."""

    tokens: int
    vocab: int
    hidden: int
    sequences: int


SMALL = Sizes(tokens=12, vocab=37, hidden=8, sequences=4)
WIDE = Sizes(tokens=24, vocab=1003, hidden=16, sequences=5)  # rows that are not aligned
ALIGNED = Sizes(tokens=24, vocab=1024, hidden=16, sequences=5)
LONG = Sizes(tokens=3, vocab=40_003, hidden=8, sequences=2)  # several tiles per row
ONE = Sizes(tokens=1, vocab=1, hidden=1, sequences=1)  # the Triton JIT makes a constant of 1
LARGE = Sizes(tokens=70_000, vocab=151_936, hidden=64, sequences=35_000)  # for the meta device


class Problem:
    """Creates the arguments of a call.

    Args:
        sizes: sizes of every tensor.
        device: "meta" creates tensors without values.
        dtype: dtype of the large input. Other vectors are float32, or float64 if dtype is float64.
    """

    def __init__(self, sizes: Sizes, device: str = "cpu", dtype: torch.dtype = torch.float32) -> None:
        self.sizes, self.device, self.dtype = sizes, device, dtype
        self.vector_dtype = torch.float64 if dtype == torch.float64 else torch.float32

    def _made(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, make: Callable[..., torch.Tensor]
    ) -> torch.Tensor:
        if self.device == "meta":
            return torch.empty(shape, dtype=dtype, device="meta")
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        return make(shape, generator=generator).to(self.device, dtype)

    def normal(
        self, name: str, *shape: int, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return normally distributed floats."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.randn(size, generator=generator) * scale + shift

        return self._made(name, shape, dtype or self.vector_dtype, make)

    def vector(
        self, name: str, scale: float = 1.0, shift: float = 0.0, dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """Return (tokens,) normally distributed floats."""
        return self.normal(name, self.sizes.tokens, scale=scale, shift=shift, dtype=dtype)

    def positive(self, name: str, count: int | None = None) -> torch.Tensor:
        """Return (tokens,) floats in [0.5, 1.5)."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.rand(size, generator=generator) + 0.5

        return self._made(name, (self.sizes.tokens if count is None else count,), self.vector_dtype, make)

    def logits(self, name: str = "logits", scale: float = 3.0) -> torch.Tensor:
        """Return (tokens, vocab) logits."""
        return self.normal(name, self.sizes.tokens, self.sizes.vocab, scale=scale, dtype=self.dtype)

    def hidden(self, name: str = "hidden") -> torch.Tensor:
        """Return (tokens, hidden) states."""
        return self.normal(name, self.sizes.tokens, self.sizes.hidden, dtype=self.dtype)

    def weight(self) -> torch.Tensor:
        """Return a (vocab, hidden) weight."""
        return self.normal("weight", self.sizes.vocab, self.sizes.hidden, scale=0.7, dtype=self.dtype)

    def integers(self, name: str, high: int, count: int | None = None) -> torch.Tensor:
        """Return (tokens,) int64 in [0, high)."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.randint(high, size, generator=generator)

        return self._made(name, (self.sizes.tokens if count is None else count,), torch.int64, make)

    def target(self) -> torch.Tensor:
        """Return (tokens,) int64, columns of the logits."""
        return self.integers("target", self.sizes.vocab)

    def budget(self, rows: int) -> int:
        """Return a memory_budget for chunks of that many rows: float32 logits and two rows of hidden states."""
        columns = -(-self.sizes.vocab // 16) * 16
        return rows * (4 * columns + 8 * self.sizes.hidden + 64)

    def mask(self) -> torch.Tensor:
        """Return (tokens,) bool; five of six are True."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.arange(size[0]) % 6 != 4

        return self._made("mask", (self.sizes.tokens,), torch.bool, make)

    def borders(self) -> torch.Tensor:
        """Return (sequences + 1,) int32 cu_seqlens of different lengths; the second sequence is empty."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            borders = (torch.linspace(0, 1, size[0], dtype=torch.float64).square() * self.sizes.tokens).round()
            if len(borders) > 3:
                borders[2] = borders[1]
            return borders

        return self._made("borders", (self.sizes.sequences + 1,), torch.int32, make)

    def ids(self, width: int) -> torch.Tensor:
        """(tokens, width) int64 in [-1, vocab): -1 is padding."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.randint(-1, self.sizes.vocab, size, generator=generator)

        return self._made("ids", (self.sizes.tokens, width), torch.int64, make)

    def offsets(self, width: int) -> torch.Tensor:
        """(tokens + 1,) int64, borders of that many per token."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            return torch.arange(size[0]) * width

        return self._made("offsets", (self.sizes.tokens + 1,), torch.int64, make)

    def groups(self) -> torch.Tensor:
        """Return (sequences,) int64, the prompt of each sequence."""
        return self.integers("groups", max(1, self.sizes.sequences // 2), self.sizes.sequences)

    def advantage(self) -> torch.Tensor:
        """Return (tokens,) floats. One in five is exactly 0: a row without gradient."""

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            values = torch.randn(size, generator=generator)
            values[::5] = 0.0
            return values

        return self._made("advantage", (self.sizes.tokens,), self.vector_dtype, make)

    def difficult_logits(self, name: str = "logits") -> torch.Tensor:
        """Return logits with difficult rows.

        In order: masked columns, a fully masked row, a peak of 90, a NaN and an infinity.
        """

        def make(size: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
            z = torch.randn(size, generator=generator) * 3
            infinity, rows = float("inf"), size[0]
            z[0, ::3] = -infinity
            z[1 % rows] = -infinity
            z[2 % rows, size[1] // 2] = 90.0
            z[3 % rows, -1] = float("nan")
            z[4 % rows, 0] = infinity
            return z

        return self._made(f"difficult {name}", (self.sizes.tokens, self.sizes.vocab), self.dtype, make)


def nothing(problem: Problem) -> Arguments:
    """Return no further arguments."""
    return {}


@dataclass(frozen=True)
class Option:
    """A variation of a row's arguments.

    Args:
        arguments: arguments that replace or extend those of the row.
        differentiable: replaces that of the row; None keeps it.
        needs_triton: the backend cuda supports it only if Triton kernels can run too.
    """

    arguments: Callable[[Problem], Arguments] = nothing
    differentiable: tuple[str, ...] | None = None
    needs_triton: bool = False


@dataclass(frozen=True)
class Row:
    """One public function of one op.

    Args:
        op: name in the registry (`tokfuse.runtime.core.dispatch.table()`).
        function: public function in `tokfuse`; also the name of its profiler range.
        family: "rows" reads logits, "head" reads hidden states and the lm_head, "packed" reads (tokens,) vectors.
        arguments: keyword arguments of the function.
        differentiable: arguments that receive a gradient.
        options: variations by name.
        dtypes: dtypes of the large input, on every backend. The reference also accepts float64.
        in_place: an argument that the function overwrites.
        registered: True if the function chooses a backend. False: plain torch on every device.
        reads_host: the host reads values of a tensor, so that a CUDA graph cannot capture the call.
        ranged: True if the function has a range in profiles.
        traceable: True if torch.compile(fullgraph=True) accepts it.
        rich: options that together cover every branch of the op's interface. For tests that need a second
            per call.
    """

    op: str
    function: str
    family: str
    arguments: Callable[[Problem], Arguments]
    differentiable: tuple[str, ...] = ()
    options: dict[str, Option] = field(default_factory=dict)
    dtypes: tuple[torch.dtype, ...] = FLOATS
    in_place: str = ""
    registered: bool = True
    reads_host: bool = False
    ranged: bool = True
    traceable: bool = True
    rich: tuple[str, ...] = ()


@dataclass(frozen=True)
class Call:
    """A row with one of its options; `name` is unique."""

    row: Row
    option: str = ""

    @property
    def name(self) -> str:
        """ "<op>:<function>/<option>"; shorter if op and function have the same name."""
        row = self.row
        name = row.op if row.op == row.function else f"{row.op}:{row.function}"
        return f"{name}/{self.option}" if self.option else name

    def arguments(self, problem: Problem) -> Arguments:
        """Return keyword arguments of the function. Those that receive a gradient are leaves that require one."""
        given = self.row.arguments(problem) | self._option.arguments(problem)
        for name in self.differentiable(given):
            given[name].requires_grad_()
        return given

    def differentiable(self, given: Arguments) -> list[str]:
        """The given arguments that receive a gradient."""
        wanted = self._option.differentiable
        return [name for name in (self.row.differentiable if wanted is None else wanted) if given.get(name) is not None]

    def function(self) -> Callable[..., Any]:
        """Return the public function."""
        function: Callable[..., Any] = operator.attrgetter(self.row.function)(tokfuse)
        return function

    def run(self, problem: Problem, grad_loss: float = 1.0) -> dict[str, torch.Tensor]:
        """Run `apply` on the arguments of that problem."""
        return self.apply(self.arguments(problem), grad_loss)

    def apply(self, given: Arguments, grad_loss: float = 1.0) -> dict[str, torch.Tensor]:
        """Run the forward and, if something is differentiable, the backward. Return outputs and gradients by name."""
        out = self.function()(**given)
        results = tensors(out)
        if self.row.in_place:
            results[f"{self.row.in_place} in place"] = given[self.row.in_place]
        leaves = self.differentiable(given)
        if leaves:
            scalar(out, grad_loss).backward()
            results |= {f"grad {name}": given[name].grad for name in leaves if given[name].grad is not None}
        return {name: value.detach() for name, value in results.items()}

    @property
    def needs_triton(self) -> bool:
        """True if the backend cuda supports it only if Triton kernels can run too."""
        return self._option.needs_triton

    @property
    def _option(self) -> Option:
        return self.row.options[self.option] if self.option else Option()


INPUTS = ("batch",)  # fields of a result that contain the caller's inputs


def tensors(value: Any, name: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor of a result by its path of public fields."""
    if isinstance(value, torch.Tensor):
        return {name or "out": value}
    if isinstance(value, tuple):
        members = dict(zip(getattr(value, "_fields", map(str, range(len(value)))), value, strict=True))
    elif hasattr(value, "__dataclass_fields__"):  # torch.compile of torch 2.11 traces no is_dataclass
        members = {f.name: getattr(value, f.name) for f in fields(value) if f.name not in INPUTS and f.name[0] != "_"}
    else:
        return {}
    found: dict[str, torch.Tensor] = {}
    for key, member in members.items():
        found |= tensors(member, f"{name}.{key}" if name else key)
    return found


def scalar(out: Any, factor: float = 1.0) -> torch.Tensor:
    """Return a weighted sum of every differentiable output, with a different weight for each element."""
    terms = []
    for value in tensors(out).values():
        if value.requires_grad and value.dim() == 0:
            terms.append(value if factor == 1.0 else value * factor)
        elif value.requires_grad:
            count = torch.arange(value.numel(), device=value.device, dtype=value.dtype).view(value.shape)
            terms.append((torch.where(value.isfinite(), value, 0.0) * (torch.cos(count) * factor)).sum())
    return terms[0] if len(terms) == 1 else torch.stack([t.double() for t in terms]).sum()


# ----------------------------------------------------------------------------------------- options


def _constant(**arguments: Any) -> Option:
    return Option(lambda p: arguments)


TEMPERATURES = {
    "temperature": _constant(temperature=0.7),
    "temperatures": Option(lambda p: {"temperature": p.positive("temperature")}),
    "scale": _constant(logit_scale=0.5),
    "softcap": _constant(softcap=20.0, temperature=1.3),
}
MASK = Option(lambda p: {"mask": p.mask()})
IGNORED = {"ignored": Option(lambda p: {"target": torch.where(p.mask(), p.target(), -100), "ignore_index": -100})}
LOGIT_OPTIONS = TEMPERATURES | {
    "mask": MASK,
    "difficult": Option(lambda p: {"logits": p.difficult_logits()}),
    "all": Option(
        lambda p: {"temperature": p.positive("temperature"), "softcap": 15.0, "logit_scale": 0.8, "mask": p.mask()}
    ),
}
HEAD_OPTIONS = TEMPERATURES | {
    "mask": MASK,
    "bias": Option(lambda p: {"bias": p.normal("bias", p.sizes.vocab, dtype=p.dtype)}),
    "frozen": Option(differentiable=("hidden",)),
    "chunks": Option(lambda p: {"memory_budget": p.budget(max(1, p.sizes.tokens // 3))}),
    "one_chunk": _constant(memory_budget=1 << 60),
    "all": Option(
        lambda p: {
            "bias": p.normal("bias", p.sizes.vocab, dtype=p.dtype),
            "temperature": p.positive("temperature"),
            "softcap": 15.0,
            "logit_scale": 0.8,
            "mask": p.mask(),
            "memory_budget": p.budget(max(1, p.sizes.tokens // 3)),
        }
    ),
}


def _policy(p: Problem) -> Arguments:
    """Return the vectors of a policy loss: ratios on both sides of a clip, a mask, sequences."""
    return {
        "old_logp": p.vector("old_logp", 0.4, -3.6),
        "advantage": p.advantage(),
        "objective": Objective(shape=PPOClip(low=0.2, high=0.28)),
        "mask": p.mask(),
        "cu_seqlens": p.borders(),
        "normalizer": "batch",
    }


def _objective(signal: bool = False, reference: bool = False, **axes: Any) -> Option:
    """Return an objective with the given axes, and the vectors that it needs."""

    def arguments(p: Problem) -> Arguments:
        given: Arguments = {"objective": Objective(**axes)}
        if signal:
            given["signal"] = p.positive("signal")
        if reference:
            given["ref_logp"] = p.vector("ref_logp", 0.5, -3.6)
        return given

    return Option(arguments)


def _everything(p: Problem) -> Arguments:
    return {
        "objective": Objective(kl=KL(coef=0.1), anchor=KL(estimator="k2", coef=0.05), entropy_coef=0.02),
        "ref_logp": p.vector("ref_logp", 0.5, -3.6),
        "sampler_logp": p.vector("sampler_logp", 0.5, -3.6),
        "token_weight": p.positive("token_weight"),
        "kl_weight": p.positive("kl_weight"),
        "entropy_weight": p.positive("entropy_weight"),
        "anchor_logp": p.vector("anchor_logp", 0.5, -3.6),
        "anchor_weight": p.positive("anchor_weight"),
        "normalizer": 7.0,
    }


SHAPES = {
    "linear_logp": _objective(shape=tokfuse.LinearLogp()),
    "linear_ratio": _objective(shape=tokfuse.LinearRatio()),
    "ppo_dual_cap": _objective(shape=PPOClip(low=0.1, high=0.3, dual=2.5, cap=2.0)),
    "ppo_bounds": _objective(shape=PPOClip(low=None, high=None, ratio_min=0.5, ratio_max=1.5)),
    "stop_grad_clip": _objective(shape=tokfuse.StopGradClip(low=0.4, ratio_min=None)),
    "sigmoid_gate": _objective(shape=tokfuse.SigmoidGate(tau_positive=0.9)),
    "target_ratio": _objective(shape=tokfuse.TargetRatio(low=0.3, high=0.2), signal=True),
    "quadratic": _objective(shape=tokfuse.Quadratic(penalty=0.3)),
    "nft": _objective(shape=tokfuse.NFT(negative_floor=0.01, positive_floor=0.9), signal=True),
    "log_clamp": _objective(shape=tokfuse.LogClamp(bound=0.35), level="sequence"),
    "gamma": _objective(shape=tokfuse.Gamma(k_positive=1.5), level="sequence_sum"),
}
ESTIMATORS = {
    f"kl_{name}": _objective(kl=KL(estimator=name, coef=0.1), reference=True)
    for name in ("k1", "k2", "k3", "ratio_k3", "k1_straight", "k3_straight", "abs")
}
POLICY_OPTIONS = {
    "entropy": _objective(entropy_coef=0.02),
    "everything": Option(_everything),
    "on_policy": Option(lambda p: {"old_logp": None}),
    "sequence": _objective(level="sequence", aggregation="seq_mean_token_mean"),
    "sequence_token": _objective(level="sequence_token", entropy_coef=0.02),
    "sequence_sum": _objective(level="sequence_sum", log_ratio_clamp=2.0),
    "sequence_kl": _objective(level="sequence", kl=KL(coef=0.1), reference=True),
    "seq_mean_token_sum": _objective(aggregation="seq_mean_token_sum"),
    "advantage_of_sequences": Option(
        lambda p: {"advantage": p.normal("rewards", p.sizes.sequences), "advantage_level": "sequence"}
    ),
    **SHAPES,
    **ESTIMATORS,
}
IN_PLACE = ("entropy", "everything", "sequence", "advantage_of_sequences", "target_ratio", "quadratic")
ENTROPY = ("entropy", "everything", "sequence_token")


def _with_entropy(option: Option) -> Option:
    return Option(lambda p: option.arguments(p) | {"entropy": p.positive("entropy")})


RULES = (
    KeepRule("k3", "mean", high=1.0),
    KeepRule("ratio", "token", 0.5, 2.0, negative_only=True),
    KeepRule("k1", "max", low=-0.5),
)

# Of distill_step: the same policy terms.
WITH_POLICY = {
    f"policy_{name}": Option(lambda p, name=name: _policy(p) | POLICY_OPTIONS[name].arguments(p))
    for name in ("everything", "sequence", "on_policy", "target_ratio", "advantage_of_sequences")
}

# Of distill_step: cross entropies, alone and with a policy term.
WITH_CLASSES = {
    "cross_entropy": Option(lambda p: {"cross_entropy": CrossEntropy()}),
    "smoothed": Option(
        lambda p: {
            "cross_entropy": CrossEntropy(p.advantage(), p.positive("classes", p.sizes.vocab), 0.2, 0.01),
            "normalizer": 7.0,
        }
    ),
    "z_loss": Option(lambda p: {"cross_entropy": CrossEntropy(0.5, z_loss=0.01), "coef": None, "mask": None}),
    "policy_smoothed": Option(
        lambda p: _policy(p) | {"cross_entropy": CrossEntropy(label_smoothing=0.2), "target": p.target()}
    ),
}

# ----------------------------------------------------------------------------------------- the table


def _logits(p: Problem) -> Arguments:
    return {"logits": p.logits(), "target": p.target()}


def _step(p: Problem) -> Arguments:
    return _logits(p) | _policy(p)


def _head(p: Problem) -> Arguments:
    return {"hidden": p.hidden(), "weight": p.weight(), "target": p.target()}


def _heads(p: Problem) -> Arguments:
    """A student and a teacher of twice its hidden size."""
    teacher = {
        "teacher_hidden": p.normal("teacher_hidden", p.sizes.tokens, 2 * p.sizes.hidden, dtype=p.dtype),
        "teacher_weight": p.normal("teacher_weight", p.sizes.vocab, 2 * p.sizes.hidden, scale=0.5, dtype=p.dtype),
    }
    return _head(p) | teacher | {"kind": "jsd"}


TEACHER_OF_LOGITS = Option(
    lambda p: {"teacher_hidden": None, "teacher_weight": None, "teacher_logits": p.logits("teacher")}
)
# What the teacher's side adds to an option of the student's.
OF_TEACHER: dict[str, Callable[[Problem], Arguments]] = {
    "temperatures": lambda p: {"teacher_temperature": p.positive("teacher_temperature")},
    "softcap": lambda p: {"teacher_softcap": 10.0, "teacher_temperature": 0.9},
    "scale": lambda p: {"teacher_logit_scale": 0.8},
    "bias": lambda p: {"teacher_bias": p.normal("teacher_bias", p.sizes.vocab, dtype=p.dtype)},
    "all": lambda p: {"teacher_bias": p.normal("teacher_bias", p.sizes.vocab, dtype=p.dtype), "teacher_softcap": 12.0},
}


def _both(name: str, option: Option) -> Option:
    """An option of the student with what belongs to it on the teacher's side."""
    if name not in OF_TEACHER:
        return option
    return Option(lambda p: option.arguments(p) | OF_TEACHER[name](p), option.differentiable)


PAIR_OPTIONS = {name: _both(name, option) for name, option in HEAD_OPTIONS.items()} | {
    "forward": _constant(kind="kl_forward"),
    "reverse": _constant(kind="kl_reverse"),
    "beta": _constant(beta=0.2),
    "skew": _constant(kind="skew_reverse", alpha=0.3),
    "teacher_logits": TEACHER_OF_LOGITS,
    "no_target": _constant(target=None),
}


def _weights(p: Problem) -> Arguments:
    return {"coef": p.advantage(), "mask": p.mask(), "normalizer": "batch"}


def _preference(p: Problem, name: str, pairs: bool = True) -> Arguments:
    """Return a preference loss over pairs that are not adjacent in the batch, or over single responses."""
    seqs = p.sizes.sequences
    half = torch.arange(seqs // 2, device=p.device)
    given: Arguments = {"pairs": torch.stack([half + seqs // 2, half], 1)}
    if not pairs:
        given = {"desirable": p.groups() > 0, "kl": p.vector("kl").abs().mean()}
    batch = algorithms.PreferenceBatch(
        num_tokens=p.sizes.tokens,
        cu_seqlens=p.borders(),
        mask=p.mask(),
        ref_logp=p.vector("ref_logp", 0.5, -3.6),
        **given,
    )
    return {"loss": algorithms.make(name), "batch": batch}


def _kept(p: Problem) -> Arguments:
    """Return up to five ids per row and none for one row. Every other target is among them."""
    most = min(5, p.sizes.vocab)
    if p.device == "meta":
        ids, offsets = p.integers("kept", p.sizes.vocab, most * p.sizes.tokens), p.integers("", 1, p.sizes.tokens + 1)
        return {"kept_ids": ids, "kept_offsets": offsets}
    target = p.target().cpu()
    count = (torch.arange(p.sizes.tokens) + most) % (most + 1)
    start = torch.where(torch.arange(p.sizes.tokens) % 2 == 0, target, target + 1)
    ids = torch.cat([(torch.arange(n) * 7 + s) % p.sizes.vocab for s, n in zip(start, count, strict=True)])
    rows = torch.repeat_interleave(torch.arange(p.sizes.tokens), count)
    unique = torch.unique(rows * p.sizes.vocab + ids)  # in a small vocabulary ids repeat
    offsets = torch.zeros(p.sizes.tokens + 1, dtype=torch.int64)
    offsets[1:] = torch.bincount(unique // p.sizes.vocab, minlength=p.sizes.tokens).cumsum(0)
    return {"kept_ids": (unique % p.sizes.vocab).to(p.device), "kept_offsets": offsets.to(p.device)}


def _pair(p: Problem) -> Arguments:
    return {"logits_p": p.logits("p"), "logits_q": p.logits("q")}


def _x(p: Problem, name: str = "x") -> torch.Tensor:
    return p.vector(name, dtype=p.dtype)


def _reward(p: Problem, name: str = "reward") -> torch.Tensor:
    """Return (tokens,) rewards of 0 and 1, one per response, so that groups with equal rewards occur."""
    return p.integers(name, 2).to(p.dtype)


def _prompt(p: Problem) -> torch.Tensor:
    return p.integers("prompt", max(1, p.sizes.tokens // 3))


def _finished(p: Problem) -> torch.Tensor:
    return p.integers("finished", 2, p.sizes.sequences) > 0


def _stats(p: Problem, **options: Any) -> Any:
    return tokfuse.token_stats(**_logits(p), **options)


STATS_OPTIONS = (
    LOGIT_OPTIONS
    | IGNORED
    | {"bias_logits": Option(lambda p: {"bias_logits": p.logits("bias_logits"), "bias_scale": 0.3})}
)


IDS_OPTIONS = {
    "offsets": Option(lambda p: {"ids": p.ids(5).view(-1), "ids_offsets": p.offsets(5)}),
    "top_k": Option(lambda p: {"ids": None, "top_k": min(3, p.sizes.vocab)}),
}

KEPT = {"kept": Option(_kept)}
SMOOTHED = {"label_smoothing": 0.2, "z_loss": 0.01, "reduction": "none"}


def _losses(class_weight: str) -> dict[str, Option]:
    """Return the options of the loss. `class_weight` is the name of the class weights."""
    return {
        "mean": Option(lambda p: IGNORED["ignored"].arguments(p) | {"reduction": "mean"}),
        "class_weight": Option(lambda p: {class_weight: p.positive("classes", p.sizes.vocab), "reduction": "sum"}),
        "stats": _constant(return_stats=True),
        "unsmoothed": Option(lambda p: IGNORED["ignored"].arguments(p) | {"label_smoothing": 0.0}),
        "plain": _constant(label_smoothing=0.0, z_loss=0.0, reduction="sum"),
    }


PACKED = (torch.float32,)
ROWS: tuple[Row, ...] = (
    Row("token_stats", "token_stats", "rows", _logits, ("logits",), STATS_OPTIONS, rich=("all", "bias_logits")),
    Row(
        "extended_token_stats",
        "token_stats",
        "rows",
        lambda p: _logits(p) | {"second_temperature": 0.5, "moments": True},
        ("logits",),
        STATS_OPTIONS | {"second": _constant(moments=False), "moments": Option(lambda p: {"second_temperature": None})},
        rich=("all", "second", "moments"),
    ),
    Row(
        "token_stats_at",
        "token_stats",
        "rows",
        lambda p: _logits(p) | {"ids": p.ids(5)},
        ("logits",),
        STATS_OPTIONS | IDS_OPTIONS,
        rich=("all", "top_k"),
    ),
    Row(
        "kept_token_stats",
        "kept_token_stats",
        "rows",
        lambda p: _logits(p) | _kept(p),
        ("logits",),
        LOGIT_OPTIONS,
        rich=("all",),
    ),
    Row(
        "cross_entropy",
        "cross_entropy",
        "rows",
        lambda p: _logits(p) | SMOOTHED,
        ("logits",),
        LOGIT_OPTIONS | _losses("weight"),
        rich=("all", "class_weight", "stats", "unsmoothed"),
    ),
    Row(
        "paired_divergence",
        "paired_divergence",
        "rows",
        _pair,
        ("logits_p",),
        LOGIT_OPTIONS
        | {
            "difficult": Option(lambda p: {"logits_p": p.difficult_logits("p"), "logits_q": p.difficult_logits("q")}),
            "forward": _constant(kind="kl_forward"),
            "reverse": _constant(kind="kl_reverse"),
            "beta": _constant(beta=0.2),
            "skew_forward": _constant(kind="skew_forward", alpha=0.2),
            "skew_reverse": _constant(kind="skew_reverse"),
            "tvd": _constant(kind="tvd"),
        },
        rich=("all", "forward", "reverse"),
    ),
    Row(
        "linear_token_stats",
        "linear_token_stats",
        "head",
        _head,
        ("hidden", "weight", "bias"),
        HEAD_OPTIONS | IGNORED | KEPT,
        rich=("all", "kept"),
    ),
    Row(
        "linear_cross_entropy",
        "linear_cross_entropy",
        "head",
        lambda p: _head(p) | SMOOTHED,
        ("hidden", "weight", "bias"),
        HEAD_OPTIONS | _losses("class_weight"),
        rich=("all", "class_weight", "stats", "unsmoothed"),
    ),
    Row(
        "linear_token_stats_at",
        "linear_token_stats",
        "head",
        lambda p: _head(p) | {"ids": p.ids(5)},
        ("hidden", "weight", "bias"),
        HEAD_OPTIONS | IDS_OPTIONS,
        rich=("top_k",),
    ),
    Row(
        "linear_paired_divergence",
        "linear_paired_divergence",
        "head",
        _heads,
        ("hidden", "weight", "bias"),
        PAIR_OPTIONS,
        rich=("all",),
    ),
    Row(
        "linear_paired_divergence",
        "distill_step",
        "head",
        lambda p: _heads(p) | _weights(p),
        ("hidden", "weight", "bias"),
        PAIR_OPTIONS
        | WITH_POLICY
        | WITH_CLASSES
        | {"influence": Option(lambda p: {"cu_seqlens": p.borders(), "influence": InfluenceSpec(rank=8)})},
        rich=("teacher_logits", "policy_everything", "policy_sequence", "smoothed", "policy_smoothed"),
    ),
    Row(
        "distill_step",
        "distill_step",
        "rows",
        lambda p: _logits(p) | _weights(p) | {"teacher_logits": p.logits("teacher"), "kind": "jsd"},
        ("logits",),
        {name: _both(name, option) for name, option in TEMPERATURES.items()}
        | {
            "difficult": Option(
                lambda p: {"logits": p.difficult_logits(), "teacher_logits": p.difficult_logits("teacher")}
            ),
            "forward": _constant(kind="kl_forward"),
            "reverse": _constant(kind="kl_reverse"),
            "beta": _constant(beta=0.2, coef=None, mask=None, normalizer=None),
            "tvd": _constant(kind="tvd"),
        }
        | WITH_POLICY
        | WITH_CLASSES,
        rich=("softcap", "policy_everything", "smoothed", "policy_smoothed"),
    ),
    Row(
        "policy_loss",
        "policy_loss",
        "packed",
        lambda p: {"logp": p.vector("logp", 0.4, -3.6, dtype=p.dtype)} | _policy(p),
        ("logp", "entropy"),
        {name: _with_entropy(o) if name in ENTROPY else o for name, o in POLICY_OPTIONS.items()},
        rich=("everything", "sequence"),
    ),
    Row(
        "policy_step",
        "policy_step",
        "rows",
        _step,
        ("logits",),
        LOGIT_OPTIONS | IGNORED | POLICY_OPTIONS | KEPT,
        rich=("everything", "sequence"),
    ),
    Row(
        "policy_step",
        "policy_step_",
        "rows",
        _step,
        (),
        LOGIT_OPTIONS | {name: POLICY_OPTIONS[name] for name in IN_PLACE} | KEPT,
        in_place="logits",
        traceable=False,
        rich=("everything",),
    ),
    Row(
        "policy_step_hidden",
        "policy_step",
        "head",
        lambda p: _head(p) | _policy(p),
        ("hidden", "weight", "bias"),
        HEAD_OPTIONS
        | POLICY_OPTIONS
        | KEPT
        | {
            "compact": Option(lambda p: {"compact_clipped": True}, needs_triton=True),
            "influence": _constant(influence=InfluenceSpec(rank=8)),
        },
        rich=("all", "sequence", "kept"),
    ),
    Row(
        "linear_token_stats",
        "algorithms.preference_step",
        "head",
        lambda p: _head(p) | _preference(p, "dpo") | {"normalizer": "batch"},
        ("hidden", "weight", "bias"),
        {name: option for name, option in HEAD_OPTIONS.items() if name not in ("mask", "all")}
        | {
            "ipo": Option(lambda p: _preference(p, "ipo")),
            "apo": Option(lambda p: _preference(p, "apo_zero")),
            "kto": Option(lambda p: _preference(p, "kto", pairs=False)),
            "bco": Option(
                lambda p: _preference(p, "bco_pair") | {"state": algorithms.make("bco_pair").initial_state()}
            ),
            "influence": _constant(influence=InfluenceSpec(rank=8)),
        },
        reads_host=True,
        ranged=False,
        traceable=False,
    ),
    Row(
        "token_stats",
        "algorithms.preference_step",
        "rows",
        lambda p: _logits(p) | _preference(p, "dpo"),
        ("logits",),
        {name: option for name, option in LOGIT_OPTIONS.items() if name not in ("mask", "all", "difficult")},
        reads_host=True,
        ranged=False,
        traceable=False,
    ),
    Row(
        "influence",
        "influence.sketch",
        "head",
        lambda p: {
            "grad_hidden": p.hidden("grad_hidden"),
            "hidden": p.hidden(),
            "cu_seqlens": p.borders(),
            "rank": 8,
            "max_seqlen": p.sizes.tokens,
        },
        options={"seed": _constant(seed=3), "no_projection": _constant(rank=None)},
        traceable=False,  # the op draws its projections
    ),
    Row(
        "influence",
        "influence.head_norms",
        "head",
        lambda p: {"logit_norms": p.positive("norms"), "hidden": p.hidden()},
        registered=False,
    ),
    Row("influence", "influence.hidden_norms", "head", lambda p: {"grad_hidden": p.hidden()}, registered=False),
    Row(
        "influence",
        "influence.logit_norms",
        "head",
        lambda p: {"stats": _stats(p), "coefficient": p.advantage()},
        options={
            "scaled": Option(
                lambda p: {
                    "stats": _stats(p, temperature=0.7, logit_scale=0.5),
                    "temperature": 0.7,
                    "logit_scale": 0.5,
                    "softcap": None,  # the only supported value
                }
            ),
            "entropy": Option(
                lambda p: {"stats": _stats(p, moments=True), "entropy_coefficient": p.vector("entropy_coefficient")}
            ),
        },
        registered=False,
    ),
    Row(
        "gae",
        "gae",
        "packed",
        lambda p: {"reward": _x(p), "value": _x(p, "value"), "cu_seqlens": p.borders(), "gamma": 0.99, "lam": 0.95},
        options={
            "mask": MASK,
            "lam_of_sequences": Option(lambda p: {"lam": p.positive("lam", p.sizes.sequences) * 0.6}),
            "finished": Option(lambda p: {"finished": _finished(p), "mask": p.mask()}),
            "length_adaptive": _constant(lam=1.0, length_adaptive_alpha=0.05),
        },
        dtypes=PACKED,
        rich=("finished",),
    ),
    Row(
        "vtrace",
        "vtrace",
        "packed",
        lambda p: {
            "log_ratio": _x(p, "log_ratio"),
            "reward": _x(p),
            "value": _x(p, "value"),
            "cu_seqlens": p.borders(),
            "gamma": 0.9,
        },
        options={
            "mask": MASK,
            "bounds": _constant(lam=0.9, rho_bar=2.0, c_bar=None),
            "finished": Option(lambda p: {"finished": _finished(p)}),
        },
        dtypes=PACKED,
        rich=("finished",),
    ),
    Row(
        "whiten",
        "whiten",
        "packed",
        lambda p: {"x": _x(p)},
        options={
            "mask": MASK,
            "no_shift": _constant(shift_mean=False, eps=1e-3),
            "given": Option(lambda p: {"mean": p.vector("mean")[:1].sum(), "var": p.positive("var")[:1].sum()}),
        },
        dtypes=PACKED,
        rich=("mask",),
    ),
    Row(
        "group_advantage",
        "group_advantage",
        "packed",
        lambda p: {"reward": _reward(p), "group_ids": _prompt(p)},
        options={
            **{
                kind: _constant(kind=kind)
                for kind in ("dr_grpo", "rloo", "gbpo_target", "pass_at_k", "maxrl", "reinforce")
            },
            "opo": Option(lambda p: {"kind": "opo", "lengths": p.integers("lengths", 9) + 1}),
            "remax": Option(
                lambda p: {
                    "kind": "remax",
                    "greedy_reward": _reward(p, "greedy"),
                    "group_ids": None,
                    "scale": "batch_std",
                }
            ),
            "batch": _constant(scale="batch_std", std="population"),
            "baseline": _constant(baseline="leave_one_out", scale="mean"),
            "singleton": _constant(singleton="zero", eps=1e-4),
        },
        dtypes=PACKED,
        rich=("remax", "gbpo_target"),
    ),
    Row(
        "segment_moments",
        "segment_moments",
        "packed",
        lambda p: {"values": _x(p), "segment_ids": p.integers("ids", 3), "num_segments": 3},
        ("values",),
        {
            "mask": MASK,
            "sequences": Option(lambda p: {"segment_ids": None, "num_segments": None, "cu_seqlens": p.borders()}),
        },
        dtypes=(torch.float32, torch.float64),
        rich=("mask", "sequences"),
    ),
    Row(
        "offpolicy_weights",
        "offpolicy_weights",
        "packed",
        lambda p: {"logp": _x(p, "logp"), "behavior_logp": _x(p, "behavior")},
        options={
            "truncate": _constant(mode="truncate", high=2.0),
            "mask_mode": _constant(mode="mask", low=0.5, high=2.0),
            "switch": _constant(mode="switch", high=2.0),
            "shrink": _constant(mode="shrink", lam=2.0),
            "subgaussian": _constant(mode="subgaussian", lam=0.5),
            "tempered": _constant(mode="tempered", power=0.5),
            "mask": MASK,
            "batch": _constant(normalize="batch"),
            "sequence": Option(lambda p: {"level": "sequence", "cu_seqlens": p.borders()}),
            "geometric": Option(lambda p: {"level": "geometric", "cu_seqlens": p.borders(), "mask": p.mask()}),
            "snips": Option(lambda p: {"mode": "snips", "cu_seqlens": p.borders(), "group_ids": p.groups()}),
            "external": Option(
                lambda p: {
                    "level": "external",
                    "logp": None,
                    "behavior_logp": None,
                    "propensity": p.positive("propensity") / 2,
                    "normalize": "group",
                    "group_ids": _prompt(p),
                }
            ),
            "rules": Option(
                lambda p: {
                    "mode": "keep",
                    "rules": RULES,
                    "cu_seqlens": p.borders(),
                    "advantage": p.vector("advantage"),
                    "normalize": "group",
                    "group_ids": p.groups(),
                }
            ),
        },
        dtypes=PACKED,
        rich=("rules", "external"),
    ),
    Row(
        "ope",
        "ope",
        "packed",
        lambda p: {"weight": p.positive("weight").to(p.dtype), "reward": _x(p)},
        options={
            "mask": MASK,
            "doubly_robust": Option(lambda p: {"q_pi": p.vector("q_pi"), "q_a": p.vector("q_a"), "mask": p.mask()}),
            "direct": Option(lambda p: {"q_pi": p.vector("q_pi")}),
        },
        dtypes=PACKED,
        rich=("doubly_robust",),
    ),
    # The next row goes here.
)


def calls(*families: str, options: str = "every") -> Iterator[Call]:
    """Return the calls of the rows of these families, or of all rows.

    options: "every" for all options; "rich" for the row's `rich` options; "none" for one call per row.
    """
    for row in ROWS:
        if not families or row.family in families:
            yield Call(row)
            names = {"every": tuple(row.options), "rich": row.rich, "none": ()}[options]
            yield from (Call(row, name) for name in names)


def named(name: str) -> Call:
    """Return the call with that name."""
    (found,) = (call for call in calls() if call.name == name)
    return found
