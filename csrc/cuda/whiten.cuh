// whiten: (x - mean) / sqrt(var + eps) over the rows with mask true. Two reads, the second from L2,
// and one write: 12 bytes per row.
//
// Blocks reduce chunks of rows to (count, mean, squared deviations). After a grid-wide barrier
// every block merges all chunks in the same order by Chan's formula. So the result does not depend
// on the grid, and a large mean costs no digits.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

struct Spread {
  double count, mean, square;  // square: sum of squared deviations

  __device__ void add(const Spread& other) {
    if (other.count == 0) return;
    const double n = count + other.count, d = other.mean - mean;
    const double share = other.count / n;
    square += other.square + d * d * (count * share);
    mean = count == 0 ? other.mean : mean + d * share;
    count = n;
  }
};

// Returns the moments of the kWhitenBlock rows from `begin`. Each thread keeps its rows in
// registers.
__device__ inline Spread chunk_spread(const WhitenArgs& a, int64_t begin) {
  constexpr int kOwn = kWhitenBlock / kBlock;
  float x[kOwn];
  bool on[kOwn];
  double n = 0, origin = 0, sum = 0, square = 0;
  for (int i = 0; i < kOwn; i++) {
    const int64_t t = begin + i * kBlock + threadIdx.x;
    on[i] = t < a.tokens && counts(a.mask, t);
    x[i] = on[i] ? a.x[t] : 0.0f;
    // Relative to the first value of the thread, so equal values have deviations of exactly 0.
    if (on[i] && n == 0) origin = x[i];
    n += on[i];
    sum += on[i] ? x[i] - origin : 0;
  }
  const double mean = n > 0 ? sum / n : 0;
  for (int i = 0; i < kOwn; i++) {
    const double d = on[i] ? x[i] - origin - mean : 0;
    square += d * d;
  }
  return block_sum(Spread{n, origin + mean, square});
}

__global__ void __launch_bounds__(kBlock) whiten_kernel(const WhitenArgs a) {
  Spread all = {0, 0, 0};
  double var = 0;
  if (a.mean != nullptr) {
    all.mean = *a.mean;
    var = *a.var;
  } else {
    Spread* part = reinterpret_cast<Spread*>(a.scratch);
    const int64_t chunks = (a.tokens + kWhitenBlock - 1) / kWhitenBlock;
    for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
      const Spread spread = chunk_spread(a, c * kWhitenBlock);
      if (threadIdx.x == 0) part[c] = spread;
    }
    grid_sync();
    all = block_sum_of(part, chunks, all);
    var = all.square / (all.count > 1 ? all.count - 1 : 1);
  }
  // Equal values with eps = 0 have deviations of 0, and 0 * inf would be NaN.
  const double scale = var + a.eps == 0 ? 0 : 1 / sqrt(var + a.eps);
  const double offset = a.shift_mean ? 0 : all.mean;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlock;
  for (int64_t t = blockIdx.x * int64_t{kBlock} + threadIdx.x; t < a.tokens; t += threads) {
    const bool on = counts(a.mask, t);
    a.out[t] = on ? static_cast<float>((a.x[t] - all.mean) * scale + offset) : 0.0f;
  }
}

}  // namespace cuda
}  // namespace tokfuse
