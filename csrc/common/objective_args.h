// Argument structs of policy objectives over packed tokens, for CPU and CUDA.
//
// Shapes in comments: T tokens, S sequences. "or null" marks optional pointers. docs/names.md
// defines every field. A field marked "CPU" or "CUDA" is read there only.
#pragma once

#include <cstdint>

#include "common/objective.h"

namespace tokfuse {

// Inputs and outputs of an objective. A null input: the objective has no such term.
struct ObjectiveArgs {
  ObjectiveParams params;
  int64_t tokens, seqs;
  const float* logp;       // (T)
  const float* old_logp;   // (T)
  const float* advantage;  // (T), or (S) when advantage_per_seq
  int advantage_per_seq;
  const uint8_t* mask;          // (T) or null
  const int32_t* cu_seqlens;    // (S + 1) or null
  const float* token_weight;    // (T) or null: multiplies the policy term
  const float* signal;          // (T) or null: target signal (TargetRatio) or success rate (NFT)
  const float* ref_logp;        // (T) or null
  const float* kl_weight;       // (T) or null
  const float* entropy;         // (T) or null
  const float* entropy_weight;  // (T) or null
  double inv_normalizer;  // multiplies every loss and coefficient; < 0: 1 / this batch's own count
  int normalize_by_seqs;  // the own count is of sequences, not of tokens
  int threads;            // CPU
  // outputs
  float* token_loss;  // (T), times aggregation weight and normaliser
  float* d_logp;      // (T) d loss / d logp
  float* d_entropy;   // (T) d loss / d entropy
  double* sums;       // (kMetricCount) metric sums
  float* scratch;     // CPU. (4 T), see cpu/objective_tokens.h
  double* partial;    // CUDA. (policy_partials(T, S))
};

// CUDA. A token-level objective in the kernel that computes the statistics. Every vector is (T); a
// null input: the objective has no such term.
struct TokenObjectiveArgs {
  ObjectiveParams params;
  const float* old_logp;
  const float* advantage;
  const float* agg_weight;  // aggregation weight before the normaliser; null: 1
  const float* token_weight;
  const float* signal;
  const float* ref_logp;
  const float* kl_weight;
  const float* entropy_weight;
  const float* batch_inv_normalizer;  // () 1 / this batch's own count; null: inv_normalizer
  float inv_normalizer;
  // outputs; 0 where masked
  float* token_loss;
  float* d_logp;
  float* d_entropy;
  float* ratio;
  int32_t* flags;  // TokenFlag
};

// CUDA. What the sequences give to their tokens.
struct PrepareArgs {
  int64_t seqs;
  const int32_t* cu_seqlens;   // (S + 1)
  const uint8_t* mask;         // (T) or null
  const float* seq_advantage;  // (S) or null
  int32_t* counts;             // (S) valid tokens of each sequence
  float* agg_weight;           // (T) 1 / valid tokens of its sequence, or null
  float* advantage;            // (T) if seq_advantage is given, else null
};

// CUDA. What a row kernel left of each token, and where the metric sums of all are written.
struct MetricsArgs {
  int64_t tokens, seqs;
  const float* logp;  // (T), as all vectors without a shape
  const float* entropy;
  const float* old_logp;
  const float* ref_logp;  // or null
  const uint8_t* mask;    // or null
  const float* token_loss;
  const float* d_logp;
  const float* d_entropy;
  const float* ratio;
  const int32_t* flags;
  const int32_t* counts;  // (S) valid tokens of each sequence, or null: none are counted
  double* partial;        // (policy_partials(T, 0))
  double* sums;           // (kMetricCount) metric sums
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
                         optional(o.token_weight, t, 1.0f),
                         optional(o.kl_weight, t, 1.0f),
                         optional(o.entropy_weight, t, 1.0f)};
  return token_terms(o.params, x, log_ratio);
}

}  // namespace tokfuse
