// The CUDA language for a C++ compiler: keywords, built-in variables, barriers, shuffles, votes,
// atomics, asynchronous copies and a small runtime, so that kernels run on the CPU.
//
// Each thread is a fiber. All threads of a cluster are alive together, and clusters run one after
// the other (machine.cpp). This file defines only the names that kernels or launchers use, and
// needs no NVIDIA file. Interleavings between two synchronisation points are not explored; the
// checker (checker.cpp) and shuffled orders (TOKFUSE_HOST_SEED) replace this. A kernel that waits
// for another cluster hangs.
#pragma once

#include <math.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>

#if !defined(TOKFUSE_ARCH)
#define TOKFUSE_ARCH 100  // so that the code of every architecture is compiled
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(n) alignas(n)

// Functions without the sanitizer's instrumentation, which reports every access to the checker.
#define TOKFUSE_HOST_RAW __attribute__((no_sanitize("thread"))) inline

// One object per block for each declaration. The blocks of a cluster are alive together.
#define TOKFUSE_SHARED(name, ...)                 \
  static char name##_tag;                         \
  __VA_ARGS__& name = *static_cast<__VA_ARGS__*>( \
      tokfuse::host::shared_object(&name##_tag, sizeof(__VA_ARGS__), alignof(__VA_ARGS__), #name))
#define TOKFUSE_DYNAMIC_SHARED(name) \
  unsigned char* const name = static_cast<unsigned char*>(tokfuse::host::dynamic_shared())

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ----------------------------------------------------------------------------------- the machine

namespace tokfuse {
namespace host {

struct Place {
  uint3 thread, block;
  dim3 block_size, grid_size;
};

enum class Vote { kNone, kAnd, kOr, kCount };

const Place& here();
int lane_here();
void* shared_object(const void* tag, size_t bytes, size_t alignment, const char* name);
void* dynamic_shared();
int block_meet(Vote vote, int predicate);
void warp_meet(unsigned mask);
// The value of another lane, and the ballot of the participating lanes.
uint64_t warp_read(unsigned mask, uint64_t value, int lane, const char* name);
unsigned warp_ballot(unsigned mask, bool predicate);
void fence();
void atomic_access(void* at, size_t bytes);
void copy_async(void* to, const void* from, size_t bytes, size_t zeros);
void copy_async_commit();
void copy_async_wait(size_t groups_left);
[[noreturn]] void fail(const char* what);

}  // namespace host
}  // namespace tokfuse

#define threadIdx (tokfuse::host::here().thread)
#define blockIdx (tokfuse::host::here().block)
#define blockDim (tokfuse::host::here().block_size)
#define gridDim (tokfuse::host::here().grid_size)

// -------------------------------------------------------------------------------------- intrinsics

inline void __syncthreads() { tokfuse::host::block_meet(tokfuse::host::Vote::kNone, 0); }
inline int __syncthreads_and(int p) {
  return tokfuse::host::block_meet(tokfuse::host::Vote::kAnd, p);
}
inline int __syncthreads_or(int p) {
  return tokfuse::host::block_meet(tokfuse::host::Vote::kOr, p);
}
inline int __syncthreads_count(int p) {
  return tokfuse::host::block_meet(tokfuse::host::Vote::kCount, p);
}
inline void __syncwarp(unsigned mask = 0xffffffffu) { tokfuse::host::warp_meet(mask); }
inline void __threadfence() { tokfuse::host::fence(); }
inline void __threadfence_block() { tokfuse::host::fence(); }

namespace tokfuse {
namespace host {

template <class T>
TOKFUSE_HOST_RAW T shuffle(unsigned mask, T value, int lane, const char* name) {
  static_assert(sizeof(T) <= 8, "a shuffle moves at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = warp_read(mask, bits, lane, name);
  memcpy(&value, &bits, sizeof(T));
  return value;
}

}  // namespace host
}  // namespace tokfuse

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32) {
  const int base = tokfuse::host::lane_here() & ~(width - 1);
  return tokfuse::host::shuffle(mask, value, base | (lane & (width - 1)), "__shfl_sync");
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32) {
  const int lane = tokfuse::host::lane_here(), other = lane ^ bits;
  const bool inside = other < (lane & ~(width - 1)) + width;
  return tokfuse::host::shuffle(mask, value, inside ? other : lane, "__shfl_xor_sync");
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = tokfuse::host::lane_here(), other = lane + static_cast<int>(by);
  const bool inside = other <= (lane | (width - 1));
  return tokfuse::host::shuffle(mask, value, inside ? other : lane, "__shfl_down_sync");
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32) {
  const int lane = tokfuse::host::lane_here(), other = lane - static_cast<int>(by);
  const bool inside = other >= (lane & ~(width - 1));
  return tokfuse::host::shuffle(mask, value, inside ? other : lane, "__shfl_up_sync");
}

inline unsigned __ballot_sync(unsigned mask, int p) {
  return tokfuse::host::warp_ballot(mask, p != 0);
}
inline int __any_sync(unsigned mask, int p) { return __ballot_sync(mask, p) != 0; }
inline int __all_sync(unsigned mask, int p) { return __ballot_sync(mask, !p) == 0; }
inline unsigned __activemask() { return 0xffffffffu; }

inline float __expf(float x) { return exp2f(x * 1.4426950408889634f); }
inline float __logf(float x) { return log2f(x) * 0.6931471805599453f; }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t by) {
  return static_cast<uint32_t>((static_cast<uint64_t>(high) << 32 | low) >> (by & 31u));
}
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }

template <class T>
TOKFUSE_HOST_RAW T __ldg(const T* p) {
  return *p;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}

template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}

// Atomics. All fibers run in one OS thread, so plain operations are atomic. A float sum adds its
// terms in the order of the threads.
#define TOKFUSE_HOST_ATOMIC(name, next)                     \
  template <class T>                                        \
  TOKFUSE_HOST_RAW T name(T* at, std::common_type_t<T> v) { \
    tokfuse::host::atomic_access(at, sizeof(T));            \
    const T old = *at;                                      \
    *at = (next);                                           \
    return old;                                             \
  }
TOKFUSE_HOST_ATOMIC(atomicAdd, old + v)
TOKFUSE_HOST_ATOMIC(atomicMax, old < v ? v : old)
TOKFUSE_HOST_ATOMIC(atomicMin, v < old ? v : old)
TOKFUSE_HOST_ATOMIC(atomicExch, v)
TOKFUSE_HOST_ATOMIC(atomicOr, old | v)
TOKFUSE_HOST_ATOMIC(atomicInc, old >= v ? T(0) : old + 1)
#undef TOKFUSE_HOST_ATOMIC

template <class T>
TOKFUSE_HOST_RAW T atomicCAS(T* at, T expected, T value) {
  tokfuse::host::atomic_access(at, sizeof(T));
  const T old = *at;
  if (old == expected) *at = value;
  return old;
}

// cp.async: a copy completes at the wait, the latest time that the hardware allows, so that a
// missing wait gives wrong results.
inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  tokfuse::host::copy_async(to, from, bytes, zeros);
}
inline void __pipeline_commit() { tokfuse::host::copy_async_commit(); }
inline void __pipeline_wait_prior(size_t groups) { tokfuse::host::copy_async_wait(groups); }

// ----------------------------------------------------------------------------------- the runtime

typedef struct CUstream_st* cudaStream_t;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorCooperativeLaunchTooLarge = 720,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2 };

// Returns memory that is filled with NaN, between guards that the checker watches.
cudaError_t cudaMalloc(void** at, size_t bytes);
cudaError_t cudaFree(void* at);

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "cudaSuccess";
    case cudaErrorInvalidValue:
      return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation:
      return "cudaErrorMemoryAllocation";
    case cudaErrorInvalidConfiguration:
      return "cudaErrorInvalidConfiguration";
    case cudaErrorInvalidDevice:
      return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice:
      return "cudaErrorNoKernelImageForDevice";
    case cudaErrorCooperativeLaunchTooLarge:
      return "cudaErrorCooperativeLaunchTooLarge";
  }
  return "unknown";
}
inline const char* cudaGetErrorString(cudaError_t error) { return cudaGetErrorName(error); }
// The error of the last failed launch. Reading it clears it.
cudaError_t cudaGetLastError();

inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                   cudaStream_t) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  memcpy(to, from, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  memset(to, value, bytes);
  return cudaSuccess;
}
inline cudaError_t cudaMemset2DAsync(void* to, size_t pitch, int value, size_t width, size_t height,
                                     cudaStream_t) {
  for (size_t i = 0; i < height; i++) memset(static_cast<char*>(to) + i * pitch, value, width);
  return cudaSuccess;
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }

// There is one device. Launchers remember what they asked it, so it gets another number when the
// settings describe another device. Device 0 is always the present one.
cudaError_t cudaGetDevice(int* device);
cudaError_t cudaSetDevice(int device);

enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount = 16,
  cudaDevAttrL2CacheSize = 38,
  cudaDevAttrMaxSharedMemoryPerBlockOptin = 97,
};
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device);

struct cudaFuncAttributes {
  size_t sharedSizeBytes;  // 0 before the first launch of the kernel
  int ptxVersion, binaryVersion;
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* kernel);
cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute attribute, int value);

enum cudaLaunchAttributeID {
  cudaLaunchAttributeCooperative = 2,
  cudaLaunchAttributeClusterDimension = 4,
};
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  union {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 grid, block;  // gridDim and blockDim
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace tokfuse {
namespace host {

cudaError_t run(const cudaLaunchConfig_t& config, const void* kernel, const char* name,
                const std::function<void()>& body);
// Number of blocks, or of clusters, that are resident at once.
cudaError_t resident(int* count, const void* kernel, size_t shared, unsigned cluster);

}  // namespace host
}  // namespace tokfuse

template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return tokfuse::host::run(*config, reinterpret_cast<const void*>(kernel), __PRETTY_FUNCTION__,
                            [&] { kernel(static_cast<Parameters>(arguments)...); });
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, Kernel* kernel, int,
                                                          size_t shared) {
  return tokfuse::host::resident(count, reinterpret_cast<const void*>(kernel), shared, 1);
}

template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel* kernel,
                                           const cudaLaunchConfig_t* config) {
  return tokfuse::host::resident(count, reinterpret_cast<const void*>(kernel),
                                 config->dynamicSmemBytes, config->attrs->val.clusterDim.x);
}
