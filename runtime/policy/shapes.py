"""The table of shapes: the policy term of an objective, one class each.

A class holds all that the rest of the library knows of a shape: its parameters with their bounds
and their slots in the kernels, whether it reads `signal`, whether it is 0 without an advantage, and
its formula, differentiable and exact in float64. `SHAPES` lists the classes by their code.

This module is the source because only Python has all of it, and because the library must run
without its native module. `python tools/write_shapes.py` writes the other two copies:
csrc/common/shapes.h for C++ and CUDA, triton_kernels/shape_codes.py for Triton. Tests compare both,
and the table that the native module was compiled with, to this one.

Notation: A advantage, r = exp(log_ratio), sg a stopped gradient.
"""

import functools
import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.core.errors import refuse

INF = float("inf")
WITHOUT_KERNELS = "shapes without kernels"  # what the reference backend declares: any subclass of Shape
SLOTS = 6  # numbers that a kernel takes for the parameters of a shape


class Bound(NamedTuple):
    """The values that a number may take."""

    low: float = -INF
    high: float = INF
    open_low: bool = False
    open_high: bool = False

    def admits(self, value: float) -> bool:
        """Whether the value lies between the bounds; False for NaN."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        high = f" and {'<' if self.open_high else '<='} {self.high:g}" if self.high < INF else ""
        return f"{'>' if self.open_low else '>='} {self.low:g}{high}"


def require_within(spec: object, name: str, bound: Bound) -> None:
    """Raise ValueError unless the field of that name is a number within the bound."""
    value = getattr(spec, name)
    if not isinstance(value, int | float) or not bound.admits(value):
        raise ValueError(f"{type(spec).__name__}: {name} must be {bound}; got {value!r}.")


Positive = Annotated[float, Bound(0.0, open_low=True)]
NonNegative = Annotated[float, Bound(0.0)]
Width = Annotated[float, Bound(0.0, 1.0)]
Share = Annotated[float, Bound(0.0, 1.0, open_low=True, open_high=True)]


class TermInputs(NamedTuple):
    """What the policy term of a token depends on, (tokens,) each."""

    log_ratio: torch.Tensor
    """At the objective's level, between its bounds."""
    ratio: torch.Tensor
    """exp(log_ratio)."""
    logp: torch.Tensor
    advantage: torch.Tensor
    signal: Any
    """None unless the shape `needs_signal`."""


Flags = dict[str, torch.Tensor]
"""Metric ("clip_low", "clip_high", "dual_clip") -> (tokens,) bool, the tokens that it counts."""


class Shape:
    """Base of the shapes.

    A shape is a frozen dataclass: its fields are its parameters, their bounds are in the
    annotations. Without a `code` no kernel has it, and it runs on the reference backend only.
    """

    code: ClassVar[int | None] = None
    """The shape in the kernels: its place in `SHAPES`."""
    needs_signal: ClassVar[bool] = False
    """Whether the term reads `signal`; a call without one is then refused."""
    zero_without_advantage: ClassVar[bool] = True
    """Whether the term has no gradient where the advantage is 0."""
    bounded: ClassVar[dict[str, tuple[Bound, bool]]] = {}
    """Parameter -> its bound, and whether it may be None."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in vars(cls) and {"term", "bound_tokens", "bound_level"} & set(vars(cls)):
            cls.code = None  # another formula than that of the kernels
        cls.bounded = dict(cls.bounded)
        for name, hint in inspect.get_annotations(cls).items():
            options = (hint, *get_args(hint))
            found = [m for x in options for m in getattr(x, "__metadata__", ()) if isinstance(m, Bound)]
            if found:
                cls.bounded[name] = (found[0], type(None) in options)

    def __post_init__(self) -> None:
        for name, (bound, optional) in self.bounded.items():
            if not optional or getattr(self, name) is not None:
                require_within(self, name, bound)

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """Names of the parameters that the kernels take, in the order of their slots."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def parameters(self) -> tuple[float, ...]:
        """Their values."""
        return tuple(float(getattr(self, name)) for name in self.slots())

    def check_signal(self, op: str, given: bool) -> None:
        """Refuse a call without the signal that the term reads, or with one that it ignores."""
        name = f"shape {type(self).__name__}"
        if self.needs_signal and not given:
            raise refuse(op, "signal", f"given for {name}", "None", "Pass one value per token.")
        if given and not self.needs_signal:
            raise refuse(op, "signal", f"None with {name}", "a tensor", "It would be ignored.")

    # The formula: the specification that the kernels are tested against.

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """The loss of each token, and which tokens a bound stops."""
        raise NotImplementedError(f"{type(self).__name__} must define term(x), the loss of each token.")

    def bound_tokens(self, log_ratio: torch.Tensor, advantage: torch.Tensor, clamp: float) -> torch.Tensor:
        """The log-ratio of each token, bounded before the objective's level; gradient 0 outside."""
        return log_ratio.clamp(-clamp, clamp)

    def bound_level(self, log_ratio: torch.Tensor, clamp: float) -> torch.Tensor:
        """The log-ratio at the objective's level, bounded; gradient 0 outside."""
        return log_ratio.clamp(-clamp, clamp)


def either(condition: torch.Tensor, yes: float, no: float, like: torch.Tensor) -> torch.Tensor:
    """One of two numbers per token, in the dtype of `like`: torch.where rounds them to float32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def straight_through(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """`value`, with the gradient of the other."""
    return gradient + (value - gradient).detach()


@dataclass(frozen=True, kw_only=True)
class LinearLogp(Shape):
    """-A * logp: REINFORCE, GPG (arXiv 2504.02546), exact. No ratio, no clip."""

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-A logp."""
        return -x.advantage * x.logp, {}


@dataclass(frozen=True, kw_only=True)
class LinearRatio(Shape):
    """-A * r: the unclipped surrogate, exact."""

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-A r."""
        return -x.advantage * x.ratio, {}


class _Bounded(Shape):
    """Lower and upper ratio bounds, given as widths around 1 or as absolute bounds."""

    low: float | None
    high: float | None
    ratio_min: float | None
    ratio_max: float | None

    def __post_init__(self) -> None:
        super().__post_init__()
        for width, bound in (("low", "ratio_min"), ("high", "ratio_max")):
            given = [n for n in (width, bound) if getattr(self, n) is not None]
            if len(given) != 1:
                raise ValueError(
                    f"{type(self).__name__}: give exactly one of {width} (a width around 1) and "
                    f"{bound} (a bound on the ratio itself); got {given or 'neither'}."
                )
        if not self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"{type(self).__name__}: bounds must be ordered; got {self.bounds}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """(ratio_min, ratio_max)."""
        low = self.ratio_min if self.low is None else 1.0 - self.low
        high = self.ratio_max if self.high is None else 1.0 + self.high
        assert low is not None and high is not None
        return low, high

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """The bounds on the ratio, however they were given."""
        return "ratio_min", "ratio_max"

    def parameters(self) -> tuple[float, ...]:
        """(ratio_min, ratio_max)."""
        return self.bounds

    def _flags(self, x: TermInputs) -> Flags:
        a, r, (low, high) = x.advantage, x.ratio, self.bounds
        return {"clip_low": (a < 0) & (r < low), "clip_high": (a > 0) & (r > high)}


@dataclass(frozen=True, kw_only=True)
class PPOClip(_Bounded):
    """max(-A min(r, cap), -A clip(r, ratio_min, ratio_max)); `dual`: at most -A dual for A < 0.

    PPO (arXiv 1707.06347), DAPO's asymmetric widths (2503.14476), BAPO's explicit bounds
    (2510.18927), dual clip (1912.09729), the two-sided clip of INTELLECT-2 and TRL `delta` (`cap`).
    All exact.

    Args:
        low, high: widths: the ratio is clipped to [1 - low, 1 + high].
        ratio_min, ratio_max: absolute bounds instead of a width; set that width to None.
        dual: bound c > 1 on the loss of negative advantages; None: off.
        cap: two-sided bound on the ratio of the unclipped branch, above ratio_max; None: off.
    """

    low: Width | None = 0.2
    high: NonNegative | None = 0.2
    ratio_min: NonNegative | None = None
    ratio_max: NonNegative | None = None
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual is not None:
            require_within(self, "dual", Bound(max(1.0, self.bounds[0]), open_low=True))
        if self.cap is not None:
            require_within(self, "cap", Bound(self.bounds[1], open_low=True))

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """The bounds on the ratio; dual and cap are infinite where they are off."""
        return "ratio_min", "ratio_max", "dual", "cap"

    def parameters(self) -> tuple[float, ...]:
        """(ratio_min, ratio_max, dual, cap)."""
        dual = INF if self.dual is None else self.dual
        return (*self.bounds, dual, INF if self.cap is None else self.cap)

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """The maximum of the two branches; equal (no clip) takes the first, whose gradient is -A r."""
        a, r, (low, high) = x.advantage, x.ratio, self.bounds
        free = r if self.cap is None else r.clamp(max=self.cap)
        clipped = r.clamp(low, high)
        loss = torch.where(-a * free >= -a * clipped, -a * free, -a * clipped)
        flags = self._flags(x)
        bound = min(self.dual or INF, self.cap or INF)
        if self.dual is not None:
            loss = torch.where((a < 0) & (loss > -a * self.dual), -a * self.dual, loss)
        flags["dual_clip"] = (a < 0) & (r > bound)
        return loss, flags


@dataclass(frozen=True, kw_only=True)
class StopGradClip(_Bounded):
    """-sg(clip(r, ratio_min, ratio_max)) * A * logp: CISPO (arXiv 2506.13585), exact.

    The paper bounds from above only: `ratio_min=0`. TRL's `epsilon_high` is `ratio_max` here (a
    bound), verl's `clip_ratio_high` is `high` (a width).
    """

    low: Width | None = None
    high: NonNegative | None = None
    ratio_min: NonNegative | None = 0.0
    ratio_max: NonNegative | None = 5.0

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-sg(clip(r)) A logp."""
        low, high = self.bounds
        return -x.ratio.clamp(low, high).detach() * x.advantage * x.logp, self._flags(x)


@dataclass(frozen=True, kw_only=True)
class SigmoidGate(Shape):
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO (arXiv 2511.20347), exact.

    The value at r = 1 is -2 A / tau, the gradient there is -A.
    """

    tau_positive: Positive = 1.0
    tau_negative: Positive = 1.05

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-(4 / tau) sigmoid(tau (r - 1)) A."""
        tau = either(x.advantage > 0, self.tau_positive, self.tau_negative, x.ratio)
        return -(4 / tau) * torch.sigmoid(tau * (x.ratio - 1)) * x.advantage, {}


@dataclass(frozen=True, kw_only=True)
class TargetRatio(Shape):
    """|r - target| |A|, target = 1 - low + (low + high) sigmoid(signal).

    BPO, GBPO (arXiv 2604.18578), exact.

    `signal` is a per-token input of `policy_loss` (GBPO: (R - median) / std / tau).
    """

    needs_signal: ClassVar[bool] = True
    low: Width = 0.2
    high: NonNegative = 0.2

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """|r - target| |A|."""
        target = 1 - self.low + (self.low + self.high) * torch.sigmoid(x.signal)
        return (x.ratio - target).abs() * x.advantage.abs(), {}


@dataclass(frozen=True, kw_only=True)
class Quadratic(Shape):
    """-A r + penalty (r - 1)^2: R2VPO (arXiv 2601.03320), reconstructed."""

    zero_without_advantage: ClassVar[bool] = False
    penalty: NonNegative

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-A r + penalty (r - 1)^2."""
        return -x.advantage * x.ratio + self.penalty * (x.ratio - 1) ** 2, {}


@dataclass(frozen=True, kw_only=True)
class NFT(Shape):
    """A > 0: -A log r; A < 0: -|A| log((1 - q r) / (1 - q)): NFT (arXiv 2505.18116), exact.

    `signal` is the group's success rate q, clamped to [rate_min, rate_max]. The logarithms'
    arguments are floored straight-through: the value is clipped, the gradient kept.
    """

    needs_signal: ClassVar[bool] = True
    negative_floor: Positive = 1.0
    positive_floor: NonNegative = 0.0
    log_ratio_max: Positive = 10.0
    rate_min: Share = 0.02
    rate_max: Share = 0.98

    def __post_init__(self) -> None:
        super().__post_init__()
        require_within(self, "rate_max", Bound(self.rate_min))

    def bound_level(self, log_ratio: torch.Tensor, clamp: float) -> torch.Tensor:
        """At most log_ratio_max."""
        return log_ratio.clamp(-clamp, min(clamp, self.log_ratio_max))

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-A log r, or -|A| log((1 - q r) / (1 - q))."""
        a, r = x.advantage, x.ratio
        q = x.signal.clamp(self.rate_min, self.rate_max)
        rest = (1 - q * r) / (1 - q)
        positive = straight_through(r.clamp(min=self.positive_floor), r)
        negative = straight_through(rest.clamp(min=self.negative_floor), rest)
        argument = torch.where(a > 0, positive, torch.where(a < 0, negative, 1.0))
        return -a.abs() * argument.log(), {}


@dataclass(frozen=True, kw_only=True)
class LogClamp(Shape):
    """-A exp(d), d the log-ratio clamped pessimistically by the sign of A to +-bound.

    With level="sequence" this is GMPO (arXiv 2507.20673), exact.
    """

    bound: Positive = 0.4

    def bound_tokens(self, log_ratio: torch.Tensor, advantage: torch.Tensor, clamp: float) -> torch.Tensor:
        """Narrowed to the bound on the side that would improve the objective."""
        e = min(self.bound, clamp)
        high = either(advantage >= 0, e, clamp, log_ratio)
        low = either(advantage <= 0, -e, -clamp, log_ratio)
        return torch.minimum(torch.maximum(log_ratio, low), high)

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-A r of the bounded ratio."""
        return -x.advantage * x.ratio, {}


@dataclass(frozen=True, kw_only=True)
class Gamma(Shape):
    """-sg(e^l r^k e^(-l r)) A logp, k and l by the sign of A.

    With level="sequence_sum" this is VESPO, exact.
    """

    k_positive: NonNegative = 2.0
    lam_positive: NonNegative = 3.0
    k_negative: NonNegative = 3.0
    lam_negative: NonNegative = 2.0

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """-sg(e^(l + k log r - l r)) A logp."""
        k = either(x.advantage >= 0, self.k_positive, self.k_negative, x.ratio)
        lam = either(x.advantage >= 0, self.lam_positive, self.lam_negative, x.ratio)
        return -(lam + k * x.log_ratio - lam * x.ratio).exp().detach() * x.advantage * x.logp, {}


SHAPES: tuple[type[Shape], ...] = (
    LinearLogp,
    LinearRatio,
    PPOClip,
    StopGradClip,
    SigmoidGate,
    TargetRatio,
    Quadratic,
    NFT,
    LogClamp,
    Gamma,
    # The next one goes here.
)
"""The shapes that the kernels have; the place of one is its code."""

for _code, _shape in enumerate(SHAPES):
    _shape.code = _code


def table() -> dict[str, tuple[int | None, tuple[str, ...], bool, bool]]:
    """`SHAPES` as plain values: name -> (code, parameters, needs_signal, zero_without_advantage)."""
    return {s.__name__: (s.code, s.slots(), s.needs_signal, s.zero_without_advantage) for s in SHAPES}


@functools.cache
def require_compiled_table() -> None:
    """Raise RuntimeError where the native module was compiled with another table than this one."""
    module = native.module()
    compiled = table() if module is None else getattr(module, "shapes", {})
    if compiled != table():
        names = sorted(name for name, row in table().items() if compiled.get(name) != row)
        raise RuntimeError(
            "tokfuse._native was compiled with another table of shapes "
            f"(different here: {', '.join(names) or 'none, it has more'}). Run python tools/write_shapes.py and "
            "reinstall tokfuse."
        )
