// Architecture-specific instructions are confined to this header: inline assembly, clusters, bulk
// copies, cache hints and packed arithmetic. runtime.h has the launch functions.
//
// Kernels include this header and no CUDA header. With TOKFUSE_CUDA_HOST a C++ compiler compiles
// the same kernels for the CPU. Then tests/cuda_host/device_host.h replaces every function below,
// and tests/cuda_host/cuda_host.h defines the keywords, built-in variables, barriers, shuffles and
// atomics. Rules that kernels follow so that both compile:
//   * declare shared memory with TOKFUSE_SHARED or TOKFUSE_DYNAMIC_SHARED;
//   * launch with `launch(kernel, shape, stream, arguments...)`;
//   * guard code for some architectures with TOKFUSE_ARCH: 80, 90, 100, 103, 120, ...; 0 in host
//     code. A kernel has a body for every architecture: without one it would return garbage.
//     trap() is the body for those that no launcher chooses.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/cuda_host.h"
#else
#include <cuda_runtime.h>
#if defined(__CUDA_ARCH__)
#define TOKFUSE_ARCH (__CUDA_ARCH__ / 10)
#else
#define TOKFUSE_ARCH 0
#endif
// Declare a shared variable by name and type. The type of an array is Array<T, N>.
#define TOKFUSE_SHARED(name, ...) __shared__ __VA_ARGS__ name
#define TOKFUSE_DYNAMIC_SHARED(name) extern __shared__ __align__(1024) unsigned char name[]
#endif

namespace tokfuse {
namespace cuda {

constexpr float kLog2E = 1.44269504088896340736f;
constexpr float kLn2 = 0.693147180559945309417f;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr int kWarp = 32;

struct alignas(16) Vec16 {
  uint32_t word[4];
};

// Two float32. sm_100 has add, multiply and fma instructions for both at once.
struct alignas(8) Pair {
  float x, y;
};

// An array type for TOKFUSE_SHARED.
template <class T, int N>
struct Array {
  T at[N];
  __host__ __device__ __forceinline__ T& operator[](int i) { return at[i]; }
};

// Eviction priority of cache lines in L2. kLast (evict last): the data will be read again. kFirst
// (evict first): it will not.
enum class Keep { kLast, kFirst };

#if !defined(TOKFUSE_CUDA_HOST)

// ---------------------------------------------------------------------------------- memory access

// Returns a cache policy for load16 and store16. Create it once per thread.
template <Keep kKeep>
__device__ __forceinline__ uint64_t l2_policy() {
  uint64_t policy;
  if (kKeep == Keep::kLast) {
    asm("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(policy));
  } else {
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  }
  return policy;
}

// Loads 16 bytes from global memory at a multiple of 16. It is volatile because the same address
// may be written later.
__device__ __forceinline__ Vec16 load16(const void* from) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from)
               : "memory");
  return v;
}

__device__ __forceinline__ Vec16 load16(const void* from, uint64_t policy) {
  Vec16 v;
  asm volatile("ld.global.L1::no_allocate.L2::cache_hint.v4.u32 {%0, %1, %2, %3}, [%4], %5;"
               : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
               : "l"(from), "l"(policy)
               : "memory");
  return v;
}

__device__ __forceinline__ void store16(void* to, const Vec16& v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(v.word[0]), "r"(v.word[1]),
               "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

__device__ __forceinline__ void store16(void* to, const Vec16& v, uint64_t policy) {
  asm volatile("st.global.L2::cache_hint.v4.u32 [%0], {%1, %2, %3, %4}, %5;" ::"l"(to),
               "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]), "l"(policy)
               : "memory");
}

// Loads 16 bytes from shared memory at a multiple of 16.
__device__ __forceinline__ Vec16 shared_load16(const void* from) {
  return *static_cast<const Vec16*>(from);
}

__device__ __forceinline__ void shared_store16(void* to, const Vec16& v) {
  *static_cast<Vec16*>(to) = v;
}

// Loads 4 bytes at a multiple of 4. It uses L1, because the next loads of neighbours hit the line.
__device__ __forceinline__ uint32_t load4(const void* from) {
  return *static_cast<const uint32_t*>(from);
}

// ------------------------------------------------------------------------------------- arithmetic

__device__ __forceinline__ float float_of(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ uint32_t bits_of(float value) { return __float_as_uint(value); }

// 2^x within 2 ulp. Subnormal results are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2 x, absolute error 2^-22 + 2^-22 of the value; log2(1) is exactly 0.
__device__ __forceinline__ float log2_fast(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// 1 / x within 1 ulp. x and the result must not be subnormal.
__device__ __forceinline__ float reciprocal_fast(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The maximum and the minimum, or NaN if either argument is NaN; fmaxf ignores NaN.
__device__ __forceinline__ float max_nan(float a, float b) {
  float y;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ float min_nan(float a, float b) {
  float y;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(y) : "f"(a), "f"(b));
  return y;
}

__device__ __forceinline__ Pair add2(Pair a, Pair b) {
#if TOKFUSE_ARCH >= 100
  Pair y;
  asm("{.reg .b64 a, b, y; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; add.rn.f32x2 y, a, b;"
      " mov.b64 {%0, %1}, y;}"
      : "=f"(y.x), "=f"(y.y)
      : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
  return y;
#else
  return {a.x + b.x, a.y + b.y};
#endif
}

__device__ __forceinline__ Pair mul2(Pair a, Pair b) {
#if TOKFUSE_ARCH >= 100
  Pair y;
  asm("{.reg .b64 a, b, y; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mul.rn.f32x2 y, a, b;"
      " mov.b64 {%0, %1}, y;}"
      : "=f"(y.x), "=f"(y.y)
      : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y));
  return y;
#else
  return {a.x * b.x, a.y * b.y};
#endif
}

__device__ __forceinline__ Pair fma2(Pair a, Pair b, Pair c) {
#if TOKFUSE_ARCH >= 100
  Pair y;
  asm("{.reg .b64 a, b, c, y; mov.b64 a, {%2, %3}; mov.b64 b, {%4, %5}; mov.b64 c, {%6, %7};"
      " fma.rn.f32x2 y, a, b, c; mov.b64 {%0, %1}, y;}"
      : "=f"(y.x), "=f"(y.y)
      : "f"(a.x), "f"(a.y), "f"(b.x), "f"(b.y), "f"(c.x), "f"(c.y));
  return y;
#else
  return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)};
#endif
}

// ----------------------------------------------------------------------------- 16-bit conversions

// Conversions between a word of two 16-bit floats (low half first) and a Pair. pack rounds to
// nearest even.
__device__ __forceinline__ Pair unpack(BFloat16, uint32_t word) {
  return {float_of(word << 16), float_of(word & 0xffff0000u)};
}

__device__ __forceinline__ Pair unpack(Float16, uint32_t word) {
  Pair y;
  asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; cvt.f32.f16 %0, l; cvt.f32.f16 %1, h;}"
      : "=f"(y.x), "=f"(y.y)
      : "r"(word));
  return y;
}

__device__ __forceinline__ uint32_t pack(BFloat16, Pair v) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v.y), "f"(v.x));
  return word;
}

__device__ __forceinline__ uint32_t pack(Float16, Pair v) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(v.y), "f"(v.x));
  return word;
}

// The maximum of each half. A NaN is ignored.
__device__ __forceinline__ uint32_t max2(BFloat16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.bf16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

__device__ __forceinline__ uint32_t max2(Float16, uint32_t a, uint32_t b) {
  uint32_t y;
  asm("max.f16x2 %0, %1, %2;" : "=r"(y) : "r"(a), "r"(b));
  return y;
}

// Ends the kernel with an error that the next CUDA call returns.
__device__ __forceinline__ void trap() { __trap(); }

// ------------------------------------------------------------- clusters, barriers and bulk copies

// An mbarrier in shared memory. A phase completes when all expected arrivals and bytes have been
// counted.
struct Mbarrier {
  uint64_t word;
};

__device__ __forceinline__ unsigned shared_address(const void* p) {
  return static_cast<unsigned>(__cvta_generic_to_shared(p));
}

#if TOKFUSE_ARCH >= 90

__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ unsigned cluster_blocks() {
  unsigned blocks;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
  return blocks;
}

// Synchronises all threads of the cluster. Earlier writes are visible to all of them afterwards.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::
                   : "memory");
}

// Loads a float from the shared memory of block `rank` of the cluster, at the offset that `mine`
// has in this block.
__device__ __forceinline__ float cluster_load(const float* mine, unsigned rank) {
  float value;
  asm volatile(
      "{.reg .u32 there; mapa.shared::cluster.u32 there, %1, %2;"
      " ld.shared::cluster.f32 %0, [there];}"
      : "=f"(value)
      : "r"(shared_address(mine)), "r"(rank)
      : "memory");
  return value;
}

__device__ __forceinline__ void mbarrier_init(Mbarrier* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}

// Makes mbarrier_init visible to the cluster and to bulk copies, which use the asynchronous proxy.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;\n\tfence.proxy.async.shared::cta;" ::
                   : "memory");
}

// Arrives once and adds `bytes` to the bulk-copied bytes that the phase expects.
__device__ __forceinline__ void mbarrier_expect(Mbarrier* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}

// Waits until the phase of this parity has completed.
__device__ __forceinline__ void mbarrier_wait(Mbarrier* barrier, unsigned parity) {
  asm volatile(
      "{\n\t.reg .pred done;\n\tWAIT:\n\t"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n\t"
      "@!done bra WAIT;\n\t}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// Starts a copy of `bytes` to this block's shared memory; `barrier` counts them. Addresses and size
// must be multiples of 16.
__device__ __forceinline__ void bulk_load(void* to, const void* from, unsigned bytes,
                                          Mbarrier* barrier, uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint"
      " [%0], [%1], %2, [%3], %4;" ::"r"(shared_address(to)),
      "l"(from), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

#endif  // TOKFUSE_ARCH >= 90

#endif  // !TOKFUSE_CUDA_HOST

}  // namespace cuda
}  // namespace tokfuse

#if defined(TOKFUSE_CUDA_HOST)
#include "cuda_host/device_host.h"
#endif
