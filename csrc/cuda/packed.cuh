// Shared by the kernels over packed vectors: sums of a block in one fixed order, and the last
// block.
//
// These kernels move 8 to 40 bytes per token where a logits kernel moves 300,000, so their sums are
// float64: a result is rounded once and does not depend on how the work was cut.
#pragma once

#include "cuda/device.cuh"

namespace tokfuse {
namespace cuda {

constexpr int kBlock = 256;  // threads of a block
constexpr int kBlockWarps = kBlock / kWarp;
constexpr double kInfinity = __builtin_huge_val();

__device__ __forceinline__ int lane_id() { return static_cast<int>(threadIdx.x) % kWarp; }
__device__ __forceinline__ int warp_id() { return static_cast<int>(threadIdx.x) / kWarp; }

// A record of 8-byte fields from the lane `by` above.
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

// The records of all lanes added up by T::add; the result is in lane 0.
template <class T>
__device__ __forceinline__ T warp_sum(T mine) {
  for (int by = kWarp / 2; by > 0; by /= 2) mine.add(shuffle_down(mine, by));
  return mine;
}

// The records of all threads of a block of kBlock, added up in one order; in every thread.
template <class T>
__device__ T block_sum(T mine) {
  using Parts = Array<T, kBlockWarps>;
  TOKFUSE_SHARED(parts, Parts);
  mine = warp_sum(mine);
  if (lane_id() == 0) parts[warp_id()] = mine;
  __syncthreads();
  T all = parts[0];
  for (int w = 1; w < kBlockWarps; w++) all.add(parts[w]);
  __syncthreads();  // before the next call writes
  return all;
}

// `count` records in memory, added up in an order that depends on `count` only; in every thread.
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

// True in every thread of the block that is the last of `blocks` to come here; it sees what the
// others wrote before. The launcher cleared *ticket.
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

// Warp-wide: calls run(begin, end) for each stretch of equal ids that begins in [0, rows) of the
// sorted ids; warps of the grid take stretches in turn.
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
