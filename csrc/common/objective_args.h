// The argument record of an objective over packed tokens, for CPU and CUDA.
//
// Shapes in comments: T tokens, S sequences. `threads` and `scratch` are the CPU's.
#pragma once

#include <cstdint>

#include "common/objective.h"

namespace tokfuse {

// Per-token inputs of an objective; "or null" means the term is absent.
struct ObjectiveArgs {
  ObjectiveParams params;
  int64_t tokens, seqs;
  const float* logp;            // (T)
  const float* old_logp;        // (T)
  const float* advantage;       // (T), or (S) when advantage_per_seq
  int advantage_per_seq;        //
  const uint8_t* mask;          // (T) or null
  const int32_t* cu_seqlens;    // (S + 1) or null
  const float* weight;          // (T) or null: multiplies the policy term
  const float* signal;          // (T) or null: target signal (TargetRatio) or success rate (NFT)
  const float* ref_logp;        // (T) or null
  const float* kl_weight;       // (T) or null
  const float* entropy;         // (T) or null
  const float* entropy_weight;  // (T) or null
  double inv_normalizer;  // multiplies every loss and coefficient; < 0: this batch's own count
  int normalize_by_seqs;  // the own count is of sequences, not of tokens
  int threads;
  // outputs
  float* token_loss;  // (T) aggregation weight included, normaliser too
  float* d_logp;      // (T) d loss / d logp
  float* d_entropy;   // (T) d loss / d entropy
  double* metrics;    // (kMetricCount)
  float* scratch;     // (4 T), see cpu/objective_tokens.h
};

// What one token contributes, aggregation weight included; masked tokens are not asked for.
struct TokenTerms {
  float loss;
  float d_logp;     // without the derivative through the ratio
  float d_entropy;  //
  float chain;      // derivative through the ratio, which sequence levels redistribute
  float ratio;
  uint32_t flags;
};

TOKFUSE_HD float optional(const float* p, int64_t t, float missing) {
  return p == nullptr ? missing : p[t];
}

// Policy, KL and entropy terms of token t with its log-ratio already at the objective's level.
TOKFUSE_HD TokenTerms token_terms(const ObjectiveArgs& o, int64_t t, float log_ratio, float logp,
                                  float entropy, float advantage, float agg) {
  const float w = optional(o.weight, t, 1.0f);
  const PolicyTerm policy =
      policy_term(o.params, log_ratio, logp, advantage, optional(o.signal, t, 0.0f));
  float loss = w * policy.loss, d_logp = w * policy.d_logp, d_entropy = 0.0f;
  if (o.params.kl != Kl::kNone) {
    const KlTerm kl = kl_term(o.params, logp, o.ref_logp[t], logp - o.old_logp[t]);
    const float coef = o.params.kl_coef * optional(o.kl_weight, t, 1.0f);
    loss += coef * kl.value;
    d_logp += coef * kl.d_logp;
  }
  if (o.params.entropy_coef != 0.0f) {
    d_entropy = -o.params.entropy_coef * optional(o.entropy_weight, t, 1.0f);
    loss += d_entropy * entropy;
  }
  return {agg * loss,      agg * d_logp, agg * d_entropy, agg * w * policy.d_log_ratio,
          expf(log_ratio), policy.flags};
}

}  // namespace tokfuse
