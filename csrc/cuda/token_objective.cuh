// Evaluates a token-level objective for one token, from its log-probability and entropy.
#pragma once

#include "cuda/device.cuh"
#include "cuda/kernels.h"

namespace tokfuse {
namespace cuda {

struct TokenResult {
  float token_loss, d_logp, d_entropy, ratio;
  uint32_t flags;
};

__device__ __forceinline__ TokenResult token_objective(const TokenObjectiveArgs& o, int64_t t,
                                                       float logp, float entropy) {
  const float scale =
      o.batch_inv_normalizer != nullptr ? *o.batch_inv_normalizer : o.inv_normalizer;
  const TokenInputs in = {logp,
                          entropy,
                          o.old_logp[t],
                          optional(o.ref_logp, t, 0.0f),
                          o.advantage[t],
                          optional(o.signal, t, 0.0f),
                          scale * optional(o.agg_weight, t, 1.0f),
                          optional(o.token_weight, t, 1.0f),
                          optional(o.kl_weight, t, 1.0f),
                          optional(o.entropy_weight, t, 1.0f),
                          optional(o.anchor_logp, t, 0.0f),
                          optional(o.anchor_weight, t, 1.0f)};
  float inside;
  const float d =
      bounded_log_ratio(o.params, kBothStages, logp - in.old_logp, in.advantage, &inside);
  const TokenTerms x = token_terms(o.params, in, d);
  return {x.loss, x.d_logp + inside * x.chain, x.d_entropy, x.ratio, x.flags};
}

__device__ __forceinline__ void write_result(const TokenObjectiveArgs& o, int64_t t,
                                             const TokenResult& r) {
  o.token_loss[t] = r.token_loss;
  o.d_logp[t] = r.d_logp;
  o.d_entropy[t] = r.d_entropy;
  o.ratio[t] = r.ratio;
  o.flags[t] = static_cast<int32_t>(r.flags);
}

}  // namespace cuda
}  // namespace tokfuse
