// Launchers of the kernels in kept_token_stats.cuh.
#include "cuda/kept_token_stats.cuh"
#include "cuda/launch.h"

namespace tokfuse {
namespace cuda {

cudaError_t kept_token_stats_fwd(const KeptArgs& a, const TokenStatsOut& out, cudaStream_t stream) {
  if (a.logits.rows == 0) return cudaSuccess;
  return by_dtype(a.logits.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    return by_flag(a.logits.softcap != 0.0f, [&](auto transformed) {
      return launch_resident(kept_token_stats_fwd_kernel<T, decltype(transformed)::value>,
                             a.logits.rows, kKeptThreads, stream, a, out);
    });
  });
}

cudaError_t kept_token_stats_bwd(const KeptArgs& a, const TokenStatsGrad& g, cudaStream_t stream) {
  if (a.logits.rows == 0 || a.logits.vocab == 0) return cudaSuccess;
  return by_dtype(a.logits.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const size_t row_bytes = static_cast<size_t>(a.logits.vocab) * sizeof(T);
    const cudaError_t error =
        cudaMemset2DAsync(g.grad_logits, static_cast<size_t>(g.grad_stride) * sizeof(T), 0,
                          row_bytes, static_cast<size_t>(a.logits.rows), stream);
    if (error != cudaSuccess) return error;
    return by_flag(a.logits.softcap != 0.0f, [&](auto transformed) {
      return launch_resident(kept_token_stats_bwd_kernel<T, decltype(transformed)::value>,
                             a.logits.rows, kKeptThreads, stream, a, g);
    });
  });
}

}  // namespace cuda
}  // namespace tokfuse
