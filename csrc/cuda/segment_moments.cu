// Launcher of the kernel in segment_moments.cuh.
#include "cuda/runtime.h"
#include "cuda/segment_moments.cuh"

namespace tokfuse {
namespace cuda {
namespace {

constexpr int64_t kStripsPerPart = 8;
constexpr int kMaxParts = 64;

}  // namespace

// A power of two; 1 if the mean segment has few strips of kBlock rows.
int moments_parts(int64_t rows, int64_t segments) {
  int parts = 1;
  if (segments == 0) return parts;
  const int64_t strips = rows / (segments * kBlock * kStripsPerPart);
  while (parts < strips && parts < kMaxParts) parts *= 2;
  return parts;
}

cudaError_t segment_moments(const MomentsArgs& a, cudaStream_t stream) {
  if (a.segments == 0) return cudaSuccess;
  const MomentsScratch scratch = {a.order, a.parts, a.table, a.tickets};
  if (scratch.parts > 1) {
    const cudaError_t error = cudaMemsetAsync(
        scratch.tickets, 0, static_cast<size_t>(a.segments) * sizeof(unsigned), stream);
    if (error != cudaSuccess) return error;
  }
  const LaunchShape shape = {a.segments * scratch.parts, kBlock};
  return a.is_double ? launch(&segment_moments_kernel<double>, shape, stream, a, scratch)
                     : launch(&segment_moments_kernel<float>, shape, stream, a, scratch);
}

}  // namespace cuda
}  // namespace tokfuse
