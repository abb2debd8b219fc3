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
    """Result of `ope`: 0-dim estimates. The standard error of each has the same name with the suffix `_se`."""

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
    """Return off-policy estimates of the mean reward of the target policy, with standard errors.

        ips   mean(w r)                  snips  sum(w r) / sum(w)
        dm    mean(q_pi)                 dr     mean(q_pi + w (r - q_a))
        sndr  mean(q_pi) + sum(w (r - q_a)) / sum(w)

    Weights of another mode of `offpolicy_weights` give the estimator of that name. For example, Switch-DR
    is `dr` with weights of mode "switch".

    Args:
        weight: (rows,), float. pi(a|x) / b(a|x) of the logged action, or a function of it. pi is the
            target policy, b the policy that logged the data.
        reward: (rows,), float. Logged reward.
        q_pi: (rows,), float. Expected reward under the target policy, by a reward model. None: no dm.
        q_a: (rows,), float. Reward of the logged action, by the reward model. None: no dr, no sndr.
        mask: (rows,), bool. True = counts, in the sums and in the denominators. None: all rows count.

    Returns:
        OPE of 0-dim tensors, float32 (float64 if an input is float64). Detached. An estimate whose
        q_pi or q_a is missing is None. A standard error is the sample deviation of the influence of each
        row, divided by sqrt(n). The self-normalised estimators (snips, sndr) use the delta method.

    Numerics:
        Computed in float64. Without a valid row the estimates are NaN. With one valid row the standard
        errors are NaN.

    Examples:
        >>> tokfuse.ope(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0])).ips
        tensor(1.)

    Raises:
        ValueError: wrong shape or dtype, q_a without q_pi.

    Source:
        zr-obp `obp/ope/estimators.py` (IPS, SNIPS, DM, DR, SNDR). Exact.
    """
    num_rows = check_vector(OP, "reward", reward).shape[0]
    rows = Rows(num_rows, "reward", reward.device)
    check_vector(OP, "weight", weight, rows)
    check_optional(OP, "q_pi", q_pi, rows)
    check_optional(OP, "q_a", q_a, rows)
    check_optional(OP, "mask", mask, rows, BOOL)
    if q_a is not None and q_pi is None:
        raise refuse(OP, "q_pi", "given with q_a", None, "Pass the expected reward, because q_a only corrects it.")
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
    """Return name -> (estimate, error) from (5, 2) values in the order of `ESTIMATES`.

    An estimate whose q_pi or q_a is missing is None.
    """
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
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
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
