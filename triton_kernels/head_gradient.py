"""Gradients of the LM head from the gradient dz of the logits, over the live rows.

A row is live if its gradient may be nonzero. Other rows are skipped.

    head_grad_hidden_kernel  grad_hidden[token of i] = dz[i] @ W        for the live rows i
    head_grad_weight_kernel  grad_weight (+)= sum over live rows i of  dz[i]^T hidden[i]

The list of live rows and their number N are in device memory. A program whose rows are not live
returns at once, and the sum over rows ends at N. So no synchronisation is needed, and both kernels
can be captured in a CUDA graph; torch's GEMMs read their size on the host. Each kernel takes 2 N H
V operations. Its accuracy is that of cuBLAS: products in float32 (exact for 16-bit operands) and
float32 sums in the order of columns or rows, with one program per tile and no atomics.

With few live rows the first kernel leaves most of a GPU idle: it has (live tiles) * H / BLOCK_H
programs, and each of them loops over the whole vocabulary.

Legend: R rows of dz, N live ones, T tokens, V vocabulary, H hidden.
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels import launch
from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.tile import INTERPRET, store

HALF = (torch.bfloat16, torch.float16)

launch.declare(
    "head_grad_hidden",
    {
        80: launch.LaunchConfig(block_t=128, block_v=32, block_h=128, num_warps=8, num_stages=4),
        90: launch.LaunchConfig(block_t=128, block_v=64, block_h=128, num_warps=8, num_stages=4),
    },
)
launch.declare(
    "head_grad_weight",
    {
        80: launch.LaunchConfig(block_t=32, block_v=128, block_h=128, num_warps=8, num_stages=4),
        90: launch.LaunchConfig(block_t=64, block_v=128, block_h=128, num_warps=8, num_stages=4),
    },
)
# Tensor cores have no full float32 precision. Without them, smaller tiles keep the sums in registers.
launch.declare(
    "head_grad_hidden_f32", {80: launch.LaunchConfig(block_t=64, block_v=16, block_h=64, num_warps=8, num_stages=3)}
)
launch.declare(
    "head_grad_weight_f32", {80: launch.LaunchConfig(block_t=16, block_v=64, block_h=64, num_warps=8, num_stages=3)}
)


@triton.jit
def head_grad_hidden_kernel(
    dz_ptr,  # (R, V), grad_logits
    weight_ptr,  # (V, H)
    rows_ptr,  # (R,) int32, the live rows first
    count_ptr,  # () int32, N
    token_ptr,  # (R,) int64, token of each row
    grad_ptr,  # (T, H)
    stride_dz_r,
    stride_weight_v,
    stride_grad_t,
    vocab_size,
    hidden_size,
    row_blocks,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    count = tl.load(count_ptr)
    start = tl.program_id(0) % row_blocks * BLOCK_T
    if start >= count:
        return
    offs = start + tl.arange(0, BLOCK_T)
    live = offs < count
    row = tl.load(rows_ptr + offs, mask=live, other=0).to(tl.int64)
    offs_h = tl.program_id(0) // row_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_hidden = offs_h < hidden_size
    offs_v = tl.arange(0, BLOCK_V)
    dz_rows = dz_ptr + row[:, None] * stride_dz_r
    total = tl.zeros((BLOCK_T, BLOCK_H), tl.float32)
    for begin in range(0, vocab_size, BLOCK_V):
        columns = begin + offs_v
        in_vocab = columns < vocab_size
        z = tl.load(dz_rows + columns[None, :], mask=live[:, None] & in_vocab[None, :], other=0.0)
        w = tl.load(
            weight_ptr + columns[:, None].to(tl.int64) * stride_weight_v + offs_h[None, :],
            mask=in_vocab[:, None] & in_hidden[None, :],
            other=0.0,
        )
        if INTERPRET:
            z, w = z.to(tl.float32), w.to(tl.float32)
        total = tl.dot(z, w, total, input_precision="ieee")
    token = tl.load(token_ptr + row, mask=live, other=0)
    store(grad_ptr + token[:, None] * stride_grad_t + offs_h[None, :], total, mask=live[:, None] & in_hidden[None, :])


@triton.jit
def head_grad_weight_kernel(
    dz_ptr,  # (R, V), grad_logits
    hidden_ptr,  # (R, H), hidden state of each row of dz
    rows_ptr,  # (R,) int32, the live rows first
    count_ptr,  # () int32, N
    grad_ptr,  # (V, H) float32
    stride_dz_r,
    stride_hidden_r,
    stride_grad_v,
    vocab_size,
    hidden_size,
    vocab_blocks,
    ACCUMULATE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    count = tl.load(count_ptr)
    offs_v = tl.program_id(0) % vocab_blocks * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_h = tl.program_id(0) // vocab_blocks * BLOCK_H + tl.arange(0, BLOCK_H)
    in_vocab, in_hidden = offs_v < vocab_size, offs_h < hidden_size
    offs_t = tl.arange(0, BLOCK_T)
    total = tl.zeros((BLOCK_V, BLOCK_H), tl.float32)
    for begin in range(0, count, BLOCK_T):
        live = begin + offs_t < count
        row = tl.load(rows_ptr + begin + offs_t, mask=live, other=0).to(tl.int64)
        z = tl.load(
            dz_ptr + row[:, None] * stride_dz_r + offs_v[None, :], mask=live[:, None] & in_vocab[None, :], other=0.0
        )
        h = tl.load(
            hidden_ptr + row[:, None] * stride_hidden_r + offs_h[None, :],
            mask=live[:, None] & in_hidden[None, :],
            other=0.0,
        )
        if INTERPRET:
            z, h = z.to(tl.float32), h.to(tl.float32)
        total = tl.dot(tl.trans(z), h, total, input_precision="ieee")
    place = grad_ptr + offs_v[:, None].to(tl.int64) * stride_grad_v + offs_h[None, :]
    inside = in_vocab[:, None] & in_hidden[None, :]
    if ACCUMULATE:
        total += tl.load(place, mask=inside, other=0.0)
    tl.store(place, total, mask=inside)


def live_first(live: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the row numbers with the live rows first, (R,) int32, and the live count, () int32.

    Args:
        live: (R,) bool, true for a live row.
    """
    order = torch.argsort(torch.logical_not(live).to(torch.int8), stable=True)
    return order.to(torch.int32), live.sum(dtype=torch.int32)


def grad_hidden(
    grad_logits: torch.Tensor,
    weight: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    token: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """Write out[token[i]] = grad_logits[i] @ weight for the live rows i; other rows are not written.

    Args:
        grad_logits: (R, V), unit stride along V.
        weight: (V, H), contiguous, same dtype.
        rows: (R,) int32, row numbers with the live rows first.
        count: () int32, number of live rows.
        token: (R,) int64, token of each row.
        out: (T, H), contiguous.
    """
    config = launch.choose(_named("head_grad_hidden", grad_logits), grad_logits)
    row_blocks = triton.cdiv(grad_logits.shape[0], config.block_t)
    head_grad_hidden_kernel[(row_blocks * triton.cdiv(weight.shape[1], config.block_h),)](
        grad_logits,
        weight,
        rows,
        count,
        token,
        out,
        grad_logits.stride(0),
        weight.stride(0),
        out.stride(0),
        grad_logits.shape[1],
        weight.shape[1],
        row_blocks,
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        **config.options,
    )


def grad_weight(
    grad_logits: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    count: torch.Tensor,
    out: torch.Tensor,
    accumulate: bool,
) -> None:
    """Write to `out`, or with `accumulate` add, the sum of grad_logits[i]^T hidden[i] over live rows i.

    Args:
        grad_logits: (R, V), unit stride along V.
        hidden: (R, H), contiguous, same dtype.
        rows: (R,) int32, row numbers with the live rows first.
        count: () int32, number of live rows.
        out: (V, H) float32, contiguous; read only with `accumulate`.
    """
    config = launch.choose(_named("head_grad_weight", grad_logits), grad_logits)
    vocab_blocks = triton.cdiv(grad_logits.shape[1], config.block_v)
    head_grad_weight_kernel[(vocab_blocks * triton.cdiv(hidden.shape[1], config.block_h),)](
        grad_logits,
        hidden,
        rows,
        count,
        out,
        grad_logits.stride(0),
        hidden.stride(0),
        out.stride(0),
        grad_logits.shape[1],
        hidden.shape[1],
        vocab_blocks,
        ACCUMULATE=accumulate,
        BLOCK_T=config.block_t,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        **config.options,
    )


def _named(kernel: str, grad_logits: torch.Tensor) -> str:
    return f"{kernel}_f32" if grad_logits.dtype == torch.float32 else kernel


def _case(dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    rows, count = meta(4096, dtype=torch.int32), borders(1, 4096)[1:]  # all rows are live
    return meta(4096, 151936, dtype=dtype), meta(4096, 4096, dtype=dtype), rows, count


def _hidden_case(dtype: torch.dtype) -> None:
    grad_logits, hidden, rows, count = _case(dtype)
    weight = meta(151936, 4096, dtype=dtype)
    grad_hidden(grad_logits, weight, rows, count, meta(4096, dtype=torch.int64), hidden)


def _weight_case(dtype: torch.dtype) -> None:
    grad_logits, hidden, rows, count = _case(dtype)
    grad_weight(grad_logits, hidden, rows, count, meta(151936, 4096), True)


# float32 has its own launch configurations, so it has its own cases.
compile_case("head_gradient/hidden", dtypes=HALF)(_hidden_case)
compile_case("head_gradient/hidden_float32", dtypes=(torch.float32,))(_hidden_case)
compile_case("head_gradient/weight", dtypes=HALF)(_weight_case)
compile_case("head_gradient/weight_float32", dtypes=(torch.float32,))(_weight_case)
