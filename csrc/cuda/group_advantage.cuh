// group_advantage: (reward - baseline) / scale per group of rows with the same id. It moves 24
// bytes per row: reward 4, sorted id 8, its row 8, advantage 4.
//
// A warp computes one group, a range of equal ids in the sorted ids. Statistics are float64. A
// group of equal rewards gives exactly 0. It is detected by comparison, because the rounding error
// of the mean divided by eps = 1e-6 can reach 0.1. An order statistic is found by counting smaller
// rewards. This takes n^2 / 32 steps for a group of n rows, which is fast because groups are small.
#pragma once

#include "common/group_rules.h"
#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

// The rows of one group, processed by one warp.
struct GroupRows {
  const float* reward;
  const int64_t* order;  // (n) row numbers
  int64_t n;

  __device__ double at(int64_t i) const { return reward[order[i]]; }
};

__device__ inline double warp_total(double mine) {
  return __shfl_sync(kAllLanes, warp_sum(Sums<1>{{mine}}).at[0], 0);
}

// Returns the reward at position `rank` in ascending order. No reward may be NaN.
__device__ inline double nth_smallest(const GroupRows& g, int64_t rank) {
  for (int64_t base = 0; base < g.n; base += kWarp) {
    const int64_t i = base + lane_id();
    const double x = i < g.n ? g.at(i) : 0;
    int64_t less = 0, equal = 0;
    for (int64_t j = 0; j < g.n; j++) {
      const double other = g.at(j);
      less += other < x;
      equal += other == x;
    }
    const unsigned hit = __ballot_sync(kAllLanes, i < g.n && less <= rank && rank < less + equal);
    if (hit != 0) return __shfl_sync(kAllLanes, x, __ffs(static_cast<int>(hit)) - 1);
  }
  return 0;  // not reached
}

__device__ inline double squared_deviations(const GroupRows& g, double mean) {
  double sum = 0;
  for (int64_t i = lane_id(); i < g.n; i += kWarp) sum += (g.at(i) - mean) * (g.at(i) - mean);
  return warp_total(sum);
}

__device__ inline double length_weighted_mean(const GroupAdvantageArgs& a, const GroupRows& g,
                                              double mean) {
  double weight = 0, sum = 0;
  for (int64_t i = lane_id(); i < g.n; i += kWarp) {
    const double length = static_cast<double>(a.lengths[g.order[i]]);
    weight += length;
    sum += length * g.at(i);
  }
  weight = warp_total(weight);
  sum = warp_total(sum);
  return weight == 0 ? mean : sum / weight;
}

__device__ inline void fill(const GroupAdvantageArgs& a, const GroupRows& g, float value) {
  for (int64_t i = lane_id(); i < g.n; i += kWarp) a.advantage[g.order[i]] = value;
}

// Writes the advantages of a group of two rows or more.
__device__ inline void group_out(const GroupAdvantageArgs& a, const GroupRows& g,
                                 double batch_std) {
  int unequal = 0, nan = 0;
  double sum = 0;
  for (int64_t i = lane_id(); i < g.n; i += kWarp) {
    const double x = g.at(i);
    unequal |= x != g.at(0);
    nan |= x != x;
    sum += x;
  }
  if (!__any_sync(kAllLanes, unequal)) return fill(a, g, 0.0f);
  const bool ranked = a.baseline == Baseline::kMedian || a.baseline == Baseline::kSecondBest;
  if (ranked && __any_sync(kAllLanes, nan)) return fill(a, g, nanf(""));
  const double size = static_cast<double>(g.n), mean = warp_total(sum) / size;
  double group_std = 0, centre = mean, best = 0;
  if (a.scale == Scale::kStd) group_std = sqrt(squared_deviations(g, mean) / (size - a.ddof));
  double factor = 1 / group_divisor(a, group_std, batch_std, mean);
  if (a.baseline == Baseline::kLeaveOneOut) factor *= size / (size - 1);
  if (a.baseline == Baseline::kLengthWeighted) centre = length_weighted_mean(a, g, mean);
  if (a.baseline == Baseline::kMedian) {
    const double low = nth_smallest(g, (g.n - 1) / 2);
    centre = low + 0.5 * (nth_smallest(g, g.n / 2) - low);
  } else if (a.baseline == Baseline::kSecondBest) {
    centre = nth_smallest(g, g.n - 2);
    best = nth_smallest(g, g.n - 1);
  }
  for (int64_t i = lane_id(); i < g.n; i += kWarp) {
    const double r = g.at(i);
    const bool zero = a.baseline == Baseline::kSecondBest && r != best;
    a.advantage[g.order[i]] = zero ? 0.0f : static_cast<float>((r - centre) * factor);
  }
}

// Standard deviation of all rewards of the batch: 1 for a single row, exactly 0 if all are equal.
// Every block computes it again, because a batch has few rewards.
__device__ inline double std_of_batch(const GroupAdvantageArgs& a) {
  if (a.seqs == 1) return 1;
  Sums<2> sums = {};  // sum of the rewards, number of rewards that differ from the first
  for (int64_t i = threadIdx.x; i < a.seqs; i += kBlock) {
    sums.add({{a.reward[i], a.reward[i] == a.reward[0] ? 0.0 : 1.0}});
  }
  sums = block_sum(sums);
  if (sums.at[1] == 0) return 0;
  const double n = static_cast<double>(a.seqs), mean = sums.at[0] / n;
  Sums<1> square = {};
  for (int64_t i = threadIdx.x; i < a.seqs; i += kBlock) {
    square.add({{(a.reward[i] - mean) * (a.reward[i] - mean)}});
  }
  return sqrt(block_sum(square).at[0] / (n - a.ddof));
}

__global__ void __launch_bounds__(kBlock, 2)
    group_advantage_kernel(const GroupAdvantageArgs a, const SortedIds groups) {
  const double batch_std = a.scale == Scale::kBatchStd ? std_of_batch(a) : 0;
  if (groups.ids == nullptr) {
    const double scale = a.scale == Scale::kBatchStd ? 1 / (batch_std + a.eps) : 1;
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t i = blockIdx.x * int64_t{kBlock} + threadIdx.x; i < a.seqs; i += threads) {
      const double base = a.greedy_reward == nullptr ? 0.0 : a.greedy_reward[i];
      a.advantage[i] = static_cast<float>((a.reward[i] - base) * scale);
    }
    return;
  }
  for_each_stretch(groups.ids, a.seqs, [&](int64_t begin, int64_t end) {
    const GroupRows g = {a.reward, groups.order + begin, end - begin};
    if (g.n == 1) {
      fill(a, g, static_cast<float>(singleton_advantage(a, g.at(0), batch_std)));
    } else {
      group_out(a, g, batch_std);
    }
  });
}

}  // namespace cuda
}  // namespace tokfuse
