"""The ops from hidden states on the CPU: GEMMs of torch around the native row kernels."""

import functools

import torch

from tokfuse.runtime.backends import cpu_policy, cpu_rows, row_args
from tokfuse.runtime.backends.objective_args import ObjectiveOut
from tokfuse.runtime.backends.policy_runs import statistics_first
from tokfuse.runtime.backends.row_args import RowStats
from tokfuse.runtime.core import native
from tokfuse.runtime.core.statistics import TokenStats
from tokfuse.runtime.lm_head.cpu_head import (
    GradientPool,
    Head,
    HeadGradients,
    LogitsBuffer,
    dw_buffer,
    needed_rows,
    rows_in_budget,
    workspace_rows,
)
from tokfuse.runtime.lm_head.problem import HeadProblem, Step, check_targets, wanted
from tokfuse.runtime.lm_head.units import Coefficients, HeadKernels, Loss, Units, UnitTerms, coefficients
from tokfuse.runtime.policy.inputs import PolicyInputs
from tokfuse.runtime.policy.objective import Objective
from tokfuse.runtime.policy.results import PolicyTerms
from tokfuse.runtime.reference import kept_token_stats as kept_reference

# ------------------------------------------------------------------------------ linear_token_stats


def _row_index(p: HeadProblem) -> torch.Tensor:
    """Return the indices of the tokens to compute, (rows,) int64."""
    index = needed_rows(p)
    return torch.arange(p.tokens, device="cpu") if index is None else index


def stats_of_buffer(
    buffer: LogitsBuffer, p: HeadProblem, chunk: torch.Tensor, out: list[torch.Tensor] | tuple[torch.Tensor, ...]
) -> None:
    """Write the statistics of the logits in the buffer to rows `chunk` of the seven outputs."""
    module = native.loaded()
    module.token_stats_fwd(
        buffer.logits_args(p, 0, chunk.shape[0], chunk),
        row_args.token_stats_out(module, RowStats.of(out), logit_sum=p.logit_sum, class_weight=p.class_weight),
    )


def gradient_over_buffer(
    buffer: LogitsBuffer,
    p: HeadProblem,
    chunk: torch.Tensor,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
) -> None:
    """Overwrite the logits in the buffer with their gradient. All vectors are (tokens,)."""
    module, rows = native.loaded(), chunk.shape[0]
    module.token_stats_bwd(
        buffer.logits_args(p, 0, rows, chunk),
        row_args.token_stats_grad(
            module,
            row_max=row_max,
            inv_sum=inv_sum,
            logp=logp,
            entropy=entropy,
            grad_logp=grad_logp,
            grad_entropy=grad_entropy,
            grad_logits=buffer.first_tile(0, rows),
            grad_lse=grad_lse,
            grad_logit_sum=grad_logit_sum,
            class_weight=p.class_weight,
        ),
    )


def linear_fwd(p: HeadProblem) -> tuple[torch.Tensor, ...]:
    """Return (logp, entropy, lse, sum_sq, top1, row_max, inv_sum), (tokens,) float32 each, 0 in masked rows."""
    check_targets(p)
    index = _row_index(p)
    make = torch.empty if index.shape[0] == p.tokens else torch.zeros
    out = tuple(make(p.tokens, dtype=torch.float32, device="cpu") for _ in range(7))
    if index.shape[0] == 0:
        return out
    rows = workspace_rows(p, index.shape[0])
    head, workspace = Head(p), LogitsBuffer.for_statistics(rows, p.vocab)
    for chunk in index.split(rows):
        buffer = workspace.of_rows(chunk.shape[0])
        head.logits_of(chunk, buffer, 0)
        stats_of_buffer(buffer, p, chunk, out)
    return out


def linear_bwd(
    p: HeadProblem,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    needs: tuple[bool, bool, bool],
    *,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
) -> list[torch.Tensor | None]:
    """Return [grad_hidden, grad_weight, grad_bias]. Rows without incoming gradient are not recomputed."""
    grad_logp = kept_reference.gradient_if_kept(p.kept, logp, grad_logp)
    ga = (
        torch.zeros(p.tokens, dtype=torch.float32, device="cpu")
        if grad_logp is None
        else grad_logp.float().contiguous()
    )
    more = (grad_entropy, grad_lse, grad_logit_sum)
    gh, gl, gu = (None if x is None else x.float().contiguous() for x in more)
    active = ga != 0
    for x in (gh, gl, gu):
        if x is not None:
            active |= x != 0
    if p.options.mask is not None:
        active &= p.options.mask
    index = active.nonzero().squeeze(1)
    rows = workspace_rows(p, max(1, index.shape[0]))
    head, buffer = Head(p), LogitsBuffer.workspace(rows, p.vocab)
    gradients = HeadGradients(head, needs)
    for start in range(0, index.shape[0], rows):
        chunk = index[start : start + rows]
        head.logits_of(chunk, buffer, 0)
        gradient_over_buffer(buffer, p, chunk, row_max, inv_sum, logp, entropy, ga, gh, gl, gu)
        gradients.add(buffer, chunk)
    return gradients.finish()


# ------------------------------------------------------------------------------------- policy_step


def policy_step(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> Step:
    """Run the step on the CPU. Level "token" computes gradients in one pass, other levels need statistics first."""
    check_targets(p)
    with torch.no_grad():
        if objective.level == "token":
            return _token_step(p, inputs, objective, inv_normalizer)
        return statistics_first(
            lambda: linear_fwd(p),
            lambda logp, entropy: cpu_policy.policy_loss(logp, entropy, inputs, objective, inv_normalizer),
            functools.partial(linear_bwd, p, needs=wanted(p)),
        )


def _token_step(p: HeadProblem, inputs: PolicyInputs, objective: Objective, inv_normalizer: float) -> Step:
    """Compute gradients in one pass: 2MHV FLOPs for the logits, 4MHV for the rows with a gradient."""
    module = native.loaded()
    index = _row_index(p)
    stats = [torch.zeros(p.tokens, dtype=torch.float32, device="cpu") for _ in range(7)]
    out = ObjectiveOut.empty(p.tokens)
    for x in (out.token_loss, out.d_logp, out.d_entropy):
        x.zero_()  # no chunk contains masked rows
    objective_args = cpu_policy.objective_args(stats[0], stats[1], inputs, objective, inv_normalizer, out)
    stats_out = row_args.token_stats_out(module, RowStats.of(stats))
    head = Head(p)
    gradients = HeadGradients(head, wanted(p))

    def phase(
        which: int, buffer: LogitsBuffer, start: int, chunk: torch.Tensor, grad_tokens: torch.Tensor | None = None
    ) -> int:
        stop = start + chunk.shape[0]
        code: int = module.policy_step(
            logits=buffer.logits_args(p, start, stop, chunk),
            stats=stats_out,
            objective=objective_args,
            grad=buffer.grad_rows(start, stop, grad_tokens),
            phases=which,
        )
        assert code < 0  # >= 0 is a bad row; targets were checked before the first GEMM
        return -1 - code

    def fill(pool: GradientPool, tokens: torch.Tensor) -> int:
        """Add tokens to the pool until it is full, run its GEMMs, and return the number of added tokens."""
        done = 0
        while done < tokens.shape[0] and pool.free() > 0:
            chunk = tokens[done : done + pool.free()]
            head.logits_of(chunk, pool.buffer, pool.used)
            pool.used += phase(module.ROWS, pool.buffer, pool.used, chunk, pool.tokens[pool.used :])
            done += chunk.shape[0]
        pool.flush()
        return done

    tiny = LogitsBuffer.workspace(1, p.vocab)
    phase(module.PREPARE, tiny, 0, index[:0])
    start, rows = 0, workspace_rows(p, max(1, index.shape[0]))
    if gradients.weight is not None:
        inside = dw_buffer(gradients.weight, index.shape[0], rows)
        if inside is not None:
            start = fill(GradientPool(inside, gradients), index)
    if start < index.shape[0]:
        rows = workspace_rows(p, index.shape[0] - start)
        pool = GradientPool(LogitsBuffer.workspace(rows, p.vocab), gradients)
        while start < index.shape[0]:
            start += fill(pool, index[start:])
    phase(module.METRICS, tiny, 0, index[:0])
    terms = PolicyTerms.of_sums(out.sums, out)
    return terms, TokenStats(*stats[:5]), gradients.finish()


# ------------------------------------------------------------------------------------------- units


def unit_step(p: HeadProblem, units: Units, loss: Loss) -> UnitTerms:
    """Compute a loss over units (a `UnitsRun`). Rows without gradient do not enter the gradient GEMMs."""
    check_targets(p)
    with torch.no_grad():
        work = _UnitsWork(p, units)
        total = torch.zeros((), dtype=torch.float64, device="cpu")
        for first, last in units.groups(work.rows):
            total += work.group(first, last, loss)
        return UnitTerms(total, TokenStats(*work.stats[:5]), work.gradients.finish(), work.read_twice)


class _UnitsWork:
    """The buffers of one call of `unit_step`."""

    def __init__(self, p: HeadProblem, units: Units) -> None:
        self.problem, self.units = p, units
        self.rows = max(1, min(rows_in_budget(p), units.order.shape[0]))
        self.head = Head(p)
        needs = wanted(p)
        self.backward = any(needs)
        self.gradients = HeadGradients(self.head, needs)
        self.buffer = LogitsBuffer.workspace(self.rows, p.vocab)
        self.stats = [torch.zeros(p.tokens, dtype=torch.float32, device="cpu") for _ in range(7)]
        self.read_twice = 0

    def logits(self, tokens: torch.Tensor) -> None:
        """Write the logits of the tokens to the buffer."""
        self.head.logits_of(tokens, self.buffer, 0)

    def group(self, first: int, last: int, loss: Loss) -> torch.Tensor:
        """Return the loss of units [first, last), and add their gradients to `gradients`."""
        tokens = self.units.order[self.units.border[first] : self.units.border[last]]
        fits = tokens.shape[0] <= self.rows
        for chunk in tokens.split(self.rows):
            self.logits(chunk)
            stats_of_buffer(self.buffer, self.problem, chunk, self.stats)
        value, c = coefficients(self.stats, self.problem.logit_sum, self.units, first, last, loss)
        live = c.live(tokens)
        if not self.backward or not bool(live.any()):
            return value
        if fits:
            self._gradient(tokens, c)
            self.buffer.compact(live)
            self.gradients.add(self.buffer, tokens[live])
            return value
        for chunk in tokens[live].split(self.rows):
            self.logits(chunk)
            self._gradient(chunk, c)
            self.gradients.add(self.buffer, chunk)
            self.read_twice += chunk.shape[0]
        return value

    def _gradient(self, tokens: torch.Tensor, c: Coefficients) -> None:
        logp, entropy, _, _, _, row_max, inv_sum = self.stats
        state = (row_max, inv_sum, logp, entropy)
        gradient_over_buffer(self.buffer, self.problem, tokens, *state, c.logp, None, c.lse, c.logit_sum)


LINEAR = HeadKernels(linear_fwd, linear_bwd, cpu_rows.STATE, unit_step)
