// Argument structs of policy objectives over packed tokens, for the CPU and CUDA kernels.
//
// Shapes in comments: T tokens, S sequences. "or null" marks optional pointers. docs/names.md
// defines every field. Only the kernels of that backend read a field marked "CPU" or "CUDA".
#pragma once

#include <cstdint>

#include "common/objective.h"

namespace tokfuse {

// Inputs and outputs of an objective. An input is null if the objective has no such term.
struct ObjectiveArgs {
  ObjectiveParams params;
  int64_t tokens, seqs;
  const float* logp;       // (T)
  const float* old_logp;   // (T)
  const float* advantage;  // (T), or (S) if advantage_per_seq is 1
  int advantage_per_seq;
  const uint8_t* mask;          // (T) or null
  const int32_t* cu_seqlens;    // (S + 1) or null
  const float* token_weight;    // (T) or null: multiplies the policy term
  const float* signal;          // (T) or null: target signal (TargetRatio) or success rate (NFT)
  const float* ref_logp;        // (T) or null
  const float* kl_weight;       // (T) or null
  const float* entropy;         // (T) or null
  const float* entropy_weight;  // (T) or null
  const float* anchor_logp;     // (T) or null
  const float* anchor_weight;   // (T) or null
  double inv_normalizer;  // multiplies losses and coefficients; < 0: use 1 / count of this batch
  int normalize_by_seqs;  // 1: that count is of sequences; 0: of tokens
  int threads;            // CPU
  // outputs
  float* token_loss;  // (T), includes aggregation weight and 1 / normaliser
  float* d_logp;      // (T) d loss / d logp
  float* d_entropy;   // (T) d loss / d entropy
  double* sums;       // (kMetricCount) metric sums
  float* scratch;     // CPU. (4 T), laid out as in cpu/objective_tokens.h
  double* partial;    // CUDA. (policy_partials(T, S))
};

// CUDA. A token-level objective that is evaluated in the kernel that computes the statistics. Every
// vector is (T). An input is null if the objective has no such term.
struct TokenObjectiveArgs {
  ObjectiveParams params;
  const float* old_logp;
  const float* advantage;
  const float* agg_weight;  // aggregation weight without 1 / normaliser; null: 1
  const float* token_weight;
  const float* signal;
  const float* ref_logp;
  const float* kl_weight;
  const float* entropy_weight;
  const float* anchor_logp;
  const float* anchor_weight;
  const float* batch_inv_normalizer;  // () 1 / count of this batch; null: use inv_normalizer
  float inv_normalizer;
  // outputs; 0 for masked tokens
  float* token_loss;
  float* d_logp;
  float* d_entropy;
  float* ratio;
  int32_t* flags;  // TokenFlag
};

// CUDA. Gives each token the aggregation weight and the advantage of its sequence, and counts the
// valid tokens of each sequence.
struct PrepareArgs {
  int64_t seqs;
  const int32_t* cu_seqlens;   // (S + 1)
  const uint8_t* mask;         // (T) or null
  const float* seq_advantage;  // (S) or null
  int32_t* counts;             // (S) valid tokens of each sequence
  float* agg_weight;           // (T) or null: 1 / (valid tokens of its sequence)
  float* advantage;            // (T) with seq_advantage, else null
};

// CUDA. Adds up the metric sums of the per-token results that a row kernel wrote.
struct MetricsArgs {
  int64_t tokens, seqs;
  const float* logp;  // (T); the same for all vectors without a shape
  const float* entropy;
  const float* old_logp;
  const float* ref_logp;  // or null
  const uint8_t* mask;    // or null
  const float* token_loss;
  const float* d_logp;
  const float* d_entropy;
  const float* ratio;
  const int32_t* flags;
  const int32_t* counts;  // (S) valid tokens of each sequence; null: sequences are not counted
  double* partial;        // (policy_partials(T, 0))
  double* sums;           // (kMetricCount) metric sums
};

// Returns the terms of token t. `log_ratio` is the one at the objective's level.
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
                         optional(o.entropy_weight, t, 1.0f),
                         optional(o.anchor_logp, t, 0.0f),
                         optional(o.anchor_weight, t, 1.0f)};
  return token_terms(o.params, x, log_ratio);
}

}  // namespace tokfuse
