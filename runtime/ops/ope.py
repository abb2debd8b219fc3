"""`tokfuse.ope`: value of a policy from logged data, with standard errors."""

from typing import Any, NamedTuple

import torch

from tokfuse.runtime import cuda_packed, native
from tokfuse.runtime.dispatch import backend_of, register_cpu, register_cuda, register_reference
from tokfuse.runtime.errors import refuse
from tokfuse.runtime.packed_checks import (
    BOOL,
    Rows,
    Runs,
    check_optional,
    check_vector,
    plain,
    uncompiled,
    working_dtype,
)
from tokfuse.runtime.reference.ope import ope as reference

OP = "ope"


class OPE(NamedTuple):
    """Result of `ope`: 0-dim estimates, and their standard errors under the same name + `_se`."""

    ips: torch.Tensor
    snips: torch.Tensor
    dm: torch.Tensor | None
    dr: torch.Tensor | None
    sndr: torch.Tensor | None
    ips_se: torch.Tensor
    snips_se: torch.Tensor
    dm_se: torch.Tensor | None
    dr_se: torch.Tensor | None
    sndr_se: torch.Tensor | None


def ope(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None = None,
    q_a: torch.Tensor | None = None,
    *,
    mask: torch.Tensor | None = None,
) -> OPE:
    """Off-policy estimates of the target policy's mean reward.

        ips   mean(w r)                  snips  sum(w r) / sum(w)
        dm    mean(q_pi)                 dr     mean(q_pi + w (r - q_a))
        sndr  mean(q_pi) + sum(w (r - q_a)) / sum(w)

    A switched, shrunk or clipped weight (`offpolicy_weights`) gives the estimator of that name:
    Switch-DR is `dr` with mode "switch" weights.

    Args:
        weight: (rows,), float. pi(a|x) / b(a|x) of the logged action, or a function of it.
        reward: (rows,), float. Logged reward.
        q_pi: (rows,), float. Model's expected reward under the target policy. None: no dm.
        q_a: (rows,), float. Model's reward for the logged action. None: no dr, no sndr.
        mask: (rows,), bool. True = counts, in the sums and in the denominators. None: all count.

    Returns:
        OPE of 0-dim tensors, float32 (float64 if an input is float64), detached; None where a model
        is missing. Standard errors are sample deviations of each row's influence over sqrt(n); for
        the self-normalised ones by the delta method.

    Numerics:
        Computed in float64. No valid row gives NaN estimates, one valid row NaN errors.

    Raises:
        ValueError: shapes, dtypes, q_a without q_pi.

    Source:
        zr-obp `obp/ope/estimators.py` (IPS, SNIPS, DM, DR, SNDR): exact.
    """
    num_rows = check_vector(OP, "reward", reward).shape[0]
    rows = Rows(num_rows, "reward", reward.device)
    check_vector(OP, "weight", weight, rows)
    check_optional(OP, "q_pi", q_pi, rows)
    check_optional(OP, "q_a", q_a, rows)
    check_optional(OP, "mask", mask, rows, BOOL)
    if q_a is not None and q_pi is None:
        raise refuse(OP, "q_pi", "given with q_a", None, "The correction needs its direct part.")
    dtype = working_dtype(weight, reward, q_pi, q_a)
    run = _RUNS[backend_of(OP, reward.device.type, dtype)]
    found = run(
        plain(weight, dtype),
        plain(reward, dtype),
        plain(q_pi, dtype),
        plain(q_a, dtype),
        mask=plain(mask),
    )
    fields: dict[str, Any] = {}
    for name, estimate in found.items():
        fields[name], fields[f"{name}_se"] = (None, None) if estimate is None else estimate
    return OPE(**fields)


def _cpu(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor] | None]:
    module = native.module()
    assert module is not None
    values = torch.empty(10, dtype=torch.float64)
    module.ope(
        native.pointer(weight),
        native.pointer(reward),
        native.pointer(q_pi),
        native.pointer(q_a),
        native.pointer(mask),
        native.pointer(values),
        reward.shape[0],
        torch.get_num_threads(),
    )
    return _named(values.to(reward.dtype), q_pi, q_a)


def _cuda(
    weight: torch.Tensor,
    reward: torch.Tensor,
    q_pi: torch.Tensor | None,
    q_a: torch.Tensor | None,
    *,
    mask: torch.Tensor | None,
) -> dict[str, tuple[torch.Tensor, torch.Tensor] | None]:
    values = cuda_packed.ope(weight, reward, q_pi, q_a, mask=mask)
    return _named(values.to(reward.dtype), q_pi, q_a)


def _named(
    values: torch.Tensor, q_pi: torch.Tensor | None, q_a: torch.Tensor | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor] | None]:
    """(10,) estimates and errors by name; None where the model is missing."""
    found = values.unbind(0)
    given = {"ips": True, "snips": True, "dm": q_pi is not None}
    given["dr"] = given["sndr"] = q_a is not None
    return {
        name: (found[2 * k], found[2 * k + 1]) if given[name] else None
        for k, name in enumerate(given)
    }


# By name, because torch.compile can follow a module's table but not a record of the registry.
_RUNS: Runs = {
    "cuda": uncompiled(_cuda),
    "cpu": uncompiled(_cpu),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, reference)
