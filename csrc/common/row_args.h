// Argument structs of the kernels over rows of logits, for CPU and CUDA.
//
// Shapes in comments: R rows of logits, T tokens (R = T without an index), V vocabulary, K ids of
// all tokens together. "or null" marks optional pointers. Strides and offsets are 64-bit element
// counts. docs/names.md defines every field. A field marked "CPU" or "CUDA" is read there only. The
// bindings have checked sizes and codes; the kernels trust them.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tokfuse {

// Logits, and how they become a distribution.
struct LogitsArgs {
  const void* logits;   // (R, V)
  int64_t stride;       // elements between rows
  int64_t tile;         // CPU. 0: rows in one piece; else columns come in tiles of this many
  int64_t tile_stride;  // CPU. Elements between tiles
  DType dtype;
  int64_t rows, vocab;
  const int64_t* index;       // (R) or null: row i belongs to token index[i]
  int64_t tokens;             // T
  const int64_t* target;      // (T)
  const uint8_t* mask;        // (T) or null; 0: the row is not read
  const float* temperatures;  // (T) or null
  float temperature;          // used if temperatures is null
  float softcap;              // 0: none
  float logit_scale;
  const void* bias_logits;  // (R, V) same dtype, or null
  int64_t bias_stride;
  float bias_scale;
  int threads;  // CPU
};

// Where the statistics of each token are written, (T) each; 0 where masked.
struct TokenStatsOut {
  float* logp;
  float* entropy;
  float* lse;
  float* sum_sq;        // or null, for kept rows
  float* top1;          // or null, for kept rows
  float* row_max;       // in the exponent's unit      } both for the gradient; or null in the
  float* inv_sum;       // 1 / sum of the exponentials } CUDA policy_step
  float* second_logp;   // or null: logp at `second_temperature`
  float* sum_p2_logp;   // or null: sum p^2 log p
  float* sum_p2_logp2;  // or null, as sum_p2_logp: sum p^2 log^2 p
  float second_temperature;
};

// What the gradient of logp and entropy reads, and where it is written.
struct TokenStatsGrad {
  const float* row_max;  // (T), as all vectors
  const float* inv_sum;
  const float* logp;
  const float* entropy;
  const float* grad_logp;     // or null
  const float* grad_entropy;  // or null
  void* grad_logits;          // (R, V); may be the logits themselves
  int64_t grad_stride;
  DType grad_dtype;  // that of the logits; on CUDA also 16-bit for float32 logits
};

// Where policy_step writes the gradient of the logits.
struct GradRows {
  void* grad_logits;  // (R, V); may be the logits themselves
  int64_t grad_stride;
  DType grad_dtype;      // as in TokenStatsGrad
  int64_t* grad_tokens;  // CPU. (R) or null: receives the tokens of the rows that carry gradient
};

// Softmax over the ids[offsets[t] .. offsets[t + 1]) of each token t.
struct KeptArgs {
  LogitsArgs logits;       // index and bias_logits null
  const int64_t* ids;      // (K)
  const int64_t* offsets;  // (T + 1)
  int64_t num_ids;         // K
  uint64_t* seen;          // CPU, set by the binding. (threads, kept_seen_words(V)), zeroed
};

// Log-probs at ids[offsets[t] .. offsets[t + 1]) of each token t, next to its statistics.
struct IdsArgs {
  const int64_t* ids;         // (K); -1: padding
  const int64_t* offsets;     // (T + 1)
  int64_t num_ids;            // K
  float* logp_at;             // (K), written by the forward, read by the backward; 0 at padding
  const float* grad_logp_at;  // (K) or null in the forward
  float* grad_at;             // CUDA. (K) working memory: gradient of the logits at the ids,
  float* grad_at_target;      // CUDA. (T) at the target,
  float* grad_total;          // CUDA. (T) and grad_logp plus the grad_logp_at of the token
};

// Codes shared with runtime/core/codes.py.
enum class Divergence : int32_t { kJsd = 0, kForwardKl = 1, kReverseKl = 2 };

// Floats per token that the backward of a divergence needs.
constexpr int kDivergenceState = 6;

// Two streams of logits of the same tokens.
struct DivergenceArgs {
  const void* logits_p;  // (T, V)
  const void* logits_q;  // (T, V), same dtype
  int64_t stride_p, stride_q;
  DType dtype;
  int64_t tokens, vocab;
  const uint8_t* mask;        // (T) or null
  const float* temperatures;  // (T) or null
  float temperature;          // used if temperatures is null
  float softcap;              // 0: none
  float logit_scale;
  Divergence kind;
  float beta;   // weight of Q in the mixture of kJsd
  int threads;  // CPU
};

struct DivergenceOut {
  float* divergence;  // (T)
  float* state;       // (T, kDivergenceState)
};

struct DivergenceGrad {
  const float* state;            // (T, kDivergenceState)
  const float* grad_divergence;  // (T)
  void* grad_logits;             // (T, V), of logits_p
  int64_t grad_stride;
};

}  // namespace tokfuse
