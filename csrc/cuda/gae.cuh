// gae: generalised advantage estimation, one reverse scan and one block per sequence. It reads 8
// bytes per token (9 with a mask) and writes 8. A length-adaptive lambda reads the mask twice.
//
//   delta[t] = r[t] + gamma V(next) - V(t),   A[t] = delta[t] + gamma lam A(next)
#pragma once

#include "cuda/scan.cuh"

namespace tokfuse {
namespace cuda {

__device__ inline double lambda_of(const GaeArgs& a, int64_t seq, int64_t begin, int64_t end) {
  if (a.lam_per_seq != nullptr) return a.lam_per_seq[seq];
  if (a.length_adaptive_alpha == 0) return a.lam;
  int64_t n = end - begin;
  if (a.mask != nullptr) {
    n = 0;
    for (int64_t base = begin; base < end; base += kScanBlock) {
      const int64_t t = base + threadIdx.x;
      n += __syncthreads_count(t < end && a.mask[t] != 0);
    }
  }
  const double span = a.length_adaptive_alpha * static_cast<double>(n);
  return 1 - 1 / (span > 1 ? span : 1);
}

__global__ void __launch_bounds__(kScanBlock, 6) gae_kernel(const GaeArgs a) {
  const int64_t seq = blockIdx.x, begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  const double gamma = a.gamma, decay = gamma * lambda_of(a, seq, begin, end);
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  Carry carry = {false, 0, 0};
  for (int64_t stop = end; stop > begin; stop -= kScanBlock) {
    const int64_t t = stop - kScanBlock + threadIdx.x;
    const bool valid = t >= begin && counts(a.mask, t);
    const double v = valid ? a.value[t] : 0, r = valid ? a.reward[t] : 0;
    const Carry next = next_valid(valid, v, &carry);
    const double ahead = next.any ? next.value : (ends ? 0 : v);
    const double delta = r + gamma * ahead - v;
    const double y = y_behind(valid ? Link{decay, delta} : Link{1, 0}, &carry);
    if (t < begin) continue;
    const double advantage = delta + decay * y;
    a.advantage[t] = valid ? static_cast<float>(advantage) : 0.0f;
    a.returns[t] = valid ? static_cast<float>(advantage + v) : 0.0f;
  }
}

}  // namespace cuda
}  // namespace tokfuse
