"""Conversion of objectives and their inputs to the schema of a custom op.

A schema supports neither dataclasses nor records.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import fields

from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.policy.objective import KL, Objective
from tokfuse.runtime.policy.shapes import SHAPES

INPUTS_SCHEMA = (
    "Tensor? old_logp, Tensor advantage, str advantage_level, Tensor? mask, Tensor? cu_seqlens, Tensor? token_weight"
    ", Tensor? signal, Tensor? ref_logp, Tensor? kl_weight, Tensor? entropy_weight"
    ", Tensor? anchor_logp, Tensor? anchor_weight"
)
"""The fields of `PolicyInputs`, in order."""
OBJECTIVE_SCHEMA = "str objective, float[] coefficients, float inv_normalizer"
"""The two values of `flat_objective`, and 1 / normalizer."""

_FIELDS = {shape: tuple(f.name for f in fields(shape)) for shape in SHAPES}  # type: ignore[arg-type]


def flat_objective(objective: Objective) -> tuple[str, list[float]]:
    """Return (the constants as a string, the numbers) of an objective. Traced by torch.compile.

    The numbers may change between calls without a new compilation.
    """
    shape, terms = objective.shape, (objective.kl, objective.anchor)
    assert shape.code is not None, "no kernel implements the shape: see Objective.features"
    given = [name for name in _FIELDS[SHAPES[shape.code]] if getattr(shape, name) is not None]
    estimators = "|".join("" if term is None else term.estimator for term in terms)
    form = f"{shape.code}|{','.join(given)}|{objective.level}|{estimators}|{objective.aggregation}"
    numbers = [getattr(shape, name) for name in given] + [objective.entropy_coef, objective.log_ratio_clamp]
    for term in terms:
        numbers += [] if term is None else [term.coef, term.clamp]
    return form, numbers


def objective_of(form: str, numbers: Sequence[float]) -> Objective:
    """Return the objective from the values of `flat_objective`."""
    return _objective(form, tuple(numbers))


@functools.lru_cache(maxsize=128)
def _objective(form: str, numbers: tuple[float, ...]) -> Objective:
    code, given, level, *estimators, aggregation = form.split("|")
    shape = SHAPES[int(code)]
    names = given.split(",") if given else []
    fields_of_shape = dict.fromkeys(_FIELDS[shape]) | dict(zip(names, numbers, strict=False))
    entropy_coef, log_ratio_clamp, *rest = numbers[len(names) :]
    terms: list[KL | None] = []
    for estimator in estimators:
        coef_and_clamp, rest = (rest[:2], rest[2:]) if estimator else ([], rest)
        terms.append(KL(estimator=estimator, coef=coef_and_clamp[0], clamp=coef_and_clamp[1]) if estimator else None)
    return Objective(
        shape=shape(**fields_of_shape),
        level=level,
        kl=terms[0],
        anchor=terms[1],
        entropy_coef=entropy_coef,
        aggregation=aggregation,
        log_ratio_clamp=log_ratio_clamp,
    )


def checked_inverse(op: str, inv_normalizer: float) -> float:
    """Return `inv_normalizer`. Raise ValueError if it is NaN, the mark of an invalid normalizer tensor."""
    if math.isnan(inv_normalizer):
        raise refuse(
            op, "normalizer", "a finite number in (0, inf)", "a tensor with another value", "Check the token count."
        )
    return inv_normalizer
