// Launchers of token_stats_at.cuh.
#include "cuda/launch.h"
#include "cuda/token_stats_at.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t token_stats_at_fwd(const LogitsArgs& a, const TokenStatsOut& out, const IdsArgs& ids,
                               cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const cudaError_t error = token_stats_fwd(a, out, stream);
  if (error != cudaSuccess || ids.num_ids == 0) return error;
  return by_dtype(a.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    return by_flag(is_transformed(a), [&](auto transformed) {
      return launch_resident(log_probs_at_kernel<T, decltype(transformed)::value>, a.rows,
                             kIdsThreads, stream, a, out, ids);
    });
  });
}

cudaError_t token_stats_at_bwd(const LogitsArgs& a, const TokenStatsGrad& g, const IdsArgs& ids,
                               cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  cudaError_t error = by_dtype(a.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    return by_flag(is_transformed(a), [&](auto transformed) {
      return launch_resident(gradient_at_kernel<T, decltype(transformed)::value>, a.rows,
                             kIdsThreads, stream, a, g, ids);
    });
  });
  if (error != cudaSuccess) return error;
  TokenStatsGrad all = g;
  all.grad_logp = ids.grad_total;
  all.grad_lse = nullptr;  // grad_total contains it
  error = token_stats_bwd(a, all, stream);
  if (error != cudaSuccess) return error;
  return by_dtype(g.grad_dtype, [&](auto* type) {
    using G = Pointee<decltype(type)>;
    return launch_resident(store_at_kernel<G>, a.rows, kIdsThreads, stream, a, g, ids);
  });
}

}  // namespace cuda
}  // namespace tokfuse
