"""Test Objective, its shapes and KL: defaults, parameters, errors, and the values that the kernels receive."""

import dataclasses
import re

import policy_cases
import pytest

import tokfuse
from tokfuse import KL, NFT, Gamma, LogClamp, Objective, PPOClip, Quadratic, SigmoidGate, StopGradClip, TargetRatio
from tokfuse.runtime.policy import objective as spec
from tokfuse.runtime.policy import shapes as table
from tokfuse.runtime.policy.objective import AGGREGATIONS, KL_ESTIMATORS, LEVELS
from tokfuse.runtime.policy.shapes import SHAPES, SLOTS, Shape

INF, NAN = float("inf"), float("nan")
EXAMPLES = {type(shape): shape for shape in policy_cases.SHAPES.values()}


def build(shape: type[Shape]) -> Shape:
    return EXAMPLES[shape]


# --------------------------------------------------------------------------------------- parameters


def test_codes_and_properties_of_the_shapes():
    first = ["LinearLogp", "LinearRatio", "PPOClip", "StopGradClip", "SigmoidGate", "TargetRatio", "Quadratic"]
    assert [shape.__name__ for shape in SHAPES][:10] == [*first, "NFT", "LogClamp", "Gamma"]
    assert [shape.code for shape in SHAPES] == list(range(len(SHAPES)))
    assert [shape for shape in SHAPES[:10] if shape.needs_signal] == [TargetRatio, NFT]
    assert [shape for shape in SHAPES[:10] if not shape.zero_without_advantage] == [Quadratic]


PARAMETERS = {
    PPOClip(): (0.8, 1.2, INF, INF),
    PPOClip(low=0.2, high=0.28, dual=3.0): (0.8, 1.28, 3.0, INF),
    PPOClip(low=None, high=None, ratio_min=0.6, ratio_max=3.0, cap=4.0): (0.6, 3.0, INF, 4.0),
    PPOClip(low=None, ratio_min=0.5): (0.5, 1.2, INF, INF),
    StopGradClip(): (0.0, 5.0),
    StopGradClip(low=0.3, high=0.5, ratio_min=None, ratio_max=None): (0.7, 1.5),
    SigmoidGate(): (1.0, 1.05),
    TargetRatio(low=0.1, high=0.3): (0.1, 0.3),
    Quadratic(penalty=0.04): (0.04,),
    NFT(): (1.0, 0.0, 10.0, 0.02, 0.98),
    LogClamp(): (0.4,),
    Gamma(): (2.0, 3.0, 3.0, 2.0),
    tokfuse.LinearLogp(): (),
}


@pytest.mark.parametrize("shape", PARAMETERS, ids=repr)
def test_parameters_and_defaults(shape: Shape):
    assert shape.parameters() == pytest.approx(PARAMETERS[shape])


def test_encode_is_the_record_of_the_kernels():
    objective = Objective(
        shape=PPOClip(dual=3.0),
        level="sequence_token",
        aggregation="seq_mean_token_mean",
        kl=KL(estimator="k2", coef=-0.5, clamp=9.0),
        entropy_coef=0.25,
        log_ratio_clamp=7.0,
        anchor=KL(estimator="abs", coef=0.5, clamp=3.0),
    )
    expected = {
        "shape": 2,
        "level": 2,
        "kl": 2,
        "seq_mean": 1,
        "p": (0.8, 1.2, 3.0, INF, 0.0, 0.0),
        "kl_coef": -0.5,
        "kl_clamp": 9.0,
        "entropy_coef": 0.25,
        "log_ratio_clamp": 7.0,
        "anchor": 7,
        "anchor_coef": 0.5,
        "anchor_clamp": 3.0,
    }
    assert objective.record._asdict() == expected
    assert Objective().record == (2, 0, 0, 0, (0.8, 1.2, INF, INF, 0.0, 0.0), 0.0, 20.0, 0.0, 20.0, 0, 0.0, 20.0)


def test_encode_gives_every_option_its_own_code():
    levels = {Objective(level=level).record.level for level in LEVELS}
    estimators = {Objective(kl=KL(estimator=e, coef=1.0)).record.kl for e in KL_ESTIMATORS}
    assert levels == {0, 1, 2, 3} and estimators == set(range(1, 8))
    shapes = {Objective(shape=build(shape)).record.shape for shape in SHAPES}
    assert shapes == set(range(len(SHAPES)))
    assert all(len(Objective(shape=build(s)).record.p) == SLOTS for s in SHAPES)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_field_of_a_shape_reaches_the_kernels(shape: type[Shape]):
    base = build(shape)
    for field in dataclasses.fields(shape):
        value = getattr(base, field.name)
        if field.name in ("low", "high", "ratio_min", "ratio_max") and hasattr(base, "bounds"):
            continue  # a width or a bound, tested above
        other = {"dual": 4.0, "cap": 5.0, "rate_min": 0.1, "rate_max": 0.9}.get(field.name, (value or 0.0) + 0.125)
        assert dataclasses.replace(base, **{field.name: other}).parameters() != base.parameters()


def test_properties_say_what_a_call_needs():
    assert not Objective().needs_sequences and not Objective().counts_sequences
    for level in ("sequence", "sequence_token", "sequence_sum"):
        assert Objective(level=level).needs_sequences
    needs = [a for a in AGGREGATIONS if Objective(aggregation=a).needs_sequences]
    counts = [a for a in AGGREGATIONS if Objective(aggregation=a).counts_sequences]
    assert needs == ["seq_mean_token_mean"]
    assert counts == ["seq_mean_token_mean", "seq_mean_token_sum"]


# ------------------------------------------------------------------------------------------ errors

REFUSED = [
    (lambda: PPOClip(low=-0.1), "PPOClip: low must be >= 0 and <= 1; got -0.1."),
    (lambda: PPOClip(low=1.5), "PPOClip: low must be >= 0 and <= 1; got 1.5."),
    (lambda: PPOClip(high=NAN), "PPOClip: high must be >= 0; got nan."),
    (lambda: PPOClip(high="0.2"), "PPOClip: high must be >= 0; got '0.2'."),
    (
        lambda: PPOClip(ratio_max=2.0),
        "PPOClip: give exactly one of high (a width around 1) and ratio_max (a bound on the ratio "
        "itself); got ['high', 'ratio_max'].",
    ),
    (
        lambda: PPOClip(low=None),
        "PPOClip: give exactly one of low (a width around 1) and ratio_min (a bound on the ratio itself); got neither.",
    ),
    (
        lambda: PPOClip(low=None, high=None, ratio_min=2.0, ratio_max=1.0),
        "PPOClip: the lower ratio bound must be <= the upper one, 1; got 2. Check the bounds.",
    ),
    (lambda: PPOClip(dual=1.0), "PPOClip: dual must be > 1; got 1.0."),
    (
        lambda: PPOClip(low=None, high=None, ratio_min=2.0, ratio_max=3.0, dual=1.5),
        "PPOClip: dual must be > 2; got 1.5.",
    ),
    (lambda: PPOClip(cap=1.2), "PPOClip: cap must be > 1.2; got 1.2."),
    (
        lambda: StopGradClip(high=0.2),
        "StopGradClip: give exactly one of high (a width around 1) and ratio_max (a bound on the "
        "ratio itself); got ['high', 'ratio_max'].",
    ),
    (lambda: StopGradClip(ratio_max=-1.0), "StopGradClip: ratio_max must be >= 0; got -1.0."),
    (lambda: SigmoidGate(tau_positive=0.0), "SigmoidGate: tau_positive must be > 0; got 0.0."),
    (lambda: SigmoidGate(tau_negative=None), "SigmoidGate: tau_negative must be > 0; got None."),
    (lambda: TargetRatio(low=2.0), "TargetRatio: low must be >= 0 and <= 1; got 2.0."),
    (lambda: TargetRatio(high=-1), "TargetRatio: high must be >= 0; got -1."),
    (lambda: Quadratic(penalty=-0.1), "Quadratic: penalty must be >= 0; got -0.1."),
    (lambda: NFT(negative_floor=0.0), "NFT: negative_floor must be > 0; got 0.0."),
    (lambda: NFT(positive_floor=-1.0), "NFT: positive_floor must be >= 0; got -1.0."),
    (lambda: NFT(log_ratio_max=0), "NFT: log_ratio_max must be > 0; got 0."),
    (lambda: NFT(rate_min=0.0), "NFT: rate_min must be > 0 and < 1; got 0.0."),
    (lambda: NFT(rate_min=0.5, rate_max=0.4), "NFT: rate_max must be >= 0.5; got 0.4."),
    (lambda: NFT(rate_max=1.0), "NFT: rate_max must be > 0 and < 1; got 1.0."),
    (lambda: LogClamp(bound=0.0), "LogClamp: bound must be > 0; got 0.0."),
    (lambda: Gamma(k_positive=-1.0), "Gamma: k_positive must be >= 0; got -1.0."),
    (
        lambda: KL(estimator="k4", coef=1.0),
        "KL: estimator must be one of k1, k2, k3, ratio_k3, k1_straight, k3_straight, abs; got 'k4'.",
    ),
    (lambda: KL(coef=NAN), "KL: coef must be a finite number; got nan."),
    (lambda: KL(coef=1.0, clamp=0.0), "KL: clamp must be > 0; got 0.0."),
    (
        lambda: Objective(level="tokens"),
        "Objective: level must be one of token, sequence, sequence_token, sequence_sum; got 'tokens'.",
    ),
    (
        lambda: Objective(aggregation="mean"),
        "Objective: aggregation must be one of token_mean, seq_mean_token_mean, seq_mean_token_sum, "
        "token_sum; got 'mean'.",
    ),
    (lambda: Objective(entropy_coef=float("inf")), "Objective: entropy_coef must be a finite number; got inf."),
    (lambda: Objective(entropy_coef="0.1"), "Objective: entropy_coef must be a finite number; got '0.1'."),
    (lambda: Objective(entropy_coef=True), "Objective: entropy_coef must be a finite number; got True."),
    (lambda: Objective(entropy_coef=NAN), "Objective: entropy_coef must be a finite number; got nan."),
    (lambda: Objective(log_ratio_clamp=81.0), "Objective: log_ratio_clamp must be > 0 and <= 80; got 81.0."),
    (lambda: Objective(log_ratio_clamp=0.0), "Objective: log_ratio_clamp must be > 0 and <= 80; got 0.0."),
]


@pytest.mark.parametrize(("make", "text"), REFUSED, ids=[text[:40] for _, text in REFUSED])
def test_refusals(make, text: str):
    with pytest.raises(ValueError, match=f"^{re.escape(text)}$"):
        make()


def test_wrong_types_are_type_errors():
    with pytest.raises(TypeError, match=r"shape must be a Shape; got 'ppo'"):
        Objective(shape="ppo")
    with pytest.raises(TypeError, match=r"kl must be a KL or None; got 0\.1"):
        Objective(kl=0.1)
    with pytest.raises(TypeError, match="penalty"):
        Quadratic()
    with pytest.raises(TypeError, match="coef"):
        KL()


def test_specs_are_frozen_hashable_values():
    assert Objective() == Objective() and hash(Objective()) == hash(Objective())
    assert Objective() != Objective(level="sequence")
    with pytest.raises(dataclasses.FrozenInstanceError):
        Objective().level = "sequence"
    with pytest.raises(TypeError):
        PPOClip(0.2)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_repr_names_the_objective_exactly(shape: type[Shape]):
    """The custom ops find the objective by its repr."""
    objective = Objective(shape=build(shape), kl=KL(estimator="k2", coef=1 / 3), entropy_coef=0.1)
    assert eval(repr(objective), vars(table) | vars(spec)) == objective
