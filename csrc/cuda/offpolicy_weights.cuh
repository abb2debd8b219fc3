// offpolicy_weights: importance weights, kept rows and effective sample size in one launch. It
// reads 8 and writes 5 bytes per row; a mask adds 1 byte read. If the weight or a keep rule needs a
// statistic of the whole sequence, the sequence is read a second time, from the cache.
// Self-normalisation reads and writes the weights once more, in L2.
//
// A block computes a span (a sequence, or a block of rows) and stores the sums over its units.
// After a grid-wide barrier the sums are added in the order of the spans, or in the order of the
// rows of each group.
#pragma once

#include "common/offpolicy_rules.h"
#include "cuda/grid.cuh"
#include "cuda/packed.cuh"
#include "cuda/packed_kernels.h"

namespace tokfuse {
namespace cuda {

using Units = Sums<3>;  // number of units, sum and sum of squares of their weights

__device__ __forceinline__ void store_units(const OffPolicyArgs& a, int64_t seq,
                                            const Units& units) {
  reinterpret_cast<Units*>(a.partial)[seq] = units;
}

__device__ __forceinline__ Units units_of(const OffPolicyArgs& a, int64_t seq) {
  return reinterpret_cast<const Units*>(a.partial)[seq];
}

struct SharedSums {
  Shared of;

  __device__ void add(const SharedSums& other) {
    of.count += other.of.count;
    of.sum += other.of.sum;
    of.square += other.of.square;
    of.k3 += other.of.k3;
    of.low = other.of.low < of.low ? other.of.low : of.low;
    of.high = other.of.high > of.high ? other.of.high : of.high;
  }
};

// Results for a whole sequence: the outcome of each sequence rule; at sequence levels its weight.
struct Verdict {
  unsigned passes;  // one bit per rule
  bool kept;        // result of the mode "mask" at a sequence level
  float weight;
};

__device__ inline float log_ratio_at(const OffPolicyArgs& a, int64_t t) {
  constexpr float kLimit = static_cast<float>(kClamp);
  float d = (a.logp != nullptr ? a.logp[t] : 0.0f) - a.behavior_logp[t];
  d = d < -kLimit ? -kLimit : d;
  return d > kLimit ? kLimit : d;
}

__device__ inline Shared shared_of(const OffPolicyArgs& a, const Span& span, const Needs& needs) {
  SharedSums mine = {{0, 0, 0, 0, kInfinity, -kInfinity}};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kBlock) {
    if (!counts(a.mask, t)) continue;
    const double d = log_ratio_at(a, t);
    mine.add({{1, d, d * d, needs.k3 ? k3_of(d) : 0, d, d}});
  }
  Shared all = block_sum(mine).of;
  if (all.sum != all.sum) all.low = all.high = all.sum;
  return all;
}

__device__ inline float weight_of(const OffPolicyArgs& a, float w, float d) {
  const float low = static_cast<float>(a.low), high = static_cast<float>(a.high);
  const float p = static_cast<float>(a.param);
  switch (a.mode) {
    case WeightMode::kTruncate:
      w = w < low ? low : w;
      return w > high ? high : w;
    case WeightMode::kSwitch:
      return w > high ? 0.0f : w;
    case WeightMode::kShrink:
      // p w / (w^2 + p), divided by w so that no square is computed. w is at least e^-20.
      return p / (w + p / w);
    case WeightMode::kSubgaussian:
      return w / (1.0f - p + p * w);
    case WeightMode::kTempered:
      return expf(p * d);
    case WeightMode::kKeep:
      return 1.0f;
    case WeightMode::kIps:
    case WeightMode::kMask:
      break;
  }
  return w;
}

__device__ inline bool per_sequence(const OffPolicyArgs& a) {
  return a.level == WeightLevel::kSequence || a.level == WeightLevel::kGeometric;
}

__device__ inline Verdict verdict_of(const OffPolicyArgs& a, const Span& span, const Needs& needs) {
  Verdict v = {};
  if (!needs.shared) return v;
  const Shared shared = shared_of(a, span, needs);
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    const bool passes =
        rule.over != Over::kToken && inside(shared_statistic(rule, shared), rule.low, rule.high);
    v.passes |= static_cast<unsigned>(passes) << r;
  }
  if (!per_sequence(a)) return v;
  double d = shared.sum;
  if (a.level == WeightLevel::kGeometric && shared.count > 0) d /= shared.count;
  d = clamped(d);
  const double ratio = exp(d);
  v.kept = inside(ratio, a.low, a.high);
  v.weight = weight_of(a, static_cast<float>(ratio), static_cast<float>(d));
  return v;
}

__device__ inline bool keeps(const OffPolicyArgs& a, int64_t t, const Verdict& v, float d,
                             float ratio) {
  if (!counts(a.mask, t)) return false;
  if (a.mode == WeightMode::kMask) {
    const float low = static_cast<float>(a.low), high = static_cast<float>(a.high);
    if (per_sequence(a) ? !v.kept : ratio < low || ratio > high) return false;
  }
  for (int r = 0; r < a.num_rules; r++) {
    const KeepRule& rule = a.rules[r];
    const bool passes = rule.over == Over::kToken
                            ? inside(row_statistic(rule.statistic, d, ratio), rule.low, rule.high)
                            : (v.passes >> r & 1u) != 0;
    if (!passes && !(rule.negative_only && a.advantage[t] >= 0.0f)) return false;
  }
  return true;
}

// Computes weights and kept rows of one span. Returns the sums over its units. A unit is a kept
// row; at sequence levels it is a sequence with a kept row.
__device__ inline Units weigh(const OffPolicyArgs& a, const Span& span, const Needs& needs) {
  const Verdict v = verdict_of(a, span, needs);
  const bool constant = per_sequence(a);
  Units mine = {};
  for (int64_t t = span.begin + threadIdx.x; t < span.end; t += kBlock) {
    const float d = log_ratio_at(a, t), ratio = expf(d);
    const bool kept = keeps(a, t, v, d, ratio);
    const float w = kept ? (constant ? v.weight : weight_of(a, ratio, d)) : 0.0f;
    a.weight[t] = w;
    a.kept[t] = kept;
    const Units unit = {{kept ? 1.0 : 0.0, w, static_cast<double>(w) * w}};
    mine.add(unit);
    if (a.block_tokens == 1) store_units(a, t, unit);
  }
  const Units all = block_sum(mine);
  if (!constant) return all;
  if (all.at[0] == 0) return {};
  return {{1, v.weight, static_cast<double>(v.weight) * v.weight}};
}

__device__ inline float scaled(const OffPolicyArgs& a, int64_t t, float factor) {
  return a.kept[t] ? a.weight[t] * factor : 0.0f;
}

// Weights are not negative. A mean of 0 means that all of them are 0.
__device__ __forceinline__ float factor_of(double mean) {
  return mean == 0 ? 0.0f : static_cast<float>(1 / mean);
}

// A warp divides the weights of one group by their mean. Returns the sums of the divided weights.
__device__ inline Sums<2> normalize_group(const OffPolicyArgs& a, const int64_t* order, int64_t n) {
  Units mine = {};
  for (int64_t i = lane_id(); i < n; i += kWarp) mine.add(units_of(a, order[i]));
  mine = warp_sum(mine);
  for (int k = 0; k < 3; k++) mine.at[k] = __shfl_sync(kAllLanes, mine.at[k], 0);
  const double mean = mine.at[0] > 0 ? mine.at[1] / mine.at[0] : 0;
  for (int64_t i = 0; i < n; i++) {
    const Span span = span_of(a, order[i]);
    for (int64_t t = span.begin + lane_id(); t < span.end; t += kWarp) {
      a.weight[t] = scaled(a, t, factor_of(mean));
    }
  }
  if (mean == 0) return {};
  return {{mine.at[1] / mean, mine.at[2] / mean / mean}};
}

__device__ inline void normalize_groups(const OffPolicyArgs& a, const SortedIds& groups,
                                        float* ess) {
  Sums<2>* after = reinterpret_cast<Sums<2>*>(a.partial + 3 * a.seqs);
  for_each_stretch(groups.ids, a.seqs, [&](int64_t begin, int64_t end) {
    const Sums<2> sums = normalize_group(a, groups.order + begin, end - begin);
    for (int64_t i = begin + lane_id(); i < end; i += kWarp)
      after[i] = i == begin ? sums : Sums<2>{};
  });
  grid_sync();
  if (blockIdx.x != 0) return;
  const Sums<2> all = block_sum_of(after, a.seqs, Sums<2>{});
  const double sum = all.at[0], square = all.at[1];
  if (threadIdx.x == 0) *ess = square == 0 ? 0.0f : static_cast<float>(sum * sum / square);
}

__global__ void __launch_bounds__(kBlock, 2)
    offpolicy_weights_kernel(const OffPolicyArgs a, const SortedIds groups, float* const ess) {
  const Needs needs = needs_of(a);
  if (a.block_tokens == 1) {  // every row is its own unit; a block takes kBlock rows
    for (int64_t begin = blockIdx.x * int64_t{kBlock}; begin < a.tokens;
         begin += static_cast<int64_t>(gridDim.x) * kBlock) {
      weigh(a, {begin, min(begin + kBlock, a.tokens)}, needs);
    }
  } else {
    for (int64_t seq = blockIdx.x; seq < a.seqs; seq += gridDim.x) {
      const Units units = weigh(a, span_of(a, seq), needs);
      if (threadIdx.x == 0) store_units(a, seq, units);
    }
  }
  grid_sync();
  if (a.normalize == Normalize::kGroup) return normalize_groups(a, groups, ess);
  const Units all = block_sum_of(reinterpret_cast<const Units*>(a.partial), a.seqs, Units{});
  const double units = all.at[0], sum = all.at[1], square = all.at[2];
  if (a.normalize == Normalize::kBatch && units > 0) {
    const float factor = factor_of(sum / units);
    const int64_t threads = static_cast<int64_t>(gridDim.x) * kBlock;
    for (int64_t t = blockIdx.x * int64_t{kBlock} + threadIdx.x; t < a.tokens; t += threads) {
      a.weight[t] = scaled(a, t, factor);
    }
  }
  if (blockIdx.x == 0 && threadIdx.x == 0) {
    *ess = square == 0 ? 0.0f : static_cast<float>(sum * sum / square);
  }
}

}  // namespace cuda
}  // namespace tokfuse
