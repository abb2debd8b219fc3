"""Build the argument structs of the row kernels (csrc/common/row_args.h). Nothing else builds them.

`native` is the module whose kernel takes the struct: `core.native.loaded()` or `cuda_backend.launchers()`.
A struct keeps its tensors alive. `docs/names.md` defines every field.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from tokfuse.runtime.core.codes import DIVERGENCES, SKEW
from tokfuse.runtime.core.logit_options import LogitOptions
from tokfuse.runtime.core.native import DTYPE_CODE, contiguous, empty_vectors, float_vector

DIVERGENCE_STATE = 6  # kDivergenceState of csrc/common/row_args.h


class RowStats(NamedTuple):
    """The outputs of a forward for each token, (tokens,) float32 each."""

    logp: torch.Tensor
    entropy: torch.Tensor
    lse: torch.Tensor
    sum_sq: torch.Tensor | None = None
    top1: torch.Tensor | None = None
    row_max: torch.Tensor | None = None
    inv_sum: torch.Tensor | None = None
    second_logp: torch.Tensor | None = None
    sum_p2_logp: torch.Tensor | None = None
    sum_p2_logp2: torch.Tensor | None = None

    @staticmethod
    def of(outputs: Sequence[torch.Tensor]) -> "RowStats":
        """Name the outputs of `token_stats` kernels. An empty tensor among the last three means: not requested."""
        if len(outputs) == 7:
            return RowStats(*outputs)
        return RowStats(*outputs[:7], *(x if x.numel() > 0 else None for x in outputs[7:]))


def empty_outputs(logits: torch.Tensor, second: bool = False, moments: bool = False) -> tuple[torch.Tensor, ...]:
    """Allocate the outputs of `token_stats` kernels in the order of `RowStats`, uninitialised.

    There are seven. With `second` (a second temperature) or `moments` there are ten, and those that
    are not requested are empty.
    """
    tokens = logits.shape[0]
    sizes = [tokens] * 7
    if second or moments:
        sizes += [tokens if second else 0, tokens if moments else 0, tokens if moments else 0]
    return empty_vectors(sizes, logits.device)


def unit_stride(x: torch.Tensor) -> torch.Tensor:
    """Return `x`, or a contiguous copy if the elements of a row are not adjacent."""
    return x if x.stride(1) == 1 else x.contiguous()


def _per_token(temperature: float | torch.Tensor) -> tuple[torch.Tensor | None, float]:
    """Return (temperatures, temperature). The first is None for a number."""
    if isinstance(temperature, torch.Tensor):
        return float_vector(temperature), 1.0
    return None, temperature


def logits_args(
    native: Any,
    logits: torch.Tensor,
    target: torch.Tensor,
    o: LogitOptions,
    *,
    index: torch.Tensor | None = None,
    vocab: int | None = None,
    tile: int = 0,
    tile_stride: int = 0,
) -> Any:
    """Build LogitsArgs.

    Args:
        logits: (rows, vocab). With tiles: the first tile, (rows, tile).
        target: (tokens,) int64. The mask and the temperatures of `o` are (tokens,) too.
        index: (rows,) int64 token of each row; None: row i is token i.
        vocab: None: the columns of `logits`.
        tile, tile_stride: columns of a tile and elements between tiles; CPU only.
    """
    logits = unit_stride(logits)
    bias = None if o.bias_logits is None else unit_stride(o.bias_logits)
    temperatures, temperature = _per_token(o.temperature)
    return native.LogitsArgs(
        logits=logits,
        stride=logits.stride(0),
        tile=tile,
        tile_stride=tile_stride,
        dtype=DTYPE_CODE[logits.dtype],
        rows=logits.shape[0],
        vocab=logits.shape[1] if vocab is None else vocab,
        index=index,
        tokens=target.shape[0],
        target=target.contiguous(),
        mask=contiguous(o.mask),
        temperatures=temperatures,
        temperature=temperature,
        softcap=o.softcap or 0.0,
        logit_scale=o.logit_scale,
        bias_logits=bias,
        bias_stride=0 if bias is None else bias.stride(0),
        bias_scale=o.bias_scale,
        threads=torch.get_num_threads(),
    )


def token_stats_out(
    native: Any,
    stats: RowStats,
    second_temperature: float | None = None,
    logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Any:
    """Build TokenStatsOut: the kernel writes to the tensors of `stats`."""
    # Written out, because `**stats._asdict()` first makes a dictionary, which takes as long as a small kernel.
    return native.TokenStatsOut(
        logp=stats.logp,
        entropy=stats.entropy,
        lse=stats.lse,
        sum_sq=stats.sum_sq,
        top1=stats.top1,
        row_max=stats.row_max,
        inv_sum=stats.inv_sum,
        second_logp=stats.second_logp,
        sum_p2_logp=stats.sum_p2_logp,
        sum_p2_logp2=stats.sum_p2_logp2,
        second_temperature=1.0 if second_temperature is None else second_temperature,
        logit_sum=logit_sum,
        class_weight=class_weight,
    )


def token_stats_grad(
    native: Any,
    *,
    row_max: torch.Tensor,
    inv_sum: torch.Tensor,
    logp: torch.Tensor,
    entropy: torch.Tensor,
    grad_logp: torch.Tensor | None,
    grad_entropy: torch.Tensor | None,
    grad_logits: torch.Tensor,
    grad_lse: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
    class_weight: torch.Tensor | None = None,
) -> Any:
    """Build TokenStatsGrad. row_max, inv_sum, logp and entropy are outputs of the forward, (tokens,)."""
    return native.TokenStatsGrad(
        row_max=row_max,
        inv_sum=inv_sum,
        logp=logp,
        entropy=entropy,
        grad_logp=float_vector(grad_logp),
        grad_entropy=float_vector(grad_entropy),
        grad_logits=grad_logits,
        grad_stride=grad_logits.stride(0),
        grad_dtype=DTYPE_CODE[grad_logits.dtype],
        grad_lse=float_vector(grad_lse),
        grad_logit_sum=float_vector(grad_logit_sum),
        class_weight=class_weight,
    )


def grad_rows(native: Any, grad_logits: torch.Tensor, grad_tokens: torch.Tensor | None = None) -> Any:
    """Build GradRows. grad_tokens: (rows,) int64, receives the tokens of rows with a gradient; CPU only."""
    return native.GradRows(
        grad_logits=grad_logits,
        grad_stride=grad_logits.stride(0),
        grad_dtype=DTYPE_CODE[grad_logits.dtype],
        grad_tokens=grad_tokens,
    )


def kept_args(native: Any, logits: Any, ids: torch.Tensor, offsets: torch.Tensor) -> Any:
    """Build KeptArgs. logits: LogitsArgs; ids: (kept,) int64; offsets: (tokens + 1,) int64."""
    return native.KeptArgs(logits=logits, ids=ids, offsets=offsets, num_ids=ids.shape[0])


def ids_args(
    native: Any,
    ids: torch.Tensor,
    offsets: torch.Tensor,
    logp_at: torch.Tensor,
    grad_logp_at: torch.Tensor | None = None,
    **scratch: torch.Tensor,
) -> Any:
    """Build IdsArgs. ids, logp_at, grad_logp_at: (ids,); offsets: (tokens + 1,) int64.

    `scratch`: the working memory of the CUDA backward.
    """
    return native.IdsArgs(
        ids=ids,
        offsets=offsets,
        num_ids=ids.shape[0],
        logp_at=logp_at,
        grad_logp_at=float_vector(grad_logp_at),
        **scratch,
    )


def divergence_args(
    native: Any,
    logits_p: torch.Tensor,
    logits_q: torch.Tensor,
    o: LogitOptions,
    *,
    kind: str,
    mix_weight: float,
    given: torch.Tensor | None = None,
) -> Any:
    """Build DivergenceArgs. kind: one of `DIVERGENCES`. given: state of longer rows, (tokens, DIVERGENCE_STATE)."""
    logits_p, logits_q = unit_stride(logits_p), unit_stride(logits_q)
    temperatures, temperature = _per_token(o.temperature)
    return native.DivergenceArgs(
        logits_p=logits_p,
        logits_q=logits_q,
        stride_p=logits_p.stride(0),
        stride_q=logits_q.stride(0),
        dtype=DTYPE_CODE[logits_p.dtype],
        tokens=logits_p.shape[0],
        vocab=logits_p.shape[1],
        mask=contiguous(o.mask),
        temperatures=temperatures,
        temperature=temperature,
        softcap=o.softcap or 0.0,
        logit_scale=o.logit_scale,
        kind=DIVERGENCES.index(kind),
        mix_weight=mix_weight,
        bound=divergence_bound(kind, mix_weight),
        given=given,
        threads=torch.get_num_threads(),
    )


def divergence_bound(kind: str, mix_weight: float) -> float:
    """Return the largest value of a divergence, in nats; rounding must not exceed it."""
    if kind == "jsd":  # the entropy of the two weights
        return -mix_weight * math.log(mix_weight) - (1 - mix_weight) * math.log1p(-mix_weight)
    if kind in SKEW:
        return -math.log(mix_weight)
    return 1.0 if kind == "tvd" else math.inf


def divergence_out(native: Any, divergence: torch.Tensor, state: torch.Tensor) -> Any:
    """Build DivergenceOut."""
    return native.DivergenceOut(divergence=divergence, state=state)


def divergence_grad(native: Any, state: torch.Tensor, grad_divergence: torch.Tensor, grad_logits: torch.Tensor) -> Any:
    """Build DivergenceGrad. grad_logits: (tokens, vocab), of logits_p."""
    return native.DivergenceGrad(
        state=state,
        grad_divergence=float_vector(grad_divergence),
        grad_logits=grad_logits,
        grad_stride=grad_logits.stride(0),
    )


def distill_args(
    native: Any, student: Any, teacher: Any, *, kind: str, mix_weight: float, class_weight: torch.Tensor | None = None
) -> Any:
    """DistillArgs. student, teacher: LogitsArgs of the same tokens."""
    return native.DistillArgs(
        student=student,
        teacher=teacher,
        kind=DIVERGENCES.index(kind),
        mix_weight=mix_weight,
        bound=divergence_bound(kind, mix_weight),
        class_weight=class_weight,
    )


def distill_out(native: Any, stats: Sequence[torch.Tensor]) -> Any:
    """DistillOut. stats: the fields of `PairedStats`, then lse, then the sum of the logits; (tokens,) float32 each."""
    divergence, entropy, logp, teacher_logp, top1_agreement, *further = stats
    lse, logit_sum = [*further, None, None][:2]
    return native.DistillOut(
        divergence=divergence,
        entropy=entropy,
        logp=logp,
        teacher_logp=teacher_logp,
        top1_agreement=top1_agreement,
        lse=lse,
        logit_sum=logit_sum,
    )


def distill_grad(
    native: Any,
    grad_divergence: torch.Tensor | None = None,
    grad_logp: torch.Tensor | None = None,
    grad_entropy: torch.Tensor | None = None,
    grad_lse: torch.Tensor | None = None,
    grad_lse_square: torch.Tensor | None = None,
    grad_logit_sum: torch.Tensor | None = None,
    *,
    grad_logits: torch.Tensor | None = None,
) -> Any:
    """DistillGrad; without `grad_logits` no gradient is computed."""
    return native.DistillGrad(
        grad_divergence=float_vector(grad_divergence),
        grad_logp=float_vector(grad_logp),
        grad_entropy=float_vector(grad_entropy),
        grad_lse=float_vector(grad_lse),
        grad_lse_square=float_vector(grad_lse_square),
        grad_logit_sum=float_vector(grad_logit_sum),
        grad_logits=grad_logits,
        grad_stride=0 if grad_logits is None else grad_logits.stride(0),
    )
