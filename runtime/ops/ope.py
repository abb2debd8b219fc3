"""`tokfuse.ope`: value of a policy from logged data, with standard errors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import BOOL, Rows, Runs, check_optional, check_vector, plain, working_dtype
from tokfuse.runtime.core.codes import ESTIMATES
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
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


@ranged("ope.fwd")
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

    Examples:
        >>> tokfuse.ope(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).ips
        tensor(1.)

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
    vectors = (plain(x, dtype) for x in (weight, reward, q_pi, q_a))
    found: Estimates = run(*vectors, mask=plain(mask))
    fields: dict[str, Any] = {}
    for name, estimate in found.items():
        fields[name], fields[f"{name}_se"] = (None, None) if estimate is None else estimate
    return OPE(**fields)


Estimates = dict[str, tuple[torch.Tensor, torch.Tensor] | None]


def _by_name(found: torch.Tensor, q_pi: torch.Tensor | None, q_a: torch.Tensor | None) -> Estimates:
    """(5, 2) estimates and errors in the order of `ESTIMATES`; None where a model is missing."""
    given = {"dm": q_pi is not None, "dr": q_a is not None, "sndr": q_a is not None}
    rows = zip(ESTIMATES, found.unbind(0), strict=True)
    return {name: (row[0], row[1]) if given.get(name, True) else None for name, row in rows}


def _named(backend: str, kernel: Callable[..., torch.Tensor]) -> Callable[..., Estimates]:
    run = traceable(OP, backend, kernel, _FORM)

    def call(
        weight: torch.Tensor,
        reward: torch.Tensor,
        q_pi: torch.Tensor | None,
        q_a: torch.Tensor | None,
        *,
        mask: torch.Tensor | None,
    ) -> Estimates:
        return _by_name(run(weight, reward, q_pi, q_a, mask), q_pi, q_a)

    return call


_FORM = GraphForm(
    "(Tensor weight, Tensor reward, Tensor? q_pi, Tensor? q_a, Tensor? mask) -> Tensor",
    lambda weight, reward, *_: reward.new_empty(len(ESTIMATES), 2),
)
# By name, because torch.compile can follow a module's table but not a record of the registry.
_RUNS: Runs = {
    "cuda": _named("cuda", cuda_packed.ope),
    "triton": _named("triton", triton_packed.ope),
    "cpu": _named("cpu", cpu_packed.ope),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
