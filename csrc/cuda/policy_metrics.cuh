// Metric sums of a policy objective: the contribution of one token, and the sum of two records.
#pragma once

#include "common/loss_args.h"
#include "common/objective_args.h"
#include "cuda/packed.cuh"

namespace tokfuse {
namespace cuda {

struct PolicyMetrics {
  double at[kMetricCount];

  __device__ void add(const PolicyMetrics& other) {
    for (int i = 0; i < kMetricCount; i++) {
      if (i == kRatioMin) {
        if (other.at[i] < at[i]) at[i] = other.at[i];
      } else if (i == kRatioMax) {
        if (other.at[i] > at[i]) at[i] = other.at[i];
      } else {
        at[i] += other.at[i];
      }
    }
  }
};

__device__ __forceinline__ PolicyMetrics no_metrics() {
  PolicyMetrics m = {};
  m.at[kRatioMin] = kInfinity;
  m.at[kRatioMax] = -kInfinity;
  return m;
}

// Adds one valid token to all slots except kGradRows. ref_logp and entropy may be null.
__device__ inline void add_token(PolicyMetrics* m, double logp, double old_logp,
                                 const float* ref_logp, const float* entropy, int64_t t, float loss,
                                 float ratio, uint32_t flags) {
  const double d = logp - old_logp;
  m->at[kTokens] += 1;
  m->at[kLoss] += loss;
  m->at[kClipLow] += (flags & kClippedLow) != 0;
  m->at[kClipHigh] += (flags & kClippedHigh) != 0;
  m->at[kDualClip] += (flags & kClippedDual) != 0;
  m->at[kKlK1] -= d;
  m->at[kKlK3] += expm1(d) - d;
  if (ref_logp != nullptr) {
    const double k = logp - ref_logp[t];
    m->at[kRefKlK1] += k;
    m->at[kRefKlK3] += expm1(-k) + k;
  }
  m->at[kRatio] += ratio;
  if (ratio < m->at[kRatioMin]) m->at[kRatioMin] = ratio;
  if (ratio > m->at[kRatioMax]) m->at[kRatioMax] = ratio;
  if (entropy != nullptr) m->at[kEntropy] += entropy[t];
}

// One thread stores the final sums and the loss.
__device__ inline void store_metrics(const PolicyMetrics& m, int64_t tokens, double seqs,
                                     double* out, const LossArgs& to) {
  for (int i = 0; i < kMetricCount; i++) out[i] = m.at[i];
  out[kAll] = static_cast<double>(tokens);
  out[kMaskedCount] = out[kAll] - m.at[kTokens];
  out[kSeqs] = seqs;
  const float loss = static_cast<float>(m.at[kLoss]);
  *to.loss = loss;
  *to.loss_sum =
      undivided_loss(loss, to.inv_normalizer, to.normalize_by_seqs ? seqs : m.at[kTokens]);
}

}  // namespace cuda
}  // namespace tokfuse
