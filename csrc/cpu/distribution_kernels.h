// Argument records of the kernels that compare or restrict whole distributions.
//
// Shapes in comments: T tokens, V vocabulary, K kept ids in all rows together.
#pragma once

#include "cpu/kernels.h"

namespace tokfuse {

// Softmax over the kept ids of each row.
struct KeptArgs {
  LogitsArgs logits;       // index and bias_logits null
  const int64_t* ids;      // (K)
  const int64_t* offsets;  // (T + 1): row t keeps ids[offsets[t] .. offsets[t + 1])
  uint64_t* seen;          // (threads, kept_seen_words(V)) zeroed: one bit per vocabulary entry
};

struct KeptOut {
  float* logp;     // (T)
  float* entropy;  // (T)
  float* lse;      // (T)
  float* shift;    // (T) largest kept logit  } what the gradient
  float* inv_sum;  // (T)                     } needs, see cpu/rows.h
};

inline int64_t kept_seen_words(int64_t vocab) { return (vocab + 63) / 64; }

// Codes shared with runtime/core/codes.py.
enum class Divergence : int32_t { kJsd = 0, kForwardKl = 1, kReverseKl = 2 };

// Floats that the backward of a divergence keeps per row.
constexpr int64_t kDivergenceState = 6;

struct DivergenceArgs {
  const void* p;              // (T, V)
  const void* q;              // (T, V), same dtype
  int64_t p_stride;           //
  int64_t q_stride;           //
  DType dtype;                //
  int64_t tokens, vocab;      //
  const uint8_t* mask;        // (T) or null
  const float* temperatures;  // (T) or null
  float temperature;          // used when temperatures is null
  float softcap;              // 0: none
  float logit_scale;          //
  Divergence kind;            //
  float beta;                 // weight of Q in the mixture of kJsd
  int threads;                //
};

#define TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa)                                                 \
  namespace isa {                                                                                 \
  /* first unmasked row with a target, temperature or kept id out of range, or an id twice; -1 */ \
  int64_t kept_bad_row(const KeptArgs& args);                                                     \
  void kept_token_stats_fwd(const KeptArgs& args, const KeptOut& out);                            \
  void kept_token_stats_bwd(const KeptArgs& args, const TokenStatsGrad& grad);                    \
  void paired_divergence_fwd(const DivergenceArgs& args, float* divergence, float* state);        \
  void paired_divergence_bwd(const DivergenceArgs& args, const float* state,                      \
                             const float* grad_divergence, void* grad_p, int64_t grad_stride);    \
  }

#if defined(TOKFUSE_ISA_LEVELS)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v2)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v3)
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_v4)
#else
TOKFUSE_DECLARE_DISTRIBUTION_KERNELS(isa_base)
#endif

}  // namespace tokfuse
