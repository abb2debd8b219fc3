// Launcher of the kernel in whiten.cuh.
#include "cuda/whiten.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t whiten(const WhitenArgs& a, cudaStream_t stream) {
  if (a.tokens == 0) return cudaSuccess;
  return launch_grid(&whiten_kernel, (a.tokens + kWhitenBlock - 1) / kWhitenBlock, kBlock, stream,
                     a);
}

}  // namespace cuda
}  // namespace tokfuse
