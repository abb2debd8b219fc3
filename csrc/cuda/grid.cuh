// A grid whose blocks are all resident and can wait for each other: one launch where a second pass
// needs a statistic of the first one over all rows.
//
// On the CPU the blocks of such a grid run as one cluster, which is what keeps them alive together.
#pragma once

#include "cuda/device.cuh"

#if !defined(TOKFUSE_CUDA_HOST)
#include <cooperative_groups.h>
#endif

namespace tokfuse {
namespace cuda {

#if defined(TOKFUSE_CUDA_HOST)

inline void grid_sync() { host::cluster_meet(); }

// What the host execution keeps alive at once.
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

// Every thread of the grid meets; what they wrote is seen by all.
__device__ __forceinline__ void grid_sync() { cooperative_groups::this_grid().sync(); }

// Blocks of `threads` threads that the device holds at once.
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

// One launch of at most `wanted` blocks that can meet in grid_sync. Results may not depend on how
// many there are: work and partial results are numbered by chunk, not by block.
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
