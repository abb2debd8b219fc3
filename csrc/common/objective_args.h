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

// The terms of token t with its log-ratio already at the objective's level.
TOKFUSE_HD TokenTerms token_terms(const ObjectiveArgs& o, int64_t t, float log_ratio, float logp,
                                  float entropy, float advantage, float agg) {
  const TokenInputs x = {logp,
                         entropy,
                         o.old_logp[t],
                         optional(o.ref_logp, t, 0.0f),
                         advantage,
                         optional(o.signal, t, 0.0f),
                         agg,
                         optional(o.weight, t, 1.0f),
                         optional(o.kl_weight, t, 1.0f),
                         optional(o.entropy_weight, t, 1.0f)};
  return token_terms(o.params, x, log_ratio);
}

}  // namespace tokfuse
