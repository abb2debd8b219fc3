"""Influence sketches: one per sequence, F_s = sum of left_t right_t^T over its tokens.

There is one program per sequence and tile of F_s. A program loops over the tokens of its sequence
only. So nothing is padded, the length of the longest sequence is not needed, and the order of a sum
is fixed. 2 T R^2 operations in float32 without tensor cores: with R = 64 about 1% of the operations
of the projections.

Legend: T tokens, S sequences, R rank (the hidden size without a projection).
"""

import torch
import triton
import triton.language as tl

from tokfuse.triton_kernels.compile_cases import borders, compile_case, meta
from tokfuse.triton_kernels.launch import LaunchConfig, choose, declare


@triton.jit
def sketch_kernel(
    left_ptr,  # (T, R) float32, contiguous; the same for right
    right_ptr,
    cu_seqlens_ptr,  # (S + 1,) int32
    out_ptr,  # (S, R, R) float32
    rank,
    tiles,  # number of tiles along each side of F_s
    BLOCK_T: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    seq = tl.program_id(0).to(tl.int64) // (tiles * tiles)
    tile = tl.program_id(0) % (tiles * tiles)
    offs_i = tile // tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_j = tile % tiles * BLOCK_R + tl.arange(0, BLOCK_R)
    begin = tl.load(cu_seqlens_ptr + seq).to(tl.int64)
    end = tl.load(cu_seqlens_ptr + seq + 1).to(tl.int64)
    total = tl.zeros((BLOCK_R, BLOCK_R), tl.float32)
    for start in range(begin, end, BLOCK_T):
        offs_t = start + tl.arange(0, BLOCK_T)
        row, inside = offs_t[:, None] * rank, offs_t[:, None] < end
        a = tl.load(left_ptr + row + offs_i[None, :], inside & (offs_i[None, :] < rank), 0.0)
        b = tl.load(right_ptr + row + offs_j[None, :], inside & (offs_j[None, :] < rank), 0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    place = (seq * rank + offs_i[:, None]) * rank + offs_j[None, :]
    tl.store(out_ptr + place, total, (offs_i[:, None] < rank) & (offs_j[None, :] < rank))


declare("influence", {80: LaunchConfig(block_t=32, block_h=64, num_warps=4)})


def sketch(left: torch.Tensor, right: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """Return the sketches, (seqs, rank, rank) float32. `left` and `right` are (tokens, rank) float32."""
    num_seqs, rank = cu_seqlens.shape[0] - 1, left.shape[1]
    out = torch.empty(num_seqs, rank, rank, dtype=torch.float32, device=left.device)
    config = choose("influence", left)
    tiles = triton.cdiv(rank, config.block_h)
    if out.numel():
        sketch_kernel[(num_seqs * tiles * tiles,)](
            left.contiguous(),
            right.contiguous(),
            cu_seqlens.contiguous(),
            out,
            rank,
            tiles,
            BLOCK_T=config.block_t,
            BLOCK_R=config.block_h,
            **config.options,
        )
    return out


@compile_case("influence", dtypes=(torch.float32,), streams=2)
def _(dtype: torch.dtype) -> None:
    x = meta(8192, 64, dtype=dtype)
    sketch(x, x, borders(512, 8192))
