"""The frozen specification of a policy objective.

    loss_t = weight_t * shape(log_ratio_t, advantage_t) + kl.coef * KL_t + anchor.coef * KL'_t
             - entropy_coef * entropy_t

An objective has six independent parts: the *level* of the ratio (token or sequence), the *shape* phi of
the policy term, the KL term to a reference, a second KL term to an *anchor* (which belongs to a method),
the entropy bonus, and the *aggregation* over tokens. Every published
clipped-ratio objective is one choice of these parts. `Objective.record` converts a specification to the
numbers that the kernels take. The shapes are in shapes.py. tools/write_shapes.py writes the codes of both
modules for the kernels.
"""

import functools
from dataclasses import dataclass, field
from typing import NamedTuple

from tokfuse.runtime.policy.shapes import (
    FINITE,
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
    """The reduction of token losses to one number."""

    divides_by_length: bool
    """True if the tokens of a sequence are averaged."""
    counts_sequences: bool
    """True if normalizer="batch" divides by the number of sequences, not of tokens."""


AGGREGATIONS = {
    "token_mean": Aggregation(False, False),
    "seq_mean_token_mean": Aggregation(True, True),
    "seq_mean_token_sum": Aggregation(False, True),
    "token_sum": Aggregation(False, False),
}


@dataclass(frozen=True, kw_only=True)
class KL:
    """A KL term of an objective: coef * KL estimate against `ref_logp`, with k = logp - ref_logp.

    As `Objective.anchor`, the term compares with `anchor_logp` instead.

    Args:
        estimator: "k1" is k, "k2" is k^2 / 2, "k3" is e^-k - 1 + k, "abs" is |k|. "ratio_k3" is r * k3; its
            gradient is the exact gradient of the reverse KL under importance weighting. "k1_straight" and
            "k3_straight" have the value of k1 and k3, but the gradient of k2.
        coef: coefficient of either sign. A negative coefficient repels from the reference (CDPO).
        clamp: bound on |k|, in nats. Outside, k is clamped and its gradient is 0.
    """

    estimator: str = "k3"
    coef: float
    clamp: float = 20.0

    def __post_init__(self) -> None:
        if self.estimator not in KL_ESTIMATORS:
            known = ", ".join(KL_ESTIMATORS)
            raise ValueError(f"KL: estimator must be one of {known}; got {self.estimator!r}.")
        require_within(self, "coef", FINITE)
        require_within(self, "clamp", Bound(0.0, open_low=True))


class ObjectiveRecord(NamedTuple):
    """An objective as numbers. The fields match ObjectiveParams of csrc/common/objective.h."""

    shape: int
    level: int
    kl: int
    """Code of the KL estimator; 0 without a KL term."""
    seq_mean: int
    """1 if every token is weighted by 1 / (valid tokens of its sequence), else 0."""
    p: tuple[float, ...]
    """The six parameters of the shape."""
    kl_coef: float
    kl_clamp: float
    entropy_coef: float
    log_ratio_clamp: float
    anchor: int
    """Code of the estimator of the second KL term; 0 without one."""
    anchor_coef: float
    anchor_clamp: float


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A policy objective, for `policy_loss` and `policy_step`.

    Args:
        shape: the policy term, e.g. `PPOClip(low=0.2, high=0.28)`.
        level: unit of the ratio. "token": ratio of each token. "sequence": exp of the mean log-ratio of
            the sequence, with its true gradient (GSPO, GMPO). "sequence_token": the same value, but
            each token gets the gradient of its own ratio (GSPO-token). "sequence_sum": exp of the summed
            log-ratio (VESPO, sequence-level NFT).
        kl: KL term to the reference policy (`ref_logp`), or None.
        anchor: second KL term, to `anchor_logp`, or None. Methods use it for a term that is not the reference KL:
            KL-Cov, the likelihood of VAPO and DYPO, the proximal term of mirror descent.
        entropy_coef: coefficient of the entropy bonus. A positive coefficient raises entropy.
        aggregation: reduction over tokens. "token_mean": sum over tokens / tokens (DAPO).
            "seq_mean_token_mean": mean over sequences of token means (GRPO, GSPO).
            "seq_mean_token_sum": mean over sequences of token sums (LUSPO with a sequence ratio).
            "token_sum": sum over tokens, divided by an explicit normalizer (Dr.GRPO: sequences * max
            length). The `normalizer` argument of the op sets the denominator.
        log_ratio_clamp: bound on |logp - old_logp|, in nats. Outside, the gradient of the ratio is 0.
    """

    # A lambda, because torch.compile cannot construct a class that is itself the default factory.
    shape: Shape = field(default_factory=lambda: PPOClip())
    level: str = "token"
    kl: KL | None = None
    entropy_coef: float = 0.0
    aggregation: str = "token_mean"
    log_ratio_clamp: float = 20.0
    anchor: KL | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.shape, Shape):
            raise TypeError(f"Objective: shape must be a Shape; got {self.shape!r}. Pass, for example, PPOClip().")
        for name in ("kl", "anchor"):
            term = getattr(self, name)
            if term is not None and not isinstance(term, KL):
                raise TypeError(
                    f"Objective: {name} must be a KL or None; got {term!r}. Pass, for example, KL(coef=0.01)."
                )
        for name, known in (("level", LEVELS), ("aggregation", AGGREGATIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"Objective: {name} must be one of {', '.join(known)}; got {getattr(self, name)!r}.")
        require_within(self, "entropy_coef", FINITE)
        # At most 80, because exp(80) is finite in float32.
        require_within(self, "log_ratio_clamp", Bound(0.0, 80.0, open_low=True))

    @property
    def needs_sequences(self) -> bool:
        """True if the loss depends on sequence borders, apart from its normaliser."""
        return self.level != "token" or AGGREGATIONS[self.aggregation].divides_by_length

    @property
    def counts_sequences(self) -> bool:
        """True if normalizer="batch" divides by the number of sequences, not of tokens."""
        return AGGREGATIONS[self.aggregation].counts_sequences

    def features(self, others: frozenset[str] = frozenset()) -> frozenset[str]:
        """Return the features that a backend must support: `others`, plus one if the shape has no kernel."""
        return others if self.shape.code is not None else others | {WITHOUT_KERNELS}

    @functools.cached_property
    def record(self) -> ObjectiveRecord:
        """The numbers that the kernels take."""
        assert self.shape.code is not None, "no kernel implements the shape: see features"
        require_compiled_table()
        p = self.shape.parameters()
        kl, anchor = self.kl, self.anchor
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
            anchor=0 if anchor is None else KL_ESTIMATORS[anchor.estimator],
            anchor_coef=0.0 if anchor is None else anchor.coef,
            anchor_clamp=20.0 if anchor is None else anchor.clamp,
        )
