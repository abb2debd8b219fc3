// Launchers of the CUDA kernels over rows of logits. Their argument structs are in common/. All
// pointers are device pointers. The bindings have checked sizes and codes; the launchers do not
// check them again. A launcher returns the error of its launch. A later CUDA call returns an error
// of the kernel itself.
#pragma once

#include <cstdint>

#include "common/objective_args.h"
#include "common/row_args.h"

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime_api.h>
#endif

namespace tokfuse {
namespace cuda {

cudaError_t token_stats_fwd(const LogitsArgs& args, const TokenStatsOut& out, cudaStream_t stream);
cudaError_t token_stats_bwd(const LogitsArgs& args, const TokenStatsGrad& grad,
                            cudaStream_t stream);

// token_stats, and of the ids logp_at: two launches.
cudaError_t token_stats_at_fwd(const LogitsArgs& args, const TokenStatsOut& out, const IdsArgs& ids,
                               cudaStream_t stream);
// Three launches. Uses the working memory of the ids.
cudaError_t token_stats_at_bwd(const LogitsArgs& args, const TokenStatsGrad& grad,
                               const IdsArgs& ids, cudaStream_t stream);

// Statistics, objective and gradient of each row in one launch. grad_logits may be the logits.
cudaError_t policy_step(const LogitsArgs& args, const TokenStatsOut& stats,
                        const TokenObjectiveArgs& objective, const GradRows& grad,
                        cudaStream_t stream);

// Writes logp, entropy, lse, row_max and inv_sum of `out`.
cudaError_t kept_token_stats_fwd(const KeptArgs& args, const TokenStatsOut& out,
                                 cudaStream_t stream);
// Writes the dense gradient: one memset to zero and one launch for the kept columns.
cudaError_t kept_token_stats_bwd(const KeptArgs& args, const TokenStatsGrad& grad,
                                 cudaStream_t stream);

cudaError_t paired_divergence_fwd(const DivergenceArgs& args, const DivergenceOut& out,
                                  cudaStream_t stream);
cudaError_t paired_divergence_bwd(const DivergenceArgs& args, const DivergenceGrad& grad,
                                  cudaStream_t stream);

}  // namespace cuda
}  // namespace tokfuse
