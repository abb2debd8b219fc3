"""policy_step from logits for token-level objectives: statistics, objective and gradient in one kernel.

One program computes one row. A first pass computes the statistics (rows.py). One scalar evaluation
of the objective (objective.py) gives the two coefficients ga = d_logp and gh = d_entropy. A second
pass reads the row from the L2 cache and writes the gradient

    dz = f'(z) ( ga / T [j = y] + e (a0 + a1 d) )

If both coefficients are zero (masked, zero advantage, active clip), the row is filled with zeros
instead. A masked row is not read at all. Bytes of memory per token at bf16: 2V read, 2V written.
Exponentials per element: 2. With a softcap: 4, and 1.25 reciprocals, because in the second pass four
elements share one. The tangents are computed twice, because a row of them (594 KiB in float32 at a
vocabulary of 152k) does not fit into the fast memory of a program.

Three measures keep the row in L2 until the second pass. One wide program fills an SM, so the number
of rows in L2 is at most the number of SMs (H100: 132 * 297 KiB = 38 MiB of 50 MiB at a vocabulary
of 152k). The loads of the first pass are marked evict_last. The loads of the second pass and all
stores are marked evict_first.

policy_metrics.py computes the metric sums from the results per token.

Legend: R rows of logits; T tokens, R = T without an index, else row i belongs to token index[i];
V vocabulary.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch, policy_metrics, rows
from tokfuse.triton_kernels.compile_cases import compile_case, meta
from tokfuse.triton_kernels.objective import (
    CASE_CODES,
    CASE_NUMBERS,
    ObjectiveNumbers,
    TokenPointers,
    require_signal,
    token_objective,
)
from tokfuse.triton_kernels.policy_loss import pointer_or_number, results_like
from tokfuse.triton_kernels.policy_metrics import TokenResults
from tokfuse.triton_kernels.tile import NEG_INF, store

FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)

# With 32 warps of more than 32 registers per thread, only one program fits on an SM.
launch.declare(
    "policy_step",
    {
        80: launch.LaunchConfig(block_v=16384, num_warps=32),
        100: launch.LaunchConfig(block_v=8192, num_warps=16),  # 126 MB of L2 can hold two rows per SM
    },
)
# The tanh of a softcap needs more than the 64 registers per thread that 32 warps allow. With 16 warps
# of more than 64 registers, too, only one program fits on an SM.
launch.declare("policy_step_softcap", {80: launch.LaunchConfig(block_v=8192, num_warps=16)})


class RowStatistics(NamedTuple):
    """The public statistics, (T,) float32 each."""

    logp: Any
    entropy: Any
    lse: Any
    sum_sq: Any
    top1: Any


@triton.jit
def _statistics(
    row_ptr,
    c,
    lead,
    total,
    at_y,
    softcap,
    logit_scale,
    HAS_SOFTCAP: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    """Return (m, S, SD, S2) of the row from offset lead to total, without the element at at_y."""
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)
    m = tl.full((LANES,), rows.LOWEST_MAX, tl.float32)
    s = tl.zeros((LANES,), tl.float32)
    sd = tl.zeros((LANES,), tl.float32)
    ss = tl.zeros((LANES,), tl.float32)
    whole = total // TILE * TILE
    first, edges, last, of_target = rows.masked_tiles(at_y, lead, whole, total, TILE)
    for i in range(first, last):
        at = tl.where(i < edges, i * whole, of_target) + offs_v
        inside = (at >= lead) & (at < total)
        u, _ = rows.read(row_ptr, None, at, inside, softcap, logit_scale, 0.0, HAS_SOFTCAP, "evict_last")
        m, s, sd, ss, _, _, _, _ = rows.fold(tl.where(at == at_y, NEG_INF, u), c, m, s, sd, ss)
    for tile in range(tl.where(lead > 0, TILE, 0), whole - tl.where(of_target < whole, TILE, 0), TILE):
        start = tile + tl.where(tile < of_target, 0, TILE)
        u, _ = rows.read_whole(row_ptr, None, start, offs_v, softcap, logit_scale, 0.0, HAS_SOFTCAP, "evict_last")
        m, s, sd, ss, _, _, _, _ = rows.fold(u, c, m, s, sd, ss)
    m, s, sd, ss, _, _ = rows.merge(c, m, s, sd, ss)
    return m, s, sd, ss


@triton.jit
def policy_step_kernel(
    logits_ptr,  # (R, V)
    grad_logits_ptr,  # (R, V), may be logits: each element is read before it is written
    index_ptr,  # (R,) int64 or None
    target_ptr,  # (T,) int64
    temperature_ptr,  # (T,) float32 or None
    stats,  # RowStatistics, written
    x,  # TokenPointers
    out,  # TokenResults, written
    scale_ptr,  # () float32 or None: inv_normalizer as a tensor
    o,  # ObjectiveNumbers
    stride_logits_r,
    stride_grad_r,
    vocab_size,
    scale,  # inv_normalizer as a number; used if scale_ptr is None
    temperature,
    softcap,
    logit_scale,
    SHAPE: tl.constexpr,
    KL: tl.constexpr,
    ANCHOR: tl.constexpr,
    ENTROPY_BONUS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SAME_GRAD_LEAD: tl.constexpr,
    VECTORS: tl.constexpr,
    LANES: tl.constexpr,
    ITEMS: tl.constexpr,
):
    TILE: tl.constexpr = VECTORS * LANES * ITEMS
    row = tl.program_id(0).to(tl.int64)  # R * V can exceed 2^31
    token = row
    if index_ptr is not None:
        token = tl.load(index_ptr + row)
    keep = token >= 0
    if x.mask is not None:
        keep = tl.load(x.mask + token)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr)
    c, nats = rows.base2_scale(temperature_ptr, token, temperature, softcap, logit_scale, HAS_SOFTCAP)
    begin = row * stride_logits_r
    lead = (begin % ITEMS).to(tl.int32)
    row_ptr = rows.row_start(logits_ptr, begin, lead, ITEMS, True)
    grad_row_ptr = rows.row_start(grad_logits_ptr, row * stride_grad_r, lead, ITEMS, SAME_GRAD_LEAD)
    total = lead + vocab_size

    y = tl.load(target_ptr + token)
    has_target = (y >= 0) & (y < vocab_size)
    # A masked row is treated as a row without elements, so it is not read.
    m, s, sd, ss = _statistics(
        row_ptr,
        c,
        tl.where(keep, lead, 0),
        tl.where(keep, total, 0),
        rows.target_place(y, lead, vocab_size, keep),
        softcap,
        logit_scale,
        HAS_SOFTCAP,
        VECTORS,
        LANES,
        ITEMS,
    )
    u_y, slope_y = rows.read(row_ptr, None, lead + y, has_target & keep, softcap, logit_scale, 0.0, HAS_SOFTCAP, "")
    m, rest, sd, ss, d_y, _, _ = rows.with_target(u_y, c, m, s, sd, ss)
    logp, entropy, lse, sum_sq, top1, m, inv_sum = rows.finish(m, rest, sd, ss, d_y, has_target, keep, nats)
    tl.store(stats.logp + token, logp)
    tl.store(stats.entropy + token, entropy)
    tl.store(stats.lse + token, lse)
    tl.store(stats.sum_sq + token, sum_sq)
    tl.store(stats.top1 + token, top1)

    token_loss, ga, gh, ratio, flags = token_objective(
        logp, entropy, scale, x, token, keep, o, SHAPE, KL, ANCHOR, ENTROPY_BONUS
    )
    tl.store(out.token_loss + token, token_loss)
    tl.store(out.d_logp + token, ga)
    tl.store(out.d_entropy + token, gh)
    tl.store(out.ratio + token, ratio)
    tl.store(out.flags + token, flags)

    offs_v = rows.tile_offsets(VECTORS, LANES, ITEMS)
    whole = total // TILE * TILE
    first, last = rows.edges(lead, whole, total)
    first_whole = tl.where(lead > 0, TILE, 0)
    if ((ga == 0.0) & (gh == 0.0)) | (inv_sum == 0.0):
        none = tl.zeros((VECTORS, LANES, ITEMS), tl.float32)
        for edge in range(first, last):
            at = edge * whole + offs_v
            store(grad_row_ptr + at, none, (at >= lead) & (at < total), "evict_first")
        for start in range(first_whole, whole, TILE):
            store(grad_row_ptr + start + offs_v, none, None, "evict_first")
    else:
        ga = tl.where((ga == 0.0) | has_target, ga, float("nan"))
        a0, a1 = rows.gradient_constants(nats, inv_sum, entropy, ga, gh)
        tl.debug_barrier()  # all threads have read the target's logit, so it may be overwritten
        for edge in range(first, last):
            at = edge * whole + offs_v
            inside = (at >= lead) & (at < total)
            u, slope = rows.read(row_ptr, None, at, inside, softcap, logit_scale, 0.0, HAS_SOFTCAP, "evict_first")
            store(grad_row_ptr + at, rows.gradient(u, slope, m, c, a0, a1), inside, "evict_first")
        for start in range(first_whole, whole, TILE):
            g = rows.whole_gradient(row_ptr, start, offs_v, softcap, logit_scale, m, c, a0, a1, HAS_SOFTCAP)
            store(grad_row_ptr + start + offs_v, g, None, "evict_first")
        # The target's entry is stored separately, so that no other element needs a comparison.
        tl.debug_barrier()
        grad_y = rows.target_gradient(slope_y, nats, logp, entropy, ga, gh)
        store(grad_row_ptr + lead + y, grad_y, has_target)


def policy_step_rows(
    logits: torch.Tensor,
    grad_logits: torch.Tensor,
    index: torch.Tensor | None,
    target: torch.Tensor,
    x: TokenPointers,
    numbers: ObjectiveNumbers,
    codes: tuple[int, int, int],
    inv_normalizer: float | torch.Tensor,
    stats: RowStatistics,
    out: TokenResults,
    *,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Launch the kernel over the rows of `logits`. The caller has checked shapes and devices.

    Args:
        logits: (rows, vocab) float32, float16 or bfloat16, unit stride along vocab.
        grad_logits: (rows, vocab), written. It may be `logits` and may have another dtype.
        index: (rows,) int64, token of each row. None: row i is token i.
        target: (tokens,) int64, token ids.
        x: inputs of the objective, each (tokens,).
        numbers: run-time values of the objective.
        codes: (shape, KL estimator, estimator of the anchor).
        inv_normalizer: 1 / normaliser, a number or a () float32 tensor.
        stats, out: results, (tokens,) each; written for the tokens of the rows.
        temperature: divides the logits; a number or (tokens,).
        softcap: bound of the tanh on the logits. None: no softcap.
        logit_scale: multiplies the logits before the softcap.
    """
    require_signal(x, codes[0])
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    name = "policy_step" if softcap is None else "policy_step_softcap"
    config = launch.choose(name, logits)
    scale_ptr, number = pointer_or_number(inv_normalizer)
    vector, scalar = rows.per_row(temperature)
    policy_step_kernel[(num_rows,)](
        logits,
        grad_logits,
        index,
        target.contiguous(),
        vector,
        stats,
        x,
        out,
        scale_ptr,
        numbers,
        logits.stride(0),
        grad_logits.stride(0),
        vocab,
        number,
        scalar,
        softcap or 1.0,
        logit_scale,
        SHAPE=codes[0],
        KL=codes[1],
        ANCHOR=codes[2],
        ENTROPY_BONUS=numbers.entropy_coef != 0.0,
        HAS_SOFTCAP=softcap is not None,
        SAME_GRAD_LEAD=rows.same_lead(logits, grad_logits),
        **rows.tile_shape(config, logits, rows.rows_aligned(logits, grad_logits)),
        **config.options,
    )


def policy_step(
    logits: torch.Tensor,
    target: torch.Tensor,
    x: TokenPointers,
    numbers: ObjectiveNumbers,
    codes: tuple[int, int, int],
    inv_normalizer: float | torch.Tensor,
    counts: torch.Tensor | None,
    *,
    in_place: bool,
    temperature: float | torch.Tensor,
    softcap: float | None,
    logit_scale: float,
) -> tuple[RowStatistics, TokenResults, torch.Tensor, torch.Tensor]:
    """Return statistics, token results, metric sums (SLOTS,) float64 and the gradient of the logits.

    With in_place the gradient overwrites `logits`.
    """
    stats = RowStatistics(*(torch.empty_like(x.old_logp) for _ in range(5)))
    out = results_like(x.old_logp)
    grad = logits if in_place else torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    policy_step_rows(
        rows.unit_stride(logits),
        grad,
        None,
        target,
        x,
        numbers,
        codes,
        inv_normalizer,
        stats,
        out,
        temperature=temperature,
        softcap=softcap,
        logit_scale=logit_scale,
    )
    sums = policy_metrics.policy_metrics(stats.logp, stats.entropy, x.old_logp, x.ref_logp, x.mask, out, counts)
    return stats, out, sums, grad


def _case(dtype: torch.dtype, softcap: float | None, grad_dtype: torch.dtype) -> None:
    v, index = meta(4096), meta(4096, dtype=torch.int64)
    x = TokenPointers(v, v, meta(4096, dtype=torch.bool), v, v, None, v, None, None)
    logits, grad = (meta(4096, 151936, dtype=d) for d in (dtype, grad_dtype))
    policy_step_rows(
        logits,
        grad,
        index,
        index,
        x,
        CASE_NUMBERS,
        CASE_CODES,
        1e-3,
        RowStatistics(*[v] * 5),
        results_like(v),
        temperature=0.7,
        softcap=softcap,
        logit_scale=1.0,
    )


@compile_case("policy_step", dtypes=FLOAT_DTYPES, visits=2, traffic=2)
def _(dtype: torch.dtype) -> None:
    _case(dtype, None, dtype)


@compile_case("policy_step/softcap", dtypes=(torch.bfloat16,), visits=2, traffic=2)
def _(dtype: torch.dtype) -> None:
    _case(dtype, 30.0, dtype)


@compile_case("policy_step/to_bfloat16", dtypes=(torch.float32,), visits=2)
def _(dtype: torch.dtype) -> None:
    _case(dtype, None, torch.bfloat16)
