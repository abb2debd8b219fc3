// Influence sketches: for each sequence, the (rank, rank) sum of left_t right_t^T over its tokens.
// left and right are projected gradients and hidden states. Both are read once for rank <= 64 (8
// rank bytes per token), else rank / 64 times. Sums are float32 in token order.
//
// A block computes one 64 x 64 tile of one sequence. A thread keeps a 4 x 4 piece of it in
// registers.
#pragma once

#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

constexpr int kTile = 64;
constexpr int kOwn = 4;            // rows, and columns, of a thread's piece
constexpr int kTokensAtOnce = 16;  // tokens staged in shared memory

using Staged = Array<Array<float, kTile>, kTokensAtOnce>;

// Stages columns [first, first + kTile) of kTokensAtOnce rows from row `t`. Elements beyond the
// last row or column are 0.
__device__ inline void stage(const SketchArgs& a, const float* from, int64_t t, int64_t end,
                             int64_t first, Staged* to) {
  for (int i = threadIdx.x; i < kTokensAtOnce * kTile; i += kBlock) {
    const int64_t row = t + i / kTile, column = first + i % kTile;
    const bool inside = row < end && column < a.rank;
    (*to)[i / kTile][i % kTile] = inside ? from[row * a.rank + column] : 0.0f;
  }
}

__global__ void __launch_bounds__(kBlock) sketch_kernel(const SketchArgs a) {
  TOKFUSE_SHARED(left, Staged);
  TOKFUSE_SHARED(right, Staged);
  const int64_t tiles = (a.rank + kTile - 1) / kTile;
  const int64_t seq = blockIdx.x / (tiles * tiles), tile = blockIdx.x % (tiles * tiles);
  const int64_t row = tile / tiles * kTile, column = tile % tiles * kTile;
  const int own_row = static_cast<int>(threadIdx.x) / (kTile / kOwn) * kOwn;
  const int own_column = static_cast<int>(threadIdx.x) % (kTile / kOwn) * kOwn;
  const int64_t begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  float sum[kOwn][kOwn] = {};
  for (int64_t t = begin; t < end; t += kTokensAtOnce) {
    stage(a, a.left, t, end, row, &left);
    stage(a, a.right, t, end, column, &right);
    __syncthreads();
    for (int k = 0; k < kTokensAtOnce; k++) {
      for (int i = 0; i < kOwn; i++) {
        for (int j = 0; j < kOwn; j++) {
          sum[i][j] = fmaf(left[k][own_row + i], right[k][own_column + j], sum[i][j]);
        }
      }
    }
    __syncthreads();
  }
  float* out = a.out + seq * a.rank * a.rank;
  for (int i = 0; i < kOwn; i++) {
    for (int j = 0; j < kOwn; j++) {
      const int64_t r = row + own_row + i, c = column + own_column + j;
      if (r < a.rank && c < a.rank) out[r * a.rank + c] = sum[i][j];
    }
  }
}

}  // namespace cuda
}  // namespace tokfuse
