"""The frozen description of a policy objective, along orthogonal axes.

    loss_t = weight_t * shape(log_ratio_t, advantage_t) + kl.coef * KL_t - entropy_coef * entropy_t

Axes: the *level* of the ratio (token, sequence), the *shape* phi of the policy term, the KL term,
the entropy bonus and the *aggregation* over tokens. Every published clipped-ratio objective is one
point on these axes. `Objective.record` turns a spec into the numbers that the kernels take; codes
and parameter slots are shared with csrc/common/objective.h.
"""

import functools
from dataclasses import dataclass, fields
from typing import ClassVar

INF = float("inf")

LEVELS = {"token": 0, "sequence": 1, "sequence_token": 2, "sequence_sum": 3}
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "ratio_k3": 4, "k1_straight": 5, "k3_straight": 6, "abs": 7}
AGGREGATIONS = ("token_mean", "seq_mean_token_mean", "seq_mean_token_sum", "token_sum")


def _check(spec: object, name: str, low: float, high: float = INF, *, open_low: bool = False) -> None:
    value = getattr(spec, name)
    ok = isinstance(value, int | float) and (value > low if open_low else value >= low)
    if not ok or not value <= high:
        bounds = f"{'>' if open_low else '>='} {low:g}" + (f" and <= {high:g}" if high < INF else "")
        raise ValueError(f"{type(spec).__name__}: {name} must be {bounds}; got {value!r}.")


class Shape:
    """Base of the shapes: a code, and six parameters for the kernels."""

    code: ClassVar[int]
    needs_signal: ClassVar[bool] = False
    zero_without_advantage: ClassVar[bool] = True
    """Whether the term has no gradient where the advantage is 0."""

    def parameters(self) -> tuple[float, ...]:
        """The values of csrc/common/objective.h's p[] slots, in order."""
        return tuple(float(getattr(self, f.name)) for f in fields(self))  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class LinearLogp(Shape):
    """-A * logp: REINFORCE, GPG (arXiv 2504.02546), exact. No ratio, no clip."""

    code: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class LinearRatio(Shape):
    """-A * r: the unclipped surrogate, exact."""

    code: ClassVar[int] = 1


class _Bounded(Shape):
    """Lower and upper ratio bounds, given as widths around 1 or as absolute bounds."""

    low: float | None
    high: float | None
    ratio_min: float | None
    ratio_max: float | None

    def _check_bounds(self) -> None:
        for width, bound in (("low", "ratio_min"), ("high", "ratio_max")):
            given = [n for n in (width, bound) if getattr(self, n) is not None]
            if len(given) != 1:
                raise ValueError(
                    f"{type(self).__name__}: give exactly one of {width} (a width around 1) and "
                    f"{bound} (a bound on the ratio itself); got {given or 'neither'}."
                )
            _check(self, given[0], 0.0)
        if self.low is not None:
            _check(self, "low", 0.0, 1.0)
        if not self.bounds[0] <= self.bounds[1]:
            raise ValueError(f"{type(self).__name__}: bounds must be ordered; got {self.bounds}.")

    @property
    def bounds(self) -> tuple[float, float]:
        """(ratio_min, ratio_max)."""
        low = self.ratio_min if self.low is None else 1.0 - self.low
        high = self.ratio_max if self.high is None else 1.0 + self.high
        assert low is not None and high is not None
        return low, high


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

    code: ClassVar[int] = 2
    low: float | None = 0.2
    high: float | None = 0.2
    ratio_min: float | None = None
    ratio_max: float | None = None
    dual: float | None = None
    cap: float | None = None

    def __post_init__(self) -> None:
        self._check_bounds()
        if self.dual is not None:
            _check(self, "dual", max(1.0, self.bounds[0]), open_low=True)
        if self.cap is not None:
            _check(self, "cap", self.bounds[1], open_low=True)

    def parameters(self) -> tuple[float, ...]:
        """(ratio_min, ratio_max, dual, cap)."""
        dual = INF if self.dual is None else self.dual
        return (*self.bounds, dual, INF if self.cap is None else self.cap)


@dataclass(frozen=True, kw_only=True)
class StopGradClip(_Bounded):
    """-sg(clip(r, ratio_min, ratio_max)) * A * logp: CISPO (arXiv 2506.13585), exact.

    The paper bounds from above only: `ratio_min=0`. TRL's `epsilon_high` is `ratio_max` here (a
    bound), verl's `clip_ratio_high` is `high` (a width).
    """

    code: ClassVar[int] = 3
    low: float | None = None
    high: float | None = None
    ratio_min: float | None = 0.0
    ratio_max: float | None = 5.0

    def __post_init__(self) -> None:
        self._check_bounds()

    def parameters(self) -> tuple[float, ...]:
        """(ratio_min, ratio_max)."""
        return self.bounds


@dataclass(frozen=True, kw_only=True)
class SigmoidGate(Shape):
    """-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO (arXiv 2511.20347), exact.

    The value at r = 1 is -2 A / tau, the gradient there is -A.
    """

    code: ClassVar[int] = 4
    tau_positive: float = 1.0
    tau_negative: float = 1.05

    def __post_init__(self) -> None:
        _check(self, "tau_positive", 0.0, open_low=True)
        _check(self, "tau_negative", 0.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class TargetRatio(Shape):
    """|r - target| |A|, target = 1 - low + (low + high) sigmoid(signal).

    BPO, GBPO (arXiv 2604.18578), exact.

    `signal` is a per-token input of `policy_loss` (GBPO: (R - median) / std / tau).
    """

    code: ClassVar[int] = 5
    needs_signal: ClassVar[bool] = True
    low: float = 0.2
    high: float = 0.2

    def __post_init__(self) -> None:
        _check(self, "low", 0.0, 1.0)
        _check(self, "high", 0.0)


@dataclass(frozen=True, kw_only=True)
class Quadratic(Shape):
    """-A r + penalty (r - 1)^2: R2VPO (arXiv 2601.03320), reconstructed."""

    code: ClassVar[int] = 6
    zero_without_advantage: ClassVar[bool] = False
    penalty: float

    def __post_init__(self) -> None:
        _check(self, "penalty", 0.0)


@dataclass(frozen=True, kw_only=True)
class NFT(Shape):
    """A > 0: -A log r; A < 0: -|A| log((1 - q r) / (1 - q)): NFT (arXiv 2505.18116), exact.

    `signal` is the group's success rate q, clamped to [rate_min, rate_max]. The logarithms'
    arguments are floored straight-through: the value is clipped, the gradient kept.
    """

    code: ClassVar[int] = 7
    needs_signal: ClassVar[bool] = True
    negative_floor: float = 1.0
    positive_floor: float = 0.0
    log_ratio_max: float = 10.0
    rate_min: float = 0.02
    rate_max: float = 0.98

    def __post_init__(self) -> None:
        _check(self, "negative_floor", 0.0, open_low=True)
        _check(self, "positive_floor", 0.0)
        _check(self, "log_ratio_max", 0.0, open_low=True)
        _check(self, "rate_min", 0.0, open_low=True)
        _check(self, "rate_max", self.rate_min)
        if not self.rate_max < 1.0:
            raise ValueError(f"NFT: rate_max must be < 1; got {self.rate_max!r}.")


@dataclass(frozen=True, kw_only=True)
class LogClamp(Shape):
    """-A exp(d), d the log-ratio clamped pessimistically by the sign of A to +-bound.

    With level="sequence" this is GMPO (arXiv 2507.20673), exact.
    """

    code: ClassVar[int] = 8
    bound: float = 0.4

    def __post_init__(self) -> None:
        _check(self, "bound", 0.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Gamma(Shape):
    """-sg(e^l r^k e^(-l r)) A logp, k and l by the sign of A.

    With level="sequence_sum" this is VESPO, exact.
    """

    code: ClassVar[int] = 9
    k_positive: float = 2.0
    lam_positive: float = 3.0
    k_negative: float = 3.0
    lam_negative: float = 2.0

    def __post_init__(self) -> None:
        for f in fields(self):
            _check(self, f.name, 0.0)


@dataclass(frozen=True, kw_only=True)
class KL:
    """coef * KL estimate against `ref_logp`, with k = logp - ref_logp.

    Args:
        estimator: "k1" k; "k2" k^2/2; "k3" e^-k - 1 + k; "ratio_k3" r * k3 (its gradient is the
            exact reverse KL's under importance weighting); "k1_straight", "k3_straight" value of k1
            / k3 with k2's gradient; "abs" |k|.
        coef: signed; a negative coefficient repels from the reference (CDPO).
        clamp: bound on |k|; outside, the value is the bound's and the gradient 0.
    """

    estimator: str = "k3"
    coef: float
    clamp: float = 20.0

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            known = ", ".join(KL_ESTIMATORS)
            raise ValueError(f"KL: estimator must be one of {known}; got {self.estimator!r}.")
        _check(self, "coef", -INF)
        _check(self, "clamp", 0.0, open_low=True)


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy objective, for `policy_loss` and `policy_step`.

    Args:
        shape: the policy term, e.g. `PPOClip(low=0.2, high=0.28)`.
        level: "token"; "sequence": exp of the mean log-ratio, with its true gradient (GSPO, GMPO);
            "sequence_token": the same value, the gradient through the token's own ratio
            (GSPO-token); "sequence_sum": exp of the summed log-ratio (VESPO, sequence-level NFT).
        kl: KL term, or None.
        entropy_coef: coefficient of the entropy bonus; positive raises entropy.
        aggregation: "token_mean" sum over tokens / tokens (DAPO); "seq_mean_token_mean" mean over
            sequences of token means (GRPO, GSPO); "seq_mean_token_sum" mean over sequences of token
            sums (LUSPO with a sequence ratio); "token_sum" sum over tokens, divided by an explicit
            normalizer (Dr.GRPO: sequences * max length). The denominator is `normalizer`'s
            business.
        log_ratio_clamp: bound on |logp - old_logp|; outside, the gradient of the ratio is 0.
    """

    shape: Shape = PPOClip()
    level: str = "token"
    kl: KL | None = None
    entropy_coef: float = 0.0
    aggregation: str = "token_mean"
    log_ratio_clamp: float = 20.0

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Shape):
            raise TypeError(f"Objective: shape must be a Shape such as PPOClip(); got {self.shape!r}.")
        if self.kl is not None and not isinstance(self.kl, KL):
            raise TypeError(f"Objective: kl must be a KL or None; got {self.kl!r}.")
        for name, known in (("level", LEVELS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Objective: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        _check(self, "entropy_coef", -INF)
        _check(self, "log_ratio_clamp", 0.0, 80.0, open_low=True)  # exp(80) is finite in float32

    @property
    def needs_sequences(self) -> bool:
        """True when the loss depends on sequence borders, beyond its normaliser."""
        return self.level != "token" or self.aggregation == "seq_mean_token_mean"

    @property
    def counts_sequences(self) -> bool:
        """True when normalizer="batch" divides by sequences, not by tokens."""
        return self.aggregation in ("seq_mean_token_mean", "seq_mean_token_sum")

    @functools.cached_property
    def record(self) -> tuple[int | float | tuple[float, ...], ...]:
        """The record of csrc/common/objective.h::ObjectiveParams."""
        p = self.shape.parameters()
        kl = self.kl
        return (
            self.shape.code,
            LEVELS[self.level],
            0 if kl is None else KL_ESTIMATORS[kl.estimator],
            int(self.aggregation == "seq_mean_token_mean"),
            p + (0.0,) * (6 - len(p)),
            0.0 if kl is None else kl.coef,
            20.0 if kl is None else kl.clamp,
            self.entropy_coef,
            self.log_ratio_clamp,
        )
