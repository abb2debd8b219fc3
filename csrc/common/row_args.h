// Argument structs of the kernels over rows of logits, for the CPU and CUDA kernels.
//
// Shapes in comments: R rows of logits, T tokens (R = T without an index), V vocabulary, K ids of
// all rows together. "or null" marks optional pointers. Strides and offsets are 64-bit element
// counts. docs/names.md defines every field. Only the kernels of that backend read a field marked
// "CPU" or "CUDA".
//
// The bindings have checked sizes and codes. The kernels do not check them again.
#pragma once

#include <cstdint>

#include "common/dtype.h"

namespace tokfuse {

// Logits and the options of their softmax.
struct LogitsArgs {
  const void* logits;   // (R, V)
  int64_t stride;       // elements between rows
  int64_t tile;         // CPU. Columns of a tile; 0: a row is contiguous
  int64_t tile_stride;  // CPU. Elements from one tile to the next
  DType dtype;
  int64_t rows, vocab;
  const int64_t* index;       // (R): row i belongs to token index[i]; null: to token i
  int64_t tokens;             // T
  const int64_t* target;      // (T)
  const uint8_t* mask;        // (T) or null; the row of a token with mask 0 is not read
  const float* temperatures;  // (T) or null
  float temperature;          // used if temperatures is null
  float softcap;              // 0: none
  float logit_scale;
  const void* bias_logits;  // (R, V) in the dtype of the logits, or null
  int64_t bias_stride;
  float bias_scale;
  int threads;  // CPU
};

// Outputs of the statistics, (T) each. A masked token gets 0.
struct TokenStatsOut {
  float* logp;
  float* entropy;
  float* lse;
  float* sum_sq;        // null in kept_token_stats
  float* top1;          // null in kept_token_stats
  float* row_max;       // for the gradient; null in the CUDA policy_step; unit: docs/names.md
  float* inv_sum;       // for the gradient; null in the CUDA policy_step; 1 / sum of exponentials
  float* second_logp;   // logp at second_temperature, or null
  float* sum_p2_logp;   // sum p^2 log p, or null
  float* sum_p2_logp2;  // sum p^2 log^2 p; null if sum_p2_logp is
  float second_temperature;
  const float* class_weight;  // (V) or null: 1 for every class
  float* logit_sum;           // sum_j class_weight_j u_j, or null; token_stats only
};

// Inputs and output of the gradient of logp, entropy, lse and logit_sum with respect to the logits.
struct TokenStatsGrad {
  const float* row_max;  // (T); the same for all vectors
  const float* inv_sum;
  const float* logp;
  const float* entropy;
  const float* grad_logp;     // or null
  const float* grad_entropy;  // or null
  void* grad_logits;          // (R, V); may be the logits themselves
  int64_t grad_stride;
  DType grad_dtype;  // dtype of the logits; on CUDA also a 16-bit one for float32 logits
  // Read by token_stats only.
  const float* grad_lse;        // or null
  const float* grad_logit_sum;  // or null
  const float* class_weight;    // as in TokenStatsOut
};

// Output of policy_step: the gradient of the logits.
struct GradRows {
  void* grad_logits;  // (R, V); may be the logits themselves
  int64_t grad_stride;
  DType grad_dtype;      // as in TokenStatsGrad
  int64_t* grad_tokens;  // CPU. (R) or null: written with the tokens of rows with a gradient
};

// Logits whose softmax for token t runs over ids[offsets[t] .. offsets[t + 1]) only.
struct KeptArgs {
  LogitsArgs logits;       // index and bias_logits are null
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

// runtime/core/codes.py lists the same codes.
enum class Divergence : int32_t {
  kJsd = 0,
  kForwardKl = 1,
  kReverseKl = 2,
  kSkewForward = 3,
  kSkewReverse = 4,
  kTotalVariation = 5
};

// Floats per token that the backward of a divergence needs: live, max u_p, max u_q, log2 S_p,
// log2 S_q, sum p s. live is 0 for a row without a gradient. log2 S is -inf on a side without a
// distribution.
constexpr int kDivergenceState = 6;

// Logits of two models for the same tokens.
struct DivergenceArgs {
  const void* logits_p;  // (T, V)
  const void* logits_q;  // (T, V), in the dtype of logits_p
  int64_t stride_p, stride_q;
  DType dtype;
  int64_t tokens, vocab;
  const uint8_t* mask;        // (T) or null
  const float* temperatures;  // (T) or null
  float temperature;          // used if temperatures is null
  float softcap;              // 0: none
  float logit_scale;
  Divergence kind;
  float mix_weight;  // in the mixture: of Q for kJsd and kSkewForward, of P for kSkewReverse
  float bound;       // largest value of this divergence; infinity for the two KLs
  // (T, kDivergenceState) or null. The log-sum-exps of the whole rows if a, b are columns of longer
  // ones, with KL(P || Q) in the last place. The results are then sums over these columns.
  const float* given;
  int threads;  // CPU
};

struct DivergenceOut {
  float* divergence;  // (T)
  float* state;       // (T, kDivergenceState)
};

struct DivergenceGrad {
  const float* state;            // (T, kDivergenceState)
  const float* grad_divergence;  // (T)
  void* grad_logits;             // (T, V): the gradient of logits_p
  int64_t grad_stride;
};

// Student and teacher logits of the same tokens, each with its own options; CPU. Row i of the
// student belongs to token t = token_of(i). Of the teacher it is row i with an index, else row t.
struct DistillArgs {
  LogitsArgs student;
  LogitsArgs teacher;
  Divergence kind;
  float mix_weight;           // } as in DivergenceArgs
  float bound;                // }
  const float* class_weight;  // (V) or null: 1 for every class; of logit_sum
};

// (T) each; 0 where masked. divergence, teacher_logp and top1_agreement are also 0, and the teacher
// is not read, where a gradient is computed and grad_divergence is 0.
struct DistillOut {
  float* divergence;
  float* entropy;
  float* logp;
  float* teacher_logp;
  float* top1_agreement;
  float* lse;        // of the student, or null
  float* logit_sum;  // sum_j class_weight_j u_j of the student, or null
};

// A row whose coefficients are all 0 is not read: zeros in every output.
struct DistillGrad {
  const float* grad_divergence;  // (T)
  const float* grad_logp;        // (T) or null
  const float* grad_entropy;     // (T) or null
  const float* grad_lse;         // (T) or null
  const float* grad_lse_square;  // (T) or null; d loss / d lse^2
  const float* grad_logit_sum;   // (T) or null
  void* grad_logits;             // (R, V), of the student, may be its logits; null: no gradient
  int64_t grad_stride;
};

}  // namespace tokfuse
