"""The table of shapes. A shape is the policy term of an objective; each shape is one class.

The class defines everything that the library needs to know about its shape: the parameters with their
bounds and kernel slots, whether it reads `signal`, whether it is 0 without an advantage, and its formula.
The formula is differentiable and exact in float64. `SHAPES` lists the classes by their code.

This table is the single source, because the library must also run without its native module.
`python tools/write_shapes.py` writes two copies: csrc/common/shapes.h for C++ and CUDA, and
triton_kernels/shape_codes.py for Triton. Tests compare both copies, and the table compiled into the native
module, with this one.

Notation: A is the advantage, r = exp(log_ratio), sg(x) is x with a stopped gradient.
"""

import functools
import inspect
from dataclasses import dataclass, fields
from typing import Annotated, Any, ClassVar, NamedTuple, get_args

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import number
from tokfuse.runtime.core.errors import refuse

INF = float("inf")
WITHOUT_KERNELS = "shapes without kernels"  # feature of the reference backend: it runs any subclass of Shape
SLOTS = 6  # the number of parameters that a kernel takes for a shape


class Bound(NamedTuple):
    """The range of values that a number may take."""

    low: float = -INF
    high: float = INF
    open_low: bool = False
    open_high: bool = False

    def admits(self, value: float) -> bool:
        """Return True if the value is between the bounds. NaN gives False."""
        above = value > self.low if self.open_low else value >= self.low
        return above and (value < self.high if self.open_high else value <= self.high)

    def __str__(self) -> str:
        if (self.low, self.high) == (-INF, INF):
            return "a finite number"
        high = f" and {'<' if self.open_high else '<='} {self.high:g}" if self.high < INF else ""
        return f"{'>' if self.open_low else '>='} {self.low:g}{high}"


def require_within(spec: object, name: str, bound: Bound) -> None:
    """Raise ValueError unless the field `name` is a number within the bound. A number of numpy becomes a float."""
    value = number(given := getattr(spec, name))
    if value is not given:
        object.__setattr__(spec, name, value)
    if isinstance(value, bool) or not isinstance(value, int | float) or not bound.admits(value):
        raise ValueError(f"{type(spec).__name__}: {name} must be {bound}; got {value!r}.")


FINITE = Bound(open_low=True, open_high=True)
Positive = Annotated[float, Bound(0.0, open_low=True)]
NonNegative = Annotated[float, Bound(0.0)]
Width = Annotated[float, Bound(0.0, 1.0)]
Share = Annotated[float, Bound(0.0, 1.0, open_low=True, open_high=True)]


class TermInputs(NamedTuple):
    """Inputs of the policy term of every token, (tokens,) each."""

    log_ratio: torch.Tensor
    """Log-ratio at the level of the objective, clamped to its bounds."""
    ratio: torch.Tensor
    """exp(log_ratio)."""
    logp: torch.Tensor
    """Log-probability under the current policy, nats."""
    advantage: torch.Tensor
    """Advantage of each token."""
    signal: Any
    """Additional input of a shape that `needs_signal`, else None."""


Flags = dict[str, torch.Tensor]
"""Metric ("clip_low", "clip_high", "dual_clip") -> (tokens,) bool, True for the tokens that it counts."""


class Shape:
    """Base class of the shapes.

    A shape is a frozen dataclass. Its fields are the parameters of the shape, and the annotations give
    their bounds. A shape without a `code` has no kernel and runs on the reference backend only.
    """

    code: ClassVar[int | None] = None
    """Code of the shape in the kernels: its index in `SHAPES`."""
    needs_signal: ClassVar[bool] = False
    """True if the term reads `signal`. A call without `signal` then raises an error."""
    zero_without_advantage: ClassVar[bool] = True
    """True if the term has no gradient for tokens with advantage 0."""
    bounded: ClassVar[dict[str, tuple[Bound, bool]]] = {}
    """Parameter -> (its bound, True if it may be None)."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "code" not in vars(cls) and {"term", "bound_tokens", "bound_level"} & set(vars(cls)):
            cls.code = None  # the subclass changes the formula, so the kernels do not apply
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
        """Return the names of the parameters that the kernels take, in the order of their slots."""
        return tuple(f.name for f in fields(cls))  # type: ignore[arg-type]

    def parameters(self) -> tuple[float, ...]:
        """Return the values of the parameters that `slots` names."""
        return tuple(float(getattr(self, name)) for name in self.slots())

    def check_signal(self, op: str, given: bool) -> None:
        """Raise ValueError if the signal is needed but missing, or given but unused."""
        name = f"shape {type(self).__name__}"
        if self.needs_signal and not given:
            raise refuse(op, "signal", f"given for {name}", "None", "Pass one value per token.")
        if given and not self.needs_signal:
            raise refuse(op, "signal", f"None with {name}", "a tensor", "Remove it: it would have no effect.")

    # The formula. The kernels are tested against it.

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return (the loss of each token, the tokens that each bound stops)."""
        raise NotImplementedError(f"{type(self).__name__} must define term(x), the loss of each token.")

    def bound_tokens(self, log_ratio: torch.Tensor, advantage: torch.Tensor, clamp: float) -> torch.Tensor:
        """Return the clamped log-ratio of each token, before the reduction to the objective's level.

        Outside the bounds the gradient is 0.
        """
        return clamped(log_ratio, -clamp, clamp)

    def bound_level(self, log_ratio: torch.Tensor, clamp: float) -> torch.Tensor:
        """Return the clamped log-ratio at the objective's level. Outside the bounds the gradient is 0."""
        return clamped(log_ratio, -clamp, clamp)


def either(condition: torch.Tensor, yes: float, no: float, like: torch.Tensor) -> torch.Tensor:
    """Return one of two numbers per token, in the dtype of `like`. torch.where alone would round to float32."""
    return torch.where(condition, like.new_tensor(yes), like.new_tensor(no))


def clamped(
    x: torch.Tensor, low: float | torch.Tensor | None = None, high: float | torch.Tensor | None = None
) -> torch.Tensor:
    """Return x.clamp(low, high) with gradient 1 at a bound, as in the kernels, and 0 outside and for NaN.

    The gradient of torch's clamp at a bound depends on its version: 1 up to 2.13, 0 (numbers) or 1/2 (tensors) since
    2.14. Sequences that reach a bound lie exactly on it, so this is not a rare case.
    """
    inside = x == x
    inside = inside if low is None else inside & (x >= low)
    inside = inside if high is None else inside & (x <= high)
    return torch.where(inside, x, x.detach().clamp(low, high))  # type: ignore[arg-type]  # both numbers or both tensors


def straight_through(value: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """Return a tensor with the value of `value` and the gradient of `gradient`."""
    return gradient + (value - gradient).detach()


@dataclass(frozen=True, kw_only=True)
class LinearLogp(Shape):
    """-A * logp, without ratio or clip: REINFORCE, GPG (arXiv 2504.02546). Exact."""

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -A logp."""
        return -x.advantage * x.logp, {}


@dataclass(frozen=True, kw_only=True)
class LinearRatio(Shape):
    """-A * r: the surrogate without a clip. Exact."""

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -A r."""
        return -x.advantage * x.ratio, {}


class _Bounded(Shape):
    """Base class of shapes with a lower and an upper ratio bound, given as a width around 1 or as a ratio."""

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
            low, high = self.bounds
            raise ValueError(
                f"{type(self).__name__}: the lower ratio bound must be <= the upper one, {high:g}; got {low:g}. "
                "Check the bounds."
            )

    @property
    def bounds(self) -> tuple[float, float]:
        """The absolute bounds (ratio_min, ratio_max)."""
        low = self.ratio_min if self.low is None else 1.0 - self.low
        high = self.ratio_max if self.high is None else 1.0 + self.high
        assert low is not None and high is not None
        return low, high

    @classmethod
    def slots(cls) -> tuple[str, ...]:
        """Return the names of the absolute bounds. The kernels take these, also for bounds given as widths."""
        return "ratio_min", "ratio_max"

    def parameters(self) -> tuple[float, ...]:
        """Return (ratio_min, ratio_max)."""
        return self.bounds

    def _flags(self, x: TermInputs) -> Flags:
        a, r, (low, high) = x.advantage, x.ratio, self.bounds
        return {"clip_low": (a < 0) & (r < low), "clip_high": (a > 0) & (r > high)}


@dataclass(frozen=True, kw_only=True)
class PPOClip(_Bounded):
    """max(-A min(r, cap), -A clip(r, ratio_min, ratio_max)); with `dual` at most -A dual for A < 0.

    PPO (arXiv 1707.06347), DAPO's asymmetric widths (2503.14476), BAPO's explicit bounds
    (2510.18927), dual clip (1912.09729), the two-sided clip of INTELLECT-2 and TRL `delta` (`cap`).
    All exact.

    Args:
        low, high: widths of the clip. The ratio is clipped to [1 - low, 1 + high].
        ratio_min, ratio_max: absolute bounds, each instead of a width; set that width to None.
        dual: factor > 1 and > ratio_min that bounds the loss of negative advantages by -A dual. None: no
            bound.
        cap: upper bound > ratio_max on the ratio of the unclipped branch. None: no bound.
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
        """Return the names of the kernel parameters. dual and cap are infinite if they are None."""
        return "ratio_min", "ratio_max", "dual", "cap"

    def parameters(self) -> tuple[float, ...]:
        """Return (ratio_min, ratio_max, dual, cap)."""
        dual = INF if self.dual is None else self.dual
        return (*self.bounds, dual, INF if self.cap is None else self.cap)

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return the maximum of the two branches. If they are equal, the unclipped branch gives the gradient, -A r."""
        a, r, (low, high) = x.advantage, x.ratio, self.bounds
        free = r if self.cap is None else clamped(r, high=self.cap)
        clipped = clamped(r, low, high)
        loss = torch.where(-a * free >= -a * clipped, -a * free, -a * clipped)
        flags = self._flags(x)
        bound = min(self.dual or INF, self.cap or INF)
        if self.dual is not None:
            loss = torch.where((a < 0) & (loss > -a * self.dual), -a * self.dual, loss)
        flags["dual_clip"] = (a < 0) & (r > bound)
        return loss, flags


@dataclass(frozen=True, kw_only=True)
class StopGradClip(_Bounded):
    """-sg(clip(r, ratio_min, ratio_max)) * A * logp: CISPO (arXiv 2506.13585). Exact.

    The paper has no lower bound, so the default is `ratio_min=0`. TRL's `epsilon_high` is an absolute
    bound, here `ratio_max`. verl's `clip_ratio_high` is a width, here `high`.
    """

    low: Width | None = None
    high: NonNegative | None = None
    ratio_min: NonNegative | None = 0.0
    ratio_max: NonNegative | None = 5.0

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -sg(clip(r)) A logp."""
        low, high = self.bounds
        return -x.ratio.clamp(low, high).detach() * x.advantage * x.logp, self._flags(x)


@dataclass(frozen=True, kw_only=True)
class SigmoidGate(Shape):
    """-(4 / tau) sigmoid(tau (r - 1)) A: SAPO (arXiv 2511.20347). Exact.

    The sign of A selects tau_positive or tau_negative. At r = 1 the value is -2 A / tau and the gradient -A.
    """

    tau_positive: Positive = 1.0
    tau_negative: Positive = 1.05

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -(4 / tau) sigmoid(tau (r - 1)) A."""
        tau = either(x.advantage > 0, self.tau_positive, self.tau_negative, x.ratio)
        return -(4 / tau) * torch.sigmoid(tau * (x.ratio - 1)) * x.advantage, {}


@dataclass(frozen=True, kw_only=True)
class TargetRatio(Shape):
    """|r - target| |A| with target = 1 - low + (low + high) sigmoid(signal).

    BPO, GBPO (arXiv 2604.18578). Exact.

    `signal` is a per-token input of `policy_loss`. For GBPO it is (R - median) / std / tau.
    """

    needs_signal: ClassVar[bool] = True
    low: Width = 0.2
    high: NonNegative = 0.2

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return |r - target| |A|."""
        target = 1 - self.low + (self.low + self.high) * torch.sigmoid(x.signal)
        return (x.ratio - target).abs() * x.advantage.abs(), {}


@dataclass(frozen=True, kw_only=True)
class Quadratic(Shape):
    """-A r + penalty (r - 1)^2: R2VPO (arXiv 2601.03320). Reconstructed."""

    zero_without_advantage: ClassVar[bool] = False
    penalty: NonNegative

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -A r + penalty (r - 1)^2."""
        return -x.advantage * x.ratio + self.penalty * (x.ratio - 1) ** 2, {}


@dataclass(frozen=True, kw_only=True)
class NFT(Shape):
    """-A log r for A > 0, -|A| log((1 - q r) / (1 - q)) for A < 0: NFT (arXiv 2505.18116). Exact.

    `signal` is the success rate q of the group, clamped to [rate_min, rate_max]. The arguments of the
    logarithms have a straight-through lower bound: it clamps the value but keeps the gradient.
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
        """Return the log-ratio, clamped to at most log_ratio_max."""
        return clamped(log_ratio, -clamp, min(clamp, self.log_ratio_max))

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -A log r, or -|A| log((1 - q r) / (1 - q))."""
        a, r = x.advantage, x.ratio
        q = x.signal.clamp(self.rate_min, self.rate_max)
        rest = (1 - q * r) / (1 - q)
        positive = straight_through(r.clamp(min=self.positive_floor), r)
        negative = straight_through(rest.clamp(min=self.negative_floor), rest)
        argument = torch.where(a > 0, positive, torch.where(a < 0, negative, 1.0))
        return -a.abs() * argument.log(), {}


@dataclass(frozen=True, kw_only=True)
class LogClamp(Shape):
    """-A exp(d) with a pessimistically clamped log-ratio d: d <= bound for A > 0, d >= -bound for A < 0.

    With level="sequence" this is GMPO (arXiv 2507.20673). Exact.
    """

    bound: Positive = 0.4

    def bound_tokens(self, log_ratio: torch.Tensor, advantage: torch.Tensor, clamp: float) -> torch.Tensor:
        """Return the log-ratio, clamped to the bound on the side that would improve the objective."""
        e = min(self.bound, clamp)
        high = either(advantage >= 0, e, clamp, log_ratio)
        low = either(advantage <= 0, -e, -clamp, log_ratio)
        return clamped(log_ratio, low, high)

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -A r, with the ratio r of the clamped log-ratio."""
        return -x.advantage * x.ratio, {}


@dataclass(frozen=True, kw_only=True)
class Gamma(Shape):
    """-sg(e^l r^k e^(-l r)) A logp. The sign of A selects k and l (k_positive, lam_positive, ...).

    With level="sequence_sum" this is VESPO. Exact.
    """

    k_positive: NonNegative = 2.0
    lam_positive: NonNegative = 3.0
    k_negative: NonNegative = 3.0
    lam_negative: NonNegative = 2.0

    def term(self, x: TermInputs) -> tuple[torch.Tensor, Flags]:
        """Return -sg(e^(l + k log r - l r)) A logp."""
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
    # Append new shapes here.
)
"""The shapes that the kernels implement. The index of a shape is its code."""

for _code, _shape in enumerate(SHAPES):
    _shape.code = _code


def table() -> dict[str, tuple[int | None, tuple[str, ...], bool, bool]]:
    """Return `SHAPES` as plain values: name -> (code, parameters, needs_signal, zero_without_advantage)."""
    return {s.__name__: (s.code, s.slots(), s.needs_signal, s.zero_without_advantage) for s in SHAPES}


@functools.cache
def require_compiled_table() -> None:
    """Raise RuntimeError if the native module was compiled with another table of shapes."""
    module = native.module()
    compiled = table() if module is None else getattr(module, "shapes", {})
    if compiled != table():
        names = sorted(name for name, row in table().items() if compiled.get(name) != row)
        raise RuntimeError(
            "tokfuse._native was compiled with a different table of shapes "
            f"(differing shapes: {', '.join(names) or 'none, but it has additional ones'}). "
            "Run python tools/write_shapes.py and reinstall tokfuse."
        )
