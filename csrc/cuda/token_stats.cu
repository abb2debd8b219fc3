// Launchers of the kernels in token_stats.cuh.
#include "cuda/launch.h"
#include "cuda/token_stats.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t token_stats_fwd(const LogitsArgs& a, const TokenStatsOut& out, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const bool extras = out.second_logp != nullptr || out.sum_p2_logp != nullptr;
  return by_dtype(a.dtype, [&](auto* type) {
    using T = Pointee<decltype(type)>;
    const bool aligned =
        rows_aligned<T>(a.logits, a.stride) && rows_aligned<T>(a.bias_logits, a.bias_stride);
    return by_flag(is_transformed(a), [&](auto transformed) {
      constexpr bool kTransform = decltype(transformed)::value;
      if (out.logit_sum != nullptr) {
        return launch_resident(token_stats_sum_fwd_kernel<T, kTransform>, a.rows, kForwardThreads,
                               stream, a, out, aligned);
      }
      return by_flag(extras, [&](auto with_extras) {
        return launch_resident(token_stats_fwd_kernel<T, kTransform, decltype(with_extras)::value>,
                               a.rows, kForwardThreads, stream, a, out, aligned);
      });
    });
  });
}

cudaError_t token_stats_bwd(const LogitsArgs& a, const TokenStatsGrad& g, cudaStream_t stream) {
  if (a.rows == 0) return cudaSuccess;
  const int parts = parts_of_rows(a.rows, a.vocab);
  return by_dtypes(a.dtype, g.grad_dtype, [&](auto* type, auto* grad_type) {
    using T = Pointee<decltype(type)>;
    using G = Pointee<decltype(grad_type)>;
    const bool together = rows_together<T, T>(a.logits, a.stride, a.bias_logits, a.bias_stride) &&
                          rows_together<T, G>(a.logits, a.stride, g.grad_logits, g.grad_stride);
    return by_flag(is_transformed(a), [&](auto transformed) {
      constexpr bool kTransform = decltype(transformed)::value;
      if (g.grad_logit_sum != nullptr) {
        return launch_resident(token_stats_sum_bwd_kernel<T, G, kTransform>, a.rows * parts,
                               kBackwardThreads, stream, a, g, parts, together);
      }
      return launch_resident(token_stats_bwd_kernel<T, G, kTransform>, a.rows * parts,
                             kBackwardThreads, stream, a, g, parts, together);
    });
  });
}

}  // namespace cuda
}  // namespace tokfuse
