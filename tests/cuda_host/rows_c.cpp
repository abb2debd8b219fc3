// The launchers of the row kernels with C names, for tests that fill their records from Python.
#include "cuda/kernels.h"

using namespace tokfuse;
using namespace tokfuse::cuda;

extern "C" {

int rows_token_stats_fwd(const LogitsArgs* args, const TokenStatsOut* out) {
  return token_stats_fwd(*args, *out, nullptr);
}

int rows_token_stats_bwd(const LogitsArgs* args, const TokenStatsGrad* grad) {
  return token_stats_bwd(*args, *grad, nullptr);
}

int rows_policy_step(const LogitsArgs* args, const TokenStatsOut* out, const TokenObjective* o,
                     void* grad, int64_t stride, int32_t dtype) {
  return policy_step(*args, *out, *o, grad, stride, static_cast<DType>(dtype), nullptr);
}

int rows_kept_token_stats_fwd(const KeptArgs* args, const TokenStatsOut* out) {
  return kept_token_stats_fwd(*args, *out, nullptr);
}

int rows_kept_token_stats_bwd(const KeptArgs* args, const TokenStatsGrad* grad) {
  return kept_token_stats_bwd(*args, *grad, nullptr);
}

int rows_paired_divergence_fwd(const DivergenceArgs* args, float* divergence, float* state) {
  return paired_divergence_fwd(*args, divergence, state, nullptr);
}

int rows_paired_divergence_bwd(const DivergenceArgs* args, const float* state, const float* grad,
                               void* grad_p, int64_t stride) {
  return paired_divergence_bwd(*args, state, grad, grad_p, stride, nullptr);
}

}  // extern "C"
