"""The frozen description of a policy objective, along orthogonal axes.

    loss_t = weight_t * shape(log_ratio_t, advantage_t) + kl.coef * KL_t - entropy_coef * entropy_t

Axes: the *level* of the ratio (token, sequence), the *shape* phi of the policy term, the KL term,
the entropy bonus and the *aggregation* over tokens. Every published clipped-ratio objective is one
point on these axes. `Objective.record` turns a spec into the numbers that the kernels take. The
shapes are in shapes.py; tools/write_shapes.py hands the codes of both modules to the kernels.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from tokfuse.runtime.policy.shapes import (
    SLOTS,
    WITHOUT_KERNELS,
    Bound,
    PPOClip,
    Shape,
    require_compiled_table,
    require_within,
)

LEVELS = {"token": 0, "sequence": 1, "sequence_token": 2, "sequence_sum": 3}
KL_ESTIMATORS = {"k1": 1, "k2": 2, "k3": 3, "ratio_k3": 4, "k1_straight": 5, "k3_straight": 6, "abs": 7}


class Aggregation(NamedTuple):
    """How token losses become one number."""

    divides_by_length: bool
    """Whether the tokens of a sequence are averaged."""
    counts_sequences: bool
    """Whether normalizer="batch" divides by sequences, not by tokens."""


AGGREGATIONS = {
    "token_mean": Aggregation(False, False),
    "seq_mean_token_mean": Aggregation(True, True),
    "seq_mean_token_sum": Aggregation(False, True),
    "token_sum": Aggregation(False, False),
}


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
        require_within(self, "coef", Bound())
        require_within(self, "clamp", Bound(0.0, open_low=True))


class ObjectiveRecord(NamedTuple):
    """An objective as numbers: ObjectiveParams of csrc/common/objective.h, field by field."""

    shape: int
    level: int
    kl: int
    """Codes; kl is 0 without a KL term."""
    seq_mean: int
    """1: every token is weighted by 1 / (valid tokens of its sequence)."""
    p: tuple[float, ...]
    """The six parameters of the shape."""
    kl_coef: float
    kl_clamp: float
    entropy_coef: float
    log_ratio_clamp: float


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

    # A function, because torch.compile cannot construct the class that it finds as a default.
    shape: Shape = field(default_factory=lambda: PPOClip())
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
        require_within(self, "entropy_coef", Bound())
        # exp(80) is finite in float32
        require_within(self, "log_ratio_clamp", Bound(0.0, 80.0, open_low=True))

    @property
    def needs_sequences(self) -> bool:
        """True when the loss depends on sequence borders, beyond its normaliser."""
        return self.level != "token" or AGGREGATIONS[self.aggregation].divides_by_length

    @property
    def counts_sequences(self) -> bool:
        """True when normalizer="batch" divides by sequences, not by tokens."""
        return AGGREGATIONS[self.aggregation].counts_sequences

    def features(self, others: frozenset[str] = frozenset()) -> frozenset[str]:
        """Names of the optional behaviours that a backend needs: `others`, and for a shape without kernels its own."""
        return others if self.shape.code is not None else others | {WITHOUT_KERNELS}

    @functools.cached_property
    def record(self) -> ObjectiveRecord:
        """The numbers that the kernels take."""
        assert self.shape.code is not None, "no kernel has the shape: see features"
        require_compiled_table()
        p = self.shape.parameters()
        kl = self.kl
        return ObjectiveRecord(
            shape=self.shape.code,
            level=LEVELS[self.level],
            kl=0 if kl is None else KL_ESTIMATORS[kl.estimator],
            seq_mean=int(AGGREGATIONS[self.aggregation].divides_by_length),
            p=p + (0.0,) * (SLOTS - len(p)),
            kl_coef=0.0 if kl is None else kl.coef,
            kl_clamp=20.0 if kl is None else kl.clamp,
            entropy_coef=self.entropy_coef,
            log_ratio_clamp=self.log_ratio_clamp,
        )
