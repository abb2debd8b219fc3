// Launchers of the row kernels: their argument records and what they return.
//
// Shapes in comments: R rows of logits, T tokens (R = T without an index), V vocabulary, K kept
// ids. "or null" marks optional pointers. Pointers are of device memory. Strides and offsets are
// 64-bit element counts. The binding layer has checked sizes and codes; the launchers trust them.
// Each returns the error of its launch; one of the kernel itself comes with a later call.
#pragma once

#include <cstdint>

#include "common/dtype.h"
#include "common/objective.h"

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

// Logits and everything that turns them into a distribution.
struct LogitsArgs {
  const void* logits;         // (R, V)
  int64_t stride;             // elements between rows
  DType dtype;                //
  int64_t rows, vocab;        //
  const int64_t* index;       // (R) or null: row i belongs to token index[i]
  const int64_t* target;      // (T)
  const uint8_t* mask;        // (T) or null: 0 = row is not read
  const float* temperatures;  // (T) or null
  float temperature;          // used when temperatures is null
  float softcap;              // 0: none
  float logit_scale;          //
  const void* bias_logits;    // (R, V) same dtype, or null
  int64_t bias_stride;        //
  float bias_scale;           //
};

// Every vector is (T); 0 where masked.
struct TokenStatsOut {
  float* logp;
  float* entropy;
  float* lse;
  float* sum_sq;
  float* top1;
  float* row_max;      // maximum of the transformed logits    } what the gradient needs besides the
  float* inv_sum;      // 1 / sum of exponentials              } logits; null: not wanted
  float* second_logp;  // or null: logp at `second_temperature`
  float* p2_logp;      // or null: sum p^2 log p
  float* p2_logp2;     // or null, as p2_logp: sum p^2 log^2 p
  float second_temperature;
};

struct TokenStatsGrad {
  const float* row_max;       // (T), as all vectors
  const float* inv_sum;       //
  const float* logp;          //
  const float* entropy;       //
  const float* grad_logp;     // or null
  const float* grad_entropy;  // or null
  void* grad_logits;          // (R, V); may be the logits themselves
  int64_t grad_stride;        //
  DType grad_dtype;           // that of the logits, or 16-bit beside float32 logits
};

// A token-level objective: per-token inputs, each (T), and outputs. null: the term is absent.
struct TokenObjective {
  ObjectiveParams params;
  const float* old_logp;
  const float* advantage;   // per token
  const float* agg_weight;  // aggregation weight before the normaliser; null: 1
  const float* weight;      // multiplies the policy term
  const float* signal;
  const float* ref_logp;
  const float* kl_weight;
  const float* entropy_weight;
  const float* scale;  // (): 1 / normaliser; null: scale_value
  float scale_value;
  // outputs; 0 where masked
  float* token_loss;
  float* d_logp;
  float* d_entropy;
  float* ratio;
  int32_t* flags;  // TokenFlag
};

// The logits of LogitsArgs over the ids kept_ids[offsets[t] .. offsets[t + 1]) of each token.
struct KeptArgs {
  LogitsArgs logits;
  const int64_t* ids;      // (K)
  const int64_t* offsets;  // (T + 1)
  int64_t kept;            // K
};

enum class Divergence : int32_t { kJsd = 0, kForwardKl = 1, kReverseKl = 2 };

struct DivergenceArgs {
  const void* p;  // (T, V)
  const void* q;  // (T, V)
  int64_t p_stride, q_stride;
  DType dtype;
  int64_t tokens, vocab;
  const uint8_t* mask;        // (T) or null
  const float* temperatures;  // (T) or null
  float temperature;
  float softcap;  // 0: none
  float logit_scale;
  float beta;  // of the JSD
  Divergence kind;
};

// Floats per row that the backward of paired_divergence needs.
constexpr int kDivergenceState = 6;

cudaError_t token_stats_fwd(const LogitsArgs& args, const TokenStatsOut& out, cudaStream_t stream);
cudaError_t token_stats_bwd(const LogitsArgs& args, const TokenStatsGrad& grad,
                            cudaStream_t stream);

// Statistics, objective and gradient of each row in one launch; grad_logits may be the logits.
cudaError_t policy_step(const LogitsArgs& args, const TokenStatsOut& stats,
                        const TokenObjective& objective, void* grad_logits, int64_t grad_stride,
                        DType grad_dtype, cudaStream_t stream);

// Of `out` logp, entropy, lse, row_max and inv_sum.
cudaError_t kept_token_stats_fwd(const KeptArgs& args, const TokenStatsOut& out,
                                 cudaStream_t stream);
// Writes the dense gradient, zeros included: two launches.
cudaError_t kept_token_stats_bwd(const KeptArgs& args, const TokenStatsGrad& grad,
                                 cudaStream_t stream);

// divergence (T), state (T, kDivergenceState).
cudaError_t paired_divergence_fwd(const DivergenceArgs& args, float* divergence, float* state,
                                  cudaStream_t stream);
cudaError_t paired_divergence_bwd(const DivergenceArgs& args, const float* state,
                                  const float* grad_divergence, void* grad_p, int64_t grad_stride,
                                  cudaStream_t stream);

}  // namespace cuda
}  // namespace tokfuse
