"""A loss over whole sequences, or pairs of them, and its gradient, from hidden states in one pass.

The coefficient of a token depends on all tokens of its unit (a sequence, a pair, the batch), so the
gradient cannot be formed row by row. Units are taken together, as many as the workspace holds: the
logits of a chunk of whole units, their statistics, the loss of those units and its derivative by
every logp, and the gradient over the logits that are still there: 2 T H V operations for the logits
and 4 T H V for the gradients of rows whose coefficient is not zero. Only a unit larger than the
workspace is read twice: statistics first, then the logits of its rows again, 2 T H V more.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import select
from tokfuse.runtime.lm_head.device_head import DeviceHead, RowClasses
from tokfuse.runtime.lm_head.head import Head, HeadGradients, HeadProblem, LogitsBuffer, rows_in_budget
from tokfuse.runtime.ops import linear_token_stats as linear
from tokfuse.runtime.ops import token_stats as stats_op
from tokfuse.runtime.ops.policy_step_hidden import NAMES, wanted
from tokfuse.runtime.ops.token_stats import TokenStats
from tokfuse.runtime.policy.step_result import Gradients, hand_over

OP = "unit_step"
# What the default budget grows to, so that the largest unit fits.
LARGEST_DEFAULT = 1 << 30

Loss = Callable[[TokenStats, torch.Tensor, int, int], torch.Tensor]
"""(statistics, tokens, first unit, end unit) -> (): the sum of the losses of these units.

`tokens` are those of the units, unit by unit, and the statistics are theirs, in this order. `logp`
is differentiable.
"""


class Units(NamedTuple):
    """Tokens sorted by unit."""

    order: torch.Tensor
    """(rows,) int64: the tokens that count, unit by unit."""
    border: list[int]
    """units + 1 places in `order`."""

    def groups(self, rows: int) -> Iterator[tuple[int, int]]:
        """Consecutive units that fit into `rows` together; a larger one stands alone."""
        first, units = 0, len(self.border) - 1
        while first < units:
            last = first + 1
            while last < units and self.border[last + 1] - self.border[first] <= rows:
                last += 1
            yield first, last
            first = last

    @property
    def largest(self) -> int:
        """Rows of the largest unit."""
        pairs = zip(self.border, self.border[1:], strict=False)
        return max((end - start for start, end in pairs), default=0)


class UnitStep(NamedTuple):
    """Result of `unit_step`."""

    loss: torch.Tensor
    """(), wired to autograd."""
    stats: TokenStats
    """(tokens,), detached; 0 for tokens outside all units."""
    gradients: Gradients
    read_twice: int
    """Rows whose logits were computed a second time, because their unit exceeds the workspace."""


def unit_step(p: HeadProblem, units: Units, loss: Loss, *, own_budget: bool) -> UnitStep:
    """`loss` of all units and its gradients by hidden, weight and bias where they ask for one.

    own_budget: the caller chose `p.memory_budget`; otherwise it grows to the largest unit, up to
        1 GiB.
    """
    gradients: Gradients = {}
    backend = select(linear.OP, p.hidden.device.type, p.hidden.dtype, p.options.features())
    if torch.compiler.is_compiling() or backend.backend == "reference":
        return _composed(p, units, loss)
    if not own_budget:
        row = 6 * (p.vocab + 16) + 8 * p.hidden.shape[1] + 64
        grown = min(units.largest * row, LARGEST_DEFAULT)
        p = p._replace(memory_budget=max(p.memory_budget, grown))
    if not torch.is_grad_enabled():
        p = p._replace(needs=(False, False, False))
    run = _RUNS[backend.backend]
    value, *rest = _UnitStep.apply(p.hidden, p.weight, p.bias, p, units, loss, run, gradients)
    return UnitStep(value, TokenStats(*rest[:5]), gradients, rest[5])


def _composed(p: HeadProblem, units: Units, loss: Loss) -> UnitStep:
    """`linear_token_stats` and autograd: what the chunked passes must equal."""
    o = p.options
    stats = linear.linear_token_stats(
        p.hidden,
        p.weight,
        p.target,
        bias=p.bias,
        temperature=o.temperature,
        softcap=o.softcap,
        logit_scale=o.logit_scale,
        mask=o.mask,
        memory_budget=p.memory_budget,
    )
    of_units = TokenStats(*(x[units.order] for x in stats))
    total = loss(of_units, units.order, 0, len(units.border) - 1).to(stats.logp.dtype)
    return UnitStep(total, TokenStats(*(x.detach() for x in stats)), {}, 0)


class _UnitStep(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        p: HeadProblem,
        units: Units,
        loss: Loss,
        run: Callable[..., Any],
        gradients: Gradients,
    ) -> tuple[Any, ...]:
        value, stats, grads, read_twice = run(p, units, loss)
        gradients.update(zip(NAMES, grads, strict=True))
        ctx.gradients = gradients
        ctx.mark_non_differentiable(*stats)
        return value.to(stats[0].dtype), *stats, read_twice

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_loss: torch.Tensor, *_: Any) -> tuple[Any, ...]:
        grads = hand_over(ctx.gradients, grad_loss, "preference_step")
        return (*(grads[name] for name in NAMES),) + (None,) * 5


def _coefficients(
    stats: list[torch.Tensor], tokens: torch.Tensor, first: int, last: int, loss: Loss
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss of the units, d loss / d logp of every token: (all tokens,), 0 outside the units)."""
    with torch.inference_mode(False), torch.enable_grad():
        of_units = TokenStats(*(x[tokens] for x in stats[:5]))
        logp = of_units.logp.requires_grad_()
        value = loss(of_units, tokens, first, last)
        (found,) = torch.autograd.grad(value, logp, allow_unused=True, materialize_grads=True)
    coefficient = torch.zeros_like(stats[0])
    coefficient[tokens] = found
    return value.detach(), coefficient


# ------------------------------------------------------------------------------------ CPU backend


def _cpu_run(p: HeadProblem, units: Units, loss: Loss) -> tuple[Any, ...]:
    linear.check_targets(OP, p)
    with torch.no_grad():
        work = _CpuWork(p, units)
        total = torch.zeros((), dtype=torch.float64)
        for first, last in units.groups(work.rows):
            total += work.group(first, last, loss)
        return total, work.stats[:5], work.gradients.finish(), work.read_twice


class _CpuWork:
    """One call's buffers."""

    def __init__(self, p: HeadProblem, units: Units) -> None:
        self.problem, self.units = p, units
        self.rows = max(1, min(rows_in_budget(p), units.order.shape[0]))
        self.head = Head(p)
        needs = wanted(p)
        self.backward = any(needs)
        self.gradients = HeadGradients(self.head, needs)
        self.buffer = LogitsBuffer.workspace(self.rows, p.vocab)
        self.stats = [torch.zeros(p.tokens, dtype=torch.float32) for _ in range(7)]
        self.read_twice = 0
        module = native.module()
        assert module is not None
        self.module: Any = module

    def logits(self, tokens: torch.Tensor) -> None:
        self.head.logits(self.head.rows_of_hidden(tokens), self.buffer, 0)

    def group(self, first: int, last: int, loss: Loss) -> torch.Tensor:
        """Loss of units [first, last); their gradients are added to the sums."""
        tokens = self.units.order[self.units.border[first] : self.units.border[last]]
        fits = tokens.shape[0] <= self.rows
        for chunk in tokens.split(self.rows):
            self.logits(chunk)
            record, alive = self.buffer.record(self.problem, 0, chunk.shape[0], chunk)
            self.module.token_stats_fwd(record, *[x.data_ptr() for x in self.stats], 0, 0, 0, 1.0)
            del alive
        value, c = _coefficients(self.stats, tokens, first, last, loss)
        live = c[tokens] != 0  # NaN counts as live
        if not self.backward or not bool(live.any()):
            return value
        if fits:
            self._gradient(tokens, c)
            self._compact(live)
            self.gradients.add(self.buffer, tokens[live])
            return value
        for chunk in tokens[live].split(self.rows):
            self.logits(chunk)
            self._gradient(chunk, c)
            self.gradients.add(self.buffer, chunk)
            self.read_twice += chunk.shape[0]
        return value

    def _gradient(self, tokens: torch.Tensor, c: torch.Tensor) -> None:
        """The gradient of the rows in the buffer, over their logits."""
        record, alive = self.buffer.record(self.problem, 0, tokens.shape[0], tokens)
        _, entropy, _, _, _, shift, inv_sum = self.stats
        self.module.token_stats_bwd(
            record,
            shift.data_ptr(),
            inv_sum.data_ptr(),
            entropy.data_ptr(),
            c.data_ptr(),
            0,
            self.buffer.storage.data_ptr(),
            self.problem.vocab,
        )
        del alive

    def _compact(self, live: torch.Tensor) -> None:
        """Rows without gradient leave the buffer: they need no gradient GEMM."""
        if bool(live.all()):
            return
        rows = self.buffer.storage[: self.rows * self.problem.vocab].view(self.rows, -1)
        for place, row in enumerate(live.nonzero().flatten().tolist()):
            if place != row:
                rows[place].copy_(rows[row])


# --------------------------------------------------------------------------------- Triton backend


def _device_run(kernels: stats_op.Kernels, p: HeadProblem, units: Units, loss: Loss) -> tuple[Any, ...]:
    """As on the CPU; rows without gradient pass as zeros, the host reads no coefficient."""
    if may_read(p.target):
        linear.check_targets(OP, p)
    assert kernels.backward is not None
    needs, device, rows = wanted(p), p.hidden.device, units.order.shape[0]
    with torch.no_grad():
        head = DeviceHead(p, needs, RowClasses(units.order, rows, rows, None))
        stats = [torch.zeros(p.tokens, dtype=torch.float32, device=device) for _ in range(7)]
        total = torch.zeros((), dtype=torch.float64, device=device)
        read_twice = 0
        for first, last in units.groups(head.rows_in_budget()):
            start, stop = units.border[first], units.border[last]
            logits = None
            chunks = list(head.chunks(start, stop))
            for index, h in chunks:
                logits = head.logits(h)
                target, options = linear.rows_of_options(p, index)
                found = kernels.forward(logits, target, **options)
                for whole, part in zip(stats, found, strict=True):
                    whole[index] = part
            value, c = _coefficients(stats, units.order[start:stop], first, last, loss)
            total += value
            if not any(needs):
                continue
            for index, h in chunks:
                if logits is None or len(chunks) > 1:
                    logits = head.logits(h)
                    read_twice += index.shape[0]
                target, options = linear.rows_of_options(p, index)
                _, entropy, _, _, _, row_max, inv_sum = (x[index] for x in stats)
                dz = kernels.backward(
                    logits,
                    target,
                    row_max,
                    inv_sum,
                    entropy,
                    c[index],
                    torch.zeros_like(entropy),
                    out=head.gradient_like(logits),
                    **options,
                )
                head.add(index, h, dz)
        return total, stats[:5], head.finish(), read_twice


_RUNS = {
    "cuda": functools.partial(_device_run, stats_op.CUDA),
    "triton": functools.partial(_device_run, stats_op.TRITON),
    "cpu": _cpu_run,
}
