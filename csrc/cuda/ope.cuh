// ope: off-policy value estimates and their standard errors. Two reads of at most 17 bytes per row:
// the first for the estimates, the second, from L2, for the squared deviations of each row's
// influence from its mean.
//
// Sums are float64 over fixed chunks and are added in a fixed order. So the result does not depend
// on the grid. The mean of the influence needs no third read: it is the estimate itself for ips, dm
// and dr. For the self-normalised terms it is exactly 0, because sum w (r - snips) = 0.
#pragma once

#include "cuda/grid.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

struct OpeRow {
  double w, r, q, qa;  // all 0 for a masked row
  bool on;
};

__device__ __forceinline__ OpeRow ope_row(const OpeArgs& a, int64_t t) {
  if (!counts(a.mask, t)) return {0, 0, 0, 0, false};
  return {a.weight[t], a.reward[t], a.q_pi != nullptr ? a.q_pi[t] : 0.0,
          a.q_a != nullptr ? a.q_a[t] : 0.0, true};
}

// Sums of the first pass: count, w, w r, q_pi, w (r - q_a). Squared deviations of the second pass:
// ips, snips, dm, dr, sndr.
using OpeSums = Sums<5>;

struct OpeEstimates {
  double ips, snips, dm, dr, correction, mean_w;
};

__device__ inline OpeSums squared_deviations(const OpeRow& x, const OpeEstimates& e) {
  if (!x.on) return {};
  const double inv_w = 1 / e.mean_w, residual = x.w * (x.r - x.qa);
  const double ips = x.w * x.r - e.ips, snips = x.w * (x.r - e.snips) * inv_w, dm = x.q - e.dm;
  const double dr = x.q + residual - e.dr;
  const double sndr = dm + (residual - e.correction * x.w) * inv_w;
  return {{ips * ips, snips * snips, dm * dm, dr * dr, sndr * sndr}};
}

__global__ void __launch_bounds__(kBlock) ope_kernel(const OpeArgs a) {
  const int64_t chunks = (a.rows + kOpeBlock - 1) / kOpeBlock;
  OpeSums* part = reinterpret_cast<OpeSums*>(a.scratch);
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int64_t begin = c * kOpeBlock, end = min(begin + kOpeBlock, a.rows);
    OpeSums mine = {};
    for (int64_t t = begin + threadIdx.x; t < end; t += kBlock) {
      const OpeRow x = ope_row(a, t);
      mine.add({{x.on ? 1.0 : 0.0, x.w, x.w * x.r, x.q, x.w * (x.r - x.qa)}});
    }
    mine = block_sum(mine);
    if (threadIdx.x == 0) part[c] = mine;
  }
  grid_sync();
  const OpeSums sums = block_sum_of(part, chunks, OpeSums{});
  const double *s = sums.at, n = s[0], direct = s[3] / n, correction = s[4] / s[1];
  const OpeEstimates e = {s[2] / n, s[2] / s[1], direct, (s[3] + s[4]) / n, correction, s[1] / n};
  part += chunks;
  for (int64_t c = blockIdx.x; c < chunks; c += gridDim.x) {
    const int64_t begin = c * kOpeBlock, end = min(begin + kOpeBlock, a.rows);
    OpeSums mine = {};
    for (int64_t t = begin + threadIdx.x; t < end; t += kBlock) {
      mine.add(squared_deviations(ope_row(a, t), e));
    }
    mine = block_sum(mine);
    if (threadIdx.x == 0) part[c] = mine;
  }
  grid_sync();
  if (blockIdx.x != 0) return;
  const OpeSums squares = block_sum_of(part, chunks, OpeSums{});
  if (threadIdx.x != 0) return;
  const double values[5] = {e.ips, e.snips, e.dm, e.dr, direct + correction};
  for (int k = 0; k < 5; k++) {
    a.out[2 * k] = values[k];
    // One row has no standard error. NaN is set here, because rounding could make 0 / 0 infinite.
    a.out[2 * k + 1] = n < 2 ? nan("") : sqrt(squares.at[k] / (n - 1) / n);
  }
}

}  // namespace cuda
}  // namespace tokfuse
