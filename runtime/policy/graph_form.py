"""Objectives and their inputs in the schema of a custom op, which knows no dataclass and no record."""

from tokfuse.runtime.policy.objective import Objective

INPUTS_SCHEMA = (
    "Tensor? old_logp, Tensor advantage, str advantage_level, Tensor? mask, Tensor? cu_seqlens, Tensor? token_weight"
    ", Tensor? signal, Tensor? ref_logp, Tensor? kl_weight, Tensor? entropy_weight"
)
"""The fields of `PolicyInputs`, in order."""
OBJECTIVE_SCHEMA = "str objective_key, float inv_normalizer"

# The repr of an objective names it exactly.
_OBJECTIVES: dict[str, Objective] = {}


def objective_key(objective: Objective) -> str:
    """Return a string that stands for the objective in a custom op's schema."""
    key = repr(objective)
    _OBJECTIVES.setdefault(key, objective)
    return key


objective_key._dynamo_marked_constant = True  # type: ignore[attr-defined]  # as dispatch.select


def objective_of(key: str) -> Objective:
    """Return the objective of an `objective_key`."""
    return _OBJECTIVES[key]
