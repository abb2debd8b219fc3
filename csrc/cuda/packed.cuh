// Helpers of the kernels over packed vectors: sums over a block in a fixed order, and detection of
// the last block.
//
// These kernels move 8 to 40 bytes per token, a logits kernel about 300,000. So float64 sums cost
// little. A result is rounded to float32 once, at the end.
#pragma once

#include "cuda/device.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kBlock = 256;  // threads of a block
constexpr int kBlockWarps = kBlock / kWarp;
constexpr double kInfinity = __builtin_huge_val();

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// Returns the record of the lane `by` positions higher. A record has 8-byte fields.
template <class T>
__device__ __forceinline__ T shuffle_down(const T& record, int by) {
  static_assert(sizeof(T) % 8 == 0, "a record of 8-byte fields");
  constexpr int kWords = sizeof(T) / 8;
  double words[kWords];
  memcpy(words, &record, sizeof(T));
  for (int i = 0; i < kWords; i++) words[i] = __shfl_down_sync(kAllLanes, words[i], by);
  T out;
  memcpy(&out, words, sizeof(T));
  return out;
}

// Adds the records of all lanes with T::add. The result is in lane 0.
template <class T>
__device__ __forceinline__ T warp_sum(T mine) {
  for (int by = kWarp / 2; by > 0; by /= 2) mine.add(shuffle_down(mine, by));
  return mine;
}

// Adds the records of the kBlock threads in a fixed order. The result is in every thread.
template <class T>
__device__ T block_sum(T mine) {
  using Parts = Array<T, kBlockWarps>;
  TOKFUSE_SHARED(parts, Parts);
  mine = warp_sum(mine);
  if (lane_id() == 0) parts[warp_id()] = mine;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < kBlockWarps; w++) all.add(parts[w]);
  __syncthreads();  // the next call overwrites `parts`
  return all;
}

// Adds `count` records in memory, in an order that depends on `count` only. The result is in every
// thread.
template <class T>
__device__ T block_sum_of(const T* records, int64_t count, T zero) {
  T mine = zero;
  for (int64_t i = threadIdx.x; i < count; i += kBlock) mine.add(records[i]);
  return block_sum(mine);
}

template <int kCount>
struct Sums {
  double at[kCount];

  __device__ void add(const Sums& other) {
    for (int i = 0; i < kCount; i++) at[i] += other.at[i];
  }
};

// True in every thread of the last of `blocks` blocks that calls this function. It sees the earlier
// writes of all other blocks. The launcher must have set *ticket to 0.
__device__ inline bool is_last_block(unsigned* ticket, unsigned blocks) {
  TOKFUSE_SHARED(last, int);
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) last = atomicAdd(ticket, 1u) == blocks - 1;
  __syncthreads();
  __threadfence();
  return last != 0;
}

__device__ __forceinline__ bool counts(const uint8_t* mask, int64_t i) {
  return mask == nullptr || mask[i] != 0;
}

// Calls run(begin, end) for each range of equal ids in the sorted ids. All lanes of a warp call it
// together. The warps of the grid divide the ranges among themselves.
template <class Run>
__device__ void for_each_stretch(const int64_t* sorted, int64_t rows, Run run) {
  const int64_t warps = static_cast<int64_t>(gridDim.x) * kBlockWarps;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * kBlockWarps + warp_id();
  for (int64_t base = first * kWarp; base < rows; base += warps * kWarp) {
    const int64_t i = base + lane_id();
    const bool begins = i < rows && (i == 0 || sorted[i] != sorted[i - 1]);
    unsigned heads = __ballot_sync(kAllLanes, begins);
    while (heads != 0) {
      const int64_t begin = base + __ffs(static_cast<int>(heads)) - 1;
      heads &= heads - 1;
      int64_t end = begin;
      unsigned same = kAllLanes;
      while (same == kAllLanes) {
        const int64_t j = end + lane_id();
        same = __ballot_sync(kAllLanes, j < rows && sorted[j] == sorted[begin]);
        end += __popc(same);
      }
      run(begin, end);
    }
  }
}

}  // namespace cuda
}  // namespace tokfuse
