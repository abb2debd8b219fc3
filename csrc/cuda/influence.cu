// Launcher of the kernel in influence.cuh.
#include "cuda/influence.cuh"
#include "cuda/runtime.h"

namespace tokfuse {
namespace cuda {

cudaError_t sketch(const SketchArgs& a, cudaStream_t stream) {
  const int64_t tiles = (a.rank + kTile - 1) / kTile, blocks = a.seqs * tiles * tiles;
  if (blocks == 0) return cudaSuccess;
  return launch(&sketch_kernel, LaunchShape{blocks, kBlock}, stream, a);
}

}  // namespace cuda
}  // namespace tokfuse
