// Cooperative launches with a grid-wide barrier. If a second pass needs a statistic of the first
// pass over all rows, both run in one launch with grid_sync between them.
//
// On the CPU (TOKFUSE_CUDA_HOST) the blocks of such a grid run as one cluster, so all exist at
// once.
#pragma once

#include "cuda/runtime.h"

#if !defined(TOKFUSE_CUDA_HOST)
#include <cooperative_groups.h>
#endif

namespace tokfuse {
namespace cuda {

// Synchronises all threads of the grid. Earlier writes are visible to all of them afterwards.
#if defined(TOKFUSE_CUDA_HOST)
inline void grid_sync() { host::cluster_meet(); }
#else
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }
#endif

// Launches at most `wanted` blocks that can call grid_sync. Results must not depend on the number
// of blocks: kernels number work and partial results by chunk, not by block.
template <class... Parameters, class... Arguments>
cudaError_t launch_grid(void (*kernel)(Parameters...), int64_t wanted, unsigned threads,
                        cudaStream_t stream, const Arguments&... arguments) {
  LaunchShape shape = {1, threads};
  const cudaError_t error = resident_blocks(kernel, shape, &shape.blocks);
  if (error != cudaSuccess) return error;
  if (wanted < shape.blocks) shape.blocks = wanted;
  if (shape.blocks < 1) shape.blocks = 1;
  cudaLaunchAttribute together;
  cudaLaunchConfig_t config = launch_config(shape, stream, &together);
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

}  // namespace cuda
}  // namespace tokfuse
