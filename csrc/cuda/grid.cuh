// Cooperative launches with a grid-wide barrier. If a second pass needs a statistic of the first
// pass over all rows, both run in one launch with grid_sync between them.
//
// On the CPU (TOKFUSE_CUDA_HOST) the blocks of such a grid run as one cluster, so all exist at
// once.
#pragma once

#include "cuda/device.cuh"

#if !defined(TOKFUSE_CUDA_HOST)
#include <cooperative_groups.h>
#endif

namespace tokfuse {
namespace cuda {

#if defined(TOKFUSE_CUDA_HOST)

inline void grid_sync() { host::cluster_meet(); }

// Sets `blocks` to the number of blocks that the host execution can run at once.
template <class Kernel>
cudaError_t blocks_together(Kernel*, unsigned, unsigned* blocks) {
  *blocks = host::arch() >= 90 ? min(host::processors() + 1, 8u) : 1;
  return cudaSuccess;
}

template <class... Parameters, class... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                            cudaStream_t stream, const Arguments&... arguments) {
  return launch(kernel, LaunchShape{blocks, threads, 0, blocks}, stream, arguments...);
}

#else

// Synchronises all threads of the grid. Earlier writes are visible to all of them afterwards.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Sets `blocks` to the number of blocks of `threads` threads that are resident at once.
template <class Kernel>
cudaError_t blocks_together(Kernel* kernel, unsigned threads, unsigned* blocks) {
  return resident_blocks(kernel, LaunchShape{1, threads}, blocks);
}

template <class... Parameters, class... Arguments>
cudaError_t launch_together(void (*kernel)(Parameters...), unsigned blocks, unsigned threads,
                            cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

#endif

// Launches at most `wanted` blocks that can call grid_sync. Results must not depend on the number
// of blocks: kernels number work and partial results by chunk, not by block.
template <class... Parameters, class... Arguments>
cudaError_t launch_grid(void (*kernel)(Parameters...), int64_t wanted, unsigned threads,
                        cudaStream_t stream, const Arguments&... arguments) {
  unsigned blocks = 0;
  const cudaError_t error = blocks_together(kernel, threads, &blocks);
  if (error != cudaSuccess) return error;
  if (wanted < static_cast<int64_t>(blocks)) blocks = static_cast<unsigned>(wanted);
  return launch_together(kernel, blocks > 0 ? blocks : 1, threads, stream, arguments...);
}

}  // namespace cuda
}  // namespace tokfuse
