// Host functions: which code of a kernel the driver loaded, and launches. On the CPU
// (TOKFUSE_CUDA_HOST) they call the runtime in tests/cuda_host.
#pragma once

#include <climits>
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <utility>

#include "cuda/device.cuh"

namespace tokfuse {
namespace cuda {

// The grid, the block, and `cluster` blocks per thread-block cluster.
struct LaunchShape {
  int64_t blocks;
  unsigned threads;
  size_t shared = 0;  // bytes of dynamic shared memory per block
  unsigned cluster = 1;
};

// The code of a kernel on one device.
struct KernelCode {
  int arch = 0;            // the TOKFUSE_ARCH that it was compiled with
  size_t max_dynamic = 0;  // largest dynamic shared memory of a block, in bytes
};

inline cudaError_t device_attribute(cudaDeviceAttr attribute, int* value) {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error != cudaSuccess ? error : cudaDeviceGetAttribute(value, attribute, device);
}

inline cudaError_t l2_bytes(int64_t* bytes) {
  int value = 0;
  const cudaError_t error = device_attribute(cudaDevAttrL2CacheSize, &value);
  *bytes = value;
  return error;
}

// Asks the driver which code it loaded for a kernel on the current device, and allows that code to
// use the largest possible dynamic shared memory.
//
// The architecture of the device does not tell which code runs there. A driver that finds no
// machine code for the device compiles the PTX of an older architecture. Then the arch of a kernel
// is the older one.
inline cudaError_t load_kernel(const void* kernel, KernelCode* code) {
  cudaFuncAttributes attributes;
  cudaError_t error = cudaFuncGetAttributes(&attributes, kernel);
  if (error != cudaSuccess) return error;
  int shared = 0;
  error = device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, &shared);
  if (error != cudaSuccess) return error;
  code->arch = attributes.ptxVersion;
  code->max_dynamic = static_cast<size_t>(shared) - attributes.sharedSizeBytes;
  return cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              static_cast<int>(code->max_dynamic));
}

// load_kernel, once per kernel and device. All threads see the same limit of shared memory: if each
// launch set the size that it needs, one thread could lower it between the call and the launch of
// another.
template <class Kernel>
cudaError_t kernel_code(Kernel* kernel, KernelCode* code) {
  static std::mutex mutex;
  static std::map<std::pair<int, Kernel*>, KernelCode> loaded;
  int device = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = loaded.find({device, kernel});
  if (found != loaded.end()) {
    *code = found->second;
    return cudaSuccess;
  }
  error = load_kernel(reinterpret_cast<const void*>(kernel), code);
  if (error == cudaSuccess) loaded[{device, kernel}] = *code;
  return error;
}

// Allows a kernel to use the dynamic shared memory of `shape`. Without this call, the static and
// the dynamic shared memory of a block must not exceed 48 KiB together.
template <class Kernel>
cudaError_t prepare_kernel(Kernel* kernel, const LaunchShape& shape) {
  KernelCode code;
  return shape.shared > 0 ? kernel_code(kernel, &code) : cudaSuccess;
}

// `attribute` must live until the launch.
inline cudaLaunchConfig_t launch_config(const LaunchShape& shape, cudaStream_t stream,
                                        cudaLaunchAttribute* attribute) {
  attribute->id = cudaLaunchAttributeClusterDimension;
  attribute->val.clusterDim.x = shape.cluster;
  attribute->val.clusterDim.y = attribute->val.clusterDim.z = 1;
  // By position: on the CPU, gridDim and blockDim are macros.
  return {dim3(static_cast<unsigned>(shape.blocks)),
          dim3(shape.threads),
          shape.shared,
          stream,
          attribute,
          shape.cluster > 1 ? 1u : 0u};
}

// Launches the kernel and returns the error of the launch. A later CUDA call returns an error of
// the kernel itself.
template <class... Parameters, class... Arguments>
cudaError_t launch(void (*kernel)(Parameters...), const LaunchShape& shape, cudaStream_t stream,
                   const Arguments&... arguments) {
  if (shape.blocks > INT_MAX) return cudaErrorInvalidConfiguration;
  const cudaError_t error = prepare_kernel(kernel, shape);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute cluster;
  const cudaLaunchConfig_t config = launch_config(shape, stream, &cluster);
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Sets `blocks` to the size of a persistent grid: the number of blocks that are resident on the
// device at once, in whole clusters.
template <class Kernel>
cudaError_t resident_blocks(Kernel* kernel, const LaunchShape& shape, int64_t* blocks) {
  cudaError_t error = prepare_kernel(kernel, shape);
  if (error != cudaSuccess) return error;
  int processors = 0, count = 0;
  if (shape.cluster > 1) {
    cudaLaunchAttribute cluster;
    LaunchShape one = shape;
    one.blocks = shape.cluster;
    const cudaLaunchConfig_t config = launch_config(one, nullptr, &cluster);
    error = cudaOccupancyMaxActiveClusters(&count, kernel, &config);
    *blocks = static_cast<int64_t>(count) * shape.cluster;
    return error;
  }
  error = device_attribute(cudaDevAttrMultiProcessorCount, &processors);
  if (error != cudaSuccess) return error;
  error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(
      &count, kernel, static_cast<int>(shape.threads), shape.shared);
  *blocks = static_cast<int64_t>(processors) * count;
  return error;
}

}  // namespace cuda
}  // namespace tokfuse
