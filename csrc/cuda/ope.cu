// Launcher of the kernel in ope.cuh.
#include "cuda/ope.cuh"

namespace tokfuse {
namespace cuda {

cudaError_t ope(const OpeArgs& a, cudaStream_t stream) {
  return launch_grid(&ope_kernel, (a.rows + kOpeBlock - 1) / kOpeBlock, kBlock, stream, a);
}

}  // namespace cuda
}  // namespace tokfuse
