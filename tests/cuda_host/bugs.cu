// Kernels with seeded bugs. tests/backends/test_cuda_host.py requires that each bug is found, and
// that the kernels named ok_ are not reported.
#include <cstdio>

#include "cuda/runtime.h"

namespace tokfuse {
namespace cuda {
namespace {

constexpr int kThreads = 128;
using Floats = Array<float, kThreads>;

struct Data {
  const float* x;    // (1024), 0, 1, 2 ...
  float* y;          // (1024)
  unsigned* ticket;  // 0
  float* scratch;    // (kThreads), followed by memory that is not allocated
};

__device__ int me() { return static_cast<int>(threadIdx.x); }

// ------------------------------------------------------------------------------------------ races

__global__ void bad_missing_syncthreads(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  d.y[me()] = s[me() ^ 64];
}

__global__ void ok_syncthreads(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  __syncthreads();
  d.y[me()] = s[me() ^ 64];
}

__global__ void bad_missing_syncwarp(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  d.y[me()] = s[me() ^ 1];
}

__global__ void ok_syncwarp(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  __syncwarp();
  d.y[me()] = s[me() ^ 1];
}

__global__ void bad_syncwarp_across_warps(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  __syncwarp();
  d.y[me()] = s[me() ^ 32];
}

// A shuffle passes values. It does not make earlier writes to memory visible.
__global__ void bad_shuffle_as_barrier(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[me()];
  const float other = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  d.y[me()] = s[me() ^ 1] + other;
}

// The buffer is written for the next round while other threads still read it.
__global__ void bad_write_over_a_read(Data d) {
  TOKFUSE_SHARED(s, Floats);
  for (int round = 0; round < 2; round++) {
    s[me()] = d.x[me() + round];
    __syncthreads();
    d.y[me()] = s[(me() + 33) % kThreads];
  }
}

__global__ void bad_plain_add(Data d) { d.y[0] += d.x[threadIdx.x]; }

__global__ void ok_atomic_add(Data d) {
  if (me() == 0) d.y[1 + blockIdx.x] = 0.0f;
  atomicAdd(d.ticket, 1u);
}

// The last block sums the results of the others. The fence makes them visible.
__global__ void ok_last_block(Data d) {
  if (me() > 0) return;
  d.y[1 + blockIdx.x] = d.x[blockIdx.x];
  __threadfence();
  if (atomicInc(d.ticket, gridDim.x - 1) != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) sum += d.y[1 + b];
  d.y[0] = sum;
}

__global__ void bad_last_block_without_fence(Data d) {
  if (me() > 0) return;
  d.y[1 + blockIdx.x] = d.x[blockIdx.x];
  if (atomicInc(d.ticket, gridDim.x - 1) != gridDim.x - 1) return;
  float sum = 0.0f;
  for (unsigned b = 0; b < gridDim.x; b++) sum += d.y[1 + b];
  d.y[0] = sum;
}

__global__ void bad_blocks_share_a_place(Data d) { d.y[threadIdx.x] = d.x[blockIdx.x]; }

// --------------------------------------------------------------------------------------- clusters

__global__ void ok_cluster_exchange(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[blockIdx.x * kThreads + threadIdx.x];
  cluster_sync();
  d.y[blockIdx.x * kThreads + threadIdx.x] = cluster_load(&s[me()], cluster_rank() ^ 1);
  cluster_sync();
}

__global__ void bad_cluster_without_sync(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[blockIdx.x * kThreads + threadIdx.x];
  __syncthreads();
  d.y[blockIdx.x * kThreads + threadIdx.x] = cluster_load(&s[me()], cluster_rank() ^ 1);
  cluster_sync();
}

// A block ends before the other block has read its shared memory.
__global__ void bad_cluster_block_leaves(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s[me()] = d.x[blockIdx.x * kThreads + threadIdx.x];
  cluster_sync();
  if (cluster_rank() == 1) return;
  for (int i = 0; i < 2; i++) __syncthreads();
  d.y[blockIdx.x * kThreads + threadIdx.x] = cluster_load(&s[me()], 1);
}

// ------------------------------------------------------------------- bulk and asynchronous copies

template <bool kWait, bool kBarrier, int kRounds>
__device__ void rounds(const Data& d) {
  TOKFUSE_SHARED(full, Mbarrier);
  TOKFUSE_DYNAMIC_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  if (me() == 0) {
    mbarrier_init(&full, 1);
    mbarrier_init_fence();
  }
  __syncthreads();
  for (int round = 0; round < kRounds; round++) {
    if (me() == 0) {
      mbarrier_expect(&full, kThreads * 4);
      bulk_load(s, d.x + round * kThreads, kThreads * 4, &full, 0);
    }
    if (kWait) mbarrier_wait(&full, static_cast<unsigned>(round) & 1u);
    d.y[me()] = s[kThreads - 1 - me()];
    if (kBarrier) __syncthreads();
  }
  if (!kWait) mbarrier_wait(&full, 0);
}

__global__ void ok_bulk(Data d) { rounds<true, true, 2>(d); }
__global__ void bad_bulk_without_wait(Data d) { rounds<false, true, 1>(d); }
__global__ void bad_bulk_over_a_read(Data d) { rounds<true, false, 2>(d); }

template <int kExpected, int kBytes, int kShift>
__device__ void one_bulk_copy(const Data& d) {
  TOKFUSE_SHARED(full, Mbarrier);
  TOKFUSE_DYNAMIC_SHARED(s);
  if (me() == 0) {
    mbarrier_init(&full, 1);
    mbarrier_expect(&full, kExpected);
    bulk_load(s, d.x + kShift, kBytes, &full, 0);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);
  d.y[me()] = 1.0f;
}

__global__ void bad_bulk_awaits_too_much(Data d) { one_bulk_copy<512, 256, 0>(d); }
__global__ void bad_bulk_bytes(Data d) { one_bulk_copy<20, 20, 0>(d); }
__global__ void bad_bulk_address(Data d) { one_bulk_copy<32, 32, 1>(d); }
__global__ void bad_bulk_outside(Data d) { one_bulk_copy<512, 512, 1000>(d); }

__global__ void bad_async_copy_without_wait(Data d) {
  TOKFUSE_DYNAMIC_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  __pipeline_memcpy_async(s + me(), d.x + me(), 4);
  __pipeline_commit();
  __syncthreads();
  d.y[me()] = s[me()];
  __pipeline_wait_prior(0);
}

__global__ void ok_async_copy(Data d) {
  TOKFUSE_DYNAMIC_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  __pipeline_memcpy_async(s + me(), d.x + me(), 4);
  __pipeline_commit();
  __pipeline_wait_prior(0);
  __syncthreads();
  d.y[me()] = s[kThreads - 1 - me()];
}

// ------------------------------------------------------------------------------------------ bounds

__global__ void bad_read_behind(Data d) { d.y[me()] = d.x[me() + 1024 - kThreads + 1]; }
__global__ void bad_write_behind(Data d) { d.scratch[me() + 1] = 1.0f; }

__global__ void bad_shared_overrun(Data d) {
  TOKFUSE_SHARED(s, Floats);
  s.at[me() + 1] = d.x[me()];
  __syncthreads();
  d.y[me()] = s[me()];
}

__global__ void bad_dynamic_shared_overrun(Data d) {
  TOKFUSE_DYNAMIC_SHARED(raw);
  float* s = reinterpret_cast<float*>(raw);
  s[me() + 1] = d.x[me()];
  __syncthreads();
  d.y[me()] = s[me()];
}

__global__ void bad_uninitialised_shared(Data d) {
  TOKFUSE_SHARED(s, Floats);
  if (me() < kThreads - 1) s[me()] = d.x[me()];
  __syncthreads();
  d.y[me()] = s[me()];
}

__global__ void bad_misaligned_vector(Data d) {
  d.y[me()] = float_of(load16(d.x + 1 + 4 * (me() % 8)).word[0]);
}

// ---------------------------------------------------------------------------------------- meetings

__global__ void bad_divergent_barrier(Data d) {
  if (me() < 64) __syncthreads();
  d.y[me()] = __shfl_xor_sync(kAllLanes, me() % 2 == 0 ? 1.0f : 2.0f, 1);
  if (me() >= 96) __syncthreads();
}

__global__ void bad_missing_lanes(Data d) {
  if (me() % 2 == 0) d.y[me()] = __shfl_xor_sync(kAllLanes, 1.0f, 1);
  if (me() % 2 == 1) __syncthreads();
}

__global__ void bad_lane_outside_its_mask(Data d) {
  d.y[me()] = __shfl_xor_sync(0x0000ffffu, 1.0f, 1);
}

__global__ void bad_absent_lane(Data d) {
  if (me() % 32 >= 16) return;
  d.y[me()] = __shfl_sync(0x0000ffffu, 1.0f, 20);
}

// --------------------------------------------------------------------------- results, performance

// The sum of floats depends on the order of the threads.
__global__ void bad_order_of_threads(Data d) {
  if (me() == 0) d.y[0] = 0.0f;
  __syncthreads();
  atomicAdd(&d.y[0], 1.0f / static_cast<float>(3 + me() * me()));
}

__global__ void slow_stride(Data d) { d.y[me()] = d.x[me() * 8]; }
__global__ void fast_stride(Data d) { d.y[me()] = d.x[me()]; }

using Square = Array<float, 1024>;
__global__ void slow_banks(Data d) {
  TOKFUSE_SHARED(s, Square);
  for (int i = me(); i < 1024; i += kThreads) s[i] = d.x[i];
  __syncthreads();
  d.y[me()] = s[me() % 32 * 32];
}

// -------------------------------------------------------------------------------------------- main

struct Bug {
  const char* name;
  void (*kernel)(Data);
  unsigned blocks, cluster;
};

#define BUG(kernel) {#kernel, kernel, 1, 1}
#define BUG_OF(kernel, blocks, cluster) {#kernel, kernel, blocks, cluster}

const Bug kBugs[] = {
    BUG(bad_missing_syncthreads),
    BUG(ok_syncthreads),
    BUG(bad_missing_syncwarp),
    BUG(ok_syncwarp),
    BUG(bad_syncwarp_across_warps),
    BUG(bad_shuffle_as_barrier),
    BUG(bad_write_over_a_read),
    BUG(bad_plain_add),
    BUG_OF(ok_atomic_add, 4, 1),
    BUG_OF(ok_last_block, 4, 1),
    BUG_OF(bad_last_block_without_fence, 4, 1),
    BUG_OF(bad_blocks_share_a_place, 2, 1),
    BUG_OF(ok_cluster_exchange, 4, 2),
    BUG_OF(bad_cluster_without_sync, 4, 2),
    BUG_OF(bad_cluster_block_leaves, 2, 2),
    BUG(ok_bulk),
    BUG(bad_bulk_without_wait),
    BUG(bad_bulk_over_a_read),
    BUG(bad_bulk_awaits_too_much),
    BUG(bad_bulk_bytes),
    BUG(bad_bulk_address),
    BUG(bad_bulk_outside),
    BUG(bad_async_copy_without_wait),
    BUG(ok_async_copy),
    BUG(bad_read_behind),
    BUG(bad_write_behind),
    BUG(bad_shared_overrun),
    BUG(bad_dynamic_shared_overrun),
    BUG(bad_uninitialised_shared),
    BUG(bad_misaligned_vector),
    BUG(bad_divergent_barrier),
    BUG(bad_missing_lanes),
    BUG(bad_lane_outside_its_mask),
    BUG(bad_absent_lane),
    BUG(bad_order_of_threads),
    BUG(slow_stride),
    BUG(fast_stride),
    BUG(slow_banks),
    {"bad_launch_of_a_cluster", ok_cluster_exchange, 3, 2},
};

// 47 KiB of dynamic shared memory are allowed. Together with 2 KiB of static shared memory they are
// not, unless the launcher has asked for them, as `launch` does.
__global__ void half_static(Data d) {
  TOKFUSE_SHARED(s, Array<float, 512>);
  s[threadIdx.x] = d.x[threadIdx.x];
  d.y[threadIdx.x] = s[threadIdx.x];
}

int limits(const char* name) {
  const auto kernel = reinterpret_cast<const void*>(half_static);
  if (strcmp(name, "bad_shared_without_asking") == 0) {
    float x[kThreads] = {}, y[kThreads];
    const cudaLaunchConfig_t config = {dim3(1), dim3(kThreads), 47 * 1024, nullptr, nullptr, 0};
    return cudaLaunchKernelEx(&config, half_static, Data{x, y, nullptr, nullptr});
  }
  if (strcmp(name, "bad_shared_lowered") == 0) {
    for (int bytes : {100 * 1024, 60 * 1024}) {
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    }
  }
  return 2;
}

int run(const Bug& bug) {
  Data d;
  void *x, *y, *ticket, *scratch;
  cudaMalloc(&x, 4096);
  cudaMalloc(&y, 4096);
  cudaMalloc(&ticket, 4);
  cudaMalloc(&scratch, kThreads * 4);
  for (int i = 0; i < 1024; i++) static_cast<float*>(x)[i] = static_cast<float>(i);
  cudaMemsetAsync(y, 0, 4096, nullptr);
  cudaMemsetAsync(ticket, 0, 4, nullptr);
  d = {static_cast<float*>(x), static_cast<float*>(y), static_cast<unsigned*>(ticket),
       static_cast<float*>(scratch)};
  const LaunchShape shape = {bug.blocks, kThreads, kThreads * 4, bug.cluster};
  const cudaError_t error = launch(bug.kernel, shape, nullptr, d);
  printf("%s %s", bug.name, cudaGetErrorName(error));
  for (int i : {0, 1, kThreads - 1}) printf(" %.9g", static_cast<double>(d.y[i]));
  printf("\n");
  for (void* p : {x, y, ticket, scratch}) cudaFree(p);
  return error == cudaSuccess ? 0 : 1;
}

}  // namespace
}  // namespace cuda
}  // namespace tokfuse

int main(int count, char** names) {
  for (const auto& bug : tokfuse::cuda::kBugs) {
    if (count == 2 && strcmp(bug.name, names[1]) == 0) return tokfuse::cuda::run(bug);
  }
  return count == 2 ? tokfuse::cuda::limits(names[1]) : 2;
}
