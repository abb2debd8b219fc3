"""`tokfuse.whiten`: masked whitening of a packed vector."""

import torch

from tokfuse.runtime.backends import cpu_packed, cuda_packed, triton_packed
from tokfuse.runtime.backends.registration import register_cpu, register_cuda, register_reference, register_triton
from tokfuse.runtime.core.checks import (
    BOOL,
    Rows,
    Runs,
    check_flag,
    check_number,
    check_optional,
    check_vector,
    plain,
    working_dtype,
)
from tokfuse.runtime.core.dispatch import backend_of
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.graph_ops import GraphForm, traceable
from tokfuse.runtime.core.ranges import ranged
from tokfuse.runtime.reference.whiten import whiten as reference

OP = "whiten"


@ranged("whiten.fwd")
def whiten(
    x: torch.Tensor,
    mask: torch.Tensor | None = None,
    *,
    shift_mean: bool = True,
    eps: float = 1e-8,
    mean: torch.Tensor | float | None = None,
    var: torch.Tensor | float | None = None,
) -> torch.Tensor:
    """Return whitened values (x - mean) / sqrt(var + eps), with the unbiased variance over the mask.

    Args:
        x: (tokens,), float. Usually advantages.
        mask: (tokens,), bool. True = counts. None: all tokens count.
        shift_mean: False adds the mean back after the division, so that only the spread changes.
        eps: added to the variance, >= 0.
        mean, var: statistics to use instead of the statistics of x; numbers or 0-dim tensors. Pass both
            or neither. For a batch that is split over devices, all-reduce the moments and pass them here.

    Returns:
        (tokens,), float32 (float64 for float64 input). Detached; 0 where mask is False.

    Numerics:
        Statistics accumulate in float64 over fixed blocks that are merged in order, so results are
        bitwise repeatable for any number of threads. Equal values have variance exactly 0 and give
        exactly 0 (the mean with shift_mean=False). So does a single value, which has no unbiased
        variance. NaN is not read where mask is False. Where mask is True, it makes all outputs NaN.

    Gradients and memory:
        No gradients. One (tokens,) output. Two reads and one write.

    Examples:
        >>> tokfuse.whiten(torch.tensor([1.0, 2.0, 3.0]))
        tensor([-1.,  0.,  1.])

    Raises:
        ValueError: wrong shape or dtype, a negative eps, mean without var or var without mean.

    Source:
        verl `torch_functional.masked_whiten` (eps 1e-8, unbiased variance). Exact, except that
        masked outputs are 0 here.
    """
    num_tokens = check_vector(OP, "x", x).shape[0]
    check_optional(OP, "mask", mask, Rows(num_tokens, "x", x.device), BOOL)
    check_number(OP, "eps", eps, 0.0)
    check_flag(OP, "shift_mean", shift_mean)
    if (mean is None) != (var is None):
        raise refuse(OP, "mean and var", "given together", "only one of them", "Pass both or neither.")
    dtype = working_dtype(x)
    run = _RUNS[backend_of(OP, x.device.type, dtype)]
    out: torch.Tensor = run(
        plain(x, dtype),
        mask=plain(mask),
        shift_mean=shift_mean,
        eps=float(eps),
        mean=_statistic("mean", mean, x.device),
        var=_statistic("var", var, x.device),
    )
    return out


def _statistic(name: str, value: torch.Tensor | float | None, device: torch.device) -> torch.Tensor | None:
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        if value.dim() != 0 or value.device != device:
            actual = f"shape {tuple(value.shape)} on {value.device}"
            raise refuse(OP, name, f"a number or a 0-dim tensor on {device}", actual, "Pass one value on that device.")
        return value.detach().double()
    low = 0.0 if name == "var" else -torch.finfo(torch.float64).max
    number = check_number(OP, name, value, low)
    return torch.tensor(number, dtype=torch.float64, device=device)


_FORM = GraphForm(
    "(Tensor x, *, Tensor? mask, bool shift_mean, float eps, Tensor? mean, Tensor? var) -> Tensor",
    lambda x, **_: torch.empty_like(x),
)
# A dict by name, because torch.compile can trace a lookup in a module's dict, but not a record of the registry.
_RUNS: Runs = {
    "cuda": traceable(OP, "cuda", cuda_packed.whiten, _FORM),
    "triton": traceable(OP, "triton", triton_packed.whiten, _FORM),
    "cpu": traceable(OP, "cpu", cpu_packed.whiten, _FORM),
    "reference": reference,
}
register_cuda(OP, _RUNS["cuda"], frozenset({torch.float32}))
register_triton(OP, _RUNS["triton"], frozenset({torch.float32, torch.float64}))
register_cpu(OP, _RUNS["cpu"], frozenset({torch.float32}))
register_reference(OP, _RUNS["reference"])
