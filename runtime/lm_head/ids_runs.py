"""linear_token_stats with log-probs of a few ids per token: the lm_head in chunks, on every backend.

The caller gives the ids or asks for the most likely ones. In the second case `torch.topk` finds them
in the logits of a chunk, before the row kernel runs.

A step has a loss that is a sum over tokens, so its gradient overwrites the logits of a chunk at once:
2 T H V operations for the logits and 4 T H V for the gradients. The backward of the statistics would
compute the logits again.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.backends import cuda_rows, row_args, triton_rows
from tokfuse.runtime.backends.row_args import RowStats
from tokfuse.runtime.core import native
from tokfuse.runtime.core.checks import may_read
from tokfuse.runtime.core.dispatch import Kernels
from tokfuse.runtime.core.token_ids import TokenIds
from tokfuse.runtime.lm_head import device_head
from tokfuse.runtime.lm_head.cpu_head import Head, HeadGradients, LogitsBuffer, dw_buffer, needed_rows, workspace_rows
from tokfuse.runtime.lm_head.device_head import DeviceHead
from tokfuse.runtime.lm_head.problem import HeadProblem, wanted
from tokfuse.runtime.reference import token_stats_at as reference

Needs = tuple[bool, bool, bool]


IdsLoss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""(log-probs of the ids of some tokens (rows, K), these tokens (rows,) int64) -> (): the sum of their losses.

It is differentiable in the log-probs, which are 0 at padding.
"""


class IdsTerms(NamedTuple):
    """The values of a step."""

    loss: torch.Tensor
    """() float64."""
    entropy: torch.Tensor
    """(tokens,); 0 for masked tokens."""
    logp_at: torch.Tensor
    """(tokens, K); 0 for masked tokens and padding."""
    gradients: list[torch.Tensor | None]
    """In the order of `problem.NAMES`."""


class HeadIdsKernels(NamedTuple):
    """The `run` of linear_token_stats with ids or top_k."""

    forward: Callable[[HeadProblem, TokenIds | None, int], tuple[torch.Tensor, ...]]
    """(problem, ids, K if there are none) -> the seven outputs of token_stats, logp_at and the ids, flat."""
    backward: Callable[..., list[torch.Tensor | None]] | None
    """(problem, ids, row_max, inv_sum, logp, entropy, logp_at, grad_logp, grad_entropy, grad_lse,
    grad_logp_at, needs) -> gradients in order of `problem.NAMES`. None if autograd differentiates `forward`."""
    step: Callable[[HeadProblem, TokenIds, IdsLoss], IdsTerms] | None = None
    """The run of `ids_step`, for a matrix of ids in range. None: it is composed of `forward` and autograd."""


def _places(p: HeadProblem, ids: TokenIds | None, top_k: int) -> TokenIds:
    """Return the ids, or padding that the most likely ids will replace. Check all values before the first GEMM."""
    if ids is None:
        ids = TokenIds.of_matrix(p.target.new_full((p.tokens, top_k), -1))
    if may_read(ids.flat):
        o = p.options
        reference.check_values("linear_token_stats", p.target, ids.flat, ids.offsets, p.vocab, o.mask, o.temperature)
    return ids


def _gradient_arrives(
    p: HeadProblem, ids: TokenIds, of_rows: tuple[torch.Tensor, ...], grad_logp_at: torch.Tensor
) -> torch.Tensor:
    """Return (tokens,) bool: rows whose logits the backward needs."""
    at_ids = (grad_logp_at != 0) & (ids.flat >= 0)
    before = torch.nn.functional.pad(at_ids.cumsum(0), (1, 0))[ids.offsets]
    active = before[1:] > before[:-1]
    for grad in of_rows:
        active = active | (grad != 0)
    return active if p.options.mask is None else active & p.options.mask


def _loss_of(loss: IdsLoss, logp_at: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the loss of these tokens, and its gradient by their log-probs, (rows, K)."""
    with torch.inference_mode(False), torch.enable_grad():
        part = logp_at[tokens].requires_grad_()
        value = loss(part, tokens)
        (found,) = torch.autograd.grad(value, part, allow_unused=True, materialize_grads=True)
    return value.detach(), found


# --------------------------------------------------------------------------------------------- CPU


def cpu_fwd(p: HeadProblem, ids: TokenIds | None, top_k: int) -> tuple[torch.Tensor, ...]:
    """Run cpu_runs.linear_fwd with the log-probs of the ids."""
    places, module = _places(p, ids, top_k), native.loaded()
    needed = needed_rows(p)
    index = torch.arange(p.tokens, device="cpu") if needed is None else needed
    stats = [torch.zeros(p.tokens, dtype=torch.float32, device="cpu") for _ in range(7)]
    logp_at = torch.zeros(places.flat.shape, dtype=torch.float32, device="cpu")
    if index.shape[0] > 0:
        rows = workspace_rows(p, index.shape[0])
        head, buffer = Head(p), LogitsBuffer.workspace(rows, p.vocab)
        for chunk in index.split(rows):
            head.logits_of(chunk, buffer, 0)
            if ids is None:
                logits = buffer.first_tile(0, chunk.shape[0])
                places.flat.view(p.tokens, top_k)[chunk] = logits.topk(top_k).indices
            bad = module.token_stats_at_fwd(
                buffer.logits_args(p, 0, chunk.shape[0], chunk),
                row_args.token_stats_out(module, RowStats.of(stats)),
                row_args.ids_args(module, places.flat, places.offsets, logp_at),
            )
            assert bad < 0  # the values were checked before the first GEMM
    return (*stats, logp_at, places.flat)


def cpu_bwd(
    p: HeadProblem,
    ids: TokenIds,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    logp_at: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_logp_at: torch.Tensor,
    needs: Needs,
) -> list[torch.Tensor | None]:
    """Return the gradients; rows without incoming gradient are not recomputed."""
    module = native.loaded()
    given = tuple(
        torch.zeros(p.tokens, dtype=torch.float32, device="cpu") if x is None else x
        for x in (grad_logp, grad_entropy, grad_lse)
    )
    ga, gh, gl = given
    index = _gradient_arrives(p, ids, given, grad_logp_at).nonzero().squeeze(1)
    rows = workspace_rows(p, max(1, index.shape[0]))
    head, buffer = Head(p), LogitsBuffer.workspace(rows, p.vocab)
    gradients = HeadGradients(head, needs)
    for chunk in index.split(rows):
        head.logits_of(chunk, buffer, 0)
        module.token_stats_at_bwd(
            buffer.logits_args(p, 0, chunk.shape[0], chunk),
            row_args.token_stats_grad(
                module,
                row_max=row_max,
                inv_sum=inv_sum,
                logp=logp,
                entropy=entropy,
                grad_logp=ga,
                grad_entropy=gh,
                grad_lse=gl,
                grad_logits=buffer.first_tile(0, chunk.shape[0]),
            ),
            row_args.ids_args(module, ids.flat, ids.offsets, logp_at, grad_logp_at),
        )
        gradients.add(buffer, chunk)
    return gradients.finish()


def cpu_step(p: HeadProblem, ids: TokenIds, loss: IdsLoss) -> IdsTerms:
    """Run a step. The first chunk uses the memory of dW, as in `policy_step`."""
    with torch.no_grad():
        needed = needed_rows(p)
        index = torch.arange(p.tokens, device="cpu") if needed is None else needed
        work = _StepWork(p, ids, loss)
        count, start, rows = index.shape[0], 0, workspace_rows(p, max(1, index.shape[0]))
        if work.gradients.weight is not None and count > 0:
            inside = dw_buffer(work.gradients.weight, count, min(rows, count))
            if inside is not None:
                start = inside.rows
                work.visit(inside, index[:start])
        if start < count:
            buffer = LogitsBuffer.workspace(min(rows, count - start), p.vocab)
            for chunk in index[start:].split(buffer.rows):
                work.visit(buffer, chunk)
        return IdsTerms(work.loss, work.stats[1], work.logp_at, work.gradients.finish())


class _StepWork:
    """The outputs and gradients of one `cpu_step`."""

    def __init__(self, p: HeadProblem, ids: TokenIds, loss: IdsLoss) -> None:
        self.problem, self.ids, self.loss_of_tokens = p, ids, loss
        needs = wanted(p)
        self.backward = any(needs)
        self.head = Head(p)
        self.gradients = HeadGradients(self.head, needs)
        self.stats = [torch.zeros(p.tokens, dtype=torch.float32, device="cpu") for _ in range(7)]
        self.none = torch.zeros(p.tokens, dtype=torch.float32, device="cpu")
        self.logp_at, self.grad_at = (torch.zeros(ids.shape, dtype=torch.float32, device="cpu") for _ in range(2))
        self.loss = torch.zeros((), dtype=torch.float64, device="cpu")

    def visit(self, buffer: LogitsBuffer, chunk: torch.Tensor) -> None:
        """Add the loss of the tokens in `chunk`, and their gradients."""
        module, ids, rows = native.loaded(), self.ids, chunk.shape[0]
        self.head.logits_of(chunk, buffer, 0)
        logits = buffer.logits_args(self.problem, 0, rows, chunk)
        bad = module.token_stats_at_fwd(
            logits,
            row_args.token_stats_out(module, RowStats.of(self.stats)),
            row_args.ids_args(module, ids.flat, ids.offsets, self.logp_at.view(-1)),
        )
        assert bad < 0  # the values were checked before the first GEMM
        value, found = _loss_of(self.loss_of_tokens, self.logp_at, chunk)
        self.loss += value
        live = ((found != 0) & (ids.flat.view(ids.shape)[chunk] >= 0)).any(1)  # NaN counts as live
        if not self.backward or not bool(live.any()):
            return
        self.grad_at[chunk] = found
        logp, entropy, _, _, _, row_max, inv_sum = self.stats
        module.token_stats_at_bwd(
            logits,
            row_args.token_stats_grad(
                module,
                row_max=row_max,
                inv_sum=inv_sum,
                logp=logp,
                entropy=entropy,
                grad_logp=self.none,
                grad_entropy=self.none,
                grad_logits=buffer.first_tile(0, rows),
            ),
            row_args.ids_args(module, ids.flat, ids.offsets, self.logp_at.view(-1), self.grad_at.view(-1)),
        )
        buffer.compact(live)
        self.gradients.add(buffer, chunk[live])


# ----------------------------------------------------------------------------------------- devices


def _device_fwd(kernels: Kernels, p: HeadProblem, ids: TokenIds | None, top_k: int) -> tuple[torch.Tensor, ...]:
    """Run torch's GEMM and the row kernels chunk by chunk."""
    places = _places(p, ids, top_k)
    rows = device_head.classify(p, p.options.mask, None)
    head = DeviceHead(p, (False, False, False), rows)
    # Not the rows of one tensor: results of an op in a compiled graph must not share storage.
    counts = [p.tokens] * 7 + [places.flat.shape[0]]
    out = tuple(torch.zeros(count, dtype=torch.float32, device=p.hidden.device) for count in counts)
    with torch.no_grad():
        for chunk in head.chunks(0, rows.forward):
            index, h, _ = chunk
            logits = head.logits_of(chunk)
            if ids is None:
                top = logits.topk(top_k).indices
                if rows.keep is not None:
                    top = torch.where(rows.keep[index, None], top, -1)
                places.flat.view(p.tokens, top_k)[index] = top
            kernels.forward(
                logits, p.target, places.flat, places.offsets, index=index, out=out, **p.options.without_bias()
            )
    return (*out, places.flat)


def _device_bwd(
    kernels: Kernels,
    p: HeadProblem,
    ids: TokenIds,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    logp_at: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_lse: torch.Tensor | None,
    grad_logp_at: torch.Tensor,
    needs: Needs,
) -> list[torch.Tensor | None]:
    """Return the gradients; rows without incoming gradient are not recomputed."""
    assert kernels.backward is not None
    of_rows = (grad_logp, grad_entropy, grad_lse)
    given = tuple(torch.zeros_like(entropy) if x is None else x.float() for x in of_rows)
    rows = device_head.classify(p, _gradient_arrives(p, ids, given, grad_logp_at), None)
    head = DeviceHead(p, needs, rows)
    saved: tuple[Any, ...] = (row_max, inv_sum, logp, entropy, logp_at, *given, grad_logp_at)
    with torch.no_grad():
        for chunk in head.chunks(0, rows.gradient):
            index, h, _ = chunk
            logits = head.logits_of(chunk)
            dz = kernels.backward(
                logits,
                p.target,
                ids.flat,
                ids.offsets,
                *saved,
                index=index,
                out=head.gradient_like(logits),
                **p.options.without_bias(),
            )
            head.add(index, h, dz)
    return head.finish()


def _device_step(kernels: Kernels, p: HeadProblem, ids: TokenIds, loss: IdsLoss) -> IdsTerms:
    """Run a step. The host reads no coefficients: rows without gradient enter the GEMMs as zeros."""
    assert kernels.backward is not None
    needs, device = wanted(p), p.hidden.device
    with torch.no_grad():
        rows = device_head.classify(p, p.options.mask, None)
        head = DeviceHead(p, needs, rows)
        vectors = [torch.zeros(p.tokens, dtype=torch.float32, device=device) for _ in range(8)]
        stats, none = vectors[:7], vectors[7]
        logp_at, grad_at = (torch.zeros(ids.shape, dtype=torch.float32, device=device) for _ in range(2))
        total = torch.zeros((), dtype=torch.float64, device=device)
        logp, entropy, _, _, _, row_max, inv_sum = stats
        flat_logp, flat_grad = logp_at.view(-1), grad_at.view(-1)
        for chunk in head.chunks(0, rows.forward):
            index, h, _ = chunk
            logits = head.logits_of(chunk)
            out = (*stats, flat_logp)
            kernels.forward(logits, p.target, ids.flat, ids.offsets, index=index, out=out, **p.options.without_bias())
            value, found = _loss_of(loss, logp_at, index)
            total += value
            if not any(needs):
                continue
            grad_at[index] = found
            dz = kernels.backward(
                logits,
                p.target,
                ids.flat,
                ids.offsets,
                row_max,
                inv_sum,
                logp,
                entropy,
                flat_logp,
                none,
                none,
                None,
                flat_grad,
                index=index,
                out=head.gradient_like(logits),
                **p.options.without_bias(),
            )
            head.add(index, h, dz)
        return IdsTerms(total, entropy, logp_at, head.finish())


def _on_device(rows: Kernels) -> HeadIdsKernels:
    forward, backward = functools.partial(_device_fwd, rows), functools.partial(_device_bwd, rows)
    return HeadIdsKernels(forward, backward, functools.partial(_device_step, rows))


CPU = HeadIdsKernels(cpu_fwd, cpu_bwd, cpu_step)
CUDA = _on_device(cuda_rows.TOKEN_STATS_AT)
TRITON = _on_device(triton_rows.TOKEN_STATS_AT)
