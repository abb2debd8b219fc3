// Launchers of paired_divergence.cuh.
#include "cuda/launch.h"
#include "cuda/paired_divergence.cuh"

namespace tokfuse {
namespace cuda {
namespace {

template <Divergence kValue>
struct Kind {
  static constexpr Divergence value = kValue;
};

// Call run(null pointer of the element type, Flag of a softcap, Kind).
template <class F>
cudaError_t dispatch(const DivergenceArgs& a, const F& run) {
  return by_dtype(a.dtype, [&](auto* type) {
    return by_flag(a.softcap != 0.0f, [&](auto transformed) {
      switch (a.kind) {
        case Divergence::kJsd:
          return run(type, transformed, Kind<Divergence::kJsd>());
        case Divergence::kForwardKl:
          return run(type, transformed, Kind<Divergence::kForwardKl>());
        case Divergence::kReverseKl:
          return run(type, transformed, Kind<Divergence::kReverseKl>());
        case Divergence::kSkewForward:
          return run(type, transformed, Kind<Divergence::kSkewForward>());
        case Divergence::kSkewReverse:
          return run(type, transformed, Kind<Divergence::kSkewReverse>());
        case Divergence::kTotalVariation:
          return run(type, transformed, Kind<Divergence::kTotalVariation>());
      }
      return cudaErrorInvalidValue;
    });
  });
}

template <class T>
bool streams_aligned(const DivergenceArgs& a) {
  return rows_aligned<T>(a.logits_p, a.stride_p) && rows_aligned<T>(a.logits_q, a.stride_q);
}

}  // namespace

cudaError_t paired_divergence_fwd(const DivergenceArgs& a, const DivergenceOut& out,
                                  cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  return dispatch(a, [&](auto* type, auto transformed, auto kind) {
    using T = Pointee<decltype(type)>;
    return launch_resident(
        paired_divergence_fwd_kernel<T, decltype(transformed)::value, decltype(kind)::value>,
        a.tokens, kDivergenceThreads, stream, a, out.divergence, out.state, streams_aligned<T>(a));
  });
}

cudaError_t paired_divergence_bwd(const DivergenceArgs& a, const DivergenceGrad& g,
                                  cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  const int parts = parts_of_rows(a.tokens, a.vocab);
  return dispatch(a, [&](auto* type, auto transformed, auto kind) {
    using T = Pointee<decltype(type)>;
    const bool together = rows_together<T, T>(a.logits_p, a.stride_p, a.logits_q, a.stride_q) &&
                          rows_together<T, T>(a.logits_p, a.stride_p, g.grad_logits, g.grad_stride);
    return launch_resident(
        paired_divergence_bwd_kernel<T, decltype(transformed)::value, decltype(kind)::value>,
        a.tokens * parts, kDivergenceThreads, stream, a, g.state, g.grad_divergence,
        static_cast<T*>(g.grad_logits), g.grad_stride, parts, together);
  });
}

}  // namespace cuda
}  // namespace tokfuse
