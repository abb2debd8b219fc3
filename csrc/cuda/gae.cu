// Launcher of the kernel in gae.cuh.
#include "cuda/gae.cuh"
#include "cuda/runtime.h"

namespace tokfuse {
namespace cuda {

cudaError_t gae(const GaeArgs& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.seqs == 0) return cudaSuccess;
  return launch(&gae_kernel, LaunchShape{a.seqs, kScanBlock}, stream, a);
}

}  // namespace cuda
}  // namespace tokfuse
