// Launcher of the kernel in vtrace.cuh.
#include "cuda/runtime.h"
#include "cuda/vtrace.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t vtrace(const VtraceArgs& a, cudaStream_t stream) {
  if (a.tokens == 0 || a.seqs == 0) return cudaSuccess;
  return launch(&vtrace_kernel, LaunchShape{a.seqs, kScanBlock}, stream, a);
}

}  // namespace cuda
}  // namespace tokfuse
