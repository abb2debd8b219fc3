"""The arguments of ops that start from hidden states: checks and derived values."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import kept_rows
from tokfuse.runtime.core import checks
from tokfuse.runtime.core.errors import refuse
from tokfuse.runtime.core.logit_options import LogitOptions, check_options, check_values
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.lm_head.probe import Probes, sources
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms

MIN_BUDGET = 64 << 20
# Per element of dW, a chunk moves 8 bytes and computes 2 FLOPs per row. Below 950 rows, memory bandwidth limits
# the dW GEMM on an H100 (800 TFLOP/s, 3.35 TB/s).
GPU_ROWS = 1024
NAMES = ("hidden", "weight", "bias")
HEAD_SCHEMA = "Tensor hidden, Tensor weight, Tensor? bias, Tensor target"
"""The tensors of a head problem in the schema of a custom op."""

Step = tuple[PolicyTerms, TokenStats, list[torch.Tensor | None]]
"""(terms, statistics, gradients in the order of `NAMES`)."""


class HeadProblem(NamedTuple):
    """The checked arguments of an op that computes logits with the lm_head."""

    op: str  # the name that errors about values begin with
    hidden: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    target: torch.Tensor
    options: LogitOptions
    memory_budget: int
    needs: tuple[bool, bool, bool] | None = None  # requested gradients; None: according to requires_grad
    row_norms: torch.Tensor | None = None  # (tokens,), output for ||d loss / d logits_t||
    compact_clipped: bool = False  # on a GPU: gradient GEMMs by Triton kernels, over the live rows only
    probes: Probes = ()
    kept: TokenIds | None = None  # the distribution is over these ids of each row
    logit_sum: torch.Tensor | None = None  # (tokens,) float32, output of the forward; 0 in masked rows
    class_weight: torch.Tensor | None = None  # (vocab,) float32, of the sum; None: 1

    @property
    def tokens(self) -> int:
        """Number of packed tokens."""
        return self.hidden.shape[0]

    @property
    def vocab(self) -> int:
        """Vocabulary size."""
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which the logits are computed."""
        return checks.head_dtype(self.hidden, self.weight, self.bias)


def check_head(
    op: str,
    hidden: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    target: torch.Tensor,
    options: LogitOptions,
    memory_budget: int | None,
) -> HeadProblem:
    """Check shapes, dtypes and devices, and return the problem with the default budget filled in."""
    checks.check_matrix(op, "hidden", hidden, "(tokens, hidden)")
    if weight is None:
        raise refuse(op, "weight", "given with hidden=", "None", "Pass lm_head.weight.")
    checks.check_matrix(op, "weight", weight, "(vocab, hidden)")
    if weight.shape[1] != hidden.shape[1] or weight.shape[0] < 1:
        raise refuse(
            op,
            "weight",
            f"of shape (vocab, hidden) with hidden = {hidden.shape[1]}",
            f"shape {tuple(weight.shape)}",
            "Pass lm_head.weight unchanged.",
        )
    checks.check_device(op, "weight", weight, hidden.device)
    if bias is not None:
        checks.check_vector(op, "bias", bias, checks.Rows(weight.shape[0], "the rows of weight", hidden.device))
    rows = checks.Rows(hidden.shape[0], "the rows of hidden", hidden.device)
    checks.check_vector(op, "target", target, rows, checks.INT64)
    check_options(op, hidden.shape[0], hidden.device, options)
    if memory_budget is None:
        # With a sixth of the float32 weight gradient, the memory traffic of dW is small compared with the GEMMs.
        memory_budget = max(MIN_BUDGET, weight.numel() * 4 // 6)
        if hidden.device.type != "cpu":
            workspace = GPU_ROWS * (6 * weight.shape[0] + 8 * weight.shape[1] + 64)
            memory_budget = max(memory_budget, min(workspace, 1 << 30))
    elif isinstance(memory_budget, bool) or not checks.is_integer(memory_budget) or memory_budget < 1:
        raise refuse(
            op, "memory_budget", "a whole number of bytes >= 1", repr(memory_budget), "Omit it for the default."
        )
    else:
        memory_budget = int(memory_budget)
    return HeadProblem(op, hidden, weight, bias, target, options, memory_budget)


def wanted(p: HeadProblem) -> tuple[bool, bool, bool]:
    """Return which of hidden, weight and bias need a gradient."""
    if p.needs is not None:
        return p.needs
    bias = p.bias is not None and p.bias.requires_grad
    return p.hidden.requires_grad, p.weight.requires_grad, bias


def probed(op: str, p: HeadProblem, cu_seqlens: torch.Tensor | None = None) -> HeadProblem:
    """Return the problem with the probes that open captures request. Without a gradient there is none.

    Args:
        op: name of the op, for errors.
        p: the checked problem.
        cu_seqlens: offsets of the sequences in the rows of hidden. None: the rows are those of the captured batch.
    """
    if not sources():
        return p
    if torch.compiler.is_compiling():
        refuse_captured(op, p.weight, "inside torch.compile", "Call it outside the compiled function")
    if not torch.is_grad_enabled() or not any(wanted(p)):
        return p
    found = (source.probe(op, p.hidden, p.weight, cu_seqlens) for source in sources())
    return p._replace(probes=tuple(x for x in found if x is not None))


def refuse_captured(op: str, weight: torch.Tensor, where: str, step: str) -> None:
    """Raise ValueError if an open capture contains this head, which the call cannot probe."""
    if torch.is_grad_enabled() and any(source.captures_head(weight.shape[1]) for source in sources()):
        raise refuse(
            op,
            "weight",
            "a head that no open capture contains",
            f"the captured lm_head {where}",
            f"{step}, or leave the lm_head out with capture(modules=...).",
        )


def check_targets(p: HeadProblem) -> None:
    """Raise ValueError if a target, temperature or kept id is out of range. Called before the first GEMM."""
    o = p.options
    kept_rows.check_kept_values(p.op, p.kept, p.vocab, o.mask)
    check_values(p.op, p.target, p.vocab, o.mask, o.temperature)


StepRun = Callable[[HeadProblem, PolicyInputs, Objective, float], Step]
"""(problem, inputs, objective, inv_normalizer) -> Step; the `run` of policy_step_hidden."""


def fake_gradients(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *rest: Any
) -> list[torch.Tensor]:
    """Return [grad_hidden, grad_weight, grad_bias] without values. `rest` ends with the three needs."""
    likes = (hidden, weight, bias if bias is not None else hidden)
    return [x.new_empty(x.shape) if need else hidden.new_empty(0) for x, need in zip(likes, rest[-3:], strict=True)]
