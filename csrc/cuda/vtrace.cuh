// vtrace: V-trace targets and advantages, one reverse scan and one block per sequence. It reads 12
// bytes per token (13 with a mask) and writes 12.
//
//   rho = min(ratio, rho_bar), c = lam min(ratio, c_bar), ratio = exp(clamp(log_ratio, +-20))
//   v(t) - V(t) = rho (r + gamma V(next) - V(t)) + gamma c (v(next) - V(next))
//   A(t) = r + gamma v(next) - V(t)
#pragma once

#include "cuda/scan.cuh"

namespace tokfuse {
namespace cuda {

constexpr float kLogRatioClamp = 20.0f;

__global__ void __launch_bounds__(kScanBlock, 6) vtrace_kernel(const VtraceArgs a) {
  const int64_t seq = blockIdx.x, begin = a.cu_seqlens[seq], end = a.cu_seqlens[seq + 1];
  const double gamma = a.gamma, decay = gamma * a.lam;
  const bool ends = a.finished == nullptr || a.finished[seq] != 0;
  Carry carry = {false, 0, 0};
  for (int64_t stop = end; stop > begin; stop -= kScanBlock) {
    const int64_t t = stop - kScanBlock + threadIdx.x;
    const bool valid = t >= begin && counts(a.mask, t);
    const double v = valid ? a.value[t] : 0, r = valid ? a.reward[t] : 0;
    float d = valid ? a.log_ratio[t] : 0.0f;
    d = d < -kLogRatioClamp ? -kLogRatioClamp : (d > kLogRatioClamp ? kLogRatioClamp : d);
    const float ratio = expf(d);
    const float rho = ratio > a.rho_bar ? a.rho_bar : ratio;
    const float c = ratio > a.c_bar ? a.c_bar : ratio;
    const Carry next = next_valid(valid, v, &carry);
    const double ahead = r + gamma * (next.any ? next.value : (ends ? 0 : v)) - v;
    const Link link = {decay * c, rho * ahead};
    const double y = y_behind(valid ? link : Link{1, 0}, &carry);
    if (t < begin) continue;
    a.value_target[t] = valid ? static_cast<float>(v + link.of(y)) : 0.0f;
    a.advantage[t] = valid ? static_cast<float>(ahead + gamma * y) : 0.0f;
    a.rho[t] = valid ? rho : 0.0f;
  }
}

}  // namespace cuda
}  // namespace tokfuse
