// A token-level objective of one token, from its log-probability and entropy.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace tokfuse {
namespace cuda {

struct TokenResult {
  float token_loss, d_logp, d_entropy, ratio;
  uint32_t flags;
};

__device__ __forceinline__ float optional(const float* p, int64_t t, float missing) {
  return p == nullptr ? missing : p[t];
}

__device__ __forceinline__ TokenResult token_objective(const TokenObjective& o, int64_t t,
                                                       float logp, float entropy) {
  const float scale = o.scale != nullptr ? *o.scale : o.scale_value;
  const float agg = scale * optional(o.agg_weight, t, 1.0f), a = o.advantage[t];
  const float weight = optional(o.weight, t, 1.0f), raw = logp - o.old_logp[t];
  float inside;
  const float d = bounded_log_ratio(o.params, kBothStages, raw, a, &inside);
  const PolicyTerm policy = policy_term(o.params, d, logp, a, optional(o.signal, t, 0.0f));
  float loss = weight * policy.loss, d_logp = weight * policy.d_logp, d_entropy = 0.0f;
  if (o.params.kl != Kl::kNone) {
    const KlTerm kl = kl_term(o.params, logp, o.ref_logp[t], raw);
    const float coef = o.params.kl_coef * optional(o.kl_weight, t, 1.0f);
    loss += coef * kl.value;
    d_logp += coef * kl.d_logp;
  }
  if (o.params.entropy_coef != 0.0f) {
    d_entropy = -o.params.entropy_coef * optional(o.entropy_weight, t, 1.0f);
    loss += d_entropy * entropy;
  }
  const float chain = agg * weight * policy.d_log_ratio;
  return {agg * loss, agg * d_logp + inside * chain, agg * d_entropy, expf(d), policy.flags};
}

__device__ __forceinline__ void write_result(const TokenObjective& o, int64_t t,
                                             const TokenResult& r) {
  o.token_loss[t] = r.token_loss;
  o.d_logp[t] = r.d_logp;
  o.d_entropy[t] = r.d_entropy;
  o.ratio[t] = r.ratio;
  o.flags[t] = static_cast<int32_t>(r.flags);
}

}  // namespace cuda
}  // namespace tokfuse
